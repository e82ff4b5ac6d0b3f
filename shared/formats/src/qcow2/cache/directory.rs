//! Where each slice is: what readers without locks look at.
//!
//! ```text
//!   directory[slice] = generation | used | form | offset ──► words of the arena
//!
//!   reader   entry ─acquire─ words ─acquire fence─ the same entry again? then they were the slice's
//!   writer   entry := none ─release fence─ words of another slice ...   (under the cache's lock)
//!            words ─release─ entry := new generation, form, offset
//! ```
//!
//! A place of the arena gets new content only after the entry that referred to it was taken away,
//! so whoever sees a word of the new content also sees that the entry has changed. The arena
//! never moves and is never freed while the cache lives; a late reader sees words of another
//! slice, never memory that is gone. An entry's generation makes each of its states differ from the
//! 2^24 before, so it does not return to an old value while somebody looks.
//!
//! Words of a slice in the form [`Form::WORDS`] may change in place, one atomic store each; the
//! entry stays. Must not know what is dirty, pinned or to be replaced.

use super::atomics::{AtomicU64, WordArena, fence};
use super::encoding::{Form, Layout};
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

#[cfg(not(loom))]
const CHUNK: usize = 1024;
#[cfg(loom)]
const CHUNK: usize = 2;

const FORM_SHIFT: u32 = 32;
const FORM_MASK: u64 = 0x7f;
/// Looked at since the clock last passed.
const USED: u64 = 1 << 39;
const GENERATION: u64 = 1 << 40;

/// The lock-free part of a cache, in one line of the processor's.
#[repr(align(64))]
pub(super) struct Directory {
    chunks: Box<[OnceLock<Box<[AtomicU64]>>]>,
    arena: WordArena,
    layout: Layout,
}

/// A slice's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// Of its first word in the arena.
    pub(super) offset: usize,
    pub(super) form: Form,
}

impl Directory {
    /// A directory for slices below `slices`, none of which is cached.
    pub(super) fn new(slices: u64, arena: WordArena, layout: Layout) -> Self {
        let chunks = (slices as usize).div_ceil(CHUNK);
        Self {
            chunks: (0..chunks).map(|_| OnceLock::new()).collect(),
            arena,
            layout,
        }
    }

    pub(super) fn layout(&self) -> &Layout {
        &self.layout
    }

    #[inline]
    fn entry(&self, index: u64) -> Option<&AtomicU64> {
        let chunk = self.chunks.get(index as usize / CHUNK)?.get()?;
        Some(&chunk[index as usize % CHUNK])
    }

    /// The slice as it is cached now; `None` when it is not.
    #[inline]
    pub(super) fn view(&self, index: u64) -> Option<View<'_>> {
        let entry = self.entry(index)?;
        let seen = entry.load(Acquire);
        let form = form_of(seen);
        if form == Form::NONE {
            return None;
        }
        if seen & USED == 0 {
            entry.fetch_or(USED, Relaxed);
        }
        Some(View {
            entry,
            seen,
            directory: self,
        })
    }

    /// Where the slice is. The answer holds while the caller holds the cache's lock.
    pub(super) fn place(&self, index: u64) -> Option<Place> {
        let entry = self.entry(index)?.load(Acquire);
        let form = form_of(entry);
        (form != Form::NONE).then_some(Place {
            offset: offset_of(entry),
            form,
        })
    }

    /// Whether the slice was looked at since this was last asked. Under the cache's lock.
    pub(super) fn take_used(&self, index: u64) -> bool {
        self.entry(index)
            .is_some_and(|entry| entry.fetch_and(!USED, Relaxed) & USED != 0)
    }

    /// Lets readers find the slice, whose words are in place. Under the cache's lock. Returns the
    /// bytes that the directory itself has grown by.
    pub(super) fn publish(&self, index: u64, place: Place, used: Used) -> usize {
        let mut grown = 0;
        let chunk = self.chunks[index as usize / CHUNK].get_or_init(|| {
            grown = CHUNK * size_of::<u64>();
            (0..CHUNK).map(|_| AtomicU64::new(0)).collect()
        });
        let entry = &chunk[index as usize % CHUNK];
        let generation = next_generation(entry.load(Relaxed));
        let used = match used {
            Used::Yes => USED,
            Used::No => 0,
        };
        let form = u64::from(place.form.0) << FORM_SHIFT;
        // Not a plain store: those have no place among the readers' marks that loom knows of.
        entry.swap(generation | used | form | place.offset as u64, Release);
        grown
    }

    /// Takes the slice away from readers: after this its words may be overwritten. Under the
    /// cache's lock.
    pub(super) fn retract(&self, index: u64) {
        if let Some(entry) = self.entry(index) {
            entry.swap(next_generation(entry.load(Relaxed)), Relaxed);
            fence(Release);
        }
    }

    /// Words of the arena.
    pub(super) fn words(&self, range: Range<usize>) -> &[AtomicU64] {
        &self.arena[range]
    }

    /// Gives the memory of words that hold no slice back to the host.
    pub(super) fn discard(&self, range: Range<usize>) {
        self.arena.discard(range);
    }

    /// The words of a slice in any form, one after the other. Under the cache's lock.
    pub(super) fn decode(&self, place: Place) -> impl Iterator<Item = u64> {
        let at = move |index| self.load(place.offset + index);
        (0..self.layout.words).map(move |index| self.layout.word(place.form, index, at))
    }

    /// Some word, also beyond the end: readers may follow content that is no longer theirs.
    #[inline]
    fn load(&self, offset: usize) -> u64 {
        self.arena.get(offset).map_or(0, |word| word.load(Relaxed))
    }
}

/// Whether a slice begins as used.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Used {
    Yes,
    No,
}

#[inline]
const fn form_of(entry: u64) -> Form {
    Form((entry >> FORM_SHIFT & FORM_MASK) as u8)
}

#[inline]
const fn offset_of(entry: u64) -> usize {
    (entry & 0xffff_ffff) as usize
}

const fn next_generation(entry: u64) -> u64 {
    (entry & !(GENERATION - 1)).wrapping_add(GENERATION)
}

/// A slice read without locks.
pub(in crate::qcow2) struct View<'c> {
    entry: &'c AtomicU64,
    seen: u64,
    directory: &'c Directory,
}

impl View<'_> {
    /// The word at `index`; true only if [`View::is_valid`] afterwards.
    #[inline]
    pub(in crate::qcow2) fn word(&self, index: usize) -> u64 {
        let (form, offset) = (form_of(self.seen), offset_of(self.seen));
        let at = |word| self.directory.load(offset + word);
        self.directory.layout.word(form, index, at)
    }

    /// How many words from `index` on, `most` at most, are evenly `step` apart; at least one.
    #[inline]
    pub(in crate::qcow2) fn run(&self, index: usize, most: usize, step: u64) -> usize {
        let (form, offset) = (form_of(self.seen), offset_of(self.seen));
        let at = |word| self.directory.load(offset + word);
        self.directory.layout.run(form, (index, most), step, at)
    }

    /// Whether every word read until now belonged to the slice.
    #[inline]
    pub(in crate::qcow2) fn is_valid(&self) -> bool {
        fence(Acquire);
        (self.entry.load(Relaxed) ^ self.seen) & !USED == 0
    }
}
