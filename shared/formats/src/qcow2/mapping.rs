//! Where the guest's bytes are: the synchronous lookup on cached L2 slices, and its slow twin.

use super::Qcow2;
use super::cache::{Pinned, ReadClaim, View};
use super::tables::{GuestCluster, HostOffset, L2Entry, L2Kind, OFFSET_MASK};
use block::{ByteRange, Extent, Lookup, Mapping};
use executor::{Buffer, Errno};
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
        match self.extent(range, &view) {
            Some(extent) if view.is_valid() => Lookup::Hit(extent),
            _ => Lookup::Miss,
        }
    }

    /// Maps the start of `range`, reading its L2 slice when it is not cached.
    pub(super) async fn resolve_mapping(&self, range: ByteRange) -> Result<Extent, Errno> {
        let cluster = self.geometry.guest_cluster(range.offset);
        let slice = self.geometry.entry_position(cluster).slice;
        if let Lookup::Hit(extent) = self.lookup_cached(range) {
            return Ok(extent);
        }
        let _loading = self.table_loads.lock_shared(0..1).await;
        loop {
            if let Lookup::Hit(extent) = self.lookup_cached(range) {
                return Ok(extent);
            }
            let Some(place) = self.l2_slice_on_disk(cluster).await? else {
                continue;
            };
            match self.l2.claim_read(slice) {
                ReadClaim::Present => return self.resolve_pinned(range).await,
                ReadClaim::Vacant(loading) => {
                    let buffer = Buffer::zeroed(self.l2.slice_bytes());
                    self.file.node().read(place.0, buffer.clone()).await?;
                    let words = loading.complete(&buffer.to_heap());
                    return self.extent_or_error(range, words.as_slice()).await;
                }
                ReadClaim::Busy => {
                    self.l2.wait_unless(|cache| cache.is_readable(slice)).await;
                }
            }
        }
    }

    /// The look-up for a slice that changed hands meanwhile, or has an invalid entry.
    async fn resolve_pinned(&self, range: ByteRange) -> Result<Extent, Errno> {
        let cluster = self.geometry.guest_cluster(range.offset);
        match self.load_l2(cluster).await? {
            Some(slice) => self.extent_or_error(range, &slice).await,
            None => Ok(self.unmapped_by_l1(range)),
        }
    }

    async fn extent_or_error(
        &self,
        range: ByteRange,
        entries: &(impl Entries + ?Sized),
    ) -> Result<Extent, Errno> {
        match self.extent(range, entries) {
            Some(extent) => Ok(extent),
            None => {
                let cluster = self.geometry.guest_cluster(range.offset);
                let entry = entries.word(self.geometry.entry_position(cluster).entry);
                Err(self.invalid_entry(cluster, entry).await)
            }
        }
    }

    /// The slice that maps `cluster`; `None` when there is no L2 table.
    pub(super) async fn load_l2(&self, cluster: GuestCluster) -> Result<Option<Pinned<'_>>, Errno> {
        let slice = self.geometry.entry_position(cluster).slice;
        match self.l2_slice_on_disk(cluster).await? {
            Some(offset) => self.load(&self.l2, slice, offset).await.map(Some),
            None => Ok(None),
        }
    }

    /// Where the slice that maps `cluster` is in the file; `None` when there is no L2 table.
    async fn l2_slice_on_disk(&self, cluster: GuestCluster) -> Result<Option<HostOffset>, Errno> {
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
        let offset = table + self.geometry.l2_slice_offset(slice);
        Ok(Some(HostOffset(offset)))
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
    fn extent(&self, range: ByteRange, entries: &(impl Entries + ?Sized)) -> Option<Extent> {
        let geometry = &self.geometry;
        let cluster_size = geometry.cluster_size();
        let cluster = geometry.guest_cluster(range.offset);
        let position = geometry.entry_position(cluster);
        let in_cluster = range.offset & (cluster_size - 1);
        let wanted = in_cluster
            .saturating_add(range.length)
            .div_ceil(cluster_size);
        let most = wanted.min(geometry.l2_slice_end(cluster).0 - cluster.0) as usize;
        let first = L2Entry(entries.word(position.entry));
        let run = |step: u64| entries.run(position.entry, most, step) as u64;
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

/// Entries of an L2 slice, in whatever form they are.
trait Entries {
    fn word(&self, index: usize) -> u64;
    /// How many entries from `index` on, `most` at most, are evenly `step` apart; at least one.
    fn run(&self, index: usize, most: usize, step: u64) -> usize {
        let first = self.word(index);
        let is_next = |count: &usize| {
            self.word(index + count) == first.wrapping_add(step.wrapping_mul(*count as u64))
        };
        1 + (1..most).take_while(is_next).count()
    }
}

impl Entries for View<'_> {
    #[inline]
    fn word(&self, index: usize) -> u64 {
        self.word(index)
    }
    #[inline]
    fn run(&self, index: usize, most: usize, step: u64) -> usize {
        self.run(index, most, step)
    }
}

impl Entries for Pinned<'_> {
    fn word(&self, index: usize) -> u64 {
        self.word(index)
    }
}

impl Entries for [u64] {
    fn word(&self, index: usize) -> u64 {
        self[index]
    }
}
