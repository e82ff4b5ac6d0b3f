//! The header of a qcow image, version 1 (the fields that qcow2's specification names, docs/interop/qcow2.txt
//! of QEMU, as the first version has them).
//!
//! | offset | field, big-endian |
//! |---|---|
//! | 0, 4 | magic, "QFI\xfb"; version, 1 |
//! | 8, 16 | where the backing file's name begins (64 bits; 0: none), and its bytes |
//! | 20 | time of the last change, unused |
//! | 24 | bytes of the disk, 64 bits |
//! | 32, 33 | log2 of the bytes of a cluster, and of the entries of an L2 table; a byte each |
//! | 36 | 0: plain; 1: AES |
//! | 40 | where the L1 table begins, 64 bits |

use crate::two_level::MAX_L1_ENTRIES;
use block::{Error, ErrorKind};
use std::ops::RangeInclusive;

/// Bytes of the fields.
pub(super) const HEADER_BYTES: usize = 48;
pub(super) const ENTRY_BYTES: u64 = 8;
/// Longest name of a backing file, in bytes.
pub(super) const MAX_NAME: u32 = 1023;

const MAGIC: u32 = 0x5146_49fb;
const VERSION: u32 = 1;
const CLUSTER_BITS: RangeInclusive<u8> = 9..=16;
const L2_BITS: RangeInclusive<u8> = 6..=13;

/// How data is encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Crypt {
    None,
    Aes,
}

/// Where the name of the backing file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NamePlace {
    pub(super) offset: u64,
    pub(super) length: u32,
}

/// What a header says, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) name: Option<NamePlace>,
    pub(super) disk_bytes: u64,
    pub(super) cluster_bits: u8,
    pub(super) l2_bits: u8,
    pub(super) crypt: Crypt,
    pub(super) l1_offset: u64,
}

fn word(bytes: &[u8], offset: usize) -> u32 {
    let field = bytes[offset..].first_chunk();
    u32::from_be_bytes(*field.expect("the header is longer"))
}

fn long(bytes: &[u8], offset: usize) -> u64 {
    let field = bytes[offset..].first_chunk();
    u64::from_be_bytes(*field.expect("the header is longer"))
}

/// How sure it is that an image that begins so is one of qcow.
pub(super) fn probe(start: &[u8]) -> u8 {
    let is_qcow =
        start.len() >= HEADER_BYTES && word(start, 0) == MAGIC && word(start, 4) == VERSION;
    if is_qcow { 100 } else { 0 }
}

fn corrupt(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, message)
}

impl Header {
    /// Of a new image, whose backing file has that name.
    ///
    /// # Errors
    /// `Invalid` for a disk that does not fit.
    pub(super) fn new(disk_bytes: u64, name: Option<&str>, crypt: Crypt) -> Result<Self, Error> {
        let invalid = |message: &str| Err(Error::new(ErrorKind::Invalid, message));
        if disk_bytes == 0 {
            return invalid("Image size is too small, cannot be zero length");
        }
        let length = name.map_or(0, str::len);
        let Some(length) = u32::try_from(length).ok().filter(|it| *it <= MAX_NAME) else {
            return invalid("Backing file name too long");
        };
        // What is copied from a backing file is little at a time.
        let (cluster_bits, l2_bits) = match name {
            Some(_) => (9, 12),
            None => (12, 9),
        };
        let name_end = HEADER_BYTES as u64 + u64::from(length);
        let header = Self {
            name: name.map(|_| NamePlace {
                offset: HEADER_BYTES as u64,
                length,
            }),
            disk_bytes,
            cluster_bits,
            l2_bits,
            crypt,
            l1_offset: name_end.next_multiple_of(ENTRY_BYTES),
        };
        match header.l1_entries() > MAX_L1_ENTRIES as u64 {
            true => invalid("Image too large"),
            false => Ok(header),
        }
    }

    /// Checks a header.
    ///
    /// # Errors
    /// `Corrupt`, `Unsupported`.
    pub(super) fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Self, Error> {
        if word(bytes, 0) != MAGIC {
            return Err(corrupt("Image not in qcow format"));
        }
        let version = word(bytes, 4);
        if version != VERSION {
            let message = format!("qcow (v{version}) does not support qcow version {version}");
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        let disk_bytes = long(bytes, 24);
        if disk_bytes <= 1 {
            return Err(corrupt(
                "Image size is too small (must be at least 2 bytes)",
            ));
        }
        let (cluster_bits, l2_bits) = (bytes[32], bytes[33]);
        if !CLUSTER_BITS.contains(&cluster_bits) {
            return Err(corrupt("Cluster size must be between 512 and 64k"));
        }
        if !L2_BITS.contains(&l2_bits) {
            return Err(corrupt("L2 table size must be between 512 and 64k"));
        }
        let crypt = match word(bytes, 36) {
            0 => Crypt::None,
            1 => Crypt::Aes,
            _ => return Err(corrupt("invalid encryption method in qcow header")),
        };
        let name = (long(bytes, 8) != 0).then(|| NamePlace {
            offset: long(bytes, 8),
            length: word(bytes, 16),
        });
        let header = Self {
            name,
            disk_bytes,
            cluster_bits,
            l2_bits,
            crypt,
            l1_offset: long(bytes, 40),
        };
        header.check()
    }

    fn check(self) -> Result<Self, Error> {
        let entries = self.l1_entries();
        if self.disk_bytes > i64::MAX as u64 || entries > MAX_L1_ENTRIES as u64 {
            return Err(Error::new(ErrorKind::Unsupported, "Image too large"));
        }
        if self.crypt == Crypt::Aes && !self.disk_bytes.is_multiple_of(512) {
            return Err(corrupt(
                "the size of an encrypted image is not a multiple of 512",
            ));
        }
        let end = self.l1_offset.checked_add(entries * ENTRY_BYTES);
        let is_behind = self.l1_offset >= HEADER_BYTES as u64;
        if !is_behind || end.is_none_or(|end| end > i64::MAX as u64) {
            return Err(corrupt("the L1 table's offset is invalid"));
        }
        if let Some(NamePlace { offset, length }) = self.name {
            let end = offset.checked_add(length.into());
            if length > MAX_NAME || end.is_none_or(|end| end > i64::MAX as u64) {
                return Err(corrupt("Backing file name too long"));
            }
        }
        Ok(self)
    }

    /// Entries of the L1 table.
    pub(super) fn l1_entries(&self) -> u64 {
        self.disk_bytes
            .div_ceil(1 << (self.cluster_bits + self.l2_bits))
    }

    /// Where the L1 table ends, in bytes.
    pub(super) fn l1_end(&self) -> u64 {
        self.l1_offset + self.l1_entries() * ENTRY_BYTES
    }

    /// The fields' bytes.
    pub(super) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut put = |offset: usize, field: &[u8]| {
            bytes[offset..offset + field.len()].copy_from_slice(field);
        };
        let name = self.name.unwrap_or(NamePlace {
            offset: 0,
            length: 0,
        });
        let crypt: u32 = match self.crypt {
            Crypt::None => 0,
            Crypt::Aes => 1,
        };
        for (offset, field) in [(0, MAGIC), (4, VERSION), (16, name.length), (36, crypt)] {
            put(offset, &field.to_be_bytes());
        }
        for (offset, field) in [
            (8, name.offset),
            (24, self.disk_bytes),
            (40, self.l1_offset),
        ] {
            put(offset, &field.to_be_bytes());
        }
        put(32, &[self.cluster_bits, self.l2_bits]);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(changes: &[(usize, &[u8])]) -> Result<Header, String> {
        let header = Header::new(64 << 20, None, Crypt::None).unwrap();
        let mut bytes = header.encode();
        for (offset, field) in changes {
            bytes[*offset..offset + field.len()].copy_from_slice(field);
        }
        Header::parse(&bytes).map_err(|error| error.message)
    }

    #[test]
    fn what_is_encoded_is_parsed() {
        for (name, crypt) in [(None, Crypt::None), (Some("base"), Crypt::Aes)] {
            let header = Header::new(10 << 30, name, crypt).unwrap();
            assert_eq!(Header::parse(&header.encode()).ok(), Some(header));
        }
    }

    #[test]
    fn headers_that_lie_are_refused_by_name() {
        let cluster = "Cluster size must be between 512 and 64k";
        let table = "L2 table size must be between 512 and 64k";
        let name = "Backing file name too long";
        let l1 = "the L1 table's offset is invalid";
        for (changes, message) in [
            (&[(0, &b"x"[..])][..], "Image not in qcow format"),
            (&[(7, &[2])], "qcow (v2) does not support qcow version 2"),
            (
                &[(24, &[0, 0, 0, 0, 0, 0, 0, 1])],
                "Image size is too small (must be at least 2 bytes)",
            ),
            (&[(24, &[0xee; 8])], "Image too large"),
            (&[(24, &[0x7f; 8])], "Image too large"),
            (&[(24, &[0, 0, 8, 0, 0, 0, 0, 1])], "Image too large"),
            (&[(32, &[8])], cluster),
            (&[(32, &[17])], cluster),
            (&[(33, &[5])], table),
            (&[(33, &[14])], table),
            (&[(39, &[2])], "invalid encryption method in qcow header"),
            (&[(40, &[0; 8])], l1),
            (&[(40, &[0xff; 8])], l1),
            (
                &[(40, &[0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff])],
                l1,
            ),
            (&[(15, &[48]), (16, &[0, 0, 4, 0])], name),
            (&[(8, &[0xff; 8]), (16, &[0, 0, 0, 4])], name),
            (
                &[(31, &[1]), (39, &[1])],
                "the size of an encrypted image is not a multiple of 512",
            ),
        ] {
            assert_eq!(parse(changes).unwrap_err(), message, "{changes:?}");
        }
    }
}
