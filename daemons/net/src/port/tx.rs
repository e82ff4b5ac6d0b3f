//! The way from the guest: a pair's transmit ring, pumped into a [`NetQueue`].
//!
//! ```text
//!   fetch ≤ BURST ─> copy header and head of each, check ─> limits ─> NetQueue::transmit ─> return those taken, publish
//!                                                             └─ not now ──────┴─> what is left waits, in order
//! ```
//!
//! Promises: a frame is looked at once, in private memory; frames are returned to the ring in their order and only when they are
//! taken or dropped, so that a successor begins where this ended.

#![expect(
    unsafe_code,
    reason = "the tail of a frame stays in guest memory, which its chain keeps mapped"
)]

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use executor::sync::Notify;
use smallvec::SmallVec;
use vhost_daemon::queue::QueueChange;
use vhost_daemon::{Chain, QueueSetup, ServedRing, Stopped};

use super::features;
use super::hooks::PairHooks;
use super::shared::Shared;
use crate::capture::Direction;
use crate::frame::{Frame, HEAD_LEN, MAX_FRAME, VnetHeader};
use crate::guard::Guard;
use crate::link::{BURST, DropReason, NetQueue, Offloads};
use crate::offload;

/// Shortest frame: an Ethernet header.
const MIN_FRAME: usize = 14;
/// Bytes that are copied from the beginning of a chain.
const COPIED: usize = VnetHeader::LEN + HEAD_LEN;

/// Why nothing is sent now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Blocked {
    /// The network takes no more.
    Network,
    /// A limit, for so long.
    Limit(Duration),
}

/// The transmitting half of a pair.
pub(super) struct Tx {
    shared: Arc<Shared>,
    hooks: Rc<PairHooks>,
    ring: RefCell<Option<TxRing>>,
    /// Whether the front-end has the ring enabled.
    enabled: Cell<bool>,
    blocked: Cell<Option<Blocked>>,
    changed: Notify,
}

impl Tx {
    pub(super) fn new(shared: Arc<Shared>, hooks: Rc<PairHooks>) -> Tx {
        Tx {
            shared,
            hooks,
            ring: RefCell::new(None),
            enabled: Cell::new(false),
            blocked: Cell::new(None),
            changed: Notify::new(),
        }
    }

    /// The ring runs from now on.
    pub(super) fn start(&self, served: Rc<ServedRing>, setup: &QueueSetup) {
        self.ring.replace(Some(TxRing::new(served, setup)));
        self.enabled.set(setup.enabled);
    }

    /// Whether the ring runs.
    pub(super) fn runs(&self) -> bool {
        self.ring.borrow().is_some()
    }

    /// Whether it runs and frames of it are sent.
    #[inline]
    pub(super) fn is_enabled(&self) -> bool {
        self.enabled.get()
    }

    /// Whether the guest has given anything that is to be sent.
    pub(super) fn is_filled(&self) -> bool {
        self.is_enabled() && self.ring.borrow().as_ref().is_some_and(TxRing::has_work)
    }

    /// Whether the guest broke the ring.
    pub(super) fn is_broken(&self) -> bool {
        let ring = self.ring.borrow();
        ring.as_ref().is_some_and(|ring| ring.served.is_broken())
    }

    /// Makes a change with nothing fetched.
    pub(super) fn change(&self, change: QueueChange) {
        match change {
            QueueChange::Enabled => self.enabled.set(true),
            QueueChange::Disabled => self.enabled.set(false),
            _ => {}
        }
        if let Some(ring) = &mut *self.ring.borrow_mut() {
            let renew = matches!(change, QueueChange::Memory(_) | QueueChange::Log(_));
            if renew {
                ring.rewind();
            }
            ring.served.change(change);
            if renew {
                let served = &ring.served;
                ring.chains.fill_with(|| served.chain());
            }
        }
    }

    /// Stops the ring and gives back what was not sent.
    pub(super) fn stop(&self) -> Option<Stopped> {
        let mut ring = self.ring.take()?;
        self.enabled.set(false);
        ring.rewind();
        Some(ring.served.close())
    }

    /// Nothing holds it up any more, as far as is known.
    pub(super) fn unblock(&self) {
        self.blocked.set(None);
    }

    fn block(&self, reason: Blocked) {
        self.blocked.set(Some(reason));
        self.changed.notify_all();
    }

    /// Whether the pump would do something now.
    #[inline]
    fn can_work(&self) -> bool {
        self.blocked.get().is_none()
    }

    /// Sends a burst; whether there was one.
    #[inline]
    pub(super) fn poll(&self, network: &dyn NetQueue) -> bool {
        if !self.can_work() {
            return false;
        }
        let mut ring = self.ring.borrow_mut();
        let Some(ring) = &mut *ring else {
            return false;
        };
        if ring.done == ring.count {
            let refused = match self.shared.link() {
                true => None,
                false => Some(DropReason::LinkDown),
            };
            if !ring.fetch(refused) {
                return false;
            }
            if let Some(guard) = &*self.hooks.guard() {
                ring.check(guard);
            }
        }
        self.send(ring, network);
        true
    }

    /// Takes a burst, those that wait for the network first, and drops it; whether there was one.
    pub(super) fn discard(&self) -> bool {
        let mut ring = self.ring.borrow_mut();
        let Some(ring) = &mut *ring else {
            return false;
        };
        if ring.done < ring.count {
            ring.rewind();
        }
        if !ring.fetch(Some(DropReason::RingDisabled)) {
            return false;
        }
        let counters = &self.hooks.counters().tx;
        ring.give_back(0, |reason| counters.count_drop(reason));
        ring.served.publish();
        true
    }

    fn send(&self, ring: &mut TxRing, network: &dyn NetQueue) {
        if !ring.allowed
            && let Some(limits) = &*self.hooks.tx_limits()
        {
            let (frames, bytes) = ring.load();
            if let Err(wait) = limits.take(frames, bytes, Instant::now()) {
                return self.block(Blocked::Limit(wait));
            }
        }
        let frames = ring.frames();
        if !ring.allowed
            && let Some(capture) = self.hooks.capture()
        {
            for frame in &frames {
                capture.frame(Direction::Tx, frame);
            }
        }
        let counters = &self.hooks.counters().tx;
        let mut dropped = 0;
        let mut drop_frame = |reason| {
            dropped += 1;
            counters.count_drop(reason);
        };
        let taken = match frames.len() {
            0 => 0,
            _ => network.transmit(&frames, &mut drop_frame),
        };
        let whole = taken == frames.len();
        drop(frames);
        ring.allowed = true;
        let bytes = ring.give_back(taken, |reason| counters.count_drop(reason));
        counters.count(taken.saturating_sub(dropped) as u64, bytes);
        ring.served.publish();
        network.flush();
        if !whole {
            self.block(Blocked::Network);
        }
    }

    /// Unblocks the pump whenever what blocked it is over. For ever.
    pub(super) async fn unblock_when_possible(&self, network: &dyn NetQueue) {
        loop {
            let changed = self.changed.notified();
            match self.blocked.get() {
                None => changed.await,
                Some(Blocked::Network) => {
                    network.writable().await;
                    self.unblock();
                }
                Some(Blocked::Limit(wait)) => {
                    let limits = self.hooks.tx_limits().clone();
                    if let Some(limits) = limits {
                        limits.until(wait).await;
                    }
                    self.unblock();
                }
            }
        }
    }

    /// Asks for kicks; whether there is something to do already.
    pub(super) fn arm(&self) -> bool {
        let ring = self.ring.borrow();
        match &*ring {
            Some(ring) if self.can_work() && !ring.served.is_broken() => ring.served.arm(),
            _ => false,
        }
    }

    pub(super) fn disarm(&self) {
        if let Some(ring) = &*self.ring.borrow()
            && !ring.served.is_broken()
        {
            ring.served.disarm();
        }
    }
}

/// What is known of a fetched frame.
struct Slot {
    /// Virtio-net header and the first bytes of the frame.
    copied: [u8; COPIED],
    /// Bytes of the frame in `copied`.
    head_len: usize,
    /// Where its other pieces are in [`TxRing::tails`].
    tail: Range<usize>,
    /// Its length in bytes.
    len: usize,
    header: Result<VnetHeader, DropReason>,
}

impl Slot {
    fn new() -> Slot {
        Slot {
            copied: [0; COPIED],
            head_len: 0,
            tail: 0..0,
            len: 0,
            header: Err(DropReason::TooShort),
        }
    }

    /// Reads the frame of `chain`, once.
    #[inline]
    fn read(
        &mut self,
        chain: &Chain,
        tails: &mut Vec<libc::iovec>,
        negotiated: Offloads,
    ) -> Result<VnetHeader, DropReason> {
        let Some(len) = chain.readable_len().checked_sub(VnetHeader::LEN) else {
            return Err(DropReason::TooShort);
        };
        self.len = len;
        if len < MIN_FRAME {
            return Err(DropReason::TooShort);
        }
        if len > MAX_FRAME {
            return Err(DropReason::TooLong);
        }
        self.head_len = len.min(HEAD_LEN);
        let copied = VnetHeader::LEN + self.head_len;
        chain.copy_readable(0, &mut self.copied[..copied]);
        let start = tails.len();
        if len > self.head_len {
            chain.readable_pieces(copied..VnetHeader::LEN + len, |base, len| {
                tails.push(libc::iovec {
                    iov_base: base.cast(),
                    iov_len: len,
                });
            });
        }
        self.tail = start..tails.len();
        let (header, _) = self
            .copied
            .split_first_chunk()
            .expect("a slot begins with a header");
        offload::check_header(VnetHeader::from_bytes(header), len, negotiated)
    }

    /// The first bytes of the frame.
    #[inline]
    fn head(&self) -> &[u8] {
        &self.copied[VnetHeader::LEN..VnetHeader::LEN + self.head_len]
    }
}

/// A transmit ring and the chains fetched from it.
struct TxRing {
    served: Rc<ServedRing>,
    chains: Vec<Chain>,
    slots: Vec<Slot>,
    tails: Vec<libc::iovec>,
    /// Chains fetched.
    count: usize,
    /// How many of them went back.
    done: usize,
    /// The limits have let these pass, and they are captured.
    allowed: bool,
    negotiated: Offloads,
}

impl TxRing {
    fn new(served: Rc<ServedRing>, setup: &QueueSetup) -> TxRing {
        TxRing {
            chains: (0..BURST).map(|_| served.chain()).collect(),
            slots: (0..BURST).map(|_| Slot::new()).collect(),
            tails: Vec::with_capacity(BURST),
            count: 0,
            done: 0,
            allowed: false,
            negotiated: features::host_offloads(setup.features),
            served,
        }
    }

    fn has_work(&self) -> bool {
        let pending = self.done < self.count;
        pending || !self.served.is_broken() && self.served.ring().borrow().has_work()
    }

    /// Fetches a burst and reads it, or refuses all of it; whether there was one.
    #[inline]
    fn fetch(&mut self, refused: Option<DropReason>) -> bool {
        if self.served.is_broken() {
            return false;
        }
        let (count, error) = self.served.ring().borrow_mut().fetch(&mut self.chains);
        (self.count, self.done, self.allowed) = (count, 0, false);
        self.tails.clear();
        for (slot, chain) in self.slots.iter_mut().zip(&self.chains[..count]) {
            let header = slot.read(chain, &mut self.tails, self.negotiated);
            slot.header = refused.map_or(header, Err);
        }
        self.served.settle(error);
        count > 0
    }

    /// Lets `guard` drop what the guest may not send.
    fn check(&mut self, guard: &Guard) {
        for slot in &mut self.slots[..self.count] {
            if let Ok(header) = slot.header
                && let Err(reason) = guard.check(&Frame::new(header, slot.head()))
            {
                slot.header = Err(reason);
            }
        }
    }

    /// Frames and bytes that are to be sent.
    fn load(&self) -> (u64, u64) {
        let sent = self.slots[self.done..self.count]
            .iter()
            .filter(|slot| slot.header.is_ok());
        sent.fold((0, 0), |(frames, bytes), slot| {
            (frames + 1, bytes + slot.len as u64)
        })
    }

    /// The frames that are to be sent.
    #[inline]
    fn frames(&self) -> SmallVec<[Frame<'_>; BURST]> {
        let mut frames = SmallVec::new();
        for slot in &self.slots[self.done..self.count] {
            if let Ok(header) = slot.header {
                let tail = &self.tails[slot.tail.clone()];
                // SAFETY: the pieces are those of a chain that was not fetched into since, and which keeps them mapped.
                frames.push(unsafe { Frame::with_tail(header, slot.head(), tail) });
            }
        }
        frames
    }

    /// Returns the first `taken` frames to the guest, and those between and behind them that are not to be sent. The bytes of the
    /// frames taken.
    #[inline]
    fn give_back(&mut self, taken: usize, mut dropped: impl FnMut(DropReason)) -> u64 {
        let (mut left, mut bytes) = (taken, 0);
        let mut ring = self.served.ring().borrow_mut();
        while self.done < self.count {
            let slot = &self.slots[self.done];
            match slot.header {
                Ok(_) if left == 0 => break,
                Ok(_) => {
                    left -= 1;
                    bytes += slot.len as u64;
                }
                Err(reason) => dropped(reason),
            }
            ring.push_used(self.chains[self.done].head(), 0);
            self.done += 1;
        }
        bytes
    }

    /// Gives what was fetched and not sent back to the ring.
    fn rewind(&mut self) {
        self.served.ring().borrow_mut().rewind();
        (self.count, self.done) = (0, 0);
    }
}
