//! A virtqueue of whichever layout was negotiated.

use anyhow::Result;

use super::features::bits;
use super::memory::Area;
use super::packed_ring::PackedRing;
use super::ring::{Buffer, RingParts, SplitRing, device_used_idx};

/// Base of a packed ring that nobody has used: both positions at 0 in the first lap.
const PACKED_START: u32 = 0x8000_8000;

/// A ring seen from the driver.
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
    /// Bytes that a ring of `entries` entries takes in either layout.
    pub fn bytes(entries: u16) -> usize {
        SplitRing::bytes(entries).max(PackedRing::bytes(entries))
    }

    /// Lays an empty ring out in `area`, as the negotiated `features` say.
    pub fn new(area: Area, entries: u16, features: u64) -> Self {
        if features & bits::RING_PACKED == 0 {
            Self::Split(SplitRing::new(area, entries, features))
        } else {
            Self::Packed(PackedRing::new(area, entries, features))
        }
    }

    /// Forgets every chain and zeroes the ring.
    pub fn reset(&mut self) {
        either!(self, ring => ring.reset());
    }

    /// Where the parts lie.
    pub fn parts(&self) -> &RingParts {
        either!(self, ring => ring.parts())
    }

    /// True when a chain of that many buffers fits now.
    pub fn has_room(&self, buffers: usize) -> bool {
        either!(self, ring => ring.has_room(buffers))
    }

    /// Queues a chain without showing it to the device; returns its name.
    ///
    /// # Errors
    /// When there is no room, or the indirect table is too small.
    pub fn push(&mut self, buffers: &[Buffer], indirect: Option<&Area>) -> Result<u16> {
        either!(self, ring => ring.push(buffers, indirect))
    }

    /// Shows queued chains to the device; true when it wants to be kicked.
    pub fn publish(&mut self) -> bool {
        either!(self, ring => ring.publish())
    }

    /// Next finished chain: its name and the number of bytes the device says it wrote.
    ///
    /// # Errors
    /// When what the device returned is impossible.
    pub fn pop(&mut self) -> Result<Option<(u16, u32)>> {
        either!(self, ring => ring.pop())
    }

    /// The base from which a back-end's successor goes on: after what was returned. Works without any inflight region, for
    /// devices that complete in order.
    pub fn device_base(&self) -> u32 {
        match self {
            Self::Split(ring) => u32::from(device_used_idx(ring.parts())),
            Self::Packed(ring) => ring.device_base(),
        }
    }

    /// Asks for no completion interrupts.
    pub fn suppress_interrupts(&self) {
        either!(self, ring => ring.suppress_interrupts());
    }

    /// Asks for an interrupt at the next completion; true when one is already there.
    pub fn want_interrupt(&self) -> bool {
        either!(self, ring => ring.want_interrupt())
    }
}

/// Where a back-end that was never told begins.
pub(crate) fn first_base(features: u64) -> u32 {
    if features & bits::RING_PACKED == 0 {
        0
    } else {
        PACKED_START
    }
}

/// What the successor of a back-end that died is told. A split ring goes on from what was returned.
/// The positions in a packed ring are nowhere in guest memory: only the inflight region has them.
pub(super) fn base_after_death(parts: &RingParts, features: u64) -> u32 {
    if features & bits::RING_PACKED == 0 {
        u32::from(device_used_idx(parts))
    } else {
        PACKED_START
    }
}
