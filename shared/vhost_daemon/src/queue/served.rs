//! A ring as its thread holds it: the ring, its three descriptors, and whether it can be relied on.
//!
//! ```text
//!   kick ──> task that empties it; its wake-up makes the executor poll
//!   ring ──> fetch ──> [whoever serves it] ──> push_used ──> publish ──> call, when the guest wants one
//!     └─ breaks, or its memory is truncated ──> error descriptor, Failure; never read again
//! ```

use std::cell::{Cell, RefCell};
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;

use executor::{Errno, Hold, JoinHandle, sigbus};

use super::{Failure, QueueChange, QueueError, QueueSetup, RingState, Stopped};
use crate::ring::{Chain, Ring, RingError, RingFeatures, RingOrigin, RingParts, SharedMemory};

/// A ring being served. Stays on its thread.
pub struct ServedRing {
    device: Arc<str>,
    index: u16,
    ring: RefCell<Ring>,
    memory: RefCell<SharedMemory>,
    call: RefCell<Option<Arc<OwnedFd>>>,
    err: RefCell<Option<Arc<OwnedFd>>>,
    failure: Arc<Failure>,
    broken: Cell<bool>,
    /// Without a kick descriptor the thread must not sleep.
    always_poll: Cell<bool>,
    kick: Cell<Option<JoinHandle<()>>>,
    /// [`sigbus::poisonings`] when the memory was last found whole.
    poisonings: Cell<u64>,
    /// A successor waits for what this thread has in flight.
    _hold: Option<Hold>,
}

impl ServedRing {
    /// Takes a ring up at `origin`, with kicks watched and notifications off, and calls the guest once: a predecessor may have
    /// died after it published and before it called. The heads are those of requests to fetch again first.
    ///
    /// # Errors
    /// [`QueueError`]
    pub fn open(
        setup: &QueueSetup,
        origin: RingOrigin,
    ) -> Result<(Rc<ServedRing>, Vec<u16>), QueueError> {
        let memory: SharedMemory = Rc::new(setup.memory.clone());
        let parts = RingParts {
            index: setup.index,
            size: setup.size,
            base: setup.base,
            origin,
            features: RingFeatures::of(setup.features),
            addresses: setup.addresses,
            inflight: setup.inflight.clone(),
        };
        let poisonings = sigbus::poisonings();
        let (mut ring, resubmit) = Ring::new(parts, memory.clone())?;
        ring.set_log(setup.log.clone());
        let served = Rc::new(ServedRing {
            device: setup.device.clone(),
            index: setup.index,
            ring: RefCell::new(ring),
            memory: RefCell::new(memory),
            call: RefCell::new(setup.call.clone()),
            err: RefCell::new(setup.err.clone()),
            failure: setup.failure.clone(),
            broken: Cell::new(setup.state == RingState::Broken),
            always_poll: Cell::new(setup.kick.is_none()),
            kick: Cell::new(None),
            poisonings: Cell::new(poisonings),
            _hold: setup.inflight.as_ref().and_then(|region| region.hold()),
        });
        served.watch(setup.kick.clone());
        served.signal_call();
        if !served.is_broken() {
            served.disarm();
        }
        Ok((served, resubmit))
    }

    /// Index of the queue.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// The device's name.
    pub fn device(&self) -> &str {
        &self.device
    }

    /// An empty chain to fetch into.
    pub fn chain(&self) -> Chain {
        Chain::new(self.memory.borrow().clone())
    }

    /// The ring itself; borrowed by every method here, so not for longer than a batch.
    #[inline]
    pub fn ring(&self) -> &RefCell<Ring> {
        &self.ring
    }

    /// Whether the ring is not read any more.
    #[inline]
    pub fn is_broken(&self) -> bool {
        self.broken.get()
    }

    /// Shows the guest what was returned, and calls it if it wants that.
    #[inline]
    pub fn publish(&self) {
        let mut ring = self.ring.borrow_mut();
        if ring.publish() && ring.needs_call() {
            self.signal_call();
        }
    }

    /// Calls the guest.
    pub fn signal_call(&self) {
        if let Some(call) = &*self.call.borrow() {
            signal(call);
        }
    }

    /// What came of a batch is known: the ring is broken when its memory was truncated since the last look, or when fetching
    /// ended with `error`.
    #[inline]
    pub fn settle(&self, error: Option<RingError>) {
        // First, because truncated memory reads as zeroes, which make a broken ring.
        let now = sigbus::poisonings();
        if now != self.poisonings.replace(now) && self.ring.borrow().poisoned() {
            self.fail(&RingError::Truncated);
        }
        if let Some(error) = error {
            self.fail(&error);
        }
    }

    /// The ring is unusable from now on.
    #[cold]
    pub fn fail(&self, error: &RingError) {
        if self.broken.replace(true) {
            return;
        }
        tracing::error!(device = %self.device, queue = self.index, "ring broken: {error}");
        // Whoever is told looks at the status next.
        self.failure.report();
        if let Some(err) = &*self.err.borrow() {
            signal(err);
        }
    }

    /// Asks for kicks; whether there is something already, or the thread must not sleep.
    pub fn arm(&self) -> bool {
        self.ring.borrow().arm() || self.always_poll.get()
    }

    /// Asks for no kicks.
    pub fn disarm(&self) {
        self.ring.borrow().disarm();
    }

    /// Makes a change. No request may be in flight when a dirty log begins; chains of an old memory table stay valid, and whoever
    /// keeps chains to fetch into should make new ones.
    pub fn change(self: &Rc<Self>, change: QueueChange) {
        match change {
            QueueChange::Log(log) => self.ring.borrow_mut().set_log(log),
            QueueChange::Memory(memory) => {
                let memory: SharedMemory = Rc::new(memory);
                self.memory.replace(memory.clone());
                if !self.ring.borrow_mut().relocate(memory) {
                    let (device, queue) = (&self.device, self.index);
                    tracing::warn!(%device, queue, "the ring itself is not in the new memory table");
                }
            }
            QueueChange::Kick(kick) => {
                self.always_poll.set(kick.is_none());
                self.watch(kick);
            }
            QueueChange::Call(call) => {
                self.call.replace(call);
                self.signal_call();
            }
            QueueChange::Err(err) => {
                self.err.replace(err);
            }
            // Nothing of the ring: whoever serves it goes by that.
            QueueChange::Enabled | QueueChange::Disabled => {}
        }
    }

    fn watch(self: &Rc<Self>, kick: Option<Arc<OwnedFd>>) {
        let task = kick.map(|kick| executor::spawn(watch_kick(kick, self.clone())));
        if let Some(old) = self.kick.replace(task) {
            old.cancel();
        }
    }

    /// Stops watching for kicks. Nothing may be in flight; how the ring is left.
    pub fn close(&self) -> Stopped {
        if let Some(kick) = self.kick.take() {
            kick.cancel();
        }
        let state = if self.is_broken() {
            RingState::Broken
        } else {
            RingState::Sound
        };
        Stopped {
            base: self.ring.borrow().base(),
            state,
        }
    }
}

/// Adds 1 to an eventfd. A counter at its limit is signalled already, and whoever closed the other
/// end waits for nothing.
pub(crate) fn signal(fd: &OwnedFd) {
    let _ = nix::unistd::write(fd, &1u64.to_ne_bytes());
}

/// Empties `kick` whenever it is signalled; being woken makes the executor poll the ring.
async fn watch_kick(kick: Arc<OwnedFd>, ring: Rc<ServedRing>) {
    let broken = loop {
        match executor::net::poll_fd(kick.as_fd(), libc::POLLIN).await {
            Ok(events) if events & libc::POLLIN != 0 => {}
            Ok(_) => break Errno::EPIPE,
            Err(errno) => break errno,
        }
        let mut count = [0; 8];
        match nix::unistd::read(&kick, &mut count) {
            Ok(8) | Err(Errno::EAGAIN | Errno::EINTR) => {}
            Ok(_) => break Errno::EPIPE,
            Err(errno) => break errno,
        }
    };
    ring.fail(&RingError::Kick(broken));
}
