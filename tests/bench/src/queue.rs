//! A virtio-blk queue with as little work per request as possible.
//!
//! [`harness::driver`] checks everything and so would be what is measured. This ring takes set-up and
//! memory from its [`FrontEnd`] and does the rest with plain loads and stores. It trusts the back-end
//! to return only heads that were offered; the status byte is preset, so that a back-end which
//! forgets it is noticed.
//!
//! ```text
//! data region, per queue:  slot 0 .. slot depth-1 | buffer 0 .. buffer depth-1
//! slot:  0 header (16)  16 range of discard or write-zeroes (16)  48 status  64 indirect table
//! ```
#![expect(
    unsafe_code,
    reason = "guest memory is accessed without bounds checks, to measure the back-end only"
)]

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use anyhow::{Context, Result, ensure};
use harness::driver::features::bits;
use harness::driver::memory::{Area, Region};
use harness::driver::{FrontEnd, Operation};
use nix::sys::eventfd::EventFd;

const STATUS_AT: usize = 48;
const TABLE_AT: usize = 64;
const STATUS_PRESET: u8 = 0xff;
const PAGE: usize = 4096;

#[repr(C)]
#[derive(Clone, Copy)]
struct Descriptor {
    gpa: u64,
    bytes: u32,
    flags: u16,
    next: u16,
}

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Sizes that all queues share.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    /// Requests in flight.
    pub(crate) depth: usize,
    /// Bytes per request.
    pub(crate) block_bytes: usize,
    /// Bytes per data descriptor.
    pub(crate) segment_bytes: usize,
}

impl Shape {
    /// Data descriptors per request.
    pub(crate) fn segments(&self) -> usize {
        self.block_bytes.div_ceil(self.segment_bytes)
    }

    /// Descriptors per request.
    pub(crate) fn chain(&self) -> usize {
        self.segments() + 2
    }

    fn slot_bytes(&self) -> usize {
        (TABLE_AT + self.chain() * 16).next_multiple_of(64)
    }

    fn buffer_stride(&self) -> usize {
        self.block_bytes.next_multiple_of(PAGE)
    }
}

/// One request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Command {
    /// What.
    pub(crate) operation: Operation,
    /// First sector.
    pub(crate) sector: u64,
}

/// A ring and its memory; used by one thread at a time.
pub(crate) struct FastQueue {
    descriptors: *mut Descriptor,
    available: *mut u8,
    used: *mut u8,
    slots: *mut u8,
    buffers: *mut u8,
    slots_gpa: u64,
    buffers_gpa: u64,
    shape: Shape,
    entries: u16,
    indirect: bool,
    event_idx: bool,
    available_idx: u16,
    published_idx: u16,
    used_idx: u16,
    kick: Arc<EventFd>,
    call: Arc<EventFd>,
    /// Kicks sent.
    pub(crate) kicks: u64,
    /// Interrupts received.
    pub(crate) interrupts: u64,
    _regions: [Arc<Region>; 2],
}

// SAFETY: the pointers lead into shared mappings that `_regions` keeps alive, and nothing else in
// this process touches this queue's part of them.
unsafe impl Send for FastQueue {}

impl FastQueue {
    /// Queue `index` of a front-end whose rings are started.
    pub(crate) fn new(front_end: &FrontEnd, index: usize, shape: Shape) -> Result<Self> {
        let (parts, entries) = front_end.ring(index);
        let region = front_end
            .pool()
            .regions()
            .first()
            .cloned()
            .context("a data region")?;
        let indirect = front_end.features() & bits::RING_INDIRECT_DESC != 0;
        let heads = if indirect {
            shape.depth
        } else {
            shape.depth * shape.chain()
        };
        ensure!(
            heads <= usize::from(entries),
            "a ring of {entries} is too small for {heads}"
        );
        let per_queue = shape.depth * (shape.slot_bytes() + shape.buffer_stride()) + PAGE;
        let mut area = Area::from(region.clone());
        if index > 0 {
            area.carve(index * per_queue, PAGE);
        }
        let slots = area.carve(shape.depth * shape.slot_bytes(), 64);
        let buffers = area.carve(shape.depth * shape.buffer_stride(), PAGE);
        // Touched now, or the first requests would measure page faults.
        slots.write(0, &vec![0; slots.bytes]);
        buffers.write(0, &vec![0x5a; buffers.bytes]);
        let (kick, call) = front_end.eventfds(index);
        Ok(Self {
            descriptors: pointer_to(&parts.descriptors).cast(),
            available: pointer_to(&parts.available),
            used: pointer_to(&parts.used),
            slots: pointer_to(&slots),
            buffers: pointer_to(&buffers),
            slots_gpa: slots.gpa(0),
            buffers_gpa: buffers.gpa(0),
            shape,
            entries,
            indirect,
            event_idx: front_end.features() & bits::RING_EVENT_IDX != 0,
            available_idx: 0,
            published_idx: 0,
            used_idx: 0,
            kick,
            call,
            kicks: 0,
            interrupts: 0,
            _regions: [parts.descriptors.region.clone(), region],
        })
    }

    /// Interrupts arrive here.
    pub(crate) fn call_fd(&self) -> BorrowedFd<'_> {
        self.call.as_fd()
    }

    /// Queues a request in `slot`, which is free; not yet visible.
    #[inline]
    pub(crate) fn push(&mut self, slot: usize, command: Command) {
        debug_assert!(slot < self.shape.depth);
        let head = if self.indirect {
            slot
        } else {
            slot * self.shape.chain()
        };
        // SAFETY: `slot` is below `depth`, for which `new` carved slots and buffers and checked that
        // the table has room; a slot's bytes are aligned to 64.
        unsafe {
            let base = self.slots.add(slot * self.shape.slot_bytes());
            self.write_header(base, command);
            let table: *mut Descriptor = if self.indirect {
                base.add(TABLE_AT).cast()
            } else {
                self.descriptors.add(head)
            };
            let first = if self.indirect { 0 } else { head as u16 };
            let count = self.write_chain(table, (slot, first), command.operation);
            if self.indirect {
                let gpa = self.slot_gpa(slot) + TABLE_AT as u64;
                let whole = Descriptor {
                    gpa,
                    bytes: count * 16,
                    flags: INDIRECT,
                    next: 0,
                };
                self.descriptors.add(head).write(whole);
            }
            let entry = usize::from(self.available_idx & (self.entries - 1));
            self.available
                .add(4 + 2 * entry)
                .cast::<u16>()
                .write((head as u16).to_le());
        }
        self.available_idx = self.available_idx.wrapping_add(1);
    }

    /// Shows queued requests to the back-end and kicks it when it asks for that.
    #[inline]
    pub(crate) fn publish(&mut self) {
        let (old, new) = (self.published_idx, self.available_idx);
        if old == new {
            return;
        }
        self.index_at(self.available, 2)
            .store(new, Ordering::Release);
        self.published_idx = new;
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let at = 4 + 8 * usize::from(self.entries);
            let event = self.index_at(self.used, at).load(Ordering::Relaxed);
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.index_at(self.used, 0).load(Ordering::Relaxed) & 1 == 0
        };
        if wanted {
            self.kicks += 1;
            self.kick
                .write(1)
                .expect("an eventfd that the back-end reads does not fill up");
        }
    }

    /// Next finished request: slot and status.
    #[inline]
    pub(crate) fn pop(&mut self) -> Option<(usize, u8)> {
        if self.index_at(self.used, 2).load(Ordering::Acquire) == self.used_idx {
            return None;
        }
        let entry = usize::from(self.used_idx & (self.entries - 1));
        self.used_idx = self.used_idx.wrapping_add(1);
        // SAFETY: the entry is inside the used ring; its id is bounded before it is used.
        let id = unsafe { self.used.add(4 + 8 * entry).cast::<u32>().read_volatile() } as usize;
        let slot = if self.indirect {
            id
        } else {
            id / self.shape.chain()
        };
        assert!(
            slot < self.shape.depth,
            "the back-end returned descriptor {id}"
        );
        // SAFETY: `slot` was just checked; the back-end may write the byte, hence volatile.
        let status = unsafe {
            self.slots
                .add(slot * self.shape.slot_bytes() + STATUS_AT)
                .read_volatile()
        };
        Some((slot, status))
    }

    /// Asks for no interrupts.
    #[inline]
    pub(crate) fn suppress_interrupts(&self) {
        // One behind: due again only after 65535 completions.
        self.set_interrupts(self.used_idx.wrapping_sub(1), 1);
    }

    /// Asks for an interrupt at the next completion; true when one is there already.
    #[inline]
    pub(crate) fn want_interrupt(&self) -> bool {
        self.set_interrupts(self.used_idx, 0);
        fence(Ordering::SeqCst);
        self.index_at(self.used, 2).load(Ordering::Acquire) != self.used_idx
    }

    /// Takes an interrupt.
    pub(crate) fn take_interrupt(&mut self) {
        if self.call.read().is_ok() {
            self.interrupts += 1;
        }
    }

    #[inline]
    fn set_interrupts(&self, used_event: u16, flags: u16) {
        if self.event_idx {
            let at = 4 + 2 * usize::from(self.entries);
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

    #[inline]
    fn slot_gpa(&self, slot: usize) -> u64 {
        self.slots_gpa + (slot * self.shape.slot_bytes()) as u64
    }

    /// # Safety
    /// `base` is the start of a free slot.
    #[inline]
    unsafe fn write_header(&self, base: *mut u8, command: Command) {
        let Command { operation, sector } = command;
        let ranged = is_ranged(operation);
        // SAFETY: the caller's slot has all these fields, aligned.
        unsafe {
            base.cast::<u32>().write(operation.wire_type().to_le());
            base.add(4).cast::<u32>().write(0);
            base.add(8)
                .cast::<u64>()
                .write(if ranged { 0 } else { sector.to_le() });
            if ranged {
                let unmap = u32::from(operation == Operation::WriteZeroesUnmap);
                let sectors = (self.shape.block_bytes / 512) as u32;
                base.add(16).cast::<u64>().write(sector.to_le());
                base.add(24).cast::<u32>().write(sectors.to_le());
                base.add(28).cast::<u32>().write(unmap.to_le());
            }
            base.add(STATUS_AT).write(STATUS_PRESET);
        }
    }

    /// Writes the descriptors of a request; their number.
    ///
    /// # Safety
    /// `table` has room for a whole chain.
    #[inline]
    unsafe fn write_chain(
        &self,
        table: *mut Descriptor,
        (slot, first): (usize, u16),
        operation: Operation,
    ) -> u32 {
        let gpa = self.slot_gpa(slot);
        let mut count = 0u16;
        let mut add = |gpa: u64, bytes: u32, flags: u16| {
            let next = first + count + 1;
            // SAFETY: the caller's table has room, and a chain never has more than `chain()` entries.
            unsafe {
                table.add(usize::from(count)).write(Descriptor {
                    gpa,
                    bytes,
                    flags,
                    next,
                })
            };
            count += 1;
        };
        add(gpa, 16, NEXT);
        if is_ranged(operation) {
            add(gpa + 16, 16, NEXT);
        } else if matches!(operation, Operation::Read | Operation::Write) {
            let flags = if operation == Operation::Read {
                NEXT | WRITE
            } else {
                NEXT
            };
            let buffer = self.buffers_gpa + (slot * self.shape.buffer_stride()) as u64;
            let mut at = 0;
            while at < self.shape.block_bytes {
                let bytes = self.shape.segment_bytes.min(self.shape.block_bytes - at);
                add(buffer + at as u64, bytes as u32, flags);
                at += bytes;
            }
        }
        add(gpa + STATUS_AT as u64, 1, WRITE);
        u32::from(count)
    }

    /// Changes what a write in `slot` will write.
    #[inline]
    pub(crate) fn stamp(&mut self, slot: usize, value: u64) {
        debug_assert!(slot < self.shape.depth);
        // SAFETY: `slot` is free and below `depth`; buffers are page aligned.
        unsafe {
            self.buffers
                .add(slot * self.shape.buffer_stride())
                .cast::<u64>()
                .write(value)
        };
    }
}

fn is_ranged(operation: Operation) -> bool {
    matches!(
        operation,
        Operation::Discard | Operation::WriteZeroes | Operation::WriteZeroesUnmap
    )
}

fn pointer_to(area: &Area) -> *mut u8 {
    // SAFETY: an area lies inside its region's mapping.
    unsafe { area.region.as_ptr().add(area.offset) }
}
