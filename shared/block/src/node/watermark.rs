//! How far a node was written, and who wants to know when it is written beyond a point.
//!
//! ```text
//!   write ─► beyond the threshold? ──no──► beyond what this thread has written? ─► its own slot
//!                 └yes─► event, once; no threshold any more
//! ```
//!
//! Promises: a write that is no news writes no shared memory, one that is writes a cache line of its thread.

use super::tracker::{SLOTS, thread_slot};
use crate::events::{Reporter, WriteThreshold};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// No threshold.
const NONE: u64 = u64::MAX;

/// The end of the furthest write of some threads.
#[repr(align(128))]
#[derive(Default)]
struct Slot(AtomicU64);

/// The watermark of one node.
pub(super) struct Watermark {
    threshold: AtomicU64,
    /// As it was asked for: 0 for none.
    asked: AtomicU64,
    slots: [Slot; SLOTS],
    reporter: Mutex<Reporter>,
}

impl Default for Watermark {
    fn default() -> Self {
        Self {
            threshold: AtomicU64::new(NONE),
            asked: AtomicU64::default(),
            slots: Default::default(),
            reporter: Mutex::default(),
        }
    }
}

impl Watermark {
    /// Something is written that ends at `end`.
    #[inline]
    pub(super) fn write(&self, end: u64) {
        self.pass(end);
        let highest = &self.slots[thread_slot()].0;
        if end > highest.load(Ordering::Relaxed) {
            // Threads beyond the number of slots share them.
            highest.fetch_max(end, Ordering::Relaxed);
        }
    }

    /// Something is changed that ends at `end`.
    #[inline]
    pub(super) fn pass(&self, end: u64) {
        if end > self.threshold.load(Ordering::Relaxed) {
            self.exceed(end);
        }
    }

    #[cold]
    fn exceed(&self, end: u64) {
        let threshold = self.threshold.swap(NONE, Ordering::Relaxed);
        // Another thread may have been here first.
        if end > threshold {
            let reporter = self.reporter.lock().unwrap_or_else(PoisonError::into_inner);
            // Unless another was set meanwhile.
            if self.threshold.load(Ordering::Relaxed) == NONE {
                self.asked.store(0, Ordering::Relaxed);
            }
            reporter.write_threshold(WriteThreshold {
                threshold,
                exceeded_by: end - threshold,
            });
        }
    }

    /// Reports the first write that ends beyond `threshold` bytes; with 0, none.
    pub(super) fn set_threshold(&self, threshold: u64, reporter: Reporter) {
        let mut kept = self.reporter.lock().unwrap_or_else(PoisonError::into_inner);
        *kept = reporter;
        self.asked.store(threshold, Ordering::Relaxed);
        let threshold = if threshold == 0 { NONE } else { threshold };
        self.threshold.store(threshold, Ordering::Relaxed);
    }

    /// The threshold; 0 when there is none.
    pub(super) fn threshold(&self) -> u64 {
        self.asked.load(Ordering::Relaxed)
    }

    /// The end of the furthest write; 0 before the first.
    pub(super) fn highest(&self) -> u64 {
        let ends = self.slots.iter().map(|slot| slot.0.load(Ordering::Relaxed));
        ends.max().unwrap_or(0)
    }

    /// Takes the place of another node's; nothing is written meanwhile.
    pub(super) fn follow(&self, other: &Self) {
        self.slots[0].0.store(other.highest(), Ordering::Relaxed);
        let reporter = other
            .reporter
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        self.set_threshold(other.threshold(), reporter.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::{ImageCorrupted, NodeEvents, QuorumBad, QuorumFailed};
    use std::sync::Arc;

    #[derive(Default)]
    struct Heard(Mutex<Vec<(String, WriteThreshold)>>);

    impl NodeEvents for Heard {
        fn image_corrupted(&self, _event: ImageCorrupted) {}
        fn quorum_bad(&self, _event: QuorumBad) {}
        fn quorum_failed(&self, _event: QuorumFailed) {}
        fn write_threshold(&self, node_name: &str, event: WriteThreshold) {
            self.0.lock().unwrap().push((node_name.to_owned(), event));
        }
    }

    #[test]
    fn the_first_write_beyond_the_threshold_is_reported_once() {
        let heard = Arc::<Heard>::default();
        let watermark = Watermark::default();
        watermark.write(500);
        watermark.set_threshold(100, Reporter::new("n", Some(heard.clone())));
        watermark.write(100);
        assert!(heard.0.lock().unwrap().is_empty());
        watermark.pass(130);
        watermark.write(200);
        let event = WriteThreshold {
            threshold: 100,
            exceeded_by: 30,
        };
        assert_eq!(*heard.0.lock().unwrap(), [("n".to_owned(), event)]);
        assert_eq!(watermark.threshold(), 0);
        assert_eq!(watermark.highest(), 500);
    }

    #[test]
    fn the_furthest_write_of_all_threads_counts() {
        let watermark = Watermark::default();
        std::thread::scope(|scope| {
            for thread in 1..=20 {
                let watermark = &watermark;
                scope.spawn(move || (0..100).for_each(|at| watermark.write(thread * 1000 + at)));
            }
        });
        assert_eq!(watermark.highest(), 20_099);
        let next = Watermark::default();
        next.follow(&watermark);
        assert_eq!(next.highest(), 20_099);
    }
}
