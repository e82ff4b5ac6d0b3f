//! Making images: the map first, then the header.

use super::header::{Header, Kind};
use super::{BLOCK, MAX_MAPPED, NO_BLOCK, too_large};
use crate::bytes::{write_bytes, zero_file};
use block::create::{CreateRequest, Creator, OptionKind, OptionSpec};
use block::{Error, ErrorKind, Preallocation};
use rand::TryRngCore;
use rand::rngs::OsRng;

/// How images are made.
pub(super) const CREATOR: Creator = Creator {
    options: &[
        OptionSpec::new(("size", "size"), OptionKind::Size, "Virtual disk size"),
        OptionSpec::new(
            ("static", "static"),
            OptionKind::Switch,
            "VDI static (pre-allocated) image",
        )
        .with_default("off"),
    ],
    size_unit: super::SECTOR,
    create: |request| Box::pin(create(request)),
};

async fn create(request: &mut CreateRequest<'_>) -> Result<(), Error> {
    let size = request.take_length()?;
    let is_static = request.take_bool("static")?.unwrap_or(false);
    let kind = match request.take_preallocation()? {
        Preallocation::Off if !is_static => Kind::Dynamic,
        Preallocation::Off | Preallocation::Metadata => Kind::Static,
        Preallocation::Falloc | Preallocation::Full => {
            let message = "Preallocation mode is not supported for VDI images";
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
    };
    if size.div_ceil(BLOCK) > u64::from(MAX_MAPPED) {
        return Err(too_large(size));
    }
    let file = request.file().await?;
    request.finish()?;
    let blocks = size.div_ceil(BLOCK) as u32;
    let header = Header::new(kind, size, blocks);
    let length = u64::from(header.data_offset) + u64::from(header.allocated) * BLOCK;
    zero_file(&file, length).await?;
    let entry = |block| match kind {
        Kind::Dynamic => NO_BLOCK,
        Kind::Static => block,
    };
    let map: Vec<u8> = (0..blocks)
        .flat_map(|block| entry(block).to_le_bytes())
        .collect();
    let failed = |errno| Error::io("Error writing the image", errno);
    let map_offset = u64::from(header.map_offset);
    write_bytes(&file, map_offset, &map).await.map_err(failed)?;
    let mut uuids = [[0; 16]; 2];
    for uuid in &mut uuids {
        let filled = OsRng.try_fill_bytes(uuid);
        filled.map_err(|error| Error::new(ErrorKind::Io, format!("no random UUID: {error}")))?;
    }
    let header = header.encode(uuids);
    write_bytes(&file, 0, &header).await.map_err(failed)?;
    file.node().flush().await.map_err(failed)
}
