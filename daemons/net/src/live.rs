//! A value that one thread changes while others work with it.
//!
//! ```text
//!   control thread: Live::set ── value, then generation ──> LiveReader::get on a queue thread: one relaxed load,
//!                                                           and only after a change a lock and a clone
//! ```

use std::cell::{Cell, Ref, RefCell};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// A value that can be changed from any thread.
#[derive(Debug)]
pub struct Live<T> {
    generation: AtomicU64,
    value: Mutex<T>,
}

impl<T: Default> Default for Live<T> {
    fn default() -> Self {
        Live::new(T::default())
    }
}

impl<T> Live<T> {
    /// Holds `value`.
    pub fn new(value: T) -> Live<T> {
        Live {
            generation: AtomicU64::new(0),
            value: Mutex::new(value),
        }
    }

    /// Replaces the value. Readers see that when they look next.
    pub fn set(&self, value: T) {
        let mut guard = self.value.lock().unwrap_or_else(PoisonError::into_inner);
        let old = std::mem::replace(&mut *guard, value);
        self.generation.fetch_add(1, Ordering::Release);
        // Dropping the old value may take its time.
        drop(guard);
        drop(old);
    }
}

impl<T: Clone> Live<T> {
    /// A copy of the value as it is now.
    pub fn get(&self) -> T {
        let guard = self.value.lock().unwrap_or_else(PoisonError::into_inner);
        guard.clone()
    }
}

/// One thread's view of a [`Live`] value.
#[derive(Debug)]
pub struct LiveReader<T> {
    source: Arc<Live<T>>,
    seen: Cell<u64>,
    value: RefCell<T>,
}

impl<T: Clone> LiveReader<T> {
    /// Reads `source`.
    pub fn new(source: Arc<Live<T>>) -> LiveReader<T> {
        let seen = source.generation.load(Ordering::Acquire);
        LiveReader {
            seen: Cell::new(seen),
            value: RefCell::new(source.get()),
            source,
        }
    }

    /// The value as of now. Not to be held across a call that may read it again.
    #[inline]
    pub fn get(&self) -> Ref<'_, T> {
        let generation = self.source.generation.load(Ordering::Relaxed);
        if generation != self.seen.get() {
            self.refresh();
        }
        self.value.borrow()
    }

    #[cold]
    fn refresh(&self) {
        // Before the value: a change in between is seen next time.
        self.seen
            .set(self.source.generation.load(Ordering::Acquire));
        let old = self.value.replace(self.source.get());
        drop(old);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readers_see_what_was_set_last() {
        let live = Arc::new(Live::new(1));
        let reader = LiveReader::new(live.clone());
        assert_eq!(*reader.get(), 1);
        live.set(2);
        live.set(3);
        assert_eq!(*reader.get(), 3);
        assert_eq!(live.get(), 3);
        let late = LiveReader::new(live);
        assert_eq!(*late.get(), 3);
    }
}
