//! Tables of chunks ("mish" blocks), one for each part of the disk.
//!
//! ```text
//!   0       8              16        24                       200     204
//!   "mish" │ first sector │ sectors │ chunks begin here ... │ count │ chunk │ chunk │ ...
//!   chunk:  type u32 │ comment u32 │ sector │ sectors │ offset │ length: u64 each, of the table's own
//! ```

use super::SECTOR;
use crate::chunks::{BadStream, Decoder, inflate};
use block::{ByteRange, Error, ErrorKind};

const MAGIC: &[u8; 4] = b"mish";
/// Where the chunks begin, and the bytes of one.
const HEAD_BYTES: usize = 204;
const ENTRY_BYTES: usize = 40;

/// Longest compressed or plain chunk in bytes.
const MAX_LENGTH: u64 = 64 << 20;
/// Most sectors of a chunk that is not all zeroes.
const MAX_SECTORS: u64 = MAX_LENGTH / SECTOR;

/// How a chunk's bytes are stored.
#[derive(Clone, Copy)]
pub(super) enum Storage {
    Zeroes,
    Plain,
    Encoded(Decoder),
}

/// A part of the disk.
#[derive(Clone, Copy)]
pub(super) struct Chunk {
    /// Where it begins on the disk, in bytes.
    pub(super) start: u64,
    /// Bytes of it on the disk, more than none.
    pub(super) length: u64,
    pub(super) storage: Storage,
    /// Where it is in the file; nowhere for zeroes.
    pub(super) stored: ByteRange,
}

impl Chunk {
    /// What decoding it takes, in bytes.
    pub(super) fn memory(&self) -> u64 {
        match self.storage {
            Storage::Encoded(_) => self.length.max(self.stored.length),
            Storage::Zeroes | Storage::Plain => 0,
        }
    }
}

/// What a chunk's type says.
enum Kind {
    Stored(Storage),
    /// Nothing of the disk: a comment, the end of the table.
    Nothing,
    /// A compression that is not supported.
    Unsupported(&'static str),
    Unknown,
}

impl Kind {
    fn of(number: u32) -> Self {
        match number {
            // The second is of sectors that nobody has written.
            0 | 2 => Self::Stored(Storage::Zeroes),
            1 => Self::Stored(Storage::Plain),
            0x8000_0004 => Self::Unsupported("ADC"),
            0x8000_0005 => Self::Stored(Storage::Encoded(inflate)),
            0x8000_0006 => Self::Stored(Storage::Encoded(unpack_bzip2)),
            0x8000_0007 => Self::Unsupported("lzfse"),
            0x8000_0008 => Self::Unsupported("lzma"),
            0x7fff_fffe | 0xffff_ffff => Self::Nothing,
            _ => Self::Unknown,
        }
    }
}

fn corrupt(message: String) -> Error {
    Error::new(ErrorKind::Corrupt, message)
}

fn unpack_bzip2(packed: &[u8], plain: &mut [u8]) -> Result<(), BadStream> {
    let mut unpack = bzip2::Decompress::new(false);
    let mut done = (0, 0);
    while done.1 < plain.len() {
        let unpacked = unpack.decompress(&packed[done.0..], &mut plain[done.1..]);
        let now = (unpack.total_in() as usize, unpack.total_out() as usize);
        if unpacked.is_err() || now == done {
            return Err(BadStream);
        }
        done = now;
    }
    Ok(())
}

/// The chunks of the tables read so far.
#[derive(Default)]
pub(super) struct Tables {
    chunks: Vec<Chunk>,
}

impl Tables {
    /// Takes a block in; other blocks than tables say nothing.
    pub(super) fn add(&mut self, block: &[u8], chunks_from: u64) -> Result<(), Error> {
        if !block.starts_with(MAGIC) || block.len() < HEAD_BYTES + ENTRY_BYTES {
            return Ok(());
        }
        let field = |at: usize| u64::from_be_bytes(*block[at..].first_chunk().expect("a head"));
        let base = Base {
            sector: field(8),
            offset: chunks_from
                .checked_add(field(24))
                .ok_or_else(|| corrupt("the chunks of a table begin beyond any file".to_owned()))?,
        };
        let (entries, _) = block[HEAD_BYTES..].as_chunks();
        for (number, entry) in entries.iter().enumerate() {
            self.chunks.extend(base.chunk(number, entry)?);
        }
        Ok(())
    }

    /// The chunks by where they begin.
    pub(super) fn into_chunks(mut self) -> Vec<Chunk> {
        self.chunks.sort_by_key(|chunk| chunk.start);
        self.chunks
    }
}

/// What a table's numbers are counted from.
struct Base {
    sector: u64,
    offset: u64,
}

impl Base {
    /// An entry's chunk; `None` for one that has nothing of the disk.
    fn chunk(&self, number: usize, entry: &[u8; ENTRY_BYTES]) -> Result<Option<Chunk>, Error> {
        let (fields, _) = entry.as_chunks();
        let [kind, sector, sectors, offset, length]: [u64; 5] =
            std::array::from_fn(|at| u64::from_be_bytes(fields[at]));
        let kind = (kind >> 32) as u32;
        let storage = match Kind::of(kind) {
            Kind::Stored(_) if sectors == 0 => return Ok(None),
            Kind::Stored(storage) => storage,
            Kind::Nothing => return Ok(None),
            Kind::Unsupported(name) => {
                let message = format!("chunks compressed with {name} are not supported");
                return Err(Error::new(ErrorKind::Unsupported, message));
            }
            Kind::Unknown => {
                let message = format!("chunk {number} has the unknown type {kind:#x}");
                return Err(Error::new(ErrorKind::Unsupported, message));
            }
        };
        let is_stored = !matches!(storage, Storage::Zeroes);
        if is_stored && sectors > MAX_SECTORS {
            return Err(corrupt(format!(
                "sector count {sectors} for chunk {number} is larger than max ({MAX_SECTORS})"
            )));
        }
        if is_stored && length > MAX_LENGTH {
            return Err(corrupt(format!(
                "length {length} for chunk {number} is larger than max ({MAX_LENGTH})"
            )));
        }
        let beyond = || corrupt(format!("chunk {number} lies beyond any disk or file"));
        let bytes = |sectors: u64| sectors.checked_mul(SECTOR);
        let start = self.sector.checked_add(sector).and_then(bytes);
        let on_disk = start.zip(bytes(sectors)).ok_or_else(beyond)?;
        let on_disk = ByteRange::new(on_disk.0, on_disk.1);
        on_disk.checked_end().ok_or_else(beyond)?;
        let stored = match is_stored {
            true => ByteRange::new(self.offset.checked_add(offset).ok_or_else(beyond)?, length),
            false => ByteRange::new(0, 0),
        };
        let end = stored
            .checked_end()
            .filter(|end| i64::try_from(*end).is_ok());
        end.ok_or_else(beyond)?;
        Ok(Some(Chunk {
            start: on_disk.offset,
            length: on_disk.length,
            storage,
            stored,
        }))
    }
}
