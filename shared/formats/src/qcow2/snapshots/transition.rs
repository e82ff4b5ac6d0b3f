//! From one state of an image to another in one write.
//!
//! ```text
//!   1 reserve places for refcount blocks; flush: everything in memory is on disk
//!   2 new refcounts in shadow blocks: references dropped, references added
//!   3 L2 tables of the active disk whose COPIED flags change, to new places
//!   4 L1 table, snapshot table, refcount table and shadow blocks, to new places; flush
//!   5 the header's bytes 24..72: size, L1 table, refcount table, snapshot table; flush
//!   6 memory follows; what only the old state referred to is freed as after any other change
//! ```
//!
//! Until 5 nothing that the image refers to is written but refcounts of reserved clusters (leaks
//! after a crash). 5 lies in one sector, which a disk writes whole. A failure before 5 changes
//! nothing; one in 5 leaves it open which state is on disk, so nothing more is written.
//!
//! The redo log is empty from 4 to 6: writers are quiet, and what was reserved is flushed.

use super::super::alloc::{Contiguous, Reserved};
use super::super::overlap::Fixed;
use super::super::reclaim::DiscardKind;
use super::super::tables::{
    COPIED, ClusterRun, HostCluster, HostOffset, L2Entry, L2Kind, MAX_HOST_OFFSET, OFFSET_MASK,
};
use super::super::{CORRUPT, Qcow2, header, read_bytes};
use super::quiet::Quiet;
use super::shadow::{Failure, Reservations, Shadow};
use super::{SnapshotEntry, SnapshotTable};
use block::ByteRange;
use executor::Errno;
use std::sync::atomic::Ordering::{Acquire, Release};

/// What the new state is.
pub(super) struct Change {
    /// L1 entries whose references go away.
    pub(super) dropped: Vec<u64>,
    /// L1 entries whose references are added.
    pub(super) added: Vec<u64>,
    /// L1 entries of the active disk.
    pub(super) active: Vec<u64>,
    /// Bytes of the active disk.
    pub(super) disk_size: u64,
    /// Entries of the snapshot table.
    pub(super) snapshots: Vec<SnapshotEntry>,
    /// L1 entries of the last snapshot, when it is new.
    pub(super) new_l1: Option<Vec<u64>>,
    /// Clusters of an L1 table that goes away with its snapshot.
    pub(super) old_l1: Option<ClusterRun>,
    /// Who may still read what is dropped.
    pub(super) readers: Readers,
}

/// Who may read clusters that lose their last reference.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Readers {
    /// Nobody: they belonged to a snapshot.
    None,
    /// Requests that began before.
    Requests,
}

/// Runs of clusters, neighbours joined.
#[derive(Default)]
struct Runs(Vec<ClusterRun>);

impl Runs {
    fn push(&mut self, run: ClusterRun) {
        match self.0.last_mut() {
            Some(last) if last.end() == run.first.0 => last.count += run.count,
            _ => self.0.push(run),
        }
    }
    fn push_cluster(&mut self, first: HostCluster) {
        self.push(ClusterRun { first, count: 1 });
    }
}

/// The new state, written beside the old one.
struct Prepared<'q> {
    reserved: Reservations<'q>,
    l1: Vec<u64>,
    l1_run: ClusterRun,
    refcount_table: Vec<u64>,
    refcount_table_run: ClusterRun,
    snapshots: SnapshotTable,
    disk_size: u64,
    /// Clusters without a reference in the new state that keep their count until nobody reads
    /// them.
    leaving: Runs,
    /// Clusters that are free in the new state.
    free: Runs,
}

impl Qcow2 {
    /// Makes what is in memory durable until nothing is left, the redo log included. The caller
    /// is quiet.
    pub(in super::super) async fn settle(&self) -> Result<(), Errno> {
        loop {
            self.flush_metadata().await?;
            let state = self.state();
            if self.l2.dirty_count() == 0
                && self.refcounts.dirty_count() == 0
                && state.l1_dirty.is_empty()
                && state.refcount_table.dirty.is_empty()
                && self.log.is_empty()
            {
                return Ok(());
            }
        }
    }

    /// Brings the image into the state that `change` describes.
    pub(super) async fn transition(
        &self,
        quiet: &Quiet<'_>,
        change: Change,
    ) -> Result<(), Failure> {
        self.settle().await?;
        let mut reserved = Reservations::default();
        let prepared = self.prepare_state(quiet, change, &mut reserved).await;
        let prepared = match prepared {
            Ok(prepared) => Prepared {
                reserved,
                ..prepared
            },
            Err(failure) => {
                reserved.give_back();
                return Err(failure);
            }
        };
        self.switch(prepared).await
    }

    async fn prepare_state<'q>(
        &'q self,
        quiet: &Quiet<'_>,
        change: Change,
        reserved: &mut Reservations<'q>,
    ) -> Result<Prepared<'q>, Failure> {
        let mut shadow = Shadow::new(self, quiet, reserved).await?;
        let mut runs = Dropped::default();
        self.drop_references(&mut shadow, &change.dropped, &mut runs)
            .await?;
        self.add_references(&mut shadow, &change.added).await?;
        let mut builder = Builder {
            image: self,
            quiet,
            shadow,
            reserved,
            leaving: Runs::default(),
        };
        let l1 = builder.active_tables(&change.active).await?;
        let mut snapshots = SnapshotTable {
            entries: change.snapshots,
            ..SnapshotTable::default()
        };
        if let (Some(new_l1), Some(entry)) = (&change.new_l1, snapshots.entries.last_mut()) {
            let bytes: Vec<u8> = new_l1
                .iter()
                .flat_map(|entry| entry.to_be_bytes())
                .collect();
            entry.l1_entries = new_l1.len() as u32;
            entry.l1_offset = builder
                .store(&bytes)
                .await?
                .map_or(HostOffset(0), |run| self.geometry.host_offset(run.first));
        }
        let table = snapshots.encode().map_err(|_| Failure::Io(Errno::EFBIG))?;
        snapshots.length = table.len() as u64;
        if let Some(run) = builder.store(&table).await? {
            snapshots.offset = self.geometry.host_offset(run.first);
        }
        let bytes: Vec<u8> = l1.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        let l1_run = match builder.store(&bytes).await? {
            Some(run) => run,
            None => self.clusters_of(self.state().l1_offset, 0),
        };
        let mut free = Runs::default();
        builder
            .settle_dropped(runs, change.readers, &mut free)
            .await?;
        builder.leaving.0.extend(change.old_l1);
        builder.leaving.0.extend(self.old_fixed_tables());
        let (refcount_table, refcount_table_run) = builder.finish().await?;
        let leaving = builder.leaving;
        Ok(Prepared {
            reserved: Reservations::default(),
            l1,
            l1_run,
            refcount_table,
            refcount_table_run,
            snapshots,
            disk_size: change.disk_size,
            leaving,
            free,
        })
    }

    /// The clusters of the tables that the header refers to now.
    fn old_fixed_tables(&self) -> Vec<ClusterRun> {
        let state = self.state();
        let tables = [
            self.clusters_of(state.l1_offset, self.l1.len() * 8),
            self.clusters_of(state.snapshots.offset, state.snapshots.length),
        ];
        tables.into_iter().filter(|run| run.count != 0).collect()
    }

    /// The words of an L2 table.
    async fn table_words(&self, offset: u64) -> Result<Vec<u64>, Failure> {
        if !self.geometry.is_aligned(offset) || offset >= MAX_HOST_OFFSET {
            return Err(Failure::Corrupt(format!(
                "L2 table offset {offset:#x} invalid"
            )));
        }
        let length = self.geometry.cluster_size() as usize;
        let bytes = read_bytes(&self.file, offset, length).await?;
        let words = bytes.chunks_exact(8);
        Ok(words
            .map(|word| u64::from_be_bytes(word.try_into().expect("chunks of eight bytes")))
            .collect())
    }

    /// The runs of clusters that the entries of a table refer to.
    fn references_of(&self, words: &[u64]) -> Result<Runs, Failure> {
        let mut runs = Runs::default();
        for &word in words.iter().step_by(self.geometry.l2_word(1)) {
            let entry = L2Entry(word);
            if entry.kind(&self.geometry) == L2Kind::Invalid {
                return Err(Failure::Corrupt(format!("invalid L2 entry {word:#x}")));
            }
            if let Some(run) = entry.references(&self.geometry) {
                runs.push(run);
            }
        }
        Ok(runs)
    }

    async fn drop_references(
        &self,
        shadow: &mut Shadow<'_>,
        l1: &[u64],
        dropped: &mut Dropped,
    ) -> Result<(), Failure> {
        for table in l1
            .iter()
            .map(|entry| entry & OFFSET_MASK)
            .filter(|table| *table != 0)
        {
            let words = self.table_words(table).await?;
            for run in self.references_of(&words)?.0 {
                let note = |cluster, count| {
                    if count == 0 {
                        dropped.data.push_cluster(cluster);
                    }
                };
                shadow.change(run, |old| old.checked_sub(1), note).await?;
            }
            let run = self.clusters_of(HostOffset(table), 1);
            let note = |cluster, count| {
                if count == 0 {
                    dropped.tables.push_cluster(cluster);
                }
            };
            shadow.change(run, |old| old.checked_sub(1), note).await?;
        }
        Ok(())
    }

    async fn add_references(&self, shadow: &mut Shadow<'_>, l1: &[u64]) -> Result<(), Failure> {
        for table in l1
            .iter()
            .map(|entry| entry & OFFSET_MASK)
            .filter(|table| *table != 0)
        {
            let words = self.table_words(table).await?;
            for run in self.references_of(&words)?.0 {
                shadow.increment(run).await?;
            }
            shadow
                .increment(self.clusters_of(HostOffset(table), 1))
                .await?;
        }
        Ok(())
    }

    /// Step 5 and 6.
    async fn switch(&self, prepared: Prepared<'_>) -> Result<(), Failure> {
        // Nobody reads tables into the caches until memory follows the header.
        let _no_loads = self.table_loads.lock(0..1).await;
        let _no_flush = self.flushing.lock().await;
        self.l2.forget_all().await;
        self.refcounts.forget_all().await;
        if let Err(errno) = self.write_switch(&prepared).await {
            tracing::error!(%errno, "qcow2 header not switched; the image takes no more writes");
            self.health.failed.store(true, Release);
            self.health.corrupt.store(true, Release);
            self.keep_writes_from_place(CORRUPT);
            return Err(errno.into());
        }
        let free = self.adopt(prepared);
        for run in free.0 {
            if !self.discards.passes(DiscardKind::Snapshot) {
                break;
            }
            let bits = self.geometry.cluster_bits;
            let range = ByteRange::new(run.first.0 << bits, run.count << bits);
            // Losing the space on the host is all that a failed discard means.
            let _ = self.file.node().discard(range).await;
        }
        Ok(())
    }

    async fn write_switch(&self, prepared: &Prepared<'_>) -> Result<(), Errno> {
        let geometry = &self.geometry;
        let start = header::field::SIZE;
        let end = header::field::SNAPSHOTS_OFFSET + 8;
        let mut bytes = read_bytes(&self.file, start as u64, end - start).await?;
        let mut put = |at: usize, field: &[u8]| {
            bytes[at - start..at - start + field.len()].copy_from_slice(field);
        };
        let offset = |run: &ClusterRun| geometry.host_offset(run.first).0.to_be_bytes();
        put(header::field::SIZE, &prepared.disk_size.to_be_bytes());
        put(
            header::field::L1_SIZE,
            &(prepared.l1.len() as u32).to_be_bytes(),
        );
        put(header::field::L1_OFFSET, &offset(&prepared.l1_run));
        let table = &prepared.refcount_table_run;
        put(header::field::REFCOUNT_TABLE_OFFSET, &offset(table));
        put(
            header::field::REFCOUNT_TABLE_CLUSTERS,
            &(table.count as u32).to_be_bytes(),
        );
        let snapshots = &prepared.snapshots;
        put(
            header::field::SNAPSHOTS,
            &(snapshots.entries.len() as u32).to_be_bytes(),
        );
        put(
            header::field::SNAPSHOTS_OFFSET,
            &snapshots.offset.0.to_be_bytes(),
        );
        self.file.node().flush().await?;
        self.write_bytes(start as u64, &bytes).await?;
        self.file.node().flush().await
    }

    /// Memory follows the header. Answers with what is free now.
    fn adopt(&self, prepared: Prepared<'_>) -> Runs {
        let mut state = self.state();
        let state = &mut *state;
        self.virtual_size.store(prepared.disk_size, Release);
        self.mappable.store(prepared.disk_size, Release);
        self.l1.grow(prepared.l1.len() as u64);
        for (index, entry) in prepared.l1.iter().enumerate() {
            if self.l1.entry(index as u64) != *entry {
                self.l1.set(index as u64, *entry);
            }
        }
        self.take_lookups_back();
        state.l1_offset = self.geometry.host_offset(prepared.l1_run.first);
        state.refcount_table.offset = self.geometry.host_offset(prepared.refcount_table_run.first);
        state.refcount_table.entries = prepared.refcount_table;
        state.snapshots = prepared.snapshots;
        state.metadata.forget();
        if let Err(error) = self.map_metadata(state) {
            // Cannot be: every place was reserved after a check against the map before.
            tracing::error!(%error, "qcow2 metadata overlaps after a snapshot operation");
            self.health.corrupt.store(true, Release);
            self.keep_writes_from_place(CORRUPT);
        }
        prepared
            .leaving
            .0
            .iter()
            .for_each(|run| state.free(*run, DiscardKind::Snapshot));
        if let Some(lowest) = prepared.free.0.iter().map(|run| run.first.0).min() {
            state.allocator.scan = state.allocator.scan.min(lowest);
        }
        prepared.reserved.keep();
        prepared.free
    }
}

/// Clusters that lost their last reference.
#[derive(Default)]
struct Dropped {
    data: Runs,
    tables: Runs,
}

/// Writes the new state's tables.
struct Builder<'b, 'q> {
    image: &'q Qcow2,
    quiet: &'b Quiet<'b>,
    shadow: Shadow<'q>,
    reserved: &'b mut Reservations<'q>,
    leaving: Runs,
}

impl Builder<'_, '_> {
    /// The L1 entries of the active disk in the new state; tables whose flags change are copied.
    async fn active_tables(&mut self, active: &[u64]) -> Result<Vec<u64>, Failure> {
        let mut l1 = Vec::with_capacity(active.len());
        for entry in active {
            let table = entry & OFFSET_MASK;
            l1.push(match table {
                0 => 0,
                _ => self.active_table(table).await?,
            });
        }
        for entry in &mut l1 {
            let table = HostOffset(*entry & OFFSET_MASK);
            let cluster = self.image.geometry.host_cluster(table);
            if table.0 != 0 && *entry & COPIED == 0 && self.shadow.get(cluster).await? == 1 {
                *entry |= COPIED;
            }
        }
        Ok(l1)
    }

    async fn active_table(&mut self, table: u64) -> Result<u64, Failure> {
        let mut words = self.image.table_words(table).await?;
        if !self.correct_flags(&mut words).await? {
            return Ok(table);
        }
        let (run, _) = self.image.allocate_in(&self.quiet.structure, 1).await?;
        self.reserved.add(self.image, run);
        self.shadow.set_one(run).await?;
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
        let offset = self.image.geometry.host_offset(run.first).0;
        self.image.write_bytes(offset, &bytes).await?;
        let old = self.image.clusters_of(HostOffset(table), 1);
        let mut unused = false;
        self.shadow
            .change(
                old,
                |count| count.checked_sub(1),
                |_, count| unused = count == 0,
            )
            .await?;
        if unused {
            self.keep_counted(old).await?;
        }
        Ok(offset | COPIED)
    }

    /// Clusters without a reference keep a count of one until requests that read them have ended.
    async fn keep_counted(&mut self, run: ClusterRun) -> Result<(), Failure> {
        self.shadow.set_one(run).await?;
        self.leaving.push(run);
        Ok(())
    }

    /// Sets COPIED where the new refcount is one, and nowhere else; whether that changed anything.
    async fn correct_flags(&mut self, words: &mut [u64]) -> Result<bool, Failure> {
        let geometry = self.image.geometry;
        let mut changed = false;
        for word in words.iter_mut().step_by(geometry.l2_word(1)) {
            let entry = L2Entry(*word);
            let (L2Kind::Data(host) | L2Kind::ZeroAllocated(host)) = entry.kind(&geometry) else {
                continue;
            };
            let is_single = self.shadow.get(geometry.host_cluster(host)).await? == 1;
            if is_single != entry.is_copied() {
                *word ^= COPIED;
                changed = true;
            }
        }
        Ok(changed)
    }

    /// Writes a table to clusters of its own; nothing when it is empty.
    async fn store(&mut self, bytes: &[u8]) -> Result<Option<ClusterRun>, Failure> {
        if bytes.is_empty() {
            return Ok(None);
        }
        let geometry = self.image.geometry;
        let count = (bytes.len() as u64).div_ceil(geometry.cluster_size());
        let Contiguous {
            run,
            parts,
            skipped,
        } = self
            .image
            .allocate_contiguous(&self.quiet.structure, count)
            .await?;
        let unwanted: Vec<_> = skipped.iter().map(Reserved::run).collect();
        self.reserved.extend(parts.into_iter().chain(skipped));
        self.shadow.set_one(run).await?;
        for run in unwanted {
            self.keep_counted(run).await?;
        }
        let mut whole = bytes.to_vec();
        whole.resize((count << geometry.cluster_bits) as usize, 0);
        let offset = geometry.host_offset(run.first).0;
        self.image.write_bytes(offset, &whole).await?;
        Ok(Some(run))
    }

    /// Decides what becomes of the clusters that lost their references.
    async fn settle_dropped(
        &mut self,
        dropped: Dropped,
        readers: Readers,
        free: &mut Runs,
    ) -> Result<(), Failure> {
        for run in dropped.data.0.into_iter().chain(dropped.tables.0) {
            for cluster in (run.first.0..run.end()).map(HostCluster) {
                if self.shadow.get(cluster).await? != 0 {
                    continue;
                }
                match readers {
                    Readers::None => free.push_cluster(cluster),
                    Readers::Requests => {
                        let one = ClusterRun {
                            first: cluster,
                            count: 1,
                        };
                        self.keep_counted(one).await?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Writes the refcounts; the new refcount table and where it is.
    async fn finish(&mut self) -> Result<(Vec<u64>, ClusterRun), Failure> {
        let image = self.image;
        let old = {
            let state = image.state();
            let bytes = state.refcount_table.entries.len() as u64 * 8;
            image.clusters_of(state.refcount_table.offset, bytes)
        };
        // Its place first, as it has to be counted; growing the table meanwhile makes another one.
        let run = loop {
            let bytes = image.state().refcount_table.entries.len() * 8;
            let run = self
                .store(&vec![0; bytes])
                .await?
                .ok_or(Failure::Io(Errno::EINVAL))?;
            if image.state().refcount_table.entries.len() * 8 == bytes {
                break run;
            }
            self.leaving.push(run);
        };
        image.settle().await?;
        self.shadow.write().await?;
        let (entries, old_blocks) = self.shadow.table();
        let bytes: Vec<u8> = entries
            .iter()
            .flat_map(|entry| entry.to_be_bytes())
            .collect();
        let offset = image.geometry.host_offset(run.first).0;
        image.write_bytes(offset, &bytes).await?;
        let moved = image.state().refcount_table.offset;
        if image.geometry.host_cluster(moved) == old.first {
            self.leaving.push(old);
        } else {
            // Grown meanwhile: the table of before is freed already, the one between is not.
            let bytes = entries.len() as u64 * 8;
            self.leaving.push(image.clusters_of(moved, bytes));
        }
        for cluster in old_blocks.into_iter().chain(self.shadow.unused()) {
            self.leaving.push_cluster(cluster);
        }
        Ok((entries, run))
    }
}

impl Qcow2 {
    /// L1 entries of the active disk.
    pub(super) fn active_l1(&self) -> Vec<u64> {
        self.l1.iter().collect()
    }

    /// L1 entries of a snapshot.
    pub(super) async fn snapshot_l1(&self, entry: &SnapshotEntry) -> Result<Vec<u64>, Failure> {
        let length = entry.l1_entries as usize * 8;
        let bytes = read_bytes(&self.file, entry.l1_offset.0, length).await?;
        let words = bytes.chunks_exact(8);
        Ok(words
            .map(|word| u64::from_be_bytes(word.try_into().expect("chunks of eight bytes")))
            .collect())
    }

    /// Whether the image may still be written.
    pub(super) fn is_sound(&self) -> bool {
        !self.health.corrupt.load(Acquire) && !self.health.failed.load(Acquire)
    }

    /// Places of the tables that snapshots have.
    pub(in super::super) fn map_snapshots(&self, state: &mut super::super::State) {
        let table = &state.snapshots;
        if table.length != 0 {
            let run = self.clusters_of(table.offset, table.length);
            state.metadata.add_fixed(Fixed::SnapshotTable, run);
        }
        for entry in &table.entries {
            let run = self.clusters_of(entry.l1_offset, u64::from(entry.l1_entries) * 8);
            state.metadata.add_fixed(Fixed::SnapshotL1Table, run);
        }
    }
}
