//! The headers of sparse extents: where the tables are, and how long all parts are.
//!
//! Hosted sparse extents (Virtual Disk Format 5.0, "Hosted Sparse Extents"), little-endian:
//!
//! | offset | field |
//! |---|---|
//! | 0, 4, 8 | magic "KDMV", version, flags (below) |
//! | 12, 20 | sectors of the extent, sectors of a grain, 64 bits each |
//! | 28, 36 | first sector and sectors of the descriptor inside, 64 bits each |
//! | 44 | entries of a grain table |
//! | 48, 56 | first sectors of the redundant grain directory and of the grain directory, 64 bits each |
//! | 64 | sectors of metadata before the grains, 64 bits |
//! | 72, 73 | not closed cleanly; bytes that a transfer as text would change |
//! | 77 | how grains are compressed, 16 bits: 1 is deflate |
//!
//! ESX server sparse extents ("COWD"), 32 bits each from offset 4 on: version, flags, sectors, sectors
//! of a grain, first sector of the grain directory, its entries; a grain table has 4096.
//!
//! seSparse extents have 64-bit words: magic 0xcafebabe, version, sectors, sectors of a grain (8), sectors
//! of a grain table (64), flags, 4 reserved; volatile header, journal header, journal, grain directory,
//! grain tables, free bitmap, back map and grains, with the first sector and the number of sectors of each.

use super::SECTOR;
use crate::bytes::read_bytes;
use block::{ByteRange, Edge, Error, ErrorKind};

/// Bytes of a header, with what fills its sector.
pub(super) const HEADER_BYTES: usize = 512;
pub(super) const HOSTED_MAGIC: [u8; 4] = *b"KDMV";
pub(super) const COWD_MAGIC: [u8; 4] = *b"COWD";
const SE_CONST_MAGIC: u64 = 0xcafe_babe;
const SE_VOLATILE_MAGIC: u64 = 0xcafe_cafe;
const SE_VERSION: u64 = 0x2_0000_0001;

/// Flags of hosted extents.
pub(super) const FLAG_NEW_LINES: u32 = 1;
pub(super) const FLAG_REDUNDANT: u32 = 1 << 1;
pub(super) const FLAG_ZERO_GRAINS: u32 = 1 << 2;
pub(super) const FLAG_COMPRESSED: u32 = 1 << 16;
pub(super) const FLAG_MARKERS: u32 = 1 << 17;
pub(super) const DEFLATE: u16 = 1;

/// The directory stands at the end of the file: a footer says where.
const AT_END: u64 = u64::MAX;
/// From the start of the footer's marker to the end of the file, in bytes.
const FOOTER_BYTES: u64 = 3 * SECTOR;
const MARKER_END: u32 = 0;
const MARKER_FOOTER: u32 = 3;

/// Most entries of a hosted grain table.
const MAX_TABLE_ENTRIES: u32 = 512;
/// Entries of other grain tables.
const COWD_TABLE_ENTRIES: u32 = 4096;
/// Most sectors of a grain: 16 MiB, and of a compressed one 2 MiB, since both are held in memory.
const MAX_GRAIN_SECTORS: u64 = 0x8000;
const MAX_COMPRESSED_SECTORS: u64 = 0x1000;
/// Most entries of a grain directory: 16 MiB of memory.
const MAX_DIRECTORY: u64 = 4 << 20;

/// How entries are encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Encoding {
    /// First sectors, 32 bits.
    Sectors,
    /// First sectors, 32 bits; 1: the grain reads as zeroes.
    SectorsOrZero,
    /// Numbers of grain tables and of grains, 64 bits, behind these sectors.
    Numbers { tables: u64, grains: u64 },
}

/// What a header says, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) encoding: Encoding,
    pub(super) sectors: u64,
    pub(super) grain_sectors: u64,
    pub(super) table_entries: u32,
    /// Where the directory begins, in bytes, and its entries.
    pub(super) directory: u64,
    pub(super) directory_entries: u64,
    /// Where its copy begins, in bytes.
    pub(super) redundant: Option<u64>,
    /// Grains are compressed, each behind a marker or not.
    pub(super) compressed: bool,
    pub(super) markers: bool,
    /// First sector that may be a grain's.
    pub(super) first_grain: u64,
    /// The descriptor inside the file.
    pub(super) descriptor: Option<ByteRange>,
    pub(super) version: u32,
}

/// What a file is that begins as a sparse extent does.
#[derive(Debug)]
pub(super) enum Found {
    Extent(Layout),
    /// No extent, but a descriptor at this offset, in bytes.
    DescriptorAt(u64),
}

fn word(bytes: &[u8], offset: usize) -> u32 {
    let field = bytes[offset..].first_chunk();
    u32::from_le_bytes(*field.expect("the header is longer"))
}

fn long(bytes: &[u8], offset: usize) -> u64 {
    let field = bytes[offset..].first_chunk();
    u64::from_le_bytes(*field.expect("the header is longer"))
}

fn corrupt(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, message)
}

fn unsupported(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Unsupported, message)
}

/// How sure it is that a file that begins so is an image of VMware.
pub(super) fn probe(start: &[u8]) -> u8 {
    match start.first_chunk() {
        Some(&HOSTED_MAGIC | &COWD_MAGIC) => 100,
        _ => super::descriptor::probe(start),
    }
}

fn bytes_of(sectors: u64) -> Result<u64, Error> {
    let bytes = sectors
        .checked_mul(SECTOR)
        .filter(|it| *it <= i64::MAX as u64);
    bytes.ok_or_else(|| corrupt(format!("sector {sectors} is beyond the end of any file")))
}

impl Layout {
    /// Sectors that one grain table is about.
    pub(super) fn table_sectors(&self) -> u64 {
        self.grain_sectors * u64::from(self.table_entries)
    }

    /// Bytes of an entry.
    pub(super) fn entry_bytes(&self) -> u64 {
        match self.encoding {
            Encoding::Numbers { .. } => 8,
            Encoding::Sectors | Encoding::SectorsOrZero => 4,
        }
    }

    /// Sizes that nothing overflows with, within what memory there is for them.
    fn checked(self, file: &Edge) -> Result<Self, Error> {
        let most = match self.compressed {
            true => MAX_COMPRESSED_SECTORS,
            false => MAX_GRAIN_SECTORS,
        };
        if self.table_entries > COWD_TABLE_ENTRIES {
            return Err(corrupt("L2 table size too big"));
        }
        if self.grain_sectors > most
            || !(self.grain_sectors.is_power_of_two() || self.grain_sectors == 0)
        {
            return Err(corrupt("Invalid granularity, image may be corrupt"));
        }
        if self.table_sectors() == 0 {
            return Err(corrupt("L1 entry size is invalid"));
        }
        let needed = self.sectors.div_ceil(self.table_sectors());
        if self.directory_entries.max(needed) > MAX_DIRECTORY {
            return Err(unsupported("L1 size too big"));
        }
        bytes_of(self.sectors)?;
        if self.directory_entries < needed {
            return Err(corrupt(format!(
                "the grain directory has {} entries, {needed} are needed",
                self.directory_entries
            )));
        }
        let length = self.directory_entries * self.entry_bytes();
        for directory in [Some(self.directory), self.redundant].into_iter().flatten() {
            let end = directory.checked_add(length);
            if end.is_none_or(|end| end > file.node().length()) {
                let name = file.node().filename();
                return Err(corrupt(format!(
                    "Could not read l1 table from extent '{name}'"
                )));
            }
        }
        Ok(self)
    }
}

/// Reads the header of the hosted or COWD extent in `file`.
///
/// # Errors
/// `Corrupt`, `Unsupported` naming what it is, `Io`.
pub(super) async fn read(file: &Edge) -> Result<Found, Error> {
    let header = read_sectors(file, 0, 1).await?;
    match header.first_chunk() {
        Some(&HOSTED_MAGIC) => {}
        Some(&COWD_MAGIC) => return cowd(&header, file).map(Found::Extent),
        _ => return Err(corrupt("Image not in VMDK format")),
    }
    let (capacity, descriptor) = (long(&header, 12), long(&header, 28));
    if capacity == 0 && descriptor != 0 {
        return bytes_of(descriptor).map(Found::DescriptorAt);
    }
    let header = match long(&header, 56) {
        AT_END => footer(file).await?,
        _ => header,
    };
    hosted(&header, file).map(Found::Extent)
}

async fn read_sectors(file: &Edge, offset: u64, sectors: usize) -> Result<Vec<u8>, Error> {
    let bytes = read_bytes(file, offset, sectors * SECTOR as usize).await;
    bytes.map_err(|errno| {
        let name = file.node().filename();
        Error::io(format!("Could not read header from file '{name}'"), errno)
    })
}

/// The header that the footer at the end of the file is.
async fn footer(file: &Edge) -> Result<Vec<u8>, Error> {
    let length = file.node().length() / SECTOR * SECTOR;
    let start = length.checked_sub(FOOTER_BYTES);
    let start = start.ok_or_else(|| corrupt("Invalid footer"))?;
    let bytes = read_sectors(file, start, 3).await?;
    let (marker, rest) = bytes.split_at(SECTOR as usize);
    let (header, end) = rest.split_at(SECTOR as usize);
    let is_footer = (word(marker, 8), word(marker, 12)) == (0, MARKER_FOOTER);
    let is_end = (long(end, 0), word(end, 8), word(end, 12)) == (0, 0, MARKER_END);
    match is_footer && is_end && header.starts_with(&HOSTED_MAGIC) && long(header, 56) != AT_END {
        true => Ok(header.to_vec()),
        false => Err(corrupt("Invalid footer")),
    }
}

fn hosted(header: &[u8], file: &Edge) -> Result<Layout, Error> {
    let (version, flags) = (word(header, 4), word(header, 8));
    if version > 3 {
        return Err(unsupported(format!("Unsupported VMDK version {version}")));
    }
    let table_entries = word(header, 44);
    if table_entries > MAX_TABLE_ENTRIES {
        return Err(corrupt("L2 table size too big"));
    }
    let (sectors, grain_sectors) = (long(header, 12), long(header, 20));
    let table_sectors = grain_sectors.saturating_mul(table_entries.into());
    let directory_entries = sectors.checked_div(table_sectors).unwrap_or(0)
        + u64::from(!sectors.is_multiple_of(table_sectors.max(1)));
    let descriptor = match (long(header, 28), long(header, 36)) {
        (0, _) | (_, 0) => None,
        (offset, sectors) => Some(ByteRange::new(bytes_of(offset)?, bytes_of(sectors)?)),
    };
    let flag = |flag| flags & flag != 0;
    let algorithm = u16::from_le_bytes([header[77], header[78]]);
    let layout = Layout {
        encoding: match flag(FLAG_ZERO_GRAINS) {
            true => Encoding::SectorsOrZero,
            false => Encoding::Sectors,
        },
        sectors,
        grain_sectors,
        table_entries,
        directory_entries,
        directory: long(header, 56).saturating_mul(SECTOR),
        redundant: flag(FLAG_REDUNDANT).then(|| long(header, 48).saturating_mul(SECTOR)),
        compressed: algorithm == DEFLATE,
        markers: flag(FLAG_MARKERS),
        first_grain: long(header, 64),
        descriptor,
        version,
    };
    let layout = layout.checked(file)?;
    let needed = bytes_of(layout.first_grain)?;
    if file.node().length() < needed {
        let message = format!("File truncated, expecting at least {needed} bytes");
        return Err(corrupt(message));
    }
    if flag(FLAG_COMPRESSED) && !layout.compressed {
        let message = format!("Unsupported VMDK compression algorithm {algorithm}");
        return Err(unsupported(message));
    }
    Ok(layout)
}

fn cowd(header: &[u8], file: &Edge) -> Result<Layout, Error> {
    let field = |offset| u64::from(word(header, offset));
    let layout = Layout {
        encoding: Encoding::Sectors,
        sectors: field(12),
        grain_sectors: field(16),
        table_entries: COWD_TABLE_ENTRIES,
        directory: field(20) * SECTOR,
        directory_entries: field(24),
        redundant: None,
        compressed: false,
        markers: false,
        first_grain: 1,
        descriptor: None,
        version: word(header, 4),
    };
    layout.checked(file)
}

/// Reads the headers of the seSparse extent in `file`.
///
/// # Errors
/// `Corrupt`, `Unsupported` naming what it is, `Io`.
pub(super) async fn read_se_sparse(file: &Edge) -> Result<Layout, Error> {
    let header = read_sectors(file, 0, 1).await?;
    let field = |index: usize| long(&header, index * 8);
    for (index, name, expected) in [
        (0, "Bad const header magic", SE_CONST_MAGIC),
        (1, "Unsupported version", SE_VERSION),
        (3, "Unsupported grain size", 8),
        (4, "Unsupported grain table size", 64),
        (5, "Unsupported flags", 0),
        (6, "Unsupported reserved bits", 0),
        (7, "Unsupported reserved bits", 0),
        (8, "Unsupported reserved bits", 0),
        (9, "Unsupported reserved bits", 0),
    ] {
        let value = field(index);
        if value != expected {
            return Err(unsupported(format!("{name}: {value:#x}")));
        }
    }
    let volatile = read_sectors(file, bytes_of(field(10))?, 1).await?;
    let magic = long(&volatile, 0);
    if magic != SE_VOLATILE_MAGIC {
        let message = format!("Bad volatile header magic: {magic:#x}");
        return Err(unsupported(message));
    }
    if volatile[24] != 0 {
        let message = "Image is dirty, Replaying journal not supported";
        return Err(unsupported(message));
    }
    let layout = Layout {
        encoding: Encoding::Numbers {
            tables: field(18),
            grains: field(24),
        },
        sectors: field(2),
        grain_sectors: field(3),
        table_entries: COWD_TABLE_ENTRIES,
        directory: bytes_of(field(16))?,
        directory_entries: field(17).saturating_mul(SECTOR / 8),
        redundant: None,
        compressed: false,
        markers: false,
        first_grain: 1,
        descriptor: None,
        version: 2,
    };
    bytes_of(field(18))?;
    bytes_of(field(24))?;
    layout.checked(file)
}
