//! The header as a check needs it: where everything is, with no more refused than what would make
//! the rest meaningless (QEMU docs/interop/qcow2.txt, "Header").
//!
//! Damage that a repair can undo (a refcount table that is missing, too many snapshots, the dirty
//! and the corrupt bit) is no reason to refuse; tables beyond their caps are.

use super::super::header::{
    AUTOCLEAR_BITMAPS, CLUSTER_BITS, MAGIC, V2_LENGTH, V3_LENGTH, field, incompatible,
};
use super::super::tables::{
    HostCluster, HostOffset, MAX_HOST_OFFSET, MAX_L1_BYTES, MAX_REFCOUNT_TABLE_BYTES,
};
use block::{Error, ErrorKind};

/// Header extension: where the LUKS header is.
const EXTENSION_CRYPTO: u32 = 0x0537_be77;
/// Header extension: where the directory of bitmaps is.
const EXTENSION_BITMAPS: u32 = 0x2385_2875;
/// Most bitmaps, and most bytes of their directory for each.
const MAX_BITMAPS: u32 = 65535;
const MAX_DIRECTORY_BYTES: u64 = 1024 * MAX_BITMAPS as u64;
/// Least log2 of the cluster size with extended L2 entries.
const EXTENDED_L2_CLUSTER_BITS: u32 = 14;

/// A range of bytes that a structure takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) offset: HostOffset,
    pub(super) bytes: u64,
}

/// The directory of the bitmaps.
#[derive(Clone, Copy, Debug)]
pub(super) struct Directory {
    pub(super) place: Extent,
    pub(super) bitmaps: u32,
}

/// Where the header says that things are.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    pub(super) version: u32,
    pub(super) cluster_bits: u32,
    /// log2 of the refcount width in bits.
    pub(super) refcount_order: u32,
    /// Virtual size in bytes.
    pub(super) size: u64,
    pub(super) l1: Extent,
    pub(super) refcount_table: Extent,
    pub(super) snapshots: u32,
    pub(super) snapshots_offset: HostOffset,
    pub(super) incompatible: u64,
    pub(super) autoclear: u64,
    pub(super) luks: Option<Extent>,
    pub(super) bitmaps: Option<Directory>,
}

impl Layout {
    pub(super) const fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }
    pub(super) const fn is_aligned(&self, offset: u64) -> bool {
        offset & (self.cluster_size() - 1) == 0
    }
    pub(super) const fn cluster(&self, offset: u64) -> HostCluster {
        HostCluster(offset >> self.cluster_bits)
    }
    /// Clusters that `bytes` take.
    pub(super) const fn clusters(&self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster_size())
    }
    /// Bytes of an L2 entry.
    pub(super) fn l2_entry_bytes(&self) -> u64 {
        if self.has_subclusters() { 16 } else { 8 }
    }
    /// log2 of the refcounts of a refcount block.
    pub(super) const fn refcount_block_bits(&self) -> u32 {
        self.cluster_bits + 3 - self.refcount_order
    }
    /// Largest value of a refcount.
    pub(super) const fn refcount_max(&self) -> u64 {
        u64::MAX >> (64 - (1 << self.refcount_order))
    }
    /// L2 entries have 128 bits.
    pub(super) fn has_subclusters(&self) -> bool {
        self.incompatible & incompatible::EXTENDED_L2 != 0
    }
    /// Data is in another file.
    pub(super) fn has_data_file(&self) -> bool {
        self.incompatible & incompatible::DATA_FILE != 0
    }

    /// Parses the first cluster of an image.
    ///
    /// # Errors
    /// `Corrupt` and `Unsupported`, as opening the image would answer.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, Error> {
        let raw = Raw(bytes);
        if bytes.len() < V2_LENGTH as usize || raw.u32(field::MAGIC) != MAGIC {
            return Err(invalid("Image is not in qcow2 format"));
        }
        let version = raw.u32(field::VERSION);
        if !(2..=3).contains(&version) {
            let message = format!("Unsupported qcow2 version {version}");
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        let cluster_bits = raw.u32(field::CLUSTER_BITS);
        if !CLUSTER_BITS.contains(&cluster_bits) {
            let message = format!("Unsupported cluster size: 2^{cluster_bits}");
            return Err(invalid(message));
        }
        let (incompatible, autoclear, refcount_order, length) = match version {
            2 => (0, 0, 4, V2_LENGTH),
            _ => version_3(&raw, cluster_bits)?,
        };
        let refcount_table_clusters = u64::from(raw.u32(field::REFCOUNT_TABLE_CLUSTERS));
        let mut layout = Self {
            version,
            cluster_bits,
            refcount_order,
            size: raw.u64(field::SIZE),
            l1: Extent {
                offset: HostOffset(raw.u64(field::L1_OFFSET)),
                bytes: u64::from(raw.u32(field::L1_SIZE)) * 8,
            },
            refcount_table: Extent {
                offset: HostOffset(raw.u64(field::REFCOUNT_TABLE_OFFSET)),
                bytes: refcount_table_clusters << cluster_bits,
            },
            snapshots: raw.u32(field::SNAPSHOTS),
            snapshots_offset: HostOffset(raw.u64(field::SNAPSHOTS_OFFSET)),
            incompatible,
            autoclear,
            luks: None,
            bitmaps: None,
        };
        layout.parse_extensions(&raw, length as usize)?;
        layout.check_tables()?;
        Ok(layout)
    }

    fn parse_extensions(&mut self, raw: &Raw<'_>, start: usize) -> Result<(), Error> {
        let cluster_size = self.cluster_size();
        let backing = raw.u64(field::BACKING_OFFSET);
        if backing > cluster_size {
            return Err(invalid("Invalid backing file offset"));
        }
        let end = if backing == 0 { cluster_size } else { backing };
        let end = raw.0.len().min(end as usize);
        let mut rest = raw.0.get(start..end).unwrap_or_default();
        while rest.len() >= 8 {
            let (kind, length) = (Raw(rest).u32(0), Raw(rest).u32(4) as usize);
            if kind == super::super::header::extension::END {
                break;
            }
            let body = &rest[8..];
            let Some(data) = body.get(..length) else {
                return Err(invalid("Header extension too large"));
            };
            match kind {
                EXTENSION_CRYPTO => self.parse_luks(data)?,
                EXTENSION_BITMAPS => self.parse_bitmaps(data)?,
                _ => {}
            }
            rest = body.get(length.next_multiple_of(8)..).unwrap_or_default();
        }
        Ok(())
    }

    fn parse_luks(&mut self, data: &[u8]) -> Result<(), Error> {
        let [offset, bytes] = words(data)?;
        if !self.is_aligned(offset) || offset >= MAX_HOST_OFFSET {
            let message = format!(
                "Encryption header offset '{offset}' is not a multiple of cluster size '{}'",
                self.cluster_size()
            );
            return Err(invalid(message));
        }
        self.luks = Some(Extent {
            offset: HostOffset(offset),
            bytes,
        });
        Ok(())
    }

    fn parse_bitmaps(&mut self, data: &[u8]) -> Result<(), Error> {
        let [counts, bytes, offset] = words(data)?;
        if self.autoclear & AUTOCLEAR_BITMAPS == 0 {
            return Ok(());
        }
        let bitmaps = (counts >> 32) as u32;
        let sound = counts as u32 == 0
            && (1..=MAX_BITMAPS).contains(&bitmaps)
            && bytes <= MAX_DIRECTORY_BYTES
            && offset < MAX_HOST_OFFSET
            && self.is_aligned(offset);
        if !sound {
            let message = "bitmaps_ext: the bitmaps extension is not valid";
            return Err(invalid(message));
        }
        self.bitmaps = Some(Directory {
            place: Extent {
                offset: HostOffset(offset),
                bytes,
            },
            bitmaps,
        });
        Ok(())
    }

    fn check_tables(&self) -> Result<(), Error> {
        let table = |what: &str, place: Extent, most: u64| {
            if place.bytes > most {
                return Err(invalid(format!("{what} too large")));
            }
            let end = place.offset.0.checked_add(place.bytes);
            let within = end.is_some_and(|end| end <= i64::MAX as u64);
            if !within || !self.is_aligned(place.offset.0) {
                return Err(invalid(format!("{what} offset invalid")));
            }
            Ok(())
        };
        table(
            "Reference count table",
            self.refcount_table,
            MAX_REFCOUNT_TABLE_BYTES,
        )?;
        table("Active L1 table", self.l1, MAX_L1_BYTES)?;
        let coverage = self.cluster_size() * (self.cluster_size() / self.l2_entry_bytes());
        let needed = self.size.div_ceil(coverage).saturating_mul(8);
        if needed / 8 > i32::MAX as u64 {
            return Err(invalid("Image is too big"));
        }
        if self.size > i64::MAX as u64 || needed > self.l1.bytes {
            return Err(invalid("L1 table is too small"));
        }
        Ok(())
    }
}

/// The features and sizes of a version 3 header: incompatible and autoclear features, the
/// refcount order, the header's length.
fn version_3(raw: &Raw<'_>, cluster_bits: u32) -> Result<(u64, u64, u32, u32), Error> {
    let length = match raw.0.len() >= V3_LENGTH as usize {
        true => raw.u32(field::HEADER_LENGTH),
        false => 0,
    };
    if length < V3_LENGTH {
        return Err(invalid("qcow2 header too short"));
    }
    if u64::from(length) > 1 << cluster_bits || length as usize > raw.0.len() {
        return Err(invalid("qcow2 header exceeds cluster size"));
    }
    let features = raw.u64(field::INCOMPATIBLE);
    let known = incompatible::DIRTY
        | incompatible::CORRUPT
        | incompatible::DATA_FILE
        | incompatible::COMPRESSION_TYPE
        | incompatible::EXTENDED_L2;
    if features & !known != 0 {
        let message = format!(
            "Unsupported qcow2 feature(s): Unknown incompatible feature: {:x}",
            features & !known
        );
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
    let subclusters = features & incompatible::EXTENDED_L2 != 0;
    if subclusters && cluster_bits < EXTENDED_L2_CLUSTER_BITS {
        return Err(invalid(
            "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes",
        ));
    }
    let refcount_order = raw.u32(field::REFCOUNT_ORDER);
    if refcount_order > 6 {
        return Err(invalid(
            "Reference count entry width too large; may not exceed 64 bits",
        ));
    }
    Ok((features, raw.u64(field::AUTOCLEAR), refcount_order, length))
}

/// A header extension made of 64-bit words, and nothing else.
fn words<const N: usize>(data: &[u8]) -> Result<[u64; N], Error> {
    if data.len() != N * 8 {
        return Err(invalid("Header extension of an invalid length"));
    }
    Ok(std::array::from_fn(|index| Raw(data).u64(index * 8)))
}

/// Big-endian fields; what is not there is zero.
pub(super) struct Raw<'b>(pub(super) &'b [u8]);

impl Raw<'_> {
    pub(super) fn u32(&self, at: usize) -> u32 {
        (self.u64(at) >> 32) as u32
    }
    pub(super) fn u16(&self, at: usize) -> u16 {
        (self.u64(at) >> 48) as u16
    }
    pub(super) fn u64(&self, at: usize) -> u64 {
        let mut word = [0; 8];
        let bytes = self.0.get(at..).unwrap_or_default();
        let held = bytes.len().min(8);
        word[..held].copy_from_slice(&bytes[..held]);
        u64::from_be_bytes(word)
    }
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, message)
}

impl Default for Extent {
    fn default() -> Self {
        Self {
            offset: HostOffset(0),
            bytes: 0,
        }
    }
}
