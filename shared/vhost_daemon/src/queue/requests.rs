//! Serving a ring request by request.
//!
//! ```text
//!   poll: publish what completed ─> fetch a batch ─> Handler::handle each ─> publish ─> call
//! ```
//!
//! Promises: used elements are published and the guest called at most once per batch; stopping waits for every request in flight;
//! the requests that a broken ring had in flight still complete.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use executor::Poller;
use executor::runtime::{PollerRegistration, register_poller};
use executor::sync::Notify;

use super::{LocalFuture, QueueChange, QueueError, QueueSetup, RunningQueue, ServedRing, Stopped};
use crate::ring::{Chain, Ring, RingError, RingOrigin};

/// Requests fetched at once. More would delay the publication of the first.
const BATCH: usize = 16;
/// Completions published at once when they come faster than batches end.
const PUBLISH_EVERY: u32 = 8;

/// What a device does with requests.
pub trait Handler: 'static {
    /// Starts a request. Exactly one [`Queue::complete`] with the chain's head has to follow, now
    /// or later on this thread.
    fn handle(&self, queue: &Rc<Queue>, chain: &Chain);
    /// The request is handled after the current one: what it needs may be brought near. A hint; what
    /// the chain says now may not be what it says then.
    fn prepare(&self, _chain: &Chain) {}
    /// No request follows at once: the last one of a batch was handled.
    fn batch_ended(&self) {}
}

/// A ring being served, as a device's requests see it. Stays on its thread.
pub struct Queue {
    served: Rc<ServedRing>,
    unpublished: Cell<u32>,
    /// No new requests: the queue stops, or a change waits for those in flight.
    draining: Cell<bool>,
    drained: Notify,
}

impl Queue {
    /// Index of the queue.
    pub fn index(&self) -> u16 {
        self.served.index()
    }

    /// Returns a request to the guest; `written` bytes of its writable buffers were written.
    #[inline]
    pub fn complete(&self, head: u16, written: u32) {
        let mut ring = self.served.ring().borrow_mut();
        ring.push_used(head, written);
        let unpublished = self.unpublished.get() + 1;
        self.unpublished.set(unpublished);
        if unpublished >= PUBLISH_EVERY || self.draining.get() {
            self.publish(&mut ring);
        }
        if ring.in_flight() == 0 && self.draining.get() {
            self.drained.notify_all();
        }
    }

    /// Returns a request that breaks its device's rules so that it has no place for an error: the
    /// ring is broken, because `reason`.
    pub fn reject(&self, head: u16, reason: &'static str) {
        self.served.fail(&RingError::Request(reason));
        self.complete(head, 0);
    }

    /// Shows the guest what completed; whether there was anything.
    #[inline]
    fn flush_used(&self) -> bool {
        self.unpublished.get() != 0 && {
            self.publish(&mut self.served.ring().borrow_mut());
            true
        }
    }

    #[inline]
    fn publish(&self, ring: &mut Ring) {
        self.unpublished.set(0);
        if ring.publish() && ring.needs_call() {
            self.served.signal_call();
        }
    }

    /// Fetches nothing more and waits for what is in flight.
    async fn drain(&self) {
        self.draining.set(true);
        loop {
            let drained = self.drained.notified();
            if self.served.ring().borrow().in_flight() == 0 {
                return;
            }
            drained.await;
        }
    }

    fn idle(&self) -> bool {
        self.draining.get() || self.served.is_broken()
    }
}

/// A queue and its handler on their thread.
struct Worker<H> {
    queue: Rc<Queue>,
    handler: H,
    chains: RefCell<Vec<Chain>>,
}

impl<H: Handler> Worker<H> {
    /// Serves what a predecessor had in flight, oldest first.
    fn resubmit(&self, heads: &[u16]) {
        let served = &self.queue.served;
        if !heads.is_empty() {
            let (device, queue) = (served.device(), served.index());
            tracing::info!(%device, queue, requests = heads.len(), "serving again what was in flight");
        }
        let mut chains = self.chains.borrow_mut();
        for head in heads {
            let result = served.ring().borrow_mut().refetch(*head, &mut chains[0]);
            match result {
                Ok(()) => self.handler.handle(&self.queue, &chains[0]),
                Err(error) => {
                    served.fail(&error);
                    break;
                }
            }
        }
        self.handler.batch_ended();
    }
}

impl<H: Handler> Poller for Worker<H> {
    #[inline]
    fn poll(&self) -> bool {
        let published = self.queue.flush_used();
        if self.queue.idle() {
            return published;
        }
        let mut chains = self.chains.borrow_mut();
        let (count, error) = self.queue.served.ring().borrow_mut().fetch(&mut chains);
        for (at, chain) in chains[..count].iter().enumerate() {
            if let Some(next) = chains[..count].get(at + 1) {
                self.handler.prepare(next);
            }
            self.handler.handle(&self.queue, chain);
        }
        drop(chains);
        if count > 0 {
            self.handler.batch_ended();
        }
        self.queue.flush_used();
        self.queue.served.settle(error);
        published || count > 0
    }

    fn arm(&self) -> bool {
        let published = self.queue.flush_used();
        if self.queue.idle() {
            return published;
        }
        self.queue.served.arm() || published
    }

    fn disarm(&self) {
        if !self.queue.idle() {
            self.queue.served.disarm();
        }
    }
}

/// A running queue whose requests go to a [`Handler`].
pub struct RequestQueue<H: Handler> {
    worker: Rc<Worker<H>>,
    poller: Cell<Option<PollerRegistration>>,
    begun: Begun,
}

/// Where a queue began.
#[derive(Clone, Copy, Debug)]
pub struct Begun {
    /// Whether a driver had requests served from the ring before.
    pub was_used: bool,
    /// Next request, as GET_VRING_BASE would have told it.
    pub base: u32,
}

impl<H: Handler> RequestQueue<H> {
    /// Where it began to serve its ring.
    pub fn begun(&self) -> Begun {
        self.begun
    }

    /// Starts serving the ring of `setup` on the current executor, where `origin` says.
    ///
    /// # Errors
    /// [`QueueError`]
    pub fn start(
        handler: H,
        setup: &QueueSetup,
        origin: RingOrigin,
    ) -> Result<Rc<Self>, QueueError> {
        let (served, resubmit) = ServedRing::open(setup, origin)?;
        let begun = Begun {
            was_used: served.ring().borrow().was_used(),
            base: served.ring().borrow().base(),
        };
        let chains = (0..BATCH).map(|_| served.chain()).collect();
        let queue = Queue {
            served,
            unpublished: Cell::new(0),
            draining: Cell::new(false),
            drained: Notify::new(),
        };
        let worker = Rc::new(Worker {
            queue: Rc::new(queue),
            handler,
            chains: RefCell::new(chains),
        });
        worker.resubmit(&resubmit);
        Ok(Rc::new(RequestQueue {
            worker: worker.clone(),
            poller: Cell::new(Some(register_poller(worker))),
            begun,
        }))
    }
}

impl<H: Handler> RunningQueue for RequestQueue<H> {
    fn change(self: Rc<Self>, change: QueueChange) -> LocalFuture<()> {
        Box::pin(async move {
            let queue = &self.worker.queue;
            let begins = matches!(change, QueueChange::Log(Some(_)))
                && !queue.served.ring().borrow().is_logging();
            if begins {
                queue.drain().await;
                queue.draining.set(false);
            }
            let moved = matches!(change, QueueChange::Memory(_));
            queue.served.change(change);
            if moved {
                let mut chains = self.worker.chains.borrow_mut();
                chains.fill_with(|| queue.served.chain());
            }
        })
    }

    fn stop(self: Rc<Self>) -> LocalFuture<Stopped> {
        Box::pin(async move {
            let queue = &self.worker.queue;
            queue.drain().await;
            queue.flush_used();
            self.poller.set(None);
            queue.served.close()
        })
    }
}
