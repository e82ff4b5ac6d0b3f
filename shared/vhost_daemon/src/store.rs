//! Stores to memory that outlives the process, one after the other.
//!
//! What a successor finds is what its predecessor stored before it was killed, in program order: a
//! killed process loses none of its stores. Tests end a device before any one of them.

use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

/// An atomic in shared memory.
pub(crate) trait Store<T> {
    /// Stores `value` after everything that was stored before.
    fn put(&self, value: T);
}

macro_rules! store {
    ($atomic:ty, $value:ty) => {
        impl Store<$value> for $atomic {
            #[inline]
            fn put(&self, value: $value) {
                #[cfg(test)]
                death::step();
                self.store(value, Ordering::Release);
            }
        }
    };
}

store!(AtomicU8, u8);
store!(AtomicU16, u16);
store!(AtomicU32, u32);
store!(AtomicU64, u64);

/// Ends a device in the middle of what it does.
#[cfg(test)]
pub(crate) mod death {
    use std::cell::Cell;
    use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

    thread_local! {
        /// Stores left to live for; `None`: for ever.
        static LEFT: Cell<Option<u32>> = const { Cell::new(None) };
    }

    /// What unwinds.
    struct Death;

    pub(super) fn step() {
        match LEFT.get() {
            None => {}
            Some(0) => resume_unwind(Box::new(Death)),
            Some(left) => LEFT.set(Some(left - 1)),
        }
    }

    /// Runs `life` until it ends or makes more than `stores` stores; `None` when it died.
    pub(crate) fn after<T>(stores: u32, life: impl FnOnce() -> T) -> Option<T> {
        LEFT.set(Some(stores));
        let outcome = catch_unwind(AssertUnwindSafe(life));
        LEFT.set(None);
        match outcome {
            Ok(value) => Some(value),
            Err(reason) if reason.is::<Death>() => None,
            Err(reason) => resume_unwind(reason),
        }
    }
}
