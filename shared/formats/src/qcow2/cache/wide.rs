//! Slots for slices with all their words, which writers hold on to.
//!
//! A slot's number is the place of its words in the arena. Owns who has a slot pinned and whether
//! its words are on disk; must not know which slot is given to whom.

use super::atomics::{AtomicU8, AtomicU32, AtomicU64};
use std::sync::OnceLock;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, SeqCst};

/// Changed since it was last handed to a flush.
pub(super) const DIRTY: u8 = 1;
/// A flush has to write it and has not finished.
pub(super) const WRITING: u8 = 2;
/// A flush has yet to copy it: who changes it keeps a copy of the words first.
pub(super) const UNCOPIED: u8 = 4;

const NO_SLICE: u64 = u64::MAX;

/// A slot for a slice's words.
pub(super) struct WideSlot {
    slice: AtomicU64,
    pins: AtomicU32,
    flags: AtomicU8,
}

impl WideSlot {
    fn new() -> Self {
        Self {
            slice: AtomicU64::new(NO_SLICE),
            pins: AtomicU32::new(0),
            flags: AtomicU8::new(0),
        }
    }
    /// The slice in it. Under the cache's lock, or while it is pinned or dirty.
    pub(super) fn slice(&self) -> Option<u64> {
        Some(self.slice.load(Relaxed)).filter(|slice| *slice != NO_SLICE)
    }
    pub(super) fn set_slice(&self, slice: Option<u64>) {
        self.slice.store(slice.unwrap_or(NO_SLICE), Relaxed);
    }
    pub(super) fn pin(&self) {
        self.pins.fetch_add(1, SeqCst);
    }
    /// Whether nobody has it pinned any more.
    pub(super) fn unpin(&self) -> bool {
        self.pins.fetch_sub(1, SeqCst) == 1
    }
    pub(super) fn flags(&self) -> u8 {
        self.flags.load(Acquire)
    }
    /// Sets flags; returns those from before.
    pub(super) fn set(&self, flags: u8) -> u8 {
        self.flags.fetch_or(flags, AcqRel)
    }
    pub(super) fn clear(&self, flags: u8) -> u8 {
        self.flags.fetch_and(!flags, AcqRel)
    }
    pub(super) fn is_pinned(&self) -> bool {
        self.pins.load(SeqCst) != 0
    }
    pub(super) fn is_replaceable(&self) -> bool {
        !self.is_pinned() && self.flags() == 0
    }
    /// Whether a flush would make it replaceable.
    pub(super) fn is_only_dirty(&self) -> bool {
        !self.is_pinned() && self.flags() & DIRTY != 0
    }
}

/// The slots of every segment of the arena that ever held any.
pub(super) struct WideSlots {
    segments: Box<[OnceLock<Box<[WideSlot]>>]>,
    per_segment: usize,
}

impl WideSlots {
    pub(super) fn new(segments: usize, per_segment: usize) -> Self {
        Self {
            segments: (0..segments).map(|_| OnceLock::new()).collect(),
            per_segment,
        }
    }
    pub(super) fn per_segment(&self) -> usize {
        self.per_segment
    }
    /// The numbers of a segment's slots.
    pub(super) fn of_segment(&self, segment: u32) -> std::ops::Range<u32> {
        let first = segment * self.per_segment as u32;
        first..first + self.per_segment as u32
    }
    pub(super) fn get(&self, number: u32) -> &WideSlot {
        let number = number as usize;
        let segment = &self.segments[number / self.per_segment];
        let slots = segment.get_or_init(|| {
            let slots = (0..self.per_segment).map(|_| WideSlot::new());
            slots.collect()
        });
        &slots[number % self.per_segment]
    }
}
