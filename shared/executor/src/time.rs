//! Timers on the executor's clock (virtual in a simulated world).

use crate::runtime::{Backend, Inner, current};
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::OnceLock;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

/// The timers of one executor, by deadline and then by order of creation.
#[derive(Default)]
pub(crate) struct Timers {
    waiting: BTreeMap<(Duration, u64), Waker>,
    created: u64,
}

impl Timers {
    pub(crate) fn next_deadline(&self) -> Option<Duration> {
        self.waiting.keys().next().map(|key| key.0)
    }
}

impl Inner {
    /// The time on this executor's clock.
    pub(crate) fn now(&self) -> Duration {
        static START: OnceLock<Instant> = OnceLock::new();
        match &self.backend {
            Backend::Ring(_) => START.get_or_init(Instant::now).elapsed(),
            Backend::Sim(disk) => disk.now(),
        }
    }

    /// Wakes whom a passed deadline concerns; whether there was one.
    pub(crate) fn fire_timers(&self) -> bool {
        if self.timers.borrow().waiting.is_empty() {
            return false;
        }
        let now = self.now();
        let mut fired = false;
        loop {
            let mut timers = self.timers.borrow_mut();
            let Some(entry) = timers.waiting.first_entry() else {
                return fired;
            };
            if entry.key().0 > now {
                return fired;
            }
            let waker = entry.remove();
            drop(timers);
            waker.wake();
            fired = true;
        }
    }
}

/// One timer; leaves the list when dropped.
struct Timer {
    executor: Rc<Inner>,
    key: (Duration, u64),
}

impl Timer {
    fn new(duration: Duration) -> Timer {
        let executor = current();
        let deadline = executor.now().saturating_add(duration);
        let mut timers = executor.timers.borrow_mut();
        timers.created += 1;
        let key = (deadline, timers.created);
        drop(timers);
        Timer { executor, key }
    }

    fn poll(&self, context: &mut Context<'_>) -> Poll<()> {
        if self.executor.now() >= self.key.0 {
            return Poll::Ready(());
        }
        let mut timers = self.executor.timers.borrow_mut();
        let before = timers.waiting.insert(self.key, context.waker().clone());
        // Not while the list is borrowed: dropping a waker may run anything.
        drop(timers);
        drop(before);
        Poll::Pending
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        let waker = self.executor.timers.borrow_mut().waiting.remove(&self.key);
        drop(waker);
    }
}

/// Resolves after `duration`.
pub async fn sleep(duration: Duration) {
    let timer = Timer::new(duration);
    poll_fn(|context| timer.poll(context)).await;
}

/// Pauses between attempts, each twice as long as the one before it, up to the longest.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    next: Duration,
    longest: Duration,
}

impl Backoff {
    /// From the first pause to the longest.
    pub fn new((first, longest): (Duration, Duration)) -> Self {
        Self {
            next: first,
            longest,
        }
    }

    /// Waits until the next attempt.
    pub async fn pause(&mut self) {
        self.pause_at_most(Duration::MAX).await;
    }

    /// Waits until the next attempt, but not longer than `limit`.
    pub async fn pause_at_most(&mut self, limit: Duration) {
        sleep(self.next_pause().min(limit)).await;
    }

    /// How long to wait until the next attempt, for whoever does not wait on an executor.
    pub fn next_pause(&mut self) -> Duration {
        let pause = self.next;
        self.next = (pause * 2).min(self.longest);
        pause
    }
}

/// The output of `future`, or `None` when `duration` passes first (the future is dropped).
pub async fn timeout<F: Future>(duration: Duration, future: F) -> Option<F::Output> {
    let mut future = pin!(future);
    let timer = Timer::new(duration);
    poll_fn(|context| {
        if let Poll::Ready(output) = Pin::as_mut(&mut future).poll(context) {
            return Poll::Ready(Some(output));
        }
        timer.poll(context).map(|()| None)
    })
    .await
}

/// Lets every task that is ready run once before the caller goes on.
pub async fn yield_now() {
    let mut yielded = false;
    poll_fn(|context| {
        if std::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// Time since an arbitrary start on the executor's clock.
pub fn now() -> Duration {
    current().now()
}
