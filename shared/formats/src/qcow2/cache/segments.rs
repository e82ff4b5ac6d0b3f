//! Who has which memory, under the cache's lock.
//!
//! ```text
//!   arena = segments, each of them free, in the ring, or cut into wide slots
//!
//!   ring    oldest ──► ... ──► newest, filled from its start with blocks
//!           block = slice | length << 32, then the slice in its smallest form
//!   wide    slots of all words, for slices that somebody holds or that are dirty
//! ```
//!
//! The ring is a clock over blocks of any size: when room is needed the oldest segment is
//! compacted in place (what was not used since the last time goes) and becomes the newest. Wide
//! slots are a clock of their own; a slice that loses its slot is put into the ring, and a whole
//! segment of slots that are clean and not in use any more becomes a segment of the ring. Writers
//! may take up to half of the segments.
//!
//! Memory is bounded by segments in use; what the directory grows by is taken off their number.

use super::directory::{Directory, Place, Used};
use super::encoding::Form;
use super::wide::{WideSlot, WideSlots};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::Ordering::Relaxed;

/// Least number of wide slots: more than one task needs at once, whatever the budget.
const MIN_WIDE_SLOTS: usize = 16;
/// Least number of segments beside those of wide slots.
const MIN_RING_SEGMENTS: usize = 2;
/// Segments of the ring that are compacted for one new block before one is emptied.
const MAX_COMPACTED: usize = 4;
/// Bytes of a segment where budget and slices let choose.
const SEGMENT_BYTES: u64 = 64 << 10;

/// Sizes of a cache's memory.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub(super) slice_words: usize,
    pub(super) segment_words: usize,
    pub(super) segments: usize,
    /// Most segments of wide slots.
    pub(super) wide_segments: usize,
}

impl Sizes {
    /// For slices of `slice_bytes` in about `budget` bytes.
    pub(super) fn new(slice_bytes: u64, budget: u64) -> Self {
        let share = (budget / 16).clamp(2 * slice_bytes, SEGMENT_BYTES.max(2 * slice_bytes));
        let per_segment = (share / slice_bytes).next_power_of_two();
        let per_segment = if per_segment * slice_bytes > share {
            (per_segment / 2).max(2)
        } else {
            per_segment
        };
        let segment_bytes = per_segment * slice_bytes;
        let least_wide = MIN_WIDE_SLOTS.div_ceil(per_segment as usize);
        let segments = (budget / segment_bytes) as usize;
        let segments = segments.max(least_wide + MIN_RING_SEGMENTS);
        Self {
            slice_words: (slice_bytes / 8) as usize,
            segment_words: (segment_bytes / 8) as usize,
            segments,
            wide_segments: (segments / 2).max(least_wide),
        }
    }
    pub(super) fn wide_slots(&self) -> usize {
        self.wide_segments * (self.segment_words / self.slice_words)
    }
}

/// What the segments are made of; shared with readers.
pub(super) struct Memory {
    pub(super) directory: Directory,
    pub(super) wide: WideSlots,
    pub(super) sizes: Sizes,
}

impl Memory {
    fn segment(&self, segment: u32) -> Range<usize> {
        let first = segment as usize * self.sizes.segment_words;
        first..first + self.sizes.segment_words
    }
    /// Where a wide slot's words are.
    pub(super) fn slot_words(&self, slot: u32) -> Range<usize> {
        let first = slot as usize * self.sizes.slice_words;
        first..first + self.sizes.slice_words
    }
    /// The wide slot that holds the slice at `place`.
    pub(super) fn slot_of(&self, slice: u64, place: Place) -> Option<(u32, &WideSlot)> {
        let slot_words = self.sizes.slice_words;
        if place.form != Form::WORDS || !place.offset.is_multiple_of(slot_words) {
            return None;
        }
        let number = (place.offset / slot_words) as u32;
        let slot = self.wide.get(number);
        (slot.slice() == Some(slice)).then_some((number, slot))
    }
    fn store(&self, offset: usize, words: &[u64]) {
        let range = offset..offset + words.len();
        for (word, &value) in self.directory.words(range).iter().zip(words) {
            word.store(value, Relaxed);
        }
    }
}

/// Why no wide slot is to be had.
pub(super) struct AllInUse {
    /// Whether a flush would help.
    pub(super) dirty: bool,
}

/// What stays of a segment that is compacted.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Keep {
    Used,
    Nothing,
}

/// The state of all segments.
pub(super) struct Segments {
    /// Segments from this one on were never used.
    fresh: u32,
    free: Vec<u32>,
    /// Oldest first.
    ring: VecDeque<Filled>,
    wide: Vec<u32>,
    free_slots: Vec<u32>,
    /// The clock's hand over the wide slots.
    hand: usize,
    /// The wide segment whose turn it is to be given back.
    steal_hand: usize,
    directory_bytes: usize,
    slice: Vec<u64>,
    encoded: Vec<u64>,
}

/// A segment of the ring.
struct Filled {
    segment: u32,
    words: usize,
}

const fn header(slice: u64, words: usize) -> u64 {
    slice | (words as u64) << 32
}

impl Segments {
    pub(super) fn new() -> Self {
        Self {
            fresh: 0,
            free: Vec::new(),
            ring: VecDeque::new(),
            wide: Vec::new(),
            free_slots: Vec::new(),
            hand: 0,
            steal_hand: 0,
            directory_bytes: 0,
            slice: Vec::new(),
            encoded: Vec::new(),
        }
    }

    /// Segments that hold slices.
    pub(super) fn in_use(&self) -> usize {
        self.ring.len() + self.wide.len()
    }

    /// Bytes that slices and directory take.
    #[cfg(all(test, not(loom)))]
    pub(super) fn bytes(&self, memory: &Memory) -> usize {
        self.in_use() * memory.sizes.segment_words * 8 + self.directory_bytes
    }

    /// Most segments in use, now that the directory takes its share.
    fn limit(&self, memory: &Memory) -> usize {
        let sizes = &memory.sizes;
        let taken = self.directory_bytes.div_ceil(sizes.segment_words * 8);
        let least = MIN_WIDE_SLOTS.div_ceil(memory.wide.per_segment()) + MIN_RING_SEGMENTS;
        sizes.segments.saturating_sub(taken).max(least)
    }

    fn take_segment(&mut self, memory: &Memory) -> Option<u32> {
        if self.in_use() >= self.limit(memory) {
            return None;
        }
        self.free.pop().or_else(|| {
            let segment = self.fresh;
            ((segment as usize) < memory.sizes.segments).then(|| {
                self.fresh += 1;
                segment
            })
        })
    }

    fn release(&mut self, memory: &Memory, segment: u32) {
        memory.directory.discard(memory.segment(segment));
        self.free.push(segment);
    }

    fn publish(&mut self, memory: &Memory, slice: u64, place: Place, used: Used) {
        self.directory_bytes += memory.directory.publish(slice, place, used);
    }

    /// Caches a slice in its smallest form. Without room it stays uncached.
    pub(super) fn insert(&mut self, memory: &Memory, slice: u64, words: &[u64], used: Used) {
        let mut encoded = std::mem::take(&mut self.encoded);
        let form = memory.directory.layout().encode(words, &mut encoded);
        self.push(memory, slice, (form, &encoded), used);
        self.encoded = encoded;
    }

    fn push(&mut self, memory: &Memory, slice: u64, (form, words): (Form, &[u64]), used: Used) {
        let length = words.len() + 1;
        if !self.has_room(memory, length) && !self.make_room(memory, length) {
            return;
        }
        let Some(newest) = self.ring.back_mut() else {
            return;
        };
        let start = memory.segment(newest.segment).start + newest.words;
        newest.words += length;
        memory.store(start, &[header(slice, length)]);
        memory.store(start + 1, words);
        let offset = start + 1;
        self.publish(memory, slice, Place { offset, form }, used);
    }

    fn has_room(&self, memory: &Memory, words: usize) -> bool {
        let newest = self.ring.back();
        newest.is_some_and(|newest| newest.words + words <= memory.sizes.segment_words)
    }

    /// Gets a newest segment with room for so many words.
    fn make_room(&mut self, memory: &Memory, words: usize) -> bool {
        while self.in_use() > self.limit(memory) && self.ring.len() > 1 {
            self.drop_oldest(memory);
        }
        if let Some(segment) = self.take_segment(memory) {
            self.ring.push_back(Filled { segment, words: 0 });
            return true;
        }
        if let Some(filled) = self.narrow_a_wide_segment(memory) {
            self.ring.push_back(filled);
            if self.has_room(memory, words) {
                return true;
            }
        }
        for attempt in 0..=MAX_COMPACTED {
            let Some(mut oldest) = self.ring.pop_front() else {
                return false;
            };
            let keep = if attempt < MAX_COMPACTED {
                Keep::Used
            } else {
                Keep::Nothing
            };
            self.compact(memory, &mut oldest, keep);
            self.ring.push_back(oldest);
            if self.has_room(memory, words) {
                return true;
            }
        }
        false
    }

    fn drop_oldest(&mut self, memory: &Memory) {
        if let Some(mut oldest) = self.ring.pop_front() {
            self.compact(memory, &mut oldest, Keep::Nothing);
            self.release(memory, oldest.segment);
        }
    }

    /// Takes the oldest segment out of the ring, which has others; what was used in it moves to
    /// the newest while that has room.
    fn vacate_oldest(&mut self, memory: &Memory) -> u32 {
        let mut oldest = self.ring.pop_front().expect("the ring has segments");
        self.compact(memory, &mut oldest, Keep::Used);
        if self.has_room(memory, oldest.words) {
            self.append_to_newest(memory, &oldest);
        } else {
            self.compact(memory, &mut oldest, Keep::Nothing);
        }
        oldest.segment
    }

    /// Moves what is kept of a segment to its start.
    fn compact(&mut self, memory: &Memory, filled: &mut Filled, keep: Keep) {
        let directory = &memory.directory;
        let start = memory.segment(filled.segment).start;
        let (mut from, mut to) = (0, 0);
        while from < filled.words {
            let (slice, length) = self.block(memory, start + from);
            let offset = start + from + 1;
            let place = directory.place(slice);
            if let Some(place) = place.filter(|place| place.offset == offset) {
                let kept = directory.take_used(slice) && keep == Keep::Used;
                if !kept || to != from {
                    directory.retract(slice);
                }
                if kept && to != from {
                    move_words(memory, start + from..start + from + length, start + to);
                    let offset = start + to + 1;
                    self.publish(memory, slice, Place { offset, ..place }, Used::No);
                }
                to += if kept { length } else { 0 };
            }
            from += length;
        }
        filled.words = to;
    }

    /// Slice and length in words of the block at `offset`.
    fn block(&self, memory: &Memory, offset: usize) -> (u64, usize) {
        let header = memory.directory.words(offset..offset + 1)[0].load(Relaxed);
        let length = (header >> 32) as usize;
        debug_assert!(length > 1, "a block has a header and words");
        (header & 0xffff_ffff, length.max(1))
    }

    /// A slot for a slice's words, which holds none now. Others may have moved.
    pub(super) fn take_slot(&mut self, memory: &Memory) -> Result<u32, AllInUse> {
        if let Some(slot) = self.free_slots.pop() {
            return Ok(slot);
        }
        let may_grow = self.wide.len() < memory.sizes.wide_segments;
        if may_grow && let Some(segment) = self.take_segment(memory) {
            return Ok(self.cut(memory, segment));
        }
        if let Some(slot) = self.replace_slot(memory) {
            return Ok(slot);
        }
        if may_grow && self.ring.len() > 1 {
            let oldest = self.vacate_oldest(memory);
            return Ok(self.cut(memory, oldest));
        }
        // The first round has taken every mark.
        if let Some(slot) = self.replace_slot(memory) {
            return Ok(slot);
        }
        let dirty = self.slots(memory).any(WideSlot::is_only_dirty);
        Err(AllInUse { dirty })
    }

    /// Whether [`Segments::take_slot`] would find one, or a flush would help.
    pub(super) fn has_slot(&self, memory: &Memory) -> bool {
        let may_grow = self.wide.len() < memory.sizes.wide_segments
            && (self.in_use() < self.limit(memory) || self.ring.len() > 1);
        !self.free_slots.is_empty()
            || may_grow
            || self
                .slots(memory)
                .any(|slot| slot.is_replaceable() || slot.is_only_dirty())
    }

    fn slots<'m>(&self, memory: &'m Memory) -> impl Iterator<Item = &'m WideSlot> {
        let numbers = self
            .wide
            .iter()
            .flat_map(|&segment| memory.wide.of_segment(segment));
        numbers.map(|number| memory.wide.get(number))
    }

    fn cut(&mut self, memory: &Memory, segment: u32) -> u32 {
        self.wide.push(segment);
        let mut slots = memory.wide.of_segment(segment);
        let first = slots.start;
        slots.next();
        self.free_slots.extend(slots.rev());
        first
    }

    /// One round of the clock over the wide slots.
    fn replace_slot(&mut self, memory: &Memory) -> Option<u32> {
        let per_segment = memory.wide.per_segment();
        let slots = self.wide.len() * per_segment;
        for _ in 0..slots {
            let hand = self.hand % slots;
            self.hand = hand + 1;
            let segment = self.wide[hand / per_segment];
            let number = memory.wide.of_segment(segment).start + (hand % per_segment) as u32;
            let slot = memory.wide.get(number);
            let Some(slice) = slot.slice().filter(|_| slot.is_replaceable()) else {
                continue;
            };
            if memory.directory.take_used(slice) {
                continue;
            }
            self.read_slot(memory, number);
            memory.directory.retract(slice);
            slot.set_slice(None);
            // Pinned, because making room may turn idle wide segments into the ring's.
            slot.pin();
            let words = std::mem::take(&mut self.slice);
            self.insert(memory, slice, &words, Used::No);
            self.slice = words;
            slot.unpin();
            return Some(number);
        }
        None
    }

    fn read_slot(&mut self, memory: &Memory, number: u32) {
        let words = memory.directory.words(memory.slot_words(number));
        self.slice.clear();
        self.slice
            .extend(words.iter().map(|word| word.load(Relaxed)));
    }

    /// Turns a segment of slots that nobody used lately into one of the ring, in place.
    fn narrow_a_wide_segment(&mut self, memory: &Memory) -> Option<Filled> {
        if self.wide.len() <= 1 {
            return None;
        }
        let position = self.steal_hand % self.wide.len();
        self.steal_hand = position + 1;
        let segment = self.wide[position];
        let slots = memory.wide.of_segment(segment);
        let mut numbered = slots.clone().map(|number| memory.wide.get(number));
        let is_idle = numbered.all(|slot| {
            let used = |slice| memory.directory.take_used(slice);
            slot.is_replaceable() && !slot.slice().is_some_and(used)
        });
        if !is_idle {
            return None;
        }
        let blocks = self.withdraw(memory, slots.clone());
        self.wide.swap_remove(position);
        self.free_slots.retain(|slot| !slots.contains(slot));
        let mut filled = Filled { segment, words: 0 };
        let start = memory.segment(segment).start;
        for (slice, form, words) in blocks {
            let length = words.len() + 1;
            if filled.words + length > memory.sizes.segment_words {
                break;
            }
            memory.store(start + filled.words, &[header(slice, length)]);
            memory.store(start + filled.words + 1, &words);
            let offset = start + filled.words + 1;
            self.publish(memory, slice, Place { offset, form }, Used::No);
            filled.words += length;
        }
        Some(filled)
    }

    /// Takes the slices out of idle slots.
    fn withdraw(&mut self, memory: &Memory, slots: Range<u32>) -> Vec<(u64, Form, Vec<u64>)> {
        let mut blocks = Vec::new();
        for number in slots {
            let slot = memory.wide.get(number);
            let Some(slice) = slot.slice() else { continue };
            self.read_slot(memory, number);
            memory.directory.retract(slice);
            slot.set_slice(None);
            let mut encoded = Vec::new();
            let form = memory.directory.layout().encode(&self.slice, &mut encoded);
            blocks.push((slice, form, encoded));
        }
        blocks
    }

    /// Puts a slice into a slot that its caller has; readers find it from now on.
    pub(super) fn fill_slot(
        &mut self,
        memory: &Memory,
        number: u32,
        slice: u64,
        words: impl Iterator<Item = u64>,
    ) {
        let range = memory.slot_words(number);
        let offset = range.start;
        for (word, value) in memory.directory.words(range).iter().zip(words) {
            word.store(value, Relaxed);
        }
        memory.wide.get(number).set_slice(Some(slice));
        let form = Form::WORDS;
        self.publish(memory, slice, Place { offset, form }, Used::Yes);
    }

    /// A slot taken and not filled.
    pub(super) fn give_back_slot(&mut self, number: u32) {
        self.free_slots.push(number);
    }

    /// Forgets every slice, unless one is held or dirty; then false.
    pub(super) fn forget_all(&mut self, memory: &Memory) -> bool {
        if !self.slots(memory).all(WideSlot::is_replaceable) {
            return false;
        }
        while !self.ring.is_empty() {
            self.drop_oldest(memory);
        }
        self.free_slots.clear();
        for segment in std::mem::take(&mut self.wide) {
            for slot in memory.wide.of_segment(segment) {
                let slot = memory.wide.get(slot);
                if let Some(slice) = slot.slice() {
                    memory.directory.retract(slice);
                    slot.set_slice(None);
                }
            }
            self.release(memory, segment);
        }
        true
    }

    /// Forgets what was not used since the last pass in the next segment of a pass, and gives
    /// its memory back.
    pub(super) fn clean_next(&mut self, memory: &Memory) {
        self.clean_a_wide_segment(memory);
        let Some(mut oldest) = self.ring.pop_front() else {
            return;
        };
        self.compact(memory, &mut oldest, Keep::Used);
        if oldest.words == 0 {
            self.release(memory, oldest.segment);
        } else if !self.ring.is_empty() && self.has_room(memory, oldest.words) {
            self.append_to_newest(memory, &oldest);
            self.release(memory, oldest.segment);
        } else {
            self.ring.push_back(oldest);
        }
    }

    fn append_to_newest(&mut self, memory: &Memory, filled: &Filled) {
        let start = memory.segment(filled.segment).start;
        let mut at = 0;
        while at < filled.words {
            let (slice, length) = self.block(memory, start + at);
            let payload = memory.directory.words(start + at + 1..start + at + length);
            let words: Vec<u64> = payload.iter().map(|word| word.load(Relaxed)).collect();
            if let Some(place) = memory.directory.place(slice) {
                memory.directory.retract(slice);
                self.push(memory, slice, (place.form, &words), Used::No);
            }
            at += length;
        }
    }

    fn clean_a_wide_segment(&mut self, memory: &Memory) {
        if self.wide.is_empty() {
            return;
        }
        let position = self.steal_hand % self.wide.len();
        self.steal_hand = position + 1;
        let segment = self.wide[position];
        for number in memory.wide.of_segment(segment) {
            let slot = memory.wide.get(number);
            let Some(slice) = slot.slice().filter(|_| slot.is_replaceable()) else {
                continue;
            };
            if !memory.directory.take_used(slice) {
                memory.directory.retract(slice);
                slot.set_slice(None);
                self.free_slots.push(number);
            }
        }
        let slots = memory.wide.of_segment(segment);
        let is_free = slots.clone().all(|number| {
            let slot = memory.wide.get(number);
            slot.slice().is_none() && slot.is_replaceable()
        });
        if is_free {
            self.wide.swap_remove(position);
            self.free_slots.retain(|slot| !slots.contains(slot));
            self.release(memory, segment);
        }
    }
}

/// Copies words to a lower place, which may overlap.
fn move_words(memory: &Memory, from: Range<usize>, to: usize) {
    for (number, word) in from.enumerate() {
        let value = memory.directory.words(word..word + 1)[0].load(Relaxed);
        memory.directory.words(to + number..to + number + 1)[0].store(value, Relaxed);
    }
}
