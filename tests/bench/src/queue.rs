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

mod packed;
mod split;

use std::iter;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use anyhow::{Context, Result, ensure};
use harness::driver::features::bits;
use harness::driver::memory::{Area, Region};
use harness::driver::{FrontEnd, Operation};
use nix::sys::eventfd::EventFd;
use packed::PackedRing;
use split::SplitRing;

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

/// One descriptor of a request.
#[derive(Clone, Copy)]
struct Piece {
    gpa: u64,
    bytes: u32,
    writable: bool,
}

/// A slot's indirect table.
struct Table {
    place: *mut Descriptor,
    gpa: u64,
}

enum Ring {
    Split(SplitRing),
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

/// Memory of the requests in flight.
struct Slots {
    slots: *mut u8,
    buffers: *mut u8,
    slots_gpa: u64,
    buffers_gpa: u64,
    shape: Shape,
}

/// A ring and its memory; used by one thread at a time.
pub(crate) struct FastQueue {
    ring: Ring,
    slots: Slots,
    indirect: bool,
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
        let has = |feature| front_end.features() & feature != 0;
        let indirect = has(bits::RING_INDIRECT_DESC);
        let chain = if indirect { 1 } else { shape.chain() };
        ensure!(
            shape.depth * chain <= usize::from(entries),
            "a ring of {entries} is too small for {} requests",
            shape.depth
        );
        let slots = Slots::new(&region, index, shape);
        let event_idx = has(bits::RING_EVENT_IDX);
        let ring = if has(bits::RING_PACKED) {
            Ring::Packed(PackedRing::new(&parts, entries, (shape.depth, event_idx)))
        } else {
            Ring::Split(SplitRing::new(&parts, entries, (chain, event_idx)))
        };
        let (kick, call) = front_end.eventfds(index);
        Ok(Self {
            ring,
            slots,
            indirect,
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
        debug_assert!(slot < self.slots.shape.depth);
        // SAFETY: `slot` is below `depth`, for which `new` carved slots and buffers and checked that
        // the ring has room; a slot's bytes are aligned to 64.
        unsafe {
            self.slots.write_header(slot, command);
            let table = self.indirect.then(|| self.slots.table(slot));
            let pieces = self.slots.pieces(slot, command.operation);
            either!(&mut self.ring, ring => ring.push(slot, table, pieces));
        }
    }

    /// Shows queued requests to the back-end and kicks it when it asks for that.
    #[inline]
    pub(crate) fn publish(&mut self) {
        if either!(&mut self.ring, ring => ring.publish()) {
            self.kicks += 1;
            self.kick
                .write(1)
                .expect("an eventfd that the back-end reads does not fill up");
        }
    }

    /// Next finished request: slot and status.
    #[inline]
    pub(crate) fn pop(&mut self) -> Option<(usize, u8)> {
        let slot = either!(&mut self.ring, ring => ring.pop())?;
        assert!(
            slot < self.slots.shape.depth,
            "the back-end returned what was never in flight: {slot}"
        );
        Some((slot, self.slots.status(slot)))
    }

    /// Asks for no interrupts.
    #[inline]
    pub(crate) fn suppress_interrupts(&self) {
        either!(&self.ring, ring => ring.suppress_interrupts());
    }

    /// Asks for an interrupt at the next completion; true when one is there already.
    #[inline]
    pub(crate) fn want_interrupt(&self) -> bool {
        either!(&self.ring, ring => ring.enable_interrupts());
        fence(Ordering::SeqCst);
        either!(&self.ring, ring => ring.is_used())
    }

    /// Takes an interrupt.
    pub(crate) fn take_interrupt(&mut self) {
        if self.call.read().is_ok() {
            self.interrupts += 1;
        }
    }

    /// Changes what a write in `slot`, which is free, will write.
    #[inline]
    pub(crate) fn stamp(&mut self, slot: usize, value: u64) {
        self.slots.stamp(slot, value);
    }
}

impl Slots {
    /// The part of queue `index` in `region`.
    fn new(region: &Arc<Region>, index: usize, shape: Shape) -> Self {
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
        Self {
            slots: pointer_to(&slots),
            buffers: pointer_to(&buffers),
            slots_gpa: slots.gpa(0),
            buffers_gpa: buffers.gpa(0),
            shape,
        }
    }

    #[inline]
    fn gpa(&self, slot: usize) -> u64 {
        self.slots_gpa + (slot * self.shape.slot_bytes()) as u64
    }

    /// # Safety
    /// `slot` is below the depth.
    #[inline]
    unsafe fn base(&self, slot: usize) -> *mut u8 {
        // SAFETY: the caller's slot is inside the area.
        unsafe { self.slots.add(slot * self.shape.slot_bytes()) }
    }

    /// # Safety
    /// `slot` is below the depth.
    #[inline]
    unsafe fn table(&self, slot: usize) -> Table {
        Table {
            // SAFETY: a slot ends with room for a whole chain.
            place: unsafe { self.base(slot).add(TABLE_AT).cast() },
            gpa: self.gpa(slot) + TABLE_AT as u64,
        }
    }

    /// What the back-end wrote, or the preset.
    #[inline]
    fn status(&self, slot: usize) -> u8 {
        assert!(slot < self.shape.depth);
        // SAFETY: `slot` was just checked; the back-end may write the byte, hence volatile.
        unsafe { self.base(slot).add(STATUS_AT).read_volatile() }
    }

    /// # Safety
    /// `slot` is free and below the depth.
    #[inline]
    unsafe fn write_header(&self, slot: usize, command: Command) {
        let Command { operation, sector } = command;
        let ranged = is_ranged(operation);
        // SAFETY: the caller's slot has all these fields, aligned.
        unsafe {
            let base = self.base(slot);
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

    /// The descriptors of a request, never more than [`Shape::chain`].
    #[inline]
    fn pieces(&self, slot: usize, operation: Operation) -> impl Iterator<Item = Piece> {
        let gpa = self.gpa(slot);
        let piece = |at: usize, bytes: u32, writable: bool| Piece {
            gpa: gpa + at as u64,
            bytes,
            writable,
        };
        let range = is_ranged(operation).then(|| piece(16, 16, false));
        let segments = match operation {
            Operation::Read | Operation::Write => self.shape.segments(),
            _ => 0,
        };
        let buffer = self.buffers_gpa + (slot * self.shape.buffer_stride()) as u64;
        let shape = self.shape;
        let data = (0..segments).map(move |segment| {
            let at = segment * shape.segment_bytes;
            Piece {
                gpa: buffer + at as u64,
                bytes: shape.segment_bytes.min(shape.block_bytes - at) as u32,
                writable: operation == Operation::Read,
            }
        });
        iter::once(piece(0, 16, false))
            .chain(range)
            .chain(data)
            .chain(iter::once(piece(STATUS_AT, 1, true)))
    }

    #[inline]
    fn stamp(&mut self, slot: usize, value: u64) {
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
