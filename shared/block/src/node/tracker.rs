//! Keeps read-modify-write apart from other writes of a node.
//!
//! A request that is not aligned to what the driver takes reads the blocks around its ends, merges
//! and writes them back. A write of the same blocks in between would be undone, so such a request
//! *serialises*: it waits for the writes in flight and later ones wait for it.
//!
//! ```text
//!   write, nobody serialises:  slot of this thread +1 → look at `serialising` → driver → slot -1
//!   serialising request:       `serialising` +1 → every slot seen at 0 → exclusive range lock
//!   write, somebody does:      shared range lock
//! ```
//!
//! Owns: the counters and the range lock. Promises: a plain write costs two uncontended atomic
//! additions on a cache line of its thread. Used by nodes whose driver needs an alignment, and by
//! drivers that write by themselves what they have read before.

use crate::driver::IoFuture;
use executor::sync::{Notify, RangeGuard, RangeLock};
use std::cell::Cell;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

/// Threads beyond this many share slots.
pub(super) const SLOTS: usize = 16;

/// A counter on a cache line of its own.
#[repr(align(128))]
#[derive(Default)]
struct Slot(AtomicU32);

/// The writes in flight of one node.
#[derive(Default)]
pub struct WriteTracker {
    slots: [Slot; SLOTS],
    serialising: AtomicU32,
    idle: Notify,
    ranges: RangeLock,
}

impl WriteTracker {
    /// Registers a plain write, unless a serialising request is about.
    pub fn try_begin(&self) -> Option<WriteGuard<'_>> {
        let slot = &self.slots[thread_slot()].0;
        // Sequentially consistent on both sides: either the serialising request sees this count,
        // or this load sees the serialising request.
        slot.fetch_add(1, Ordering::SeqCst);
        let guard = WriteGuard {
            tracker: self,
            slot,
        };
        (self.serialising.load(Ordering::SeqCst) == 0).then_some(guard)
    }

    /// Registers a plain write of `range` that waits for serialising requests.
    pub async fn begin(&self, range: Range<u64>) -> TrackedWrite<'_> {
        match self.try_begin() {
            Some(guard) => TrackedWrite::Counted { _guard: guard },
            None => TrackedWrite::Locked {
                _guard: self.ranges.lock_shared(range).await,
            },
        }
    }

    /// Waits until no other write touches `range`, and keeps them away.
    pub async fn serialise(&self, range: Range<u64>) -> Serialised<'_> {
        self.serialising.fetch_add(1, Ordering::SeqCst);
        let serialising = Serialising(&self.serialising);
        loop {
            let idle = self.idle.notified();
            if self.slots.iter().all(|s| s.0.load(Ordering::SeqCst) == 0) {
                break;
            }
            idle.await;
        }
        Serialised {
            _range: self.ranges.lock(range).await,
            _serialising: serialising,
        }
    }
}

/// A plain write in flight.
pub struct WriteGuard<'a> {
    tracker: &'a WriteTracker,
    slot: &'a AtomicU32,
}

impl<'a> WriteGuard<'a> {
    /// The write in `future`, registered until it ends.
    pub fn hold(self, future: IoFuture<'a>) -> IoFuture<'a> {
        match future {
            IoFuture::Op(op) => IoFuture::Tracked(op, Some(self)),
            IoFuture::Ready(result) => IoFuture::Ready(result),
            other => IoFuture::boxed(async move {
                let _guard = self;
                other.await
            }),
        }
    }
}

impl Drop for WriteGuard<'_> {
    fn drop(&mut self) {
        self.slot.fetch_sub(1, Ordering::SeqCst);
        if self.tracker.serialising.load(Ordering::SeqCst) != 0 {
            self.tracker.idle.notify_all();
        }
    }
}

/// A plain write in flight, registered one way or the other.
pub enum TrackedWrite<'a> {
    /// Nobody serialises: counted.
    Counted {
        /// Ends the count.
        _guard: WriteGuard<'a>,
    },
    /// Waited for who serialises.
    Locked {
        /// Gives the range back.
        _guard: RangeGuard<'a>,
    },
}

struct Serialising<'a>(&'a AtomicU32);

impl Drop for Serialising<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A serialising request. The range is released before the count, so that a write that finds the
/// count at zero also finds the range free.
pub struct Serialised<'a> {
    _range: RangeGuard<'a>,
    _serialising: Serialising<'a>,
}

/// The slot of the current thread.
#[inline]
pub(super) fn thread_slot() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static SLOT: Cell<usize> = const { Cell::new(usize::MAX) };
    }
    let slot = SLOT.get();
    if slot != usize::MAX {
        return slot;
    }
    let slot = NEXT.fetch_add(1, Ordering::Relaxed) % SLOTS;
    SLOT.set(slot);
    slot
}
