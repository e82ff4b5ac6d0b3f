//! `vmdk`: disks of VMware (Virtual Disk Format 5.0), in one file or several.
//!
//! ```text
//!                       ┌ read, write ─► the extent at that offset ─┬ Sparse: FormatNode ─► file
//!   Vmdk (descriptor) ──┤                                           └ Flat: window of a file
//!                       └ first change: another CID in the descriptor, durably, before anything else
//! ```
//!
//! A disk is made of extents, one behind the other. A sparse extent is a format of its own ([`sparse`]),
//! a flat one a part of a file. The files are named by a text, the descriptor, and opened by the request
//! alone, under the policy for names in images; a file that is named twice is opened once. An image that
//! is only described has none of them open.
//!
//! Owns: the descriptor, the CID, which extent a request goes to. Extents on COWD ("vmfsSparse") and
//! seSparse files are those of ESX; the latter are only read. Discards change nothing.

mod create;
mod descriptor;
mod driver;
mod header;
mod image;
mod open;
mod space;
mod sparse;
mod stream;
mod tables;
#[cfg(test)]
mod tests;

use block::Errno;
use block::open::DriverEntry;
use header::Encoding;

/// The table line of `vmdk`.
pub const ENTRY: DriverEntry = DriverEntry::new("vmdk", |request| Box::pin(open::open(request)))
    .with_probe(header::probe)
    .with_compression()
    .with_create(create::CREATOR);

const SECTOR: u64 = 512;

/// An entry of a grain table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Entry {
    /// The grain is not here.
    Absent,
    /// It reads as zeroes.
    Zero,
    /// It begins at this sector of the file.
    At(u64),
    /// What makes no sense.
    Bad,
}

/// Entries of 64 bits: which of four kinds in the uppermost digit, the number of a grain with its lowest
/// digits on top.
const SE_KIND: u64 = 0xf000_0000_0000_0000;
const SE_UNMAPPED: u64 = 0x1000_0000_0000_0000;
const SE_ZERO: u64 = 0x2000_0000_0000_0000;
const SE_MAPPED: u64 = 0x3000_0000_0000_0000;
const SE_LOW: u64 = 0x0fff_0000_0000_0000;
const SE_HIGH: u64 = 0x0000_ffff_ffff_ffff;

impl Entry {
    const ZERO: u64 = u64::MAX;
    const BAD: u64 = u64::MAX - 1;

    /// In memory.
    fn word(self) -> u64 {
        match self {
            Self::Absent => 0,
            Self::Zero => Self::ZERO,
            Self::Bad => Self::BAD,
            Self::At(sector) => sector,
        }
    }

    fn of_word(word: u64) -> Self {
        match word {
            0 => Self::Absent,
            Self::ZERO => Self::Zero,
            Self::BAD => Self::Bad,
            sector => Self::At(sector),
        }
    }

    /// From a file.
    fn decode(encoding: Encoding, grain_sectors: u64, raw: u64) -> Self {
        match encoding {
            _ if raw == 0 => Self::Absent,
            Encoding::SectorsOrZero if raw == 1 => Self::Zero,
            Encoding::Sectors | Encoding::SectorsOrZero => Self::At(raw),
            Encoding::Numbers { grains, .. } => match raw & SE_KIND {
                SE_UNMAPPED | SE_ZERO => Self::Zero,
                SE_MAPPED => {
                    let number = (raw & SE_LOW) >> 48 | (raw & SE_HIGH) << 12;
                    let sector = number.checked_mul(grain_sectors);
                    let sector = sector.and_then(|it| it.checked_add(grains));
                    let is_possible = |sector: &u64| *sector < Self::BAD / SECTOR;
                    sector.filter(is_possible).map_or(Self::Bad, Self::At)
                }
                _ => Self::Bad,
            },
        }
    }

    /// For a file with entries of 32 bits.
    fn encode(self) -> Option<u32> {
        match self {
            Self::Absent => Some(0),
            Self::Zero => Some(1),
            Self::At(sector) => u32::try_from(sector).ok(),
            Self::Bad => None,
        }
    }
}

/// The first sector of a table, by an entry of a directory whose tables have so many bytes.
fn table_sector(encoding: Encoding, (raw, bytes): (u64, u64)) -> Result<Option<u64>, Errno> {
    match encoding {
        _ if raw == 0 => Ok(None),
        Encoding::Sectors | Encoding::SectorsOrZero => Ok(Some(raw)),
        Encoding::Numbers { tables, .. } => {
            if raw & !u64::from(u32::MAX) != SE_UNMAPPED {
                return Err(Errno::EIO);
            }
            let behind = (raw & u64::from(u32::MAX)) * (bytes / SECTOR);
            tables.checked_add(behind).map(Some).ok_or(Errno::EIO)
        }
    }
}
