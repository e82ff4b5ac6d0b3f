//! Descriptor chains, parsed: where a request's buffers are in this process.

#![expect(unsafe_code, reason = "guest memory is reached through raw pointers")]

use std::cell::Cell;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use executor::buffer::IoVecs;

use super::RingError;
use super::descriptor::{prefetch, prefetch_to_write};
use crate::memory::MemoryTable;

/// Longest chain accepted, in descriptors, and most contiguous pieces that they come to. It bounds
/// the memory that a guest can make the device use: descriptors cost the guest next to nothing, as
/// many chains may share them.
pub const MAX_CHAIN: u16 = 2048;

/// Bytes of a line of the cache.
const CACHE_LINE: usize = 64;

/// The memory table as a queue thread holds it: cheap to keep alive per request.
pub type SharedMemory = Rc<Arc<MemoryTable>>;

/// A contiguous piece of guest memory, valid while the chain's memory table lives.
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    pub(super) base: *mut u8,
    pub(super) len: usize,
}

/// One request's buffers: readable ones (driver to device) first, then writable ones.
#[derive(Debug)]
pub struct Chain {
    head: u16,
    segments: Vec<Segment>,
    /// How many of `segments` are readable.
    readable: usize,
    readable_len: u64,
    writable_len: u64,
    memory: SharedMemory,
}

impl Chain {
    /// An empty chain to fetch into.
    pub(crate) fn new(memory: SharedMemory) -> Chain {
        Chain {
            head: 0,
            segments: Vec::with_capacity(32),
            readable: 0,
            readable_len: 0,
            writable_len: 0,
            memory,
        }
    }

    /// What names the request to [`crate::Queue::complete`]: the head descriptor's index in a split
    /// ring, a number below the ring size in a packed one.
    #[inline]
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Bytes that the driver gave to read.
    #[inline]
    pub fn readable_len(&self) -> usize {
        self.readable_len as usize
    }

    /// Bytes that the driver gave to write.
    #[inline]
    pub fn writable_len(&self) -> usize {
        self.writable_len as usize
    }

    /// Copies the first bytes of the readable part; false when there are fewer.
    #[inline]
    pub fn read_head<const N: usize>(&self) -> Option<[u8; N]> {
        if let Some(first) = self.segments[..self.readable].first()
            && first.len >= N
        {
            // SAFETY: `N` bytes of a segment of this chain, which the memory table keeps mapped;
            // the type has no invalid values and alignment 1.
            return Some(unsafe { first.base.cast::<[u8; N]>().read_volatile() });
        }
        let mut bytes = [0; N];
        self.copy_readable(0, &mut bytes).then_some(bytes)
    }

    /// Copies readable bytes from `offset`; false when they are not all there.
    pub fn copy_readable(&self, offset: usize, target: &mut [u8]) -> bool {
        let mut done = 0;
        let range = offset..offset.saturating_add(target.len());
        let whole = for_each_piece(&self.segments[..self.readable], range, |base, len| {
            // SAFETY: `len` bytes of a mapped segment and of the target, which do not overlap:
            // one is guest memory, the other private.
            unsafe { std::ptr::copy_nonoverlapping(base, target[done..].as_mut_ptr(), len) };
            done += len;
        });
        whole && done == target.len()
    }

    /// Copies `source` to the writable bytes from `offset`; false when there is less room, and
    /// then only a part may be written.
    pub fn copy_writable(&self, offset: usize, source: &[u8]) -> bool {
        let mut done = 0;
        let range = offset..offset.saturating_add(source.len());
        let whole = for_each_piece(&self.segments[self.readable..], range, |base, len| {
            // SAFETY: as in `copy_readable`, the other way round.
            unsafe { std::ptr::copy_nonoverlapping(source[done..].as_ptr(), base, len) };
            done += len;
        });
        whole && done == source.len()
    }

    /// Appends the readable bytes of `range` to `iovecs` and makes it keep the memory mapped.
    #[inline]
    pub fn readable_iovecs(&self, range: Range<usize>, iovecs: &mut IoVecs) -> bool {
        self.iovecs(&self.segments[..self.readable], range, iovecs)
    }

    /// Appends the writable bytes of `range` to `iovecs` and makes it keep the memory mapped.
    #[inline]
    pub fn writable_iovecs(&self, range: Range<usize>, iovecs: &mut IoVecs) -> bool {
        self.iovecs(&self.segments[self.readable..], range, iovecs)
    }

    /// Calls `piece` with the contiguous pieces of readable guest memory in `range`; false when there are fewer bytes. The
    /// pointers are good for as long as the chain is not fetched into again.
    #[inline]
    pub fn readable_pieces(&self, range: Range<usize>, piece: impl FnMut(*mut u8, usize)) -> bool {
        for_each_piece(&self.segments[..self.readable], range, piece)
    }

    /// Calls `piece` with the contiguous pieces of writable guest memory in `range`, as
    /// [`Chain::readable_pieces`] does.
    #[inline]
    pub fn writable_pieces(&self, range: Range<usize>, piece: impl FnMut(*mut u8, usize)) -> bool {
        for_each_piece(&self.segments[self.readable..], range, piece)
    }

    #[inline]
    fn iovecs(&self, segments: &[Segment], range: Range<usize>, iovecs: &mut IoVecs) -> bool {
        iovecs.set_owner(self.memory.clone());
        for_each_piece(segments, range, |base, len| {
            // SAFETY: the owner set above keeps every segment of this chain mapped.
            unsafe { iovecs.push(base, len) };
        })
    }

    /// The last `len` writable bytes, to be written later; `None` when they are fewer or not
    /// contiguous.
    #[inline]
    pub fn writable_tail(&self, len: usize) -> Option<GuestBytes> {
        let last = self.segments[self.readable..].last()?;
        let offset = last.len.checked_sub(len)?;
        Some(GuestBytes {
            // SAFETY: `offset` is at most the segment's length.
            base: unsafe { last.base.add(offset) },
            len,
            _memory: self.memory.clone(),
        })
    }

    /// Calls `piece` with guest address and length of each writable piece.
    pub(crate) fn for_each_writable(&self, mut piece: impl FnMut(u64, u64)) {
        for segment in &self.segments[self.readable..] {
            if let Some(address) = self.memory.guest_address(segment.base) {
                piece(address, segment.len as u64);
            }
        }
    }

    /// Makes it an empty chain of `head` in `memory`.
    #[inline]
    pub(crate) fn begin(&mut self, head: u16, memory: &SharedMemory) {
        self.head = head;
        self.segments.clear();
        self.readable = 0;
        self.readable_len = 0;
        self.writable_len = 0;
        if !Rc::ptr_eq(&self.memory, memory) {
            self.memory = memory.clone();
        }
    }

    /// Fetches the beginning of the first buffer into the cache: a request's header, or a small frame behind its own.
    #[inline]
    pub(super) fn warm(&self) {
        let Some(first) = self.segments.first() else {
            return;
        };
        let last = first.len.min(CACHE_LINE);
        let lines = [first.base, first.base.wrapping_add(last)];
        let crosses = first.base.addr() % CACHE_LINE + last > CACHE_LINE;
        for line in &lines[..1 + usize::from(crosses)] {
            match self.readable {
                0 => prefetch_to_write(*line),
                _ => prefetch(*line),
            }
        }
    }

    /// Appends one descriptor's buffer.
    #[inline]
    pub(super) fn push(
        &mut self,
        buffer: Buffer,
        memory: &MemoryTable,
        hint: &Cell<usize>,
    ) -> Result<(), RingError> {
        let total = if buffer.writable {
            &mut self.writable_len
        } else if self.segments.len() > self.readable {
            return Err(RingError::Order(self.head));
        } else {
            &mut self.readable_len
        };
        *total += u64::from(buffer.len);
        if *total > u64::from(u32::MAX) {
            return Err(RingError::TotalLength(self.head));
        }
        let outside = RingError::Buffer {
            addr: buffer.addr,
            len: buffer.len,
        };
        let (mut addr, mut left) = (buffer.addr, u64::from(buffer.len));
        while left > 0 {
            let (base, there) = memory.locate(addr, hint).ok_or(outside)?;
            let len = left.min(there);
            if self.segments.len() >= usize::from(MAX_CHAIN) {
                return Err(RingError::ChainLength(self.head));
            }
            self.segments.push(Segment {
                base,
                len: len as usize,
            });
            left -= len;
            // A region ends below 2^64, so this cannot wrap while bytes are left.
            addr = addr.wrapping_add(len);
        }
        if !buffer.writable {
            self.readable = self.segments.len();
        }
        Ok(())
    }
}

/// A descriptor's buffer before its address is looked up.
#[derive(Clone, Copy)]
pub(super) struct Buffer {
    pub(super) addr: u64,
    pub(super) len: u32,
    pub(super) writable: bool,
}

/// Calls `piece` for the contiguous pieces of `range` in `segments`; false when they end before.
#[inline]
fn for_each_piece(
    segments: &[Segment],
    range: Range<usize>,
    mut piece: impl FnMut(*mut u8, usize),
) -> bool {
    let (mut skip, mut left) = (range.start, range.end.saturating_sub(range.start));
    for segment in segments {
        if left == 0 {
            break;
        }
        if skip >= segment.len {
            skip -= segment.len;
            continue;
        }
        let len = left.min(segment.len - skip);
        // SAFETY: `skip` is below the segment's length.
        piece(unsafe { segment.base.add(skip) }, len);
        skip = 0;
        left -= len;
    }
    left == 0
}

/// A few bytes of guest memory to write later; keeps them mapped.
#[derive(Debug)]
pub struct GuestBytes {
    base: *mut u8,
    len: usize,
    _memory: SharedMemory,
}

impl GuestBytes {
    /// Writes the bytes; panics when `bytes` has another length (a caller's bug).
    #[inline]
    pub fn write(&self, bytes: &[u8]) {
        assert_eq!(bytes.len(), self.len, "exactly the bytes asked for");
        // SAFETY: `len` bytes at `base` are mapped while `_memory` lives; `bytes` is private.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.base, self.len) };
    }
}
