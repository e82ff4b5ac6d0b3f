//! A ring's side of the dirty log: what its requests in flight may have written, and its own pages.

use super::chain::Chain;
use crate::dirty_log::RingLog;

/// A piece of guest memory: address and length in bytes.
type Piece = (u64, u64);

/// Where writes are logged, while they are.
#[derive(Debug)]
pub(super) struct Dirty {
    ring: RingLog,
    /// The writable buffers of each request in flight, by its head.
    writable: Box<[Vec<Piece>]>,
}

impl Dirty {
    /// Logs to `ring` for a ring of `size` descriptors with nothing in flight.
    pub(super) fn new(ring: RingLog, size: u16) -> Dirty {
        Dirty {
            ring,
            writable: (0..size).map(|_| Vec::new()).collect(),
        }
    }

    /// Logs to another place from now on.
    pub(super) fn redirect(&mut self, ring: RingLog) {
        self.ring = ring;
    }

    /// Remembers where `chain` may be written.
    pub(super) fn note(&mut self, chain: &Chain) {
        let pieces = &mut self.writable[usize::from(chain.head())];
        pieces.clear();
        chain.for_each_writable(|address, len| match pieces.last_mut() {
            Some((start, before)) if *start + *before == address => *before += len,
            _ => pieces.push((address, len)),
        });
    }

    /// The request of `head` is done: whatever it may have written is logged, since one that
    /// failed may have written a part.
    pub(super) fn complete(&self, head: u16) {
        for (address, len) in &self.writable[usize::from(head)] {
            self.ring.log.mark(*address, *len);
        }
    }

    /// Bytes of the used ring were written.
    pub(super) fn used(&self, offset: usize, len: usize) {
        if let Some(base) = self.ring.used_at {
            // An address that wraps is beyond any log.
            let address = base.saturating_add(offset as u64);
            self.ring.log.mark(address, len as u64);
        }
    }

    /// Bytes at a guest address of the ring itself were written.
    pub(super) fn ring(&self, address: u64, len: usize) {
        if self.ring.used_at.is_some() {
            self.ring.log.mark(address, len as u64);
        }
    }

    /// Whether the front-end truncated the log.
    pub(super) fn poisoned(&self) -> bool {
        self.ring.log.poisoned()
    }
}
