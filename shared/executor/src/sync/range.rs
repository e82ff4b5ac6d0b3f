//! Locks byte ranges.
//!
//! A request waits for those that hold what it asks for. One that waits itself holds nothing, so a
//! newcomer that only it stands in the way of overtakes it:
//!
//! ```text
//!   held     AAAAAA
//!   waits       BBBBBBBB       for A
//!   comes             CCC      goes on: B cannot use these bytes before A ends
//! ```
//!
//! The patience of one that waits has an end: after [`PATIENCE`] of them, newcomers queue behind it,
//! so that it has its turn when those that hold its range then have ended.
//!
//! Nobody waits for a later one that does not hold its range, so whoever takes several ranges in
//! ascending order cannot be part of a circle.

use super::locks::{Mutex, locked};
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

/// How many may overtake one that waits.
pub(super) const PATIENCE: u32 = 16;

/// Locks byte ranges; shared requests overlap freely, exclusive ones wait for what overlaps. Of those
/// that wait for the same range, the first to come is the first to go on.
///
/// Every operation looks at all ranges held or waited for, which are as many as there are
/// requests in flight.
#[derive(Default)]
pub struct RangeLock {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// In order of arrival.
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
    /// Later ones that were let through while it waited.
    overtaken: u32,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    Shared,
    Exclusive,
}

impl Entry {
    /// Whether the two cannot be held at the same time.
    fn excludes(&self, other: &Entry) -> bool {
        (self.access == Access::Exclusive || other.access == Access::Exclusive)
            && self.range.start < other.range.end
            && other.range.start < self.range.end
            && !self.range.is_empty()
            && !other.range.is_empty()
    }

    fn is_held(&self) -> bool {
        self.waker.is_none()
    }

    /// Whether `self`, which waits or has just come, waits for `other`.
    fn is_behind(&self, other: &Entry) -> bool {
        let in_the_way =
            other.is_held() || (other.ticket < self.ticket && other.overtaken >= PATIENCE);
        other.ticket != self.ticket && in_the_way && self.excludes(other)
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
            overtaken: 0,
        }
    }

    fn position(&self, ticket: u64) -> usize {
        let position = self.entries.iter().position(|entry| entry.ticket == ticket);
        position.expect("an entry stays until its future or guard is gone")
    }

    /// Takes an entry in that is free now.
    fn grant(&mut self, entry: Entry) {
        self.entries.push(entry);
        if self.waiting > 0 {
            self.count_overtaken(self.entries.len() - 1);
        }
    }

    /// The entry at `index` goes on: those that came before and still wait have been overtaken.
    fn count_overtaken(&mut self, index: usize) {
        let (before, rest) = self.entries.split_at_mut(index);
        for other in before {
            other.overtaken += u32::from(!other.is_held() && other.excludes(&rest[0]));
        }
    }

    /// Removes an entry and grants what only waited for it, the first to come first; whom to wake.
    fn remove(&mut self, ticket: u64) -> Vec<Waker> {
        let position = self.position(ticket);
        let removed = self.entries.remove(position);
        self.waiting -= usize::from(removed.waker.is_some());
        let mut granted = Vec::new();
        for index in 0..self.entries.len() {
            if self.waiting == 0 {
                break;
            }
            let entry = &self.entries[index];
            if entry.is_held() || !self.is_free(entry) {
                continue;
            }
            granted.extend(self.entries[index].waker.take());
            self.waiting -= 1;
            self.count_overtaken(index);
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
        let mut state = locked(&self.state);
        let entry = state.new_entry(range, access);
        if !state.is_free(&entry) {
            return None;
        }
        let ticket = entry.ticket;
        state.grant(entry);
        Some(RangeGuard { lock: self, ticket })
    }

    pub(super) fn wait(&self, range: Range<u64>, access: Access) -> Wait<'_> {
        Wait {
            lock: self,
            range,
            access,
            ticket: None,
        }
    }

    fn remove(&self, ticket: u64) {
        let granted = locked(&self.state).remove(ticket);
        for waker in granted {
            waker.wake();
        }
    }
}

/// Waits for a range.
pub(super) struct Wait<'a> {
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
        let mut state = locked(&lock.state);
        let Some(ticket) = self.ticket else {
            let mut entry = state.new_entry(&self.range, self.access);
            let ticket = entry.ticket;
            if state.is_free(&entry) {
                state.grant(entry);
                return Poll::Ready(RangeGuard { lock, ticket });
            }
            entry.waker = Some(context.waker().clone());
            state.waiting += 1;
            self.ticket = Some(ticket);
            state.entries.push(entry);
            return Poll::Pending;
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
