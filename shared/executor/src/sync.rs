//! Async locks: fair (first come, first served), cancel-safe.
//!
//! `Mutex`, `RangeLock` and `Semaphore` are `Send + Sync`: nodes are entered from every queue
//! thread. The uncontended path takes a short internal lock and never sleeps in the kernel.

use std::ops::{Deref, DerefMut, Range};

/// An async mutual exclusion lock.
pub struct Mutex<T> {
    _t: std::marker::PhantomData<T>,
}

impl<T> Mutex<T> {
    /// An unlocked mutex.
    pub fn new(value: T) -> Self {
        todo!()
    }
    /// Waits for the lock.
    pub async fn lock(&self) -> MutexGuard<'_, T> {
        todo!()
    }
    /// The lock, when it is free.
    pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        todo!()
    }
}

/// Holds a [`Mutex`].
pub struct MutexGuard<'a, T> {
    _t: &'a Mutex<T>,
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        todo!()
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        todo!()
    }
}

/// Locks byte ranges; overlapping requests wait in order of arrival, shared ones overlap freely.
pub struct RangeLock {}

impl RangeLock {
    /// No range locked.
    pub fn new() -> Self {
        todo!()
    }
    /// Exclusive access to `range`.
    pub async fn lock(&self, range: Range<u64>) -> RangeGuard<'_> {
        todo!()
    }
    /// Shared access to `range`: excludes only exclusive holders.
    pub async fn lock_shared(&self, range: Range<u64>) -> RangeGuard<'_> {
        todo!()
    }
    /// Exclusive access when it is free now.
    pub fn try_lock(&self, range: Range<u64>) -> Option<RangeGuard<'_>> {
        todo!()
    }
}

impl Default for RangeLock {
    fn default() -> Self {
        Self::new()
    }
}

/// Holds a range of a [`RangeLock`].
pub struct RangeGuard<'a> {
    _l: &'a RangeLock,
}

/// A counting semaphore.
pub struct Semaphore {}

impl Semaphore {
    /// `permits` free permits.
    pub fn new(permits: usize) -> Self {
        todo!()
    }
    /// Waits for one permit.
    pub async fn acquire(&self) -> Permit<'_> {
        todo!()
    }
}

/// Holds a permit of a [`Semaphore`].
pub struct Permit<'a> {
    _s: &'a Semaphore,
}

/// Wakes waiting tasks, from any thread.
pub struct Notify {}

impl Notify {
    /// Nobody waiting.
    pub fn new() -> Self {
        todo!()
    }
    /// Wakes every task waiting now.
    pub fn notify_all(&self) {
        todo!()
    }
    /// Waits for the next notification. Registered from the call on, not from the first poll, so
    /// that `let n = notify.notified(); check(); n.await` misses nothing.
    pub fn notified(&self) -> Notified<'_> {
        todo!()
    }
}

impl Default for Notify {
    fn default() -> Self {
        Self::new()
    }
}

/// Waits for a [`Notify`].
pub struct Notified<'a> {
    _n: &'a Notify,
}

impl std::future::Future for Notified<'_> {
    type Output = ();
    fn poll(
        self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<()> {
        todo!()
    }
}
