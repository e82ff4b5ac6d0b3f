//! The atomics and locks of the cache: the standard ones, or loom's, which try every order of
//! events.
//!
//! Models run with `RUSTFLAGS="--cfg loom"` (`scripts/loom`).

#[cfg(not(loom))]
pub(super) use executor::WordArena;
#[cfg(not(loom))]
pub(super) use std::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicU8, AtomicU32, AtomicU64, AtomicUsize, fence},
};

#[cfg(loom)]
pub(super) use loom::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicU8, AtomicU32, AtomicU64, AtomicUsize, fence},
};

/// What stands in for the mapping in models: as many words, on the heap.
#[cfg(loom)]
pub(super) struct WordArena(Box<[AtomicU64]>);

#[cfg(loom)]
impl WordArena {
    pub(super) fn new(words: usize) -> std::io::Result<Self> {
        Ok(Self((0..words).map(|_| AtomicU64::new(0)).collect()))
    }
    pub(super) fn discard(&self, range: std::ops::Range<usize>) {
        for word in &self.0[range] {
            word.store(0, std::sync::atomic::Ordering::Relaxed);
        }
    }
}

#[cfg(loom)]
impl std::ops::Deref for WordArena {
    type Target = [AtomicU64];
    fn deref(&self) -> &[AtomicU64] {
        &self.0
    }
}
