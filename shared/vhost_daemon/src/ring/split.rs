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
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VRING_AVAIL_F_NO_INTERRUPT,
    VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, VRING_USED_F_NO_NOTIFY,
};

use super::RingError;
use super::chain::{Buffer, Chain, MAX_CHAIN, SharedMemory};
use crate::inflight::{InflightError, InflightRing};
use crate::memory::{Mapped, MemoryTable};
use crate::wire::RingAddresses;

const DESC_LEN: usize = 16;

/// What a ring is made of.
#[derive(Debug)]
pub struct RingParts {
    /// Ring size in descriptors.
    pub size: u16,
    /// Next index of the available ring, unless the inflight region knows better.
    pub base: u16,
    /// Acknowledged virtio features.
    pub features: u64,
    /// Where the parts are.
    pub addresses: RingAddresses,
    /// What the ring tells about descriptors in flight.
    pub inflight: Option<InflightRing>,
}

/// A descriptor after its one read.
#[derive(Clone, Copy, Debug)]
struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    fn has(self, flag: u32) -> bool {
        u32::from(self.flags) & flag != 0
    }

    fn buffer(self) -> Buffer {
        Buffer {
            addr: self.addr,
            len: self.len,
            writable: self.has(VRING_DESC_F_WRITE),
        }
    }
}

/// The parts of a ring in this process. Keeps the regions they are in.
#[derive(Debug)]
struct Layout {
    descriptors: Mapped,
    available: Mapped,
    used: Mapped,
}

impl Layout {
    fn new(table: &MemoryTable, at: &RingAddresses, size: u16) -> Result<Layout, RingError> {
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

/// A split ring from the device's side. Lives on its queue's thread.
#[derive(Debug)]
pub struct SplitRing {
    layout: Layout,
    addresses: RingAddresses,
    size: u16,
    event_idx: bool,
    indirect: bool,
    /// Next entry of the available ring to fetch.
    next_avail: u16,
    /// Next entry of the used ring to write.
    next_used: u16,
    /// What the guest sees as the used index.
    published: u16,
    /// The used index when the guest was last considered for a call.
    considered: u16,
    /// Which heads the device holds.
    held: Box<[bool]>,
    in_flight: u16,
    inflight: Option<InflightRing>,
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
        let size = parts.size;
        if !size.is_power_of_two() || size > 32768 {
            return Err(RingError::Size(u32::from(size)).into());
        }
        let layout = Layout::new(&memory, &parts.addresses, size)?;
        let has = |bit: u32| parts.features & (1 << bit) != 0;
        let mut ring = SplitRing {
            layout,
            addresses: parts.addresses,
            size,
            event_idx: has(VIRTIO_RING_F_EVENT_IDX),
            indirect: has(VIRTIO_RING_F_INDIRECT_DESC),
            next_avail: parts.base,
            next_used: 0,
            published: 0,
            considered: 0,
            held: vec![false; usize::from(size)].into_boxed_slice(),
            in_flight: 0,
            inflight: parts.inflight,
            memory,
            hint: Cell::new(0),
        };
        let used = ring.used_u16(2).load(Ordering::Acquire);
        (ring.next_used, ring.published, ring.considered) = (used, used, used);
        let mut resubmit = Vec::new();
        if let Some(inflight) = &mut ring.inflight {
            let recovery = inflight.recover(used)?;
            resubmit = recovery.resubmit;
            ring.next_avail = recovery.avail.unwrap_or(parts.base);
        }
        Ok((ring, resubmit))
    }

    /// Next index of the available ring.
    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// Requests fetched and not yet returned.
    pub fn in_flight(&self) -> u16 {
        self.in_flight
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
            || self.inflight.as_ref().is_some_and(InflightRing::poisoned)
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
        self.avail_u16(2).load(Ordering::Acquire) != self.next_avail
    }

    /// Fetches up to `chains.len()` requests. Gives how many, and what broke the ring after them.
    #[inline]
    pub fn fetch(&mut self, chains: &mut [Chain]) -> (usize, Option<RingError>) {
        let index = self.avail_u16(2).load(Ordering::Acquire);
        let pending = index.wrapping_sub(self.next_avail);
        if pending == 0 {
            return (0, None);
        }
        if pending > self.size {
            let error = RingError::AvailableIndex {
                index,
                next: self.next_avail,
                size: self.size,
            };
            return (0, Some(error));
        }
        let count = usize::from(pending).min(chains.len());
        // Three passes, so that the cache misses of a batch overlap: heads, descriptors, headers.
        for (chain, entry) in chains[..count].iter_mut().zip(0u16..) {
            let offset = 4 + 2 * self.slot(self.next_avail.wrapping_add(entry));
            let head = self.avail_u16(offset).load(Ordering::Relaxed);
            chain.begin(head, &self.memory);
            if head < self.size {
                prefetch(self.descriptor(head));
            }
        }
        for (done, chain) in chains[..count].iter_mut().enumerate() {
            if let Err(error) = self.take(chain) {
                return (done, Some(error));
            }
            self.next_avail = self.next_avail.wrapping_add(1);
        }
        (count, None)
    }

    /// Fetches a request again that was in flight when a predecessor died.
    ///
    /// # Errors
    /// [`RingError`]: what it left in the ring is no chain any more.
    pub fn refetch(&mut self, head: u16, chain: &mut Chain) -> Result<(), RingError> {
        chain.begin(head, &self.memory);
        self.take(chain)
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
        if let Some(first) = chain.first() {
            prefetch(first);
        }
        self.held[usize::from(head)] = true;
        self.in_flight += 1;
        if let Some(inflight) = &mut self.inflight {
            inflight.mark(head);
        }
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
            let descriptor = unsafe { read_descriptor(self.descriptor(index)) };
            if descriptor.has(VRING_DESC_F_INDIRECT) {
                return self.parse_indirect(chain, descriptor);
            }
            chain.push(descriptor.buffer(), &self.memory, &self.hint)?;
            if !descriptor.has(VRING_DESC_F_NEXT) {
                return Ok(());
            }
            index = descriptor.next;
        }
        Err(RingError::ChainLength(head))
    }

    fn parse_indirect(&self, chain: &mut Chain, table: Descriptor) -> Result<(), RingError> {
        let head = chain.head();
        let count = table.len / DESC_LEN as u32;
        let whole = table.len.is_multiple_of(DESC_LEN as u32);
        let allowed = self.indirect && !table.has(VRING_DESC_F_NEXT);
        if !allowed || !whole || count == 0 || count > u32::from(MAX_CHAIN) {
            return Err(RingError::Indirect {
                head,
                len: table.len,
            });
        }
        let mut index = 0;
        for _ in 0..count {
            let descriptor = self.indirect_entry(table, index)?;
            if descriptor.has(VRING_DESC_F_INDIRECT) {
                return Err(RingError::Indirect {
                    head,
                    len: table.len,
                });
            }
            chain.push(descriptor.buffer(), &self.memory, &self.hint)?;
            if !descriptor.has(VRING_DESC_F_NEXT) {
                return Ok(());
            }
            index = u32::from(descriptor.next);
            if index >= count {
                return Err(RingError::DescriptorIndex(descriptor.next));
            }
        }
        Err(RingError::ChainLength(head))
    }

    fn indirect_entry(&self, table: Descriptor, index: u32) -> Result<Descriptor, RingError> {
        let outside = RingError::Buffer {
            addr: table.addr,
            len: table.len,
        };
        let offset = u64::from(index) * DESC_LEN as u64;
        let addr = table.addr.checked_add(offset).ok_or(outside)?;
        match self.memory.locate(addr, &self.hint) {
            // SAFETY: 16 bytes follow the entry's first in its region.
            Some((base, left)) if left >= DESC_LEN as u64 => Ok(unsafe { read_descriptor(base) }),
            _ => Err(outside),
        }
    }

    /// Returns a request; the guest sees it after [`SplitRing::publish`].
    #[inline]
    pub fn push_used(&mut self, head: u16, written: u32) {
        let held = &mut self.held[usize::from(head)];
        assert!(*held, "a request is returned once");
        *held = false;
        self.in_flight -= 1;
        let offset = 4 + 8 * self.slot(self.next_used);
        self.used_u32(offset)
            .store(u32::from(head).to_le(), Ordering::Relaxed);
        self.used_u32(offset + 4)
            .store(written.to_le(), Ordering::Relaxed);
        self.next_used = self.next_used.wrapping_add(1);
        if let Some(inflight) = &mut self.inflight {
            inflight.complete(head);
        }
    }

    /// Shows the guest every request returned by now; false when there is none.
    #[inline]
    pub fn publish(&mut self) -> bool {
        if self.published == self.next_used {
            return false;
        }
        self.used_u16(2).store(self.next_used, Ordering::Release);
        self.published = self.next_used;
        if let Some(inflight) = &mut self.inflight {
            inflight.publish(self.next_used);
        }
        true
    }

    /// Whether the guest wants a call for what was published since this was last asked.
    #[inline]
    pub fn needs_call(&mut self) -> bool {
        let (old, new) = (self.considered, self.published);
        self.considered = new;
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
        if self.event_idx {
            let offset = 4 + 8 * usize::from(self.size);
            self.used_u16(offset)
                .store(self.next_avail, Ordering::Relaxed);
        } else {
            self.used_u16(0).store(0, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        self.has_work()
    }

    /// Asks for no kicks, as far as the guest may honour that.
    pub fn disarm(&self) {
        if self.event_idx {
            let offset = 4 + 8 * usize::from(self.size);
            self.used_u16(offset)
                .store(self.next_avail.wrapping_sub(1), Ordering::Relaxed);
        } else {
            self.used_u16(0)
                .store(VRING_USED_F_NO_NOTIFY as u16, Ordering::Relaxed);
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

/// Reads a descriptor in two loads; the guest may change it meanwhile, never afterwards.
///
/// # Safety
/// 16 bytes at `at` are mapped.
#[inline]
unsafe fn read_descriptor(at: *const u8) -> Descriptor {
    let word = |offset: usize| -> u64 {
        // SAFETY: the caller says that the bytes are mapped.
        let pointer = unsafe { at.add(offset) };
        if (pointer as usize).is_multiple_of(8) {
            // SAFETY: mapped and aligned to 8.
            u64::from_le(unsafe { (*pointer.cast::<AtomicU64>()).load(Ordering::Relaxed) })
        } else {
            // SAFETY: mapped; alignment 1.
            u64::from_le_bytes(unsafe { pointer.cast::<[u8; 8]>().read_volatile() })
        }
    };
    let (addr, rest) = (word(0), word(8));
    Descriptor {
        addr,
        len: rest as u32,
        flags: (rest >> 32) as u16,
        next: (rest >> 48) as u16,
    }
}

/// Fetches the line at `address` into the cache; never faults.
#[inline]
fn prefetch(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch is a hint and has no effect on memory.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(address.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// Whether a ring of `size` descriptors at `addresses` lies in `memory`.
pub(crate) fn is_mapped(memory: &MemoryTable, addresses: &RingAddresses, size: u16) -> bool {
    Layout::new(memory, addresses, size).is_ok()
}
