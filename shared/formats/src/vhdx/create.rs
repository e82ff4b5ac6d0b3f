//! Making images: the table of blocks, metadata and region tables, then the headers, then the identifier.

use super::bat::{ENTRY_BYTES, FULLY_PRESENT, ZERO};
use super::header::{Current, FIRST_REGION, identifier, random_guid};
use super::metadata::{BLOCK_BYTES, Shape};
use super::regions::{PLACES, Regions};
use super::{FileRegion, MAX_DISK, MAX_MAPPED, MIB, metadata, too_large};
use crate::bytes::{write_bytes, zero_file};
use block::create::{CreateRequest, Creator, OptionKind, OptionSpec};
use block::{Edge, Errno, Error, ErrorKind, Preallocation};

/// Sectors of new disks, in bytes.
const SECTOR: u32 = 512;
/// How long new logs are, unless told otherwise.
const LOG_BYTES: u64 = MIB;

/// How images are made.
pub(super) const CREATOR: Creator = Creator {
    options: &[
        size("size", "size", "Virtual disk size; max of 64TB."),
        size("log_size", "log-size", "Log size; min 1MB.").with_default("1048576"),
        size(
            "block_size",
            "block-size",
            "Block Size; min 1MB, max 256MB. 0 means auto-calculate based on image size.",
        )
        .with_default("0"),
        OptionSpec::new(
            ("subformat", "subformat"),
            OptionKind::Text,
            "VHDX format type, can be either 'dynamic' or 'fixed'. Default is 'dynamic'.",
        ),
        OptionSpec::new(
            ("block_state_zero", "block-state-zero"),
            OptionKind::Switch,
            "Force use of payload blocks of type 'ZERO'. Non-standard, but default.  Do not set to \
             'off' when using 'qemu-img convert' with subformat=dynamic.",
        ),
    ],
    size_unit: SECTOR as u64,
    create: |request| Box::pin(create(request)),
};

const fn size(name: &'static str, member: &'static str, help: &'static str) -> OptionSpec {
    OptionSpec::new((name, member), OptionKind::Size, help)
}

/// What the table of blocks says at first.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    NotPresent,
    Zero,
    Fixed,
}

fn invalid(message: &str) -> Error {
    Error::new(ErrorKind::Invalid, message)
}

/// The blocks of a disk of so many bytes.
fn usual_block(disk: u64) -> u64 {
    match disk {
        _ if disk > 32 << 40 => 64 * MIB,
        _ if disk > 100 << 30 => 32 * MIB,
        _ if disk > 1 << 30 => 16 * MIB,
        _ => 8 * MIB,
    }
}

async fn create(request: &mut CreateRequest<'_>) -> Result<(), Error> {
    let disk_bytes = request.take_length()?;
    if disk_bytes > MAX_DISK {
        return Err(invalid("Image size too large; max of 64TB"));
    }
    let log = request.take_size("log-size")?.unwrap_or(LOG_BYTES);
    let log = log.max(MIB).checked_next_multiple_of(MIB);
    let log = log.filter(|log| u32::try_from(*log).is_ok());
    let log = log.ok_or_else(|| invalid("Log size must be smaller than 4 GB"))?;
    let block_bytes = match request.take_size("block-size")?.unwrap_or(0) {
        0 => usual_block(disk_bytes),
        given => (given.min(*BLOCK_BYTES.end())).next_multiple_of(MIB),
    };
    if !block_bytes.is_power_of_two() {
        return Err(invalid("Block size must be a power of two"));
    }
    let zero = request.take_bool("block-state-zero")?.unwrap_or(true);
    let kind = match request.take_choice("subformat", &["dynamic", "fixed"])? {
        Some(1) => Kind::Fixed,
        _ if zero => Kind::Zero,
        _ => Kind::NotPresent,
    };
    if request.take_preallocation()? != Preallocation::Off {
        let message = "Preallocation mode is not supported for VHDX images";
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
    let shape = Shape {
        disk_bytes,
        block_bytes,
        sector_bytes: SECTOR,
    };
    if shape.entries() > MAX_MAPPED {
        return Err(too_large(&shape));
    }
    let file = request.file().await?;
    request.finish()?;
    let plan = Plan::new(shape, log, kind);
    zero_file(&file, plan.end).await?;
    let failed = |errno| Error::io("Error writing the image", errno);
    plan.write(&file).await.map_err(failed)
}

/// Where things go in a new image.
pub(super) struct Plan {
    shape: Shape,
    kind: Kind,
    log: FileRegion,
    regions: Regions,
    /// Where blocks begin.
    data: u64,
    /// Bytes of the file.
    pub(super) end: u64,
}

impl Plan {
    pub(super) fn new(shape: Shape, log: u64, kind: Kind) -> Self {
        let behind = |offset: u64, length: u64| FileRegion { offset, length };
        let log = behind(FIRST_REGION, log);
        let bat_bytes = (shape.entries() * ENTRY_BYTES).max(1);
        let bat = behind(log.end(), bat_bytes.next_multiple_of(MIB));
        let metadata = behind(bat.end(), MIB);
        let data = metadata.end();
        let blocks = match kind {
            Kind::Fixed => shape.blocks(),
            Kind::NotPresent | Kind::Zero => 0,
        };
        Self {
            regions: Regions { bat, metadata },
            end: data + blocks * shape.block_bytes,
            data,
            log,
            shape,
            kind,
        }
    }

    /// The raw entries of the table, for entries from `first` on. Bitmaps of sectors are there for
    /// differences alone.
    fn entries(&self, first: u64, count: u64) -> Vec<u8> {
        let per_bitmap = self.shape.blocks_per_bitmap() + 1;
        let entry = |index: u64| {
            let block = index - index / per_bitmap;
            match self.kind {
                _ if index % per_bitmap == per_bitmap - 1 => 0,
                Kind::NotPresent => 0,
                Kind::Zero => ZERO,
                Kind::Fixed => (self.data + block * self.shape.block_bytes) | FULLY_PRESENT,
            }
        };
        (first..first + count)
            .flat_map(|index| entry(index).to_le_bytes())
            .collect()
    }

    pub(super) async fn write(&self, file: &Edge) -> Result<(), Errno> {
        let Regions { bat, metadata } = self.regions;
        if self.kind != Kind::NotPresent {
            let per_piece = MIB / ENTRY_BYTES;
            for first in (0..self.shape.entries()).step_by(per_piece as usize) {
                let count = per_piece.min(self.shape.entries() - first);
                let at = bat.offset + first * ENTRY_BYTES;
                write_bytes(file, at, &self.entries(first, count)).await?;
            }
        }
        let keeps_blocks = self.kind == Kind::Fixed;
        let items = metadata::encode(&self.shape, keeps_blocks, random_guid()?);
        write_bytes(file, metadata.offset, &items).await?;
        let table = self.regions.encode();
        for offset in PLACES {
            write_bytes(file, offset, &table).await?;
        }
        let mut current = Current::new(self.log)?;
        for _ in 0..2 {
            current.write(file, |_| ()).await?;
        }
        write_bytes(file, 0, &identifier()).await?;
        file.node().flush().await
    }
}
