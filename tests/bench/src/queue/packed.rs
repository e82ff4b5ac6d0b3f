//! A packed virtqueue (virtio 1.2, section 2.8) in plain loads and stores. A request's buffer id is its
//! slot.
//!
//! Only the flags of the first descriptor since the last publication are held back: the device does
//! not look past one that is not available.
#![expect(
    unsafe_code,
    reason = "guest memory is accessed without bounds checks, to measure the back-end only"
)]

use std::sync::atomic::{AtomicU16, AtomicU32, Ordering, fence};

use harness::driver::RingParts;
use harness::driver::packed_ring::{
    EVENT_DESCRIPTOR, EVENT_DISABLE, EVENT_ENABLE, FLAGS_AT, Place,
};

use super::{Descriptor, INDIRECT, NEXT, Piece, Table, WRITE, pointer_to};

pub(super) struct PackedRing {
    /// A descriptor's id is where a split ring has the next one's index, after the flags' place.
    descriptors: *mut u8,
    driver_event: *mut u8,
    device_event: *mut u8,
    entries: u16,
    event_idx: bool,
    available: Place,
    published: Place,
    used: Place,
    /// Flags of the first descriptor that is not published.
    held_back: u16,
    /// Descriptors of the request in each slot.
    counts: Box<[u16]>,
}

impl PackedRing {
    pub(super) fn new(parts: &RingParts, entries: u16, (depth, event_idx): (usize, bool)) -> Self {
        Self {
            descriptors: pointer_to(&parts.descriptors),
            driver_event: pointer_to(&parts.available),
            device_event: pointer_to(&parts.used),
            entries,
            event_idx,
            available: Place::START,
            published: Place::START,
            used: Place::START,
            held_back: 0,
            counts: vec![0; depth].into(),
        }
    }

    /// # Safety
    /// `slot` is free and below the depth that the ring was made for; so is its table's memory.
    #[inline]
    pub(super) unsafe fn push(
        &mut self,
        slot: usize,
        table: Option<Table>,
        pieces: impl Iterator<Item = Piece>,
    ) {
        let mut count = 0;
        match table {
            Some(table) => {
                pieces.for_each(|piece| {
                    let flags = if piece.writable { WRITE } else { 0 };
                    // SAFETY: the caller's table has room for a whole chain.
                    unsafe {
                        table.place.add(count).write(Descriptor {
                            gpa: piece.gpa,
                            bytes: piece.bytes,
                            flags,
                            next: 0,
                        });
                    }
                    count += 1;
                });
                let whole = Piece {
                    gpa: table.gpa,
                    bytes: count as u32 * 16,
                    writable: false,
                };
                self.counts[slot] = 1;
                self.put(slot, whole, INDIRECT);
            }
            None => {
                let mut last = None;
                pieces.for_each(|piece| {
                    if let Some(last) = last.replace(piece) {
                        self.put(slot, last, NEXT);
                        count += 1;
                    }
                });
                if let Some(last) = last {
                    self.put(slot, last, 0);
                }
                self.counts[slot] = count as u16 + 1;
            }
        }
    }

    /// Writes the next descriptor.
    #[inline]
    fn put(&mut self, slot: usize, piece: Piece, flags: u16) {
        let place = self.available;
        let write = if piece.writable { WRITE } else { 0 };
        let flags = flags | write | place.available();
        // SAFETY: a place is inside the ring; `new` of the queue checked that all slots fit.
        unsafe {
            let at = self.descriptors.add(usize::from(place.index) * 16);
            at.cast::<u64>().write(piece.gpa.to_le());
            at.add(8).cast::<u32>().write(piece.bytes.to_le());
            at.add(12).cast::<u16>().write((slot as u16).to_le());
        }
        if place == self.published {
            self.held_back = flags;
        } else {
            self.flags(place).store(flags.to_le(), Ordering::Relaxed);
        }
        self.available = place.advanced(1, self.entries);
    }

    /// Shows what was pushed; true when the back-end wants a kick.
    #[inline]
    pub(super) fn publish(&mut self) -> bool {
        let old = self.published;
        if old == self.available {
            return false;
        }
        self.flags(old)
            .store(self.held_back.to_le(), Ordering::Release);
        self.published = self.available;
        fence(Ordering::SeqCst);
        let event = self.event(self.device_event).load(Ordering::Relaxed);
        let event = (u32::from_le(event), self.event_idx);
        self.available.wants_kick(old, event, self.entries)
    }

    #[inline]
    pub(super) fn is_used(&self) -> bool {
        let flags = self.flags(self.used).load(Ordering::Acquire);
        self.used.is_used(u16::from_le(flags))
    }

    /// The slot of the next finished request, as the back-end says.
    #[inline]
    pub(super) fn pop(&mut self) -> Option<usize> {
        if !self.is_used() {
            return None;
        }
        // SAFETY: a place is inside the ring.
        let slot = unsafe {
            let at = self.descriptors.add(usize::from(self.used.index) * 16 + 12);
            u16::from_le(at.cast::<u16>().read_volatile())
        };
        let count = self.counts.get(usize::from(slot)).copied().unwrap_or(1);
        self.used = self.used.advanced(count, self.entries);
        Some(usize::from(slot))
    }

    #[inline]
    pub(super) fn suppress_interrupts(&self) {
        self.set_interrupts(EVENT_DISABLE);
    }

    #[inline]
    pub(super) fn enable_interrupts(&self) {
        self.set_interrupts(match self.event_idx {
            true => EVENT_DESCRIPTOR,
            false => EVENT_ENABLE,
        });
    }

    #[inline]
    fn set_interrupts(&self, flags: u16) {
        let word = u32::from(self.used.to_wire()) | u32::from(flags) << 16;
        self.event(self.driver_event)
            .store(word.to_le(), Ordering::Relaxed);
    }

    #[inline]
    fn flags(&self, place: Place) -> &AtomicU16 {
        // SAFETY: a place is inside the ring; both sides access flags atomically only.
        unsafe {
            let at = self
                .descriptors
                .add(usize::from(place.index) * 16 + FLAGS_AT);
            AtomicU16::from_ptr(at.cast())
        }
    }

    #[inline]
    fn event(&self, structure: *mut u8) -> &AtomicU32 {
        // SAFETY: callers pass an event structure of this queue, an aligned word.
        unsafe { AtomicU32::from_ptr(structure.cast()) }
    }
}
