//! Stopping writes while reads go on.
//!
//! ```text
//!   1  no write goes in place without the lock of its clusters     (flag `still`)
//!   2  every request that may not have seen the flag has ended      (epoch)
//!   3  every cluster of the disk is locked: prepared writes, zeroing and discards have ended
//! ```
//!
//! Between 1 and 2 nothing waits, so requests that hold the epoch end by themselves. From 3 on,
//! writes wait for the locks; they are under way again as soon as the [`Quiet`] is dropped.

use super::super::alloc::Structure;
use super::super::{Qcow2, STILL};
use block::epoch;
use executor::sync::RangeGuard;
use std::sync::atomic::Ordering::{Acquire, SeqCst};

/// No write is under way and none begins.
pub(in super::super) struct Quiet<'q> {
    pub(super) structure: Structure<'q>,
    _clusters: RangeGuard<'q>,
    _still: Still<'q>,
}

struct Still<'q>(&'q Qcow2);

impl Drop for Still<'_> {
    fn drop(&mut self) {
        self.0.health.not_in_place.fetch_and(!STILL, SeqCst);
    }
}

impl Qcow2 {
    /// Whether writes in place have to hold the locks of their clusters.
    pub(in super::super) fn is_still(&self) -> bool {
        self.health.not_in_place.load(Acquire) & STILL != 0
    }

    /// Waits until no write is under way. One caller at a time (`snapshotting`).
    pub(in super::super) async fn quiet(&self) -> Quiet<'_> {
        self.keep_writes_from_place(STILL);
        let still = Still(self);
        epoch::wait(epoch::current()).await;
        let clusters = self.guest_locks.lock(0..u64::MAX).await;
        let structure = self.structure.lock().await;
        Quiet {
            structure,
            _clusters: clusters,
            _still: still,
        }
    }
}
