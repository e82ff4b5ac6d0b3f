//! The trailer, and the ways from it to the tables.
//!
//! | offset | 64-bit field |
//! |---|---|
//! | 0 | "koly" (32 bits) |
//! | 24 | where chunks are counted from |
//! | 40, 48 | offset and length of the resource fork |
//! | 216, 224 | offset and length of the property list |
//! | 492 | sectors of the disk |

use super::SECTOR;
use super::table::Tables;
use crate::bytes::read_bytes;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use block::{ByteRange, Edge, Error, ErrorKind};

/// Bytes of a trailer.
const TRAILER_BYTES: u64 = 512;

/// Longest property list or resource fork in bytes: tables of some terabytes of disk.
const MAX_TABLES: u64 = 64 << 20;

/// What a trailer says, checked.
pub(super) struct Trailer {
    pub(super) disk_bytes: u64,
    chunks_from: u64,
    tables: Place,
}

/// Where the tables are.
enum Place {
    ResourceFork(ByteRange),
    PropertyList(ByteRange),
}

fn corrupt(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, message)
}

fn long(bytes: &[u8], offset: usize) -> u64 {
    let field = bytes[offset..].first_chunk();
    u64::from_be_bytes(*field.expect("the trailer is longer"))
}

fn word(bytes: &[u8], offset: usize) -> Option<u32> {
    let field = bytes.get(offset..)?.first_chunk()?;
    Some(u32::from_be_bytes(*field))
}

impl Trailer {
    /// Finds and checks the trailer, which is the last thing in the file. Files are as long as whole
    /// sectors to those who read them, so it may begin anywhere in the last two.
    pub(super) async fn read(file: &Edge) -> Result<Self, Error> {
        let length = file.node().length();
        if length < TRAILER_BYTES {
            return Err(corrupt(format!(
                "dmg file must be at least {TRAILER_BYTES} bytes long"
            )));
        }
        let from = length.saturating_sub(TRAILER_BYTES + SECTOR - 1);
        let end = read_bytes(file, from, (length - from) as usize + SECTOR as usize).await;
        let end = end.map_err(|errno| Error::io("Could not read the trailer", errno))?;
        let last = (length - from) as usize - 4;
        let found = (0..=last).find(|at| end[*at..].starts_with(b"koly"));
        let at = found.ok_or_else(|| corrupt("Could not locate UDIF trailer in dmg file"))?;
        let trailer = end.get(at..at + TRAILER_BYTES as usize);
        let trailer = trailer.ok_or_else(|| corrupt("the trailer is cut off"))?;
        Self::parse(trailer, from + at as u64)
    }

    fn parse(trailer: &[u8], at: u64) -> Result<Self, Error> {
        let part = |name: &str, field: usize| {
            let range = ByteRange::new(long(trailer, field), long(trailer, field + 8));
            let ByteRange { offset, length } = range;
            if range.checked_end().is_none_or(|end| end > at) {
                return Err(corrupt(format!(
                    "the {name} of {length} bytes at {offset} does not end before the trailer"
                )));
            }
            if length > MAX_TABLES {
                return Err(corrupt(format!(
                    "the {name} of {length} bytes is longer than {MAX_TABLES}"
                )));
            }
            Ok(range)
        };
        let chunks_from = long(trailer, 24);
        if chunks_from > at {
            return Err(corrupt(format!(
                "the data fork at {chunks_from} begins behind the trailer"
            )));
        }
        let sectors = long(trailer, 492);
        let disk_bytes = sectors
            .checked_mul(SECTOR)
            .filter(|bytes| i64::try_from(*bytes).is_ok())
            .ok_or_else(|| corrupt(format!("a disk of {sectors} sectors is too large")))?;
        let fork = part("resource fork", 40)?;
        let list = part("property list", 216)?;
        let tables = match (fork.length, list.length) {
            (0, 0) => return Err(corrupt("neither a resource fork nor a property list")),
            (0, _) => Place::PropertyList(list),
            _ => Place::ResourceFork(fork),
        };
        Ok(Self {
            disk_bytes,
            chunks_from,
            tables,
        })
    }

    /// Reads all tables.
    pub(super) async fn read_tables(&self, file: &Edge, to: &mut Tables) -> Result<(), Error> {
        let read = async |range: ByteRange| {
            let bytes = read_bytes(file, range.offset, range.length as usize).await;
            bytes.map_err(|errno| Error::io("Could not read the tables", errno))
        };
        match self.tables {
            Place::ResourceFork(range) => self.of_fork(&read(range).await?, to),
            Place::PropertyList(range) => self.of_list(&read(range).await?, to),
        }
    }

    /// Blocks behind each other, each with its length, from an offset that stands first, as many bytes
    /// of them as stand third.
    fn of_fork(&self, fork: &[u8], to: &mut Tables) -> Result<(), Error> {
        let truncated = || corrupt("the resource fork is cut off");
        let field = |offset| word(fork, offset).ok_or_else(truncated);
        let (start, length) = (field(0)? as usize, field(8)? as usize);
        let end = start.checked_add(length).ok_or_else(truncated)?;
        let mut rest = fork.get(start..end).ok_or_else(truncated)?;
        while !rest.is_empty() {
            let length = word(rest, 0).ok_or_else(truncated)? as usize;
            let block = rest[4..].split_at_checked(length).filter(|_| length > 0);
            let (block, behind) = block.ok_or_else(truncated)?;
            to.add(block, self.chunks_from)?;
            rest = behind;
        }
        Ok(())
    }

    /// What stands as base64 between `<data>` and `</data>`: only tables have their magic number.
    fn of_list(&self, list: &[u8], to: &mut Tables) -> Result<(), Error> {
        let text = str::from_utf8(list).map_err(|_| corrupt("the property list is not UTF-8"))?;
        for part in text.split("<data>").skip(1) {
            let (data, _) = part
                .split_once("</data>")
                .ok_or_else(|| corrupt("data without an end in the property list"))?;
            let encoded: Vec<u8> = data.bytes().filter(|b| !b.is_ascii_whitespace()).collect();
            let block = STANDARD.decode(encoded);
            let block = block.map_err(|_| corrupt("data in the property list is no base64"))?;
            to.add(&block, self.chunks_from)?;
        }
        Ok(())
    }
}
