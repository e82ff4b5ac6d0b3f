//! Async locks: fair (first come, first served), cancel-safe.
//!
//! `Mutex`, `RangeLock` and `Semaphore` are `Send + Sync`: nodes are entered from every queue
//! thread. The uncontended path takes a short internal lock and never sleeps in the kernel.
//!
//! ```text
//!   waiting ── released by the holder before ──> granted ── polled ──> held ── dropped ──> next
//!      └─ future dropped: leaves the queue         └─ future dropped: handed to the next
//! ```
//!
//! A lock is handed over, not thrown open: a newcomer never overtakes one that waits for the same. The
//! exception are ranges: see [`RangeLock`].

mod latch;
#[cfg(all(test, loom))]
mod models;
mod mutex;
mod notify;
mod range;
mod semaphore;

/// The lock within a lock; models have loom's.
mod locks {
    pub(super) use super::short_lock as locked;
    pub(super) use std::sync::Mutex;
}

pub use latch::Latch;
pub use mutex::{Mutex, MutexGuard};
pub use notify::{Notified, Notify};
pub use range::{RangeGuard, RangeLock};
pub use semaphore::{Permit, Semaphore};

use std::sync::{MutexGuard as ShortGuard, PoisonError};

/// Locks a mutex for a few instructions that never leave broken state behind.
pub(crate) fn short_lock<T>(mutex: &std::sync::Mutex<T>) -> ShortGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
