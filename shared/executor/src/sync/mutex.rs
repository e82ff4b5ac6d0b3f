//! An async mutual exclusion lock: a value behind a semaphore of one permit.
#![expect(
    unsafe_code,
    reason = "the semaphore's one permit stands for exclusive access to the value"
)]

use super::Semaphore;
use std::cell::UnsafeCell;
use std::ops::{Deref, DerefMut};

/// An async mutual exclusion lock.
pub struct Mutex<T> {
    permit: Semaphore,
    value: UnsafeCell<T>,
}

// SAFETY: the value is reached by `&mut self`, or through the one guard that holds the permit; so
// it is used by one thread at a time, as with `std::sync::Mutex`.
unsafe impl<T: Send> Sync for Mutex<T> {}

impl<T> Mutex<T> {
    /// An unlocked mutex.
    pub fn new(value: T) -> Self {
        Mutex {
            permit: Semaphore::new(1),
            value: UnsafeCell::new(value),
        }
    }

    /// Waits for the lock.
    pub async fn lock(&self) -> MutexGuard<'_, T> {
        self.permit.wait().await;
        MutexGuard { mutex: self }
    }

    /// The lock, when it is free.
    pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        self.permit.try_take().then(|| MutexGuard { mutex: self })
    }

    /// The value, without locking: the borrow is exclusive.
    pub fn get_mut(&mut self) -> &mut T {
        self.value.get_mut()
    }

    /// The value.
    pub fn into_inner(self) -> T {
        self.value.into_inner()
    }
}

impl<T: Default> Default for Mutex<T> {
    fn default() -> Self {
        Self::new(T::default())
    }
}

/// Holds a [`Mutex`].
pub struct MutexGuard<'a, T> {
    mutex: &'a Mutex<T>,
}

// SAFETY: sharing a guard shares `&T` only. (By its field alone it would be `Sync` for any
// `T: Send`.)
unsafe impl<T: Sync> Sync for MutexGuard<'_, T> {}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: this guard holds the only permit, so no `&mut T` exists but through it.
        unsafe { &*self.mutex.value.get() }
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: this guard holds the only permit and is borrowed exclusively.
        unsafe { &mut *self.mutex.value.get() }
    }
}

impl<T> Drop for MutexGuard<'_, T> {
    fn drop(&mut self) {
        self.mutex.permit.give();
    }
}
