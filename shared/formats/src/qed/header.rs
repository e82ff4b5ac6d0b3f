//! The header of a QED image (QEMU docs/interop/qed_spec.txt, "Header").
//!
//! | offset | field, little-endian |
//! |---|---|
//! | 0 | magic, "QED\0" |
//! | 4, 8, 12 | bytes of a cluster; clusters of a table, and of the header |
//! | 16, 24, 32 | features, compatible features, features that clear themselves; 64 bits each |
//! | 40, 48 | where the L1 table begins, bytes of the disk; 64 bits each |
//! | 56, 60 | where the backing file's name begins, and its bytes |

use block::{Error, ErrorKind};

/// Bytes of the fields.
pub(super) const HEADER_BYTES: usize = 64;
/// Where the features are, and those that clear themselves.
pub(super) const FEATURES_AT: u64 = 16;
pub(super) const AUTOCLEAR_AT: u64 = 32;
/// Where the disk's size is.
pub(super) const SIZE_AT: u64 = 48;

const MAGIC: [u8; 4] = *b"QED\0";
/// Longest name of a backing file, in bytes.
pub(super) const MAX_NAME: u32 = 1023;
const CLUSTER_SIZES: std::ops::RangeInclusive<u32> = 1 << 12..=1 << 26;
const TABLE_SIZES: std::ops::RangeInclusive<u32> = 1..=16;
pub(super) const ENTRY_BYTES: u64 = 8;

/// The disk shows a backing file.
pub(super) const BACKING_FILE: u64 = 1;
/// The image was not closed by whoever allocated.
pub(super) const NEED_CHECK: u64 = 2;
/// The backing file is raw.
pub(super) const BACKING_IS_RAW: u64 = 4;
const KNOWN: u64 = BACKING_FILE | NEED_CHECK | BACKING_IS_RAW;

/// Where the name of the backing file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NamePlace {
    pub(super) offset: u32,
    pub(super) length: u32,
}

/// What a header says, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) cluster_size: u32,
    /// Clusters of a table.
    pub(super) table_size: u32,
    /// Clusters of the header.
    pub(super) header_size: u32,
    pub(super) features: u64,
    pub(super) autoclear: u64,
    pub(super) l1_offset: u64,
    pub(super) disk_bytes: u64,
    pub(super) name: Option<NamePlace>,
}

/// How sure it is that an image that begins so is one of QED.
pub(super) fn probe(start: &[u8]) -> u8 {
    match start.len() >= HEADER_BYTES && start.starts_with(&MAGIC) {
        true => 100,
        false => 0,
    }
}

fn corrupt(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, message)
}

pub(super) fn check_cluster_size(size: u64) -> Result<u32, Error> {
    let fits = u32::try_from(size).ok().filter(|size| {
        let is_in = CLUSTER_SIZES.contains(size);
        is_in && size.is_power_of_two()
    });
    fits.ok_or_else(|| {
        let (least, most) = (CLUSTER_SIZES.start(), CLUSTER_SIZES.end());
        let message =
            format!("QED cluster size must be within range [{least}, {most}] and power of 2");
        Error::new(ErrorKind::Invalid, message)
    })
}

pub(super) fn check_table_size(size: u64) -> Result<u32, Error> {
    let fits = u32::try_from(size).ok().filter(|size| {
        let is_in = TABLE_SIZES.contains(size);
        is_in && size.is_power_of_two()
    });
    fits.ok_or_else(|| {
        let (least, most) = (TABLE_SIZES.start(), TABLE_SIZES.end());
        let message =
            format!("QED table size must be within range [{least}, {most}] and power of 2");
        Error::new(ErrorKind::Invalid, message)
    })
}

impl Header {
    /// Of a new image.
    ///
    /// # Errors
    /// `Invalid` for a disk that does not fit.
    pub(super) fn new(
        (cluster_size, table_size): (u32, u32),
        disk_bytes: u64,
    ) -> Result<Self, Error> {
        let header = Self {
            cluster_size,
            table_size,
            header_size: 1,
            features: 0,
            autoclear: 0,
            l1_offset: u64::from(cluster_size),
            disk_bytes,
            name: None,
        };
        if !header.takes(disk_bytes) {
            let most = header.most_bytes();
            let message = format!(
                "QED image size must be a non-zero multiple of cluster size and less than {most} bytes"
            );
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        Ok(header)
    }

    /// Checks the header of a file of `length` bytes.
    ///
    /// # Errors
    /// `Corrupt`, `Unsupported` naming the features.
    pub(super) fn parse(bytes: &[u8; HEADER_BYTES], length: u64) -> Result<Self, Error> {
        let word = |at: usize| {
            u32::from_le_bytes(*bytes[at..].first_chunk().expect("the header is longer"))
        };
        let long = |at: usize| {
            u64::from_le_bytes(*bytes[at..].first_chunk().expect("the header is longer"))
        };
        if !bytes.starts_with(&MAGIC) {
            return Err(corrupt("Image not in QED format"));
        }
        let features = long(FEATURES_AT as usize);
        if features & !KNOWN != 0 {
            let message = format!("Unsupported QED features: {:x}", features & !KNOWN);
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        let has_name = features & BACKING_FILE != 0;
        let header = Self {
            cluster_size: check_cluster_size(word(4).into())
                .map_err(|_| corrupt("QED cluster size is invalid"))?,
            table_size: check_table_size(word(8).into())
                .map_err(|_| corrupt("QED table size is invalid"))?,
            header_size: word(12),
            features,
            autoclear: long(AUTOCLEAR_AT as usize),
            l1_offset: long(40),
            disk_bytes: long(SIZE_AT as usize),
            name: has_name.then(|| NamePlace {
                offset: word(56),
                length: word(60),
            }),
        };
        header.check(length)
    }

    fn check(self, length: u64) -> Result<Self, Error> {
        let cluster_size = u64::from(self.cluster_size);
        if self.header_size == 0 {
            return Err(corrupt("QED header has no clusters"));
        }
        if !self.takes(self.disk_bytes) {
            return Err(corrupt("QED image size is invalid"));
        }
        let last = self
            .l1_offset
            .checked_add(self.table_bytes() - cluster_size);
        let is_placed = self.l1_offset.is_multiple_of(cluster_size)
            && self.l1_offset >= self.header_end()
            && last.is_some_and(|last| last < length);
        if !is_placed {
            return Err(corrupt("QED table offset is invalid"));
        }
        if let Some(NamePlace { offset, length }) = self.name {
            let end = u64::from(offset) + u64::from(length);
            if length > MAX_NAME || end > self.header_end() {
                return Err(corrupt(
                    "QED backing file name is too long or not in the header",
                ));
            }
        }
        Ok(self)
    }

    /// Where the header's clusters end, in bytes.
    pub(super) fn header_end(&self) -> u64 {
        u64::from(self.header_size) * u64::from(self.cluster_size)
    }

    /// Bytes of a table.
    pub(super) fn table_bytes(&self) -> u64 {
        u64::from(self.table_size) * u64::from(self.cluster_size)
    }

    /// Entries of a table: a power of two.
    pub(super) fn table_entries(&self) -> u64 {
        self.table_bytes() / ENTRY_BYTES
    }

    /// The largest disk, in bytes.
    fn most_bytes(&self) -> u64 {
        let clusters = self.table_entries() * self.table_entries();
        clusters.saturating_mul(self.cluster_size.into())
    }

    /// Whether a disk may have that many bytes.
    pub(super) fn takes(&self, disk_bytes: u64) -> bool {
        disk_bytes.is_multiple_of(512)
            && disk_bytes <= self.most_bytes()
            && disk_bytes <= i64::MAX as u64
    }

    /// The fields' bytes.
    pub(super) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut put = |offset: usize, field: &[u8]| {
            bytes[offset..offset + field.len()].copy_from_slice(field);
        };
        put(0, &MAGIC);
        let name = self.name.unwrap_or(NamePlace {
            offset: 0,
            length: 0,
        });
        for (offset, field) in [
            (4, self.cluster_size),
            (8, self.table_size),
            (12, self.header_size),
            (56, name.offset),
            (60, name.length),
        ] {
            put(offset, &field.to_le_bytes());
        }
        for (offset, field) in [
            (FEATURES_AT, self.features),
            (AUTOCLEAR_AT, self.autoclear),
            (40, self.l1_offset),
            (SIZE_AT, self.disk_bytes),
        ] {
            put(offset as usize, &field.to_le_bytes());
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(changes: &[(usize, &[u8])]) -> Result<Header, String> {
        let header = Header::new((65536, 4), 10 << 30).unwrap();
        let mut bytes = header.encode();
        for (offset, field) in changes {
            bytes[*offset..offset + field.len()].copy_from_slice(field);
        }
        Header::parse(&bytes, 320 << 10).map_err(|error| error.message)
    }

    #[test]
    fn what_is_encoded_is_parsed() {
        for (shape, size) in [
            ((4096, 1), 512),
            ((65536, 4), 1 << 46),
            ((1 << 26, 16), 1 << 62),
        ] {
            let mut header = Header::new(shape, size).unwrap();
            header.features = BACKING_FILE | BACKING_IS_RAW;
            header.name = Some(NamePlace {
                offset: 64,
                length: MAX_NAME,
            });
            let end = header.l1_offset + header.table_bytes();
            assert_eq!(Header::parse(&header.encode(), end).ok(), Some(header));
            let last = end - u64::from(header.cluster_size);
            assert!(Header::parse(&header.encode(), last).is_err());
        }
    }

    #[test]
    fn headers_that_lie_are_refused_by_name() {
        let cluster = "QED cluster size is invalid";
        let table = "QED table size is invalid";
        let size = "QED image size is invalid";
        let name = "QED backing file name is too long or not in the header";
        let offset = "QED table offset is invalid";
        let none: &[u8] = &[0; 4];
        for (changes, message) in [
            (&[(0, &b"QEM"[..])][..], "Image not in QED format"),
            (&[(4, none)], cluster),
            (&[(4, &[0, 8, 0, 0])], cluster),
            (&[(4, &[1])], cluster),
            (&[(4, &[0, 0, 0, 8])], cluster),
            (&[(8, none)], table),
            (&[(8, &[3])], table),
            (&[(8, &[32])], table),
            (&[(12, none)], "QED header has no clusters"),
            (&[(16, &[0x48])], "Unsupported QED features: 48"),
            (&[(40, &[1])], offset),
            (&[(40, &[0; 8])], offset),
            (&[(40, &[0, 0, 0, 0, 0, 0, 0, 0x80])], offset),
            (&[(40, &[0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff])], offset),
            (&[(12, &[2])], offset),
            (&[(12, &[0xff; 4])], offset),
            (&[(48, &[1])], size),
            (&[(48, &[0, 2, 0, 0, 0, 64])], size),
            (&[(16, &[1]), (56, &[1]), (60, &[0, 4])], name),
            (&[(16, &[1]), (56, &[0xff; 8])], name),
            (&[(16, &[1]), (56, &[0xf0, 0xff]), (60, &[17])], name),
        ] {
            assert_eq!(parse(changes).unwrap_err(), message, "{changes:?}");
        }
        // Without the feature, the fields mean nothing.
        assert_eq!(parse(&[(56, &[0xff; 8])]).unwrap().name, None);
    }
}
