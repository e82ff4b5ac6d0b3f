//! What a port has carried and what it dropped, counted per queue pair and direction.
//!
//! Each counter has one writer, the pair's thread, so that counting is a load and a store; anybody may read. A direction's
//! counters fill cache lines of their own.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::link::DropReason;

/// Adds to a counter that has one writer.
#[inline]
fn add(counter: &AtomicU64, count: u64) {
    let sum = counter.load(Ordering::Relaxed).wrapping_add(count);
    counter.store(sum, Ordering::Relaxed);
}

/// Frames of one queue pair in one direction.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct DirectionCounters {
    frames: AtomicU64,
    bytes: AtomicU64,
    drops: [AtomicU64; DropReason::ALL.len()],
}

impl DirectionCounters {
    /// Frames that went on.
    pub fn frames(&self) -> u64 {
        self.frames.load(Ordering::Relaxed)
    }

    /// Their bytes, without virtio-net headers.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Frames that were dropped because of `reason`.
    pub fn drops(&self, reason: DropReason) -> u64 {
        self.drops[reason as usize].load(Ordering::Relaxed)
    }

    /// Frames of `bytes` together went on. Called by the pair's thread alone.
    #[inline]
    pub fn count(&self, frames: u64, bytes: u64) {
        add(&self.frames, frames);
        add(&self.bytes, bytes);
    }

    /// A frame was dropped. Called by the pair's thread alone.
    #[inline]
    pub fn count_drop(&self, reason: DropReason) {
        add(&self.drops[reason as usize], 1);
    }
}

/// Both directions of a queue pair, as its guest sees them.
#[derive(Debug, Default)]
pub struct PairCounters {
    /// To the guest.
    pub rx: DirectionCounters,
    /// From the guest.
    pub tx: DirectionCounters,
}

/// All queue pairs of a port.
#[derive(Debug)]
pub struct PortCounters {
    /// By the pair's index.
    pub pairs: Vec<PairCounters>,
}

impl PortCounters {
    /// Counters of a port with `pairs` queue pairs, all zero.
    pub fn new(pairs: u16) -> PortCounters {
        PortCounters {
            pairs: (0..pairs).map(|_| PairCounters::default()).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_has_its_own_counter() {
        let counters = DirectionCounters::default();
        for (times, reason) in (1..).zip(DropReason::ALL) {
            (0..times).for_each(|_| counters.count_drop(reason));
        }
        for (times, reason) in (1..).zip(DropReason::ALL) {
            assert_eq!(counters.drops(reason), times, "{}", reason.name());
        }
        counters.count(2, 128);
        counters.count(1, 60);
        assert_eq!((counters.frames(), counters.bytes()), (3, 188));
    }
}
