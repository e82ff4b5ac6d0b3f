//! The footer of a virtual hard disk, and the header of a dynamic one (Microsoft's "Virtual Hard Disk Image
//! Format Specification", 1.0).
//!
//! | footer | field, big-endian |
//! |---|---|
//! | 0 | "conectix" |
//! | 8, 12 | features, version |
//! | 16 | where the dynamic header is, 64 bits; all ones in a fixed image |
//! | 24 | seconds since 2000 |
//! | 28, 32, 36 | program that made it, its version, its system |
//! | 40, 48 | bytes of the disk at first and now, 64 bits |
//! | 56, 58, 59 | cylinders (16 bits), heads, sectors of a track |
//! | 60 | 2 fixed, 3 dynamic, 4 a difference to another image |
//! | 64 | checksum |
//! | 68 | UUID |
//!
//! | dynamic header | field, big-endian |
//! |---|---|
//! | 0 | "cxsparse" |
//! | 8 | all ones |
//! | 16 | where the block map is, 64 bits |
//! | 24, 28 | version, entries of the map |
//! | 32 | bytes of a block |
//! | 36 | checksum |
//!
//! Checksums are the complement of the sum of all other bytes.

use super::SECTOR;
use block::{Error, ErrorKind};

/// Bytes of a footer.
pub(super) const FOOTER_BYTES: usize = 512;
/// Bytes of a dynamic header.
pub(super) const HEADER_BYTES: usize = 1024;
/// Most sectors of a disk: 2040 GiB.
pub(super) const MAX_SECTORS: u64 = 0xff00_0000;
/// Most entries of a map: it takes 64 MiB of memory.
const MAX_ENTRIES: u32 = 16 << 20;

const COOKIE: &[u8] = b"conectix";
const HEADER_COOKIE: &[u8] = b"cxsparse";
const VERSION: u32 = 0x0001_0000;
/// A bit that is always set.
const FEATURES: u32 = 2;
const CHECKSUM_AT: usize = 64;
const HEADER_CHECKSUM_AT: usize = 36;
/// Programs whose disks are as long as the footer says; those of others have their geometry's length.
const EXACT: [&[u8; 4]; 6] = [b"win ", b"qem2", b"d2v ", b"tap\0", b"CTXS", b"wa\0\0"];

/// What a disk's geometry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Geometry {
    pub(super) cylinders: u16,
    pub(super) heads: u8,
    pub(super) track_sectors: u8,
}

impl Geometry {
    /// The largest one: disks with it may be longer.
    pub(super) const LARGEST: Self = Self {
        cylinders: u16::MAX,
        heads: 16,
        track_sectors: 255,
    };

    pub(super) fn sectors(self) -> u64 {
        u64::from(self.cylinders) * u64::from(self.heads) * u64::from(self.track_sectors)
    }

    /// The geometry of a disk with so many sectors, which may have less (the specification's appendix).
    fn of(sectors: u64) -> Self {
        let sectors = sectors.min(Self::LARGEST.sectors());
        let (mut heads, mut track) = (16, 255);
        if sectors < 65535 * 16 * 63 {
            track = 17;
            heads = (sectors / track).div_ceil(1024).max(4);
            if sectors / track >= heads * 1024 || heads > 16 {
                (heads, track) = (16, 31);
            }
            if sectors / track >= heads * 1024 {
                track = 63;
            }
        }
        Self {
            cylinders: (sectors / track / heads) as u16,
            heads: heads as u8,
            track_sectors: track as u8,
        }
    }

    /// The smallest geometry that has at least so many sectors, or the largest one.
    pub(super) fn covering(sectors: u64) -> Self {
        let mut at_least = sectors;
        if sectors == 0 {
            let (cylinders, heads, track_sectors) = (0, 0, 0);
            return Self {
                cylinders,
                heads,
                track_sectors,
            };
        }
        loop {
            let geometry = Self::of(at_least);
            if geometry.sectors() >= sectors || geometry == Self::LARGEST {
                return geometry;
            }
            at_least += 1;
        }
    }
}

/// The kinds of images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Fixed,
    Dynamic,
    Difference,
    Other(u32),
}

impl Kind {
    fn of(number: u32) -> Self {
        match number {
            2 => Self::Fixed,
            3 => Self::Dynamic,
            4 => Self::Difference,
            other => Self::Other(other),
        }
    }
    fn number(self) -> u32 {
        match self {
            Self::Fixed => 2,
            Self::Dynamic => 3,
            Self::Difference => 4,
            Self::Other(other) => other,
        }
    }
}

/// How the length of a disk is found out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SizeRule {
    /// By the program that made it.
    Creator,
    Geometry,
    Footer,
}

/// What a footer says; its checksum is right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Footer {
    pub(super) kind: Kind,
    pub(super) header_offset: u64,
    /// Seconds since 2000.
    pub(super) made: u32,
    pub(super) creator: [u8; 4],
    pub(super) bytes: u64,
    pub(super) geometry: Geometry,
    pub(super) uuid: [u8; 16],
}

fn field<const LENGTH: usize>(bytes: &[u8], at: usize) -> [u8; LENGTH] {
    let field = bytes[at..].first_chunk();
    *field.expect("the structures are longer")
}

fn corrupt(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, message)
}

/// The complement of the sum of all bytes but the checksum's.
fn checksum(bytes: &[u8], at: usize) -> u32 {
    let sum = |bytes: &[u8]| bytes.iter().map(|byte| u32::from(*byte)).sum::<u32>();
    !(sum(&bytes[..at]) + sum(&bytes[at + 4..]))
}

/// How sure it is that an image that begins so is a virtual hard disk; fixed ones are not seen.
pub(super) fn probe(start: &[u8]) -> u8 {
    match start.starts_with(COOKIE) {
        true => 100,
        false => 0,
    }
}

impl Footer {
    /// Checks a footer; `None` when it is none.
    ///
    /// # Errors
    /// `Corrupt` when its checksum is wrong.
    pub(super) fn parse(bytes: &[u8; FOOTER_BYTES]) -> Result<Option<Self>, Error> {
        if !bytes.starts_with(COOKIE) {
            return Ok(None);
        }
        if u32::from_be_bytes(field(bytes, CHECKSUM_AT)) != checksum(bytes, CHECKSUM_AT) {
            return Err(corrupt("Incorrect header checksum"));
        }
        Ok(Some(Self {
            kind: Kind::of(u32::from_be_bytes(field(bytes, 60))),
            header_offset: u64::from_be_bytes(field(bytes, 16)),
            made: u32::from_be_bytes(field(bytes, 24)),
            creator: field(bytes, 28),
            bytes: u64::from_be_bytes(field(bytes, 48)),
            geometry: Geometry {
                cylinders: u16::from_be_bytes(field(bytes, 56)),
                heads: bytes[58],
                track_sectors: bytes[59],
            },
            uuid: field(bytes, 68),
        }))
    }

    /// The bytes of a new image's footer.
    pub(super) fn encode(&self) -> [u8; FOOTER_BYTES] {
        let mut bytes = [0; FOOTER_BYTES];
        let mut put = |at: usize, field: &[u8]| {
            bytes[at..at + field.len()].copy_from_slice(field);
        };
        put(0, COOKIE);
        for (at, field) in [
            (8, FEATURES),
            (12, VERSION),
            (24, self.made),
            (32, 0x0005_0003),
            (60, self.kind.number()),
        ] {
            put(at, &field.to_be_bytes());
        }
        put(16, &self.header_offset.to_be_bytes());
        put(28, &self.creator);
        put(36, b"Wi2k");
        for at in [40, 48] {
            put(at, &self.bytes.to_be_bytes());
        }
        put(56, &self.geometry.cylinders.to_be_bytes());
        put(58, &[self.geometry.heads, self.geometry.track_sectors]);
        put(68, &self.uuid);
        let sum = checksum(&bytes, CHECKSUM_AT);
        bytes[CHECKSUM_AT..CHECKSUM_AT + 4].copy_from_slice(&sum.to_be_bytes());
        bytes
    }

    /// Length of the disk in bytes.
    ///
    /// # Errors
    /// `Invalid` beyond 2040 GiB.
    pub(super) fn disk_bytes(&self, rule: SizeRule) -> Result<u64, Error> {
        let by_geometry = match rule {
            SizeRule::Creator => !EXACT.contains(&&self.creator),
            SizeRule::Geometry => true,
            SizeRule::Footer => false,
        };
        // What is cut off by the largest geometry is there all the same.
        let sectors = match by_geometry && self.geometry != Geometry::LARGEST {
            true => self.geometry.sectors(),
            false => self.bytes / SECTOR,
        };
        match sectors > MAX_SECTORS {
            true => Err(Error::new(
                ErrorKind::Invalid,
                "Disk size is too large, max size is 2040 GiB",
            )),
            false => Ok(sectors * SECTOR),
        }
    }
}

/// What a dynamic header says, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) map_offset: u64,
    pub(super) entries: u32,
    pub(super) block_bytes: u32,
}

impl Header {
    /// Checks the header of a disk of so many bytes.
    pub(super) fn parse(bytes: &[u8; HEADER_BYTES], disk_bytes: u64) -> Result<Self, Error> {
        if !bytes.starts_with(HEADER_COOKIE) {
            return Err(corrupt("invalid VPC image: no dynamic disk header"));
        }
        let header = Self {
            map_offset: u64::from_be_bytes(field(bytes, 16)),
            entries: u32::from_be_bytes(field(bytes, 28)),
            block_bytes: u32::from_be_bytes(field(bytes, 32)),
        };
        let block = header.block_bytes;
        if !block.is_power_of_two() || u64::from(block) < SECTOR {
            return Err(corrupt(format!("Invalid block size {block}")));
        }
        if u64::from(block) * u64::from(header.entries) < disk_bytes {
            return Err(corrupt("Page table too small"));
        }
        if header.entries > MAX_ENTRIES {
            let message = format!("Max Table Entries too large ({})", header.entries);
            return Err(corrupt(message));
        }
        if header.map_offset > i64::MAX as u64 / 2 {
            return Err(corrupt("invalid VPC image: block map beyond 2^62"));
        }
        if u32::from_be_bytes(field(bytes, HEADER_CHECKSUM_AT))
            != checksum(bytes, HEADER_CHECKSUM_AT)
        {
            return Err(corrupt("Incorrect dynamic disk header checksum"));
        }
        Ok(header)
    }

    /// The header's bytes.
    pub(super) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut put = |at: usize, field: &[u8]| {
            bytes[at..at + field.len()].copy_from_slice(field);
        };
        put(0, HEADER_COOKIE);
        put(8, &u64::MAX.to_be_bytes());
        put(16, &self.map_offset.to_be_bytes());
        for (at, field) in [(24, VERSION), (28, self.entries), (32, self.block_bytes)] {
            put(at, &field.to_be_bytes());
        }
        let sum = checksum(&bytes, HEADER_CHECKSUM_AT);
        bytes[HEADER_CHECKSUM_AT..HEADER_CHECKSUM_AT + 4].copy_from_slice(&sum.to_be_bytes());
        bytes
    }

    /// Bytes of the bitmap before each block.
    pub(super) fn bitmap_bytes(&self) -> u64 {
        (u64::from(self.block_bytes) / SECTOR)
            .div_ceil(8)
            .next_multiple_of(SECTOR)
    }
    /// Where the map ends, with what fills its last sector.
    pub(super) fn map_end(&self) -> u64 {
        let end = self.map_offset + u64::from(self.entries) * 4;
        end.next_multiple_of(SECTOR)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn footer() -> Footer {
        Footer {
            kind: Kind::Dynamic,
            header_offset: 512,
            made: 5,
            creator: *b"qemu",
            bytes: 5 << 20,
            geometry: Geometry::covering((5 << 20) / SECTOR),
            uuid: [7; 16],
        }
    }

    #[test]
    fn geometries_are_those_of_the_specification() {
        for (bytes, cylinders, heads, track_sectors) in [
            (512, 1, 4, 17),
            (64 << 10, 2, 4, 17),
            (1 << 20, 0x1f, 4, 17),
            (64 << 20, 0x3c4, 8, 17),
            (500 << 20, 0x3f8, 16, 63),
            (1 << 30, 0x821, 16, 63),
            (127 << 30, 0xfeff, 16, 255),
            (200 << 30, 0xffff, 16, 255),
        ] {
            let expected = Geometry {
                cylinders,
                heads,
                track_sectors,
            };
            assert_eq!(Geometry::covering(bytes / SECTOR), expected, "{bytes}");
        }
        assert_eq!(Geometry::covering(0).sectors(), 0);
    }

    #[test]
    fn what_is_encoded_is_parsed() {
        let parsed = Footer::parse(&footer().encode());
        assert_eq!(parsed.ok().flatten(), Some(footer()));
        assert_eq!(Footer::parse(&[0; FOOTER_BYTES]).ok(), Some(None));
        let mut broken = footer().encode();
        broken[300] ^= 1;
        let message = Footer::parse(&broken).unwrap_err().message;
        assert_eq!(message, "Incorrect header checksum");
    }

    #[test]
    fn disks_are_as_long_as_their_maker_meant() {
        let by_geometry = footer().geometry.sectors() * SECTOR;
        assert_eq!(
            footer().disk_bytes(SizeRule::Creator).ok(),
            Some(by_geometry)
        );
        assert_eq!(footer().disk_bytes(SizeRule::Footer).ok(), Some(5 << 20));
        for creator in EXACT {
            let footer = Footer {
                creator: *creator,
                ..footer()
            };
            assert_eq!(footer.disk_bytes(SizeRule::Creator).ok(), Some(5 << 20));
            assert_eq!(
                footer.disk_bytes(SizeRule::Geometry).ok(),
                Some(by_geometry)
            );
        }
        let largest = Footer {
            geometry: Geometry::LARGEST,
            bytes: 2040 << 30,
            ..footer()
        };
        assert_eq!(
            largest.disk_bytes(SizeRule::Geometry).ok(),
            Some(2040 << 30)
        );
        let longer = Footer {
            bytes: u64::MAX,
            ..largest
        };
        assert!(longer.disk_bytes(SizeRule::Creator).is_err());
    }

    #[test]
    fn headers_that_lie_are_refused_by_name() {
        let header = Header {
            map_offset: 1536,
            entries: 3,
            block_bytes: 2 << 20,
        };
        let parse = |header: Header| {
            let parsed = Header::parse(&header.encode(), 6 << 20);
            parsed.map_err(|error| error.message)
        };
        assert_eq!(parse(header), Ok(header));
        assert_eq!((header.bitmap_bytes(), header.map_end()), (512, 2048));
        let entries = |entries| Header { entries, ..header };
        assert_eq!(parse(entries(2)), Err("Page table too small".to_owned()));
        let message = "Max Table Entries too large (4294967295)";
        assert_eq!(parse(entries(u32::MAX)), Err(message.to_owned()));
        for block_bytes in [0, 256, 3 << 20] {
            let message = format!("Invalid block size {block_bytes}");
            let header = Header {
                block_bytes,
                ..header
            };
            assert_eq!(parse(header), Err(message));
        }
        let far = Header {
            map_offset: u64::MAX,
            ..header
        };
        assert!(parse(far).is_err());
        let mut broken = header.encode();
        broken[40] = 1;
        assert!(Header::parse(&broken, 0).is_err());
        broken[0] = 0;
        assert!(Header::parse(&broken, 0).is_err());
    }
}
