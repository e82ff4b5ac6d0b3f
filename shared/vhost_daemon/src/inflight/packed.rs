//! The inflight part of a packed ring.
//!
//! ```text
//!   0 features u64 │ 8 version u16 │ 10 desc_num u16 │ 12 free_head u16 │ 14 old_free_head u16
//!  16 used_idx u16 │ 18 old_used_idx u16 │ 20 used_wrap_counter u8 │ 21 old_used_wrap_counter u8
//!  32 desc[desc_num], 32 bytes each: 0 inflight u8 │ 2 next u16 │ 4 last u16 │ 6 num u16
//!     │ 8 counter u64 │ 16 id u16 │ 18 flags u16 │ 20 len u32 │ 24 addr u64
//! ```
//!
//! Used descriptors overwrite available ones of other requests, so the region holds a copy of each
//! request's descriptors, in states taken from a list of free ones:
//!
//! ```text
//!   fetch     copies, counter, num, last, inflight = 1; then free_head and old_free_head   (take)
//!   complete  last state's next = free_head, free_head = first state                   (complete)
//!   publish   used position; used descriptors, the batch's first one last   (advance)
//!             inflight = 0 for the batch, old_free_head, old used position            (commit)
//! ```
//!
//! What a successor finds depends only on where the last of these stores fell: before
//! `old_free_head` a fetch did not happen; before the first used descriptor of a batch is written a
//! publication did not happen; afterwards it did. The two heads are one store, and so are the four
//! fields of the used positions, because a death between an index and its wrap counter would leave
//! a position that nobody was ever at. (Fields are put together as little-endian machines do.)

#![expect(unsafe_code, reason = "shared memory is reached through raw pointers")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use super::{InflightError, InflightRegion, Part};
use crate::ring::{Descriptor, Position, RingLayout};
use crate::store::Store;

pub(super) const HEADER_LEN: usize = 32;
pub(super) const DESC_LEN: usize = 32;
const FREE_HEADS_AT: usize = 12;
const USED_AT: usize = 16;

/// What a queue has to do before it serves new requests.
#[derive(Debug, PartialEq, Eq)]
pub struct PackedRecovery {
    /// Requests to serve again, oldest first.
    pub resubmit: Vec<Taken>,
    /// Free states, in the order of their list.
    pub free: Vec<u16>,
    /// Where the next used descriptor goes; `None` when the region is new and the front-end's
    /// base holds.
    pub used: Option<Position>,
}

/// The states of one request in flight.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Taken {
    /// Its states, the first one naming the request.
    pub states: Vec<u16>,
    /// Copies of its descriptors, as untrusted as the ring.
    pub descriptors: Vec<Descriptor>,
}

/// One packed ring's part of an inflight region, on the queue's thread.
#[derive(Debug)]
pub struct PackedInflight {
    part: Part,
    /// The next request's place in the order.
    counter: u64,
    /// Mirror of the head of the free list; nothing is read back from the region.
    free_head: u16,
    /// What of a publication was committed last.
    committed: Position,
}

impl PackedInflight {
    /// The part of queue `index`, whose ring has `size` descriptors.
    ///
    /// # Errors
    /// [`InflightError::NotCovered`]
    pub fn new(
        region: &Arc<InflightRegion>,
        index: u16,
        size: u16,
    ) -> Result<PackedInflight, InflightError> {
        Ok(PackedInflight {
            part: Part::new(region, index, size, RingLayout::Packed)?,
            counter: 0,
            free_head: 0,
            committed: Position::START,
        })
    }

    /// Whether the front-end truncated the region and the loss was noticed.
    pub fn poisoned(&self) -> bool {
        self.part.region.poisoned()
    }

    fn state(&self, index: u16) -> usize {
        debug_assert!(index < self.part.size);
        HEADER_LEN + DESC_LEN * usize::from(index)
    }

    fn in_flight(&self, index: u16) -> &AtomicU8 {
        // SAFETY: the first byte of a descriptor state inside the part.
        unsafe { &*self.part.at::<AtomicU8>(self.state(index)) }
    }

    fn next(&self, index: u16) -> &AtomicU16 {
        self.part.u16_at(self.state(index) + 2)
    }

    fn last(&self, index: u16) -> &AtomicU16 {
        self.part.u16_at(self.state(index) + 4)
    }

    fn num(&self, index: u16) -> &AtomicU16 {
        self.part.u16_at(self.state(index) + 6)
    }

    fn u64_of(&self, index: u16, offset: usize) -> &AtomicU64 {
        // SAFETY: an aligned word of a descriptor state inside the part.
        unsafe { &*self.part.at::<AtomicU64>(self.state(index) + offset) }
    }

    fn order(&self, index: u16) -> &AtomicU64 {
        self.u64_of(index, 8)
    }

    /// `id`, `flags` and `len` as one word.
    fn details(&self, index: u16) -> &AtomicU64 {
        self.u64_of(index, 16)
    }

    fn address(&self, index: u16) -> &AtomicU64 {
        self.u64_of(index, 24)
    }

    /// `free_head` and `old_free_head` as one word.
    fn free_heads(&self) -> &AtomicU32 {
        // SAFETY: bytes 12 to 15 of the part.
        unsafe { &*self.part.at::<AtomicU32>(FREE_HEADS_AT) }
    }

    /// The used positions and their wrap counters as one word.
    fn used_positions(&self) -> &AtomicU64 {
        // SAFETY: bytes 16 to 23 of the part.
        unsafe { &*self.part.at::<AtomicU64>(USED_AT) }
    }

    fn store_free_heads(&self, head: u16, old: u16) {
        let word = u32::from(head) | u32::from(old) << 16;
        self.free_heads().put(word);
    }

    fn store_used(&self, used: Position, old: Position) {
        let size = self.part.size;
        let word = u64::from(used.index(size))
            | u64::from(old.index(size)) << 16
            | u64::from(used.wrap(size)) << 32
            | u64::from(old.wrap(size)) << 40;
        self.used_positions().put(word);
    }

    /// The used position and the committed one, as the region has them.
    fn load_used(&self) -> Result<(Position, Position), InflightError> {
        let word = self.used_positions().load(Ordering::Acquire);
        let position = |index: u64, wrap: u64| {
            let wrap = u16::from(wrap & 0xff != 0) << 15;
            Position::from_wire(index as u16 & 0x7fff | wrap, self.part.size)
                .ok_or_else(|| self.part.corrupt("used index"))
        };
        Ok((
            position(word, word >> 32)?,
            position(word >> 16, word >> 40)?,
        ))
    }

    /// Brings the region in step with the ring and lists what was in flight. `was_used` tells of
    /// a position in the ring whether its descriptor is not an available one of that lap.
    ///
    /// # Errors
    /// [`InflightError::Corrupt`]
    pub fn recover(
        &mut self,
        base: Position,
        was_used: impl FnOnce(Position) -> bool,
    ) -> Result<PackedRecovery, InflightError> {
        if !self.part.is_in_use()? {
            return Ok(self.start_new(base));
        }
        let (mut used, old_used) = self.load_used()?;
        let heads = self.free_heads().load(Ordering::Acquire);
        let (mut free_head, old_free_head) = (heads as u16, (heads >> 16) as u16);
        // A publication begun is finished if the guest could see it, and undone otherwise; so is a
        // fetch that was not finished.
        if used == old_used || !was_used(old_used) {
            (used, free_head) = (old_used, old_free_head);
        }
        let mut owned = vec![false; usize::from(self.part.size)];
        let free = self.walk_free(free_head, &mut owned)?;
        for index in &free {
            self.in_flight(*index).put(0);
        }
        let resubmit = self.collect(&mut owned)?;
        if owned.contains(&false) {
            return Err(self
                .part
                .corrupt("a descriptor state is neither free nor in use"));
        }
        self.counter = resubmit.last().map_or(0, |taken: &Taken| {
            let newest = self.order(taken.states[0]).load(Ordering::Relaxed);
            newest.wrapping_add(1)
        });
        self.free_head = free_head;
        self.committed = used;
        self.store_free_heads(free_head, free_head);
        self.store_used(used, used);
        Ok(PackedRecovery {
            resubmit,
            free,
            used: Some(used),
        })
    }

    fn start_new(&mut self, base: Position) -> PackedRecovery {
        for index in 0..self.part.size {
            self.in_flight(index).put(0);
            self.next(index).put(index + 1);
        }
        self.committed = base;
        self.store_free_heads(0, 0);
        self.store_used(base, base);
        self.part.begin_use();
        PackedRecovery {
            resubmit: Vec::new(),
            free: (0..self.part.size).collect(),
            used: None,
        }
    }

    /// Takes an index of the region's for `owned`, which nobody may own yet.
    fn claim(&self, index: u16, owned: &mut [bool]) -> Result<(), InflightError> {
        match owned.get_mut(usize::from(index)) {
            Some(owner) if !*owner => *owner = true,
            _ => return Err(self.part.corrupt("descriptor states overlap")),
        }
        Ok(())
    }

    /// The free list; it ends with an index beyond the ring.
    fn walk_free(&self, head: u16, owned: &mut [bool]) -> Result<Vec<u16>, InflightError> {
        let mut free = Vec::new();
        let mut index = head;
        while index < self.part.size {
            self.claim(index, owned)?;
            free.push(index);
            index = self.next(index).load(Ordering::Relaxed);
        }
        Ok(free)
    }

    /// Every request in flight, oldest first.
    fn collect(&self, owned: &mut [bool]) -> Result<Vec<Taken>, InflightError> {
        let mut heads: Vec<u16> = (0..self.part.size)
            .filter(|index| !owned[usize::from(*index)])
            .filter(|index| self.in_flight(*index).load(Ordering::Relaxed) == 1)
            .collect();
        heads.sort_by_key(|head| self.order(*head).load(Ordering::Relaxed));
        let mut requests = Vec::with_capacity(heads.len());
        for head in heads {
            let num = self.num(head).load(Ordering::Relaxed);
            let mut states = Vec::new();
            let mut index = head;
            for _ in 0..num {
                self.claim(index, owned)?;
                states.push(index);
                index = self.next(index).load(Ordering::Relaxed);
            }
            if states.is_empty() {
                return Err(self.part.corrupt("a request without descriptors"));
            }
            let descriptors = states.iter().map(|state| self.copy_of(*state)).collect();
            requests.push(Taken {
                states,
                descriptors,
            });
        }
        Ok(requests)
    }

    fn copy_of(&self, index: u16) -> Descriptor {
        let details = self.details(index).load(Ordering::Relaxed);
        Descriptor {
            addr: self.address(index).load(Ordering::Relaxed),
            len: (details >> 32) as u32,
            flags: (details >> 16) as u16,
            tag: details as u16,
        }
    }

    /// Copies a descriptor of a request that is being fetched into free state `index`.
    #[inline]
    pub fn copy(&self, index: u16, descriptor: &Descriptor) {
        let details = u64::from(descriptor.tag)
            | u64::from(descriptor.flags) << 16
            | u64::from(descriptor.len) << 32;
        self.details(index).put(details);
        self.address(index).put(descriptor.addr);
    }

    /// The request of states `first` to `last`, `num` of them, was fetched; `free_head` heads what
    /// is left of the free list.
    #[inline]
    pub fn take(&mut self, first: u16, (last, num): (u16, u16), free_head: u16) {
        self.num(first).put(num);
        self.last(first).put(last);
        self.order(first).put(self.counter);
        self.counter = self.counter.wrapping_add(1);
        self.in_flight(first).put(1);
        self.free_head = free_head;
        self.store_free_heads(free_head, free_head);
    }

    /// The request of states `first` to `last` is done; its used descriptor is not written yet.
    #[inline]
    pub fn complete(&mut self, first: u16, last: u16) {
        self.next(last).put(self.free_head);
        self.free_head = first;
        self.part.u16_at(FREE_HEADS_AT).put(first);
    }

    /// The used descriptors up to `used` are about to be written.
    #[inline]
    pub fn advance(&mut self, used: Position) {
        self.store_used(used, self.committed);
    }

    /// They are written, and so the guest sees the requests of `firsts` completed.
    #[inline]
    pub fn commit(&mut self, used: Position, firsts: impl Iterator<Item = u16>) {
        for first in firsts {
            self.in_flight(first).put(0);
        }
        self.committed = used;
        self.store_free_heads(self.free_head, self.free_head);
        self.store_used(used, used);
    }
}
