//! The clock of request epochs and the counters of one thread, without what makes them global.
//!
//! Each side orders its store before its later loads by a barrier that the caller brings: a fence, or
//! on the side of requests nothing when the clock's side makes all threads pass one. `models.rs` has
//! the argument of [`super`] checked by loom, with fences.

use super::atomics::{AtomicU64, AtomicUsize, fence};
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};

/// How many requests of one thread are pinned, by parity of their epoch. Written by that thread only.
#[repr(align(128))]
#[derive(Default)]
pub(super) struct Pins([AtomicUsize; 2]);

impl Pins {
    /// Pins the present epoch; returns what [`Pins::leave`] needs.
    #[inline]
    pub(super) fn enter(&self, clock: &Clock, barrier: impl Fn()) -> usize {
        let parity = parity(clock.epoch.load(Relaxed));
        let pins = &self.0[parity];
        pins.store(pins.load(Relaxed) + 1, Relaxed);
        barrier();
        parity
    }

    /// Unpins; whether somebody waits for that.
    #[inline]
    pub(super) fn leave(&self, parity: usize, clock: &Clock, barrier: impl Fn()) -> bool {
        let pins = &self.0[parity];
        let left = pins.load(Relaxed) - 1;
        pins.store(left, Release);
        if left != 0 {
            return false;
        }
        barrier();
        clock.waiting.load(Relaxed) != 0
    }

    fn is_free(&self, parity: usize) -> bool {
        self.0[parity].load(Acquire) == 0
    }
}

/// The epoch, and who waits for it to pass. Every request reads it.
#[repr(align(128))]
pub(super) struct Clock {
    pub(super) epoch: AtomicU64,
    /// Who waits: then the last request of a parity to end on a thread says so.
    pub(super) waiting: AtomicUsize,
}

const fn parity(epoch: u64) -> usize {
    (epoch & 1) as usize
}

/// Whether what was freed in `epoch` may be used again when the clock shows `now`.
const fn is_past(epoch: u64, now: u64) -> bool {
    now >= epoch.saturating_add(3)
}

impl Clock {
    /// The present epoch; a free that happened before this call belongs to it.
    pub(super) fn now(&self) -> u64 {
        // The unmapping that makes a free comes before this load on every thread's view.
        fence(SeqCst);
        self.epoch.load(Acquire)
    }

    /// Whether the clock is past `epoch` without anybody moving it.
    pub(super) fn is_past(&self, epoch: u64) -> bool {
        is_past(epoch, self.epoch.load(Acquire))
    }

    /// Moves the clock on as far as it goes now, three steps at most; whether it is past `epoch`.
    /// `barrier` makes every thread pass one and tells whether it did. One caller at a time, who
    /// knows the counters of all threads.
    pub(super) fn advance<'p>(
        &self,
        threads: impl Iterator<Item = &'p Pins> + Clone,
        epoch: u64,
        barrier: impl Fn() -> bool,
    ) -> bool {
        let mut now = self.epoch.load(Relaxed);
        for _ in 0..3 {
            let before = parity(now.wrapping_sub(1));
            if !barrier() || !threads.clone().all(|pins| pins.is_free(before)) {
                break;
            }
            now += 1;
            self.epoch.store(now, SeqCst);
        }
        is_past(epoch, now)
    }

    /// Somebody waits from now on. What ends before is seen by the next [`Clock::advance`].
    pub(super) fn wait(&self) {
        self.waiting.fetch_add(1, SeqCst);
    }

    /// Nobody waits, or one less.
    pub(super) fn waited(&self) {
        self.waiting.fetch_sub(1, SeqCst);
    }
}
