//! The header of a VirtualBox disk, version 1.1 (VirtualBox's VDICore.h, `VDIHEADER1PLUS`).
//!
//! | offset | field, little-endian |
//! |---|---|
//! | 0 | text, 64 bytes |
//! | 64, 68, 72 | signature, version, bytes of the header from here on |
//! | 76 | 1: blocks are allocated as they are written; 2: all of them are |
//! | 340, 344 | where the block map begins, where blocks begin |
//! | 360 | bytes of a sector |
//! | 368 | bytes of the disk, 64 bits |
//! | 376, 384, 388 | bytes of a block, blocks of the disk, blocks allocated |
//! | 392, 408 | UUIDs of the image and of its last change |
//! | 424, 440 | UUIDs of the image that it is a difference to |

use super::{BLOCK, MAX_BLOCKS, SECTOR};
use block::{Error, ErrorKind};

/// Bytes of a header, with what fills its sector.
pub(super) const HEADER_BYTES: usize = 512;

const SIGNATURE: u32 = 0xbeda_107f;
const VERSION: u32 = 0x0001_0001;
/// Bytes behind the signature and the version.
const SIZE: u32 = 0x180;
const TEXT: &[u8] = b"<<< outboard Virtual Disk Image >>>\n";
/// Where the blocks allocated are counted.
pub(super) const ALLOCATED_AT: u64 = 388;

/// Whether blocks are allocated as they are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Dynamic,
    Static,
}

/// What a header says, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) kind: Kind,
    pub(super) map_offset: u32,
    pub(super) data_offset: u32,
    pub(super) disk_bytes: u64,
    pub(super) blocks: u32,
    pub(super) allocated: u32,
}

fn word(bytes: &[u8], offset: usize) -> u32 {
    let field = bytes[offset..].first_chunk();
    u32::from_le_bytes(*field.expect("the header is longer"))
}

/// How sure it is that an image that begins so is one of VirtualBox.
pub(super) fn probe(start: &[u8]) -> u8 {
    match start.len() >= HEADER_BYTES && word(start, 64) == SIGNATURE {
        true => 100,
        false => 0,
    }
}

fn unsupported(what: String) -> Error {
    let message = format!("unsupported VDI image ({what})");
    Error::new(ErrorKind::Unsupported, message)
}

impl Header {
    /// Of a new image.
    pub(super) fn new(kind: Kind, disk_bytes: u64, blocks: u32) -> Self {
        let map_bytes = (u64::from(blocks) * 4).next_multiple_of(SECTOR);
        Self {
            kind,
            map_offset: HEADER_BYTES as u32,
            data_offset: HEADER_BYTES as u32 + map_bytes as u32,
            disk_bytes,
            blocks,
            allocated: match kind {
                Kind::Dynamic => 0,
                Kind::Static => blocks,
            },
        }
    }

    /// Checks a header.
    pub(super) fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Self, Error> {
        let field = |offset| word(bytes, offset);
        let signature = field(64);
        if signature != SIGNATURE {
            let message = format!("Image not in VDI format (bad signature {signature:08x})");
            return Err(Error::new(ErrorKind::Corrupt, message));
        }
        let refuse = |what| Err(unsupported(what));
        let disk = u64::from_le_bytes(*bytes[368..].first_chunk().expect("the header is longer"));
        let too_large = |most: u64| {
            let message = format!(
                "Unsupported VDI image size (size is 0x{disk:x}, max supported is 0x{most:x})"
            );
            Err(Error::new(ErrorKind::Unsupported, message))
        };
        let most = u64::from(MAX_BLOCKS) * BLOCK;
        if disk > most {
            return too_large(most);
        }
        // Others than whole sectors have been seen.
        let disk_bytes = disk.next_multiple_of(SECTOR);
        let (version, map_offset, data_offset) = (field(68), field(340), field(344));
        if version != VERSION {
            let (major, minor) = (version >> 16, version & 0xffff);
            return refuse(format!("version {major}.{minor}"));
        }
        if !u64::from(map_offset).is_multiple_of(SECTOR) {
            return refuse(format!("unaligned block map offset 0x{map_offset:x}"));
        }
        if !u64::from(data_offset).is_multiple_of(SECTOR) {
            return refuse(format!("unaligned data offset 0x{data_offset:x}"));
        }
        for (name, offset, expected) in [("sector", 360, SECTOR), ("block", 376, BLOCK)] {
            let size = field(offset);
            if u64::from(size) != expected {
                return refuse(format!("{name} size {size} is not {expected}"));
            }
        }
        let blocks = field(384);
        if blocks > MAX_BLOCKS {
            return refuse(format!("too many blocks {blocks}, max is {MAX_BLOCKS}"));
        }
        let room = u64::from(blocks) * BLOCK;
        if disk_bytes > room {
            return refuse(format!(
                "disk size {disk_bytes}, image bitmap has room for {room}"
            ));
        }
        for (name, offset) in [("link", 424), ("parent", 440)] {
            if bytes[offset..offset + 16].iter().any(|byte| *byte != 0) {
                return refuse(format!("non-NULL {name} UUID"));
            }
        }
        Ok(Self {
            kind: match field(76) {
                2 => Kind::Static,
                _ => Kind::Dynamic,
            },
            map_offset,
            data_offset,
            disk_bytes,
            blocks,
            allocated: field(388),
        })
    }

    /// The header's bytes, with two random UUIDs.
    pub(super) fn encode(&self, uuids: [[u8; 16]; 2]) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut put = |offset: usize, field: &[u8]| {
            bytes[offset..offset + field.len()].copy_from_slice(field);
        };
        put(0, TEXT);
        let kind = match self.kind {
            Kind::Dynamic => 1,
            Kind::Static => 2,
        };
        for (offset, field) in [
            (64, SIGNATURE),
            (68, VERSION),
            (72, SIZE),
            (76, kind),
            (340, self.map_offset),
            (344, self.data_offset),
            (360, SECTOR as u32),
            (376, BLOCK as u32),
            (384, self.blocks),
            (388, self.allocated),
        ] {
            put(offset, &field.to_le_bytes());
        }
        put(368, &self.disk_bytes.to_le_bytes());
        for (offset, mut uuid) in [392, 408].into_iter().zip(uuids) {
            // Version 4, of the usual variant.
            uuid[7] = uuid[7] & 0x0f | 0x40;
            uuid[8] = uuid[8] & 0x3f | 0x80;
            put(offset, &uuid);
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(changes: &[(usize, &[u8])]) -> Result<Header, String> {
        let header = Header::new(Kind::Dynamic, 3 << 20, 3);
        let mut bytes = header.encode([[1; 16], [2; 16]]);
        for (offset, field) in changes {
            bytes[*offset..offset + field.len()].copy_from_slice(field);
        }
        Header::parse(&bytes).map_err(|error| error.message)
    }

    #[test]
    fn what_is_encoded_is_parsed() {
        for kind in [Kind::Dynamic, Kind::Static] {
            let header = Header::new(kind, 3 << 20, 3);
            let parsed = Header::parse(&header.encode([[1; 16], [2; 16]]));
            assert_eq!(parsed.ok(), Some(header));
        }
        let odd = parse(&[(368, &[1, 0, 0x20])]).unwrap();
        assert_eq!(odd.disk_bytes, (2 << 20) + 512);
    }

    #[test]
    fn headers_that_lie_are_refused_by_name() {
        for (changes, message) in [
            (
                &[(64, &[0][..])][..],
                "Image not in VDI format (bad signature beda1000)",
            ),
            (&[(68, &[2])], "unsupported VDI image (version 1.2)"),
            (
                &[(340, &[1])],
                "unsupported VDI image (unaligned block map offset 0x201)",
            ),
            (
                &[(344, &[1])],
                "unsupported VDI image (unaligned data offset 0x401)",
            ),
            (
                &[(360, &[1])],
                "unsupported VDI image (sector size 513 is not 512)",
            ),
            (
                &[(376, &[1])],
                "unsupported VDI image (block size 1048577 is not 1048576)",
            ),
            (
                &[(384, &[0xff; 4])],
                "unsupported VDI image (too many blocks 4294967295, max is 536870784)",
            ),
            (
                &[(384, &[2])],
                "unsupported VDI image (disk size 3145728, image bitmap has room for 2097152)",
            ),
            (
                &[(368, &[0xff; 8])],
                "Unsupported VDI image size (size is 0xffffffffffffffff, max supported is 0x1fffff8000000)",
            ),
            (&[(424, &[1])], "unsupported VDI image (non-NULL link UUID)"),
            (
                &[(440, &[1])],
                "unsupported VDI image (non-NULL parent UUID)",
            ),
        ] {
            assert_eq!(parse(changes), Err(message.to_owned()));
        }
    }
}
