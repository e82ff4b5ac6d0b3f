//! Making a new image, laid out as QEMU does.
//!
//! ```text
//!   cluster 0       1               2                3
//!           header  refcount table  refcount blocks  L1 table  (L2 tables and data follow)
//! ```
//!
//! Small clusters need more than one cluster for the refcount table or the blocks; what follows
//! moves back accordingly. With metadata preallocated, every guest cluster is mapped and none is
//! written: the file is as long as if they were.

use super::crypto::{Crypto, Encryption, encrypt_new};
use super::document::Document;
use super::header::{
    AUTOCLEAR_DATA_FILE_RAW, CLUSTER_BITS, COMPATIBLE_LAZY_REFCOUNTS, MAGIC, extension, field,
    incompatible,
};
use super::tables::{Geometry, MAX_L1_BYTES, MAX_REFCOUNT_TABLE_BYTES};
use super::{OpenOptions, Qcow2, refcount, write_to};
use block::{Edge, Error, ErrorKind, Format, Preallocation, Resize};
use executor::Errno;

/// Least cluster size for which the header gets a feature name table, in bytes: smaller clusters are
/// kept for names that matter.
pub(super) const MIN_NAMES_CLUSTER: u64 = 8192;
/// Least cluster size with extended L2 entries, in bytes.
pub(super) const MIN_EXTENDED_CLUSTER: u64 = 16384;

/// What a new image is like.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Virtual size in bytes, a multiple of 512.
    pub size: u64,
    /// Cluster size in bytes: a power of two, 512 B to 2 MiB.
    pub cluster_size: u64,
    /// Width of a refcount: a power of two, 1 to 64.
    pub refcount_bits: u32,
    /// Version 3 (`compat=1.1`) or 2 (`compat=0.10`).
    pub version: u32,
    /// Name of the backing file.
    pub backing_file: Option<String>,
    /// Format of the backing file.
    pub backing_format: Option<String>,
    /// Sets the compatible feature bit.
    pub lazy_refcounts: bool,
    /// L2 entries of 128 bits, with 32 subclusters for each cluster.
    pub extended_l2: bool,
    /// How compressed clusters are encoded: 0 zlib, 1 zstd.
    pub compression_type: u8,
    /// Name of the external data file, as it is written to the header.
    pub data_file: Option<String>,
    /// The data file is to stay valid as a raw image.
    pub data_file_raw: bool,
    /// How the clusters of the disk are allocated.
    pub preallocation: Preallocation,
    /// How data is encrypted.
    pub encryption: Option<Encryption>,
}

impl CreateOptions {
    /// QEMU's defaults for a disk of `size` bytes.
    pub fn new(size: u64) -> Self {
        Self {
            size,
            cluster_size: 65536,
            refcount_bits: 16,
            version: 3,
            backing_file: None,
            backing_format: None,
            lazy_refcounts: false,
            extended_l2: false,
            compression_type: 0,
            data_file: None,
            data_file_raw: false,
            preallocation: Preallocation::Off,
            encryption: None,
        }
    }

    fn check(&self) -> Result<Geometry, Error> {
        let invalid = |message: &str| Err(Error::new(ErrorKind::Invalid, message));
        let cluster_bits = self.cluster_size.trailing_zeros();
        if !self.cluster_size.is_power_of_two() || !CLUSTER_BITS.contains(&cluster_bits) {
            return invalid("Cluster size must be a power of two between 512 and 2048k");
        }
        if !self.refcount_bits.is_power_of_two() || self.refcount_bits > 64 {
            return invalid("Refcount width must be a power of two and may not exceed 64 bits");
        }
        if !(2..=3).contains(&self.version) {
            return invalid("Invalid qcow2 version");
        }
        self.check_version()?;
        if !self.size.is_multiple_of(512) {
            return invalid("Image size must be a multiple of 512 bytes");
        }
        if self.extended_l2 && self.cluster_size < MIN_EXTENDED_CLUSTER {
            return invalid(
                "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes",
            );
        }
        let has_backing = self.backing_file.is_some();
        if has_backing && self.preallocation != Preallocation::Off && !self.extended_l2 {
            return invalid(
                "Backing file and preallocation can only be used at the same time if extended_l2 \
                 is on",
            );
        }
        if self.data_file_raw && self.data_file.is_none() {
            return invalid("data-file-raw requires data-file");
        }
        if self.data_file_raw && has_backing {
            return invalid("Backing file and data-file-raw cannot be used at the same time");
        }
        if self.backing_format.is_some() && !has_backing {
            return invalid("Backing format cannot be used without backing file");
        }
        let geometry = Geometry {
            cluster_bits,
            refcount_order: self.refcount_bits.trailing_zeros(),
            zero_clusters: self.version >= 3,
            extended_l2: false,
            external_data: false,
            l2_slice_bits: cluster_bits,
            refcount_slice_bits: cluster_bits,
        };
        let l1_bytes = geometry.l1_entries_for(self.size).checked_mul(8);
        if self.size > i64::MAX as u64 || l1_bytes.is_none_or(|bytes| bytes > MAX_L1_BYTES) {
            return Err(too_large());
        }
        Ok(geometry)
    }

    /// What only version 3 has.
    fn check_version(&self) -> Result<(), Error> {
        let needs_version_3 = [
            (
                self.lazy_refcounts,
                "Lazy refcounts only supported with compatibility level 1.1 and above",
            ),
            (
                self.extended_l2,
                "Extended L2 entries are only supported with compatibility level 1.1 and above",
            ),
            (
                self.refcount_bits != 16,
                "Different refcount widths than 16 bits require compatibility level 1.1 or above",
            ),
            (
                self.data_file.is_some(),
                "External data files are only supported with compatibility level 1.1 and above",
            ),
            (
                self.compression_type != 0,
                "Non-zlib compression type is only supported with compatibility level 1.1 and above",
            ),
        ];
        let missing = needs_version_3.iter().find(|(is_asked, _)| *is_asked);
        match missing {
            Some((_, what)) if self.version < 3 => {
                let message = format!("{what} (use version=v3 or greater)");
                Err(Error::new(ErrorKind::Invalid, message))
            }
            _ => Ok(()),
        }
    }

    /// Whether the metadata of all clusters is written at once. A data file that is to be a raw
    /// image needs it: what is not mapped would read as zeroes here and as something else there.
    fn maps_everything(&self) -> bool {
        self.preallocation != Preallocation::Off || self.data_file_raw
    }
}

pub(super) fn too_large() -> Error {
    Error::io("The image size is too large", Errno::EFBIG)
}

/// Places of the tables of a new image, in clusters.
struct Layout {
    refcount_table_clusters: u64,
    refcount_blocks: u64,
    l1_clusters: u64,
    l1_entries: u64,
}

impl Layout {
    /// With refcount blocks for `reserved` free clusters, too, behind everything: these are in a row
    /// that no refcount block lies in.
    fn new(geometry: &Geometry, size: u64, reserved: u64) -> Option<Self> {
        let l1_entries = geometry.l1_entries_for(size);
        let mut layout = Self {
            refcount_table_clusters: 1,
            refcount_blocks: 1,
            l1_clusters: (l1_entries * 8).div_ceil(geometry.cluster_size()),
            l1_entries,
        };
        loop {
            let clusters = layout.end() + reserved;
            let blocks = clusters.div_ceil(1 << geometry.refcount_block_bits());
            let table = (blocks * 8).div_ceil(geometry.cluster_size());
            if table << geometry.cluster_bits > MAX_REFCOUNT_TABLE_BYTES {
                return None;
            }
            if blocks <= layout.refcount_blocks && table <= layout.refcount_table_clusters {
                return Some(layout);
            }
            layout.refcount_blocks = layout.refcount_blocks.max(blocks);
            layout.refcount_table_clusters = layout.refcount_table_clusters.max(table);
        }
    }
    fn first_block(&self) -> u64 {
        1 + self.refcount_table_clusters
    }
    fn l1(&self) -> u64 {
        self.first_block() + self.refcount_blocks
    }
    fn end(&self) -> u64 {
        self.l1() + self.l1_clusters
    }
}

/// Makes a new image in `file`, whose content is lost.
///
/// # Errors
/// `Invalid` for options that do not fit together, `Unsupported`, `Io`.
pub async fn create(file: Edge, options: &CreateOptions) -> Result<(), Error> {
    create_with_data(file, None, options).await
}

/// Makes a new image in `file` whose data is in `data_file`, when that is there. The contents of
/// both are lost.
///
/// # Errors
/// As [`create`].
pub async fn create_with_data(
    file: Edge,
    data_file: Option<Edge>,
    options: &CreateOptions,
) -> Result<(), Error> {
    if options.data_file.is_some() != data_file.is_some() {
        let message = "A data file and its name go together";
        return Err(Error::new(ErrorKind::Invalid, message));
    }
    let geometry = options.check()?;
    let reserved = options.encryption.as_ref().map_or(0, Encryption::bytes);
    let reserved = reserved.div_ceil(geometry.cluster_size());
    let layout = Layout::new(&geometry, options.size, reserved).ok_or_else(too_large)?;
    let header = header_cluster(options, &geometry, &layout)?;
    let empty = Resize::to(0);
    // Elsewhere what was there before stays, without anything that refers to it.
    if file.node().grows() {
        file.node().resize(empty).await?;
    }
    write_tables(&file, &geometry, &layout, header)
        .await
        .map_err(|errno| Error::io("Could not write qcow2 metadata", errno))?;
    let (mut file, mut data_file) = (file, data_file);
    if let Some(encryption) = &options.encryption {
        (file, data_file) = encrypt_new((file, data_file), encryption).await?;
    }
    if !options.maps_everything() && data_file.is_none() {
        return Ok(());
    }
    let open = OpenOptions {
        data_file,
        crypto: Crypto::of_new(&file, options.encryption.as_ref()).await?,
        ..OpenOptions::default()
    };
    let image = Qcow2::open(file, None, open).await?;
    let mapped = image.fill_new(options).await;
    let closed = image.close().await;
    mapped.map_err(|error| error.context("Could not resize image"))?;
    closed.map_err(|errno| Error::io("Could not close the new image", errno))
}

/// The header cluster: header, extensions, backing file name.
fn header_cluster(
    options: &CreateOptions,
    geometry: &Geometry,
    layout: &Layout,
) -> Result<Vec<u8>, Error> {
    let mut header = Document::new(options.version);
    let cluster = |number: u64| number << geometry.cluster_bits;
    header.set_u32(field::MAGIC, MAGIC);
    header.set_u32(field::CLUSTER_BITS, geometry.cluster_bits);
    header.set_u64(field::SIZE, options.size);
    header.set_u32(field::L1_SIZE, layout.l1_entries as u32);
    header.set_u64(field::L1_OFFSET, cluster(layout.l1()));
    header.set_u64(field::REFCOUNT_TABLE_OFFSET, cluster(1));
    let table_clusters = layout.refcount_table_clusters as u32;
    header.set_u32(field::REFCOUNT_TABLE_CLUSTERS, table_clusters);
    let bit = |is_set: bool, bit: u64| if is_set { bit } else { 0 };
    let features = bit(options.data_file.is_some(), incompatible::DATA_FILE)
        | bit(
            options.compression_type != 0,
            incompatible::COMPRESSION_TYPE,
        )
        | bit(options.extended_l2, incompatible::EXTENDED_L2);
    header.set_u64(field::INCOMPATIBLE, features);
    let compatible = bit(options.lazy_refcounts, COMPATIBLE_LAZY_REFCOUNTS);
    header.set_u64(field::COMPATIBLE, compatible);
    let autoclear = bit(options.data_file_raw, AUTOCLEAR_DATA_FILE_RAW);
    header.set_u64(field::AUTOCLEAR, autoclear);
    header.set_u32(field::REFCOUNT_ORDER, geometry.refcount_order);
    header.set_u8(field::COMPRESSION_TYPE, options.compression_type);
    let bytes = |text: &String| text.as_bytes().to_vec();
    let format = options.backing_format.as_ref().map(bytes);
    header.set_extension(extension::BACKING_FORMAT, format);
    header.set_extension(extension::DATA_FILE, options.data_file.as_ref().map(bytes));
    if options.version >= 3 && options.cluster_size >= MIN_NAMES_CLUSTER {
        header.set_extension(extension::FEATURE_NAMES, Some(feature_names()));
    }
    header.set_backing_name(options.backing_file.as_deref())?;
    header.encode(geometry.cluster_size() as usize)
}

/// The feature name table: type (0 incompatible, 1 compatible, 2 autoclear), bit, name.
pub(super) fn feature_names() -> Vec<u8> {
    let names = [
        (0, 0, "dirty bit"),
        (0, 1, "corrupt bit"),
        (0, 2, "external data file"),
        (0, 3, "compression type"),
        (0, 4, "extended L2 entries"),
        (1, 0, "lazy refcounts"),
        (2, 0, "bitmaps"),
        (2, 1, "raw external data"),
    ];
    let mut table = Vec::with_capacity(names.len() * 48);
    for (kind, bit, name) in names {
        let start = table.len();
        table.extend_from_slice(&[kind, bit]);
        table.extend_from_slice(name.as_bytes());
        table.resize(start + 48, 0);
    }
    table
}

/// Writes everything but the header, makes it durable, then the header.
async fn write_tables(
    file: &Edge,
    geometry: &Geometry,
    layout: &Layout,
    header: Vec<u8>,
) -> Result<(), Errno> {
    let cluster_size = geometry.cluster_size();
    let first_block = layout.first_block();
    let mut table = vec![0; (layout.refcount_table_clusters * cluster_size) as usize];
    for number in 0..layout.refcount_blocks {
        let offset = (first_block + number) * cluster_size;
        let at = number as usize * 8;
        table[at..at + 8].copy_from_slice(&offset.to_be_bytes());
    }
    write_to(file, cluster_size, &table).await?;
    for number in 0..layout.refcount_blocks {
        let mut block = vec![0; cluster_size as usize];
        let covered = number << geometry.refcount_block_bits();
        let used = layout.end().saturating_sub(covered);
        for position in 0..used.min(1 << geometry.refcount_block_bits()) {
            refcount::set_in_bytes(&mut block, geometry.refcount_order, position, 1);
        }
        write_to(file, (first_block + number) * cluster_size, &block).await?;
    }
    let l1 = vec![0; (layout.l1_entries * 8) as usize];
    write_to(file, layout.l1() * cluster_size, &l1).await?;
    file.node().flush().await?;
    write_to(file, 0, &header).await?;
    file.node().flush().await
}

impl Qcow2 {
    /// Gives a new image's data file its length, and its clusters their places.
    async fn fill_new(&self, options: &CreateOptions) -> Result<(), Error> {
        let resize = Resize {
            length: options.size,
            preallocation: options.preallocation,
        };
        self.resize_data_file(0, resize).await?;
        match options.maps_everything() {
            true => {
                let everything = 0..options.size;
                self.preallocate(everything, options.preallocation).await
            }
            false => Ok(()),
        }
    }
}
