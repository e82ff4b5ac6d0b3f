//! Locks byte ranges.

use super::short_lock;
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

/// Locks byte ranges; overlapping requests wait in order of arrival, shared ones overlap freely.
///
/// Every operation looks at all ranges held or waited for, which are as many as there are
/// requests in flight.
#[derive(Default)]
pub struct RangeLock {
    state: std::sync::Mutex<State>,
}

#[derive(Default)]
struct State {
    entries: Vec<Entry>,
    /// Entries that wait.
    waiting: usize,
    arrivals: u64,
}

struct Entry {
    /// Rises with every arrival.
    ticket: u64,
    range: Range<u64>,
    access: Access,
    /// Whom to wake; `None` when the range is held.
    waker: Option<Waker>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Access {
    Shared,
    Exclusive,
}

impl Entry {
    /// Whether `self` waits for `other`.
    fn is_behind(&self, other: &Entry) -> bool {
        other.ticket < self.ticket
            && (self.access == Access::Exclusive || other.access == Access::Exclusive)
            && self.range.start < other.range.end
            && other.range.start < self.range.end
            && !self.range.is_empty()
            && !other.range.is_empty()
    }
}

impl State {
    fn is_free(&self, entry: &Entry) -> bool {
        !self.entries.iter().any(|other| entry.is_behind(other))
    }

    fn new_entry(&mut self, range: &Range<u64>, access: Access) -> Entry {
        self.arrivals += 1;
        Entry {
            ticket: self.arrivals,
            range: range.clone(),
            access,
            waker: None,
        }
    }

    fn position(&self, ticket: u64) -> usize {
        let position = self.entries.iter().position(|entry| entry.ticket == ticket);
        position.expect("an entry stays until its future or guard is gone")
    }

    /// Removes an entry and grants what only waited for it; whom to wake.
    fn remove(&mut self, ticket: u64) -> Vec<Waker> {
        let position = self.position(ticket);
        let removed = self.entries.swap_remove(position);
        self.waiting -= usize::from(removed.waker.is_some());
        let mut granted = Vec::new();
        if self.waiting == 0 {
            return granted;
        }
        for index in 0..self.entries.len() {
            let entry = &self.entries[index];
            if entry.waker.is_some() && self.is_free(entry) {
                granted.extend(self.entries[index].waker.take());
                self.waiting -= 1;
            }
        }
        granted
    }
}

impl RangeLock {
    /// No range locked.
    pub fn new() -> Self {
        Self::default()
    }

    /// Exclusive access to `range`.
    pub async fn lock(&self, range: Range<u64>) -> RangeGuard<'_> {
        self.wait(range, Access::Exclusive).await
    }

    /// Shared access to `range`: excludes only exclusive holders.
    pub async fn lock_shared(&self, range: Range<u64>) -> RangeGuard<'_> {
        self.wait(range, Access::Shared).await
    }

    /// Exclusive access when it is free now.
    pub fn try_lock(&self, range: Range<u64>) -> Option<RangeGuard<'_>> {
        self.try_take(&range, Access::Exclusive)
    }

    /// Shared access when it is free now.
    pub fn try_lock_shared(&self, range: Range<u64>) -> Option<RangeGuard<'_>> {
        self.try_take(&range, Access::Shared)
    }

    fn try_take(&self, range: &Range<u64>, access: Access) -> Option<RangeGuard<'_>> {
        let mut state = short_lock(&self.state);
        let entry = state.new_entry(range, access);
        if !state.is_free(&entry) {
            return None;
        }
        let ticket = entry.ticket;
        state.entries.push(entry);
        Some(RangeGuard { lock: self, ticket })
    }

    fn wait(&self, range: Range<u64>, access: Access) -> Wait<'_> {
        Wait {
            lock: self,
            range,
            access,
            ticket: None,
        }
    }

    fn remove(&self, ticket: u64) {
        let granted = short_lock(&self.state).remove(ticket);
        for waker in granted {
            waker.wake();
        }
    }
}

/// Waits for a range.
struct Wait<'a> {
    lock: &'a RangeLock,
    range: Range<u64>,
    access: Access,
    /// The entry, once there is one.
    ticket: Option<u64>,
}

impl<'a> Future for Wait<'a> {
    type Output = RangeGuard<'a>;
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<RangeGuard<'a>> {
        let lock = self.lock;
        let mut state = short_lock(&lock.state);
        let Some(ticket) = self.ticket else {
            let mut entry = state.new_entry(&self.range, self.access);
            let ticket = entry.ticket;
            let free = state.is_free(&entry);
            if !free {
                entry.waker = Some(context.waker().clone());
                state.waiting += 1;
                self.ticket = Some(ticket);
            }
            state.entries.push(entry);
            return if free {
                Poll::Ready(RangeGuard { lock, ticket })
            } else {
                Poll::Pending
            };
        };
        let position = state.position(ticket);
        match &mut state.entries[position].waker {
            Some(waker) => {
                waker.clone_from(context.waker());
                Poll::Pending
            }
            None => {
                // From here on the guard owns the entry.
                self.ticket = None;
                Poll::Ready(RangeGuard { lock, ticket })
            }
        }
    }
}

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket {
            self.lock.remove(ticket);
        }
    }
}

/// Holds a range of a [`RangeLock`].
pub struct RangeGuard<'a> {
    lock: &'a RangeLock,
    ticket: u64,
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        self.lock.remove(self.ticket);
    }
}
