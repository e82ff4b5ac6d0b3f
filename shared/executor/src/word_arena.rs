//! A long array of zeroed words that costs memory only where it was written, and gives it back.
//!
//! Owns one private anonymous mapping. Its place and length never change, so a reference into it
//! is good for its whole life: readers need no lock and no reclamation scheme, because there is
//! always *some* word where they look. What they see there may be of another use of the place;
//! telling is theirs. All access is by atomics.

use std::io;
use std::num::NonZeroUsize;
use std::ops::{Deref, Range};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;
#[cfg(miri)]
use std::sync::atomic::Ordering::Relaxed;

use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};

const WORD: usize = size_of::<AtomicU64>();

/// Words that begin as zero.
pub struct WordArena {
    base: NonNull<AtomicU64>,
    words: NonZeroUsize,
}

#[expect(
    unsafe_code,
    reason = "a mapping is plain memory that belongs to no thread"
)]
// SAFETY: the memory is only reached through `&[AtomicU64]`, which any thread may share.
unsafe impl Send for WordArena {}
#[expect(
    unsafe_code,
    reason = "a mapping is plain memory that belongs to no thread"
)]
// SAFETY: as above.
unsafe impl Sync for WordArena {}

impl WordArena {
    /// Reserves room for `words` words without using memory for them.
    ///
    /// # Errors
    /// The host's error; `InvalidInput` for a length of zero or beyond the address space.
    pub fn new(words: usize) -> io::Result<Self> {
        let bytes = words
            .checked_mul(WORD)
            .and_then(NonZeroUsize::new)
            .ok_or(io::ErrorKind::InvalidInput)?;
        let words = NonZeroUsize::new(words).ok_or(io::ErrorKind::InvalidInput)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        #[cfg(miri)]
        let flags = flags & !MapFlags::MAP_NORESERVE;
        #[expect(unsafe_code, reason = "mapping memory that this type then owns")]
        // SAFETY: a fresh mapping at an address that the kernel chooses aliases no Rust object.
        let base = unsafe { mmap_anonymous(None, bytes, protection, flags)? };
        Ok(Self {
            base: base.cast(),
            words,
        })
    }

    /// Gives the memory of `range` back to the host; its words read as zero again. Words of other
    /// ranges in the same pages stay.
    pub fn discard(&self, range: Range<usize>) {
        let range = range.start..range.end.min(self.words.get());
        if range.is_empty() {
            return;
        }
        #[cfg(miri)]
        self[range].iter().for_each(|word| word.store(0, Relaxed));
        #[cfg(not(miri))]
        self.discard_pages(range);
    }

    #[cfg(not(miri))]
    fn discard_pages(&self, range: Range<usize>) {
        const PAGE_WORDS: usize = 4096 / WORD;
        use std::sync::atomic::Ordering::Relaxed;
        let clear = |range: Range<usize>| {
            self[range].iter().for_each(|word| word.store(0, Relaxed));
        };
        let first = range.start.next_multiple_of(PAGE_WORDS).min(range.end);
        let last = (range.end - range.end % PAGE_WORDS).max(first);
        clear(range.start..first);
        clear(last..range.end);
        if first < last {
            #[expect(
                unsafe_code,
                reason = "dropping pages of a mapping that this type owns"
            )]
            // SAFETY: the range is inside the mapping. To other threads the pages turn to zero as
            // by stores of theirs, and all access is atomic.
            let done = unsafe {
                let start = self.base.as_ptr().add(first);
                libc::madvise(start.cast(), (last - first) * WORD, libc::MADV_DONTNEED)
            };
            if done != 0 {
                clear(first..last);
            }
        }
    }
}

impl Drop for WordArena {
    #[expect(unsafe_code, reason = "the mapping is owned here")]
    fn drop(&mut self) {
        // SAFETY: `base` and the length are those of a mapping that this value made and alone
        // owns; no reference into it outlives `self`.
        let _ = unsafe { munmap(self.base.cast(), self.words.get() * WORD) };
    }
}

impl Deref for WordArena {
    type Target = [AtomicU64];

    #[inline]
    #[expect(unsafe_code, reason = "the mapping is seen as a slice of atomics")]
    fn deref(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is page-aligned, `words` long, zeroed by the kernel, and lives as
        // long as `self`.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.words.get()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;

    #[test]
    fn discarded_words_read_as_zero_and_their_neighbours_stay() {
        let arena = WordArena::new(4096).unwrap();
        for word in arena.iter() {
            word.store(7, Ordering::Relaxed);
        }
        arena.discard(100..3000);
        for (index, word) in arena.iter().enumerate() {
            let expected = if (100..3000).contains(&index) { 0 } else { 7 };
            assert_eq!(word.load(Ordering::Relaxed), expected, "word {index}");
        }
    }

    #[test]
    fn an_arena_without_words_is_refused() {
        assert!(WordArena::new(0).is_err());
        assert!(WordArena::new(usize::MAX).is_err());
    }
}
