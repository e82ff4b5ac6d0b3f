//! `bochs`: growing disks of the Bochs emulator (its user manual, "Growing hard disk images"; Bochs'
//! iodev/hdimage). Only read.
//!
//! ```text
//!   header │ catalog: u32 for each extent of the disk │ extent │ extent │ ...
//!              0xffffffff: all zeroes                    └ bitmap, a bit for each sector │ sectors
//!              n: the n-th extent of the file              (bit clear: zeroes)
//! ```
//!
//! Owns: the header's rules, the catalog (in memory, at most 4 MiB), some of the bitmaps. Extents are
//! looked up a run of sectors at a time. What lies beyond the end of the file reads as zeroes, as
//! everywhere.

mod header;
#[cfg(test)]
mod tests;

use crate::bytes::read_bytes;
use crate::chunks::Chunks;
use block::format::{Extent, Lookup, Mapping};
use block::open::DriverEntry;
use block::read_only;
use block::{ByteRange, Edge, Errno, Error, ReadFormat};
use executor::HeapBuffer;
use header::{Header, SECTOR};

/// The table line of `bochs`.
pub const ENTRY: DriverEntry = DriverEntry::new("bochs", |request| {
    Box::pin(read_only::open::<Bochs>(request))
})
.with_probe(header::probe);

/// The catalog's entry of an extent that the file has nothing of.
const NO_EXTENT: u32 = u32::MAX;

/// An open image.
pub struct Bochs {
    file: Edge,
    header: Header,
    catalog: Vec<u32>,
    /// By the extent's place in the file.
    bitmaps: Chunks,
}

impl Bochs {
    /// Where an extent's bitmap is in the file, and its sectors; `EIO` beyond what offsets express.
    fn places(&self, entry: u32) -> Result<(u64, u64), Errno> {
        let stride = (self.header.bitmap_sectors + self.header.extent_sectors()) * SECTOR;
        let bitmap = stride
            .checked_mul(u64::from(entry))
            .and_then(|offset| offset.checked_add(self.header.data_offset()))
            .filter(|bitmap| i64::try_from(bitmap + stride).is_ok())
            .ok_or(Errno::EIO)?;
        Ok((bitmap, bitmap + self.header.bitmap_sectors * SECTOR))
    }

    /// The extent that `offset` is in, and the entry of the catalog.
    fn entry(&self, offset: u64) -> (usize, u32) {
        let index = (offset / self.header.extent_bytes) as usize;
        let entry = self.catalog.get(index).copied();
        (index, entry.unwrap_or(NO_EXTENT))
    }

    /// The extents from `index` on that the file has nothing of.
    fn nothing(&self, range: ByteRange, index: usize) -> Extent {
        let last = range.offset + range.length - 1;
        let mut end = index + 1;
        while end as u64 * self.header.extent_bytes <= last && self.catalog[end] == NO_EXTENT {
            end += 1;
        }
        let length = end as u64 * self.header.extent_bytes - range.offset;
        zeroes(length.min(range.length))
    }

    /// What a bitmap says of the start of `range`: sectors that are alike.
    fn by_bitmap(&self, range: ByteRange, (data, bitmap): (u64, &[u8])) -> Extent {
        let within = range.offset % self.header.extent_bytes;
        let is_stored = |sector: u64| bitmap[(sector / 8) as usize] & (1 << (sector % 8)) != 0;
        let first = within / SECTOR;
        let stored = is_stored(first);
        let last = (within + range.length - 1) / SECTOR;
        let limit = self.header.extent_sectors().min(last + 1);
        let end = (first + 1..limit).find(|sector| is_stored(*sector) != stored);
        let length = (end.unwrap_or(limit) * SECTOR - within).min(range.length);
        match stored {
            false => zeroes(length),
            true => Extent {
                length,
                mapping: Mapping::Data(data + within),
                in_place: false,
            },
        }
    }

    async fn bitmap(&self, offset: u64) -> Result<HeapBuffer, Errno> {
        let length = self.header.extent_sectors().div_ceil(8);
        let bytes = read_bytes(&self.file, offset, length as usize).await?;
        Ok(bytes[..].into())
    }
}

fn zeroes(length: u64) -> Extent {
    Extent {
        length,
        mapping: Mapping::Zero(None),
        in_place: false,
    }
}

impl ReadFormat for Bochs {
    async fn open(file: Edge) -> Result<Self, Error> {
        let header = Header::read(&file).await?;
        let length = header.catalog_entries * size_of::<u32>();
        let bytes = read_bytes(&file, header.catalog_offset, length).await;
        let bytes = bytes.map_err(|errno| Error::io("Could not read the catalog", errno))?;
        let (entries, _) = bytes.as_chunks();
        Ok(Self {
            catalog: entries.iter().map(|e| u32::from_le_bytes(*e)).collect(),
            bitmaps: Chunks::new(header.extent_sectors().div_ceil(8) as usize),
            header,
            file,
        })
    }
    fn name(&self) -> &'static str {
        "bochs"
    }
    fn virtual_size(&self) -> u64 {
        self.header.disk_bytes
    }
    fn file(&self) -> &Edge {
        &self.file
    }
    fn lookup(&self, range: ByteRange) -> Lookup {
        let (index, entry) = self.entry(range.offset);
        if entry == NO_EXTENT {
            return Lookup::Hit(self.nothing(range, index));
        }
        let kept = self
            .bitmaps
            .peek(u64::from(entry))
            .zip(self.places(entry).ok());
        match kept {
            Some((bitmap, (_, data))) => Lookup::Hit(self.by_bitmap(range, (data, &bitmap))),
            None => Lookup::Miss,
        }
    }
    async fn resolve(&self, range: ByteRange) -> Result<Extent, Errno> {
        let (index, entry) = self.entry(range.offset);
        if entry == NO_EXTENT {
            return Ok(self.nothing(range, index));
        }
        let (offset, data) = self.places(entry)?;
        let bitmap = self.bitmaps.get(u64::from(entry), || self.bitmap(offset));
        Ok(self.by_bitmap(range, (data, &bitmap.await?)))
    }
}
