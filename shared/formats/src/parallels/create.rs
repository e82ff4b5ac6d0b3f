//! Making images: the map, all of it zeroes, then the header.

use super::SECTOR;
use super::header::{Header, MAX_BLOCK_SECTORS};
use crate::bytes::{write_bytes, zero_file};
use block::create::{CreateRequest, Creator, OptionKind, OptionSpec};
use block::{Error, ErrorKind};

/// Length of a block in bytes, unless another is asked for.
const DEFAULT_BLOCK: u64 = 1 << 20;
/// Disks end below so many blocks.
const MAX_BLOCKS: u64 = 1 << 32;

/// How images are made.
pub(super) const CREATOR: Creator = Creator {
    options: &[
        OptionSpec::new(("size", "size"), OptionKind::Size, "Virtual disk size"),
        OptionSpec::new(
            ("cluster_size", "cluster-size"),
            OptionKind::Size,
            "Parallels image cluster size",
        )
        .with_default("1048576"),
    ],
    size_unit: SECTOR,
    create: |request| Box::pin(create(request)),
};

async fn create(request: &mut CreateRequest<'_>) -> Result<(), Error> {
    let size = request.take_length()?;
    let block_bytes = request.take_size("cluster-size")?.unwrap_or(DEFAULT_BLOCK);
    let header = header(size, block_bytes)?;
    let file = request.file().await?;
    request.finish()?;
    // All that is not the header is zeroes, which the file is longer by.
    zero_file(&file, u64::from(header.data_sector) * SECTOR).await?;
    let failed = |errno| Error::io("Failed to create Parallels image", errno);
    let written = write_bytes(&file, 0, &header.encode()).await;
    written.map_err(failed)?;
    file.node().flush().await.map_err(failed)
}

/// The header of an image for a disk of `size` bytes; sizes of blocks are whole sectors.
fn header(size: u64, block_bytes: u64) -> Result<Header, Error> {
    let refuse = |message: &str| Err(Error::new(ErrorKind::Invalid, message));
    if block_bytes > u64::from(MAX_BLOCK_SECTORS) * SECTOR {
        return refuse("Cluster size is too large");
    }
    let fits = size < block_bytes.saturating_mul(MAX_BLOCKS);
    let block_bytes = block_bytes.next_multiple_of(SECTOR);
    let header = match fits {
        true => Header::new(size, block_bytes),
        false => None,
    };
    match header {
        Some(header) => Ok(header),
        None => refuse("Image size is too large for this cluster size"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_whole_sectors_and_not_too_many() {
        let made = |size, block| header(size, block).map_err(|error| error.message);
        assert_eq!(made(5_000_000, 511).unwrap().block_sectors, 1);
        assert_eq!(made(5_000_000, 1000).unwrap().data_sector, 0x28);
        let large = "Image size is too large for this cluster size";
        assert_eq!(made(1, 0), Err(large.to_owned()));
        assert_eq!(made(1 << 62, 1 << 20), Err(large.to_owned()));
        assert_eq!(made(u64::MAX, 1 << 30), Err(large.to_owned()));
        let block = "Cluster size is too large";
        assert_eq!(made(1, 2 << 30), Err(block.to_owned()));
        assert_eq!(made(1, u64::MAX), Err(block.to_owned()));
    }
}
