//! `cloop`: compressed loop images, version 2 (the cloop kernel module's compressed_loop.h). Only read.
//!
//! ```text
//!   0          128            132         136
//!   preamble │ bytes: u32 BE │ blocks: u32 BE │ offsets: u64 BE, blocks + 1 │ block │ block │ ...
//!   a script │ of a block    │ of the disk    │ where each block begins, and the last one ends
//! ```
//!
//! Each block is a zlib stream (RFC 1950). The offsets are looked through once, when the image is
//! opened; after that parts of them are in memory, because an image may have half a gigabyte of them.

#[cfg(test)]
mod tests;

use crate::bytes::read_bytes;
use crate::chunks::{Chunks, copy_part, decode, inflate};
use block::format::{Extent, Lookup, Mapping};
use block::open::DriverEntry;
use block::read_only;
use block::{Buffer, ByteRange, Edge, Errno, Error, ErrorKind, ReadFormat};
use executor::HeapBuffer;

/// The table line of `cloop`.
pub const ENTRY: DriverEntry = DriverEntry::new("cloop", |request| {
    Box::pin(read_only::open::<Cloop>(request))
})
.with_probe(probe);

/// What images begin with: a script that mounts them.
const PREAMBLE: &[u8] =
    b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n";

/// Where the bytes of a block, the number of blocks and the offsets stand.
const HEADER: (u64, usize) = (128, 8);
const OFFSETS: u64 = 136;
const OFFSET_BYTES: u64 = size_of::<u64>() as u64;

const SECTOR: u32 = 512;
/// Longest block in bytes.
const MAX_BLOCK: u32 = 64 << 20;
/// Longest compressed block in bytes.
const MAX_PACKED: u64 = 2 * MAX_BLOCK as u64;
/// Most bytes of offsets.
const MAX_OFFSETS: u64 = 512 << 20;

/// Offsets that are read at a time.
const PAGE: u64 = 4096;

fn probe(start: &[u8]) -> u8 {
    match start.starts_with(PREAMBLE) {
        true => 2,
        false => 0,
    }
}

/// An open image.
pub struct Cloop {
    file: Edge,
    geometry: Geometry,
    /// Pages of offsets, by number.
    offsets: Chunks,
    /// Blocks, by number.
    blocks: Chunks,
}

/// What the header says, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Geometry {
    block_bytes: u32,
    blocks: u32,
}

fn corrupt(message: String) -> Error {
    Error::new(ErrorKind::Corrupt, message)
}

impl Geometry {
    fn parse(header: [u8; HEADER.1]) -> Result<Self, Error> {
        let fields = u64::from_be_bytes(header);
        let (block_bytes, blocks) = ((fields >> 32) as u32, fields as u32);
        if !block_bytes.is_multiple_of(SECTOR) {
            let message = format!("block_size {block_bytes} must be a multiple of {SECTOR}");
            return Err(corrupt(message));
        }
        if block_bytes == 0 {
            return Err(corrupt("block_size cannot be zero".to_owned()));
        }
        if block_bytes > MAX_BLOCK {
            let most = MAX_BLOCK >> 20;
            let message = format!("block_size {block_bytes} must be {most} MB or less");
            return Err(corrupt(message));
        }
        let most = u32::MAX / OFFSET_BYTES as u32;
        if blocks > most {
            let message = format!("n_blocks {blocks} must be {most} or less");
            return Err(corrupt(message));
        }
        let geometry = Self {
            block_bytes,
            blocks,
        };
        if geometry.offsets() * OFFSET_BYTES > MAX_OFFSETS {
            let message = "image requires too many offsets, try increasing block size";
            return Err(corrupt(message.to_owned()));
        }
        Ok(geometry)
    }

    /// How many offsets there are.
    fn offsets(self) -> u64 {
        u64::from(self.blocks) + 1
    }

    fn disk_bytes(self) -> u64 {
        u64::from(self.blocks) * u64::from(self.block_bytes)
    }
}

impl Cloop {
    /// Looks all offsets through; the longest compressed block.
    async fn check_offsets(&self) -> Result<u64, Error> {
        let (mut before, mut largest) = (None, 0);
        for page in 0..self.geometry.offsets().div_ceil(PAGE) {
            let bytes = self.read_offsets(page).await;
            let bytes = bytes.map_err(|errno| Error::io("Could not read the offsets", errno))?;
            for (at, offset) in (page * PAGE..).zip(bytes.as_chunks().0) {
                let offset = u64::from_be_bytes(*offset);
                let length = match before {
                    None => 0,
                    Some(before) => offset.checked_sub(before).ok_or_else(|| {
                        corrupt(format!(
                            "offsets not monotonically increasing at index {at}, image file is \
                             corrupt"
                        ))
                    })?,
                };
                if length > MAX_PACKED {
                    return Err(corrupt(format!(
                        "invalid compressed block size at index {at}, image file is corrupt"
                    )));
                }
                largest = largest.max(length);
                before = Some(offset);
            }
        }
        Ok(largest)
    }

    /// A page of offsets.
    async fn read_offsets(&self, page: u64) -> Result<HeapBuffer, Errno> {
        let first = page * PAGE;
        let count = PAGE.min(self.geometry.offsets() - first);
        let at = OFFSETS + first * OFFSET_BYTES;
        let bytes = read_bytes(&self.file, at, (count * OFFSET_BYTES) as usize).await?;
        Ok(bytes[..].into())
    }

    async fn offset(&self, index: u64) -> Result<u64, Errno> {
        let page = index / PAGE;
        let page = self.offsets.get(page, || self.read_offsets(page)).await?;
        let offset = page.as_chunks().0.get((index % PAGE) as usize);
        Ok(u64::from_be_bytes(*offset.ok_or(Errno::EIO)?))
    }

    async fn read_block(&self, block: u64) -> Result<HeapBuffer, Errno> {
        let start = self.offset(block).await?;
        let length = self.offset(block + 1).await?.checked_sub(start);
        // Checked when the image was opened: somebody has changed it since.
        let length = length.filter(|length| *length <= MAX_PACKED);
        let packed = ByteRange::new(start, length.ok_or(Errno::EIO)?);
        let plain = self.geometry.block_bytes as usize;
        decode(&self.file, (packed, inflate), plain).await
    }

    fn extent(&self, range: ByteRange) -> Extent {
        let bytes = u64::from(self.geometry.block_bytes);
        Extent {
            length: (bytes - range.offset % bytes).min(range.length),
            mapping: Mapping::Encoded(range.offset / bytes),
            in_place: false,
        }
    }
}

impl ReadFormat for Cloop {
    async fn open(file: Edge) -> Result<Self, Error> {
        let failed = |errno| Error::io("Could not read the header", errno);
        let header = read_bytes(&file, HEADER.0, HEADER.1)
            .await
            .map_err(failed)?;
        let header = header
            .first_chunk()
            .expect("as many bytes as were asked for");
        let geometry = Geometry::parse(*header)?;
        let end = OFFSETS + geometry.offsets() * OFFSET_BYTES;
        if end > file.node().length() {
            let message = format!("the offsets end at {end}, beyond the end of the file");
            return Err(corrupt(message));
        }
        let mut image = Self {
            offsets: Chunks::new((PAGE * OFFSET_BYTES) as usize),
            blocks: Chunks::new(geometry.block_bytes as usize),
            geometry,
            file,
        };
        let largest = image
            .check_offsets()
            .await?
            .max(u64::from(geometry.block_bytes));
        image.blocks = Chunks::new(largest as usize);
        Ok(image)
    }
    fn name(&self) -> &'static str {
        "cloop"
    }
    fn virtual_size(&self) -> u64 {
        self.geometry.disk_bytes()
    }
    fn file(&self) -> &Edge {
        &self.file
    }
    fn lookup(&self, range: ByteRange) -> Lookup {
        Lookup::Hit(self.extent(range))
    }
    async fn resolve(&self, range: ByteRange) -> Result<Extent, Errno> {
        Ok(self.extent(range))
    }
    async fn read_encoded(
        &self,
        offset: u64,
        descriptor: u64,
        buffer: Buffer,
    ) -> Result<(), Errno> {
        let block = self.blocks.get(descriptor, || self.read_block(descriptor));
        let start = offset % u64::from(self.geometry.block_bytes);
        copy_part(&*block.await?, start as usize, &buffer)
    }
}
