//! A refcount structure written anew, when the old one cannot be corrected in place ("Host cluster
//! management").
//!
//! ```text
//!   ... everything there is ... | reserved | refcount blocks | refcount table |
//!                               ^ end of the file, or of the last reference
//! ```
//!
//! The new structure lies behind everything and counts itself; the old one it does not count. It is
//! durable before one write within a sector of the header switches to it, so a power cut leaves
//! either the old state, with a longer file, or the new one.

use super::super::header::field;
use super::super::refcount::set_in_bytes;
use super::super::tables::{ClusterRun, HostCluster, HostOffset, MAX_REFCOUNT_TABLE_BYTES};
use super::layout::Extent;
use super::{Check, Refcounts};
use block::{CheckResult, Errno, Repair};

/// What a rebuild has made.
pub(super) struct Rebuilt {
    /// One past the last cluster in use.
    pub(super) end: HostCluster,
    /// The first of the reserved clusters.
    pub(super) reserved: HostCluster,
}

/// Where the new structure goes.
struct Plan {
    reserved: ClusterRun,
    blocks: ClusterRun,
    table: ClusterRun,
    /// Refcount table indices that need a block, in order.
    indices: Vec<u64>,
}

impl Check<'_> {
    /// Counts everything afresh without the old refcount structure, and writes a new one that has
    /// `reserve` clusters to spare. What is still wrong afterwards is in the result.
    pub(super) async fn rebuild_and_recount(&mut self, reserve: u64) -> Result<Rebuilt, Errno> {
        let old = self.result;
        let old_structure = std::mem::take(&mut self.refcount_clusters);
        self.result = CheckResult {
            leaks_fixed: old.leaks_fixed,
            corruptions_fixed: old.corruptions_fixed,
            check_errors: old.check_errors,
            total_clusters: old.total_clusters,
            ..CheckResult::default()
        };
        let clusters = self.layout.clusters(self.io.length());
        let max = self.layout.refcount_max();
        self.references = super::References::new(clusters, max, self.memory)?;
        self.walk_content(Repair::None).await?;
        let plan = self.plan(reserve)?;
        for run in [plan.reserved, plan.blocks, plan.table] {
            for cluster in run.first.0..run.end() {
                self.references.add(HostCluster(cluster), 1)?;
            }
        }
        self.write_structure(&plan).await?;
        self.refcounts = Refcounts::Usable;
        self.tell_of_old_structure(old_structure);
        let result = &mut self.result;
        result.corruptions_fixed += old.corruptions.saturating_sub(result.corruptions);
        result.leaks_fixed += old.leaks;
        Ok(Rebuilt {
            end: HostCluster(plan.table.end()),
            reserved: plan.reserved.first,
        })
    }

    /// The clusters of the old refcount structure are leaks, which are repaired with it.
    fn tell_of_old_structure(&mut self, mut old: Vec<HostCluster>) {
        old.retain(|cluster| cluster.0 < self.references.clusters());
        old.sort_unstable();
        for same in old.chunk_by(|one, other| one == other) {
            let used = self.references.get(same[0]);
            self.report.say(format_args!(
                "Repairing cluster {} refcount={} reference={used}",
                same[0].0,
                used + same.len() as u64
            ));
        }
    }

    /// Finds how many blocks and how large a table are needed, their own clusters included.
    fn plan(&self, reserve: u64) -> Result<Plan, Errno> {
        let bits = self.layout.refcount_block_bits();
        let start = self.references.clusters();
        let used = self.used_indices(start);
        let per_cluster = self.layout.cluster_size() / 8;
        let (mut block_count, mut table_count) = (used.len() as u64, 1);
        loop {
            let end = start + reserve + block_count + table_count;
            let own = (start >> bits)..=((end - 1) >> bits);
            let mut indices = used.clone();
            indices.extend(own.filter(|index| used.binary_search(index).is_err()));
            let most = (end - 1) >> bits;
            let blocks = indices.len() as u64;
            let tables = (most + 1).div_ceil(per_cluster);
            if tables * self.layout.cluster_size() > MAX_REFCOUNT_TABLE_BYTES {
                return Err(Errno::EFBIG);
            }
            if blocks <= block_count && tables <= table_count {
                let run = |first, count| ClusterRun {
                    first: HostCluster(first),
                    count,
                };
                return Ok(Plan {
                    reserved: run(start, reserve),
                    blocks: run(start + reserve, block_count),
                    table: run(start + reserve + block_count, table_count),
                    indices,
                });
            }
            block_count = block_count.max(blocks);
            table_count = table_count.max(tables);
        }
    }

    /// Indices of the refcount blocks that cover clusters in use.
    fn used_indices(&self, end: u64) -> Vec<u64> {
        let bits = self.layout.refcount_block_bits();
        let mut indices = Vec::new();
        let mut at = 0;
        while at < end {
            at = self.references.next_used(HostCluster(at)).0;
            if at < end && self.references.get(HostCluster(at)) != 0 {
                indices.push(at >> bits);
                at = ((at >> bits) + 1) << bits;
            } else {
                at += 1;
            }
        }
        indices
    }

    async fn write_structure(&mut self, plan: &Plan) -> Result<(), Errno> {
        let cluster_bits = self.layout.cluster_bits;
        let offset_of = |cluster: u64| cluster << cluster_bits;
        let entries = (plan.table.count << cluster_bits) / 8;
        let mut table = vec![0_u64; entries as usize];
        for (&index, cluster) in plan.indices.iter().zip(plan.blocks.first.0..) {
            let bytes = self.block_bytes(index);
            self.io.write(offset_of(cluster), &bytes).await?;
            table[index as usize] = offset_of(cluster);
        }
        let place = Extent {
            offset: HostOffset(offset_of(plan.table.first.0)),
            bytes: plan.table.count << cluster_bits,
        };
        let bytes: Vec<u8> = table.iter().flat_map(|word| word.to_be_bytes()).collect();
        self.io.write(place.offset.0, &bytes).await?;
        self.io.flush().await?;
        let clusters = plan.table.count as u32;
        let fields = [&place.offset.0.to_be_bytes()[..], &clusters.to_be_bytes()].concat();
        let at = field::REFCOUNT_TABLE_OFFSET as u64;
        self.io.write(at, &fields).await?;
        self.io.flush().await?;
        self.layout.refcount_table = place;
        self.refcount_table = table;
        Ok(())
    }

    /// The refcount block that counts what is counted in memory.
    fn block_bytes(&self, index: u64) -> Vec<u8> {
        let bits = self.layout.refcount_block_bits();
        let mut bytes = vec![0; self.layout.cluster_size() as usize];
        let (first, end) = (index << bits, (index + 1) << bits);
        let mut at = self.references.next_used(HostCluster(first)).0;
        while at < end.min(self.references.clusters()) {
            let count = self.references.get(HostCluster(at));
            if count != 0 {
                set_in_bytes(&mut bytes, self.layout.refcount_order, at - first, count);
            }
            at = self.references.next_used(HostCluster(at + 1)).0;
        }
        bytes
    }
}
