//! Pollers, and the adaptive window for which they are spun before the thread sleeps.
//!
//! ```text
//!   idle ──> spin for `window` ── found ──> window doubles
//!                 └─ nothing ──> window halves; arm, sleep, disarm
//! ```
//!
//! The window stays between an eighth of the maximum (less than a sleep costs) and the maximum.
//! While nothing is found, one spin in sixteen tries the maximum, so that work which comes just
//! outside a small window is noticed. How long a sleep lasted says nothing: waking alone takes
//! longer than the largest window, and a front-end that shares the processor asks as soon as this
//! thread stops spinning. A thread without pollers, or with a maximum of zero, never spins.

use crate::runtime::{Backend, Inner, current};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::{Duration, Instant};

/// Looks between two readings of the clock while spinning.
const LOOKS_PER_READING: u32 = 16;
/// The smallest window is the maximum divided by this.
const SMALLEST_PART: u32 = 8;
/// One spin in so many that find nothing lasts for the maximum.
const SPINS_PER_TRIAL: u32 = 16;

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
    /// Spins without success since the last one with.
    misses: Cell<u32>,
    window_max: Cell<Duration>,
}

impl Pollers {
    pub(crate) fn new(window_max: Duration) -> Pollers {
        Pollers {
            list: RefCell::default(),
            armed: Cell::new(false),
            window: Cell::new(window_max),
            misses: Cell::new(0),
            window_max: Cell::new(window_max),
        }
    }

    /// Spins up to `window_max` from now on.
    pub(crate) fn set_max(&self, window_max: Duration) {
        self.window_max.set(window_max);
        self.window.set(window_max);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.list.borrow().is_empty()
    }

    /// Whether there is something to spin, and the thread may.
    pub(crate) fn may_spin(&self) -> bool {
        !self.window_max.get().is_zero() && !self.is_empty()
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

    /// How long to spin now.
    fn next_spin(&self) -> Duration {
        if self.misses.get() % SPINS_PER_TRIAL == SPINS_PER_TRIAL - 1 {
            self.window_max.get()
        } else {
            self.window.get()
        }
    }

    /// Adapts the window after a spin of `length`.
    fn spun(&self, length: Duration, found: bool) {
        if found {
            self.misses.set(0);
            self.window.set((length * 2).min(self.window_max.get()));
        } else {
            self.misses.set(self.misses.get().wrapping_add(1));
            let smallest = self.window_max.get() / SMALLEST_PART;
            self.window.set((self.window.get() / 2).max(smallest));
        }
    }
}

impl Inner {
    /// Spins for the window; whether work came up.
    pub(crate) fn spin(&self) -> bool {
        if !self.pollers.may_spin() {
            return false;
        }
        if self.exchange() {
            return true;
        }
        let length = self.pollers.next_spin();
        let found = self.look_for(length);
        self.pollers.spun(length, found);
        found
    }

    /// Spins pollers, ring, remote queue and timers for `length`; whether work came up.
    pub(crate) fn look_for(&self, length: Duration) -> bool {
        let Backend::Ring(ring) = &self.backend else {
            return false;
        };
        let start = Instant::now();
        loop {
            for _ in 0..LOOKS_PER_READING {
                let pending = self.pollers.poll() || self.shared.has_pending();
                if pending || ring.borrow_mut().has_work() {
                    self.exchange();
                    return true;
                }
                std::hint::spin_loop();
            }
            if start.elapsed() >= length {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_follows_what_spinning_finds() {
        let pollers = Pollers::new(Duration::from_micros(32));
        let spin = |found| {
            let length = pollers.next_spin();
            pollers.spun(length, found);
            length.as_micros()
        };
        let lengths: Vec<u128> = (0..17).map(|_| spin(false)).collect();
        assert_eq!(lengths[..5], [32, 16, 8, 4, 4]);
        assert_eq!(lengths[14..], [4, 32, 4]);
        assert_eq!([spin(true), spin(true), spin(true)], [4, 8, 16]);
        assert_eq!([spin(true), spin(true)], [32, 32]);
    }

    #[test]
    fn a_trial_that_succeeds_restores_the_largest_window() {
        let pollers = Pollers::new(Duration::from_micros(32));
        for _ in 0..15 {
            pollers.spun(pollers.next_spin(), false);
        }
        pollers.spun(pollers.next_spin(), true);
        assert_eq!(pollers.next_spin(), Duration::from_micros(32));
    }
}
