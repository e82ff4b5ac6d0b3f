//! Wakes waiting tasks, from any thread.

use super::short_lock;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

/// Wakes waiting tasks, from any thread.
#[derive(Default)]
pub struct Notify {
    state: std::sync::Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Counts notifications.
    generation: u64,
    waiters: Vec<(u64, Waker)>,
    arrivals: u64,
}

impl Notify {
    /// Nobody waiting.
    pub fn new() -> Self {
        Self::default()
    }

    /// Wakes every task waiting now.
    pub fn notify_all(&self) {
        let mut state = short_lock(&self.state);
        state.generation += 1;
        let waiters = std::mem::take(&mut state.waiters);
        drop(state);
        for (_, waker) in waiters {
            waker.wake();
        }
    }

    /// Waits for the next notification. Registered from the call on, not from the first poll, so
    /// that `let n = notify.notified(); check(); n.await` misses nothing.
    pub fn notified(&self) -> Notified<'_> {
        let mut state = short_lock(&self.state);
        state.arrivals += 1;
        Notified {
            notify: self,
            generation: state.generation,
            ticket: state.arrivals,
        }
    }
}

/// Waits for a [`Notify`].
pub struct Notified<'a> {
    notify: &'a Notify,
    /// The generation to outlive.
    generation: u64,
    ticket: u64,
}

impl Future for Notified<'_> {
    type Output = ();
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut state = short_lock(&self.notify.state);
        if state.generation != self.generation {
            return Poll::Ready(());
        }
        let mut waiters = state.waiters.iter_mut();
        match waiters.find(|waiter| waiter.0 == self.ticket) {
            Some((_, waker)) => waker.clone_from(cx.waker()),
            None => state.waiters.push((self.ticket, cx.waker().clone())),
        }
        Poll::Pending
    }
}

impl Drop for Notified<'_> {
    fn drop(&mut self) {
        let mut state = short_lock(&self.notify.state);
        let waiting = |waiter: &(u64, Waker)| waiter.0 == self.ticket;
        let position = state.waiters.iter().position(waiting);
        let waiter = position.map(|position| state.waiters.swap_remove(position));
        drop(state);
        drop(waiter);
    }
}
