//! The header and its extensions (QEMU docs/interop/qcow2.txt, "Header" and "Header
//! extensions").
//!
//! Owns parsing, the specification's caps, and the refusal of what is not supported. Promises
//! that a parsed [`Header`] describes tables that are aligned, below 2^56 and within their caps.
//! The header is never written back as a whole: changes touch single fields, so unknown
//! extensions stay as they are.

use super::bitmaps::Extension;
use super::compressed::Codec;
use super::tables::{
    Geometry, HostOffset, MAX_HOST_OFFSET, MAX_L1_BYTES, MAX_REFCOUNT_TABLE_BYTES,
};
use block::{BackingReference, Error, ErrorKind};

/// "QFI\xfb"
pub(super) const MAGIC: u32 = 0x5146_49fb;
/// Longest backing file name in bytes.
pub(super) const MAX_BACKING_NAME: u32 = 1023;
/// Most internal snapshots.
pub(super) const MAX_SNAPSHOTS: u32 = 65536;
/// Length of a version 2 header.
pub(super) const V2_LENGTH: u32 = 72;
/// Least length of a version 3 header.
pub(super) const V3_LENGTH: u32 = 104;
/// Smallest and largest log2 of the cluster size.
pub(super) const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;

/// Least log2 of the cluster size with extended L2 entries: subclusters are sectors or larger.
const EXTENDED_L2_CLUSTER_BITS: u32 = 14;

/// Byte offsets of the header's fields. All are big-endian.
pub(super) mod field {
    /// u32
    pub(in super::super) const MAGIC: usize = 0;
    /// u32: 2 or 3
    pub(in super::super) const VERSION: usize = 4;
    /// u64: where the backing file's name is, 0 without
    pub(in super::super) const BACKING_OFFSET: usize = 8;
    /// u32: its length in bytes
    pub(in super::super) const BACKING_LENGTH: usize = 16;
    /// u32
    pub(in super::super) const CLUSTER_BITS: usize = 20;
    /// u64: virtual size in bytes
    pub(in super::super) const SIZE: usize = 24;
    /// u32: 0 none, 1 AES, 2 LUKS
    pub(in super::super) const CRYPT_METHOD: usize = 32;
    /// u32: entries of the active L1 table
    pub(in super::super) const L1_SIZE: usize = 36;
    /// u64
    pub(in super::super) const L1_OFFSET: usize = 40;
    /// u64
    pub(in super::super) const REFCOUNT_TABLE_OFFSET: usize = 48;
    /// u32
    pub(in super::super) const REFCOUNT_TABLE_CLUSTERS: usize = 56;
    /// u32
    pub(in super::super) const SNAPSHOTS: usize = 60;
    /// u64
    pub(in super::super) const SNAPSHOTS_OFFSET: usize = 64;
    /// u64, version 3
    pub(in super::super) const INCOMPATIBLE: usize = 72;
    /// u64, version 3
    pub(in super::super) const COMPATIBLE: usize = 80;
    /// u64, version 3
    pub(in super::super) const AUTOCLEAR: usize = 88;
    /// u32, version 3: log2 of the refcount width
    pub(in super::super) const REFCOUNT_ORDER: usize = 96;
    /// u32, version 3
    pub(in super::super) const HEADER_LENGTH: usize = 100;
    /// u8, when the header is longer than 104 bytes: 0 zlib, 1 zstd
    pub(in super::super) const COMPRESSION_TYPE: usize = 104;
}

/// Incompatible feature bits.
pub(super) mod incompatible {
    /// Refcounts may be inconsistent.
    pub(in super::super) const DIRTY: u64 = 1 << 0;
    /// Some structure is corrupt: not to be written.
    pub(in super::super) const CORRUPT: u64 = 1 << 1;
    /// Data is in another file.
    pub(in super::super) const DATA_FILE: u64 = 1 << 2;
    /// Compression other than zlib.
    pub(in super::super) const COMPRESSION_TYPE: u64 = 1 << 3;
    /// L2 entries of 128 bits, with subclusters.
    pub(in super::super) const EXTENDED_L2: u64 = 1 << 4;
}

/// Compatible feature bits.
pub(super) const COMPATIBLE_LAZY_REFCOUNTS: u64 = 1;
/// Autoclear feature bit: the bitmaps extension is consistent.
pub(super) const AUTOCLEAR_BITMAPS: u64 = 1;
/// Autoclear feature bit: the external data file is a valid raw image.
pub(super) const AUTOCLEAR_DATA_FILE_RAW: u64 = 1 << 1;
/// Autoclear feature bits that this driver sees to; it clears the others when it opens an image for
/// writing.
pub(super) const KNOWN_AUTOCLEAR: u64 = AUTOCLEAR_BITMAPS | AUTOCLEAR_DATA_FILE_RAW;

/// Types of header extensions.
pub(super) mod extension {
    pub(in super::super) const END: u32 = 0;
    pub(in super::super) const BACKING_FORMAT: u32 = 0xe279_2aca;
    pub(in super::super) const CRYPTO: u32 = 0x0537_be77;
    pub(in super::super) const DATA_FILE: u32 = 0x4441_5441;
    pub(in super::super) const BITMAPS: u32 = 0x2385_2875;
    pub(in super::super) const FEATURE_NAMES: u32 = 0x6803_f857;
}

/// How an image's data is encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CryptMethod {
    /// Not at all.
    None,
    /// AES-CBC.
    Aes,
    /// LUKS, with its header at `offset`.
    Luks {
        /// In bytes.
        offset: u64,
        /// In bytes.
        length: u64,
    },
}

impl CryptMethod {
    /// The header's number of AES-CBC.
    pub(super) const AES: u32 = 1;
    /// The header's number of LUKS.
    pub(super) const LUKS: u32 = 2;

    /// The name in options and descriptions.
    pub(super) const fn name(self) -> Option<&'static str> {
        match self {
            Self::None => None,
            Self::Aes => Some("aes"),
            Self::Luks { .. } => Some("luks"),
        }
    }

    fn from_extension(data: &[u8]) -> Result<Self, Error> {
        let (offset, length) = (Raw(data).u64(0), Raw(data).u64(8.min(data.len())));
        let end = offset.checked_add(length);
        if data.len() != 16 || length == 0 || end.is_none_or(|end| end > MAX_HOST_OFFSET) {
            return Err(invalid("Invalid CRYPTO header extension"));
        }
        Ok(Self::Luks { offset, length })
    }
}

/// A parsed and checked header.
#[derive(Clone, Debug)]
pub(super) struct Header {
    pub(super) version: u32,
    pub(super) cluster_bits: u32,
    pub(super) refcount_order: u32,
    /// Virtual size in bytes.
    pub(super) size: u64,
    pub(super) l1_entries: u64,
    pub(super) l1_offset: HostOffset,
    pub(super) refcount_table_offset: HostOffset,
    pub(super) refcount_table_clusters: u64,
    pub(super) snapshots: u32,
    pub(super) snapshots_offset: HostOffset,
    pub(super) incompatible: u64,
    pub(super) compatible: u64,
    pub(super) autoclear: u64,
    /// How data is encrypted.
    pub(super) crypt: CryptMethod,
    /// What compressed clusters are encoded with.
    pub(super) codec: Codec,
    /// The bitmaps extension.
    pub(super) bitmaps: Option<Extension>,
    pub(super) backing_name: Option<String>,
    pub(super) backing_format: Option<String>,
    /// Name of the external data file.
    pub(super) data_file: Option<String>,
}

impl Header {
    /// How much of the file holds the header, told by its first bytes: a cluster.
    pub(super) fn cluster_size_hint(start: &[u8]) -> usize {
        let bits = Raw(start).u32(field::CLUSTER_BITS);
        1 << bits.clamp(*CLUSTER_BITS.start(), *CLUSTER_BITS.end())
    }

    /// Parses the first cluster of an image.
    pub(super) fn parse(bytes: &[u8]) -> Result<Header, Error> {
        let raw = Raw(bytes);
        if bytes.len() < V2_LENGTH as usize || raw.u32(field::MAGIC) != MAGIC {
            return Err(invalid("Image is not in qcow2 format"));
        }
        let version = raw.u32(field::VERSION);
        if !(2..=3).contains(&version) {
            return Err(unsupported(format!("Unsupported qcow2 version {version}")));
        }
        let cluster_bits = raw.u32(field::CLUSTER_BITS);
        if !CLUSTER_BITS.contains(&cluster_bits) {
            return Err(invalid(format!(
                "Unsupported cluster size: 2^{cluster_bits}"
            )));
        }
        let mut header = Header {
            version,
            cluster_bits,
            refcount_order: 4,
            size: raw.u64(field::SIZE),
            l1_entries: u64::from(raw.u32(field::L1_SIZE)),
            l1_offset: HostOffset(raw.u64(field::L1_OFFSET)),
            refcount_table_offset: HostOffset(raw.u64(field::REFCOUNT_TABLE_OFFSET)),
            refcount_table_clusters: u64::from(raw.u32(field::REFCOUNT_TABLE_CLUSTERS)),
            snapshots: raw.u32(field::SNAPSHOTS),
            snapshots_offset: HostOffset(raw.u64(field::SNAPSHOTS_OFFSET)),
            incompatible: 0,
            compatible: 0,
            autoclear: 0,
            crypt: CryptMethod::None,
            codec: Codec::default(),
            bitmaps: None,
            backing_name: None,
            backing_format: None,
            data_file: None,
        };
        let header_length = header.parse_version_3(&raw)?;
        let extensions = header.parse_extensions(&raw, header_length)?;
        header.check_features(&extensions)?;
        header.check_crypt_method(raw.u32(field::CRYPT_METHOD))?;
        header.parse_backing_name(&raw)?;
        header.check_tables()?;
        Ok(header)
    }

    /// What the image says about its backing file.
    pub(super) fn backing_reference(&self) -> BackingReference {
        BackingReference {
            name: self.backing_name.clone(),
            format: self.backing_format.clone(),
        }
    }

    /// Reads the fields that version 2 lacks; answers with the header's length.
    fn parse_version_3(&mut self, raw: &Raw<'_>) -> Result<u32, Error> {
        if self.version < 3 {
            return Ok(V2_LENGTH);
        }
        if raw.0.len() < V3_LENGTH as usize {
            return Err(invalid("qcow2 header too short"));
        }
        self.incompatible = raw.u64(field::INCOMPATIBLE);
        self.compatible = raw.u64(field::COMPATIBLE);
        self.autoclear = raw.u64(field::AUTOCLEAR);
        self.refcount_order = raw.u32(field::REFCOUNT_ORDER);
        if self.refcount_order > 6 {
            return Err(invalid(
                "Reference count entry width too large; may not exceed 64 bits",
            ));
        }
        let length = raw.u32(field::HEADER_LENGTH);
        if length < V3_LENGTH {
            return Err(invalid("qcow2 header too short"));
        }
        if u64::from(length) > 1 << self.cluster_bits || length as usize > raw.0.len() {
            return Err(invalid("qcow2 header exceeds cluster size"));
        }
        if length > field::COMPRESSION_TYPE as u32 {
            let number = raw.0[field::COMPRESSION_TYPE];
            self.codec = Codec::from_number(number)
                .ok_or_else(|| unsupported(format!("qcow2: unknown compression type: {number}")))?;
        }
        let is_marked = self.incompatible & incompatible::COMPRESSION_TYPE != 0;
        if is_marked != (self.codec != Codec::Zlib) {
            let expected = if is_marked { "must not" } else { "must" };
            return Err(invalid(format!(
                "qcow2: Compression type incompatible feature bit {expected} be set"
            )));
        }
        Ok(length)
    }

    /// Walks the extensions between the header and the backing name (or the cluster's end).
    fn parse_extensions<'b>(
        &mut self,
        raw: &Raw<'b>,
        header_length: u32,
    ) -> Result<FeatureNames<'b>, Error> {
        let cluster_end = raw.0.len().min(1 << self.cluster_bits);
        let backing_offset = raw.u64(field::BACKING_OFFSET);
        let end = match usize::try_from(backing_offset) {
            Ok(offset) if offset != 0 => offset.min(cluster_end),
            _ => cluster_end,
        };
        let mut names = FeatureNames(&[]);
        let mut rest = raw.0.get(header_length as usize..end).unwrap_or_default();
        while let [kind, length] = words::<2>(rest)
            && kind != extension::END
        {
            let body = rest.get(8..).unwrap_or_default();
            let Some(data) = body.get(..length as usize) else {
                return Err(invalid("Header extension too large"));
            };
            match kind {
                extension::BACKING_FORMAT => {
                    self.backing_format = Some(text(data, "backing format")?);
                }
                extension::DATA_FILE => {
                    self.data_file = Some(text(data, "data file name")?);
                }
                extension::BITMAPS => self.bitmaps = Some(bitmaps_extension(data)?),
                extension::CRYPTO => self.crypt = CryptMethod::from_extension(data)?,
                extension::FEATURE_NAMES => names = FeatureNames(data),
                _ => {}
            }
            rest = body
                .get((length as usize).next_multiple_of(8)..)
                .unwrap_or_default();
        }
        Ok(names)
    }

    /// Compares the crypt method with the extension that LUKS needs.
    fn check_crypt_method(&mut self, method: u32) -> Result<(), Error> {
        let CryptMethod::Luks { offset, .. } = self.crypt else {
            self.crypt = match method {
                0 => CryptMethod::None,
                CryptMethod::AES => CryptMethod::Aes,
                CryptMethod::LUKS => return Err(invalid("LUKS header extension is missing")),
                other => {
                    return Err(unsupported(format!(
                        "Unsupported encryption method {other}"
                    )));
                }
            };
            return Ok(());
        };
        if method != CryptMethod::LUKS {
            let message = "CRYPTO header extension only expected with LUKS encryption method";
            return Err(invalid(message));
        }
        if offset & ((1 << self.cluster_bits) - 1) != 0 {
            let size = 1_u64 << self.cluster_bits;
            return Err(invalid(format!(
                "Encryption header offset '{offset}' is not a multiple of cluster size '{size}'"
            )));
        }
        Ok(())
    }

    fn check_features(&self, names: &FeatureNames<'_>) -> Result<(), Error> {
        let supported = incompatible::DIRTY
            | incompatible::CORRUPT
            | incompatible::DATA_FILE
            | incompatible::COMPRESSION_TYPE
            | incompatible::EXTENDED_L2;
        let unknown = self.incompatible & !supported;
        if unknown != 0 {
            return Err(unsupported(format!(
                "Unsupported qcow2 feature(s): {}",
                names.incompatible(unknown).join(", ")
            )));
        }
        Ok(())
    }

    fn parse_backing_name(&mut self, raw: &Raw<'_>) -> Result<(), Error> {
        let offset = raw.u64(field::BACKING_OFFSET);
        let length = raw.u32(field::BACKING_LENGTH);
        if offset == 0 {
            return Ok(());
        }
        if length > MAX_BACKING_NAME {
            return Err(invalid("Backing file name too long"));
        }
        let bytes = usize::try_from(offset)
            .ok()
            .and_then(|start| Some(start..start.checked_add(length as usize)?))
            .filter(|range| range.end <= 1 << self.cluster_bits)
            .and_then(|range| raw.0.get(range))
            .ok_or_else(|| invalid("Invalid backing file offset"))?;
        if !bytes.is_empty() {
            self.backing_name = Some(text(bytes, "backing file name")?);
        }
        Ok(())
    }

    fn check_tables(&self) -> Result<(), Error> {
        let extended = self.incompatible & incompatible::EXTENDED_L2 != 0;
        if extended && self.cluster_bits < EXTENDED_L2_CLUSTER_BITS {
            return Err(invalid(format!(
                "Extended L2 entries are only supported with cluster sizes of at least {} bytes",
                1 << EXTENDED_L2_CLUSTER_BITS
            )));
        }
        let cluster_size = 1_u64 << self.cluster_bits;
        let geometry = self.geometry();
        let table = |what: &str, offset: HostOffset, bytes: u64| {
            let end = offset.0.checked_add(bytes);
            if offset.0 & (cluster_size - 1) != 0 || end.is_none_or(|end| end > MAX_HOST_OFFSET) {
                return Err(invalid(format!("{what} offset invalid")));
            }
            Ok(())
        };
        let l1_bytes = self.l1_entries * 8;
        if l1_bytes > MAX_L1_BYTES {
            return Err(invalid("Active L1 table too large"));
        }
        table("Active L1 table", self.l1_offset, l1_bytes)?;
        if geometry.l1_entries_for(self.size) > i32::MAX as u64 {
            return Err(invalid("Image is too big"));
        }
        if self.size > i64::MAX as u64 || geometry.l1_entries_for(self.size) > self.l1_entries {
            return Err(invalid("L1 table is too small"));
        }
        let refcount_table_bytes = self.refcount_table_clusters << self.cluster_bits;
        if refcount_table_bytes > MAX_REFCOUNT_TABLE_BYTES {
            return Err(invalid("Reference count table too large"));
        }
        if self.refcount_table_clusters == 0 || self.refcount_table_offset.0 == 0 {
            return Err(invalid("Image does not contain a reference count table"));
        }
        table(
            "Reference count table",
            self.refcount_table_offset,
            refcount_table_bytes,
        )?;
        if self.snapshots > MAX_SNAPSHOTS {
            return Err(invalid("Snapshot table too large"));
        }
        table("Snapshot table", self.snapshots_offset, 0)
    }

    /// The geometry, with whole tables as slices.
    pub(super) fn geometry(&self) -> Geometry {
        Geometry {
            cluster_bits: self.cluster_bits,
            refcount_order: self.refcount_order,
            zero_clusters: self.version >= 3,
            extended_l2: self.incompatible & incompatible::EXTENDED_L2 != 0,
            external_data: self.incompatible & incompatible::DATA_FILE != 0,
            l2_slice_bits: self.cluster_bits,
            refcount_slice_bits: self.cluster_bits,
        }
    }
}

/// The body of the bitmaps extension; what it refers to is checked when it is used.
fn bitmaps_extension(data: &[u8]) -> Result<Extension, Error> {
    if data.len() != 24 {
        return Err(invalid("bitmaps_ext: Invalid extension length"));
    }
    let raw = Raw(data);
    Ok(Extension {
        count: raw.u32(0),
        length: raw.u64(8),
        offset: HostOffset(raw.u64(16)),
    })
}

/// The feature name table: entries of 48 bytes (type, bit, name).
struct FeatureNames<'b>(&'b [u8]);

impl FeatureNames<'_> {
    /// The names of `bits` in the order of the table, then the bits that it does not name.
    fn incompatible(&self, mut bits: u64) -> Vec<String> {
        let mut names = Vec::new();
        for entry in self.0.chunks(48).filter(|entry| entry.len() > 2) {
            let bit = 1_u64.checked_shl(u32::from(entry[1])).unwrap_or(0);
            if entry[0] == 0 && bits & bit != 0 {
                let name = entry[2..].split(|&byte| byte == 0).next();
                let name = String::from_utf8_lossy(name.unwrap_or_default());
                names.push(name.chars().filter(|c| !c.is_control()).collect());
                bits &= !bit;
            }
        }
        if bits != 0 {
            names.push(format!("Unknown incompatible feature: {bits:x}"));
        }
        names
    }
}

struct Raw<'b>(&'b [u8]);

impl Raw<'_> {
    fn u32(&self, at: usize) -> u32 {
        words::<1>(&self.0[at..])[0]
    }
    fn u64(&self, at: usize) -> u64 {
        let [high, low] = words::<2>(&self.0[at..]);
        u64::from(high) << 32 | u64::from(low)
    }
}

/// The first big-endian words of `bytes`; missing ones are zero.
fn words<const N: usize>(bytes: &[u8]) -> [u32; N] {
    let mut result = [0; N];
    for (word, chunk) in result.iter_mut().zip(bytes.chunks_exact(4)) {
        *word = u32::from_be_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]);
    }
    result
}

fn text(bytes: &[u8], what: &str) -> Result<String, Error> {
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.contains('\0') => Ok(text.to_owned()),
        _ => Err(invalid(format!("qcow2: {what} is not text"))),
    }
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, message)
}

fn unsupported(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Unsupported, message)
}
