//! What a port counts: frames, bytes and drops, per queue pair and direction.
//!
//! ```text
//!   pair's thread ── load, add, store ──> DirectionCounters ── relaxed loads ──> QMP, metrics (any thread)
//! ```
//!
//! Each direction of a pair has one writer, the thread of the pair, so counting needs no locked instruction. The numbers
//! only grow while the port lives; a reader may see one of two related numbers a frame early.
//!
//! As everywhere in the daemon: *tx* is what the guest sends, *rx* what it receives.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::link::DropReason;

/// Number of reasons.
const REASONS: usize = DropReason::ALL.len();

/// The counters of all queue pairs of a port.
#[derive(Debug)]
pub struct PortCounters {
    /// By index of the pair.
    pub pairs: Vec<PairCounters>,
}

impl PortCounters {
    /// Zeroes for `pairs` queue pairs.
    pub fn new(pairs: u16) -> PortCounters {
        let pairs = (0..pairs).map(|_| PairCounters::default()).collect();
        PortCounters { pairs }
    }

    /// The sum over all pairs: received by the guest, sent by it.
    pub fn total(&self) -> (Counted, Counted) {
        let (mut rx, mut tx) = (Counted::default(), Counted::default());
        for pair in &self.pairs {
            rx.add(&pair.rx.read());
            tx.add(&pair.tx.read());
        }
        (rx, tx)
    }
}

/// The counters of a queue pair.
#[derive(Debug, Default)]
pub struct PairCounters {
    /// To the guest.
    pub rx: DirectionCounters,
    /// From the guest.
    pub tx: DirectionCounters,
}

/// The counters of one direction, on cache lines of their own.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct DirectionCounters {
    frames: AtomicU64,
    bytes: AtomicU64,
    drops: [AtomicU64; REASONS],
}

impl DirectionCounters {
    /// `frames` frames of `bytes` bytes together, virtio-net headers not included, went through. Only the pair's thread
    /// calls this.
    #[inline]
    pub fn count(&self, frames: u64, bytes: u64) {
        add(&self.frames, frames);
        add(&self.bytes, bytes);
    }

    /// One frame went nowhere. Only the pair's thread calls this.
    #[inline]
    pub fn count_drop(&self, reason: DropReason) {
        add(&self.drops[reason as usize], 1);
    }

    /// Frames that went through.
    pub fn frames(&self) -> u64 {
        self.frames.load(Ordering::Relaxed)
    }

    /// Their bytes, virtio-net headers not included.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Frames that were dropped for `reason`.
    pub fn drops(&self, reason: DropReason) -> u64 {
        self.drops[reason as usize].load(Ordering::Relaxed)
    }

    /// The numbers as they are now; from any thread.
    pub fn read(&self) -> Counted {
        Counted {
            frames: self.frames(),
            bytes: self.bytes(),
            drops: DropReason::ALL.map(|reason| self.drops(reason)),
        }
    }
}

/// Adds with one writer.
#[inline]
fn add(counter: &AtomicU64, more: u64) {
    let before = counter.load(Ordering::Relaxed);
    counter.store(before.wrapping_add(more), Ordering::Relaxed);
}

/// What was counted up to some moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// Frames that went through.
    pub frames: u64,
    /// Their bytes, virtio-net headers not included.
    pub bytes: u64,
    drops: [u64; REASONS],
}

impl Counted {
    /// Frames that were dropped for `reason`.
    pub fn dropped(&self, reason: DropReason) -> u64 {
        self.drops[reason as usize]
    }

    /// Frames that were dropped, whatever for.
    pub fn dropped_total(&self) -> u64 {
        self.drops.iter().sum()
    }

    /// Adds what was counted elsewhere.
    pub fn add(&mut self, other: &Counted) {
        self.frames += other.frames;
        self.bytes += other.bytes;
        for (sum, more) in self.drops.iter_mut().zip(other.drops) {
            *sum += more;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_has_a_place_of_its_own() {
        let counters = DirectionCounters::default();
        for (index, reason) in DropReason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, index, "{reason:?}");
            (0..=index).for_each(|_| counters.count_drop(reason));
        }
        let counted = counters.read();
        for (index, reason) in DropReason::ALL.into_iter().enumerate() {
            assert_eq!(counted.dropped(reason), index as u64 + 1);
        }
        assert_eq!(counted.dropped_total(), (1..=REASONS as u64).sum::<u64>());
    }

    #[test]
    fn the_total_is_that_of_all_pairs_and_directions_stay_apart() {
        let port = PortCounters::new(3);
        for (index, pair) in port.pairs.iter().enumerate() {
            pair.rx.count(1, 100 * index as u64);
            pair.tx.count(2, 1);
            pair.tx.count_drop(DropReason::Busy);
        }
        let (rx, tx) = port.total();
        assert_eq!((rx.frames, rx.bytes, rx.dropped_total()), (3, 300, 0));
        assert_eq!((tx.frames, tx.bytes), (6, 3));
        assert_eq!(tx.dropped(DropReason::Busy), 3);
    }

    #[test]
    fn writers_of_different_pairs_lose_nothing() {
        const ROUNDS: u64 = 100_000;
        let port = PortCounters::new(2);
        std::thread::scope(|scope| {
            for pair in &port.pairs {
                scope.spawn(|| (0..ROUNDS).for_each(|_| pair.tx.count(1, 64)));
            }
        });
        let (_, tx) = port.total();
        assert_eq!((tx.frames, tx.bytes), (2 * ROUNDS, 2 * ROUNDS * 64));
    }
}
