//! Pollers, and the adaptive window for which they are spun before the thread sleeps.
//!
//! ```text
//!   idle ──> spin for `window` ── found ───────────────────────> window doubles
//!                 └─ nothing ──> arm, sleep, disarm ── short ──> window doubles
//!                                                   └─ long ───> window halves
//! ```
//!
//! A sleep is short when spinning for the longest window would have saved it, give or take what
//! waking costs. The window stays between an eighth of the maximum (less than a sleep costs) and
//! the maximum. A thread without pollers, or with a maximum of zero, never spins.

use crate::runtime::{Backend, Inner, current};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::{Duration, Instant};

/// Looks between two readings of the clock while spinning.
const LOOKS_PER_READING: u32 = 16;
/// The smallest window is the maximum divided by this.
const SMALLEST_PART: u32 = 8;
/// A sleep is short up to so many times the maximum.
const SHORT_SLEEP: u32 = 2;

/// Looks for work outside the ring: a virtqueue's available ring.
pub trait Poller {
    /// Looks for work without a syscall and starts it; returns whether there was any.
    fn poll(&self) -> bool;
    /// Asks for notifications before the thread sleeps; returns whether work came in meanwhile.
    fn arm(&self) -> bool;
    /// Stops notifications after waking.
    fn disarm(&self);
}

/// The pollers of one executor and its window.
pub(crate) struct Pollers {
    list: RefCell<Vec<Rc<dyn Poller>>>,
    armed: Cell<bool>,
    window: Cell<Duration>,
    /// When the thread last began to spin.
    idle_since: Cell<Option<Instant>>,
    window_max: Duration,
}

impl Pollers {
    pub(crate) fn new(window_max: Duration) -> Pollers {
        Pollers {
            list: RefCell::default(),
            armed: Cell::new(false),
            window: Cell::new(window_max),
            idle_since: Cell::new(None),
            window_max,
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.list.borrow().is_empty()
    }

    /// Whether there is something to spin, and the thread may.
    pub(crate) fn may_spin(&self) -> bool {
        !self.window_max.is_zero() && !self.is_empty()
    }

    pub(crate) fn clear(&self) {
        self.list.take();
    }

    /// Calls `f` for every poller; pollers may come and go meanwhile.
    fn any(&self, mut f: impl FnMut(&dyn Poller) -> bool) -> bool {
        let mut found = false;
        let mut at = 0;
        loop {
            let Some(poller) = self.list.borrow().get(at).cloned() else {
                return found;
            };
            found |= f(&*poller);
            at += 1;
        }
    }

    /// Looks for work at every poller.
    pub(crate) fn poll(&self) -> bool {
        self.any(|poller| poller.poll())
    }

    /// Asks every poller for notifications; whether there is work already.
    pub(crate) fn arm(&self) -> bool {
        self.armed.set(true);
        self.any(|poller| poller.arm())
    }

    /// Undoes [`Pollers::arm`].
    pub(crate) fn disarm(&self) {
        if self.armed.replace(false) {
            self.any(|poller| {
                poller.disarm();
                false
            });
        }
    }

    /// Adapts the window after a sleep.
    pub(crate) fn slept(&self) {
        let Some(idle_since) = self.idle_since.take() else {
            return;
        };
        if idle_since.elapsed() <= self.window_max * SHORT_SLEEP {
            self.grow();
        } else {
            let smallest = self.window_max / SMALLEST_PART;
            self.window.set((self.window.get() / 2).max(smallest));
        }
    }

    fn grow(&self) {
        self.window
            .set((self.window.get() * 2).min(self.window_max));
    }
}

impl Inner {
    /// Spins pollers, ring and remote queue for the window; whether work came up.
    pub(crate) fn spin(&self) -> bool {
        let pollers = &self.pollers;
        if !pollers.may_spin() {
            return false;
        }
        let Backend::Ring(ring) = &self.backend else {
            return false;
        };
        if self.exchange() {
            return true;
        }
        let start = Instant::now();
        loop {
            for _ in 0..LOOKS_PER_READING {
                if pollers.poll() || self.shared.has_pending() || ring.borrow_mut().has_work() {
                    self.exchange();
                    pollers.grow();
                    return true;
                }
                std::hint::spin_loop();
            }
            if start.elapsed() >= pollers.window.get() {
                pollers.idle_since.set(Some(start));
                return false;
            }
            if self.fire_timers() {
                return true;
            }
        }
    }
}

/// Registers a poller with the current executor until the returned registration is dropped.
pub fn register_poller(poller: Rc<dyn Poller>) -> PollerRegistration {
    let executor = current();
    let pollers = &executor.pollers;
    if pollers.armed.get() {
        poller.disarm();
    }
    pollers.list.borrow_mut().push(Rc::clone(&poller));
    PollerRegistration {
        executor: Rc::downgrade(&executor),
        poller,
    }
}

/// Keeps a poller registered.
pub struct PollerRegistration {
    executor: std::rc::Weak<Inner>,
    poller: Rc<dyn Poller>,
}

impl Drop for PollerRegistration {
    fn drop(&mut self) {
        if let Some(executor) = self.executor.upgrade() {
            let mut list = executor.pollers.list.borrow_mut();
            list.retain(|poller| !Rc::ptr_eq(poller, &self.poller));
        }
    }
}
