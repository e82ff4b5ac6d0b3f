//! The seam between a guest's queue pair and what carries its frames.
//!
//! ```text
//!   queue pair ── NetQueue::transmit ──────────────> back-end or switch       guest to network
//!   Sink       <── deliver, or reserve and commit ── back-end or switch       network to guest
//! ```
//!
//! Both ends live on one thread. Nothing here waits but the futures that say so; a caller that is told "not now" awaits one and
//! tries again. What was taken is done: there is nothing in flight between the two.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::rc::Rc;

use crate::frame::Frame;

/// Frames that are handled together at most.
pub const BURST: usize = 32;

/// A future that stays on its thread.
pub type LocalFuture<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// What a receiver of frames can do by itself, so that the sender may leave it undone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Takes frames whose checksum is not filled in. The others need it.
    pub csum: bool,
    /// Segments TCP over IPv4.
    pub tso4: bool,
    /// Segments TCP over IPv6.
    pub tso6: bool,
    /// Segments TCP with congestion notification bits.
    pub ecn: bool,
    /// Segments UDP over IPv4.
    pub uso4: bool,
    /// Segments UDP over IPv6.
    pub uso6: bool,
}

impl Offloads {
    /// Takes only finished frames.
    pub const NONE: Offloads = Offloads {
        csum: false,
        tso4: false,
        tso6: false,
        ecn: false,
        uso4: false,
        uso6: false,
    };
    /// Takes everything.
    pub const ALL: Offloads = Offloads {
        csum: true,
        tso4: true,
        tso6: true,
        ecn: true,
        uso4: true,
        uso6: true,
    };

    /// What both can do.
    #[must_use]
    pub fn and(self, other: Offloads) -> Offloads {
        Offloads {
            csum: self.csum && other.csum,
            tso4: self.tso4 && other.tso4,
            tso6: self.tso6 && other.tso6,
            ecn: self.ecn && other.ecn,
            uso4: self.uso4 && other.uso4,
            uso6: self.uso6 && other.uso6,
        }
    }
}

/// Why a frame went nowhere. Each is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DropReason {
    /// The guest has no receive buffers.
    NoBuffers,
    /// Longer than the receiver's buffers or its MTU.
    TooLong,
    /// Shorter than an Ethernet header, or no buffer for it.
    TooShort,
    /// The virtio-net header says what the frame is not, or what was not negotiated.
    BadHeader,
    /// The link is down.
    LinkDown,
    /// The front-end has disabled the transmit ring, or the driver uses fewer queue pairs.
    RingDisabled,
    /// A rate limit, where the sender cannot be made to wait.
    RateLimited,
    /// The guest's receive filter: not its address, not its VLAN.
    Filtered,
    /// The source MAC address is not the port's.
    SpoofedMac,
    /// The source IPv4 or IPv6 address, or one that an ARP or ND message tells, is not the port's.
    SpoofedIp,
    /// A guest may not answer as a DHCP server or router here.
    RogueServer,
    /// A VLAN that the port is no member of.
    Vlan,
    /// The port's or the switch's limit of flooded frames.
    FloodLimit,
    /// Isolated ports do not hear each other.
    Isolated,
    /// Learnt behind the port that it came from.
    SamePort,
    /// The network's error.
    SendFailed,
    /// The network does not take more now and would make others wait.
    Busy,
}

impl DropReason {
    /// All of them, in the order of their discriminants.
    pub const ALL: [DropReason; 17] = [
        DropReason::NoBuffers,
        DropReason::TooLong,
        DropReason::TooShort,
        DropReason::BadHeader,
        DropReason::LinkDown,
        DropReason::RingDisabled,
        DropReason::RateLimited,
        DropReason::Filtered,
        DropReason::SpoofedMac,
        DropReason::SpoofedIp,
        DropReason::RogueServer,
        DropReason::Vlan,
        DropReason::FloodLimit,
        DropReason::Isolated,
        DropReason::SamePort,
        DropReason::SendFailed,
        DropReason::Busy,
    ];

    /// Its name in QMP answers and metrics.
    pub fn name(self) -> &'static str {
        match self {
            DropReason::NoBuffers => "no-buffers",
            DropReason::TooLong => "too-long",
            DropReason::TooShort => "too-short",
            DropReason::BadHeader => "bad-header",
            DropReason::LinkDown => "link-down",
            DropReason::RingDisabled => "ring-disabled",
            DropReason::RateLimited => "rate-limited",
            DropReason::Filtered => "filtered",
            DropReason::SpoofedMac => "spoofed-mac",
            DropReason::SpoofedIp => "spoofed-ip",
            DropReason::RogueServer => "rogue-server",
            DropReason::Vlan => "vlan",
            DropReason::FloodLimit => "flood-limit",
            DropReason::Isolated => "isolated",
            DropReason::SamePort => "same-port",
            DropReason::SendFailed => "send-failed",
            DropReason::Busy => "busy",
        }
    }
}

/// What became of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// It is there (visible after the next flush).
    Taken,
    /// It is not, and whoever refused it has counted that.
    Dropped(DropReason),
    /// Not now: [`Sink::until_ready`] says when to try again. Whoever cannot wait drops the frame and counts it.
    NotReady(DropReason),
}

/// Where frames for a guest go: the receiving half of its queue pair.
pub trait Sink {
    /// What the guest can do by itself; frames that need more have to be finished first.
    fn offloads(&self) -> Offloads;

    /// Whether a frame would be taken now: the guest has buffers, limits allow it.
    fn ready(&self) -> bool;

    /// Resolves when [`Sink::ready`] may have become true.
    fn until_ready(&self) -> LocalFuture<'_, ()>;

    /// Copies a frame to the guest.
    fn deliver(&self, frame: &Frame<'_>) -> Delivery;

    /// Appends the guest's next buffers, for a virtio-net header and up to `len` bytes of a frame, to `buffers`, and gives how
    /// many bytes they hold, the header included; 0 when it is not ready. They may be written until the next call of any
    /// method; nothing is taken from the guest until [`Sink::commit`].
    fn reserve(&self, len: usize, buffers: &mut Vec<libc::iovec>) -> usize;

    /// The reserved buffers hold a header and a frame, `written` bytes together. The header's `num_buffers` is filled in here.
    fn commit(&self, written: usize) -> Delivery;

    /// Shows the guest what it was given, and calls it if it wants that.
    fn flush(&self);
}

/// How far [`NetQueue::receive`] got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// There may be more.
    More,
    /// There was nothing more: [`NetQueue::readable`] says when to look again.
    Drained,
    /// The sink is not ready: [`Sink::until_ready`] says when it is.
    NotReady,
}

/// One queue of a back-end: what a guest's queue pair sends to and receives from. Lives on the pair's thread.
pub trait NetQueue {
    /// Frames for the guest go to `sink` from now on. Called before anything else.
    fn connect(&self, sink: Rc<dyn Sink>);

    /// The sink is gone; it is not used after this. `transmit` may be called again only after another `connect`.
    fn disconnect(&self);

    /// Sends frames in their order. Gives how many were dealt with: sent, or dropped and counted through `dropped`. The others
    /// have to be given again when [`NetQueue::writable`] resolves.
    fn transmit(&self, frames: &[Frame<'_>], dropped: &mut dyn FnMut(DropReason)) -> usize;

    /// All frames that are there for now were given to `transmit`.
    fn flush(&self) {}

    /// Resolves when `transmit` may take more.
    fn writable(&self) -> LocalFuture<'_, ()>;

    /// Gives the sink up to `budget` frames without waiting for any, and flushes it.
    ///
    /// # Errors
    /// The back-end's: the queue receives nothing more.
    fn receive(&self, budget: usize) -> io::Result<Received>;

    /// Resolves when [`NetQueue::receive`] may find something. Pending for ever where frames come by themselves.
    fn readable(&self) -> LocalFuture<'_, ()>;

    /// Whether it is worth to call [`NetQueue::receive`] again and again, without a word from [`NetQueue::readable`], for as
    /// long as the thread is busy anyway: looking costs no system call.
    fn polled(&self) -> bool {
        false
    }

    /// The guest changed what it can do by itself (`VIRTIO_NET_CTRL_GUEST_OFFLOADS`, or new features).
    ///
    /// # Errors
    /// The back-end's.
    fn set_guest_offloads(&self, offloads: Offloads) -> io::Result<()>;
}

/// Receives until the back-end fails: the task that each connected queue needs.
///
/// # Errors
/// The back-end's.
pub async fn receive_all(queue: &dyn NetQueue, sink: &dyn Sink) -> io::Result<()> {
    loop {
        match queue.receive(BURST)? {
            Received::More => executor::time::yield_now().await,
            Received::Drained => queue.readable().await,
            Received::NotReady => sink.until_ready().await,
        }
    }
}
