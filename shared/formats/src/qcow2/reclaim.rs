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
use super::tables::{ClusterRun, HostCluster};
use super::{Qcow2, State};
use block::ByteRange;
use block::epoch::{self, Epoch};
use executor::Errno;

/// Freed runs given back in the course of one flush.
pub(super) const RECLAIM_PER_FLUSH: usize = 64;

/// Clusters that lost a reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Freed {
    run: ClusterRun,
    /// Requests begun up to here may still use them.
    epoch: Epoch,
    pass: DiscardKind,
}

/// Why clusters are given up: whether the host is told depends on it (the `pass-discard-*` options).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DiscardKind {
    /// The guest discarded or zeroed them.
    Request,
    /// A snapshot was deleted.
    Snapshot,
    /// The image's own structures moved.
    Other,
    /// Their place was taken by a write, or they were never used: the space is wanted again soon.
    Never,
    /// The disk became smaller, or gave all of its content up.
    Always,
}

impl DiscardKind {
    const ALL: [Self; 5] = [
        Self::Other,
        Self::Request,
        Self::Snapshot,
        Self::Never,
        Self::Always,
    ];

    /// For the redo log.
    pub(super) fn number(self) -> u64 {
        Self::ALL.iter().position(|kind| *kind == self).unwrap_or(0) as u64
    }

    pub(super) fn from_number(number: u64) -> Self {
        let known = usize::try_from(number)
            .ok()
            .and_then(|number| Self::ALL.get(number));
        known.copied().unwrap_or(Self::Other)
    }
}

/// Which discards reach the host (`pass-discard-request`, `-snapshot`, `-other`), and what guests'
/// discards leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiscardPolicy {
    /// Of clusters that the guest discarded.
    pub request: bool,
    /// Of clusters that only a deleted snapshot used.
    pub snapshot: bool,
    /// Of other clusters.
    pub other: bool,
    /// The guest's discards leave clusters where they are, marked as zero (`discard-no-unref`).
    pub keeps_clusters: bool,
}

impl Default for DiscardPolicy {
    fn default() -> Self {
        Self {
            request: true,
            snapshot: true,
            other: false,
            keeps_clusters: false,
        }
    }
}

impl DiscardPolicy {
    pub(super) const fn passes(&self, kind: DiscardKind) -> bool {
        match kind {
            DiscardKind::Request => self.request,
            DiscardKind::Snapshot => self.snapshot,
            DiscardKind::Other => self.other,
            DiscardKind::Never => false,
            DiscardKind::Always => true,
        }
    }
}

/// Whether requests may be under way.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Requests {
    MayRun,
    /// The image is being closed: all have ended.
    Ended,
}

impl State {
    /// A reference to `run` is gone from the metadata in memory.
    pub(super) fn free(&mut self, run: ClusterRun, pass: DiscardKind) {
        let epoch = epoch::current();
        self.freed.push(Freed { run, epoch, pass });
    }

    /// `run` was allocated and nothing on disk ever referred to it.
    pub(super) fn give_back(&mut self, run: ClusterRun) {
        let epoch = epoch::current();
        let pass = DiscardKind::Never;
        self.reclaimable.push_back(Freed { run, epoch, pass });
    }
}

impl Qcow2 {
    /// Decrements the refcounts of up to `most` runs that nobody can use any more. What cannot be
    /// done now stays for the next time; a failure is no failure of the caller's.
    pub(super) async fn reclaim(&self, requests: Requests, most: usize) {
        if self.state().reclaimable.is_empty() {
            return;
        }
        let structure = match requests {
            Requests::MayRun => self.structure.try_lock(),
            // Upkeep may still be at it; nobody comes after this.
            Requests::Ended => Some(self.structure.lock().await),
        };
        let Some(structure) = structure else {
            return;
        };
        for _ in 0..most {
            let next = self.state().reclaimable.front().copied();
            let is_ready =
                |freed: &Freed| requests == Requests::Ended || epoch::passed(freed.epoch);
            let Some(freed) = next.filter(is_ready) else {
                return;
            };
            if let Err(errno) = self.reclaim_one(&structure).await {
                tracing::warn!(%errno, run = ?freed.run, "freed clusters not given back");
                return;
            }
        }
    }

    /// Gives the oldest run back part by part; the queue says at every moment what is left.
    async fn reclaim_one(&self, structure: &Structure<'_>) -> Result<(), Errno> {
        let mut pins = Pins::default();
        loop {
            let Some(oldest) = self.state().reclaimable.front().copied() else {
                return Ok(());
            };
            let rest = oldest.run;
            let last_references = match self.last_references(rest) {
                Ok(run) => run,
                Err(need) => {
                    self.provide(structure, need, &mut pins).await?;
                    continue;
                }
            };
            if last_references.count > 0 && self.discards.passes(oldest.pass) {
                self.discard_on_host(last_references).await;
            }
            let count = last_references.count.max(1);
            match self.decrement(ClusterRun { count, ..rest }) {
                Ok(()) if count == rest.count => return Ok(()),
                Ok(()) => {}
                Err(need) => self.provide(structure, need, &mut pins).await?,
            }
        }
    }

    /// The clusters at the start of `run`, within one slice of refcounts, that nothing else refers
    /// to. Others (a snapshot's, or shared by compressed clusters) keep their content.
    fn last_references(&self, run: ClusterRun) -> Result<ClusterRun, Need> {
        let mut state = self.state();
        let end = self.geometry.refcount_slice_end(run.first).min(run.end());
        let mut count = 0;
        for cluster in (run.first.0..end).map(HostCluster) {
            if self.refcount(&state, cluster)? != 1 {
                break;
            }
            state.packing.leave(cluster, self.geometry.cluster_bits);
            count += 1;
        }
        Ok(ClusterRun { count, ..run })
    }

    async fn discard_on_host(&self, run: ClusterRun) {
        let bits = self.geometry.cluster_bits;
        let range = ByteRange::new(run.first.0 << bits, run.count << bits);
        // When this future is dropped half-way, the discard may hit the clusters later: they stay
        // counted until the abandoned request has ended too.
        if let Some(freed) = self.state().reclaimable.front_mut() {
            freed.epoch = epoch::current();
        }
        // Losing the space is all that a failed discard means.
        let _ = self.file.node().discard(range).await;
    }

    /// Decrements the refcounts of the start of the oldest run, a part in one slice; all or nothing.
    fn decrement(&self, run: ClusterRun) -> Result<(), Need> {
        let mut state = self.state();
        for first in (run.first.0..run.end()).map(HostCluster) {
            let refcount = self.refcount(&state, first)?;
            let Some(value) = refcount.checked_sub(1) else {
                let offset = self.geometry.host_offset(first).0;
                let message = format!("cluster at {offset:#x} was in use but not counted");
                state.reclaimable.pop_front();
                return Err(Need::Corrupt(message.into()));
            };
            let one = ClusterRun { first, count: 1 };
            self.set_refcounts(one, value)?;
            let settled = state.packing.settled(first, value);
            let record = RedoRecord::Refcount {
                run: one,
                value: settled,
            };
            // Without room in the log, a kill before the next flush leaks the cluster.
            let _ = self.log.append(&[record.encode()]);
            if value == 0 {
                state.allocator.scan = state.allocator.scan.min(first.0);
            }
        }
        if let Some(oldest) = state.reclaimable.front_mut() {
            oldest.run.first = HostCluster(run.end());
            oldest.run.count -= run.count;
            if oldest.run.count == 0 {
                state.reclaimable.pop_front();
            }
        }
        Ok(())
    }
}
