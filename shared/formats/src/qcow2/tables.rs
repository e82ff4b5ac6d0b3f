//! Geometry of an image and the entries of its tables (QEMU docs/interop/qcow2.txt, "Cluster
//! mapping" and "Host cluster management").
//!
//! ```text
//!   guest offset = | L1 index | L2 index | offset in cluster |
//!   L1 entry  63 COPIED  62..56 reserved  55..9 L2 table offset       8..0 reserved
//!   L2 entry  63 COPIED  62 compressed    55..9 host cluster offset   8..1 reserved  0 zero
//! ```
//!
//! An extended L2 entry has a second word, the state of the cluster's 32 subclusters: see
//! [`super::cluster`].
//!
//! Owns the arithmetic between guest offsets, clusters, tables and *slices* (the part of a table
//! that is cached as one). Knows no I/O.

use super::compressed::Packed;

/// A byte offset in the image file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct HostOffset(pub(super) u64);

/// A cluster of the image file, counted from its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct HostCluster(pub(super) u64);

/// A cluster of the virtual disk, counted from its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct GuestCluster(pub(super) u64);

/// A run of host clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ClusterRun {
    pub(super) first: HostCluster,
    pub(super) count: u64,
}

impl ClusterRun {
    pub(super) fn end(self) -> u64 {
        self.first.0 + self.count
    }
}

/// Where an L2 entry is: the cached slice and the word in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct EntryPosition {
    /// Index of the slice in the L2 cache.
    pub(super) slice: u64,
    /// Index of the entry in the slice.
    pub(super) entry: usize,
}

/// COPIED: the reference count of what the entry refers to is exactly one.
pub(super) const COPIED: u64 = 1 << 63;
/// The L2 entry describes a compressed cluster.
pub(super) const COMPRESSED: u64 = 1 << 62;
/// The L2 entry reads as zeroes (version 3).
pub(super) const ZERO: u64 = 1;
/// Host offset in L1 and L2 entries: bits 9 to 55.
pub(super) const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Host offset in refcount table entries: bits 9 to 63.
pub(super) const REFCOUNT_BLOCK_MASK: u64 = !0x1ff;
/// No metadata or data lies at or beyond this offset.
pub(super) const MAX_HOST_OFFSET: u64 = 1 << 56;
/// Largest L1 table in bytes.
pub(super) const MAX_L1_BYTES: u64 = 32 << 20;
/// Largest refcount table in bytes.
pub(super) const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;

/// Sizes that follow from the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Geometry {
    /// log2 of the cluster size, 9..=21.
    pub(super) cluster_bits: u32,
    /// log2 of the refcount width in bits, 0..=6.
    pub(super) refcount_order: u32,
    /// Whether the image is version 3 or later (zero clusters exist).
    pub(super) zero_clusters: bool,
    /// Whether L2 entries have a second word.
    pub(super) extended_l2: bool,
    /// Whether guest clusters are in an external data file, each at its guest offset.
    pub(super) external_data: bool,
    /// log2 of the bytes of an L2 table that are cached as one.
    pub(super) l2_slice_bits: u32,
    /// log2 of the bytes of a refcount block that are cached as one.
    pub(super) refcount_slice_bits: u32,
}

impl Geometry {
    pub(super) const fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }
    /// log2 of the entries of an L2 table.
    pub(super) const fn l2_bits(&self) -> u32 {
        self.cluster_bits - 3 - self.extended_l2 as u32
    }
    /// log2 of the entries of a cached L2 slice.
    pub(super) const fn l2_slice_entry_bits(&self) -> u32 {
        self.l2_slice_bits - 3 - self.extended_l2 as u32
    }
    /// Index of the first word of an entry of an L2 slice.
    #[inline]
    pub(super) const fn l2_word(&self, entry: usize) -> usize {
        entry << self.extended_l2 as u32
    }
    /// Subclusters of a cluster: the unit of allocation within it.
    pub(super) const fn subclusters(&self) -> u32 {
        if self.extended_l2 { 32 } else { 1 }
    }
    /// log2 of the subcluster size.
    pub(super) const fn subcluster_bits(&self) -> u32 {
        self.cluster_bits - self.subclusters().trailing_zeros()
    }
    pub(super) const fn subcluster_size(&self) -> u64 {
        1 << self.subcluster_bits()
    }
    /// Bytes of the virtual disk that one L1 entry maps.
    pub(super) const fn l1_entry_coverage(&self) -> u64 {
        1 << (self.cluster_bits + self.l2_bits())
    }
    /// log2 of the refcounts of a refcount block.
    pub(super) const fn refcount_block_bits(&self) -> u32 {
        self.cluster_bits + 3 - self.refcount_order
    }
    /// log2 of the refcounts of a cached slice of a refcount block.
    pub(super) const fn refcount_slice_entry_bits(&self) -> u32 {
        self.refcount_slice_bits + 3 - self.refcount_order
    }
    /// L1 entries that a disk of `size` bytes needs.
    pub(super) const fn l1_entries_for(&self, size: u64) -> u64 {
        size.div_ceil(self.l1_entry_coverage())
    }
    pub(super) const fn guest_cluster(&self, offset: u64) -> GuestCluster {
        GuestCluster(offset >> self.cluster_bits)
    }
    pub(super) const fn guest_offset(&self, cluster: GuestCluster) -> u64 {
        cluster.0 << self.cluster_bits
    }
    pub(super) const fn host_cluster(&self, offset: HostOffset) -> HostCluster {
        HostCluster(offset.0 >> self.cluster_bits)
    }
    pub(super) const fn host_offset(&self, cluster: HostCluster) -> HostOffset {
        HostOffset(cluster.0 << self.cluster_bits)
    }
    pub(super) const fn is_aligned(&self, offset: u64) -> bool {
        offset & (self.cluster_size() - 1) == 0
    }
    pub(super) const fn l1_index(&self, cluster: GuestCluster) -> u64 {
        cluster.0 >> self.l2_bits()
    }
    /// L1 index that an L2 slice belongs to.
    pub(super) const fn l1_index_of_slice(&self, slice: u64) -> u64 {
        slice >> (self.cluster_bits - self.l2_slice_bits)
    }
    /// Byte offset of an L2 slice in its table.
    pub(super) const fn l2_slice_offset(&self, slice: u64) -> u64 {
        let slices_mask = (1 << (self.cluster_bits - self.l2_slice_bits)) - 1;
        (slice & slices_mask) << self.l2_slice_bits
    }
    pub(super) const fn entry_position(&self, cluster: GuestCluster) -> EntryPosition {
        let bits = self.l2_slice_entry_bits();
        EntryPosition {
            slice: cluster.0 >> bits,
            entry: (cluster.0 & ((1 << bits) - 1)) as usize,
        }
    }
    /// The first cluster after the L2 slice that maps `cluster`.
    pub(super) const fn l2_slice_end(&self, cluster: GuestCluster) -> GuestCluster {
        let bits = self.l2_slice_entry_bits();
        GuestCluster(((cluster.0 >> bits) + 1) << bits)
    }
    /// Index of the refcount table entry that covers `cluster`.
    pub(super) const fn refcount_table_index(&self, cluster: HostCluster) -> u64 {
        cluster.0 >> self.refcount_block_bits()
    }
    /// Index in the refcount cache of the slice that covers `cluster`.
    pub(super) const fn refcount_slice(&self, cluster: HostCluster) -> u64 {
        cluster.0 >> self.refcount_slice_entry_bits()
    }
    /// Index of `cluster`'s refcount in its slice.
    pub(super) const fn refcount_position(&self, cluster: HostCluster) -> u64 {
        cluster.0 & ((1 << self.refcount_slice_entry_bits()) - 1)
    }
    /// Refcount table index that a cached slice belongs to.
    pub(super) const fn refcount_table_index_of_slice(&self, slice: u64) -> u64 {
        slice >> (self.cluster_bits - self.refcount_slice_bits)
    }
    /// Byte offset of a cached slice in its refcount block.
    pub(super) const fn refcount_slice_offset(&self, slice: u64) -> u64 {
        let slices_mask = (1 << (self.cluster_bits - self.refcount_slice_bits)) - 1;
        (slice & slices_mask) << self.refcount_slice_bits
    }
    /// The first cluster that the next refcount slice covers.
    pub(super) const fn refcount_slice_end(&self, cluster: HostCluster) -> u64 {
        (self.refcount_slice(cluster) + 1) << self.refcount_slice_entry_bits()
    }
    /// Largest value of a refcount.
    pub(super) const fn refcount_max(&self) -> u64 {
        u64::MAX >> (64 - (1 << self.refcount_order))
    }
}

/// What an L2 entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum L2Kind {
    /// The backing's content.
    Unallocated,
    /// Zeroes without storage.
    ZeroPlain,
    /// Zeroes, with a host cluster reserved.
    ZeroAllocated(HostOffset),
    /// Plain data.
    Data(HostOffset),
    /// A compressed cluster; the raw descriptor.
    Compressed(u64),
    /// Not allowed by the specification.
    Invalid,
}

/// A standard L2 entry, or the first word of an extended one, in host byte order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct L2Entry(pub(super) u64);

impl L2Entry {
    pub(super) const fn is_copied(self) -> bool {
        self.0 & COPIED != 0
    }
    pub(super) const fn kind(self, geometry: &Geometry) -> L2Kind {
        if self.0 & COMPRESSED != 0 && !geometry.external_data {
            return L2Kind::Compressed(self.0 & !(COMPRESSED | COPIED));
        }
        let offset = self.0 & OFFSET_MASK;
        if !geometry.is_aligned(offset) {
            return L2Kind::Invalid;
        }
        match (self.0 & ZERO != 0, offset) {
            _ if self.0 & COMPRESSED != 0 => L2Kind::Invalid,
            (true, _) if !geometry.zero_clusters => L2Kind::Invalid,
            // In an external data file, 0 is the place of the first cluster.
            (true, 0) if !geometry.external_data || !self.is_copied() => L2Kind::ZeroPlain,
            (true, offset) => L2Kind::ZeroAllocated(HostOffset(offset)),
            (false, 0) if !geometry.external_data || !self.is_copied() => L2Kind::Unallocated,
            (false, offset) => L2Kind::Data(HostOffset(offset)),
        }
    }
    /// The host clusters that the entry holds a counted reference to: none in an external data file.
    pub(super) fn references(self, geometry: &Geometry) -> Option<ClusterRun> {
        if geometry.external_data {
            return None;
        }
        match self.kind(geometry) {
            L2Kind::Unallocated | L2Kind::ZeroPlain | L2Kind::Invalid => None,
            L2Kind::ZeroAllocated(offset) | L2Kind::Data(offset) => Some(ClusterRun {
                first: geometry.host_cluster(offset),
                count: 1,
            }),
            L2Kind::Compressed(descriptor) => {
                Some(Packed::from_descriptor(descriptor, geometry).clusters(geometry))
            }
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// What most images are like.
    pub(in crate::qcow2) const GEOMETRY: Geometry = Geometry {
        cluster_bits: 16,
        refcount_order: 4,
        zero_clusters: true,
        extended_l2: false,
        external_data: false,
        l2_slice_bits: 12,
        refcount_slice_bits: 12,
    };

    #[test]
    fn a_guest_cluster_is_found_in_its_slice() {
        let cluster = GuestCluster(8192 + 513);
        assert_eq!(GEOMETRY.l1_index(cluster), 1);
        let position = GEOMETRY.entry_position(cluster);
        assert_eq!((position.slice, position.entry), (17, 1));
        assert_eq!(GEOMETRY.l1_index_of_slice(position.slice), 1);
        assert_eq!(GEOMETRY.l2_slice_offset(position.slice), 4096);
        assert_eq!(GEOMETRY.l2_slice_end(cluster), GuestCluster(8192 + 1024));
    }

    #[test]
    fn entries_that_break_the_specification_are_invalid() {
        assert_eq!(L2Entry(COPIED | 0x1_0200).kind(&GEOMETRY), L2Kind::Invalid);
        let version_2 = Geometry {
            zero_clusters: false,
            ..GEOMETRY
        };
        assert_eq!(L2Entry(ZERO).kind(&version_2), L2Kind::Invalid);
        assert_eq!(L2Entry(ZERO).kind(&GEOMETRY), L2Kind::ZeroPlain);
    }

    #[test]
    fn a_compressed_cluster_refers_to_every_cluster_its_sectors_touch() {
        let sectors_beyond_the_first = 2;
        let descriptor = (sectors_beyond_the_first << 54) | (0x2_0000 - 512 + 7);
        let run = L2Entry(COMPRESSED | descriptor).references(&GEOMETRY);
        let first = HostCluster(1);
        assert_eq!(run, Some(ClusterRun { first, count: 2 }));
    }
}
