//! `dmg`: disk images of macOS, "UDIF" (no text by Apple; newosxbook.com/DMG.html tells what is known).
//! Only read.
//!
//! ```text
//!   chunk │ chunk │ ... │ property list or resource fork │ trailer
//!                          └ tables: where each chunk is      └ where those are, sectors of the disk
//! ```
//!
//! All numbers are big-endian. Chunks are zeroes, plain, deflated or bzip2; others (ADC, lzfse, lzma)
//! are refused by name when the image is opened. Sectors that no chunk is about cannot be read.
//!
//! | file | owns |
//! |---|---|
//! | `trailer.rs` | the trailer, the ways to the tables |
//! | `table.rs` | tables, and the chunks of them all, in order |

mod table;
#[cfg(test)]
mod tests;
mod trailer;

use crate::chunks::{Chunks, copy_part, decode};
use block::format::{Extent, Lookup, Mapping};
use block::open::DriverEntry;
use block::read_only;
use block::{Buffer, ByteRange, Edge, Errno, Error, ReadFormat};
use executor::HeapBuffer;
use table::{Chunk, Storage, Tables};
use trailer::Trailer;

/// The table line of `dmg`. Images are not recognised: what tells them stands at their end.
pub const ENTRY: DriverEntry =
    DriverEntry::new("dmg", |request| Box::pin(read_only::open::<Dmg>(request)));

/// Bytes of a sector.
const SECTOR: u64 = 512;

/// An open image.
pub struct Dmg {
    file: Edge,
    disk_bytes: u64,
    /// By where they begin on the disk.
    chunks: Vec<Chunk>,
    /// Those that were decompressed, by number.
    decoded: Chunks,
}

impl Dmg {
    /// What is known of the start of `range`; `EIO` when no chunk is about it.
    fn extent(&self, range: ByteRange) -> Result<Extent, Errno> {
        let after = self
            .chunks
            .partition_point(|chunk| chunk.start <= range.offset);
        let number = after.checked_sub(1).ok_or(Errno::EIO)?;
        let chunk = &self.chunks[number];
        let within = range.offset - chunk.start;
        let left = chunk.length.checked_sub(within).filter(|left| *left > 0);
        let mut length = left.ok_or(Errno::EIO)?.min(range.length);
        let mapping = match chunk.storage {
            Storage::Zeroes => Mapping::Zero(None),
            Storage::Plain if within < chunk.stored.length => {
                length = length.min(chunk.stored.length - within);
                Mapping::Data(chunk.stored.offset + within)
            }
            // A plain chunk that has too little.
            Storage::Plain => Mapping::Zero(None),
            Storage::Encoded(_) => Mapping::Encoded(number as u64),
        };
        Ok(Extent {
            length,
            mapping,
            in_place: false,
        })
    }

    async fn decode(&self, chunk: &Chunk) -> Result<HeapBuffer, Errno> {
        let Storage::Encoded(decoder) = chunk.storage else {
            return Err(Errno::EIO);
        };
        let encoded = (chunk.stored, decoder);
        decode(&self.file, encoded, chunk.length as usize).await
    }
}

impl ReadFormat for Dmg {
    async fn open(file: Edge) -> Result<Self, Error> {
        let trailer = Trailer::read(&file).await?;
        let mut tables = Tables::default();
        trailer.read_tables(&file, &mut tables).await?;
        let chunks = tables.into_chunks();
        let largest = chunks.iter().map(Chunk::memory).max().unwrap_or(0);
        Ok(Self {
            disk_bytes: trailer.disk_bytes,
            decoded: Chunks::new(largest as usize),
            chunks,
            file,
        })
    }
    fn name(&self) -> &'static str {
        "dmg"
    }
    fn virtual_size(&self) -> u64 {
        self.disk_bytes
    }
    fn file(&self) -> &Edge {
        &self.file
    }
    fn lookup(&self, range: ByteRange) -> Lookup {
        self.extent(range).map_or(Lookup::Miss, Lookup::Hit)
    }
    async fn resolve(&self, range: ByteRange) -> Result<Extent, Errno> {
        self.extent(range)
    }
    async fn read_encoded(
        &self,
        offset: u64,
        descriptor: u64,
        buffer: Buffer,
    ) -> Result<(), Errno> {
        let chunk = self.chunks.get(descriptor as usize).ok_or(Errno::EIO)?;
        let bytes = self.decoded.get(descriptor, || self.decode(chunk)).await?;
        copy_part(&bytes, (offset - chunk.start) as usize, &buffer)
    }
}
