//! Zeroes and discards: mapping changes without data.
//!
//! Both work on whole clusters of one L2 slice at a time, a bounded number of entries per redo
//! unit. Version 3 has zero clusters. In version 2 a cluster can only lose its mapping, which
//! reads as zeroes when there is no backing; with one, zeroes are written by the caller and a
//! discard does nothing, because it would let the backing's content show through.

use super::Qcow2;
use super::redo::{L2Run, RedoRecord};
use super::tables::{ClusterRun, GuestCluster, L2Entry, L2Kind, OFFSET_MASK, ZERO};
use block::{ByteRange, ZeroFlags};
use executor::Errno;
use smallvec::SmallVec;

/// Entries changed as one unit of the redo log.
const MAX_ENTRIES: u64 = 256;

/// What becomes of a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Erase {
    /// It reads as zeroes and keeps its storage.
    ZeroKeeping,
    /// It reads as zeroes without storage.
    ZeroUnmapping,
    /// It loses its mapping, whatever it reads as then.
    Unmap,
}

impl Qcow2 {
    /// See [`block::Format::write_zeroes`].
    pub(super) async fn zero(&self, range: ByteRange, flags: ZeroFlags) -> Result<u64, Errno> {
        self.check_writable()?;
        let Some(clusters) = self.whole_clusters(range) else {
            return Err(Errno::EOPNOTSUPP);
        };
        if clusters.start != self.geometry.guest_cluster(range.offset)
            || !self.geometry.is_aligned(range.offset)
        {
            return Err(Errno::EOPNOTSUPP);
        }
        let erase = match (self.geometry.zero_clusters, flags.may_unmap) {
            (true, true) => Erase::ZeroUnmapping,
            (true, false) => Erase::ZeroKeeping,
            (false, _) if self.backing.is_none() => Erase::Unmap,
            (false, _) => return Err(Errno::EOPNOTSUPP),
        };
        let done = self.erase_some(clusters.clone(), erase).await?;
        let end = self
            .geometry
            .guest_offset(GuestCluster(clusters.start.0 + done));
        Ok((end - range.offset).min(range.length))
    }

    /// See [`block::Format::discard`].
    pub(super) async fn discard_range(&self, range: ByteRange) -> Result<(), Errno> {
        self.check_writable()?;
        let erase = match (self.geometry.zero_clusters, &self.backing) {
            (true, _) => Erase::ZeroUnmapping,
            (false, None) => Erase::Unmap,
            (false, Some(_)) => return Ok(()),
        };
        match self.whole_clusters(range) {
            Some(clusters) => self.erase(clusters, erase).await,
            None => Ok(()),
        }
    }

    /// Drops every mapping in `clusters`, which no longer belong to the disk.
    pub(super) async fn unmap(&self, clusters: std::ops::Range<GuestCluster>) -> Result<(), Errno> {
        self.erase(clusters, Erase::Unmap).await
    }

    async fn erase(
        &self,
        clusters: std::ops::Range<GuestCluster>,
        erase: Erase,
    ) -> Result<(), Errno> {
        let mut first = clusters.start;
        while first < clusters.end {
            let done = self.erase_some(first..clusters.end, erase).await?;
            first = GuestCluster(first.0 + done);
        }
        Ok(())
    }

    /// The clusters that lie wholly in `range`; the disk's last cluster ends where the disk ends.
    fn whole_clusters(&self, range: ByteRange) -> Option<std::ops::Range<GuestCluster>> {
        let geometry = &self.geometry;
        let end = range.checked_end()?;
        let start = range.offset.div_ceil(geometry.cluster_size());
        let end = if end >= self.disk_size() {
            end.div_ceil(geometry.cluster_size())
        } else {
            end >> geometry.cluster_bits
        };
        (start < end).then_some(GuestCluster(start)..GuestCluster(end))
    }

    /// Erases at least one cluster at the start of a range; answers with how many.
    async fn erase_some(
        &self,
        clusters: std::ops::Range<GuestCluster>,
        erase: Erase,
    ) -> Result<u64, Errno> {
        let geometry = &self.geometry;
        let first = clusters.start;
        let l1_index = geometry.l1_index(first);
        let shows_backing = self.backing.is_some() && erase != Erase::Unmap;
        if self.l1.entry(l1_index) & OFFSET_MASK == 0 && !shows_backing {
            let covered_end = (l1_index + 1) << geometry.l2_bits();
            return Ok(clusters.end.0.min(covered_end) - first.0);
        }
        let end = clusters
            .end
            .0
            .min(geometry.l2_slice_end(first).0)
            .min(first.0 + MAX_ENTRIES);
        let lock = geometry.guest_offset(first)..geometry.guest_offset(GuestCluster(end));
        let _locked = self.guest_locks.lock(lock).await;
        if erase != Erase::Unmap {
            self.may_map(geometry.guest_offset(first))?;
        }
        self.make_room().await?;
        self.ensure_l2_table(l1_index).await?;
        let slice = self.load_l2(first).await?.ok_or(Errno::EIO)?;
        let entry = geometry.entry_position(first).entry;
        let mut changes = Changes::default();
        for number in 0..end - first.0 {
            let old = L2Entry(slice.word(entry + number as usize));
            if old.kind(geometry) == L2Kind::Invalid {
                return Err(self.invalid_entry(first, old.0).await);
            }
            let new = self.erased(old, erase);
            if new != old {
                let kept = erase == Erase::ZeroKeeping && new.0 != ZERO;
                let freed = old.references(geometry).filter(|_| !kept);
                changes.push(GuestCluster(first.0 + number), new, freed);
            }
        }
        let records = changes.records();
        if !records.is_empty() {
            let changed = self.log_change(&records, |state| {
                for &(cluster, new) in &changes.entries {
                    slice.set_word(geometry.entry_position(cluster).entry, new.0);
                }
                changes.freed.iter().for_each(|&run| state.free(run));
            });
            changed.await?;
        }
        Ok(end - first.0)
    }

    /// The entry that takes the place of `old`.
    fn erased(&self, old: L2Entry, erase: Erase) -> L2Entry {
        let reads_zero_anyway = self.backing.is_none();
        match (erase, old.kind(&self.geometry)) {
            (Erase::Unmap, _) => L2Entry(0),
            (_, L2Kind::Unallocated) if reads_zero_anyway => old,
            (_, L2Kind::ZeroPlain) => old,
            (Erase::ZeroKeeping, L2Kind::ZeroAllocated(_)) => old,
            (Erase::ZeroKeeping, L2Kind::Data(_)) => L2Entry(old.0 | ZERO),
            _ => L2Entry(ZERO),
        }
    }
}

/// Entry changes of one unit.
#[derive(Default)]
struct Changes {
    entries: SmallVec<[(GuestCluster, L2Entry); 16]>,
    freed: SmallVec<[ClusterRun; 16]>,
}

impl Changes {
    fn push(&mut self, cluster: GuestCluster, new: L2Entry, freed: Option<ClusterRun>) {
        self.entries.push((cluster, new));
        let Some(run) = freed else { return };
        match self.freed.last_mut() {
            Some(last) if last.end() == run.first.0 => last.count += run.count,
            _ => self.freed.push(run),
        }
    }

    /// The redo records, runs of equal entries as one.
    fn records(&self) -> SmallVec<[RedoRecord; 16]> {
        let mut records: SmallVec<[RedoRecord; 16]> = SmallVec::new();
        for &(cluster, new) in &self.entries {
            match records.last_mut() {
                Some(RedoRecord::L2(run))
                    if run.value == new.0 && run.first.0 + run.count == cluster.0 =>
                {
                    run.count += 1;
                }
                _ => records.push(RedoRecord::L2(L2Run {
                    first: cluster,
                    count: 1,
                    value: new.0,
                    contiguous: false,
                })),
            }
        }
        let freed = self.freed.iter().map(|&run| RedoRecord::Free { run });
        records.extend(freed);
        records
    }
}
