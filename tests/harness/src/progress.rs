//! Lets a supervisor wait for a load's completions instead of for time to pass.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

/// Completions of all queues of a load.
#[derive(Debug, Default)]
pub struct Progress {
    state: Mutex<State>,
    changed: Condvar,
    stopped: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    completions: u64,
    gap_start: Option<Instant>,
    gap: Option<Duration>,
}

impl Progress {
    /// One more request completed at `now`.
    pub fn advance(&self, now: Instant) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.completions += 1;
        if let Some(start) = state.gap_start.take() {
            state.gap = Some(now.saturating_duration_since(start));
        }
        drop(state);
        self.changed.notify_all();
    }

    /// A load ended, for better or worse; waiters give up.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
        drop(self.state.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }

    /// True after [`Progress::stop`].
    pub fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }

    /// Waits for `count` more completions.
    ///
    /// # Errors
    /// When they do not come within `limit`, or a load ended.
    pub fn wait_for(&self, count: u64, limit: Duration) -> Result<()> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let goal = state.completions + count;
        let (state, waited) = self
            .changed
            .wait_timeout_while(state, limit, |state| {
                state.completions < goal && !self.is_stopped()
            })
            .unwrap_or_else(PoisonError::into_inner);
        ensure!(!self.is_stopped(), "a load ended early");
        let missing = goal.saturating_sub(state.completions);
        ensure!(
            !waited.timed_out(),
            "{missing} completions missing after {limit:?}"
        );
        Ok(())
    }

    /// The next completion ends a pause that began at `start` and that [`Progress::pause`] reports.
    pub fn mark_pause(&self, start: Instant) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.gap_start = Some(start);
        state.gap = None;
    }

    /// Waits for the completion that ends the marked pause; its length.
    ///
    /// # Errors
    /// When it does not come within `limit`, or a load ended.
    pub fn pause(&self, limit: Duration) -> Result<Duration> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (state, _) = self
            .changed
            .wait_timeout_while(state, limit, |state| {
                state.gap.is_none() && !self.is_stopped()
            })
            .unwrap_or_else(PoisonError::into_inner);
        ensure!(!self.is_stopped(), "a load ended early");
        state
            .gap
            .ok_or_else(|| anyhow::anyhow!("no completion within {limit:?}"))
    }
}
