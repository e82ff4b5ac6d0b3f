//! A counting semaphore; the queue behind [`super::Mutex`] too.

use super::short_lock;
use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

/// A counting semaphore.
pub struct Semaphore {
    state: std::sync::Mutex<State>,
}

struct State {
    /// Free permits; none while anybody waits without a grant.
    permits: usize,
    /// In order of arrival.
    waiters: VecDeque<Waiter>,
    arrivals: u64,
}

struct Waiter {
    ticket: u64,
    waker: Waker,
    granted: bool,
}

impl State {
    /// Hands one permit to whom has waited longest, or keeps it; whom to wake.
    fn release(&mut self) -> Option<Waker> {
        match self.waiters.iter_mut().find(|waiter| !waiter.granted) {
            Some(waiter) => {
                waiter.granted = true;
                Some(waiter.waker.clone())
            }
            None => {
                self.permits += 1;
                None
            }
        }
    }

    fn position(&self, ticket: u64) -> usize {
        let waiting = |waiter: &Waiter| waiter.ticket == ticket;
        let position = self.waiters.iter().position(waiting);
        position.expect("a waiter stays in the queue until its future is gone")
    }
}

impl Semaphore {
    /// `permits` free permits.
    pub fn new(permits: usize) -> Self {
        Semaphore {
            state: std::sync::Mutex::new(State {
                permits,
                waiters: VecDeque::new(),
                arrivals: 0,
            }),
        }
    }

    /// Waits for one permit.
    pub async fn acquire(&self) -> Permit<'_> {
        self.wait().await;
        Permit { semaphore: self }
    }

    /// One permit, when there is one free.
    pub fn try_acquire(&self) -> Option<Permit<'_>> {
        self.try_take().then(|| Permit { semaphore: self })
    }

    /// Takes a permit without a guard; [`Semaphore::give`] gives it back.
    pub(super) fn wait(&self) -> Acquire<'_> {
        Acquire {
            semaphore: self,
            ticket: None,
        }
    }

    pub(super) fn try_take(&self) -> bool {
        let mut state = short_lock(&self.state);
        let free = state.permits > 0;
        state.permits -= usize::from(free);
        free
    }

    pub(super) fn give(&self) {
        let next = short_lock(&self.state).release();
        if let Some(next) = next {
            next.wake();
        }
    }
}

/// Waits for a permit.
pub(super) struct Acquire<'a> {
    semaphore: &'a Semaphore,
    /// The place in the queue, once there.
    ticket: Option<u64>,
}

impl Future for Acquire<'_> {
    type Output = ();
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let mut state = short_lock(&self.semaphore.state);
        let Some(ticket) = self.ticket else {
            if state.permits > 0 {
                state.permits -= 1;
                return Poll::Ready(());
            }
            state.arrivals += 1;
            let ticket = state.arrivals;
            state.waiters.push_back(Waiter {
                ticket,
                waker: context.waker().clone(),
                granted: false,
            });
            drop(state);
            self.ticket = Some(ticket);
            return Poll::Pending;
        };
        let position = state.position(ticket);
        if state.waiters[position].granted {
            state.waiters.remove(position);
            drop(state);
            self.ticket = None;
            return Poll::Ready(());
        }
        state.waiters[position].waker.clone_from(context.waker());
        Poll::Pending
    }
}

impl Drop for Acquire<'_> {
    fn drop(&mut self) {
        let Some(ticket) = self.ticket else { return };
        let mut state = short_lock(&self.semaphore.state);
        let position = state.position(ticket);
        let waiter = state.waiters.remove(position);
        let next = match &waiter {
            Some(waiter) if waiter.granted => state.release(),
            _ => None,
        };
        drop(state);
        if let Some(next) = next {
            next.wake();
        }
    }
}

/// Holds a permit of a [`Semaphore`].
pub struct Permit<'a> {
    semaphore: &'a Semaphore,
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        self.semaphore.give();
    }
}
