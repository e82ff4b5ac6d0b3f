//! Allocation of host clusters.
//!
//! ```text
//!   0 ........ scan ................ append ........ (no refcount blocks yet)
//!     no free    may have holes        free from here on
//! ```
//!
//! Clusters below `append` are looked through once, a slice of refcounts per allocation, so that
//! holes are found without ever stalling a request; when the slice has none, the allocation takes
//! the clusters at `append`, which keeps sequential writes sequential. Holes shorter than what is
//! asked for are passed by: a write stays in one piece. Freed clusters move `scan` back.
//!
//! Looking and taking is synchronous under the state lock; what it lacks (a refcount slice that is
//! not cached, a refcount block that does not exist) is named by [`Need`] and made by the async
//! caller, who holds `structure`. A new refcount block lies in the range that it covers and counts
//! itself, behind the clusters that it is made for; it is on disk before the refcount table entry
//! that refers to it. Runs that are longer than such a range: `cover.rs`.

use super::cache::Pinned;
use super::lazy::Scope;
use super::overlap::Fixed;
use super::reclaim::DiscardKind;
use super::redo::RedoRecord;
use super::tables::{
    ClusterRun, HostCluster, HostOffset, MAX_HOST_OFFSET, MAX_REFCOUNT_TABLE_BYTES,
    REFCOUNT_BLOCK_MASK,
};
use super::{Qcow2, SECTOR, State, header, refcount};
use block::ByteRange;
use block::Event;
use block::events::Corruption;
use executor::Errno;
use executor::sync::MutexGuard;
use std::sync::atomic::Ordering::AcqRel;

/// Refcounts looked at for one allocation past `append` before the image is called corrupt.
const MAX_APPEND_SCAN: u64 = 1 << 24;

/// Where to look for free clusters.
pub(super) struct Allocator {
    /// No cluster below is known to be free.
    pub(super) scan: u64,
    /// Clusters from here on are free unless their refcount says otherwise. They lie beyond the end
    /// that the file had when it was opened, and this driver has not allocated them since: `append`
    /// only goes up, past whatever is allocated, written or replayed.
    pub(super) append: u64,
}

/// What the storage of a planned write holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Storage {
    /// Zeroes: clusters that nobody ever wrote to, in a file that a write past its end fills with
    /// zeroes. A predecessor that was killed may have written to clusters that nothing refers to,
    /// but not beyond the end the file had when this process opened it; an earlier write of this
    /// process that failed or was dropped has moved `append` past its clusters.
    Zeroes,
    /// Anything. A cluster that was freed and discarded is no better: `discard=ignore`, failed
    /// discards and hosts that promise nothing look alike from here.
    Anything,
}

/// Clusters allocated and not yet referred to. Dropped with its future, what writes to them may
/// still be under way: they stay counted until the image is closed.
pub(super) struct Reserved<'q> {
    image: &'q Qcow2,
    run: ClusterRun,
    held: bool,
}

impl<'q> Reserved<'q> {
    pub(super) fn new(image: &'q Qcow2, run: ClusterRun) -> Self {
        Self {
            image,
            run,
            held: true,
        }
    }
    pub(super) fn run(&self) -> ClusterRun {
        self.run
    }
    /// Something refers to them now.
    pub(super) fn keep(mut self) {
        self.held = false;
    }
    /// Nothing will, and nothing writes to them.
    pub(super) fn give_back(mut self) {
        self.held = false;
        self.image.state().give_back(self.run);
    }
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        if self.held {
            self.image.state().abandoned.push(self.run);
        }
    }
}

/// What clusters are allocated for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    L2Table,
    RefcountBlock,
    CompressedCluster,
    /// Data, and structures that messages do not name.
    Other,
}

impl Use {
    /// What messages call it.
    const fn text(self) -> Option<&'static str> {
        match self {
            Self::L2Table => Some("L2 table"),
            Self::RefcountBlock => Some("refcount block"),
            Self::CompressedCluster => Some("compressed cluster"),
            Self::Other => None,
        }
    }
}

/// What is asked of an allocation.
#[derive(Clone, Copy, Debug)]
pub(super) struct Want {
    /// Contiguous clusters, at most.
    clusters: u64,
    usage: Use,
}

impl Want {
    /// One cluster.
    pub(super) const fn one(usage: Use) -> Self {
        Self { clusters: 1, usage }
    }
}

impl From<u64> for Want {
    fn from(clusters: u64) -> Self {
        let usage = Use::Other;
        Self { clusters, usage }
    }
}

/// Contiguous clusters, allocated in parts.
pub(super) struct Contiguous<'q> {
    pub(super) run: ClusterRun,
    pub(super) parts: Vec<Reserved<'q>>,
    /// Allocated on the way, too short by themselves: the caller gives them back.
    pub(super) skipped: Vec<Reserved<'q>>,
}

/// What a synchronous step under the state lock lacks.
pub(super) enum Need {
    /// This slice of refcounts in the cache.
    Slice(u64),
    /// A refcount block for the range around these free clusters, which may end beyond it.
    Block(ClusterRun),
    /// Nothing helps.
    Fail(Errno),
    /// The image is found corrupt.
    Corrupt(Corruption),
}

/// Holds [`Qcow2::structure`].
pub(super) type Structure<'q> = MutexGuard<'q, ()>;

impl Qcow2 {
    /// Allocates up to `want` contiguous clusters, at least one, with refcount one. The change of
    /// the refcounts is logged together with what will refer to them.
    pub(super) async fn allocate(
        &self,
        want: impl Into<Want>,
    ) -> Result<(ClusterRun, Storage), Errno> {
        let want = want.into();
        self.event(Event::ClusterAlloc).await;
        let attempt = self.try_allocate(&mut self.state(), want);
        if let Ok(allocated) = attempt {
            return Ok(allocated);
        }
        let structure = self.structure.lock().await;
        self.allocate_in(&structure, want).await
    }

    /// [`Qcow2::allocate`] for a caller that holds `structure`.
    pub(super) async fn allocate_in(
        &self,
        structure: &Structure<'_>,
        want: impl Into<Want>,
    ) -> Result<(ClusterRun, Storage), Errno> {
        let want = want.into();
        let mut pins = Pins::default();
        loop {
            let attempt = self.try_allocate(&mut self.state(), want);
            match attempt {
                Ok(allocated) => return Ok(allocated),
                Err(need) => self.provide(structure, need, &mut pins).await?,
            }
        }
    }

    /// Makes what a synchronous step lacked.
    pub(super) async fn provide<'q>(
        &'q self,
        structure: &Structure<'_>,
        need: Need,
        pins: &mut Pins<'q>,
    ) -> Result<(), Errno> {
        match need {
            Need::Slice(index) => {
                let slice = self.load_refcounts(index).await?;
                pins.keep(slice);
                Ok(())
            }
            Need::Block(run) => self.create_refcount_block(structure, run).await,
            Need::Fail(errno) => Err(errno),
            Need::Corrupt(found) => Err(self.corruption_found(found).await),
        }
    }

    /// The cached slice `index` of refcounts; its block must exist.
    async fn load_refcounts(&self, index: u64) -> Result<Pinned<'_>, Errno> {
        let table_index = self.geometry.refcount_table_index_of_slice(index);
        let block = self.refcount_block_place(table_index).await?;
        let offset = HostOffset(block.0 + self.geometry.refcount_slice_offset(index));
        self.load(&self.refcounts, index, offset).await
    }

    /// Where the refcount block is that the table refers to; the image is corrupt when there can be none.
    pub(super) async fn refcount_block_place(&self, table_index: u64) -> Result<HostOffset, Errno> {
        let block = self.state().refcount_table.block(table_index);
        let wrong = match self.geometry.is_aligned(block) {
            false => "unaligned",
            true if block == 0 || block >= MAX_HOST_OFFSET => "invalid",
            true => return Ok(HostOffset(block)),
        };
        let what = format!("Refblock offset {block:#x} {wrong} (reftable index: {table_index:#x})");
        Err(self.corruption(what).await)
    }

    fn try_allocate(&self, state: &mut State, want: Want) -> Result<(ClusterRun, Storage), Need> {
        let Want { clusters, usage } = want;
        let (run, storage) = match self.find_hole(state, clusters)? {
            Some(run) => (run, Storage::Anything),
            None => {
                let storage = match self.file.node().grows() {
                    true => Storage::Zeroes,
                    false => Storage::Anything,
                };
                (self.find_at_end(state, clusters)?, storage)
            }
        };
        if let Some(found) = self.misplaced(state, run, usage) {
            return Err(Need::Corrupt(found));
        }
        self.set_refcounts(run, 1)?;
        if run.first.0 == state.allocator.scan {
            state.allocator.scan = run.end();
        }
        state.allocator.append = state.allocator.append.max(run.end());
        let end = run.end() << self.geometry.cluster_bits;
        self.host_end.fetch_max(end, AcqRel);
        Ok((run, storage))
    }

    /// Looks through one slice of refcounts below `append`.
    fn find_hole(&self, state: &mut State, want: u64) -> Result<Option<ClusterRun>, Need> {
        let Allocator { scan, append } = state.allocator;
        if scan >= append {
            return Ok(None);
        }
        let end = self
            .geometry
            .refcount_slice_end(HostCluster(scan))
            .min(append);
        let table_index = self.geometry.refcount_table_index(HostCluster(scan));
        if state.refcount_table.block(table_index) == 0 {
            state.allocator.scan = end;
            return Ok(None);
        }
        let slice = self.cached_refcounts(HostCluster(scan))?;
        let run = self.free_run(&slice, scan..end, want);
        state.allocator.scan = run.map_or(end, |run| run.first.0);
        Ok(run)
    }

    /// Finds the first free clusters at or after `append`.
    fn find_at_end(&self, state: &mut State, want: u64) -> Result<ClusterRun, Need> {
        let start = state.allocator.append;
        let mut from = start;
        while from - start < MAX_APPEND_SCAN {
            if from >= MAX_HOST_OFFSET >> self.geometry.cluster_bits {
                return Err(Need::Fail(Errno::EFBIG));
            }
            let cluster = HostCluster(from);
            let table_index = self.geometry.refcount_table_index(cluster);
            if state.refcount_table.block(table_index) == 0 {
                return Err(Need::Block(ClusterRun {
                    first: cluster,
                    count: want,
                }));
            }
            let slice = self.cached_refcounts(cluster)?;
            let end = self.geometry.refcount_slice_end(cluster);
            if let Some(run) = self.free_run(&slice, from..end, want) {
                return Ok(run);
            }
            from = end;
            state.allocator.append = from;
        }
        Err(Need::Corrupt(
            "refcounts far beyond the end of the file".into(),
        ))
    }

    /// The first run of `want` free clusters in `range`, which `slice` covers, or fewer at its end, where more may follow.
    fn free_run(
        &self,
        slice: &Pinned<'_>,
        range: std::ops::Range<u64>,
        want: u64,
    ) -> Option<ClusterRun> {
        let order = self.geometry.refcount_order;
        let is_free = |cluster: &u64| {
            let position = self.geometry.refcount_position(HostCluster(*cluster));
            refcount::get(slice, order, position) == 0
        };
        let mut from = range.start;
        loop {
            let first = (from..range.end).find(is_free)?;
            let most = range.end.min(first.saturating_add(want));
            let end = (first..most).find(|cluster| !is_free(cluster));
            let Some(end) = end else {
                let first = HostCluster(first);
                let count = most - first.0;
                return Some(ClusterRun { first, count });
            };
            from = end;
        }
    }

    fn cached_refcounts(&self, cluster: HostCluster) -> Result<Pinned<'_>, Need> {
        let index = self.geometry.refcount_slice(cluster);
        self.refcounts.pin(index).ok_or(Need::Slice(index))
    }

    /// The refcount of a cluster, from cached slices.
    pub(super) fn refcount(&self, state: &State, cluster: HostCluster) -> Result<u64, Need> {
        let table_index = self.geometry.refcount_table_index(cluster);
        if state.refcount_table.block(table_index) == 0 {
            return Ok(0);
        }
        let slice = self.cached_refcounts(cluster)?;
        let position = self.geometry.refcount_position(cluster);
        Ok(refcount::get(
            &slice,
            self.geometry.refcount_order,
            position,
        ))
    }

    /// Sets the refcounts of a run whose blocks exist; all or nothing.
    pub(super) fn set_refcounts(&self, run: ClusterRun, value: u64) -> Result<(), Need> {
        let geometry = &self.geometry;
        if value > geometry.refcount_max() {
            return Err(Need::Fail(Errno::EINVAL));
        }
        let mut slices = smallvec::SmallVec::<[_; 2]>::new();
        let mut from = run.first.0;
        while from < run.end() {
            slices.push(self.cached_refcounts(HostCluster(from))?);
            from = geometry.refcount_slice_end(HostCluster(from));
        }
        for cluster in (run.first.0..run.end()).map(HostCluster) {
            let number = geometry.refcount_slice(cluster) - geometry.refcount_slice(run.first);
            let position = geometry.refcount_position(cluster);
            let slice = &slices[number as usize];
            refcount::set(slice, geometry.refcount_order, position, value);
        }
        Ok(())
    }

    /// Adds a refcount block for the range around the start of `wanted`: behind it, or there when it ends
    /// beyond the range.
    pub(super) async fn create_refcount_block(
        &self,
        structure: &Structure<'_>,
        wanted: ClusterRun,
    ) -> Result<(), Errno> {
        let table_index = self.geometry.refcount_table_index(wanted.first);
        if table_index >= self.state().refcount_table.entries.len() as u64 {
            return self.grow_refcount_table(structure, wanted.first, 0).await;
        }
        let range_end = (table_index + 1) << self.geometry.refcount_block_bits();
        let behind = wanted.first.0.saturating_add(wanted.count);
        let cluster = match behind < range_end {
            true => HostCluster(behind),
            false => wanted.first,
        };
        let run = ClusterRun {
            first: cluster,
            count: 1,
        };
        self.check_free_of_metadata(run, Use::RefcountBlock).await?;
        self.event(Event::RefblockAlloc).await;
        let started = Started(self, run);
        let offset = self.geometry.host_offset(cluster);
        let mut block = vec![0; self.geometry.cluster_size() as usize];
        let in_block = cluster.0 & ((1 << self.geometry.refcount_block_bits()) - 1);
        refcount::set_in_bytes(&mut block, self.geometry.refcount_order, in_block, 1);
        self.event(Event::RefblockAllocWrite).await;
        self.write_bytes(offset.0, &block).await?;
        self.event(Event::RefblockAllocHookup).await;
        let record = RedoRecord::RefcountTable {
            index: table_index,
            value: offset.0,
        };
        loop {
            if self.log_and(&[record], |state| {
                state.refcount_table.set(table_index, offset.0);
                state.metadata.add_refcount_block(cluster);
            }) {
                break;
            }
            self.flush_scope(Scope::Mapping).await?;
        }
        // Its refcount keeps allocations off it, and those in front of it hold zeroes.
        std::mem::forget(started);
        self.host_end
            .fetch_max(offset.0 + self.geometry.cluster_size(), AcqRel);
        Ok(())
    }

    async fn check_free_of_metadata(&self, run: ClusterRun, usage: Use) -> Result<(), Errno> {
        let found = self.misplaced(&self.state(), run, usage);
        match found {
            None => Ok(()),
            Some(found) => Err(self.corruption_found(found).await),
        }
    }

    /// New clusters lie where there is metadata already. The header's is nobody else's, whatever is
    /// checked.
    fn misplaced(&self, state: &State, run: ClusterRun, usage: Use) -> Option<Corruption> {
        let at_header = run.first.0 == 0;
        let what = state.metadata.overlap(run);
        let what = what.or(at_header.then_some("qcow2_header"))?;
        let message = match (at_header, usage.text()) {
            (true, Some(name)) => format!("Preventing invalid allocation of {name} at offset 0"),
            _ => format!("Preventing invalid write on metadata (overlaps with {what})"),
        };
        let bits = self.geometry.cluster_bits;
        Some(Corruption {
            message,
            range: Some(ByteRange::new(run.first.0 << bits, run.count << bits)),
        })
    }

    /// Moves the refcount table to a larger place at `first`, beyond all that it covers now,
    /// together with the refcount blocks for that place. It has entries for `followed_by` clusters
    /// behind that. Durable when it resolves.
    pub(super) async fn grow_refcount_table(
        &self,
        _structure: &Structure<'_>,
        first: HostCluster,
        followed_by: u64,
    ) -> Result<(), Errno> {
        self.event(Event::ReftableGrow).await;
        let geometry = &self.geometry;
        let plan = TablePlan::new((first, followed_by), geometry).ok_or(Errno::EFBIG)?;
        let everything = ClusterRun {
            first,
            count: plan.blocks + plan.table_clusters,
        };
        self.check_free_of_metadata(everything, Use::Other).await?;
        let cluster_size = geometry.cluster_size();
        let per_block_bits = geometry.refcount_block_bits();
        let first_index = geometry.refcount_table_index(first);
        for number in 0..plan.blocks {
            let mut block = vec![0; cluster_size as usize];
            let covered = (first_index + number) << per_block_bits;
            let covered = covered..covered + (1 << per_block_bits);
            let counted = covered.start.max(first.0)..covered.end.min(everything.end());
            for cluster in counted {
                let position = cluster - covered.start;
                refcount::set_in_bytes(&mut block, geometry.refcount_order, position, 1);
            }
            let offset = geometry.host_offset(HostCluster(first.0 + number)).0;
            self.event(Event::RefblockAllocWriteBlocks).await;
            self.write_bytes(offset, &block).await?;
        }
        let mut entries = self.state().refcount_table.entries.clone();
        entries.resize((plan.table_clusters * cluster_size / 8) as usize, 0);
        for number in 0..plan.blocks {
            let block = geometry.host_offset(HostCluster(first.0 + number)).0;
            entries[(first_index + number) as usize] = block;
        }
        let table = geometry.host_offset(HostCluster(first.0 + plan.blocks));
        let bytes: Vec<u8> = entries
            .iter()
            .flat_map(|entry| entry.to_be_bytes())
            .collect();
        self.event(Event::RefblockAllocWriteTable).await;
        self.write_bytes(table.0, &bytes).await?;
        self.file.node().flush().await?;
        let mut field = table.0.to_be_bytes().to_vec();
        field.extend_from_slice(&(plan.table_clusters as u32).to_be_bytes());
        let at = header::field::REFCOUNT_TABLE_OFFSET as u64;
        self.event(Event::RefblockAllocSwitchTable).await;
        self.write_bytes(at, &field).await?;
        self.file.node().flush().await?;
        self.adopt_refcount_table(table, entries, everything);
        Ok(())
    }

    /// The header refers to the new table: use it and free the old one.
    fn adopt_refcount_table(&self, table: HostOffset, entries: Vec<u64>, all: ClusterRun) {
        let geometry = &self.geometry;
        let mut state = self.state();
        let old = ClusterRun {
            first: geometry.host_cluster(state.refcount_table.offset),
            count: (state.refcount_table.entries.len() as u64 * 8) >> geometry.cluster_bits,
        };
        let table_clusters = (entries.len() as u64 * 8) >> geometry.cluster_bits;
        state.refcount_table.offset = table;
        state.refcount_table.entries = entries;
        state.refcount_table.dirty.clear();
        state.metadata.move_fixed(
            Fixed::RefcountTable,
            ClusterRun {
                first: geometry.host_cluster(table),
                count: table_clusters,
            },
        );
        for cluster in all.first.0..all.end() - table_clusters {
            state.metadata.add_refcount_block(HostCluster(cluster));
        }
        state.allocator.append = state.allocator.append.max(all.end());
        self.host_end
            .fetch_max(all.end() << geometry.cluster_bits, AcqRel);
        state.free(old, DiscardKind::Other);
    }
}

/// Clusters that are written to before anything counts them. Dropped, nobody takes them for zeroes.
struct Started<'q>(&'q Qcow2, ClusterRun);

impl Drop for Started<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.allocator.append = state.allocator.append.max(self.1.end());
    }
}

/// How large a grown refcount table and its own refcount blocks are, in clusters.
struct TablePlan {
    blocks: u64,
    table_clusters: u64,
}

impl TablePlan {
    /// `None` when the specification's cap is reached.
    fn new((first, followed_by): (HostCluster, u64), geometry: &super::Geometry) -> Option<Self> {
        let cluster_size = geometry.cluster_size();
        let first_index = geometry.refcount_table_index(first);
        let (mut blocks, mut table_clusters) = (1, 1);
        loop {
            let last = HostCluster(first.0 + blocks + table_clusters - 1);
            let last_index = geometry.refcount_table_index(last);
            let most = MAX_REFCOUNT_TABLE_BYTES / cluster_size;
            let followed = HostCluster(last.0.checked_add(followed_by)?);
            let covered = geometry.refcount_table_index(followed) + 1;
            let least = (covered * 8).div_ceil(cluster_size);
            let roomy = (covered * 12).div_ceil(cluster_size).min(most);
            if least > most {
                return None;
            }
            let needed = last_index - first_index + 1;
            if needed <= blocks && least <= table_clusters {
                return Some(Self {
                    blocks: needed.max(blocks),
                    table_clusters,
                });
            }
            blocks = blocks.max(needed);
            table_clusters = table_clusters.max(roomy);
        }
    }
}

impl super::RefcountTable {
    /// Offset of the refcount block at `index`; 0 when there is none.
    pub(super) fn block(&self, index: u64) -> u64 {
        let entry = self.entries.get(index as usize).copied().unwrap_or(0);
        entry & REFCOUNT_BLOCK_MASK
    }
    pub(super) fn set(&mut self, index: u64, value: u64) {
        self.entries[index as usize] = value;
        self.dirty.insert(index * 8 / SECTOR);
    }
}

/// Refcount slices kept cached over a retry; a few, so that the cache cannot fill with them.
#[derive(Default)]
pub(super) struct Pins<'q> {
    slices: std::collections::VecDeque<Pinned<'q>>,
}

impl<'q> Pins<'q> {
    fn keep(&mut self, slice: Pinned<'q>) {
        if self.slices.len() == 4 {
            self.slices.pop_front();
        }
        self.slices.push_back(slice);
    }
}
