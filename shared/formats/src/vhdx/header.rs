//! The file's identifier and its two headers ([MS-VHDX] 2.2.1 and 2.2.2).
//!
//! ```text
//!   0 identifier │ 64 KiB header 1 │ 128 KiB header 2 │ 192, 256 KiB region tables │ 1 MiB ...
//! ```
//!
//! | offset | field of a header, little-endian |
//! |---|---|
//! | 0, 4 | signature, CRC-32C of the header's 4 KiB with this field zero |
//! | 8 | sequence number: of two sound headers, the one with the higher holds |
//! | 16, 32 | GUIDs of the last change to the file, and to the disk |
//! | 48 | GUID of the log; zero when there is nothing in it |
//! | 64, 66 | versions of the log (0) and the format (1) |
//! | 68, 72 | bytes of the log, and where it begins |
//!
//! A change writes the header that does not hold, one number higher: a power cut leaves the other.

use super::{FileRegion, MIB};
use crate::bytes::{read_bytes, write_bytes};
use block::{Edge, Errno, Error, ErrorKind};
use rand::TryRngCore;
use rand::rngs::OsRng;

/// What an image begins with.
pub(super) const IDENTIFIER: &[u8; 8] = b"vhdxfile";
/// Who made the image, as it stands behind the identifier.
const CREATOR: &str = "outboard";
/// Bytes of a header that its checksum covers.
const HEADER_BYTES: usize = 4096;
/// Where the headers are.
const PLACES: [u64; 2] = [64 << 10, 128 << 10];
const SIGNATURE: &[u8; 4] = b"head";
const VERSION: u16 = 1;
const LOG_VERSION: u16 = 0;

/// A GUID as it is stored.
pub(super) type Guid = [u8; 16];
/// The GUID of a log with nothing in it.
pub(super) const NO_GUID: Guid = [0; 16];

/// A random GUID.
///
/// # Errors
/// `EIO` when the system has no random bytes.
pub(super) fn random_guid() -> Result<Guid, Errno> {
    let mut guid = NO_GUID;
    OsRng.try_fill_bytes(&mut guid).map_err(|_| Errno::EIO)?;
    // Version 4, of the usual variant.
    guid[7] = guid[7] & 0x0f | 0x40;
    guid[8] = guid[8] & 0x3f | 0x80;
    Ok(guid)
}

/// The `N` bytes at `offset`.
pub(super) fn field<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
    let field = bytes[offset..].first_chunk();
    *field.expect("the structure is longer")
}

/// CRC-32C of a structure whose checksum, at offset 4, counts as zero.
pub(super) fn checksum(bytes: &[u8]) -> u32 {
    let start = crc32c::crc32c(&bytes[..4]);
    let start = crc32c::crc32c_append(start, &[0; 4]);
    crc32c::crc32c_append(start, &bytes[8..])
}

/// Writes the checksum of a structure into it.
pub(super) fn seal(bytes: &mut [u8]) {
    let sum = checksum(bytes);
    bytes[4..8].copy_from_slice(&sum.to_le_bytes());
}

/// Whether the checksum of a structure is right.
pub(super) fn is_sealed(bytes: &[u8]) -> bool {
    u32::from_le_bytes(field(bytes, 4)) == checksum(bytes)
}

/// How sure it is that an image that begins so is one of this format.
pub(super) fn probe(start: &[u8]) -> u8 {
    match start.starts_with(IDENTIFIER) {
        true => 100,
        false => 0,
    }
}

/// The first bytes of an image.
pub(super) fn identifier() -> Vec<u8> {
    let creator = CREATOR.encode_utf16().flat_map(u16::to_le_bytes);
    IDENTIFIER.iter().copied().chain(creator).collect()
}

/// What a header says, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) sequence: u64,
    pub(super) file_write: Guid,
    pub(super) data_write: Guid,
    pub(super) log_guid: Guid,
    pub(super) log: FileRegion,
}

impl Header {
    /// A sound header's; `None` for others.
    fn parse(bytes: &[u8]) -> Option<Self> {
        let is_sound = bytes.starts_with(SIGNATURE)
            && is_sealed(bytes)
            && u16::from_le_bytes(field(bytes, 66)) == VERSION;
        is_sound.then(|| Self {
            sequence: u64::from_le_bytes(field(bytes, 8)),
            file_write: field(bytes, 16),
            data_write: field(bytes, 32),
            log_guid: field(bytes, 48),
            log: FileRegion {
                offset: u64::from_le_bytes(field(bytes, 72)),
                length: u32::from_le_bytes(field(bytes, 68)).into(),
            },
        })
    }

    fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; HEADER_BYTES];
        let mut put = |offset: usize, field: &[u8]| {
            bytes[offset..offset + field.len()].copy_from_slice(field);
        };
        put(0, SIGNATURE);
        put(8, &self.sequence.to_le_bytes());
        put(16, &self.file_write);
        put(32, &self.data_write);
        put(48, &self.log_guid);
        put(64, &LOG_VERSION.to_le_bytes());
        put(66, &VERSION.to_le_bytes());
        put(68, &(self.log.length as u32).to_le_bytes());
        put(72, &self.log.offset.to_le_bytes());
        seal(&mut bytes);
        bytes
    }
}

/// The header that holds, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Current {
    pub(super) header: Header,
    place: usize,
}

impl Current {
    /// Reads the headers of `file`.
    ///
    /// # Errors
    /// `Corrupt` when neither is sound, `Unsupported`, `Io`.
    pub(super) async fn read(file: &Edge) -> Result<Self, Error> {
        let failed = |errno| Error::io("Could not read the header", errno);
        let identifier = read_bytes(file, 0, IDENTIFIER.len()).await;
        if identifier.map_err(failed)? != IDENTIFIER {
            let message = "Image not in VHDX format";
            return Err(Error::new(ErrorKind::Corrupt, message));
        }
        let mut found = [const { Vec::new() }; 2];
        for (bytes, offset) in found.iter_mut().zip(PLACES) {
            let read = read_bytes(file, offset, HEADER_BYTES).await;
            *bytes = read.map_err(failed)?;
        }
        let current = Self::choose(&found)?;
        let log_version = u16::from_le_bytes(field(&found[current.place], 64));
        if log_version != LOG_VERSION {
            let message = format!("unsupported VHDX image (log version {log_version})");
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        current.header.log.check("log")?;
        Ok(current)
    }

    fn choose(found: &[Vec<u8>; 2]) -> Result<Self, Error> {
        let headers = found.each_ref().map(|bytes| Header::parse(bytes));
        let place = match headers {
            [Some(first), Some(second)] if first.sequence != second.sequence => {
                usize::from(second.sequence > first.sequence)
            }
            // The same header twice is how some images begin their life.
            [Some(first), Some(second)] if first == second => 0,
            [Some(_), None] => 0,
            [None, Some(_)] => 1,
            _ => {
                let message = "No valid VHDX header found";
                return Err(Error::new(ErrorKind::Corrupt, message));
            }
        };
        let header = headers[place].expect("the place of a sound one");
        Ok(Self { header, place })
    }

    /// Of a new image: both headers are to be written.
    pub(super) fn new(log: FileRegion) -> Result<Self, Errno> {
        let header = Header {
            sequence: 0,
            file_write: random_guid()?,
            data_write: random_guid()?,
            log_guid: NO_GUID,
            log,
        };
        Ok(Self { header, place: 1 })
    }

    /// Writes what `change` makes of the header in place of the one that does not hold. It holds once it is
    /// durable.
    ///
    /// # Errors
    /// The file's: then either of them may hold in the file.
    pub(super) async fn write(
        &mut self,
        file: &Edge,
        change: impl FnOnce(&mut Header),
    ) -> Result<(), Errno> {
        let mut next = *self;
        change(&mut next.header);
        // The last number of all is no use to anybody.
        next.header.sequence = next.header.sequence.checked_add(1).ok_or(Errno::EIO)?;
        next.place = 1 - next.place;
        write_bytes(file, PLACES[next.place], &next.header.encode()).await?;
        file.node().flush().await?;
        *self = next;
        Ok(())
    }
}

/// Where the log and all else behind it may begin.
pub(super) const FIRST_REGION: u64 = MIB;

#[cfg(test)]
mod tests {
    use super::*;

    fn header(sequence: u64) -> Header {
        Header {
            sequence,
            file_write: [1; 16],
            data_write: [2; 16],
            log_guid: [3; 16],
            log: FileRegion {
                offset: 1 << 20,
                length: 2 << 20,
            },
        }
    }

    fn chosen(found: [Vec<u8>; 2]) -> Option<(u64, usize)> {
        let current = Current::choose(&found).ok()?;
        Some((current.header.sequence, current.place))
    }

    #[test]
    fn what_is_encoded_is_parsed() {
        assert_eq!(Header::parse(&header(7).encode()), Some(header(7)));
    }

    #[test]
    fn of_two_sound_headers_the_later_holds() {
        let [one, two] = [1, 2].map(|sequence| header(sequence).encode());
        assert_eq!(chosen([one.clone(), two.clone()]), Some((2, 1)));
        assert_eq!(chosen([two.clone(), one.clone()]), Some((2, 0)));
        assert_eq!(chosen([two.clone(), two.clone()]), Some((2, 0)));
        let other = Header {
            log_guid: NO_GUID,
            ..header(2)
        };
        assert_eq!(chosen([two.clone(), other.encode()]), None);
        for at in [0, 5, 66, 4095] {
            let mut broken = two.clone();
            broken[at] ^= 1;
            assert_eq!(chosen([one.clone(), broken.clone()]), Some((1, 0)));
            assert_eq!(chosen([broken.clone(), broken]), None);
        }
    }
}
