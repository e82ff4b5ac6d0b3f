//! Serving a ring on its own thread.
//!
//! ```text
//!   control thread                      queue thread (an executor; several queues may share one)
//!   QueueRemote::start ──QueueSetup──>  RunningQueue: most devices' is a RequestQueue, a Poller of that executor
//!   QueueRemote::change ─────────────>     with a ServedRing: the ring, its kick, call and error descriptors
//!   QueueRemote::stop ───────────────>
//!        <── next available index ───
//! ```
//!
//! Promises: the ring is looked at as soon as it starts, kick or not, and the guest is called once
//! then; a ring that the guest breaks is reported (error eventfd, [`Failure`]) and never read again.

mod requests;
mod served;

use std::cell::RefCell;
use std::collections::HashMap;
use std::future::Future;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use executor::Handle;
use executor::sync::Notify;

use crate::dirty_log::RingLog;
use crate::inflight::{InflightError, InflightRegion};
use crate::memory::MemoryTable;
use crate::ring::{RingError, RingOrigin, StartError};
use crate::wire::RingAddresses;

pub use requests::{Begun, Handler, Queue, RequestQueue};
pub use served::ServedRing;
pub(crate) use served::signal;

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
    /// False for a ring that the front-end has disabled, of a device that serves it nevertheless
    /// ([`crate::Device::serves_disabled`]).
    pub enabled: bool,
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
    /// The ring's requests are executed again.
    Enabled,
    /// They are to have no effect from now on. Only where [`crate::Device::serves_disabled`].
    Disabled,
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
            QueueChange::Enabled => self.enabled = true,
            QueueChange::Disabled => self.enabled = false,
        }
    }
}

/// A future that stays on its thread.
pub type LocalFuture<T> = Pin<Box<dyn Future<Output = T>>>;

/// A running queue as its thread's table holds it.
pub trait RunningQueue {
    /// Makes a change between two batches.
    fn change(self: Rc<Self>, change: QueueChange) -> LocalFuture<()>;
    /// Stops with nothing in flight and everything published. Not used afterwards.
    fn stop(self: Rc<Self>) -> LocalFuture<Stopped>;
}

thread_local! {
    /// The queues that run on this thread, by [`QueueRemote::id`].
    static QUEUES: RefCell<HashMap<u64, Rc<dyn RunningQueue>>> = RefCell::new(HashMap::new());
}

fn local(id: u64) -> Option<Rc<dyn RunningQueue>> {
    QUEUES.with_borrow(|queues| queues.get(&id).cloned())
}

/// Enters a queue into this thread's table.
fn register(running: Rc<dyn RunningQueue>) -> u64 {
    static NEXT_ID: AtomicU64 = AtomicU64::new(0);
    let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
    QUEUES.with_borrow_mut(|queues| queues.insert(id, running));
    id
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
        let start = move || {
            let running = RequestQueue::start(make(), &setup, RingOrigin::Base)?;
            Ok(running as Rc<dyn RunningQueue>)
        };
        QueueRemote::start_with(thread, start).await
    }

    /// Starts what `start` gives on `thread`.
    ///
    /// # Errors
    /// What `start` fails with; nothing runs then.
    pub async fn start_with(
        thread: &Handle,
        start: impl FnOnce() -> Result<Rc<dyn RunningQueue>, QueueError> + Send + 'static,
    ) -> Result<QueueRemote, QueueError> {
        let start = move || async move { start().map(register) };
        let started: Option<Result<u64, QueueError>> = thread.call(start).await;
        Ok(QueueRemote {
            thread: thread.clone(),
            id: started.ok_or(QueueError::ThreadEnded)??,
        })
    }

    /// A queue that was started on the current executor.
    pub fn here(running: Rc<dyn RunningQueue>) -> QueueRemote {
        QueueRemote {
            thread: Handle::current(),
            id: register(running),
        }
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
