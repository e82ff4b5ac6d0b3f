//! What users of a root did: counters, times and latency histograms for each kind of operation.
//!
//! ```text
//!   thread: begin ─► Stamp ─► (request) ─► done ─► Slot, a cache line of this thread alone
//!   query:  totals() = what ended accounts left + the sum over all slots
//! ```
//!
//! A reading of the clock costs a sixth of the cheapest request, so requests of one batch share two: those that end within the
//! batch they began in are charged equal parts of its time when it ends ([`ThreadAccount::end_batch`]). A request that
//! outlasts its batch is measured by itself.
//!
//! Owns: the counters. Promises: counting takes no lock, allocates nothing and writes no memory that another thread writes; a
//! new histogram starts empty on every thread. Must not know: who counts, and how it is shown.

mod histogram;
mod totals;

pub use histogram::{Boundaries, Histogram};
pub use totals::{KindTotals, Totals};

use executor::time;
use std::cell::{Cell, RefCell};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Kinds of operations (`BlockDeviceStats` of QEMU's QMP reference).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Reads.
    Read,
    /// Writes, those of zeroes included.
    Write,
    /// Flushes.
    Flush,
    /// Discards.
    Unmap,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; KINDS] = [Kind::Read, Kind::Write, Kind::Flush, Kind::Unmap];
}

const KINDS: usize = 4;

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// As asked.
    Done,
    /// With an error.
    Failed,
}

/// Counters of one kind on one thread.
#[derive(Default)]
struct Counters {
    operations: AtomicU64,
    bytes: AtomicU64,
    failed: AtomicU64,
    invalid: AtomicU64,
    /// Nanoseconds.
    time: AtomicU64,
}

/// One thread's counters. Written by it alone; the alignment keeps others' off its cache lines.
#[derive(Default)]
#[repr(align(128))]
struct Slot {
    kinds: [Counters; KINDS],
    /// When the last request ended: nanoseconds on the executor's clock, 0 before the first.
    last_access: AtomicU64,
    /// Bins of the thread's histograms; locked by the thread when boundaries have changed, and by queries.
    histograms: Mutex<[Option<Arc<Histogram>>; KINDS]>,
}

/// Adds to a counter that only this thread writes.
#[inline]
fn add(counter: &AtomicU64, amount: u64) {
    let sum = counter.load(Ordering::Relaxed).wrapping_add(amount);
    counter.store(sum, Ordering::Relaxed);
}

/// Nanoseconds on the executor's clock.
fn now() -> u64 {
    u64::try_from(time::now().as_nanos()).unwrap_or(u64::MAX)
}

/// The accounts of all threads of one user.
#[derive(Default)]
pub struct Accounting {
    /// Changes when histograms do.
    generation: AtomicU32,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    slots: Vec<Arc<Slot>>,
    /// What accounts that are gone have counted.
    past: Totals,
    boundaries: [Option<Arc<Boundaries>>; KINDS],
}

impl Accounting {
    /// Nothing counted yet.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// An account for the current thread.
    pub fn attach(self: &Arc<Self>) -> ThreadAccount {
        let slot = Arc::<Slot>::default();
        self.state().slots.push(Arc::clone(&slot));
        ThreadAccount {
            accounting: Arc::clone(self),
            slot,
            // Not the shared one, so that histograms are taken up when the first request ends.
            generation: Cell::new(self.generation.load(Ordering::Relaxed).wrapping_sub(1)),
            histograms: RefCell::default(),
            batch: Cell::new(0),
            batch_began: Cell::new(None),
            in_batch: [const { Cell::new(0) }; KINDS],
            failed_in_batch: [const { Cell::new(0) }; KINDS],
        }
    }

    /// Counts latencies of `kind` from now on in bins between `boundaries`, or not at all.
    pub fn set_histogram(&self, kind: Kind, boundaries: Option<Boundaries>) {
        let mut state = self.state();
        state.boundaries[kind as usize] = boundaries.map(Arc::new);
        state.past.kinds[kind as usize].histogram = None;
        for slot in &state.slots {
            slot.histograms()[kind as usize] = None;
        }
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// The sum over all threads.
    pub fn totals(&self) -> Totals {
        let state = self.state();
        let mut totals = state.past.clone();
        for (total, boundaries) in totals.kinds.iter_mut().zip(&state.boundaries) {
            if let (None, Some(boundaries)) = (&total.histogram, boundaries) {
                total.histogram = Some((boundaries.list().to_vec(), vec![0; boundaries.bins()]));
            }
        }
        for slot in &state.slots {
            totals.add(slot);
        }
        totals
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn detach(&self, slot: &Arc<Slot>) {
        let mut state = self.state();
        state.slots.retain(|other| !Arc::ptr_eq(other, slot));
        state.past.add(slot);
    }
}

impl Slot {
    fn histograms(&self) -> MutexGuard<'_, [Option<Arc<Histogram>>; KINDS]> {
        self.histograms
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// When a request began.
#[derive(Clone, Copy, Debug)]
pub struct Stamp {
    /// Nanoseconds on the executor's clock.
    time: u64,
    batch: u32,
}

/// One thread's account; `!Send`.
pub struct ThreadAccount {
    accounting: Arc<Accounting>,
    slot: Arc<Slot>,
    generation: Cell<u32>,
    /// As in the slot, without its lock.
    histograms: RefCell<[Option<Arc<Histogram>>; KINDS]>,
    batch: Cell<u32>,
    /// When the current batch began; `None` between batches.
    batch_began: Cell<Option<u64>>,
    /// Requests that began and succeeded within the current batch.
    in_batch: [Cell<u32>; KINDS],
    /// Those that failed.
    failed_in_batch: [Cell<u32>; KINDS],
}

impl ThreadAccount {
    /// A request begins, and with it a batch unless there is one.
    #[inline]
    pub fn begin(&self) -> Stamp {
        let time = self.batch_began.get().unwrap_or_else(|| {
            let now = now();
            self.batch_began.set(Some(now));
            now
        });
        Stamp {
            time,
            batch: self.batch.get(),
        }
    }

    /// A request begins that is measured by itself.
    pub fn begin_alone(&self) -> Stamp {
        let stamp = self.begin();
        self.end_batch();
        stamp
    }

    /// A request of `bytes` that began at `stamp` has ended.
    #[inline]
    pub fn done(&self, stamp: Stamp, (kind, bytes): (Kind, u64), outcome: Outcome) {
        let counters = &self.slot.kinds[kind as usize];
        let pending = match outcome {
            Outcome::Done => {
                add(&counters.operations, 1);
                add(&counters.bytes, bytes);
                &self.in_batch
            }
            Outcome::Failed => {
                add(&counters.failed, 1);
                &self.failed_in_batch
            }
        };
        if stamp.batch == self.batch.get() {
            let pending = &pending[kind as usize];
            pending.set(pending.get() + 1);
        } else {
            let now = now();
            self.charge(kind, 1, now.saturating_sub(stamp.time));
            self.slot.last_access.store(now, Ordering::Relaxed);
        }
    }

    /// A request made no sense, and was not begun.
    pub fn invalid(&self, kind: Kind) {
        add(&self.slot.kinds[kind as usize].invalid, 1);
        let now = now();
        self.slot.last_access.store(now, Ordering::Relaxed);
    }

    /// No request begins now: those that ended since the first of the batch share its time.
    #[inline]
    pub fn end_batch(&self) {
        let Some(began) = self.batch_began.take() else {
            return;
        };
        self.batch.set(self.batch.get().wrapping_add(1));
        let counts = Kind::ALL.map(|kind| {
            let kind = kind as usize;
            self.in_batch[kind].take() + self.failed_in_batch[kind].take()
        });
        let ended: u32 = counts.iter().sum();
        if ended == 0 {
            return;
        }
        let now = now();
        let each = now.saturating_sub(began) / u64::from(ended);
        for (kind, count) in Kind::ALL.into_iter().zip(counts) {
            if count > 0 {
                self.charge(kind, count, each);
            }
        }
        self.slot.last_access.store(now, Ordering::Relaxed);
    }

    /// `count` requests took `each` nanoseconds.
    #[inline]
    fn charge(&self, kind: Kind, count: u32, each: u64) {
        let time = &self.slot.kinds[kind as usize].time;
        add(time, each * u64::from(count));
        let generation = self.accounting.generation.load(Ordering::Acquire);
        if generation != self.generation.get() {
            self.take_up_histograms();
        }
        if let Some(histogram) = &self.histograms.borrow()[kind as usize] {
            histogram.count(each, u64::from(count));
        }
    }

    /// Makes bins for boundaries that have changed.
    #[cold]
    fn take_up_histograms(&self) {
        let state = self.accounting.state();
        let generation = self.accounting.generation.load(Ordering::Relaxed);
        self.generation.set(generation);
        let mut own = self.slot.histograms();
        for (bins, boundaries) in own.iter_mut().zip(&state.boundaries) {
            *bins = match (bins.take(), boundaries) {
                (Some(bins), Some(boundaries)) if bins.is_of(boundaries) => Some(bins),
                (_, boundaries) => boundaries.as_ref().map(|b| Arc::new(Histogram::new(b))),
            };
        }
        self.histograms.replace(own.clone());
    }
}

impl Drop for ThreadAccount {
    fn drop(&mut self) {
        self.end_batch();
        self.accounting.detach(&self.slot);
    }
}

#[cfg(test)]
mod tests;
