//! Refcount blocks for long runs.
//!
//! A refcount block that is made on the way lies in the range that it covers, where a run that is
//! longer than the range would end. Such a run has its blocks made before it:
//!
//! ```text
//!   ... | blocks of 2 and 3 | run ....................................|
//!          range 1              |        range 2        |   range 3
//! ```
//!
//! They are counted by the blocks that are there. Those counts are durable (or the image is marked,
//! `lazy.rs`) before the refcount table refers to a new block, so that no power cut leaves a block in
//! use that is not counted.

use super::Qcow2;
use super::alloc::{Reserved, Structure, Use, Want};
use super::lazy::Scope;
use super::redo::RedoRecord;
use super::tables::{ClusterRun, HostCluster, MAX_HOST_OFFSET};
use executor::Errno;

/// Most blocks that are made at once.
const MAX_BLOCKS: usize = 256;

/// What is missing for the clusters from the end of the file on.
enum Lack {
    Nothing,
    /// A refcount table that goes further, from this cluster on.
    Table(HostCluster),
    /// The refcount block for the end of the file.
    First(ClusterRun),
    /// Those at these indices of the table, behind the first.
    Blocks(Vec<u64>),
}

impl Qcow2 {
    /// Whether a run is longer than what a refcount block is made for on the way.
    pub(super) fn needs_cover(&self, clusters: u64) -> bool {
        clusters >= 1 << self.geometry.refcount_block_bits()
    }

    /// Whether all of `run` can be counted.
    pub(super) fn is_covered(&self, run: ClusterRun) -> bool {
        let state = self.state();
        let mut indices = self.table_indices(run);
        indices.all(|index| state.refcount_table.block(index) != 0)
    }

    /// Sees to it that `count` clusters from the end of the file on can be counted.
    pub(super) async fn cover(&self, structure: &Structure<'_>, count: u64) -> Result<(), Errno> {
        loop {
            match self.lack(count)? {
                Lack::Nothing => return Ok(()),
                Lack::Table(first) => self.grow_refcount_table(structure, first, count).await?,
                Lack::First(run) => self.create_refcount_block(structure, run).await?,
                Lack::Blocks(indices) => self.add_refcount_blocks(structure, &indices).await?,
            }
        }
    }

    fn table_indices(&self, run: ClusterRun) -> impl Iterator<Item = u64> + use<> {
        let geometry = &self.geometry;
        let last = HostCluster(run.end().saturating_sub(1));
        geometry.refcount_table_index(run.first)..geometry.refcount_table_index(last) + 1
    }

    fn lack(&self, count: u64) -> Result<Lack, Errno> {
        let state = self.state();
        let first = state.allocator.append;
        let most = MAX_HOST_OFFSET >> self.geometry.cluster_bits;
        if first.checked_add(count).is_none_or(|end| end > most) {
            return Err(Errno::EFBIG);
        }
        let run = |count| ClusterRun {
            first: HostCluster(first),
            count,
        };
        let entries = state.refcount_table.entries.len() as u64;
        if self.table_indices(run(count)).any(|index| index >= entries) {
            let covered_end = entries << self.geometry.refcount_block_bits();
            return Ok(Lack::Table(HostCluster(first.max(covered_end))));
        }
        if state
            .refcount_table
            .block(self.geometry.refcount_table_index(HostCluster(first)))
            == 0
        {
            return Ok(Lack::First(run(0)));
        }
        let indices = self.table_indices(run(count));
        let missing = indices.filter(|index| state.refcount_table.block(*index) == 0);
        let missing: Vec<u64> = missing.take(MAX_BLOCKS).collect();
        Ok(match missing.is_empty() {
            true => Lack::Nothing,
            false => Lack::Blocks(missing),
        })
    }

    /// Adds the refcount blocks at `indices` of the table, which count nothing yet.
    async fn add_refcount_blocks(
        &self,
        structure: &Structure<'_>,
        indices: &[u64],
    ) -> Result<(), Errno> {
        let mut blocks = Vec::with_capacity(indices.len());
        let made = self.write_empty_blocks(structure, indices.len(), &mut blocks);
        if let Err(errno) = made.await {
            blocks.into_iter().for_each(Reserved::give_back);
            return Err(errno);
        }
        for (&index, block) in indices.iter().zip(blocks) {
            self.hook_up(index, block).await?;
        }
        Ok(())
    }

    async fn write_empty_blocks<'q>(
        &'q self,
        structure: &Structure<'_>,
        count: usize,
        blocks: &mut Vec<Reserved<'q>>,
    ) -> Result<(), Errno> {
        let empty = vec![0; self.geometry.cluster_size() as usize];
        while blocks.len() < count {
            let want = Want::one(Use::RefcountBlock);
            let (run, _) = self.allocate_in(structure, want).await?;
            blocks.push(Reserved::new(self, run));
            let place = self.geometry.host_offset(run.first);
            self.write_bytes(place.0, &empty).await?;
        }
        self.flush_scope(Scope::Mapping).await
    }

    /// Has the refcount table refer to `block`, unless another was made for the same range meanwhile.
    async fn hook_up(&self, index: u64, block: Reserved<'_>) -> Result<(), Errno> {
        if self.state().refcount_table.block(index) != 0 {
            block.give_back();
            return Ok(());
        }
        let run = block.run();
        let value = self.geometry.host_offset(run.first).0;
        let records = [
            RedoRecord::Refcount { run, value: 1 },
            RedoRecord::RefcountTable { index, value },
        ];
        let changed = self.log_change(&records, |state| {
            state.refcount_table.set(index, value);
            state.metadata.add_refcount_block(run.first);
        });
        let result = changed.await;
        match result {
            Ok(()) => block.keep(),
            Err(_) => block.give_back(),
        }
        result
    }
}
