//! The cache of table slices: L2 tables and refcount blocks, in pieces of a fixed size.
//!
//! ```text
//!   directory[slice] ──► runs, packed entries or all words, in an arena of fixed place
//!      lock-free          readers: any form        writers: all words, in a slot of their own
//!                         ring of segments  ◄─── compacted when clean and cold ───  wide slots
//! ```
//!
//! [`TableCache::view`] is the hit path of every guest request: two array look-ups, no lock, no
//! allocation, no write to shared memory but a "used" mark that is set once. What it reads is
//! valid when the directory's entry did not change meanwhile (`directory.rs` has the argument).
//!
//! Everything else takes the short internal lock. A [`Pinned`] slice stays where it is, with all
//! its words; writes of entries go through it. Dirty slices and those being written to disk are
//! never replaced. A flush copies a slice when it writes it, and who changes a slice before that
//! keeps a copy for the flush. Memory is bounded (`segments.rs`). Does no I/O.

mod atomics;
mod clean;
mod directory;
mod encoding;
#[cfg(all(test, loom))]
mod models;
pub(super) mod options;
mod segments;
#[cfg(all(test, not(loom)))]
mod tests;
mod wide;

pub(super) use clean::clean_regularly;
pub(super) use directory::View;
pub(super) use encoding::Content;

use atomics::{AtomicU64, AtomicUsize, Mutex, MutexGuard, WordArena};
use directory::{Directory, Used};
use encoding::Layout;
use executor::sync::Notify;
use segments::{AllInUse, Memory, Segments, Sizes};
use std::collections::HashMap;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst};
use std::sync::{Arc, PoisonError};
use wide::{DIRTY, UNCOPIED, WRITING, WideSlot, WideSlots};

/// Most slices that a cache can index.
pub(super) const MAX_SLICES: u64 = if cfg!(loom) { 4 } else { 1 << 22 };

/// A cache of table slices.
pub(super) struct TableCache {
    memory: Memory,
    inner: Mutex<Inner>,
    dirty: Mutex<Vec<u32>>,
    dirty_count: AtomicUsize,
    /// What slices held when a flush began that has yet to write them.
    kept: Mutex<HashMap<u32, Box<[u64]>>>,
    waiting: AtomicUsize,
    changed: Notify,
    /// Told when the cache is no longer empty, and when it goes.
    filled: Arc<Notify>,
}

struct Inner {
    segments: Segments,
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

/// What [`TableCache::claim_read`] found.
pub(super) enum ReadClaim<'c> {
    /// It is cached.
    Present,
    /// Read the slice and keep it.
    Vacant(Loading<'c>),
    /// Another task loads it: wait for a change.
    Busy,
}

impl TableCache {
    /// A cache of slices of `slice_bytes` in at most about `budget` bytes.
    ///
    /// # Errors
    /// The host's, when it has no address space left.
    pub(super) fn new(slice_bytes: u64, budget: u64, content: Content) -> std::io::Result<Self> {
        let sizes = Sizes::new(slice_bytes, budget);
        let layout = Layout {
            words: sizes.slice_words,
            content,
        };
        let arena = WordArena::new(sizes.segments * sizes.segment_words)?;
        let per_segment = sizes.segment_words / sizes.slice_words;
        Ok(Self {
            memory: Memory {
                directory: Directory::new(MAX_SLICES, arena, layout),
                wide: WideSlots::new(sizes.segments, per_segment),
                sizes,
            },
            inner: Mutex::new(Inner {
                segments: Segments::new(),
                loading: Vec::new(),
            }),
            dirty: Mutex::new(Vec::new()),
            dirty_count: AtomicUsize::new(0),
            kept: Mutex::new(HashMap::new()),
            waiting: AtomicUsize::new(0),
            changed: Notify::new(),
            filled: Arc::default(),
        })
    }

    /// Bytes of a slice.
    pub(super) fn slice_bytes(&self) -> usize {
        self.memory.sizes.slice_words * 8
    }

    /// Bytes of memory that the cache takes now.
    #[cfg(all(test, not(loom)))]
    fn memory_bytes(&self) -> usize {
        self.lock().segments.bytes(&self.memory)
    }

    fn is_empty(&self) -> bool {
        self.lock().segments.in_use() == 0
    }

    /// The slice as it is cached now; `None` when it is not.
    #[inline]
    pub(super) fn view(&self, index: u64) -> Option<View<'_>> {
        self.memory.directory.view(index)
    }

    /// The slice, kept in the cache while the result lives. `None` when it is not cached, or when
    /// there is no room for all its words now.
    pub(super) fn pin(&self, index: u64) -> Option<Pinned<'_>> {
        let mut inner = self.lock();
        self.pin_locked(&mut inner, index).ok().flatten()
    }

    /// The slice with all its words; `Ok(None)` when it is not cached.
    fn pin_locked(&self, inner: &mut Inner, index: u64) -> Result<Option<Pinned<'_>>, AllInUse> {
        let memory = &self.memory;
        let Some(place) = memory.directory.place(index) else {
            return Ok(None);
        };
        if let Some((number, slot)) = memory.slot_of(index, place) {
            slot.pin();
            // Marks it as used.
            memory.directory.view(index);
            return Ok(Some(self.pinned(number)));
        }
        let number = inner.segments.take_slot(memory)?;
        memory.wide.get(number).pin();
        // Making room may have moved it, or thrown it out.
        let Some(place) = memory.directory.place(index) else {
            memory.wide.get(number).unpin();
            inner.segments.give_back_slot(number);
            return Ok(None);
        };
        let words = memory.directory.decode(place);
        inner.segments.fill_slot(memory, number, index, words);
        Ok(Some(self.pinned(number)))
    }

    /// A slot that its caller has pinned.
    fn pinned(&self, number: u32) -> Pinned<'_> {
        Pinned {
            cache: self,
            slot: self.memory.wide.get(number),
            number,
            words: self.memory.directory.words(self.memory.slot_words(number)),
        }
    }

    /// The slice for a writer, or a slot to load it into.
    pub(super) fn claim(&self, index: u64) -> Claim<'_> {
        let mut inner = self.lock();
        if inner.loading.contains(&index) {
            return Claim::Busy;
        }
        let was_empty = inner.segments.in_use() == 0;
        let slot = match self.pin_locked(&mut inner, index) {
            Ok(Some(pinned)) => return Claim::Present(pinned),
            Ok(None) => inner.segments.take_slot(&self.memory),
            Err(in_use) => Err(in_use),
        };
        if was_empty {
            self.filled.notify_all();
        }
        match slot {
            Ok(number) => {
                self.memory.wide.get(number).pin();
                inner.loading.push(index);
                Claim::Vacant(Fill {
                    loading: Loading { cache: self, index },
                    slot: Some(number),
                })
            }
            Err(AllInUse { dirty: true }) => Claim::AllDirty,
            Err(AllInUse { dirty: false }) => Claim::Busy,
        }
    }

    /// What a reader whose look-up missed has to do.
    pub(super) fn claim_read(&self, index: u64) -> ReadClaim<'_> {
        let mut inner = self.lock();
        if inner.loading.contains(&index) {
            return ReadClaim::Busy;
        }
        if self.memory.directory.place(index).is_some() {
            return ReadClaim::Present;
        }
        inner.loading.push(index);
        ReadClaim::Vacant(Loading { cache: self, index })
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
        if inner.loading.contains(&index) {
            return false;
        }
        let place = self.memory.directory.place(index);
        place.is_some_and(|place| self.memory.slot_of(index, place).is_some())
            || inner.segments.has_slot(&self.memory)
    }

    /// Whether nobody is loading the slice.
    pub(super) fn is_readable(&self, index: u64) -> bool {
        !self.lock().loading.contains(&index)
    }

    /// Slices changed and not yet handed to a flush.
    pub(super) fn dirty_count(&self) -> usize {
        self.dirty_count.load(Acquire)
    }

    /// Whether so much is dirty that writers should flush before adding to it.
    pub(super) fn is_mostly_dirty(&self) -> bool {
        self.dirty_count() > self.memory.sizes.wide_slots() / 4 * 3
    }

    /// Whether so much is dirty that a flush should begin before anybody has to wait for it.
    pub(super) fn is_half_dirty(&self) -> bool {
        self.dirty_count() > self.memory.sizes.wide_slots() / 2
    }

    /// Hands every dirty slice to a flush, which ends in [`TableCache::written`] for each. The
    /// caller keeps writers out meanwhile. Copies nothing yet.
    pub(super) fn take_dirty(&self) -> Vec<DirtySlice> {
        let numbers =
            std::mem::take(&mut *self.dirty.lock().unwrap_or_else(PoisonError::into_inner));
        self.dirty_count.fetch_sub(numbers.len(), AcqRel);
        let slices = numbers.into_iter().map(|number| {
            let slot = self.memory.wide.get(number);
            slot.set(WRITING | UNCOPIED);
            slot.clear(DIRTY);
            let index = slot.slice().expect("a dirty slot holds a slice");
            DirtySlice { number, index }
        });
        slices.collect()
    }

    /// The content of a slice as it was when the flush took it, as it goes to disk.
    pub(super) fn copy(&self, slice: &DirtySlice) -> Vec<u8> {
        let mut kept = self.kept();
        let bytes =
            |words: &mut dyn Iterator<Item = u64>| words.flat_map(u64::to_be_bytes).collect();
        match kept.remove(&slice.number) {
            Some(words) => bytes(&mut words.iter().copied()),
            None => {
                let words = self.slot_words(slice.number);
                let copied = bytes(&mut words.iter().map(|word| word.load(Relaxed)));
                self.memory.wide.get(slice.number).clear(UNCOPIED);
                copied
            }
        }
    }

    /// The flush of `slice` is over; when it failed, the slice is dirty again.
    pub(super) fn written(&self, slice: &DirtySlice, success: bool) {
        let slot = self.memory.wide.get(slice.number);
        {
            let mut kept = self.kept();
            kept.remove(&slice.number);
            slot.clear(UNCOPIED);
        }
        if !success {
            self.mark_dirty(slot, slice.number);
        }
        slot.clear(WRITING);
        self.notify();
    }

    /// Keeps a copy of a slice for the flush that has yet to write it; it is about to change.
    #[cold]
    fn keep(&self, slot: &WideSlot, number: u32) {
        let mut kept = self.kept();
        if slot.clear(UNCOPIED) & UNCOPIED != 0 {
            let words = self.slot_words(number).iter();
            kept.insert(number, words.map(|word| word.load(Relaxed)).collect());
        }
    }

    fn slot_words(&self, number: u32) -> &[AtomicU64] {
        self.memory.directory.words(self.memory.slot_words(number))
    }

    fn mark_dirty(&self, slot: &WideSlot, number: u32) {
        if slot.flags() & DIRTY == 0 && slot.set(DIRTY) & DIRTY == 0 {
            self.dirty_count.fetch_add(1, AcqRel);
            self.dirty
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(number);
        }
    }

    /// Forgets every slice. None is dirty, and nobody pins or loads one for longer than a moment.
    pub(super) async fn forget_all(&self) {
        while !self.try_forget_all() {
            self.wait_unless(Self::try_forget_all).await;
        }
    }

    fn try_forget_all(&self) -> bool {
        let mut inner = self.lock();
        inner.loading.is_empty() && inner.segments.forget_all(&self.memory)
    }

    /// Forgets what was not looked at since this was last called, and gives its memory back. The
    /// lock is free between the steps.
    pub(super) fn clean(&self) {
        let steps = self.lock().segments.in_use();
        for _ in 0..steps {
            self.lock().segments.clean_next(&self.memory);
        }
        self.notify();
    }

    fn notify(&self) {
        if self.waiting.load(SeqCst) != 0 {
            self.changed.notify_all();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn kept(&self) -> MutexGuard<'_, HashMap<u32, Box<[u64]>>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for TableCache {
    fn drop(&mut self) {
        self.filled.notify_all();
    }
}

/// A slice that stays cached.
pub(super) struct Pinned<'c> {
    cache: &'c TableCache,
    slot: &'c WideSlot,
    number: u32,
    words: &'c [AtomicU64],
}

impl Pinned<'_> {
    pub(super) fn word(&self, entry: usize) -> u64 {
        self.words[entry].load(Acquire)
    }
    /// Changes an entry; the caller holds the lock that flushes begin under.
    pub(super) fn set_word(&self, entry: usize, value: u64) {
        if self.slot.flags() & UNCOPIED != 0 {
            self.cache.keep(self.slot, self.number);
        }
        self.words[entry].store(value, Release);
        self.cache.mark_dirty(self.slot, self.number);
    }
}

impl Drop for Pinned<'_> {
    fn drop(&mut self) {
        if self.slot.unpin() {
            self.cache.notify();
        }
    }
}

/// The right to load a slice; others wait for its end.
pub(super) struct Loading<'c> {
    cache: &'c TableCache,
    index: u64,
}

impl Loading<'_> {
    /// Keeps the slice, whose bytes are as on disk; gives its words.
    pub(super) fn complete(self, bytes: &[u8]) -> Vec<u64> {
        let words: Vec<u64> = words_of(bytes).collect();
        let mut inner = self.cache.lock();
        let memory = &self.cache.memory;
        let was_empty = inner.segments.in_use() == 0;
        inner.segments.insert(memory, self.index, &words, Used::Yes);
        drop(inner);
        if was_empty {
            self.cache.filled.notify_all();
        }
        words
    }
}

impl Drop for Loading<'_> {
    fn drop(&mut self) {
        let mut inner = self.cache.lock();
        inner.loading.retain(|&index| index != self.index);
        drop(inner);
        self.cache.notify();
    }
}

/// A slot reserved (pinned) for a slice that its holder reads. Dropped unfilled, it is free again.
pub(super) struct Fill<'c> {
    loading: Loading<'c>,
    slot: Option<u32>,
}

impl<'c> Fill<'c> {
    /// Fills the slot with the slice's bytes as they are on disk.
    pub(super) fn complete(mut self, bytes: &[u8]) -> Pinned<'c> {
        let (cache, index) = (self.loading.cache, self.loading.index);
        let number = self.slot.take().expect("filled once");
        let mut inner = cache.lock();
        let words = words_of(bytes);
        inner
            .segments
            .fill_slot(&cache.memory, number, index, words);
        drop(inner);
        cache.pinned(number)
    }
}

impl Drop for Fill<'_> {
    fn drop(&mut self) {
        if let Some(number) = self.slot {
            let cache = self.loading.cache;
            let mut inner = cache.lock();
            cache.memory.wide.get(number).unpin();
            inner.segments.give_back_slot(number);
        }
    }
}

fn words_of(bytes: &[u8]) -> impl Iterator<Item = u64> {
    let chunks = bytes.chunks_exact(8);
    chunks.map(|chunk| u64::from_be_bytes(chunk.try_into().expect("chunks of eight bytes")))
}

/// A dirty slice on its way to disk.
pub(super) struct DirtySlice {
    number: u32,
    /// Its index in the cache.
    pub(super) index: u64,
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
