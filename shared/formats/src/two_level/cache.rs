//! Pieces of L2 tables in memory: looked at without a lock, bounded, never dirty.
//!
//! ```text
//!   view(slice) ─► one of the WAYS slots of slice % SETS ─► words, valid if the slot's sequence stayed
//!   insert, set   under a short lock: sequence odd ─ words ─ sequence even
//! ```
//!
//! What is in the file is written before it is changed here, so a slot can be reused at any time.
//! A slot's memory stays while the cache lives: whoever looks too late sees words of another slice
//! and is told so. Must not know: what entries mean, and where tables are.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicU64, fence};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

/// log2 of the most entries of a slice.
pub(super) const SLICE_BITS: u32 = 9;
const SETS: u64 = 512;
const WAYS: usize = 4;

/// A slice and its words.
struct Slot {
    /// Odd while the slot gets another slice.
    sequence: AtomicU64,
    slice: AtomicU64,
    words: Box<[AtomicU64]>,
}

/// See the module. At most 8 MiB of words.
pub(super) struct SliceCache {
    slots: Box<[OnceLock<Slot>]>,
    /// Entries of a slice.
    length: usize,
    /// Which slot of a set is given to another slice next.
    hands: Mutex<Box<[u8]>>,
}

impl SliceCache {
    /// For slices of `length` entries.
    pub(super) fn new(length: usize) -> Self {
        let slots = SETS as usize * WAYS;
        Self {
            slots: (0..slots).map(|_| OnceLock::new()).collect(),
            length,
            hands: Mutex::new(vec![0; SETS as usize].into_boxed_slice()),
        }
    }

    fn set_of(slice: u64) -> usize {
        (slice % SETS) as usize
    }

    fn slots_of(&self, slice: u64) -> &[OnceLock<Slot>] {
        let first = Self::set_of(slice) * WAYS;
        &self.slots[first..first + WAYS]
    }

    /// The slice as it is kept now; `None` when it is not.
    #[inline]
    pub(super) fn view(&self, slice: u64) -> Option<View<'_>> {
        let slots = self.slots_of(slice).iter().filter_map(OnceLock::get);
        slots.into_iter().find_map(|slot| {
            let seen = slot.sequence.load(Acquire);
            let found = seen.is_multiple_of(2) && slot.slice.load(Relaxed) == slice;
            found.then_some(View { slot, seen })
        })
    }

    /// Keeps a slice that was read.
    pub(super) fn insert(&self, slice: u64, words: &[u64]) {
        let mut hands = self.hands();
        if self.find(slice).is_some() {
            return;
        }
        let slots = self.slots_of(slice);
        let unused = slots.iter().position(|slot| slot.get().is_none());
        let way = unused.unwrap_or_else(|| {
            let hand = &mut hands[Self::set_of(slice)];
            *hand = (*hand + 1) % WAYS as u8;
            usize::from(*hand)
        });
        let slot = slots[way].get_or_init(|| Slot {
            sequence: AtomicU64::new(0),
            slice: AtomicU64::new(u64::MAX),
            words: (0..self.length).map(|_| AtomicU64::new(0)).collect(),
        });
        slot.change(|| {
            slot.slice.store(slice, Relaxed);
            for (word, value) in slot.words.iter().zip(words) {
                word.store(*value, Relaxed);
            }
        });
    }

    /// Changes entries of a slice, if it is kept, each at once.
    pub(super) fn set(&self, slice: u64, first: usize, words: &[u64]) {
        let _hands = self.hands();
        if let Some(slot) = self.find(slice) {
            for (word, value) in slot.words[first..].iter().zip(words) {
                word.store(*value, Release);
            }
        }
    }

    /// Forgets every slice.
    pub(super) fn forget_all(&self) {
        let _hands = self.hands();
        for slot in self.slots.iter().filter_map(OnceLock::get) {
            slot.change(|| slot.slice.store(u64::MAX, Relaxed));
        }
    }

    /// The slot of a slice. Under the lock.
    fn find(&self, slice: u64) -> Option<&Slot> {
        let slots = self.slots_of(slice).iter().filter_map(OnceLock::get);
        slots
            .into_iter()
            .find(|slot| slot.slice.load(Relaxed) == slice)
    }

    fn hands(&self) -> MutexGuard<'_, Box<[u8]>> {
        self.hands.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Slot {
    /// Gives the slot another slice. Under the cache's lock.
    fn change(&self, change: impl FnOnce()) {
        let sequence = self.sequence.load(Relaxed);
        self.sequence.store(sequence.wrapping_add(1), Relaxed);
        // Whoever sees a word of the new slice sees that the sequence is another one.
        fence(Release);
        change();
        self.sequence.store(sequence.wrapping_add(2), Release);
    }
}

/// A slice looked at without a lock.
pub(super) struct View<'c> {
    slot: &'c Slot,
    seen: u64,
}

impl View<'_> {
    /// An entry; true only if [`View::is_valid`] afterwards.
    #[inline]
    pub(super) fn word(&self, index: usize) -> u64 {
        self.slot.words[index].load(Acquire)
    }

    /// Whether all that was looked at belonged to the slice.
    #[inline]
    pub(super) fn is_valid(&self) -> bool {
        fence(Acquire);
        self.slot.sequence.load(Relaxed) == self.seen
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(slice: u64) -> Vec<u64> {
        (0..8).map(|index| slice << 8 | index).collect()
    }

    #[test]
    fn slices_are_replaced_within_their_set_and_changed_in_place() {
        let cache = SliceCache::new(8);
        let slices: Vec<u64> = (0..WAYS as u64 + 1).map(|way| 3 + way * SETS).collect();
        for slice in &slices {
            assert!(cache.view(*slice).is_none());
            cache.insert(*slice, &words(*slice));
        }
        let is_kept = |slice: &&u64| cache.view(**slice).is_some();
        assert_eq!(slices.iter().filter(is_kept).count(), WAYS);
        let last = slices[WAYS];
        let view = cache.view(last).unwrap();
        cache.set(last, 2, &[70, 71]);
        let seen: Vec<u64> = (1..5).map(|index| view.word(index)).collect();
        assert_eq!(seen, [last << 8 | 1, 70, 71, last << 8 | 4]);
        assert!(view.is_valid());
        cache.forget_all();
        assert!(!view.is_valid());
        assert!(cache.view(last).is_none());
    }

    #[test]
    fn a_view_never_mixes_two_slices() {
        let cache = SliceCache::new(8);
        let slices: Vec<u64> = (0..2 * WAYS as u64).map(|way| way * SETS).collect();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for round in 0..20_000 {
                    let slice = slices[round % slices.len()];
                    cache.insert(slice, &words(slice));
                }
            });
            let mut seen = 0;
            for round in 0..200_000 {
                let slice = slices[round % slices.len()];
                let Some(view) = cache.view(slice) else {
                    continue;
                };
                let found: Vec<u64> = (0..8).map(|index| view.word(index)).collect();
                if view.is_valid() {
                    assert_eq!(found, words(slice));
                    seen += 1;
                }
            }
            assert!(seen > 0);
        });
    }
}
