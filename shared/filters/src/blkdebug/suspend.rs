//! Requests that were stopped at breakpoints.

use block::debug::{Change, Watcher};
use executor::sync::Notify;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The stopped requests, in the order in which they stopped.
#[derive(Default)]
pub(super) struct Suspended {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Default)]
struct State {
    next_id: u64,
    stopped: Vec<(u64, String)>,
    watcher: Option<Watcher>,
}

/// A stopped request; one that is given up is not stopped any more.
struct Stopped<'a> {
    all: &'a Suspended,
    id: u64,
}

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        self.all.state().stopped.retain(|(id, _)| *id != self.id);
    }
}

impl Suspended {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hears of changes from now on.
    pub(super) fn watch(&self, watcher: Watcher) {
        self.state().watcher = Some(watcher);
    }

    fn tell(&self, change: Change, tag: &str) {
        let watcher = self.state().watcher;
        if let Some(watcher) = watcher {
            watcher(change, tag);
        }
    }

    /// Stops the caller until somebody resumes it.
    pub(super) async fn stop(&self, tag: String) {
        let stopped = {
            let mut state = self.state();
            let id = state.next_id;
            state.next_id += 1;
            state.stopped.push((id, tag.clone()));
            Stopped { all: self, id }
        };
        self.tell(Change::Suspended, &tag);
        self.changed.notify_all();
        loop {
            let changed = self.changed.notified();
            let is_it = |(id, _): &(u64, String)| *id == stopped.id;
            if !self.state().stopped.iter().any(is_it) {
                return;
            }
            changed.await;
        }
    }

    /// Resumes the first request that was stopped with a tag; whether there was one.
    pub(super) fn resume(&self, tag: &str) -> bool {
        let found = {
            let mut state = self.state();
            let first = state.stopped.iter().position(|(_, other)| other == tag);
            first.map(|index| state.stopped.remove(index)).is_some()
        };
        if found {
            self.tell(Change::Resumed, tag);
            self.changed.notify_all();
        }
        found
    }

    /// Resumes all requests of a tag; whether there was one.
    pub(super) fn resume_all(&self, tag: &str) -> bool {
        let mut any = false;
        while self.resume(tag) {
            any = true;
        }
        any
    }

    /// Resolves when a request is stopped with a tag.
    pub(super) async fn until(&self, tag: &str) {
        loop {
            let changed = self.changed.notified();
            if self.state().stopped.iter().any(|(_, other)| other == tag) {
                return;
            }
            changed.await;
        }
    }
}
