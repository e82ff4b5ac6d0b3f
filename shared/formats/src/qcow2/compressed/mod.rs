//! Compressed clusters (QEMU docs/interop/qcow2.txt, "Compressed Clusters Descriptor").
//!
//! ```text
//!   L2 entry  63 0 | 62 1 | 61 .. x additional sectors | x-1 .. 0 host offset in bytes
//!             x = 62 - (cluster_bits - 8)
//!
//!   read    inflated cluster cached? ─no─► read its sectors ─► inflate ─► cached
//!   write   deflate ─► place for the bytes, behind the last ones ─► write ─► map
//! ```
//!
//! Owns the descriptor, the codecs, a few inflated clusters, and packing: compressed clusters lie
//! byte behind byte, and each holds a reference to every host cluster that it touches. Encryption
//! does not apply to them; images that encrypt take no compressed writes.

mod cache;
mod read;
mod write;

pub use crate::codec::Codec;

pub(super) use cache::Inflated;
pub(super) use write::Packing;

use super::tables::{ClusterRun, Geometry, HostCluster};

/// Sectors are what a descriptor counts in.
const SECTOR: u64 = 512;

/// Where the bytes of a compressed cluster are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Packed {
    /// First byte in the file.
    pub(super) offset: u64,
    /// Bytes up to the end of the last sector.
    pub(super) length: u64,
}

impl Packed {
    /// Reads a descriptor: an L2 entry without its two flags.
    pub(super) const fn from_descriptor(descriptor: u64, geometry: &Geometry) -> Self {
        let offset_bits = Self::offset_bits(geometry);
        let offset = descriptor & ((1 << offset_bits) - 1);
        let sectors = (descriptor >> offset_bits) + 1;
        Self {
            offset,
            length: sectors * SECTOR - offset % SECTOR,
        }
    }

    /// The descriptor of these bytes; `None` when it cannot express their offset.
    pub(super) const fn descriptor(self, geometry: &Geometry) -> Option<u64> {
        let offset_bits = Self::offset_bits(geometry);
        if self.offset >> offset_bits != 0 {
            return None;
        }
        let additional = (self.offset + self.length - 1) / SECTOR - self.offset / SECTOR;
        Some(additional << offset_bits | self.offset)
    }

    /// The host clusters that the sectors lie in.
    pub(super) const fn clusters(self, geometry: &Geometry) -> ClusterRun {
        let first = self.offset >> geometry.cluster_bits;
        let last = (self.offset + self.length - 1) >> geometry.cluster_bits;
        ClusterRun {
            first: HostCluster(first),
            count: last - first + 1,
        }
    }

    const fn offset_bits(geometry: &Geometry) -> u32 {
        62 - (geometry.cluster_bits - 8)
    }
}
