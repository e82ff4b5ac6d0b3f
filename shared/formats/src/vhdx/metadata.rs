//! The metadata region ([MS-VHDX] 2.6): what the disk is like.
//!
//! | offset | field of the table, little-endian |
//! |---|---|
//! | 0, 10 | signature, how many entries follow from offset 32 on, 2047 at most |
//! | entry: 0 | GUID of the item |
//! | 16, 20 | where the item is, counted from the region's start and 64 KiB at least, and its bytes |
//! | 24 | flags; bit 2: whoever does not know it must not open the image |

use super::header::{Guid, field};
use super::regions::{MAX_ENTRIES, Regions};
use super::{MAX_DISK, MIB, corrupt, unsupported};
use crate::bytes::read_bytes;
use block::{Edge, Errno, Error};

/// Bytes of the table; items are behind it.
const TABLE_BYTES: usize = 64 << 10;
const SIGNATURE: &[u8; 8] = b"metadata";
const ENTRY_BYTES: usize = 32;
/// Where the first entry is.
const ENTRIES: usize = 32;
/// Flags of an entry: of the disk and not of the user, required.
const OF_DISK: u8 = 2;
const REQUIRED: u8 = 4;
/// Flags of the file parameters.
const KEEPS_BLOCKS: u32 = 1;
const HAS_PARENT: u32 = 2;
/// Smallest and largest block.
pub(super) const BLOCK_BYTES: std::ops::RangeInclusive<u64> = MIB..=256 * MIB;

const FILE_PARAMETERS: Guid = *b"\x37\x67\xa1\xca\x36\xfa\x43\x4d\xb3\xb6\x33\xf0\xaa\x44\xe7\x6b";
const DISK_SIZE: Guid = *b"\x24\x42\xa5\x2f\x1b\xcd\x76\x48\xb2\x11\x5d\xbe\xd8\x3b\xf4\xb8";
const PAGE_83: Guid = *b"\xab\x12\xca\xbe\xe6\xb2\x23\x45\x93\xef\xc3\x09\xe0\x00\xc7\x46";
const LOGICAL_SECTOR: Guid = *b"\x1d\xbf\x41\x81\x6f\xa9\x09\x47\xba\x47\xf2\x33\xa8\xfa\xab\x5f";
const PHYSICAL_SECTOR: Guid = *b"\xc7\x48\xa3\xcd\x5d\x44\x71\x44\x9c\xc9\xe9\x88\x52\x51\xc5\x56";
const PARENT_LOCATOR: Guid = *b"\x2d\x5f\xd3\xa8\x0b\xb3\x4d\x45\xab\xf7\xd3\xd8\x48\x34\xab\x0c";

/// What the disk is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) disk_bytes: u64,
    /// A power of two.
    pub(super) block_bytes: u64,
    /// Bytes of a sector: 512 or 4096.
    pub(super) sector_bytes: u32,
}

impl Shape {
    /// Blocks of the disk.
    pub(super) fn blocks(&self) -> u64 {
        self.disk_bytes.div_ceil(self.block_bytes)
    }

    /// After so many blocks, the table of blocks has an entry for a bitmap of sectors.
    pub(super) fn blocks_per_bitmap(&self) -> u64 {
        (u64::from(self.sector_bytes) << 23) / self.block_bytes
    }

    /// The entry of a block in the table of blocks.
    pub(super) fn entry_of(&self, block: u64) -> u64 {
        block + block / self.blocks_per_bitmap()
    }

    /// Entries of the table of blocks.
    pub(super) fn entries(&self) -> u64 {
        match self.blocks().checked_sub(1) {
            Some(last) => self.entry_of(last) + 1,
            None => 0,
        }
    }
}

/// The items that are known, as they are stored.
#[derive(Default)]
struct Items {
    parameters: Option<[u8; 8]>,
    disk: Option<[u8; 8]>,
    logical: Option<[u8; 4]>,
    physical: Option<[u8; 4]>,
    has_parent_locator: bool,
}

/// One entry of the table.
struct Entry {
    guid: Guid,
    offset: u64,
    length: u64,
    is_required: bool,
}

impl Entry {
    fn parse(bytes: &[u8], region: u64) -> Result<Self, Error> {
        let entry = Self {
            guid: field(bytes, 0),
            offset: u32::from_le_bytes(field(bytes, 16)).into(),
            length: u32::from_le_bytes(field(bytes, 20)).into(),
            is_required: bytes[24] & REQUIRED != 0,
        };
        let (offset, length) = (entry.offset, entry.length);
        let is_empty = offset == 0 && length == 0;
        if !is_empty && (offset < TABLE_BYTES as u64 || offset + length > region) {
            return Err(corrupt(format!(
                "a metadata item at 0x{offset:x} of 0x{length:x} bytes"
            )));
        }
        Ok(entry)
    }
}

/// Reads the metadata of `file`.
///
/// # Errors
/// `Corrupt`, `Unsupported`, `Io`.
pub(super) async fn read(file: &Edge, regions: &Regions) -> Result<Shape, Error> {
    let region = regions.metadata;
    let failed = |errno: Errno| Error::io("Could not read the metadata", errno);
    let table = read_bytes(file, region.offset, TABLE_BYTES).await;
    let mut items = Items::default();
    for entry in entries(&table.map_err(failed)?, region.length)? {
        items.take(file, (&entry, region.offset)).await?;
    }
    items.shape()
}

fn entries(table: &[u8], region: u64) -> Result<Vec<Entry>, Error> {
    if !table.starts_with(SIGNATURE) {
        return Err(corrupt("no metadata".to_owned()));
    }
    let count = usize::from(u16::from_le_bytes(field(table, 10)));
    if count > MAX_ENTRIES {
        return Err(corrupt(format!("{count} metadata items")));
    }
    let entries = table[ENTRIES..].chunks_exact(ENTRY_BYTES).take(count);
    entries.map(|entry| Entry::parse(entry, region)).collect()
}

impl Items {
    async fn take(&mut self, file: &Edge, (entry, region): (&Entry, u64)) -> Result<(), Error> {
        match entry.guid {
            FILE_PARAMETERS => set(&mut self.parameters, item(file, (entry, region)).await?),
            DISK_SIZE => set(&mut self.disk, item(file, (entry, region)).await?),
            LOGICAL_SECTOR => set(&mut self.logical, item(file, (entry, region)).await?),
            PHYSICAL_SECTOR => set(&mut self.physical, item(file, (entry, region)).await?),
            PARENT_LOCATOR => {
                self.has_parent_locator = true;
                Ok(())
            }
            PAGE_83 => Ok(()),
            _ if !entry.is_required => Ok(()),
            _ => Err(unsupported(
                "a required metadata item that is not known".to_owned(),
            )),
        }
    }

    fn shape(self) -> Result<Shape, Error> {
        let missing = |name: &str| corrupt(format!("no metadata item for the {name}"));
        let parameters = self.parameters.ok_or_else(|| missing("file parameters"))?;
        let disk = self.disk.ok_or_else(|| missing("disk size"))?;
        let logical = self.logical.ok_or_else(|| missing("sector size"))?;
        let physical = self
            .physical
            .ok_or_else(|| missing("physical sector size"))?;
        let flags = u32::from_le_bytes(field(&parameters, 4));
        if flags & HAS_PARENT != 0 || self.has_parent_locator {
            return Err(unsupported("a difference to another image".to_owned()));
        }
        let block_bytes = u64::from(u32::from_le_bytes(field(&parameters, 0)));
        if !block_bytes.is_power_of_two() || !BLOCK_BYTES.contains(&block_bytes) {
            return Err(corrupt(format!("blocks of {block_bytes} bytes")));
        }
        let [sector_bytes, physical] = [logical, physical].map(u32::from_le_bytes);
        for bytes in [sector_bytes, physical] {
            if bytes != 512 && bytes != 4096 {
                return Err(corrupt(format!("sectors of {bytes} bytes")));
            }
        }
        let disk_bytes = u64::from_le_bytes(disk);
        if disk_bytes > MAX_DISK || !disk_bytes.is_multiple_of(sector_bytes.into()) {
            return Err(corrupt(format!("a disk of {disk_bytes} bytes")));
        }
        Ok(Shape {
            disk_bytes,
            block_bytes,
            sector_bytes,
        })
    }
}

/// Reads the first bytes of an item.
async fn item<const N: usize>(
    file: &Edge,
    (entry, region): (&Entry, u64),
) -> Result<[u8; N], Error> {
    if entry.length < N as u64 {
        let message = format!("a metadata item of {} bytes", entry.length);
        return Err(corrupt(message));
    }
    let bytes = read_bytes(file, region + entry.offset, N).await;
    let bytes = bytes.map_err(|errno| Error::io("Could not read the metadata", errno))?;
    Ok(field(&bytes, 0))
}

fn set<T>(item: &mut Option<T>, value: T) -> Result<(), Error> {
    match item.replace(value) {
        None => Ok(()),
        Some(_) => Err(corrupt("a metadata item is there twice".to_owned())),
    }
}

/// The region's first bytes, for a disk that keeps its blocks (or not) and has the name `page_83`.
pub(super) fn encode(shape: &Shape, keeps_blocks: bool, page_83: Guid) -> Vec<u8> {
    let flags = match keeps_blocks {
        true => KEEPS_BLOCKS,
        false => 0,
    };
    let parameters = [
        (shape.block_bytes as u32).to_le_bytes(),
        flags.to_le_bytes(),
    ]
    .concat();
    let items = [
        (FILE_PARAMETERS, REQUIRED, parameters),
        (
            DISK_SIZE,
            REQUIRED | OF_DISK,
            shape.disk_bytes.to_le_bytes().to_vec(),
        ),
        (PAGE_83, REQUIRED | OF_DISK, page_83.to_vec()),
        (
            LOGICAL_SECTOR,
            REQUIRED | OF_DISK,
            shape.sector_bytes.to_le_bytes().to_vec(),
        ),
        (
            PHYSICAL_SECTOR,
            REQUIRED | OF_DISK,
            shape.sector_bytes.to_le_bytes().to_vec(),
        ),
    ];
    let mut bytes = vec![0; TABLE_BYTES];
    bytes[..8].copy_from_slice(SIGNATURE);
    bytes[10..12].copy_from_slice(&(items.len() as u16).to_le_bytes());
    for (number, (guid, flags, value)) in items.into_iter().enumerate() {
        let offset = bytes.len() as u32;
        let entry = &mut bytes[ENTRIES + number * ENTRY_BYTES..][..ENTRY_BYTES];
        entry[..16].copy_from_slice(&guid);
        entry[16..20].copy_from_slice(&offset.to_le_bytes());
        entry[20..24].copy_from_slice(&(value.len() as u32).to_le_bytes());
        entry[24] = flags;
        bytes.extend(value);
    }
    bytes
}
