//! Making images: the name of the backing file and an empty L1 table, then the header.

use super::header::{Crypt, Header};
use crate::luks::options::Members;
use crate::two_level::NewImage;
use block::create::{CreateRequest, Creator, OptionKind, OptionSpec};
use block::{ByteRange, Error, ErrorKind, Preallocation};

const SECTOR: u64 = 512;

const fn text(name: &'static str, help: &'static str) -> OptionSpec {
    OptionSpec::new((name, name), OptionKind::Text, help)
}

/// How images are made.
pub(super) const CREATOR: Creator = Creator {
    options: &[
        OptionSpec::new(("size", "size"), OptionKind::Size, "Virtual disk size"),
        OptionSpec::new(
            ("backing_file", "backing-file"),
            OptionKind::Text,
            "File name of a base image",
        ),
        OptionSpec::new(
            ("backing_fmt", "backing-fmt"),
            OptionKind::Text,
            "Format of the backing image",
        ),
        OptionSpec::new(
            ("encryption", "encryption"),
            OptionKind::Switch,
            "Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)",
        ),
        text("encrypt.format", "Encrypt the image, format choices: 'aes'"),
        text(
            "encrypt.key-secret",
            "ID of the secret that provides the AES encryption key",
        ),
    ],
    size_unit: SECTOR,
    create: |request| Box::pin(create(request)),
};

/// Takes the `encrypt` option.
fn take_crypt(request: &mut CreateRequest<'_>) -> Result<Crypt, Error> {
    let invalid = |message: String| Err(Error::new(ErrorKind::Invalid, message));
    let mut members = Members::of_encrypt(request.take("encrypt"))?;
    if members.is_empty() {
        return Ok(Crypt::None);
    }
    let format = members.text("format")?;
    match format.ok_or_else(|| members.missing("format"))?.as_str() {
        "aes" => {}
        "luks" => return invalid("Unsupported encryption format".into()),
        other => {
            return invalid(format!(
                "Parameter 'format' does not accept value '{other}'"
            ));
        }
    }
    // Nothing is encrypted yet: the key must be there, and that is all.
    request.secret(&members.key_secret()?)?;
    members.finish()?;
    Ok(Crypt::Aes)
}

async fn create(request: &mut CreateRequest<'_>) -> Result<(), Error> {
    let size = request.take_length()?;
    let name = request.take_str("backing-file")?;
    // The format has no place for it.
    request.take_str("backing-fmt")?;
    let crypt = take_crypt(request)?;
    let header = Header::new(size, name.as_deref(), crypt)?;
    if request.take_preallocation()? != Preallocation::Off {
        let message = "Preallocation mode is not supported for qcow images";
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
    let file = request.file().await?;
    request.finish()?;
    let image = NewImage {
        l1: ByteRange::new(header.l1_offset, header.l1_end() - header.l1_offset),
        name: header
            .name
            .as_ref()
            .zip(name.as_deref())
            .map(|(place, name)| (place.offset, name)),
        header: &header.encode(),
    };
    image.write(&file).await
}
