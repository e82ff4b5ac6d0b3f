//! The format extension: dirty bitmaps, read when the image is opened for reading only (QEMU
//! docs/interop/parallels.txt, "Format Extension").
//!
//! ```text
//!   magic │ MD5 of the rest │ section: magic, flags, length │ data ... │ section │ ... │ end
//!                                                              └ size, id, granularity, clusters of bits
//! ```
//!
//! It is one block long. Whatever is not understood is refused: a bitmap that is not shown is taken for
//! a disk that did not change. Lists of clusters lie within the extension, so nothing here takes more
//! memory than a block and the bits, which are limited.

use super::SECTOR;
use super::header::Header;
use crate::bytes::read_bytes;
use block::bitmap::{BitmapOptions, BitmapSet, DirtyBitmap};
use block::{Edge, Error, ErrorKind};
use md5::{Digest, Md5};
use std::sync::Arc;

const MAGIC: u64 = 0xab23_4cef_23dc_ea87;
const END: u64 = 0;
const DIRTY_BITMAP: u64 = 0x2038_5fae_252c_b34a;
/// What the checksum does not cover.
const PREFIX: usize = 24;
/// Bytes before the data of a section.
const SECTION: usize = 24;
/// Bytes of a bitmap's fields before its list of clusters.
const FIELDS: usize = 32;
/// Longest extension in bytes, and most memory of all bitmaps.
const MAX_BYTES: u64 = 64 << 20;

/// Clusters of a bitmap's bits that are not in the file.
const ALL_CLEAR: u64 = 0;
const ALL_SET: u64 = 1;

fn corrupt(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, what)
}

fn long(bytes: &[u8], at: usize) -> u64 {
    let field = bytes.get(at..).and_then(|rest| rest.first_chunk());
    u64::from_le_bytes(*field.expect("lengths are checked"))
}

fn word(bytes: &[u8], at: usize) -> u32 {
    long(bytes, at) as u32
}

/// Loads the bitmaps of the image in `file`.
pub(super) async fn load(file: &Edge, header: &Header) -> Result<BitmapSet, Error> {
    let failed = |errno| Error::io("Failed to read Format Extension cluster", errno);
    if header.block_bytes() > MAX_BYTES {
        return Err(corrupt("Format Extension is too long"));
    }
    let at = header.extension * SECTOR;
    let bytes = read_bytes(file, at, header.block_bytes() as usize).await;
    let bytes = bytes.map_err(failed)?;
    let set = BitmapSet::default();
    let mut memory = 0;
    for bitmap in sections(&bytes)? {
        let bitmap = Stored::parse(bitmap, header)?;
        memory += bitmap.bits().div_ceil(8);
        if memory > MAX_BYTES {
            return Err(corrupt("the bitmaps of the image need too much memory"));
        }
        set.attach(Arc::new(bitmap.load(file, header).await?));
    }
    Ok(set)
}

/// The data of all bitmaps in an extension.
fn sections(bytes: &[u8]) -> Result<Vec<&[u8]>, Error> {
    if bytes.len() < PREFIX {
        return Err(corrupt("Format Extension is too short"));
    }
    let magic = long(bytes, 0);
    if magic != MAGIC {
        let message =
            format!("Wrong parallels Format Extension magic: 0x{magic:x}, expected: 0x{MAGIC:x}");
        return Err(corrupt(message));
    }
    let (prefix, mut rest) = bytes.split_at(PREFIX);
    if prefix[8..] != Md5::digest(rest)[..] {
        let message = "Wrong checksum in Format Extension header. Format extension is corrupted.";
        return Err(corrupt(message));
    }
    let mut found = Vec::new();
    loop {
        let Some((section, data)) = rest.split_at_checked(SECTION) else {
            return Err(corrupt("Can not read feature header: no End of features"));
        };
        let (magic, flags, length) = (long(section, 0), long(section, 8), word(section, 16));
        match magic {
            END => return Ok(found),
            DIRTY_BITMAP => {}
            _ => return Err(corrupt(format!("Unknown feature: 0x{magic:x}"))),
        }
        if flags != 0 {
            return Err(corrupt("Flags for extension feature are unsupported"));
        }
        let Some((bitmap, data)) = data.split_at_checked(length as usize) else {
            return Err(corrupt("feature beyond the end of the Format Extension"));
        };
        found.push(bitmap);
        let padding = length.next_multiple_of(8) - length;
        rest = data.get(padding as usize..).unwrap_or_default();
    }
}

/// What a section says about a bitmap, checked.
struct Stored<'a> {
    name: String,
    /// Bytes of the disk for one bit.
    granularity: u32,
    disk_bytes: u64,
    clusters: &'a [u8],
}

impl<'a> Stored<'a> {
    fn parse(section: &'a [u8], header: &Header) -> Result<Self, Error> {
        let Some((fields, clusters)) = section.split_at_checked(FIELDS) else {
            return Err(corrupt("Too small bitmap feature"));
        };
        let (sectors, granularity) = (long(fields, 0), word(fields, 24));
        let count = u32::from_le_bytes(*fields.last_chunk().expect("there are more"));
        if sectors != header.disk_sectors {
            let message = format!(
                "Bitmap size (in sectors) {sectors} differs from disk size in sectors {}",
                header.disk_sectors
            );
            return Err(corrupt(message));
        }
        let bytes = u64::from(granularity) * SECTOR;
        let bytes = u32::try_from(bytes).ok().filter(|it| it.is_power_of_two());
        let granularity = bytes
            .ok_or_else(|| corrupt(format!("Invalid bitmap granularity {granularity} sectors")))?;
        let length = u64::from(count) * 8;
        let Some(clusters) = usize::try_from(length)
            .ok()
            .and_then(|it| clusters.get(..it))
        else {
            return Err(corrupt("Bitmap L1 table does not fit into its feature"));
        };
        let stored = Self {
            name: name(&fields[8..24]),
            granularity,
            disk_bytes: header.disk_sectors * SECTOR,
            clusters,
        };
        let needed = stored.bits().div_ceil(8).div_ceil(header.block_bytes());
        match u64::from(count) == needed {
            true => Ok(stored),
            false => Err(corrupt(format!(
                "Invalid bitmap L1 size {count}, expected {needed}"
            ))),
        }
    }

    fn bits(&self) -> u64 {
        self.disk_bytes.div_ceil(u64::from(self.granularity))
    }

    async fn load(&self, file: &Edge, header: &Header) -> Result<DirtyBitmap, Error> {
        let bitmap = DirtyBitmap::new(BitmapOptions {
            name: Some(self.name.clone()),
            granularity: self.granularity,
            size: self.disk_bytes,
        })?;
        let cluster = header.block_bytes();
        let total = self.bits().div_ceil(8);
        for (index, entry) in (0..).zip(self.clusters.as_chunks().0) {
            let from: u64 = index * cluster;
            let length = cluster.min(total - from) as usize;
            let bytes = match u64::from_le_bytes(*entry) {
                ALL_CLEAR => continue,
                ALL_SET => vec![0xff; length],
                sector => {
                    let offset = sector.checked_mul(SECTOR);
                    let offset = offset.filter(|offset| *offset <= i64::MAX as u64 - MAX_BYTES);
                    let offset = offset.ok_or_else(|| corrupt("bitmap cluster beyond 2^63"))?;
                    let read = read_bytes(file, offset, length).await;
                    let failed = |errno| Error::io("Failed to read bitmap cluster", errno);
                    read.map_err(failed)?
                }
            };
            // Clusters are whole sectors, so words do not straddle them.
            bitmap.add_bytes(from / 8, &bytes);
        }
        bitmap.set_read_only(true);
        Ok(bitmap)
    }
}

/// The identifier as a UUID is written.
fn name(id: &[u8]) -> String {
    let hex: String = id.iter().map(|byte| format!("{byte:02x}")).collect();
    let parts = [
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..],
    ];
    parts.join("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extension(body: &[u8]) -> Vec<u8> {
        let mut body = body.to_vec();
        body.resize(488, 0);
        let prefix = [&MAGIC.to_le_bytes()[..], &Md5::digest(&body)].concat();
        [prefix, body].concat()
    }

    fn section(magic: u64, flags: u64, data: &[u8]) -> Vec<u8> {
        let mut bytes = [magic.to_le_bytes(), flags.to_le_bytes()].concat();
        bytes.extend((data.len() as u64).to_le_bytes());
        bytes.extend(data);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }

    fn bitmap(sectors: u64, granularity: u32, clusters: &[u64]) -> Vec<u8> {
        let mut bytes = sectors.to_le_bytes().to_vec();
        bytes.extend([0xab; 16]);
        bytes.extend(granularity.to_le_bytes());
        bytes.extend((clusters.len() as u32).to_le_bytes());
        bytes.extend(clusters.iter().flat_map(|it| it.to_le_bytes()));
        bytes
    }

    #[test]
    fn sections_are_found_in_order() {
        let body = [
            section(DIRTY_BITMAP, 0, b"abc"),
            section(DIRTY_BITMAP, 0, b"d"),
        ]
        .concat();
        let bytes = extension(&body);
        assert_eq!(sections(&bytes).unwrap(), [&b"abc"[..], b"d"]);
        let empty = extension(&[]);
        assert!(sections(&empty).unwrap().is_empty());
    }

    #[test]
    fn extensions_that_lie_are_refused_by_name() {
        let message = |bytes: &[u8]| sections(bytes).unwrap_err().message;
        let mut broken = extension(&[]);
        broken[100] = 1;
        assert!(message(&broken).starts_with("Wrong checksum"));
        assert!(message(&broken[8..]).starts_with("Wrong parallels Format Extension magic"));
        assert!(message(&[]).contains("too short"));
        assert_eq!(
            message(&extension(&section(7, 0, &[]))),
            "Unknown feature: 0x7"
        );
        let flagged = extension(&section(DIRTY_BITMAP, 1, &[]));
        assert!(message(&flagged).contains("Flags"));
        let mut long = section(DIRTY_BITMAP, 0, &[]);
        long[16..20].fill(0xff);
        assert!(message(&extension(&long)).contains("beyond the end"));
        assert!(message(&extension(&section(DIRTY_BITMAP, 0, &[1; 460]))).contains("no End"));
    }

    #[test]
    fn bitmaps_that_lie_are_refused_by_name() {
        let header = Header::new(1 << 20, 64 << 10).unwrap();
        let parse = |bytes: &[u8]| match Stored::parse(bytes, &header) {
            Ok(stored) => Ok((stored.bits(), stored.name)),
            Err(error) => Err(error.message),
        };
        let name = "abababab-abab-abab-abab-abababababab".to_owned();
        assert_eq!(parse(&bitmap(2048, 8, &[0])), Ok((256, name)));
        for (bytes, message) in [
            (
                bitmap(2047, 8, &[0]),
                "Bitmap size (in sectors) 2047 differs from",
            ),
            (bitmap(2048, 3, &[0]), "Invalid bitmap granularity 3"),
            (bitmap(2048, 0, &[0]), "Invalid bitmap granularity 0"),
            (bitmap(2048, u32::MAX, &[0]), "Invalid bitmap granularity"),
            (bitmap(2048, 8, &[]), "Invalid bitmap L1 size 0, expected 1"),
            (
                bitmap(2048, 8, &[0])[..36].to_vec(),
                "Bitmap L1 table does not fit",
            ),
            (vec![0; 31], "Too small bitmap feature"),
        ] {
            let refused = parse(&bytes).unwrap_err();
            assert!(refused.starts_with(message), "{refused}");
        }
    }
}
