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

use super::header::{
    CLUSTER_BITS, COMPATIBLE_LAZY_REFCOUNTS, MAGIC, MAX_BACKING_NAME, V2_LENGTH, extension, field,
};
use super::tables::{Geometry, MAX_L1_BYTES, MAX_REFCOUNT_TABLE_BYTES};
use super::{OpenOptions, Qcow2, refcount};
use block::{Buffer, ByteRange, Edge, Error, ErrorKind, Format, Preallocation, Resize, WriteFlags};
use executor::Errno;

/// Length of the version 3 headers written here.
const NEW_V3_LENGTH: u32 = 112;

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
    /// `Off` or `Metadata`.
    pub preallocation: Preallocation,
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
            preallocation: Preallocation::Off,
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
        if self.version < 3 && self.refcount_bits != 16 {
            return invalid(
                "Different refcount widths than 16 bits require compatibility level 1.1 or above \
                 (use version=v3 or greater)",
            );
        }
        if self.version < 3 && self.lazy_refcounts {
            return invalid(
                "Lazy refcounts only supported with compatibility level 1.1 and above \
                 (use version=v3 or greater)",
            );
        }
        if !self.size.is_multiple_of(512) {
            return invalid("Image size must be a multiple of 512 bytes");
        }
        if self.backing_file.is_some() && self.preallocation != Preallocation::Off {
            return invalid("Backing file and preallocation cannot be used at the same time");
        }
        if !matches!(
            self.preallocation,
            Preallocation::Off | Preallocation::Metadata
        ) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "qcow2: preallocation modes other than off and metadata are not supported",
            ));
        }
        let geometry = Geometry {
            cluster_bits,
            refcount_order: self.refcount_bits.trailing_zeros(),
            zero_clusters: self.version >= 3,
            l2_slice_bits: cluster_bits,
            refcount_slice_bits: cluster_bits,
        };
        let l1_bytes = geometry.l1_entries_for(self.size).checked_mul(8);
        if self.size > i64::MAX as u64 || l1_bytes.is_none_or(|bytes| bytes > MAX_L1_BYTES) {
            return invalid("The image size is too large (try using a larger cluster size)");
        }
        Ok(geometry)
    }
}

/// Places of the tables of a new image, in clusters.
struct Layout {
    refcount_table_clusters: u64,
    refcount_blocks: u64,
    l1_clusters: u64,
    l1_entries: u64,
}

impl Layout {
    fn new(geometry: &Geometry, size: u64) -> Option<Self> {
        let l1_entries = geometry.l1_entries_for(size);
        let mut layout = Self {
            refcount_table_clusters: 1,
            refcount_blocks: 1,
            l1_clusters: (l1_entries * 8).div_ceil(geometry.cluster_size()),
            l1_entries,
        };
        loop {
            let blocks = layout.end().div_ceil(1 << geometry.refcount_block_bits());
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
    let geometry = options.check()?;
    let layout = Layout::new(&geometry, options.size)
        .ok_or_else(|| Error::new(ErrorKind::Invalid, "The image size is too large"))?;
    let header = header_cluster(options, &geometry, &layout)?;
    let empty = Resize {
        length: 0,
        preallocation: Preallocation::Off,
    };
    file.node().resize(empty).await?;
    write_tables(&file, &geometry, &layout, header)
        .await
        .map_err(|errno| Error::io("Could not write qcow2 metadata", errno))?;
    if options.preallocation == Preallocation::Metadata {
        let image = Qcow2::open(file, None, OpenOptions::default()).await?;
        image.preallocate().await?;
    }
    Ok(())
}

/// The header cluster: header, extensions, backing file name.
fn header_cluster(
    options: &CreateOptions,
    geometry: &Geometry,
    layout: &Layout,
) -> Result<Vec<u8>, Error> {
    let mut header = vec![0; V2_LENGTH as usize];
    let length = if options.version >= 3 {
        NEW_V3_LENGTH
    } else {
        V2_LENGTH
    };
    header.resize(length as usize, 0);
    let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
    let cluster = |number: u64| (number << geometry.cluster_bits).to_be_bytes();
    put(field::MAGIC, &MAGIC.to_be_bytes());
    put(field::VERSION, &options.version.to_be_bytes());
    put(field::CLUSTER_BITS, &geometry.cluster_bits.to_be_bytes());
    put(field::SIZE, &options.size.to_be_bytes());
    put(field::L1_SIZE, &(layout.l1_entries as u32).to_be_bytes());
    put(field::L1_OFFSET, &cluster(layout.l1()));
    put(field::REFCOUNT_TABLE_OFFSET, &cluster(1));
    put(
        field::REFCOUNT_TABLE_CLUSTERS,
        &(layout.refcount_table_clusters as u32).to_be_bytes(),
    );
    if options.version >= 3 {
        let compatible = if options.lazy_refcounts {
            COMPATIBLE_LAZY_REFCOUNTS
        } else {
            0
        };
        put(field::COMPATIBLE, &compatible.to_be_bytes());
        put(
            field::REFCOUNT_ORDER,
            &geometry.refcount_order.to_be_bytes(),
        );
        put(field::HEADER_LENGTH, &length.to_be_bytes());
    }
    if let Some(format) = &options.backing_format {
        append_extension(&mut header, extension::BACKING_FORMAT, format.as_bytes());
    }
    let name = options.backing_file.as_deref().unwrap_or_default();
    let cluster_size = geometry.cluster_size() as usize;
    let names = feature_names();
    if options.version >= 3 && header.len() + names.len() + 16 + name.len() <= cluster_size {
        append_extension(&mut header, extension::FEATURE_NAMES, &names);
    }
    append_extension(&mut header, extension::END, &[]);
    if !name.is_empty() {
        let at = header.len();
        header.extend_from_slice(name.as_bytes());
        let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
        put(field::BACKING_OFFSET, &(at as u64).to_be_bytes());
        put(field::BACKING_LENGTH, &(name.len() as u32).to_be_bytes());
    }
    if name.len() > MAX_BACKING_NAME as usize || header.len() > cluster_size {
        return Err(Error::new(
            ErrorKind::Invalid,
            "Backing file name too long for the image's header",
        ));
    }
    header.resize(cluster_size, 0);
    Ok(header)
}

fn append_extension(header: &mut Vec<u8>, kind: u32, data: &[u8]) {
    header.extend_from_slice(&kind.to_be_bytes());
    header.extend_from_slice(&(data.len() as u32).to_be_bytes());
    header.extend_from_slice(data);
    header.resize(header.len().next_multiple_of(8), 0);
}

/// The feature name table: type (0 incompatible, 1 compatible, 2 autoclear), bit, name.
fn feature_names() -> Vec<u8> {
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
    write(file, cluster_size, &table).await?;
    for number in 0..layout.refcount_blocks {
        let mut block = vec![0; cluster_size as usize];
        let covered = number << geometry.refcount_block_bits();
        let used = layout.end().saturating_sub(covered);
        for position in 0..used.min(1 << geometry.refcount_block_bits()) {
            refcount::set_in_bytes(&mut block, geometry.refcount_order, position, 1);
        }
        write(file, (first_block + number) * cluster_size, &block).await?;
    }
    let l1 = vec![0; (layout.l1_entries * 8) as usize];
    write(file, layout.l1() * cluster_size, &l1).await?;
    file.node().flush().await?;
    write(file, 0, &header).await?;
    file.node().flush().await
}

async fn write(file: &Edge, offset: u64, bytes: &[u8]) -> Result<(), Errno> {
    let buffer = Buffer::zeroed(bytes.len());
    buffer.copy_from_slice(bytes);
    file.node()
        .write(offset, buffer, WriteFlags::default())
        .await
}

impl Qcow2 {
    /// Maps every cluster of a new image and makes the file long enough to hold them.
    async fn preallocate(&self) -> Result<(), Error> {
        let failed = |errno| Error::io("Could not preallocate metadata", errno);
        let size = self.disk_size();
        let mut offset = 0;
        while offset < size {
            let range = ByteRange::new(offset, size - offset);
            let plan = self.prepare_write(range).await.map_err(failed)?;
            offset += plan.range.length;
            self.commit(plan).await.map_err(failed)?;
        }
        self.close().await.map_err(failed)?;
        let length = self.host_end.load(std::sync::atomic::Ordering::Acquire);
        let resize = Resize {
            length,
            preallocation: Preallocation::Off,
        };
        self.file.node().resize(resize).await
    }
}
