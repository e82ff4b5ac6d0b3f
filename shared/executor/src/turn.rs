//! One turn of an executor: what it looks at, in which order, and how it waits.

use crate::remote::RemoteItem;
use crate::ring::Reason;
use crate::runtime::{Backend, Inner};
use crate::sim::Step;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Rounds of ready work between two submissions when work does not end.
const ROUNDS_PER_SUBMIT: u32 = 8;
/// Rounds of work between two readings of the clock, which cost as much as a round.
const ROUNDS_PER_CLOCK: u32 = 16;
/// File operations in flight from which on the executor naps instead of spinning.
const NAP_DEPTH: usize = 4;
/// How long to look before a nap: within this time a front-end that polls answers a completion with
/// its next request, which would else wait for the nap's end.
const LOOK_BEFORE_NAP: Duration = Duration::from_micros(5);
/// Longest nap.
const NAP: Duration = Duration::from_micros(100);

impl Inner {
    /// One step of `block_on` and `run`: work, or when there is none, wait. Returns at once when
    /// `woken` is set.
    pub(crate) fn round(&self, woken: &AtomicBool) {
        if self.work() || woken.load(Ordering::Relaxed) {
            if self.rounds.get().is_multiple_of(ROUNDS_PER_SUBMIT) || !self.pollers.is_empty() {
                self.exchange();
            }
        } else {
            self.idle(woken);
        }
    }

    /// Runs what is ready without a syscall; whether there was anything.
    pub(crate) fn work(&self) -> bool {
        let mut worked = self.take_remote();
        worked |= self.run_ready();
        worked |= self.pollers.poll();
        worked |= self.reap();
        let round = self.rounds.get().wrapping_add(1);
        self.rounds.set(round);
        if round.is_multiple_of(ROUNDS_PER_CLOCK) {
            worked |= self.fire_timers();
        }
        worked
    }

    /// Runs the tasks that are ready now; tasks that they wake are left for the next round.
    fn run_ready(&self) -> bool {
        let ready = self.queue.borrow().len();
        for _ in 0..ready {
            let task = self.queue.borrow_mut().pop_front();
            let Some(task) = task else { break };
            task.run(self);
        }
        ready > 0
    }

    fn take_remote(&self) -> bool {
        let Some(items) = self.shared.take() else {
            return false;
        };
        for item in items {
            match item {
                RemoteItem::Task(task) => self.queue.borrow_mut().push_back(task),
                RemoteItem::Start(start) => start(),
            }
        }
        true
    }

    /// Polls, then sleeps until there is something to do.
    fn idle(&self, woken: &AtomicBool) {
        if self.fire_timers() || self.nap(woken) || self.spin() {
            return;
        }
        if !self.pollers.arm() && self.may_sleep(woken) {
            self.sleep(None);
        }
        self.shared.awake();
        self.pollers.disarm();
    }

    /// Announces sleep to other threads; false when there is something to do after all.
    fn may_sleep(&self, woken: &AtomicBool) -> bool {
        let quiet = self.shared.try_sleep() && !woken.load(Ordering::SeqCst);
        quiet && self.queue.borrow().is_empty()
    }

    /// Sleeps for a moment without asking pollers for notifications, when so many file operations
    /// are in flight that one ends soon anyway; what pollers have to offer is found then. Spares
    /// the spinning, and the guest its notifications. Whether anything ended the nap early.
    fn nap(&self, woken: &AtomicBool) -> bool {
        if !self.pollers.may_spin() || self.ops.borrow().working() < NAP_DEPTH {
            return false;
        }
        if self.exchange() || self.look_for(LOOK_BEFORE_NAP) {
            return true;
        }
        let mut more = true;
        if self.may_sleep(woken) {
            self.sleep(Some(NAP));
            more = self.reap();
        }
        self.shared.awake();
        more || self.shared.has_pending()
    }

    /// Submits what is queued and takes in what has finished; whether there was anything.
    pub(crate) fn exchange(&self) -> bool {
        match &self.backend {
            Backend::Ring(ring) => {
                let submitted = ring.borrow_mut().submit();
                submitted.expect("submitting to an open ring");
                self.reap()
            }
            Backend::Sim(disk) => match disk.step(self.next_deadline()) {
                Step::Completed(slot, result) => {
                    self.complete(slot, result);
                    true
                }
                Step::Deadline => self.fire_timers(),
                Step::Nothing => false,
            },
        }
    }

    /// Takes in what the ring has finished, without a syscall; whether there was anything.
    pub(crate) fn reap(&self) -> bool {
        let Backend::Ring(ring) = &self.backend else {
            return false;
        };
        let mut completions = self.completions.take();
        ring.borrow_mut().reap(&mut completions);
        let any = !completions.is_empty();
        for (slot, result) in completions.drain(..) {
            self.complete(slot, result);
        }
        self.completions.set(completions);
        any
    }

    /// Sleeps in the kernel until a completion, a deadline or a wake from another thread, at most
    /// for `limit`. In a simulated world goes to the next event.
    fn sleep(&self, limit: Option<Duration>) {
        match &self.backend {
            Backend::Ring(ring) => {
                let deadline = self.next_deadline();
                let timeout = deadline.map(|deadline| deadline.saturating_sub(self.now()));
                let timeout = timeout.into_iter().chain(limit).min();
                let reason = match self.ops.borrow().working() {
                    0 => Reason::Events,
                    _ => Reason::Files,
                };
                let waited = ring.borrow_mut().wait(timeout, reason);
                waited.expect("waiting on an open ring");
            }
            Backend::Sim(_) => {
                let tasks = self.tasks.borrow().len();
                assert!(
                    self.exchange(),
                    "deadlock: {tasks} spawned tasks wait, but no operation is in flight and no \
                     timer is set"
                );
            }
        }
    }

    fn next_deadline(&self) -> Option<Duration> {
        self.timers.borrow().next_deadline()
    }
}
