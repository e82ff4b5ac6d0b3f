//! The cache of table slices: L2 tables and refcount blocks, in pieces of a fixed size.
//!
//! ```text
//!   directory[index] ──► slot ──► words (host byte order), sequence, flags, pins
//! ```
//!
//! [`TableCache::view`] is the hit path of every guest request: two array look-ups, no lock, no
//! allocation, no write to shared memory but a "used" mark that is set once. What it reads is
//! valid when the slot's sequence did not change meanwhile (it changes only when a slot is given
//! to another slice; an entry is one atomic word and changes in place).
//!
//! Everything else takes the short internal lock. A [`Pinned`] slice stays where it is; writes of
//! entries go through it. Dirty slices and those being written to disk are never replaced. Memory
//! is bounded by the number of slots. Must not know what the words mean, nor do I/O.

use executor::sync::Notify;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, fence};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

/// Most slices that a cache can index.
pub(super) const MAX_SLICES: u64 = 1 << 22;
/// Least number of slots: more than one task needs at once, whatever the budget.
const MIN_SLOTS: usize = 16;
const DIRECTORY_CHUNK: usize = 1024;
const NO_KEY: u64 = u64::MAX;

/// Changed since it was last handed to a flush.
const DIRTY: u8 = 1;
/// A flush is writing a copy of it.
const WRITING: u8 = 2;

/// A cache of table slices.
pub(super) struct TableCache {
    directory: Box<[OnceLock<Box<[AtomicU32]>>]>,
    slots: Box<[Slot]>,
    slice_words: usize,
    inner: Mutex<Inner>,
    dirty: Mutex<Vec<u32>>,
    dirty_count: AtomicUsize,
    waiting: AtomicUsize,
    changed: Notify,
}

struct Slot {
    /// Odd while the slot changes hands.
    sequence: AtomicU64,
    key: AtomicU64,
    words: OnceLock<Box<[AtomicU64]>>,
    used: AtomicBool,
    flags: AtomicU8,
    pins: AtomicU32,
}

struct Inner {
    hand: usize,
    loading: Vec<u64>,
}

/// What [`TableCache::claim`] found.
pub(super) enum Claim<'c> {
    /// It is cached.
    Present(Pinned<'c>),
    /// A slot is reserved: read the slice and fill it.
    Vacant(Fill<'c>),
    /// Another task loads it, or every slot is in use for a moment: wait for a change.
    Busy,
    /// Every slot is dirty: flush first.
    AllDirty,
}

impl TableCache {
    /// A cache of slices of `slice_bytes` in at most about `budget` bytes.
    pub(super) fn new(slice_bytes: u64, budget: u64) -> Self {
        let slots = usize::try_from(budget / slice_bytes)
            .unwrap_or(usize::MAX)
            .clamp(MIN_SLOTS, MAX_SLICES as usize);
        let chunks = MAX_SLICES as usize / DIRECTORY_CHUNK;
        Self {
            directory: (0..chunks).map(|_| OnceLock::new()).collect(),
            slots: (0..slots).map(|_| Slot::new()).collect(),
            slice_words: (slice_bytes / 8) as usize,
            inner: Mutex::new(Inner {
                hand: 0,
                loading: Vec::new(),
            }),
            dirty: Mutex::new(Vec::new()),
            dirty_count: AtomicUsize::new(0),
            waiting: AtomicUsize::new(0),
            changed: Notify::new(),
        }
    }

    /// Bytes of a slice.
    pub(super) fn slice_bytes(&self) -> usize {
        self.slice_words * 8
    }

    /// The slice as it is cached now; `None` when it is not.
    #[inline]
    pub(super) fn view(&self, index: u64) -> Option<View<'_>> {
        let slot = &self.slots[self.slot_of(index)?];
        let sequence = slot.sequence.load(Acquire);
        if sequence & 1 != 0 || slot.key.load(Relaxed) != index {
            return None;
        }
        if !slot.used.load(Relaxed) {
            slot.used.store(true, Relaxed);
        }
        let words = slot.words.get()?;
        Some(View {
            slot,
            sequence,
            words,
        })
    }

    /// The slice, kept in the cache while the result lives.
    pub(super) fn pin(&self, index: u64) -> Option<Pinned<'_>> {
        let inner = self.lock();
        self.pin_locked(&inner, index)
    }

    fn pin_locked(&self, _inner: &MutexGuard<'_, Inner>, index: u64) -> Option<Pinned<'_>> {
        let number = self.slot_of(index)?;
        let slot = &self.slots[number];
        slot.pins.fetch_add(1, SeqCst);
        slot.used.store(true, Relaxed);
        let words = slot.words.get()?;
        Some(Pinned {
            cache: self,
            slot,
            number: number as u32,
            words,
        })
    }

    /// The slice, or a slot to load it into.
    pub(super) fn claim(&self, index: u64) -> Claim<'_> {
        let mut inner = self.lock();
        if let Some(pinned) = self.pin_locked(&inner, index) {
            return Claim::Present(pinned);
        }
        if inner.loading.contains(&index) {
            return Claim::Busy;
        }
        match self.find_victim(&mut inner) {
            Ok(number) => {
                self.empty_slot(number);
                self.slots[number].pins.fetch_add(1, SeqCst);
                inner.loading.push(index);
                Claim::Vacant(Fill {
                    cache: self,
                    index,
                    number,
                    done: false,
                })
            }
            Err(AllInUse { dirty: true }) => Claim::AllDirty,
            Err(AllInUse { dirty: false }) => Claim::Busy,
        }
    }

    /// Waits until a slice was loaded, written or unpinned, unless `ready` holds before.
    pub(super) async fn wait_unless(&self, ready: impl Fn(&Self) -> bool) {
        let _waiting = Waiting::new(&self.waiting);
        let changed = self.changed.notified();
        if !ready(self) {
            changed.await;
        }
    }

    /// Whether [`TableCache::claim`] would answer something else than `Busy`.
    pub(super) fn is_claimable(&self, index: u64) -> bool {
        let inner = self.lock();
        if self.slot_of(index).is_some() {
            return true;
        }
        !inner.loading.contains(&index)
            && self
                .slots
                .iter()
                .any(|slot| slot.is_replaceable() || slot.is_only_dirty())
    }

    /// Forgets every slice. None is dirty, and nobody pins or loads one for longer than a moment.
    pub(super) async fn forget_all(&self) {
        self.wait_unless(Self::try_forget_all).await;
        while !self.try_forget_all() {
            self.wait_unless(Self::try_forget_all).await;
        }
    }

    fn try_forget_all(&self) -> bool {
        let inner = self.lock();
        if !inner.loading.is_empty() || self.slots.iter().any(|slot| !slot.is_replaceable()) {
            return false;
        }
        (0..self.slots.len()).for_each(|number| self.empty_slot(number));
        true
    }

    /// Slices changed and not yet handed to a flush.
    pub(super) fn dirty_count(&self) -> usize {
        self.dirty_count.load(Acquire)
    }

    /// Whether so much is dirty that writers should flush before adding to it.
    pub(super) fn is_mostly_dirty(&self) -> bool {
        self.dirty_count() > self.slots.len() / 4 * 3
    }

    /// Hands every dirty slice to a flush, which ends in [`TableCache::written`] for each. The
    /// caller keeps writers out meanwhile.
    pub(super) fn take_dirty(&self) -> Vec<DirtySlice> {
        let numbers =
            std::mem::take(&mut *self.dirty.lock().unwrap_or_else(PoisonError::into_inner));
        self.dirty_count.fetch_sub(numbers.len(), AcqRel);
        let slices = numbers.into_iter().map(|number| {
            let slot = &self.slots[number as usize];
            slot.flags.fetch_or(WRITING, AcqRel);
            slot.flags.fetch_and(!DIRTY, AcqRel);
            let words = slot.words.get().into_iter().flatten();
            let mut bytes = Vec::with_capacity(self.slice_bytes());
            words.for_each(|word| bytes.extend_from_slice(&word.load(Relaxed).to_be_bytes()));
            DirtySlice {
                number,
                index: slot.key.load(Relaxed),
                bytes,
            }
        });
        slices.collect()
    }

    /// The flush of `slice` is over; when it failed, the slice is dirty again.
    pub(super) fn written(&self, slice: &DirtySlice, success: bool) {
        let slot = &self.slots[slice.number as usize];
        if !success {
            self.mark_dirty(slot, slice.number);
        }
        slot.flags.fetch_and(!WRITING, AcqRel);
        self.notify();
    }

    fn mark_dirty(&self, slot: &Slot, number: u32) {
        if slot.flags.fetch_or(DIRTY, AcqRel) & DIRTY == 0 {
            self.dirty_count.fetch_add(1, AcqRel);
            self.dirty
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(number);
        }
    }

    #[inline]
    fn slot_of(&self, index: u64) -> Option<usize> {
        let chunk = self
            .directory
            .get(index as usize / DIRECTORY_CHUNK)?
            .get()?;
        let slot = chunk[index as usize % DIRECTORY_CHUNK].load(Acquire);
        (slot as usize).checked_sub(1)
    }

    fn set_slot(&self, index: u64, slot: u32) {
        let chunk = self.directory[index as usize / DIRECTORY_CHUNK]
            .get_or_init(|| (0..DIRECTORY_CHUNK).map(|_| AtomicU32::new(0)).collect());
        chunk[index as usize % DIRECTORY_CHUNK].store(slot, Release);
    }

    /// The clock: the first slot that is replaceable and was not used since the hand last passed.
    fn find_victim(&self, inner: &mut Inner) -> Result<usize, AllInUse> {
        for _ in 0..2 * self.slots.len() {
            let number = inner.hand;
            inner.hand = (number + 1) % self.slots.len();
            let slot = &self.slots[number];
            if slot.is_replaceable() && !slot.used.swap(false, Relaxed) {
                return Ok(number);
            }
        }
        let dirty = self.slots.iter().any(Slot::is_only_dirty);
        Err(AllInUse { dirty })
    }

    /// Takes a slot from its slice; the sequence stays odd until it is filled.
    fn empty_slot(&self, number: usize) {
        let slot = &self.slots[number];
        let key = slot.key.load(Relaxed);
        if key != NO_KEY {
            self.set_slot(key, 0);
        }
        if slot.sequence.load(Relaxed) & 1 == 0 {
            slot.sequence.fetch_add(1, Relaxed);
        }
        fence(Release);
        slot.key.store(NO_KEY, Relaxed);
    }

    fn notify(&self) {
        if self.waiting.load(SeqCst) != 0 {
            self.changed.notify_all();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct AllInUse {
    dirty: bool,
}

impl Slot {
    fn new() -> Self {
        Self {
            sequence: AtomicU64::new(1),
            key: AtomicU64::new(NO_KEY),
            words: OnceLock::new(),
            used: AtomicBool::new(false),
            flags: AtomicU8::new(0),
            pins: AtomicU32::new(0),
        }
    }
    fn is_replaceable(&self) -> bool {
        self.pins.load(SeqCst) == 0 && self.flags.load(Acquire) == 0
    }
    /// Whether a flush would make it replaceable.
    fn is_only_dirty(&self) -> bool {
        self.pins.load(SeqCst) == 0 && self.flags.load(Acquire) & DIRTY != 0
    }
}

/// A slice read without locks.
pub(super) struct View<'c> {
    slot: &'c Slot,
    sequence: u64,
    words: &'c [AtomicU64],
}

impl View<'_> {
    #[inline]
    pub(super) fn word(&self, entry: usize) -> u64 {
        self.words[entry].load(Relaxed)
    }
    /// Whether every word read until now belonged to the slice.
    #[inline]
    pub(super) fn is_valid(&self) -> bool {
        fence(Acquire);
        self.slot.sequence.load(Relaxed) == self.sequence
    }
}

/// A slice that stays cached.
pub(super) struct Pinned<'c> {
    cache: &'c TableCache,
    slot: &'c Slot,
    number: u32,
    words: &'c [AtomicU64],
}

impl Pinned<'_> {
    pub(super) fn word(&self, entry: usize) -> u64 {
        self.words[entry].load(Acquire)
    }
    /// Changes an entry; the caller holds the lock that flushes take their copies under.
    pub(super) fn set_word(&self, entry: usize, value: u64) {
        self.words[entry].store(value, Release);
        self.cache.mark_dirty(self.slot, self.number);
    }
}

impl Drop for Pinned<'_> {
    fn drop(&mut self) {
        if self.slot.pins.fetch_sub(1, SeqCst) == 1 {
            self.cache.notify();
        }
    }
}

/// A slot reserved (pinned) for a slice that its holder reads. Dropped unfilled, it is free again.
pub(super) struct Fill<'c> {
    cache: &'c TableCache,
    index: u64,
    number: usize,
    done: bool,
}

impl<'c> Fill<'c> {
    /// Fills the slot with the slice's bytes as they are on disk.
    pub(super) fn complete(mut self, bytes: &[u8]) -> Pinned<'c> {
        let cache = self.cache;
        let slot = &cache.slots[self.number];
        let words = slot
            .words
            .get_or_init(|| (0..cache.slice_words).map(|_| AtomicU64::new(0)).collect());
        for (word, chunk) in words.iter().zip(bytes.chunks_exact(8)) {
            let value = u64::from_be_bytes(chunk.try_into().expect("chunks of eight bytes"));
            word.store(value, Relaxed);
        }
        slot.key.store(self.index, Relaxed);
        slot.used.store(true, Relaxed);
        slot.sequence.fetch_add(1, Release);
        cache.set_slot(self.index, self.number as u32 + 1);
        self.done = true;
        Pinned {
            cache,
            slot,
            number: self.number as u32,
            words,
        }
    }
}

impl Drop for Fill<'_> {
    fn drop(&mut self) {
        let mut inner = self.cache.lock();
        inner.loading.retain(|&index| index != self.index);
        if !self.done {
            self.cache.slots[self.number].pins.fetch_sub(1, SeqCst);
        }
        drop(inner);
        self.cache.notify();
    }
}

/// A copy of a dirty slice on its way to disk.
pub(super) struct DirtySlice {
    number: u32,
    /// Its index in the cache.
    pub(super) index: u64,
    /// Its content as it goes to disk.
    pub(super) bytes: Vec<u8>,
}

struct Waiting<'c>(&'c AtomicUsize);

impl<'c> Waiting<'c> {
    fn new(count: &'c AtomicUsize) -> Self {
        count.fetch_add(1, SeqCst);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}
