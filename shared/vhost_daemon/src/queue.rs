//! Serving a ring on its own thread.
//!
//! ```text
//!   control thread                      queue thread (an executor; several queues may share one)
//!   QueueRemote::start ──QueueSetup──>  Worker: a Poller of that executor
//!   QueueRemote::change ─────────────>     poll: publish what completed ─> fetch a batch ─>
//!   QueueRemote::stop ───────────────>           Handler::handle each ─> publish ─> call
//!        <── next available index ───      kick task: empties the eventfd, its wake-up makes
//!                                          the executor poll
//! ```
//!
//! Promises: the ring is looked at as soon as it starts, kick or not, and the guest is called once
//! then; afterwards used elements are published and the guest called at most once per batch; stopping waits for every request in flight; a ring
//! that the guest breaks is reported (error eventfd, [`Failure`]) and never read again, while the
//! requests it had in flight still complete.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::future::Future;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use executor::runtime::{PollerRegistration, register_poller};
use executor::sync::Notify;
use executor::{Errno, Handle, JoinHandle, Poller, sigbus};

use crate::dirty_log::RingLog;
use crate::inflight::{InflightError, InflightRegion};
use crate::memory::MemoryTable;
use crate::ring::{Chain, Ring, RingError, RingFeatures, RingParts, SharedMemory, StartError};
use crate::wire::RingAddresses;

/// Requests fetched at once. More would delay the publication of the first.
const BATCH: usize = 16;
/// Completions published at once when they come faster than batches end.
const PUBLISH_EVERY: u32 = 8;

/// Why a queue cannot start.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// Its ring is unusable.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// Its inflight region is unusable.
    #[error(transparent)]
    Inflight(#[from] InflightError),
    /// Its thread has ended.
    #[error("the queue's thread has ended")]
    ThreadEnded,
}

impl From<StartError> for QueueError {
    fn from(error: StartError) -> Self {
        match error {
            StartError::Ring(error) => error.into(),
            StartError::Inflight(error) => error.into(),
        }
    }
}

/// Tells the control thread that a queue broke.
#[derive(Default)]
pub struct Failure {
    failed: AtomicBool,
    changed: Arc<Notify>,
}

impl Failure {
    /// Not failed; `changed` is notified when it does.
    pub fn new(changed: Arc<Notify>) -> Failure {
        Failure {
            failed: AtomicBool::new(false),
            changed,
        }
    }

    /// Whether a queue broke.
    pub fn failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    fn report(&self) {
        self.failed.store(true, Ordering::Release);
        self.changed.notify_all();
    }
}

/// Everything needed to serve a ring.
#[derive(Clone)]
pub struct QueueSetup {
    /// The device's name and the queue's index, for log lines.
    pub device: Arc<str>,
    /// Index of the queue.
    pub index: u16,
    /// Ring size in descriptors.
    pub size: u16,
    /// Where to go on, as SET_VRING_BASE tells it.
    pub base: u32,
    /// Where the ring is.
    pub addresses: RingAddresses,
    /// Acknowledged virtio features.
    pub features: u64,
    /// Guest memory.
    pub memory: Arc<MemoryTable>,
    /// Signalled by the guest; `None`: the ring is polled all the time.
    pub kick: Option<Arc<OwnedFd>>,
    /// Signalled for the guest.
    pub call: Option<Arc<OwnedFd>>,
    /// Signalled when the ring breaks.
    pub err: Option<Arc<OwnedFd>>,
    /// Where requests in flight are recorded.
    pub inflight: Option<Arc<InflightRegion>>,
    /// Where writes to guest memory are logged, while they are.
    pub log: Option<RingLog>,
    /// Where a broken ring is reported.
    pub failure: Arc<Failure>,
    /// Whether the ring is one that is not read any more.
    pub state: RingState,
}

/// Whether a ring can be relied on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RingState {
    /// It is.
    #[default]
    Sound,
    /// The guest broke it; it is not read again.
    Broken,
}

/// How a queue was when it stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stopped {
    /// Where a successor goes on, as GET_VRING_BASE tells it.
    pub base: u32,
    /// What became of its ring.
    pub state: RingState,
}

/// What can change while a queue runs.
#[derive(Clone)]
pub enum QueueChange {
    /// Guest memory. Requests in flight stay in the old table.
    Memory(Arc<MemoryTable>),
    /// The kick descriptor.
    Kick(Option<Arc<OwnedFd>>),
    /// The call descriptor; the guest is called once, for what the old one may have missed.
    Call(Option<Arc<OwnedFd>>),
    /// The error descriptor.
    Err(Option<Arc<OwnedFd>>),
    /// Where writes to guest memory are logged. Beginning to log waits for what is in flight,
    /// because nobody noted where that writes.
    Log(Option<RingLog>),
}

impl QueueSetup {
    /// The setup of a queue that started with this one and was changed since.
    pub fn apply(&mut self, change: QueueChange) {
        match change {
            QueueChange::Memory(memory) => self.memory = memory,
            QueueChange::Kick(kick) => self.kick = kick,
            QueueChange::Call(call) => self.call = call,
            QueueChange::Err(err) => self.err = err,
            QueueChange::Log(log) => self.log = log,
        }
    }
}

/// What a device does with requests.
pub trait Handler: 'static {
    /// Starts a request. Exactly one [`Queue::complete`] with the chain's head has to follow, now
    /// or later on this thread.
    fn handle(&self, queue: &Rc<Queue>, chain: &Chain);
    /// The request is handled after the current one: what it needs may be brought near. A hint; what
    /// the chain says now may not be what it says then.
    fn prepare(&self, _chain: &Chain) {}
}

/// A ring being served, as a device's requests see it. Stays on its thread.
pub struct Queue {
    device: Arc<str>,
    index: u16,
    ring: RefCell<Ring>,
    call: RefCell<Option<Arc<OwnedFd>>>,
    err: RefCell<Option<Arc<OwnedFd>>>,
    failure: Arc<Failure>,
    unpublished: Cell<u32>,
    /// No new requests: the queue stops, or a change waits for those in flight.
    draining: Cell<bool>,
    broken: Cell<bool>,
    drained: Notify,
}

impl Queue {
    /// Index of the queue.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Returns a request to the guest; `written` bytes of its writable buffers were written.
    #[inline]
    pub fn complete(&self, head: u16, written: u32) {
        let mut ring = self.ring.borrow_mut();
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
        self.fail(&RingError::Request(reason));
        self.complete(head, 0);
    }

    /// Shows the guest what completed; whether there was anything.
    #[inline]
    fn flush_used(&self) -> bool {
        self.unpublished.get() != 0 && {
            self.publish(&mut self.ring.borrow_mut());
            true
        }
    }

    #[inline]
    fn publish(&self, ring: &mut Ring) {
        self.unpublished.set(0);
        if ring.publish() && ring.needs_call() {
            self.signal_call();
        }
    }

    fn signal_call(&self) {
        if let Some(call) = &*self.call.borrow() {
            signal(call);
        }
    }

    /// Fetches nothing more and waits for what is in flight.
    async fn drain(&self) {
        self.draining.set(true);
        loop {
            let drained = self.drained.notified();
            if self.ring.borrow().in_flight() == 0 {
                return;
            }
            drained.await;
        }
    }

    /// The ring is unusable from now on.
    fn fail(&self, error: &RingError) {
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
}

/// Adds 1 to an eventfd. A counter at its limit is signalled already, and whoever closed the other
/// end waits for nothing.
pub(crate) fn signal(fd: &OwnedFd) {
    let _ = nix::unistd::write(fd, &1u64.to_ne_bytes());
}

/// A queue and its handler on their thread.
struct Worker<H> {
    queue: Rc<Queue>,
    handler: H,
    chains: RefCell<Vec<Chain>>,
    /// Without a kick descriptor the thread must not sleep.
    always_poll: Cell<bool>,
    /// [`sigbus::poisonings`] when the memory was last found whole.
    poisonings: Cell<u64>,
}

impl<H: Handler> Worker<H> {
    fn new(handler: H, setup: &QueueSetup) -> Result<(Rc<Self>, Vec<u16>), QueueError> {
        let memory: SharedMemory = Rc::new(setup.memory.clone());
        let parts = RingParts {
            index: setup.index,
            size: setup.size,
            base: setup.base,
            features: RingFeatures::of(setup.features),
            addresses: setup.addresses,
            inflight: setup.inflight.clone(),
        };
        let poisonings = sigbus::poisonings();
        let (mut ring, resubmit) = Ring::new(parts, memory.clone())?;
        ring.set_log(setup.log.clone());
        let queue = Queue {
            device: setup.device.clone(),
            index: setup.index,
            ring: RefCell::new(ring),
            call: RefCell::new(setup.call.clone()),
            err: RefCell::new(setup.err.clone()),
            failure: setup.failure.clone(),
            unpublished: Cell::new(0),
            draining: Cell::new(false),
            broken: Cell::new(setup.state == RingState::Broken),
            drained: Notify::new(),
        };
        let chains = (0..BATCH).map(|_| Chain::new(memory.clone())).collect();
        let worker = Worker {
            queue: Rc::new(queue),
            handler,
            chains: RefCell::new(chains),
            always_poll: Cell::new(setup.kick.is_none()),
            poisonings: Cell::new(poisonings),
        };
        Ok((Rc::new(worker), resubmit))
    }

    /// Serves what a predecessor had in flight, oldest first.
    fn resubmit(&self, heads: &[u16]) {
        if !heads.is_empty() {
            let (device, queue) = (&self.queue.device, self.queue.index);
            tracing::info!(%device, queue, requests = heads.len(), "serving again what was in flight");
        }
        let mut chains = self.chains.borrow_mut();
        for head in heads {
            let result = self.queue.ring.borrow_mut().refetch(*head, &mut chains[0]);
            match result {
                Ok(()) => self.handler.handle(&self.queue, &chains[0]),
                Err(error) => return self.queue.fail(&error),
            }
        }
    }

    fn idle(&self) -> bool {
        self.queue.draining.get() || self.queue.broken.get()
    }

    /// Fails the queue when its memory was truncated since the last look.
    fn check_memory(&self) {
        let now = sigbus::poisonings();
        if now != self.poisonings.replace(now) && self.queue.ring.borrow().poisoned() {
            self.queue.fail(&RingError::Truncated);
        }
    }

    async fn change(&self, change: QueueChange) {
        match change {
            QueueChange::Log(log) => {
                if log.is_some() && !self.queue.ring.borrow().is_logging() {
                    self.queue.drain().await;
                    self.queue.draining.set(false);
                }
                self.queue.ring.borrow_mut().set_log(log);
            }
            QueueChange::Memory(memory) => {
                let memory: SharedMemory = Rc::new(memory);
                for chain in self.chains.borrow_mut().iter_mut() {
                    chain.begin(0, &memory);
                }
                if !self.queue.ring.borrow_mut().relocate(memory) {
                    let (device, queue) = (&self.queue.device, self.queue.index);
                    tracing::warn!(%device, queue, "the ring itself is not in the new memory table");
                }
            }
            QueueChange::Kick(kick) => self.always_poll.set(kick.is_none()),
            QueueChange::Call(call) => {
                self.queue.call.replace(call);
                self.queue.signal_call();
            }
            QueueChange::Err(err) => {
                self.queue.err.replace(err);
            }
        }
    }
}

impl<H: Handler> Poller for Worker<H> {
    #[inline]
    fn poll(&self) -> bool {
        let published = self.queue.flush_used();
        if self.idle() {
            return published;
        }
        let mut chains = self.chains.borrow_mut();
        let (count, error) = self.queue.ring.borrow_mut().fetch(&mut chains);
        for (at, chain) in chains[..count].iter().enumerate() {
            if let Some(next) = chains[..count].get(at + 1) {
                self.handler.prepare(next);
            }
            self.handler.handle(&self.queue, chain);
        }
        drop(chains);
        self.queue.flush_used();
        // First, because truncated memory reads as zeroes, which make a broken ring.
        self.check_memory();
        if let Some(error) = error {
            self.queue.fail(&error);
        }
        published || count > 0
    }

    fn arm(&self) -> bool {
        let published = self.queue.flush_used();
        if self.idle() {
            return published;
        }
        self.queue.ring.borrow().arm() || published || self.always_poll.get()
    }

    fn disarm(&self) {
        if !self.idle() {
            self.queue.ring.borrow().disarm();
        }
    }
}

/// Empties `kick` whenever it is signalled; being woken makes the executor poll the ring.
async fn watch_kick(kick: Arc<OwnedFd>, queue: Rc<Queue>) {
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
    queue.fail(&RingError::Kick(broken));
}

type LocalFuture<T> = Pin<Box<dyn Future<Output = T>>>;

/// A running queue as its thread's table holds it, whatever its handler.
trait Running {
    fn change(self: Rc<Self>, change: QueueChange) -> LocalFuture<()>;
    fn stop(self: Rc<Self>) -> LocalFuture<Stopped>;
}

struct RunningQueue<H: Handler> {
    worker: Rc<Worker<H>>,
    kick: Cell<Option<JoinHandle<()>>>,
    poller: Cell<Option<PollerRegistration>>,
}

impl<H: Handler> RunningQueue<H> {
    fn start(handler: H, setup: &QueueSetup) -> Result<Rc<Self>, QueueError> {
        let (worker, resubmit) = Worker::new(handler, setup)?;
        let running = Rc::new(RunningQueue {
            worker: worker.clone(),
            kick: Cell::new(None),
            poller: Cell::new(None),
        });
        running.watch(setup.kick.clone());
        worker.resubmit(&resubmit);
        // A predecessor may have died after it published and before it called.
        worker.queue.signal_call();
        worker.queue.ring.borrow().disarm();
        running.poller.set(Some(register_poller(worker)));
        Ok(running)
    }

    fn watch(&self, kick: Option<Arc<OwnedFd>>) {
        let queue = self.worker.queue.clone();
        let task = kick.map(|kick| executor::spawn(watch_kick(kick, queue)));
        if let Some(old) = self.kick.replace(task) {
            old.cancel();
        }
    }
}

impl<H: Handler> Running for RunningQueue<H> {
    fn change(self: Rc<Self>, change: QueueChange) -> LocalFuture<()> {
        Box::pin(async move {
            if let QueueChange::Kick(kick) = &change {
                self.watch(kick.clone());
            }
            self.worker.change(change).await;
        })
    }

    fn stop(self: Rc<Self>) -> LocalFuture<Stopped> {
        Box::pin(async move {
            let queue = &self.worker.queue;
            queue.drain().await;
            queue.flush_used();
            self.poller.set(None);
            if let Some(kick) = self.kick.take() {
                kick.cancel();
            }
            let broken = queue.broken.get();
            Stopped {
                base: queue.ring.borrow().base(),
                state: if broken {
                    RingState::Broken
                } else {
                    RingState::Sound
                },
            }
        })
    }
}

thread_local! {
    /// The queues that run on this thread, by [`QueueRemote::id`].
    static QUEUES: RefCell<HashMap<u64, Rc<dyn Running>>> = RefCell::new(HashMap::new());
}

fn local(id: u64) -> Option<Rc<dyn Running>> {
    QUEUES.with_borrow(|queues| queues.get(&id).cloned())
}

/// A running queue, seen from the control thread.
pub struct QueueRemote {
    thread: Handle,
    id: u64,
}

impl QueueRemote {
    /// Starts serving the ring of `setup` on `thread` with the handler that `make` gives there.
    ///
    /// # Errors
    /// [`QueueError`]; nothing runs then.
    pub async fn start<H: Handler>(
        thread: &Handle,
        setup: QueueSetup,
        make: impl FnOnce() -> H + Send + 'static,
    ) -> Result<QueueRemote, QueueError> {
        static NEXT_ID: AtomicU64 = AtomicU64::new(0);
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
        let start = move || async move {
            let running = RunningQueue::start(make(), &setup)?;
            QUEUES.with_borrow_mut(|queues| queues.insert(id, running));
            Ok(())
        };
        let started: Option<Result<(), QueueError>> = thread.call(start).await;
        started.ok_or(QueueError::ThreadEnded)??;
        Ok(QueueRemote {
            thread: thread.clone(),
            id,
        })
    }

    /// Makes a change between two batches and returns once it is made.
    pub async fn change(&self, change: QueueChange) {
        let id = self.id;
        let apply = move || async move {
            if let Some(queue) = local(id) {
                queue.change(change).await;
            }
        };
        // A thread that ended serves no ring that could change.
        let _: Option<()> = self.thread.call(apply).await;
    }

    /// Stops fetching, waits for every request in flight, publishes them. Gives how it ended, or
    /// `None` when the thread has ended.
    pub async fn stop(self) -> Option<Stopped> {
        let id = self.id;
        let stop = move || async move {
            let base = match local(id) {
                Some(queue) => Some(queue.stop().await),
                None => None,
            };
            QUEUES.with_borrow_mut(|queues| queues.remove(&id));
            base
        };
        self.thread.call(stop).await.flatten()
    }
}
