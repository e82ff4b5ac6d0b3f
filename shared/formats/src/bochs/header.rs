//! The header of a growing redolog (Bochs' iodev/hdimage/hdimage.h, `redolog_header_t`).

use crate::bytes::read_bytes;
use block::{Edge, Error, ErrorKind};

/// Bytes of a header.
pub(super) const HEADER_BYTES: usize = 512;

/// What a header begins with, padded with zeroes.
const MAGIC: (usize, &[u8; 32]) = (0, b"Bochs Virtual HD Image\0\0\0\0\0\0\0\0\0\0");
const TYPE: (usize, &[u8; 16]) = (32, b"Redolog\0\0\0\0\0\0\0\0\0");
const SUBTYPE: (usize, &[u8; 16]) = (48, b"Growing\0\0\0\0\0\0\0\0\0");

const VERSION_1: u32 = 0x0001_0000;
const VERSION_2: u32 = 0x0002_0000;

/// Most entries of a catalog.
const MAX_CATALOG: u32 = 0x10_0000;
/// Longest extent in bytes.
const MAX_EXTENT: u32 = 0x80_0000;

/// Bytes of a sector.
pub(super) const SECTOR: u64 = 512;

/// What a header says, checked. All fields are little-endian.
///
/// | offset | field |
/// |---|---|
/// | 0, 32, 48 | magic, type, subtype |
/// | 64 | version |
/// | 68 | bytes of the header |
/// | 72 | entries of the catalog |
/// | 76 | bytes of an extent's bitmap |
/// | 80 | bytes of an extent |
/// | 84 (version 1), 88 (version 2) | bytes of the disk, 64 bits |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// Where the catalog begins.
    pub(super) catalog_offset: u64,
    /// Entries of the catalog: one for each extent of the disk, at least.
    pub(super) catalog_entries: usize,
    /// Sectors of an extent's bitmap.
    pub(super) bitmap_sectors: u64,
    /// Bytes of an extent, a power of two.
    pub(super) extent_bytes: u64,
    /// Bytes of the disk: whole sectors.
    pub(super) disk_bytes: u64,
}

fn word(bytes: &[u8], offset: usize) -> Option<u32> {
    let field = bytes.get(offset..)?.first_chunk()?;
    Some(u32::from_le_bytes(*field))
}

fn long(bytes: &[u8], offset: usize) -> Option<u64> {
    let field = bytes.get(offset..)?.first_chunk()?;
    Some(u64::from_le_bytes(*field))
}

/// The version of a header; `None` when it is none.
fn version(bytes: &[u8]) -> Option<u32> {
    let has = |offset: usize, text: &[u8]| bytes.get(offset..)?.starts_with(text).then_some(());
    has(MAGIC.0, MAGIC.1)?;
    has(TYPE.0, TYPE.1)?;
    has(SUBTYPE.0, SUBTYPE.1)?;
    word(bytes, 64).filter(|version| [VERSION_1, VERSION_2].contains(version))
}

/// How sure it is that an image that begins so is one of Bochs.
pub(super) fn probe(start: &[u8]) -> u8 {
    match start.len() >= HEADER_BYTES && version(start).is_some() {
        true => 100,
        false => 0,
    }
}

impl Header {
    /// Reads and checks the header of a file.
    pub(super) async fn read(file: &Edge) -> Result<Self, Error> {
        let bytes = read_bytes(file, 0, HEADER_BYTES).await;
        Self::parse(&bytes.map_err(|errno| Error::io("Could not read the header", errno))?)
    }

    /// Checks a header.
    fn parse(bytes: &[u8]) -> Result<Self, Error> {
        let corrupt = |message: String| Err(Error::new(ErrorKind::Corrupt, message));
        let fields = || {
            let disk = match version(bytes)? {
                VERSION_1 => long(bytes, 84)?,
                _ => long(bytes, 88)?,
            };
            let field = |offset| word(bytes, offset);
            Some((field(68)?, field(72)?, field(76)?, field(80)?, disk))
        };
        let Some((header, catalog, bitmap, extent, disk)) = fields() else {
            return corrupt("Image not in Bochs format".to_owned());
        };
        if catalog > MAX_CATALOG {
            return corrupt("Catalog size is too large".to_owned());
        }
        if u64::from(extent) < SECTOR {
            return corrupt(format!("Extent size must be at least {SECTOR}"));
        }
        if !extent.is_power_of_two() {
            return corrupt(format!("Extent size {extent} is not a power of two"));
        }
        if extent > MAX_EXTENT {
            return corrupt(format!("Extent size {extent} is too large"));
        }
        let (extent_bytes, disk_bytes) = (u64::from(extent), disk / SECTOR * SECTOR);
        if disk_bytes.div_ceil(extent_bytes) > u64::from(catalog) {
            return corrupt("Catalog size is too small for this disk size".to_owned());
        }
        if u64::from(bitmap) < (extent_bytes / SECTOR).div_ceil(8) {
            return corrupt(format!(
                "Bitmap size {bitmap} is too small for extents of {extent} bytes"
            ));
        }
        Ok(Self {
            catalog_offset: u64::from(header),
            catalog_entries: catalog as usize,
            bitmap_sectors: u64::from(bitmap).div_ceil(SECTOR),
            extent_bytes,
            disk_bytes,
        })
    }

    /// Where extents begin in the file.
    pub(super) fn data_offset(&self) -> u64 {
        self.catalog_offset + self.catalog_entries as u64 * 4
    }

    /// Sectors of an extent.
    pub(super) fn extent_sectors(&self) -> u64 {
        self.extent_bytes / SECTOR
    }
}
