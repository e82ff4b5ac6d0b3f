//! Turns: steps that were begun in order and end in any, taken one after the other.

use executor::sync::Notify;
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;

/// Hands out turns from 0 up; each is passed on once.
#[derive(Default)]
pub(crate) struct Turns {
    next: Cell<u64>,
    /// Passed before their time.
    early: RefCell<BTreeSet<u64>>,
    given_up: Cell<bool>,
    changed: Notify,
}

impl Turns {
    /// Waits for `turn`, or until there are no more.
    pub(crate) async fn wait(&self, turn: u64) {
        while self.next.get() < turn && !self.given_up.get() {
            self.changed.notified().await;
        }
    }

    /// Ends `turn`.
    pub(crate) fn pass(&self, turn: u64) {
        let mut early = self.early.borrow_mut();
        early.insert(turn);
        let mut next = self.next.get();
        while early.remove(&next) {
            next += 1;
        }
        self.next.set(next);
        drop(early);
        self.changed.notify_all();
    }

    /// Nobody waits any more.
    pub(crate) fn give_up(&self) {
        self.given_up.set(true);
        self.changed.notify_all();
    }
}
