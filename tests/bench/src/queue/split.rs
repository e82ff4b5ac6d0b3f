//! A split virtqueue (virtio 1.2, section 2.7) in plain loads and stores. Chain `n` of a slot lies at
//! descriptors of its own.
#![expect(
    unsafe_code,
    reason = "guest memory is accessed without bounds checks, to measure the back-end only"
)]

use std::sync::atomic::{AtomicU16, Ordering, fence};

use harness::driver::RingParts;

use super::{Descriptor, INDIRECT, NEXT, Piece, Table, WRITE, pointer_to};

/// Bytes before the entries of the available and the used ring.
const HEADER: usize = 4;

pub(super) struct SplitRing {
    descriptors: *mut Descriptor,
    available: *mut u8,
    used: *mut u8,
    entries: u16,
    /// Descriptors of the ring that belong to a slot.
    chain: usize,
    event_idx: bool,
    available_idx: u16,
    published_idx: u16,
    used_idx: u16,
}

impl SplitRing {
    pub(super) fn new(parts: &RingParts, entries: u16, (chain, event_idx): (usize, bool)) -> Self {
        Self {
            descriptors: pointer_to(&parts.descriptors).cast(),
            available: pointer_to(&parts.available),
            used: pointer_to(&parts.used),
            entries,
            chain,
            event_idx,
            available_idx: 0,
            published_idx: 0,
            used_idx: 0,
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
        let head = slot * self.chain;
        // SAFETY: the caller's slot has descriptors of its own, and the ring an entry for each slot.
        unsafe {
            let (place, first) = match &table {
                Some(table) => (table.place, 0),
                None => (self.descriptors.add(head), head as u16),
            };
            let mut count = 0;
            pieces.for_each(|piece| {
                let write = if piece.writable { WRITE } else { 0 };
                place.add(usize::from(count)).write(Descriptor {
                    gpa: piece.gpa,
                    bytes: piece.bytes,
                    flags: NEXT | write,
                    next: first + count + 1,
                });
                count += 1;
            });
            (*place.add(usize::from(count) - 1)).flags &= !NEXT;
            if let Some(table) = table {
                self.descriptors.add(head).write(Descriptor {
                    gpa: table.gpa,
                    bytes: u32::from(count) * 16,
                    flags: INDIRECT,
                    next: 0,
                });
            }
            let entry = usize::from(self.available_idx & (self.entries - 1));
            self.available
                .add(HEADER + 2 * entry)
                .cast::<u16>()
                .write((head as u16).to_le());
        }
        self.available_idx = self.available_idx.wrapping_add(1);
    }

    /// Shows what was pushed; true when the back-end wants a kick.
    #[inline]
    pub(super) fn publish(&mut self) -> bool {
        let (old, new) = (self.published_idx, self.available_idx);
        if old == new {
            return false;
        }
        self.index_at(self.available, 2)
            .store(new, Ordering::Release);
        self.published_idx = new;
        fence(Ordering::SeqCst);
        if self.event_idx {
            let at = HEADER + 8 * usize::from(self.entries);
            let event = self.index_at(self.used, at).load(Ordering::Relaxed);
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.index_at(self.used, 0).load(Ordering::Relaxed) & 1 == 0
        }
    }

    #[inline]
    pub(super) fn is_used(&self) -> bool {
        self.index_at(self.used, 2).load(Ordering::Acquire) != self.used_idx
    }

    /// The slot of the next finished request, as the back-end says.
    #[inline]
    pub(super) fn pop(&mut self) -> Option<usize> {
        if !self.is_used() {
            return None;
        }
        let entry = usize::from(self.used_idx & (self.entries - 1));
        self.used_idx = self.used_idx.wrapping_add(1);
        // SAFETY: the entry is inside the used ring.
        let head = unsafe {
            self.used
                .add(HEADER + 8 * entry)
                .cast::<u32>()
                .read_volatile()
        };
        Some(head as usize / self.chain)
    }

    #[inline]
    pub(super) fn suppress_interrupts(&self) {
        // One behind: due again only after 65535 completions.
        self.set_interrupts(self.used_idx.wrapping_sub(1), 1);
    }

    #[inline]
    pub(super) fn enable_interrupts(&self) {
        self.set_interrupts(self.used_idx, 0);
    }

    #[inline]
    fn set_interrupts(&self, used_event: u16, flags: u16) {
        if self.event_idx {
            let at = HEADER + 2 * usize::from(self.entries);
            self.index_at(self.available, at)
                .store(used_event, Ordering::Relaxed);
        } else {
            self.index_at(self.available, 0)
                .store(flags, Ordering::Relaxed);
        }
    }

    #[inline]
    fn index_at(&self, ring: *mut u8, offset: usize) -> &AtomicU16 {
        // SAFETY: callers pass a ring of this queue and the offset of an aligned 16-bit field in it;
        // both sides access these fields atomically only.
        unsafe { AtomicU16::from_ptr(ring.add(offset).cast()) }
    }
}
