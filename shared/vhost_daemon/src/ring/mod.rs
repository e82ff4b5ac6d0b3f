//! Virtqueues seen from the device: fetching chains, returning used elements, notifications.
//!
//! ```text
//!                 ┌─ SplitRing   three parts: descriptors, available, used   (virtio 1.2, 2.7)
//!   queue ── Ring ┤                                             both parse into Chain
//!                 └─ PackedRing  one ring of descriptors, two event structures         (2.8)
//! ```
//!
//! What [`crate::queue`] needs of a ring are the methods of [`Ring`]; which layout it has is one
//! branch that never changes its mind.
//!
//! Promises: each descriptor is read once and then validated; no access outside of the memory
//! table; every loop is bounded by the ring size or [`MAX_CHAIN`]; a chain holds each byte
//! count below 4 GiB. A guest that breaks the rules gets a [`RingError`], after which its ring is
//! not read again. While a dirty log is set, every page written is logged before the guest can know.

mod chain;
mod descriptor;
mod dirty;
mod packed;
mod position;
mod split;

use std::sync::Arc;

use virtio_bindings::virtio_config::VIRTIO_F_RING_PACKED;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::dirty_log::RingLog;
use crate::inflight::{InflightError, InflightRegion};
use crate::memory::MemoryTable;
use crate::wire::RingAddresses;

pub use chain::{Chain, GuestBytes, MAX_CHAIN, Segment, SharedMemory};
pub use descriptor::Descriptor;
use descriptor::Indirect;
pub use packed::PackedRing;
pub use position::Position;
pub use split::SplitRing;

/// How a ring lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingLayout {
    /// Descriptor table, available ring and used ring.
    Split,
    /// One ring of descriptors (`VIRTIO_F_RING_PACKED`).
    Packed,
}

impl RingLayout {
    /// The layout that acknowledged virtio features ask for.
    pub fn of(features: u64) -> RingLayout {
        if features & (1 << VIRTIO_F_RING_PACKED) == 0 {
            RingLayout::Split
        } else {
            RingLayout::Packed
        }
    }
}

/// What was negotiated about a ring.
#[derive(Clone, Copy, Debug)]
pub struct RingFeatures {
    layout: RingLayout,
    event_idx: bool,
    indirect: Indirect,
}

impl RingFeatures {
    /// The ring's part of acknowledged virtio features.
    pub fn of(features: u64) -> RingFeatures {
        let has = |bit: u32| features & (1 << bit) != 0;
        RingFeatures {
            layout: RingLayout::of(features),
            event_idx: has(VIRTIO_RING_F_EVENT_IDX),
            indirect: if has(VIRTIO_RING_F_INDIRECT_DESC) {
                Indirect::Negotiated
            } else {
                Indirect::Forbidden
            },
        }
    }
}

/// Where a ring is gone on with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingOrigin {
    /// At the base that the front-end tells, or where the inflight region says.
    Base,
    /// At the used index. For devices that return every request in the order in which it came: whatever a predecessor had
    /// fetched and not returned is fetched again, whoever told the base. A packed ring has no such index in memory, so its
    /// base has to be the used position.
    Used,
}

/// What a ring is made of.
#[derive(Debug)]
pub struct RingParts {
    /// Index of the queue.
    pub index: u16,
    /// Ring size in descriptors.
    pub size: u16,
    /// Where to go on, as SET_VRING_BASE tells it, unless the inflight region knows better.
    pub base: u32,
    /// What decides where to go on.
    pub origin: RingOrigin,
    /// What was negotiated.
    pub features: RingFeatures,
    /// Where the parts are.
    pub addresses: RingAddresses,
    /// Where descriptors in flight are recorded.
    pub inflight: Option<Arc<InflightRegion>>,
}

impl RingParts {
    fn check_size(&self) -> Result<u16, RingError> {
        if self.size.is_power_of_two() && self.size <= 32768 {
            Ok(self.size)
        } else {
            Err(RingError::Size(u32::from(self.size)))
        }
    }
}

/// Why a ring cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The ring itself.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// Its inflight region.
    #[error(transparent)]
    Inflight(#[from] InflightError),
}

/// A ring of either layout, from the device's side. Lives on its queue's thread.
#[derive(Debug)]
pub enum Ring {
    /// Split.
    Split(SplitRing),
    /// Packed.
    Packed(PackedRing),
}

/// Calls the same method of either layout.
macro_rules! either {
    ($self:expr, $ring:ident => $call:expr) => {
        match $self {
            Ring::Split($ring) => $call,
            Ring::Packed($ring) => $call,
        }
    };
}

impl Ring {
    /// A ring of `parts` in `memory`, and the requests that have to be fetched again first.
    ///
    /// # Errors
    /// [`RingError`] when a part is not in shared memory, [`InflightError`] when the inflight
    /// region is corrupt.
    pub fn new(parts: RingParts, memory: SharedMemory) -> Result<(Ring, Vec<u16>), StartError> {
        match parts.features.layout {
            RingLayout::Split => {
                let (ring, resubmit) = SplitRing::new(parts, memory)?;
                Ok((Ring::Split(ring), resubmit))
            }
            RingLayout::Packed => {
                let (ring, resubmit) = PackedRing::new(parts, memory)?;
                Ok((Ring::Packed(ring), resubmit))
            }
        }
    }

    /// Where a successor goes on, as GET_VRING_BASE tells it.
    pub fn base(&self) -> u32 {
        either!(self, ring => ring.base())
    }

    /// Whether requests of the ring were returned already, as far as it can tell: it is gone on with elsewhere than where rings
    /// begin.
    pub fn was_used(&self) -> bool {
        match self {
            Ring::Split(ring) => ring.base() != 0,
            Ring::Packed(ring) => !ring.is_at_start(),
        }
    }

    /// Requests fetched and not yet returned.
    #[inline]
    pub fn in_flight(&self) -> u16 {
        either!(self, ring => ring.in_flight())
    }

    /// Whether any memory the ring works in was truncated by the front-end.
    pub fn poisoned(&self) -> bool {
        either!(self, ring => ring.poisoned())
    }

    /// Works in `memory` from now on. False when the ring itself is not in it: then the ring's
    /// parts stay in the old mapping.
    pub fn relocate(&mut self, memory: SharedMemory) -> bool {
        either!(self, ring => ring.relocate(memory))
    }

    /// Logs writes from now on, elsewhere than before, or no more. Nothing may be in flight when
    /// logging begins.
    pub fn set_log(&mut self, log: Option<RingLog>) {
        either!(self, ring => ring.set_log(log));
    }

    /// Whether writes are logged.
    pub fn is_logging(&self) -> bool {
        either!(self, ring => ring.is_logging())
    }

    /// Fetches up to `chains.len()` requests. Gives how many, and what broke the ring after them.
    #[inline]
    pub fn fetch(&mut self, chains: &mut [Chain]) -> (usize, Option<RingError>) {
        either!(self, ring => ring.fetch(chains))
    }

    /// Fetches a request again that was in flight when a predecessor died.
    ///
    /// # Errors
    /// [`RingError`]: what it left in the ring is no chain any more.
    pub fn refetch(&mut self, head: u16, chain: &mut Chain) -> Result<(), RingError> {
        either!(self, ring => ring.refetch(head, chain))
    }

    /// Returns a request; the guest sees it after [`Ring::publish`].
    #[inline]
    pub fn push_used(&mut self, head: u16, written: u32) {
        either!(self, ring => ring.push_used(head, written));
    }

    /// Gives every request that was fetched and not returned back, as if it had never been fetched. Those returned were the
    /// oldest and are published, and there is no inflight region.
    pub fn rewind(&mut self) {
        either!(self, ring => ring.rewind());
    }

    /// Whether the driver made something available.
    #[inline]
    pub fn has_work(&self) -> bool {
        either!(self, ring => ring.has_work())
    }

    /// Shows the guest every request returned by now; false when there is none.
    #[inline]
    pub fn publish(&mut self) -> bool {
        either!(self, ring => ring.publish())
    }

    /// Whether the guest wants a call for what was published since this was last asked.
    #[inline]
    pub fn needs_call(&mut self) -> bool {
        either!(self, ring => ring.needs_call())
    }

    /// Asks for kicks; true when something came in before the request could be seen.
    pub fn arm(&self) -> bool {
        either!(self, ring => ring.arm())
    }

    /// Asks for no kicks, as far as the guest may honour that.
    pub fn disarm(&self) {
        either!(self, ring => ring.disarm());
    }
}

/// Whether a ring of `size` descriptors at `addresses` lies in `memory`.
pub(crate) fn is_mapped(
    memory: &MemoryTable,
    addresses: &RingAddresses,
    (size, layout): (u16, RingLayout),
) -> bool {
    match layout {
        RingLayout::Split => split::Layout::new(memory, addresses, size).is_ok(),
        RingLayout::Packed => packed::Layout::new(memory, addresses, size).is_ok(),
    }
}

/// Bytes from a ring's log address that are written and may be logged there.
pub(crate) fn logged_len((size, layout): (u16, RingLayout)) -> u64 {
    match layout {
        RingLayout::Split => 6 + 8 * u64::from(size),
        RingLayout::Packed => packed::EVENT_LEN as u64,
    }
}

/// How a guest or front-end broke a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// The ring size is not a power of two within the device's limit.
    #[error("ring size {0}")]
    Size(u32),
    /// A base that is no place in the ring.
    #[error("base {0:#x} is not in the ring")]
    Base(u32),
    /// A part of the ring is outside of shared memory or misaligned.
    #[error("ring part at {0:#x} is not in shared memory or misaligned")]
    Unmapped(u64),
    /// More available entries than the ring has.
    #[error("available index {index} is more than {size} ahead of {next}")]
    AvailableIndex {
        /// What the driver wrote.
        index: u16,
        /// What comes next.
        next: u16,
        /// Ring size.
        size: u16,
    },
    /// More available descriptors than the ring has.
    #[error("more descriptors are available than the ring's {0}")]
    Overrun(u16),
    /// A descriptor index beyond the table.
    #[error("descriptor {0} does not exist")]
    DescriptorIndex(u16),
    /// A head that the device has not returned yet.
    #[error("descriptor {0} was made available twice")]
    Duplicate(u16),
    /// A chain longer than its table: it loops.
    #[error("chain of descriptor {0} is too long or loops")]
    ChainLength(u16),
    /// A buffer outside of shared memory.
    #[error("buffer {addr:#x}+{len:#x} is not in shared memory")]
    Buffer {
        /// Guest address.
        addr: u64,
        /// Length in bytes.
        len: u32,
    },
    /// Readable descriptors after writable ones.
    #[error("chain of descriptor {0} has a readable buffer after a writable one")]
    Order(u16),
    /// 4 GiB or more in one direction.
    #[error("chain of descriptor {0} is 4 GiB or longer")]
    TotalLength(u16),
    /// An indirect table where none may be, or of a bad length.
    #[error("chain of descriptor {head} has an invalid indirect table of {len} bytes")]
    Indirect {
        /// Head of the chain.
        head: u16,
        /// Length of the table in bytes.
        len: u32,
    },
    /// The front-end truncated memory that it shares.
    #[error("shared memory was truncated by the front-end")]
    Truncated,
    /// A request that its device cannot even refuse.
    #[error("{0}")]
    Request(&'static str),
    /// The kick descriptor failed.
    #[error("kick descriptor: {0}")]
    Kick(nix::errno::Errno),
}
