//! A queue pair on its thread: two rings and the queue of the back-end between them.
//!
//! ```text
//!   control thread              pair's thread
//!   PairRemote::start ───────>  Pair, in the thread's table, with its NetQueue
//!   start_queue(2i, 2i+1) ───>    rx, tx rings run ── both or one, and the guest uses the pair ──> connected
//!   PairRemote::refresh ─────>    link, pairs in use, offloads changed: looks at what is shared
//!   PairRemote::stop ────────>  gone
//! ```
//!
//! While it is connected, one poller pumps the transmit ring, one task receives, and one waits for what holds the pump up. A pair
//! that is not connected gets nothing and sends nothing.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use executor::runtime::{PollerRegistration, register_poller};
use executor::{Handle, JoinHandle, Poller};
use vhost_daemon::queue::{LocalFuture, QueueChange};
use vhost_daemon::ring::RingError;
use vhost_daemon::{
    QueueError, QueueRemote, QueueSetup, RingOrigin, RunningQueue, ServedRing, Stopped,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

use super::features::has;
use super::hooks::{PairHooks, PortHooks};
use super::rx::Rx;
use super::shared::{Shared, Used};
use super::tx::Tx;
use crate::frame::{Frame, VnetHeader};
use crate::link::{BURST, DropReason, NetQueue, Received, Sink, receive_all};
use crate::netdev::QueueMaker;

thread_local! {
    /// The pairs of this thread, by [`PairRemote::id`].
    static PAIRS: RefCell<HashMap<u64, Rc<Pair>>> = RefCell::new(HashMap::new());
}

fn local(id: u64) -> Option<Rc<Pair>> {
    PAIRS.with_borrow(|pairs| pairs.get(&id).cloned())
}

/// Everything that runs while a pair is connected; ends when dropped.
struct Connection {
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        for task in self.tasks.drain(..) {
            task.cancel();
        }
    }
}

/// A queue pair.
struct Pair {
    own: Weak<Pair>,
    port: Arc<str>,
    index: u16,
    shared: Arc<Shared>,
    network: Rc<dyn NetQueue>,
    /// [`NetQueue::polled`]
    polled: bool,
    rx: Rc<Rx>,
    tx: Tx,
    connection: RefCell<Option<Connection>>,
    connected: Cell<bool>,
    /// Something was in its rings since they run.
    filled: Cell<bool>,
    poller: RefCell<Option<PollerRegistration>>,
}

/// One of a pair's rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Receive,
    Transmit,
}

impl Pair {
    fn ring_index(&self, side: Side) -> u16 {
        2 * self.index + u16::from(side == Side::Transmit)
    }

    fn start_ring(self: &Rc<Self>, side: Side, setup: &QueueSetup) -> Result<(), QueueError> {
        if !has(setup.features, VIRTIO_F_VERSION_1) {
            let missing = RingError::Request("the driver did not acknowledge VIRTIO_F_VERSION_1");
            return Err(missing.into());
        }
        let (served, _) = ServedRing::open(setup, RingOrigin::Used)?;
        self.shared.set_broken(self.ring_index(side), false);
        match side {
            Side::Receive => self.rx.start(served, setup),
            Side::Transmit => self.tx.start(served, setup),
        }
        self.filled.set(false);
        let mut poller = self.poller.borrow_mut();
        if poller.is_none() {
            *poller = Some(register_poller(self.clone()));
        }
        drop(poller);
        self.refresh();
        Ok(())
    }

    fn stop_ring(self: &Rc<Self>, side: Side) -> Stopped {
        // Nothing goes through while one of the rings goes away.
        self.disconnect();
        let stopped = match side {
            Side::Receive => self.rx.stop(),
            Side::Transmit => self.tx.stop(),
        };
        if !self.rx.runs() && !self.tx.runs() {
            self.poller.replace(None);
        }
        self.refresh();
        stopped.expect("a ring that runs is stopped once")
    }

    /// Makes a change of a ring.
    fn change_ring(self: &Rc<Self>, side: Side, change: QueueChange) {
        let used = matches!(change, QueueChange::Enabled | QueueChange::Disabled);
        if used {
            self.disconnect();
        }
        match side {
            Side::Receive => self.rx.change(change),
            Side::Transmit => self.tx.change(change),
        }
        if used {
            self.refresh();
        }
        self.rx.wake();
    }

    /// Whether frames go through.
    fn wanted(&self) -> bool {
        let enabled = self.rx.is_enabled() || self.tx.is_enabled();
        enabled
            && match self.shared.used() {
                Used::Enabled => true,
                Used::Filled => self.filled.get(),
                Used::First(pairs) => self.index < pairs,
            }
    }

    /// Looks at what is shared.
    fn refresh(self: &Rc<Self>) {
        if self.shared.used() == Used::Filled && !self.filled.get() {
            self.filled.set(self.rx.is_filled() || self.tx.is_filled());
        }
        let offloads = self.shared.guest_offloads();
        let changed = self.rx.offloads() != offloads;
        self.rx.set_offloads(offloads);
        let was_connected = self.connected.get();
        match self.wanted() {
            true if !was_connected => self.connect(),
            false => self.disconnect(),
            true => {}
        }
        if self.connected.get()
            && (changed || !was_connected)
            && let Err(error) = self.network.set_guest_offloads(offloads)
        {
            let (port, pair) = (&self.port, self.index);
            tracing::error!(%port, pair, "cannot set what the guest does by itself: {error}");
        }
        self.rx.wake();
    }

    fn connect(self: &Rc<Self>) {
        self.network.connect(self.rx.clone());
        self.tx.unblock();
        let pair = self.clone();
        let receive = executor::spawn(async move {
            if let Err(error) = receive_all(&*pair.network, &*pair.rx).await {
                let (port, index) = (&pair.port, pair.index);
                tracing::error!(%port, pair = index, "the network gives nothing more: {error}");
            }
        });
        let pair = self.clone();
        let unblock = executor::spawn(async move {
            pair.tx.unblock_when_possible(&*pair.network).await;
        });
        self.connection.replace(Some(Connection {
            tasks: vec![receive, unblock],
        }));
        self.connected.set(true);
    }

    fn disconnect(&self) {
        if self.connected.replace(false) {
            self.connection.replace(None);
            self.network.disconnect();
            self.tx.unblock();
        }
    }

    /// Whether what the guest sends is dropped: nobody said that it goes anywhere, and it is known that nobody will.
    #[inline]
    fn discards(&self) -> bool {
        let used = self.connected.get() || self.shared.used() == Used::Filled;
        !(used && self.tx.is_enabled())
    }

    /// Tells the control thread which rings are broken.
    fn note_broken(&self) {
        let sides = [
            (Side::Receive, self.rx.is_broken()),
            (Side::Transmit, self.tx.is_broken()),
        ];
        for (side, broken) in sides {
            if broken {
                self.shared.set_broken(self.ring_index(side), true);
            }
        }
    }

    /// Notices that the driver filled a ring of a pair of which is not known whether it is used.
    fn look_for_use(&self) -> bool {
        let unknown = !self.connected.get() && self.shared.used() == Used::Filled;
        let used = unknown && (self.rx.is_filled() || self.tx.is_filled());
        if used && let Some(pair) = self.own.upgrade() {
            pair.refresh();
        }
        used
    }
}

impl Poller for Pair {
    #[inline]
    fn poll(&self) -> bool {
        let discards = self.discards();
        let discarded = discards && self.tx.discard();
        if !self.connected.get() {
            return self.look_for_use() || discarded;
        }
        // What comes after the look is discarded with the next one, not sent.
        let mut worked = match discards {
            true => discarded,
            false => self.tx.poll(&*self.network),
        };
        worked |= self.rx.poll();
        if self.polled {
            let received = self.network.receive(BURST);
            worked |= matches!(received, Ok(Received::More));
        }
        worked
    }

    fn arm(&self) -> bool {
        self.note_broken();
        if self.connected.get() {
            let transmit = self.tx.arm();
            return self.rx.arm_if_awaited() || transmit;
        }
        let transmit = self.tx.arm();
        // A driver that begins to use the pair fills its rings.
        let unknown = self.shared.used() == Used::Filled;
        let filled = unknown && (self.rx.arm() | transmit);
        filled && self.look_for_use() || transmit && self.discards()
    }

    fn disarm(&self) {
        self.tx.disarm();
        self.rx.disarm();
    }
}

/// A ring of a pair as its thread's table of queues holds it.
struct RunningRing {
    pair: Rc<Pair>,
    side: Side,
}

impl RunningQueue for RunningRing {
    fn change(self: Rc<Self>, change: QueueChange) -> LocalFuture<()> {
        Box::pin(async move {
            self.pair.change_ring(self.side, change);
        })
    }

    fn stop(self: Rc<Self>) -> LocalFuture<Stopped> {
        Box::pin(async move { self.pair.stop_ring(self.side) })
    }
}

/// What makes a pair.
pub(super) struct PairParts {
    pub(super) port: Arc<str>,
    pub(super) index: u16,
    pub(super) shared: Arc<Shared>,
    pub(super) hooks: PortHooks,
    pub(super) open: QueueMaker,
}

impl PairParts {
    fn make(self) -> std::io::Result<Rc<Pair>> {
        let network = (self.open)()?;
        let hooks = Rc::new(PairHooks::new(&self.hooks, self.index));
        Ok(Rc::new_cyclic(|own| Pair {
            own: own.clone(),
            rx: Rc::new(Rx::new(self.shared.clone(), hooks.clone())),
            tx: Tx::new(self.shared.clone(), hooks),
            port: self.port,
            index: self.index,
            shared: self.shared,
            polled: network.polled(),
            network,
            connection: RefCell::new(None),
            connected: Cell::new(false),
            filled: Cell::new(false),
            poller: RefCell::new(None),
        }))
    }
}

/// A queue pair as the control thread holds it.
pub(super) struct PairRemote {
    thread: Handle,
    id: u64,
}

impl PairRemote {
    /// Makes a pair on `thread` and opens its queue there.
    ///
    /// # Errors
    /// The back-end's; that the thread has ended.
    pub(super) async fn start(thread: Handle, parts: PairParts) -> std::io::Result<PairRemote> {
        static NEXT_ID: AtomicU64 = AtomicU64::new(0);
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
        let start = move || async move {
            let pair = parts.make()?;
            PAIRS.with_borrow_mut(|pairs| pairs.insert(id, pair));
            Ok::<(), std::io::Error>(())
        };
        let ended = || std::io::Error::other("the thread of the queue pair has ended");
        thread.call(start).await.ok_or_else(ended)??;
        Ok(PairRemote { thread, id })
    }

    /// Starts serving one of its rings.
    pub(super) async fn start_ring(&self, setup: QueueSetup) -> Result<QueueRemote, QueueError> {
        let id = self.id;
        let start = move || {
            let pair = local(id).ok_or(QueueError::ThreadEnded)?;
            let side = match setup.index % 2 {
                0 => Side::Receive,
                _ => Side::Transmit,
            };
            pair.start_ring(side, &setup)?;
            Ok(Rc::new(RunningRing { pair, side }) as Rc<dyn RunningQueue>)
        };
        QueueRemote::start_with(&self.thread, start).await
    }

    /// Looks at what is shared; done when this resolves.
    pub(super) async fn refresh(&self) {
        let id = self.id;
        let refresh = move || async move {
            if let Some(pair) = local(id) {
                pair.refresh();
            }
        };
        // A thread that ended has no pair that could look.
        let _: Option<()> = self.thread.call(refresh).await;
    }

    /// Sends a frame of the daemon's own to the network, as if the guest had.
    pub(super) fn send(&self, frame: Vec<u8>) {
        let id = self.id;
        self.thread.spawn(move || async move {
            if let Some(pair) = local(id)
                && pair.connected.get()
            {
                let frame = Frame::new(VnetHeader::default(), &frame);
                let mut lost = |reason| tracing::debug!("announcement dropped: {reason:?}");
                if pair.network.transmit(&[frame], &mut lost) == 0 {
                    lost(DropReason::Busy);
                }
                pair.network.flush();
            }
        });
    }

    /// Ends it, with its queue of the back-end. Its rings do not run.
    pub(super) async fn stop(&self) {
        let id = self.id;
        let stop = move || async move {
            let pair = PAIRS.with_borrow_mut(|pairs| pairs.remove(&id));
            if let Some(pair) = pair {
                pair.disconnect();
            }
        };
        let _: Option<()> = self.thread.call(stop).await;
    }
}
