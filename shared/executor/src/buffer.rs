//! Buffers that outlive the operations they are used in.
//!
//! A [`Buffer`] is a scatter-gather list plus whatever keeps its memory mapped (a heap allocation,
//! or a guest-memory mapping). Cloning and slicing are cheap (a non-atomic count), so an operation
//! keeps its own clone until the kernel has answered and dropping a future is always safe.
//!
//! Memory behind a `Buffer` may be changed by the guest at any time: it is only ever copied from
//! and to, never borrowed as a slice. [`HeapBuffer`] is private memory and derefs to `[u8]`.

use std::any::Any;
use std::ops::{Deref, DerefMut, Range};
use std::rc::Rc;

/// A page-aligned private allocation; what metadata and bounced data live in.
pub struct HeapBuffer {}

impl HeapBuffer {
    /// Zero-filled memory of `len` bytes, aligned to 4096.
    pub fn zeroed(len: usize) -> Self {
        todo!()
    }
    /// Turns it into a shareable buffer; [`Buffer::try_into_heap`] is the way back.
    pub fn into_buffer(self) -> Buffer {
        todo!()
    }
}

impl Deref for HeapBuffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        todo!()
    }
}

impl DerefMut for HeapBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        todo!()
    }
}

/// A cheaply cloned and sliced scatter-gather list with an owner that keeps its memory mapped.
#[derive(Clone)]
pub struct Buffer {}

impl Buffer {
    /// A zero-filled heap buffer of `len` bytes, aligned to 4096.
    pub fn zeroed(len: usize) -> Self {
        todo!()
    }
    /// A buffer over `iovecs`, whose memory `owner` keeps valid.
    ///
    /// The list lives in a reference-counted [`IoVecs`] that the caller may reuse
    /// (`Rc::get_mut`) once every clone is gone, so a request costs no allocation.
    pub fn from_iovecs(iovecs: Rc<IoVecs>) -> Self {
        todo!()
    }
    /// Length in bytes.
    pub fn len(&self) -> usize {
        todo!()
    }
    /// Whether the length is zero.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// The sub-range `range` (bytes); panics when out of range (a caller's bug).
    pub fn slice(&self, range: Range<usize>) -> Buffer {
        todo!()
    }
    /// Calls `f` with pointer and length of each contiguous piece, in order.
    pub fn for_each_piece(&self, f: impl FnMut(*mut u8, usize)) {
        todo!()
    }
    /// Number of contiguous pieces.
    pub fn pieces(&self) -> usize {
        todo!()
    }
    /// Whether every piece starts and ends on a multiple of `align` bytes.
    pub fn is_aligned(&self, align: usize) -> bool {
        todo!()
    }
    /// Copies the content to `dst`; lengths must be equal.
    pub fn copy_to_slice(&self, dst: &mut [u8]) {
        todo!()
    }
    /// Overwrites the content with `src`; lengths must be equal.
    pub fn copy_from_slice(&self, src: &[u8]) {
        todo!()
    }
    /// Copies the content of `src`; lengths must be equal.
    pub fn copy_from(&self, src: &Buffer) {
        todo!()
    }
    /// Fills the memory with `byte`.
    pub fn fill(&self, byte: u8) {
        todo!()
    }
    /// Whether every byte is zero now.
    pub fn is_zero(&self) -> bool {
        todo!()
    }
    /// A private copy of the content.
    pub fn to_heap(&self) -> HeapBuffer {
        todo!()
    }
    /// Gives a heap buffer back when this is the only clone of a whole one.
    pub fn try_into_heap(self) -> Result<HeapBuffer, Buffer> {
        todo!()
    }
}

/// The iovec list behind guest buffers, reusable between requests.
pub struct IoVecs {}

impl IoVecs {
    /// An empty list.
    pub fn new() -> Self {
        todo!()
    }
    /// Empties the list and drops the owner.
    pub fn clear(&mut self) {
        todo!()
    }
    /// Sets what keeps the memory mapped (for example an `Arc` of the guest memory table).
    pub fn set_owner(&mut self, owner: Rc<dyn Any>) {
        todo!()
    }
    /// Appends `len` bytes at `base`.
    ///
    /// # Safety
    /// The memory must stay mapped, readable and writable while the owner lives.
    #[expect(
        unsafe_code,
        reason = "only the caller knows that the memory is mapped"
    )]
    pub unsafe fn push(&mut self, base: *mut u8, len: usize) {
        todo!()
    }
}

impl Default for IoVecs {
    fn default() -> Self {
        Self::new()
    }
}
