//! Encryption (QEMU docs/interop/qcow2.txt, "Full disk encryption header pointer" and "Data
//! encryption").
//!
//! ```text
//!   crypt method 2  LUKS header in clusters of its own ◄── extension 0x0537be77 (offset, length)
//!                   sectors tied to their offset in the file
//!   crypt method 1  AES-128-CBC, key = password; sectors tied to their offset on the disk
//! ```
//!
//! Plain data is encrypted, metadata and compressed clusters are not; so an image that encrypts
//! takes no compressed writes. Owns: options, making and opening of the key; the data itself goes
//! through [`block::FormatNode`].

use super::document::edit;
use super::header::{CryptMethod, Header, extension, field};
use super::open::read_header;
use super::tables::{ClusterRun, HostCluster};
use super::{OpenOptions, Qcow2};
use crate::luks::options::{Members, missing_key};
use crate::luks::{self, Location, Password, Sectors, Served, Volume, legacy_aes};
use block::amend::AmendRequest;
use block::cipher::Tweak;
use block::create::CreateRequest;
use block::{Edge, Error, ErrorKind, Format, OpenRequest, SectorCipher};
use serde_json::{Value, json};
use std::sync::Arc;

/// What comes before the options of a volume in messages.
const PREFIX: &str = "encrypt.";

/// What an encrypted image is opened with.
pub struct Crypto {
    cipher: Option<Sectors>,
    luks: Option<Served>,
}

/// How a new image is encrypted.
#[derive(Clone)]
pub enum Encryption {
    /// Crypt method 1.
    Aes(Password),
    /// Crypt method 2.
    Luks(luks::CreateOptions, Password),
}

impl Encryption {
    /// Bytes of the image that are neither metadata nor data, in a row.
    pub(super) fn bytes(&self) -> u64 {
        match self {
            Self::Aes(_) => 0,
            Self::Luks(options, _) => Volume::header_bytes(options),
        }
    }
}

impl std::fmt::Debug for Encryption {
    /// Says nothing about the password.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Aes(_) => "aes",
            Self::Luks(..) => "luks",
        })
    }
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Invalid, message)
}

impl Crypto {
    /// Reads and writes with a cipher that is keyed already, whatever the image's own keys are.
    pub fn of(cipher: Sectors) -> Self {
        Self {
            cipher: Some(cipher),
            luks: None,
        }
    }

    /// Opens what the header says with a password.
    ///
    /// # Errors
    /// As [`Volume::open`].
    pub(super) async fn open(
        file: &Edge,
        header: &Header,
        password: &Password,
    ) -> Result<Option<Self>, Error> {
        Ok(match header.crypt {
            CryptMethod::None => None,
            CryptMethod::Aes => Some(Self {
                cipher: Some(legacy_aes(password)),
                luks: None,
            }),
            CryptMethod::Luks { offset, .. } => {
                let volume = Served::open(Location { file, offset }, password).await?;
                Some(Self {
                    cipher: volume.cipher(Tweak::HostOffset),
                    luks: Some(volume),
                })
            }
        })
    }

    /// What a new image was just encrypted with.
    pub(super) async fn of_new(
        file: &Edge,
        encryption: Option<&Encryption>,
    ) -> Result<Option<Arc<Self>>, Error> {
        let Some(encryption) = encryption else {
            return Ok(None);
        };
        let header = read_header(file).await?;
        let crypto = match encryption {
            Encryption::Aes(password) | Encryption::Luks(_, password) => {
                Self::open(file, &header, password).await?
            }
        };
        Ok(crypto.map(Arc::new))
    }

    /// What can be said about an encrypted image without its key.
    async fn describe_only(file: &Edge, header: &Header) -> Result<Option<Self>, Error> {
        Ok(match header.crypt {
            CryptMethod::None => None,
            CryptMethod::Aes => Some(Self {
                cipher: None,
                luks: None,
            }),
            CryptMethod::Luks { offset, .. } => Some(Self {
                cipher: None,
                luks: Some(Served::describe_only(Location { file, offset }).await?),
            }),
        })
    }

    pub(super) fn cipher(&self) -> Option<&dyn SectorCipher> {
        self.cipher
            .as_ref()
            .map(|cipher| cipher as &dyn SectorCipher)
    }

    /// The "encrypt" member of format-specific information.
    pub(super) fn describe(&self) -> Value {
        let Some(volume) = &self.luks else {
            return json!({"format": "aes"});
        };
        let mut described = volume.describe();
        described.insert("format".into(), json!("luks"));
        Value::Object(described)
    }
}

/// Takes the `encrypt` option of a node and opens the image's key with it.
pub(super) async fn open_for(
    request: &mut OpenRequest<'_>,
    (file, header): (&Edge, &Header),
) -> Result<Option<Crypto>, Error> {
    let mut members = Members::of_encrypt(request.take("encrypt"))?;
    let format = members.text("format")?;
    let secret = members.text("key-secret")?;
    members.finish()?;
    match (&format, header.crypt.name()) {
        (Some(format), None) => {
            return Err(invalid(format!(
                "No encryption in image header, but options specified format '{format}'"
            )));
        }
        (Some(format), Some(name)) if format != name => {
            return Err(invalid(format!(
                "Header reported '{name}' encryption format but options specify '{format}'"
            )));
        }
        (_, None) => return Ok(None),
        _ => {}
    }
    if !request.purpose().needs_content() {
        return Crypto::describe_only(file, header).await;
    }
    let secret = secret.ok_or_else(|| missing_key(PREFIX))?;
    Crypto::open(file, header, &request.secret(&secret)?).await
}

/// Takes the `encrypt` option of `create`.
pub(super) fn take_creation(request: &mut CreateRequest<'_>) -> Result<Option<Encryption>, Error> {
    let mut members = Members::of_encrypt(request.take("encrypt"))?;
    if members.is_empty() {
        return Ok(None);
    }
    let format = members.text("format")?;
    let format = format.ok_or_else(|| members.missing("format"))?;
    let encryption = match format.as_str() {
        "aes" => Encryption::Aes(request.secret(&members.key_secret()?)?),
        "luks" => {
            let secret = members.key_secret();
            let options = members.creation()?;
            Encryption::Luks(options, request.secret(&secret?)?)
        }
        other => {
            return Err(invalid(format!(
                "Parameter 'format' does not accept value '{other}'"
            )));
        }
    };
    members.finish()?;
    Ok(Some(encryption))
}

/// Takes the encryption of an image that is not made: the options of a LUKS volume, whose secret must
/// be there; other kinds need no space.
pub(super) fn take_luks(
    request: &mut CreateRequest<'_>,
) -> Result<Option<luks::CreateOptions>, Error> {
    let mut members = Members::of_encrypt(request.take("encrypt"))?;
    if members.text("format")?.as_deref() != Some("luks") {
        return Ok(None);
    }
    let secret = members.key_secret()?;
    request.secret(&secret)?;
    members.creation().map(Some)
}

/// Takes the change of key slots that `encrypt` asks for.
pub(super) fn take_amendment(
    header: &Header,
    changes: &mut AmendRequest<'_>,
) -> Result<Option<luks::Amend>, Error> {
    let Some(value) = changes.take("encrypt") else {
        return Ok(None);
    };
    header_offset(header)?;
    let mut members = Members::of_encrypt(Some(value))?.without_prefix();
    if members
        .text("format")?
        .is_some_and(|format| format != "luks")
    {
        return Err(invalid(
            "Amend can't be used to change the qcow2 encryption format",
        ));
    }
    let amend = members.amendment(changes.force, |id| changes.secret(id))?;
    members.finish()?;
    Ok(Some(amend))
}

/// Where the key slots of an image are.
fn header_offset(header: &Header) -> Result<u64, Error> {
    match header.crypt {
        CryptMethod::Luks { offset, .. } => Ok(offset),
        CryptMethod::Aes => Err(invalid("Only LUKS encryption options can be amended")),
        CryptMethod::None => Err(invalid(
            "Can't amend encryption options - encryption not present",
        )),
    }
}

/// Changes the key slots of an image that was opened with `crypto`.
pub(super) async fn amend_keys(
    (file, header): (&Edge, &Header),
    crypto: Option<&Crypto>,
    amend: luks::Amend,
) -> Result<(), Error> {
    let offset = header_offset(header)?;
    match crypto.and_then(|crypto| crypto.luks.as_ref()) {
        Some(volume) => volume.amend(Location { file, offset }, amend).await,
        None => Err(missing_key(PREFIX)),
    }
}

impl Qcow2 {
    /// Changes key slots while the image serves.
    pub(super) async fn amend_serving(&self, changes: &mut AmendRequest<'_>) -> Result<(), Error> {
        let Some(keys) = take_amendment(&self.header, changes)? else {
            let message =
                "Only LUKS encryption options can be amended for qcow2 with blockdev-amend";
            return Err(invalid(message));
        };
        changes.finish()?;
        amend_keys((&self.file, &self.header), self.crypto.as_deref(), keys).await
    }
}

/// Makes a new, empty image an encrypted one; gives the file and the data file back. The header comes
/// last. Key material lies in the image's own file, wherever its data is.
pub(super) async fn encrypt_new(
    (file, data_file): (Edge, Option<Edge>),
    encryption: &Encryption,
) -> Result<(Edge, Option<Edge>), Error> {
    let failed = |errno| Error::io("Could not write encryption header", errno);
    let open = OpenOptions {
        data_file,
        ..OpenOptions::default()
    };
    let image = Qcow2::open(file, None, open).await?;
    let (method, pointer) = match encryption {
        Encryption::Aes(_) => (CryptMethod::AES, None),
        Encryption::Luks(options, password) => {
            let length = Volume::header_bytes(options);
            let clusters = length.div_ceil(image.geometry.cluster_size());
            let run = image.contiguous(clusters).await?;
            let offset = image.geometry.host_offset(run.first).0;
            let location = Location {
                file: &image.file,
                offset,
            };
            Volume::create(location, options, password).await?;
            // The last cluster may reach beyond what was written.
            let end = offset + (clusters << image.geometry.cluster_bits);
            if image.file.node().length() < end {
                image.write_bytes(end - 1, &[0]).await.map_err(failed)?;
            }
            let pointer = [offset.to_be_bytes(), length.to_be_bytes()].concat();
            (CryptMethod::LUKS, Some(pointer))
        }
    };
    image.close().await.map_err(failed)?;
    let (file, data_file) = (image.file, image.data_file);
    let cluster_bits = image.geometry.cluster_bits;
    edit(&file, cluster_bits, |header| {
        header.set_u32(field::CRYPT_METHOD, method);
        header.set_extension(extension::CRYPTO, pointer);
        Ok(())
    })
    .await?;
    Ok((file, data_file))
}

/// How often a row of clusters is looked for.
const MAX_RESTARTS: u32 = 8;

impl Qcow2 {
    /// Allocates `want` clusters in a row.
    async fn contiguous(&self, want: u64) -> Result<ClusterRun, Error> {
        let failed = |errno| {
            let message = format!("Cannot allocate {want} clusters for the LUKS header");
            Error::io(message, errno)
        };
        let mut found = ClusterRun {
            first: HostCluster(0),
            count: 0,
        };
        let mut restarts = 0;
        // The layout of a new image has room for it; a refcount block in between starts it over.
        while found.count < want {
            let (run, _) = self.allocate(want - found.count).await.map_err(failed)?;
            if found.count > 0 && found.end() == run.first.0 {
                found.count += run.count;
                continue;
            }
            if found.count > 0 {
                self.state().give_back(found);
                restarts += 1;
            }
            found = run;
            if restarts > MAX_RESTARTS {
                self.state().give_back(found);
                return Err(failed(executor::Errno::EFBIG));
            }
        }
        Ok(found)
    }
}
