//! The bits of a bitmap: atomic words that never move while the bitmap grows.
//!
//! Bucket `k` holds `BASE << k` words, so that any number of words needs few buckets and the place
//! of a word follows from its index alone.

use std::sync::OnceLock;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, SeqCst};
use std::sync::atomic::fence;

/// Words of the first bucket.
const BASE: u64 = 512;
/// Buckets for any bitmap that [`MAX_WORDS`] allows.
const BUCKETS: usize = 20;
/// Most words of a bitmap: 512 MiB of memory.
pub(super) const MAX_WORDS: u64 = 64 << 20;
/// Bits of a word.
pub(super) const WORD_BITS: u64 = 64;

pub(super) struct Words {
    buckets: [OnceLock<Box<[AtomicU64]>>; BUCKETS],
}

const fn place(word: u64) -> (usize, usize) {
    let shifted = word + BASE;
    let bucket = shifted.ilog2() - BASE.ilog2();
    (bucket as usize, (shifted - (BASE << bucket)) as usize)
}

/// The bits of `word` that lie in `first..=last`.
const fn mask(word: u64, first: u64, last: u64) -> u64 {
    let start = word * WORD_BITS;
    let low = first.saturating_sub(start);
    let high = last - start;
    let upper = if high >= WORD_BITS - 1 {
        u64::MAX
    } else {
        (1 << (high + 1)) - 1
    };
    upper & (u64::MAX << low)
}

impl Words {
    /// No memory yet; see [`Words::reserve`].
    pub(super) fn new() -> Self {
        Self {
            buckets: std::array::from_fn(|_| OnceLock::new()),
        }
    }

    /// Makes memory for `count` words, all clear.
    pub(super) fn reserve(&self, count: u64) {
        let Some(last) = count.checked_sub(1) else {
            return;
        };
        for (number, bucket) in self.buckets.iter().enumerate().take(place(last).0 + 1) {
            bucket.get_or_init(|| (0..BASE << number).map(|_| AtomicU64::new(0)).collect());
        }
    }

    fn word(&self, index: u64) -> Option<&AtomicU64> {
        let (bucket, offset) = place(index);
        self.buckets.get(bucket)?.get()?.get(offset)
    }

    /// The word at `index`; 0 where there is no memory.
    pub(super) fn get(&self, index: u64) -> u64 {
        self.word(index).map_or(0, |word| word.load(Acquire))
    }

    /// Sets the bits `first..=last`.
    pub(super) fn set(&self, first: u64, last: u64) {
        // What was written is visible to whoever clears a bit that is found set here.
        fence(SeqCst);
        for index in first / WORD_BITS..=last / WORD_BITS {
            let bits = mask(index, first, last);
            if let Some(word) = self.word(index)
                && word.load(Relaxed) & bits != bits
            {
                word.fetch_or(bits, AcqRel);
            }
        }
    }

    /// Clears the bits `first..=last`.
    pub(super) fn clear(&self, first: u64, last: u64) {
        for index in first / WORD_BITS..=last / WORD_BITS {
            if let Some(word) = self.word(index) {
                word.fetch_and(!mask(index, first, last), AcqRel);
            }
        }
        fence(SeqCst);
    }

    /// Adds bits to a word.
    pub(super) fn or(&self, index: u64, bits: u64) {
        if bits != 0
            && let Some(word) = self.word(index)
        {
            word.fetch_or(bits, AcqRel);
        }
    }

    /// Takes all bits out of a word.
    pub(super) fn take(&self, index: u64) -> u64 {
        self.word(index).map_or(0, |word| word.swap(0, AcqRel))
    }

    /// The first bit in `from..end` that is set (or clear, when `wanted` is 0), if any.
    pub(super) fn find(&self, from: u64, end: u64, wanted: Wanted) -> Option<u64> {
        let mut at = from;
        while at < end {
            let index = at / WORD_BITS;
            let word = match wanted {
                Wanted::Set => self.get(index),
                Wanted::Clear => !self.get(index),
            };
            let rest = word & (u64::MAX << (at % WORD_BITS));
            if rest != 0 {
                let found = index * WORD_BITS + u64::from(rest.trailing_zeros());
                return (found < end).then_some(found);
            }
            at = (index + 1) * WORD_BITS;
        }
        None
    }
}

/// What [`Words::find`] looks for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    Set,
    Clear,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_have_places_of_their_own() {
        let mut places: Vec<_> = (0..10_000).map(place).collect();
        places.dedup();
        assert_eq!(places.len(), 10_000);
        let (bucket, offset) = place(MAX_WORDS - 1);
        assert!(bucket < BUCKETS && offset < (BASE << bucket) as usize);
    }

    #[test]
    fn ranges_of_bits_are_set_cleared_and_found_across_words() {
        let words = Words::new();
        words.reserve(1000);
        words.set(60, 200);
        assert_eq!(words.find(0, 64_000, Wanted::Set), Some(60));
        assert_eq!(words.find(60, 64_000, Wanted::Clear), Some(201));
        words.clear(64, 127);
        assert_eq!(words.find(64, 64_000, Wanted::Set), Some(128));
        assert_eq!(words.get(0), u64::MAX << 60);
        assert_eq!(words.find(0, 60, Wanted::Set), None);
    }
}
