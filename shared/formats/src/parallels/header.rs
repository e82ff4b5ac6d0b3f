//! The header of a Parallels expandable image (QEMU docs/interop/parallels.txt, "Header").
//!
//! | offset | field, little-endian |
//! |---|---|
//! | 0 | magic, 16 bytes: which of two forms |
//! | 16 | version, 2 |
//! | 20, 24 | heads and cylinders that a guest is told |
//! | 28 | sectors of a block |
//! | 32 | entries of the block map, which is right behind the header |
//! | 36 | sectors of the disk, 64 bits; the lower half alone counts in the older form |
//! | 44 | whether somebody has it open for writing |
//! | 48 | sector where blocks begin, 0 for right behind the map |
//! | 52 | flags |
//! | 56 | sector of the format extension, 64 bits; 0 without one |

use super::SECTOR;
use block::{Error, ErrorKind};

/// Bytes of a header; the block map follows.
pub(super) const HEADER_BYTES: usize = 64;
/// Where the field is that says who has the image open.
pub(super) const IN_USE_AT: u64 = 44;
/// Open for writing, or not closed since.
pub(super) const IN_USE: u32 = 0x746f_6e59;
/// Closed by somebody who does not keep extensions up to date.
pub(super) const CLOSED: u32 = 0;

const VERSION: u32 = 2;
const HEADS: u32 = 16;
/// Sectors of a cylinder of new images.
const CYLINDER: u64 = 512;
/// Most sectors of a block: larger ones are refused by others, too.
pub(super) const MAX_BLOCK_SECTORS: u32 = i32::MAX as u32 / 513;
/// Most entries of a map: it takes 64 MiB of memory.
pub(super) const MAX_ENTRIES: u32 = 16 << 20;

/// The two forms of images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// Entries are sectors, disks end at 2 TiB.
    Sectors,
    /// Entries are blocks.
    Blocks,
}

impl Form {
    const ALL: [(Self, &'static [u8; 16]); 2] = [
        (Self::Sectors, b"WithoutFreeSpace"),
        (Self::Blocks, b"WithouFreSpacExt"),
    ];
    fn of(magic: &[u8]) -> Option<Self> {
        let known = Self::ALL
            .iter()
            .find(|(_, known)| magic.starts_with(*known));
        known.map(|(form, _)| *form)
    }
    fn magic(self) -> &'static [u8; 16] {
        match self {
            Self::Sectors => Self::ALL[0].1,
            Self::Blocks => Self::ALL[1].1,
        }
    }
}

/// What a header says, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) form: Form,
    pub(super) block_sectors: u32,
    pub(super) entries: u32,
    pub(super) disk_sectors: u64,
    pub(super) in_use: bool,
    /// Sector where blocks are said to begin.
    pub(super) data_sector: u32,
    /// Sector of the format extension.
    pub(super) extension: u64,
}

/// How sure it is that an image that begins so is one of Parallels.
pub(super) fn probe(start: &[u8]) -> u8 {
    match start.len() >= HEADER_BYTES && Form::of(start).is_some() && word(start, 16) == VERSION {
        true => 100,
        false => 0,
    }
}

fn word(bytes: &[u8], offset: usize) -> u32 {
    let field = bytes[offset..].first_chunk();
    u32::from_le_bytes(*field.expect("the header is longer"))
}

fn long(bytes: &[u8], offset: usize) -> u64 {
    let field = bytes[offset..].first_chunk();
    u64::from_le_bytes(*field.expect("the header is longer"))
}

fn refuse<T>(message: &str) -> Result<T, Error> {
    Err(Error::new(ErrorKind::Corrupt, message))
}

impl Header {
    /// Of a new image; sizes in bytes. `None` when there would be too many blocks.
    pub(super) fn new(disk_bytes: u64, block_bytes: u64) -> Option<Self> {
        let block_sectors = u32::try_from(block_bytes / SECTOR).ok()?;
        let entries = u32::try_from(disk_bytes.div_ceil(block_bytes)).ok()?;
        let map_end = HEADER_BYTES as u64 + u64::from(entries) * 4;
        let data = map_end.next_multiple_of(block_bytes) / SECTOR;
        (entries <= MAX_ENTRIES).then_some(Self {
            form: Form::Blocks,
            block_sectors,
            entries,
            disk_sectors: disk_bytes.div_ceil(SECTOR),
            in_use: false,
            data_sector: u32::try_from(data).ok()?,
            extension: 0,
        })
    }

    /// Checks a header.
    pub(super) fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Self, Error> {
        let (version, block_sectors, entries) = (word(bytes, 16), word(bytes, 28), word(bytes, 32));
        let (Some(form), VERSION) = (Form::of(bytes), version) else {
            return refuse("Image not in Parallels format");
        };
        if block_sectors == 0 {
            return refuse("Invalid image: Zero sectors per track");
        }
        if block_sectors > MAX_BLOCK_SECTORS {
            return refuse("Invalid image: Too big cluster");
        }
        if entries > MAX_ENTRIES {
            return refuse("Catalog too large");
        }
        let disk_sectors = match form {
            Form::Sectors => u64::from(word(bytes, 36)),
            Form::Blocks => long(bytes, 36),
        };
        let extension = long(bytes, 56);
        let most = i64::MAX as u64 / SECTOR;
        if disk_sectors > most || extension > most {
            return refuse("Invalid image: sector numbers beyond 2^54");
        }
        Ok(Self {
            form,
            block_sectors,
            entries,
            disk_sectors,
            in_use: word(bytes, 44) == IN_USE,
            data_sector: word(bytes, 48),
            extension,
        })
    }

    /// The header's bytes.
    pub(super) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut put = |offset: usize, field: &[u8]| {
            bytes[offset..offset + field.len()].copy_from_slice(field);
        };
        let cylinders = self.disk_sectors.div_ceil(CYLINDER);
        put(0, self.form.magic());
        for (offset, field) in [
            (16, VERSION),
            (20, HEADS),
            (24, u32::try_from(cylinders).unwrap_or(u32::MAX)),
            (28, self.block_sectors),
            (32, self.entries),
            (44, if self.in_use { IN_USE } else { CLOSED }),
            (48, self.data_sector),
        ] {
            put(offset, &field.to_le_bytes());
        }
        put(36, &self.disk_sectors.to_le_bytes());
        put(56, &self.extension.to_le_bytes());
        bytes
    }

    /// Length of a block in bytes.
    pub(super) fn block_bytes(&self) -> u64 {
        u64::from(self.block_sectors) * SECTOR
    }
    /// What entries of the map count, in bytes.
    pub(super) fn unit(&self) -> u64 {
        match self.form {
            Form::Sectors => SECTOR,
            Form::Blocks => self.block_bytes(),
        }
    }
    /// Where the map ends.
    pub(super) fn map_end(&self) -> u64 {
        HEADER_BYTES as u64 + u64::from(self.entries) * 4
    }
    /// Where the first block can be that is not there yet: behind the map, whatever the header says.
    pub(super) fn first_place(&self) -> u64 {
        let start = self.map_end().max(u64::from(self.data_sector) * SECTOR);
        start.next_multiple_of(self.unit())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(changes: &[(usize, &[u8])]) -> Result<Header, String> {
        let mut bytes = Header::new(3 << 20, 64 << 10).unwrap().encode();
        for (offset, field) in changes {
            bytes[*offset..offset + field.len()].copy_from_slice(field);
        }
        Header::parse(&bytes).map_err(|error| error.message)
    }

    #[test]
    fn what_is_encoded_is_parsed() {
        for (disk, block) in [
            (3 << 20, 64 << 10),
            (0, 1 << 20),
            (5 << 40, 3 << 20),
            (512, 512),
        ] {
            let header = Header::new(disk, block).unwrap();
            assert_eq!(Header::parse(&header.encode()).ok(), Some(header));
            assert!(header.first_place() >= header.map_end());
            assert_eq!(header.first_place(), u64::from(header.data_sector) * SECTOR);
        }
        assert_eq!(Header::new(1 << 50, 512), None);
    }

    #[test]
    fn headers_that_lie_are_refused_by_name() {
        for (changes, message) in [
            (&[(0, &[0][..])][..], "Image not in Parallels format"),
            (&[(16, &[3])], "Image not in Parallels format"),
            (&[(28, &[0; 4])], "Invalid image: Zero sectors per track"),
            (&[(28, &[0xff; 4])], "Invalid image: Too big cluster"),
            (&[(32, &[0xff; 4])], "Catalog too large"),
            (
                &[(36, &[0xff; 8])],
                "Invalid image: sector numbers beyond 2^54",
            ),
            (
                &[(56, &[0xff; 8])],
                "Invalid image: sector numbers beyond 2^54",
            ),
        ] {
            assert_eq!(parse(changes), Err(message.to_owned()));
        }
    }

    #[test]
    fn older_images_count_sectors() {
        let magic: &[u8] = b"WithoutFreeSpace";
        let header = parse(&[(0, magic), (36, &[0xff; 8]), (48, &[0; 4])]).unwrap();
        assert_eq!(header.disk_sectors, u64::from(u32::MAX));
        assert_eq!((header.unit(), header.first_place()), (512, 512));
        // Blocks never begin within the map.
        let header = parse(&[(48, &[0; 4])]).unwrap();
        assert_eq!(header.first_place(), 64 << 10);
    }
}
