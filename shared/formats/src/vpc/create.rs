//! Making images: headers and map, and the footer last.

use super::SECTOR;
use super::footer::{FOOTER_BYTES, Footer, Geometry, Header, Kind, MAX_SECTORS};
use crate::bytes::write_bytes;
use block::create::{CreateRequest, Creator, OptionKind, OptionSpec};
use block::{Edge, Errno, Error, ErrorKind, Resize};
use rand::TryRngCore;
use rand::rngs::OsRng;
use std::time::{SystemTime, UNIX_EPOCH};

/// Bytes of a block.
const BLOCK: u32 = 2 << 20;
/// Where the header of a dynamic disk is, and where its map.
const HEADER_AT: u64 = 512;
const MAP_AT: u64 = 1536;
/// From 1970 to 2000, in seconds.
const EPOCH: u64 = 946_684_800;

/// How images are made.
pub(super) const CREATOR: Creator = Creator {
    options: &[
        OptionSpec::new(("size", "size"), OptionKind::Size, "Virtual disk size"),
        OptionSpec::new(
            ("subformat", "subformat"),
            OptionKind::Text,
            "Type of virtual hard disk format. Supported formats are {dynamic (default) | fixed} ",
        ),
        OptionSpec::new(
            ("force_size", "force-size"),
            OptionKind::Switch,
            "Force disk size calculation to use the actual size specified, rather than using the \
             nearest CHS-based calculation",
        ),
    ],
    size_unit: SECTOR,
    create: |request| Box::pin(create(request)),
};

async fn create(request: &mut CreateRequest<'_>) -> Result<(), Error> {
    let size = request.take_length()?;
    let kind = match request.take_choice("subformat", &["dynamic", "fixed"])? {
        None | Some(0) => Kind::Dynamic,
        Some(_) => Kind::Fixed,
    };
    let is_exact = request.take_bool("force-size")?.unwrap_or(false);
    let footer = footer((size, kind), is_exact)?;
    let file = request.file().await?;
    request.finish()?;
    file.node().resize(Resize::to(0)).await?;
    let written = match kind {
        Kind::Fixed => {
            let length = footer.bytes + FOOTER_BYTES as u64;
            file.node().resize(Resize::to(length)).await?;
            write_bytes(&file, footer.bytes, &footer.encode()).await
        }
        _ => write_dynamic(&file, &footer).await,
    };
    let failed = |errno| Error::io("Error writing the image", errno);
    written.map_err(failed)?;
    file.node().flush().await.map_err(failed)
}

/// The footer of a disk with at least `size` bytes, or just so many.
fn footer((size, kind): (u64, Kind), is_exact: bool) -> Result<Footer, Error> {
    let wanted = size.div_ceil(SECTOR);
    let geometry = match is_exact {
        true => Geometry::LARGEST,
        false => Geometry::covering(wanted),
    };
    let sectors = match geometry == Geometry::LARGEST {
        true => wanted,
        false => geometry.sectors(),
    };
    if sectors > MAX_SECTORS {
        let message = "The image size is too large for file format 'vpc'";
        return Err(Error::new(ErrorKind::Invalid, message));
    }
    let mut uuid = [0; 16];
    let filled = OsRng.try_fill_bytes(&mut uuid);
    filled.map_err(|error| Error::new(ErrorKind::Io, format!("no random UUID: {error}")))?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let made = now.map_or(0, |now| now.as_secs().saturating_sub(EPOCH));
    Ok(Footer {
        kind,
        header_offset: match kind {
            Kind::Fixed => u64::MAX,
            _ => HEADER_AT,
        },
        made: u32::try_from(made).unwrap_or(u32::MAX),
        creator: if is_exact { *b"qem2" } else { *b"qemu" },
        bytes: sectors * SECTOR,
        geometry,
        uuid,
    })
}

async fn write_dynamic(file: &Edge, footer: &Footer) -> Result<(), Errno> {
    let header = Header {
        map_offset: MAP_AT,
        entries: footer.bytes.div_ceil(u64::from(BLOCK)) as u32,
        block_bytes: BLOCK,
    };
    let map = vec![0xff; (header.map_end() - MAP_AT) as usize];
    write_bytes(file, header.map_end(), &footer.encode()).await?;
    write_bytes(file, MAP_AT, &map).await?;
    write_bytes(file, HEADER_AT, &header.encode()).await?;
    write_bytes(file, 0, &footer.encode()).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_rounded_up_to_a_geometry_unless_they_must_not_be() {
        let bytes = |size, is_exact| {
            let footer = footer((size, Kind::Dynamic), is_exact);
            footer
                .map(|footer| footer.bytes)
                .map_err(|error| error.message)
        };
        assert_eq!(bytes(1 << 20, false), Ok(1_079_296));
        assert_eq!(bytes(1 << 20, true), Ok(1 << 20));
        assert_eq!(bytes(127 << 30, false), Ok(136_365_219_840));
        assert_eq!(bytes(2040 << 30, false), Ok(2040 << 30));
        let large = "The image size is too large for file format 'vpc'";
        assert_eq!(bytes(3 << 40, false), Err(large.to_owned()));
        assert_eq!(bytes(u64::MAX, true), Err(large.to_owned()));
    }
}
