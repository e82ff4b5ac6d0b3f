//! The split virtqueue (virtio 1.2 section 2.7).
//!
//! ```text
//!   available:  flags u16 │ idx u16 │ ring[size] u16 │ used_event u16
//!   used:       flags u16 │ idx u16 │ ring[size] {id u32, len u32} │ avail_event u16
//! ```
//!
//! Used elements are written as requests complete and become visible together when
//! [`SplitRing::publish`] stores the index. Reading the available index acquires, storing the used
//! index releases; the checks after (un)suppressing notifications need a full fence on both sides
//! (section 2.7.10).

#![expect(unsafe_code, reason = "guest memory is reached through raw pointers")]

use std::cell::Cell;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering, fence};

use virtio_bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};

use super::chain::{Chain, MAX_CHAIN, SharedMemory};
use super::descriptor::{DESC_LEN, Descriptor, Indirect, prefetch, read_words};
use super::dirty::Dirty;
use super::{RingError, RingOrigin, RingParts, StartError};
use crate::dirty_log::RingLog;
use crate::inflight::SplitInflight;
use crate::memory::{Mapped, MemoryTable};
use crate::store::Store;
use crate::wire::RingAddresses;

/// Offset of the index in the available and the used ring.
const INDEX_AT: usize = 2;

/// The parts of a ring in this process. Keeps the regions they are in.
#[derive(Debug)]
pub(super) struct Layout {
    descriptors: Mapped,
    available: Mapped,
    used: Mapped,
}

impl Layout {
    pub(super) fn new(
        table: &MemoryTable,
        at: &RingAddresses,
        size: u16,
    ) -> Result<Layout, RingError> {
        let count = u64::from(size);
        let part = |addr: u64, len: u64, align: usize| {
            table
                .map_user(addr, len)
                .filter(|mapped| (mapped.base as usize).is_multiple_of(align))
                .ok_or(RingError::Unmapped(addr))
        };
        Ok(Layout {
            descriptors: part(at.descriptors, DESC_LEN as u64 * count, DESC_LEN)?,
            available: part(at.available, 6 + 2 * count, 2)?,
            used: part(at.used, 6 + 8 * count, 4)?,
        })
    }
}

/// A ring index or a count below the ring's size, kept in 32 bits. Compilers read 16 bits in 32 where that is aligned, and a load
/// that is wider than a store before it waits until the store has left the processor: behind those into guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Index(u32);

impl Index {
    fn new(value: u16) -> Index {
        Index(u32::from(value))
    }

    #[inline]
    fn get(self) -> u16 {
        self.0 as u16
    }

    #[inline]
    fn add(&mut self, count: u16) {
        *self = Index::new(self.get().wrapping_add(count));
    }

    #[inline]
    fn sub(&mut self, count: u16) {
        *self = Index::new(self.get().wrapping_sub(count));
    }
}

/// A split ring from the device's side. Lives on its queue's thread.
#[derive(Debug)]
pub struct SplitRing {
    layout: Layout,
    addresses: RingAddresses,
    size: u16,
    event_idx: bool,
    indirect: Indirect,
    /// Next entry of the available ring to fetch.
    next_avail: Index,
    /// Next entry of the used ring to write.
    next_used: Index,
    /// What the guest sees as the used index.
    published: Index,
    /// The used index when the guest was last considered for a call.
    considered: Index,
    /// Which heads the device holds.
    held: Box<[bool]>,
    in_flight: Index,
    inflight: Option<SplitInflight>,
    /// Where writes are logged; `None` while they are not.
    dirty: Option<Box<Dirty>>,
    memory: SharedMemory,
    hint: Cell<usize>,
}

impl SplitRing {
    /// A ring of `parts` in `memory`, and the heads that have to be served again first.
    ///
    /// # Errors
    /// [`RingError`] when a part is not in shared memory, [`InflightError`] when the inflight
    /// region is corrupt.
    pub fn new(
        parts: RingParts,
        memory: SharedMemory,
    ) -> Result<(SplitRing, Vec<u16>), StartError> {
        let size = parts.check_size()?;
        let layout = Layout::new(&memory, &parts.addresses, size)?;
        let base = u16::try_from(parts.base).map_err(|_| RingError::Base(parts.base))?;
        let inflight = parts
            .inflight
            .map(|region| SplitInflight::new(&region, parts.index, size))
            .transpose()?;
        let mut ring = SplitRing {
            layout,
            addresses: parts.addresses,
            size,
            event_idx: parts.features.event_idx,
            indirect: parts.features.indirect,
            next_avail: Index::new(base),
            next_used: Index::new(0),
            published: Index::new(0),
            considered: Index::new(0),
            held: vec![false; usize::from(size)].into_boxed_slice(),
            in_flight: Index::new(0),
            inflight,
            dirty: None,
            memory,
            hint: Cell::new(0),
        };
        let used = ring.used_u16(INDEX_AT).load(Ordering::Acquire);
        let index = Index::new(used);
        (ring.next_used, ring.published, ring.considered) = (index, index, index);
        if parts.origin == RingOrigin::Used {
            ring.next_avail = Index::new(used);
        }
        let mut resubmit = Vec::new();
        if let Some(inflight) = &mut ring.inflight {
            let recovery = inflight.recover(used)?;
            resubmit = recovery.resubmit;
            ring.next_avail = Index::new(recovery.avail.unwrap_or(base));
        }
        Ok((ring, resubmit))
    }

    /// Next index of the available ring, as GET_VRING_BASE tells it.
    pub fn base(&self) -> u32 {
        u32::from(self.next_avail.get())
    }

    /// Requests fetched and not yet returned.
    pub fn in_flight(&self) -> u16 {
        self.in_flight.get()
    }

    /// Ring size in descriptors.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Whether any memory the ring works in was truncated by the front-end.
    pub fn poisoned(&self) -> bool {
        let parts = [
            &self.layout.descriptors,
            &self.layout.available,
            &self.layout.used,
        ];
        parts.iter().any(|part| part.region.poisoned())
            || self.memory.regions().iter().any(|r| r.poisoned())
            || self.inflight.as_ref().is_some_and(SplitInflight::poisoned)
            || self.dirty.as_ref().is_some_and(|dirty| dirty.poisoned())
    }

    /// Whether writes are logged.
    pub fn is_logging(&self) -> bool {
        self.dirty.is_some()
    }

    /// Logs writes from now on, elsewhere than before, or no more. Nothing may be in flight when
    /// logging begins.
    pub fn set_log(&mut self, log: Option<RingLog>) {
        match (log, &mut self.dirty) {
            (Some(log), Some(dirty)) => dirty.redirect(log),
            (Some(log), None) => {
                assert_eq!(
                    self.in_flight.get(),
                    0,
                    "writable buffers are noted as they come"
                );
                self.dirty = Some(Box::new(Dirty::new(log, self.size)));
            }
            (None, _) => self.dirty = None,
        }
    }

    /// Works in `memory` from now on. False when the ring itself is not in it: then the ring's
    /// parts stay in the old mapping.
    pub fn relocate(&mut self, memory: SharedMemory) -> bool {
        let layout = Layout::new(&memory, &self.addresses, self.size);
        self.memory = memory;
        self.hint.set(0);
        match layout {
            Ok(layout) => self.layout = layout,
            Err(_) => return false,
        }
        true
    }

    fn slot(&self, index: u16) -> usize {
        usize::from(index & (self.size - 1))
    }

    /// A 16-bit field of the available ring.
    fn avail_u16(&self, offset: usize) -> &AtomicU16 {
        debug_assert!(offset + 2 <= 6 + 2 * usize::from(self.size));
        // SAFETY: `Layout::new` mapped 6 + 2 * size bytes, aligned to 2; all accesses are atomic.
        unsafe { &*self.layout.available.base.add(offset).cast() }
    }

    /// A 16-bit field of the used ring.
    fn used_u16(&self, offset: usize) -> &AtomicU16 {
        debug_assert!(offset + 2 <= 6 + 8 * usize::from(self.size));
        // SAFETY: `Layout::new` mapped 6 + 8 * size bytes, aligned to 4; all accesses are atomic.
        unsafe { &*self.layout.used.base.add(offset).cast() }
    }

    /// A 32-bit field of the used ring.
    fn used_u32(&self, offset: usize) -> &AtomicU32 {
        debug_assert!(offset + 4 <= 6 + 8 * usize::from(self.size));
        // SAFETY: as above; `offset` is a multiple of 4.
        unsafe { &*self.layout.used.base.add(offset).cast() }
    }

    fn descriptor(&self, index: u16) -> *const u8 {
        debug_assert!(index < self.size);
        // SAFETY: the table has `size` entries of 16 bytes.
        unsafe {
            self.layout
                .descriptors
                .base
                .add(DESC_LEN * usize::from(index))
        }
    }

    /// Whether the driver made something available.
    #[inline]
    pub fn has_work(&self) -> bool {
        self.avail_u16(INDEX_AT).load(Ordering::Acquire) != self.next_avail.get()
    }

    /// Fetches up to `chains.len()` requests. Gives how many, and what broke the ring after them.
    #[inline]
    pub fn fetch(&mut self, chains: &mut [Chain]) -> (usize, Option<RingError>) {
        let index = self.avail_u16(INDEX_AT).load(Ordering::Acquire);
        let pending = index.wrapping_sub(self.next_avail.get());
        if pending == 0 {
            return (0, None);
        }
        if pending > self.size {
            let error = RingError::AvailableIndex {
                index,
                next: self.next_avail.get(),
                size: self.size,
            };
            return (0, Some(error));
        }
        let count = usize::from(pending).min(chains.len());
        // Three passes, so that the cache misses of a batch overlap: heads, descriptors, headers.
        for (chain, entry) in chains[..count].iter_mut().zip(0u16..) {
            let offset = 4 + 2 * self.slot(self.next_avail.get().wrapping_add(entry));
            let head = self.avail_u16(offset).load(Ordering::Relaxed);
            chain.begin(head, &self.memory);
            if head < self.size {
                prefetch(self.descriptor(head));
            }
        }
        let mut taken = 0;
        let mut broken = None;
        for chain in &mut chains[..count] {
            broken = self.take(chain).err();
            if broken.is_some() {
                break;
            }
            if let Some(inflight) = &mut self.inflight {
                inflight.mark(chain.head());
            }
            taken += 1;
            self.next_avail.add(1);
        }
        if let Some(dirty) = &mut self.dirty {
            chains[..taken].iter().for_each(|chain| dirty.note(chain));
        }
        (taken, broken)
    }

    /// Fetches a request again that was in flight when a predecessor died. It keeps its place in
    /// the order, should this device die, too.
    ///
    /// # Errors
    /// [`RingError`]: what it left in the ring is no chain any more.
    pub fn refetch(&mut self, head: u16, chain: &mut Chain) -> Result<(), RingError> {
        chain.begin(head, &self.memory);
        self.take(chain)?;
        if let Some(dirty) = &mut self.dirty {
            dirty.note(chain);
        }
        Ok(())
    }

    /// Parses the chain of `chain`'s head and counts it as in flight.
    #[inline]
    fn take(&mut self, chain: &mut Chain) -> Result<(), RingError> {
        let head = chain.head();
        if head >= self.size {
            return Err(RingError::DescriptorIndex(head));
        }
        if self.held[usize::from(head)] {
            return Err(RingError::Duplicate(head));
        }
        self.parse(chain)?;
        chain.warm();
        self.held[usize::from(head)] = true;
        self.in_flight.add(1);
        Ok(())
    }

    #[inline]
    fn parse(&self, chain: &mut Chain) -> Result<(), RingError> {
        let head = chain.head();
        let mut index = head;
        for _ in 0..self.size.min(MAX_CHAIN) {
            if index >= self.size {
                return Err(RingError::DescriptorIndex(index));
            }
            // SAFETY: the entry is inside the table, which is aligned to 16.
            let descriptor = Descriptor::split(unsafe { read_words(self.descriptor(index)) });
            if descriptor.is_indirect() {
                return self.parse_indirect(chain, descriptor);
            }
            chain.push(descriptor.buffer(), &self.memory, &self.hint)?;
            if !descriptor.has_next() {
                return Ok(());
            }
            index = descriptor.tag;
        }
        Err(RingError::ChainLength(head))
    }

    fn parse_indirect(&self, chain: &mut Chain, table: Descriptor) -> Result<(), RingError> {
        let head = chain.head();
        let count = table.table_entries(head, self.indirect)?;
        let mut index = 0;
        for _ in 0..count {
            let words = table.table_entry(index, &self.memory, &self.hint)?;
            let descriptor = Descriptor::split(words);
            if descriptor.is_indirect() {
                return Err(RingError::Indirect {
                    head,
                    len: table.len,
                });
            }
            chain.push(descriptor.buffer(), &self.memory, &self.hint)?;
            if !descriptor.has_next() {
                return Ok(());
            }
            index = u32::from(descriptor.tag);
            if index >= count {
                return Err(RingError::DescriptorIndex(descriptor.tag));
            }
        }
        Err(RingError::ChainLength(head))
    }

    /// Returns a request; the guest sees it after [`SplitRing::publish`].
    #[inline]
    pub fn push_used(&mut self, head: u16, written: u32) {
        let held = &mut self.held[usize::from(head)];
        assert!(*held, "a request is returned once");
        *held = false;
        self.in_flight.sub(1);
        let offset = 4 + 8 * self.slot(self.next_used.get());
        self.used_u32(offset).put(u32::from(head).to_le());
        self.used_u32(offset + 4).put(written.to_le());
        self.next_used.add(1);
        if let Some(inflight) = &mut self.inflight {
            inflight.complete(head);
        }
        if let Some(dirty) = &self.dirty {
            dirty.complete(head);
            dirty.used(offset, 8);
        }
    }

    /// Gives every request that was fetched and not returned back. Those returned were the oldest.
    pub fn rewind(&mut self) {
        assert!(
            self.inflight.is_none(),
            "what is in flight is recorded as such"
        );
        self.next_avail.sub(self.in_flight.get());
        self.held.fill(false);
        self.in_flight = Index::new(0);
    }

    /// Shows the guest every request returned by now; false when there is none.
    #[inline]
    pub fn publish(&mut self) -> bool {
        if self.published == self.next_used {
            return false;
        }
        self.used_u16(INDEX_AT).put(self.next_used.get());
        self.published = self.next_used;
        if let Some(inflight) = &mut self.inflight {
            inflight.publish(self.next_used.get());
        }
        if let Some(dirty) = &self.dirty {
            dirty.used(INDEX_AT, 2);
        }
        true
    }

    /// Whether the guest wants a call for what was published since this was last asked.
    #[inline]
    pub fn needs_call(&mut self) -> bool {
        let (old, new) = (self.considered.get(), self.published.get());
        self.considered = Index::new(new);
        fence(Ordering::SeqCst);
        if self.event_idx {
            let offset = 4 + 2 * usize::from(self.size);
            let event = self.avail_u16(offset).load(Ordering::Relaxed);
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            let flags = self.avail_u16(0).load(Ordering::Relaxed);
            u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0
        }
    }

    /// Asks for kicks; true when something came in before the request could be seen.
    pub fn arm(&self) -> bool {
        self.ask_for_kicks(self.next_avail.get(), 0);
        fence(Ordering::SeqCst);
        self.has_work()
    }

    /// Asks for no kicks, as far as the guest may honour that.
    pub fn disarm(&self) {
        let flags = VRING_USED_F_NO_NOTIFY as u16;
        self.ask_for_kicks(self.next_avail.get().wrapping_sub(1), flags);
    }

    /// Asks for a kick at `event`, or says `flags` to a driver without the event index.
    fn ask_for_kicks(&self, event: u16, flags: u16) {
        let (offset, value) = if self.event_idx {
            (4 + 8 * usize::from(self.size), event)
        } else {
            (0, flags)
        };
        self.used_u16(offset).put(value);
        if let Some(dirty) = &self.dirty {
            dirty.used(offset, 2);
        }
    }
}
