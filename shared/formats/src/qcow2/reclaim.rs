//! Giving clusters back.
//!
//! ```text
//!   mapping changed ─► freed ─(flush: the change is durable)─► reclaimable
//!     ─(every request begun before the free has ended)─► host discard ─► refcount decremented
//! ```
//!
//! Until the last step the cluster stays counted, so nobody can take it while an old mapping on
//! disk or a request in flight still refers to it.

use super::alloc::{Need, Pins, Structure};
use super::redo::RedoRecord;
use super::tables::ClusterRun;
use super::{Qcow2, State};
use block::ByteRange;
use block::epoch::{self, Epoch};
use executor::Errno;

/// Clusters that lost a reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Freed {
    run: ClusterRun,
    /// Requests begun up to here may still use them.
    epoch: Epoch,
}

impl State {
    /// A reference to `run` is gone from the metadata in memory.
    pub(super) fn free(&mut self, run: ClusterRun) {
        let epoch = epoch::current();
        self.freed.push(Freed { run, epoch });
    }

    /// `run` was allocated and nothing on disk ever referred to it.
    pub(super) fn give_back(&mut self, run: ClusterRun) {
        let epoch = epoch::current();
        self.reclaimable.push_back(Freed { run, epoch });
    }
}

impl Qcow2 {
    /// Decrements the refcounts of up to `most` runs that nobody can use any more. What cannot be
    /// done now stays for the next time; a failure is no failure of the caller's.
    pub(super) async fn reclaim(&self, most: usize) {
        if self.state().reclaimable.is_empty() {
            return;
        }
        let Some(structure) = self.structure.try_lock() else {
            return;
        };
        for _ in 0..most {
            let next = self.state().reclaimable.front().copied();
            let Some(freed) = next.filter(|freed| epoch::passed(freed.epoch)) else {
                return;
            };
            if let Err(errno) = self.reclaim_one(&structure, freed).await {
                tracing::warn!(%errno, run = ?freed.run, "freed clusters not given back");
                return;
            }
        }
    }

    async fn reclaim_one(&self, structure: &Structure<'_>, freed: Freed) -> Result<(), Errno> {
        let bits = self.geometry.cluster_bits;
        let range = ByteRange::new(freed.run.first.0 << bits, freed.run.count << bits);
        // Losing the space is all that a failed discard means.
        let _ = self.file.node().discard(range).await;
        let mut pins = Pins::default();
        let mut done = 0;
        while done < freed.run.count {
            let rest = ClusterRun {
                first: super::tables::HostCluster(freed.run.first.0 + done),
                count: freed.run.count - done,
            };
            match self.decrement(rest, freed) {
                Ok(count) => done += count,
                Err(need) => self.provide(structure, need, &mut pins).await?,
            }
        }
        Ok(())
    }

    /// Decrements the refcounts of the part of `run` that lies in one cached slice.
    fn decrement(&self, run: ClusterRun, whole: Freed) -> Result<u64, Need> {
        let geometry = &self.geometry;
        let mut state = self.state();
        let count = run
            .count
            .min(geometry.refcount_slice_end(run.first) - run.first.0);
        let clusters = (run.first.0..run.first.0 + count).map(super::tables::HostCluster);
        for first in clusters {
            let refcount = self.refcount(&state, first)?;
            let Some(value) = refcount.checked_sub(1) else {
                let offset = geometry.host_offset(first).0;
                let what = format!("cluster at {offset:#x} was in use but not counted");
                state.reclaimable.pop_front();
                return Err(Need::Corrupt(what));
            };
            let one = ClusterRun { first, count: 1 };
            self.set_refcounts(one, value)?;
            let record = RedoRecord::Refcount { run: one, value };
            // Without room in the log, a kill before the next flush leaks the cluster.
            let _ = self.log.append(&[record.encode()]);
            if value == 0 {
                state.allocator.scan = state.allocator.scan.min(first.0);
            }
        }
        if run.first.0 + count == whole.run.end() {
            state.reclaimable.pop_front();
        }
        Ok(count)
    }
}
