//! Where the guest's bytes are: the synchronous lookup on cached L2 slices, and its slow twin.
//!
//! Standard entries are read as they are, a word each; extended ones go through their subclusters
//! (`extended_extent`), which is as lock-free and a little longer.

use super::Qcow2;
use super::cache::{Pinned, ReadClaim, View};
use super::cluster::{Cluster, EntryUse, EntryWords, SubclusterKind, Subclusters};
use super::tables::{GuestCluster, HostOffset, L2Entry, L2Kind, OFFSET_MASK, ZERO};
use block::{ByteRange, Event, Extent, Lookup, Mapping};
use executor::{Buffer, Errno};
use std::sync::atomic::Ordering::{Acquire, Relaxed};

impl Qcow2 {
    /// Maps the start of `range` without blocking, locking or allocating.
    #[inline]
    pub(super) fn lookup_cached(&self, range: ByteRange) -> Lookup {
        let geometry = &self.geometry;
        let cluster = geometry.guest_cluster(range.offset);
        let slice = geometry.entry_position(cluster).slice;
        // A slice is cached while its table is reachable; one of a table that was dropped maps
        // nothing, as the L1 entry says.
        let Some(view) = self.l2.view(slice) else {
            let table = self.l1.entry(geometry.l1_index(cluster)) & OFFSET_MASK;
            return match table {
                0 => Lookup::Hit(self.unmapped_by_l1(range)),
                _ => Lookup::Miss,
            };
        };
        if geometry.extended_l2 {
            let Some(pairs) = self.pairs.read(slice) else {
                return Lookup::Miss;
            };
            return match self.extended_extent(range, &view) {
                Some(extent) if view.is_valid() && pairs.is_valid() => Lookup::Hit(extent),
                _ => Lookup::Miss,
            };
        }
        match self.extent(range, &view) {
            Some(extent) if view.is_valid() => Lookup::Hit(extent),
            _ => Lookup::Miss,
        }
    }

    /// Maps the start of `range`, reading its L2 slice when it is not cached.
    pub(super) async fn resolve_mapping(&self, range: ByteRange) -> Result<Extent, Errno> {
        let geometry = &self.geometry;
        let cluster = geometry.guest_cluster(range.offset);
        let slice = geometry.entry_position(cluster).slice;
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
                    self.event(Event::L2Load).await;
                    self.file.node().read(place.0, buffer.clone()).await?;
                    let mut bytes = buffer.to_heap();
                    self.overlay.apply(geometry, slice, &mut bytes);
                    let words = loading.complete(&bytes);
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
        let geometry = &self.geometry;
        let cluster = geometry.guest_cluster(range.offset);
        let (extent, words) = {
            // Keeps the two words of extended entries together.
            let _state = geometry.extended_l2.then(|| self.state());
            let extent = match geometry.extended_l2 {
                true => self.extended_extent(range, entries),
                false => self.extent(range, entries),
            };
            (extent, self.words_of(cluster, entries))
        };
        match extent {
            Some(extent) => Ok(extent),
            None => Err(self.invalid_entry(cluster, words, EntryUse::Read).await),
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

    /// Marks the image as corrupt: the specification does not allow the entry of `cluster`.
    pub(super) async fn invalid_entry(
        &self,
        cluster: GuestCluster,
        words: EntryWords,
        usage: EntryUse,
    ) -> Errno {
        let geometry = &self.geometry;
        let table = self.l1.entry(geometry.l1_index(cluster)) & OFFSET_MASK;
        let index = cluster.0 & ((1 << geometry.l2_bits()) - 1);
        let position = format!(
            "(L2 offset: {}, L2 index: {})",
            hexadecimal(table),
            hexadecimal(index)
        );
        let unaligned = words.unaligned_host(geometry).map(hexadecimal);
        let guest = hexadecimal(geometry.guest_offset(cluster));
        // Scripts read these lines of QEMU's, its doubled space too.
        let found = match (usage, unaligned) {
            (EntryUse::Read, Some(host)) => {
                format!("Cluster allocation offset {host} unaligned {position}")
            }
            (EntryUse::Read, None) => format!("Invalid cluster entry found  {position}"),
            (EntryUse::Change, Some(host)) => {
                let kind = match words.descriptor.0 & ZERO {
                    0 => "Data",
                    _ => "Preallocated zero",
                };
                format!("{kind} cluster offset {host} unaligned (guest offset: {guest})")
            }
            (EntryUse::Change, None) => format!("Invalid cluster entry found {position}"),
        };
        // The entry itself is for who looks into the image.
        let (entry, subclusters) = (words.descriptor.0, words.bitmap);
        tracing::debug!(
            node = self.file.node().name(),
            "entry {entry:#x}, subclusters {subclusters:#x}"
        );
        self.corruption(found).await
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
        let run = |step: u64| match most {
            1 => 1,
            _ => entries.run(position.entry, most, step) as u64,
        };
        let mut in_place = false;
        let (count, mapping) = match first.kind(geometry) {
            L2Kind::Data(host) => {
                if geometry.external_data && host.0 != geometry.guest_offset(cluster) {
                    return None;
                }
                let count = run(cluster_size);
                in_place = self.is_owned(first.is_copied(), (host, count))
                    && self.health.not_in_place.load(Acquire) == 0;
                (count, Mapping::Data(host.0 + in_cluster))
            }
            L2Kind::Invalid => return None,
            L2Kind::Unallocated => (run(0), Mapping::Unallocated),
            L2Kind::ZeroPlain => (run(0), Mapping::Zero(None)),
            L2Kind::ZeroAllocated(host) => {
                (run(cluster_size), Mapping::Zero(Some(host.0 + in_cluster)))
            }
            L2Kind::Compressed(descriptor) => (1, Mapping::Encoded(descriptor)),
        };
        Some(Extent {
            length: range.length.min(count * cluster_size - in_cluster),
            mapping,
            in_place,
        })
    }

    /// Whether the clusters at `host`, as many as said, may be written where they are, given their
    /// COPIED flag. Those of an external data file belong to the guest clusters of the same place.
    #[inline]
    pub(super) fn is_owned(&self, copied: bool, (host, clusters): (HostOffset, u64)) -> bool {
        let end = host.0 + (clusters << self.geometry.cluster_bits);
        self.geometry.external_data || (copied && end <= self.host_end.load(Relaxed))
    }

    /// [`Qcow2::extent`] of extended entries: the longest extent of one kind of subclusters.
    fn extended_extent(
        &self,
        range: ByteRange,
        entries: &(impl Entries + ?Sized),
    ) -> Option<Extent> {
        let geometry = &self.geometry;
        let first = geometry.guest_cluster(range.offset);
        let decode = |cluster: GuestCluster| {
            Cluster::decode(self.words_of(cluster, entries), cluster, geometry)
        };
        let in_cluster = range.offset - geometry.guest_offset(first);
        let subclusters = match decode(first)? {
            Cluster::Standard(subclusters) => subclusters,
            Cluster::Compressed(descriptor) => {
                return Some(Extent {
                    length: range.length.min(geometry.cluster_size() - in_cluster),
                    mapping: Mapping::Encoded(descriptor),
                    in_place: false,
                });
            }
        };
        let all = geometry.subclusters();
        let start = (in_cluster >> geometry.subcluster_bits()) as u32;
        let kind = subclusters.kind(start);
        let mut end_subcluster = start + subclusters.run(start, all);
        let mut count = 1;
        let slice_end = geometry.l2_slice_end(first).0;
        let wanted_end = range.offset.saturating_add(range.length);
        while end_subcluster == all
            && first.0 + count < slice_end
            && geometry.guest_offset(GuestCluster(first.0 + count)) < wanted_end
            && let Some(Cluster::Standard(next)) = decode(GuestCluster(first.0 + count))
            && next.kind(0) == kind
            && self.continues(&subclusters, &next, count)
        {
            end_subcluster = next.run(0, all);
            count += 1;
        }
        let last = geometry.guest_offset(GuestCluster(first.0 + count - 1));
        let end = last + (u64::from(end_subcluster) << geometry.subcluster_bits());
        let host = subclusters.host;
        let mapping = match (kind, host) {
            (SubclusterKind::Data, Some(host)) => Mapping::Data(host.0 + in_cluster),
            (SubclusterKind::Zero, host) => Mapping::Zero(host.map(|host| host.0 + in_cluster)),
            (SubclusterKind::Unallocated | SubclusterKind::Data, _) => Mapping::Unallocated,
        };
        let in_place = kind == SubclusterKind::Data
            && host.is_some_and(|host| self.is_owned(subclusters.copied, (host, count)))
            && self.health.not_in_place.load(Acquire) == 0;
        Some(Extent {
            length: range.length.min(end - range.offset),
            mapping,
            in_place,
        })
    }

    /// The entry of `cluster` in the slice that maps it.
    fn words_of(&self, cluster: GuestCluster, entries: &(impl Entries + ?Sized)) -> EntryWords {
        let geometry = &self.geometry;
        let at = geometry.l2_word(geometry.entry_position(cluster).entry);
        EntryWords {
            descriptor: L2Entry(entries.word(at)),
            bitmap: match geometry.extended_l2 {
                true => entries.word(at + 1),
                false => 0,
            },
        }
    }

    /// Whether `next`, the `distance`-th cluster after `first`, continues its extent.
    fn continues(&self, first: &Subclusters, next: &Subclusters, distance: u64) -> bool {
        let host = |host: HostOffset| HostOffset(host.0 + (distance << self.geometry.cluster_bits));
        next.host == first.host.map(host) && next.copied == first.copied
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

/// A number as C's `%#x` prints it: zero has no prefix.
fn hexadecimal(value: u64) -> String {
    match value {
        0 => "0".to_owned(),
        value => format!("{value:#x}"),
    }
}
