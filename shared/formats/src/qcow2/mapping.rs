//! Where the guest's bytes are: the synchronous lookup on cached L2 slices, and its slow twin.

use super::Qcow2;
use super::cache::Pinned;
use super::tables::{GuestCluster, HostOffset, L2Entry, L2Kind, OFFSET_MASK};
use block::{ByteRange, Extent, Lookup, Mapping};
use executor::Errno;
use std::sync::atomic::Ordering::{Acquire, Relaxed};

impl Qcow2 {
    /// Maps the start of `range` without blocking, locking or allocating.
    #[inline]
    pub(super) fn lookup_cached(&self, range: ByteRange) -> Lookup {
        let geometry = &self.geometry;
        let cluster = geometry.guest_cluster(range.offset);
        let l1_index = geometry.l1_index(cluster);
        if self.l1.entry(l1_index) & OFFSET_MASK == 0 {
            return Lookup::Hit(self.unmapped_by_l1(range));
        }
        let Some(view) = self.l2.view(geometry.entry_position(cluster).slice) else {
            return Lookup::Miss;
        };
        match self.extent(range, |entry| view.word(entry)) {
            Some(extent) if view.is_valid() => Lookup::Hit(extent),
            _ => Lookup::Miss,
        }
    }

    /// Maps the start of `range`, reading its L2 slice when it is not cached.
    pub(super) async fn resolve_mapping(&self, range: ByteRange) -> Result<Extent, Errno> {
        if let Lookup::Hit(extent) = self.lookup_cached(range) {
            return Ok(extent);
        }
        let cluster = self.geometry.guest_cluster(range.offset);
        let _loading = self.table_loads.lock_shared(0..1).await;
        let Some(slice) = self.load_l2(cluster).await? else {
            return Ok(self.unmapped_by_l1(range));
        };
        match self.extent(range, |entry| slice.word(entry)) {
            Some(extent) => Ok(extent),
            None => {
                let entry = slice.word(self.geometry.entry_position(cluster).entry);
                Err(self.invalid_entry(cluster, entry).await)
            }
        }
    }

    /// The slice that maps `cluster`; `None` when there is no L2 table.
    pub(super) async fn load_l2(&self, cluster: GuestCluster) -> Result<Option<Pinned<'_>>, Errno> {
        let slice = self.geometry.entry_position(cluster).slice;
        let l1_index = self.geometry.l1_index(cluster);
        let table = self.l1.entry(l1_index) & OFFSET_MASK;
        if table == 0 {
            return Ok(None);
        }
        if !self.geometry.is_aligned(table) {
            let what = format!("L2 table offset {table:#x} unaligned (L1 index {l1_index:#x})");
            return Err(self.corruption(what).await);
        }
        let offset = HostOffset(table + self.geometry.l2_slice_offset(slice));
        self.load(&self.l2, slice, offset).await.map(Some)
    }

    pub(super) async fn invalid_entry(&self, cluster: GuestCluster, entry: u64) -> Errno {
        let offset = self.geometry.guest_offset(cluster);
        self.corruption(format!(
            "invalid L2 entry {entry:#x} for guest offset {offset:#x}"
        ))
        .await
    }

    /// The extent of a range whose L1 entry is empty.
    fn unmapped_by_l1(&self, range: ByteRange) -> Extent {
        let coverage = self.geometry.l1_entry_coverage();
        let left = coverage - (range.offset & (coverage - 1));
        Extent {
            length: range.length.min(left),
            mapping: Mapping::Unallocated,
            in_place: false,
        }
    }

    /// The longest extent of one kind at the start of `range`, within one slice; `None` when its
    /// first entry is invalid.
    #[inline]
    fn extent(&self, range: ByteRange, word: impl Fn(usize) -> u64) -> Option<Extent> {
        let geometry = &self.geometry;
        let cluster_size = geometry.cluster_size();
        let cluster = geometry.guest_cluster(range.offset);
        let position = geometry.entry_position(cluster);
        let in_cluster = range.offset & (cluster_size - 1);
        let wanted = in_cluster
            .saturating_add(range.length)
            .div_ceil(cluster_size);
        let most = wanted.min(geometry.l2_slice_end(cluster).0 - cluster.0) as usize;
        let first = L2Entry(word(position.entry));
        let run = |step: u64| {
            let mut count = 1;
            while count < most
                && word(position.entry + count) == first.0.wrapping_add(step * count as u64)
            {
                count += 1;
            }
            count as u64
        };
        let (count, mapping) = match first.kind(geometry) {
            L2Kind::Invalid => return None,
            L2Kind::Unallocated => (run(0), Mapping::Unallocated),
            L2Kind::ZeroPlain => (run(0), Mapping::Zero(None)),
            L2Kind::ZeroAllocated(host) => {
                (run(cluster_size), Mapping::Zero(Some(host.0 + in_cluster)))
            }
            L2Kind::Data(host) => (run(cluster_size), Mapping::Data(host.0 + in_cluster)),
            L2Kind::Compressed(descriptor) => (1, Mapping::Encoded(descriptor)),
        };
        let in_place = match first.kind(geometry) {
            L2Kind::Data(host) => {
                first.is_copied()
                    && self.health.not_in_place.load(Acquire) == 0
                    && host.0 + count * cluster_size <= self.host_end.load(Relaxed)
            }
            _ => false,
        };
        Some(Extent {
            length: range.length.min(count * cluster_size - in_cluster),
            mapping,
            in_place,
        })
    }
}
