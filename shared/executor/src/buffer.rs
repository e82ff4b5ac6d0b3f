//! Buffers that outlive the operations they are used in.
//!
//! A [`Buffer`] is a scatter-gather list plus whatever keeps its memory mapped (a heap allocation,
//! or a guest-memory mapping). Cloning and slicing are cheap (a non-atomic count), so an operation
//! keeps its own clone until the kernel has answered and dropping a future is always safe.
//!
//! ```text
//!   Buffer ── memory ──> Rc<HeapBuffer>            one piece
//!     │                  Rc<IoVecs> ── owner ──>   many pieces of guest memory
//!     └ first piece, bytes skipped in it, length
//! ```
//!
//! Memory behind a `Buffer` may be changed by the guest at any time: it is only ever copied from
//! and to, never borrowed as a slice. [`HeapBuffer`] is private memory and derefs to `[u8]`.
#![expect(
    unsafe_code,
    reason = "memory shared with a guest is reached by raw pointers only"
)]

use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use smallvec::SmallVec;
use std::alloc::{self, Layout};
use std::any::Any;
use std::num::NonZeroUsize;
use std::ops::{Deref, DerefMut, Range};
use std::ptr::{self, NonNull};
use std::rc::Rc;

/// Alignment of heap buffers in bytes; serves direct I/O on every known device.
pub const HEAP_ALIGN: usize = 4096;

/// Buffers of this many bytes and more have a mapping of their own. It costs nothing until it is used, goes
/// back to the system at once, and leaves no hole in the heap; shorter ones would pay more for its pages.
const MAPPED_BYTES: usize = 4 << 20;

/// A page-aligned private allocation; what metadata and bounced data live in.
pub struct HeapBuffer {
    ptr: NonNull<u8>,
    len: usize,
}

// SAFETY: a `HeapBuffer` is the only owner of plain bytes, like `Box<[u8]>`.
unsafe impl Send for HeapBuffer {}
// SAFETY: shared references give `&[u8]` only.
unsafe impl Sync for HeapBuffer {}

impl HeapBuffer {
    /// Zero-filled memory of `len` bytes, aligned to 4096.
    pub fn zeroed(len: usize) -> Self {
        if len == 0 {
            let ptr = NonNull::dangling();
            return Self { ptr, len };
        }
        let layout = Self::layout(len);
        let ptr = match len < MAPPED_BYTES {
            // SAFETY: the layout's size is not zero.
            true => NonNull::new(unsafe { alloc::alloc_zeroed(layout) }),
            false => Self::map(layout.size()),
        };
        let ptr = ptr.unwrap_or_else(|| alloc::handle_alloc_error(layout));
        Self { ptr, len }
    }

    fn map(len: usize) -> Option<NonNull<u8>> {
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let len = NonZeroUsize::new(len)?;
        // SAFETY: a new private mapping, of no file, that nobody else knows.
        let base = unsafe { mmap_anonymous(None, len, protection, MapFlags::MAP_PRIVATE) };
        base.ok().map(NonNull::cast)
    }

    /// Turns it into a shareable buffer; [`Buffer::try_into_heap`] is the way back.
    pub fn into_buffer(self) -> Buffer {
        let len = self.len;
        Buffer {
            memory: Memory::Heap(Rc::new(self)),
            first: 0,
            pieces: u32::from(len != 0),
            skip: 0,
            len,
        }
    }

    fn layout(len: usize) -> Layout {
        Layout::from_size_align(len, HEAP_ALIGN).expect("buffer lengths are below isize::MAX")
    }
}

impl Drop for HeapBuffer {
    fn drop(&mut self) {
        match self.len {
            0 => {}
            // SAFETY: allocated in `zeroed` with the same layout, freed once.
            1..MAPPED_BYTES => unsafe {
                alloc::dealloc(self.ptr.as_ptr(), Self::layout(self.len));
            },
            // SAFETY: mapped in `zeroed` with the same length, unmapped once.
            MAPPED_BYTES.. => unsafe {
                munmap(self.ptr.cast(), self.len).expect("the mapping is there");
            },
        }
    }
}

impl Deref for HeapBuffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: `len` initialised bytes that only this value owns; while they are shared as a
        // `Buffer`, nobody has the `HeapBuffer` itself to call this on.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl DerefMut for HeapBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `&mut self` is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

impl From<&[u8]> for HeapBuffer {
    fn from(bytes: &[u8]) -> Self {
        let mut heap = HeapBuffer::zeroed(bytes.len());
        heap.copy_from_slice(bytes);
        heap
    }
}

#[derive(Clone)]
enum Memory {
    Heap(Rc<HeapBuffer>),
    List(Rc<IoVecs>),
}

/// A cheaply cloned and sliced scatter-gather list with an owner that keeps its memory mapped.
#[derive(Clone)]
pub struct Buffer {
    memory: Memory,
    /// Index of the first piece in the memory's list.
    first: u32,
    /// Pieces that the range touches.
    pieces: u32,
    /// Bytes of the first piece before the range.
    skip: usize,
    len: usize,
}

impl Buffer {
    /// A zero-filled heap buffer of `len` bytes, aligned to 4096.
    pub fn zeroed(len: usize) -> Self {
        HeapBuffer::zeroed(len).into_buffer()
    }

    /// A buffer over `iovecs`, whose memory `owner` keeps valid.
    ///
    /// The list lives in a reference-counted [`IoVecs`] that the caller may reuse
    /// (`Rc::get_mut`) once every clone is gone, so a request costs no allocation.
    pub fn from_iovecs(iovecs: Rc<IoVecs>) -> Self {
        Buffer {
            first: 0,
            pieces: u32::try_from(iovecs.list.len()).expect("push limits the number of pieces"),
            skip: 0,
            len: iovecs.len,
            memory: Memory::List(iovecs),
        }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the length is zero.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The sub-range `range` (bytes); panics when out of range (a caller's bug).
    pub fn slice(&self, range: Range<usize>) -> Buffer {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "slice {range:?} of a buffer of {} bytes",
            self.len
        );
        let mut sliced = self.clone();
        sliced.narrow(range.start, range.end - range.start);
        sliced
    }

    /// Drops `start` bytes in front and keeps `len`, which the caller has checked.
    fn narrow(&mut self, start: usize, len: usize) {
        self.skip += start;
        self.len = len;
        let Memory::List(list) = &self.memory else {
            self.pieces = u32::from(len != 0);
            return;
        };
        if len == 0 {
            self.pieces = 0;
            return;
        }
        let mut first = self.first as usize;
        while self.skip >= list.list[first].iov_len {
            self.skip -= list.list[first].iov_len;
            first += 1;
        }
        let mut last = first;
        let mut covered = list.list[first].iov_len - self.skip;
        while covered < len {
            last += 1;
            covered += list.list[last].iov_len;
        }
        self.first = first as u32;
        self.pieces = (last - first + 1) as u32;
    }

    /// Calls `f` with pointer and length of each contiguous piece, in order.
    pub fn for_each_piece(&self, mut f: impl FnMut(*mut u8, usize)) {
        match &self.memory {
            Memory::Heap(heap) => {
                if self.len != 0 {
                    // SAFETY: `skip + len` is within the allocation.
                    f(unsafe { heap.ptr.as_ptr().add(self.skip) }, self.len);
                }
            }
            Memory::List(list) => {
                let mut skip = self.skip;
                let mut left = self.len;
                let first = self.first as usize;
                for iovec in &list.list[first..first + self.pieces as usize] {
                    let len = (iovec.iov_len - skip).min(left);
                    // SAFETY: `skip` is within this piece (see `narrow`).
                    f(unsafe { iovec.iov_base.cast::<u8>().add(skip) }, len);
                    skip = 0;
                    left -= len;
                }
            }
        }
    }

    /// Number of contiguous pieces.
    pub fn pieces(&self) -> usize {
        self.pieces as usize
    }

    /// Whether every piece starts and ends on a multiple of `align` bytes.
    pub fn is_aligned(&self, align: usize) -> bool {
        let mut aligned = true;
        self.for_each_piece(|ptr, len| {
            aligned &= (ptr.addr() | len).is_multiple_of(align);
        });
        aligned
    }

    /// Copies the content to `dst`; lengths must be equal.
    pub fn copy_to_slice(&self, dst: &mut [u8]) {
        assert_eq!(self.len, dst.len(), "copy between unequal lengths");
        let mut to = dst.as_mut_ptr();
        self.for_each_piece(|from, len| {
            // SAFETY: the piece is mapped while `self` lives, `dst` has room for all pieces
            // (equal lengths), and `dst` is exclusively borrowed, so they do not overlap.
            unsafe {
                ptr::copy_nonoverlapping(from, to, len);
                to = to.add(len);
            }
        });
    }

    /// Overwrites the content with `src`; lengths must be equal.
    pub fn copy_from_slice(&self, src: &[u8]) {
        assert_eq!(self.len, src.len(), "copy between unequal lengths");
        let mut from = src.as_ptr();
        self.for_each_piece(|to, len| {
            // SAFETY: the piece is mapped while `self` lives, `src` covers all pieces (equal
            // lengths); `src` is borrowed as a slice, so it is not memory behind a `Buffer`.
            unsafe {
                ptr::copy_nonoverlapping(from, to, len);
                from = from.add(len);
            }
        });
    }

    /// Copies the content of `src`; lengths must be equal.
    pub fn copy_from(&self, src: &Buffer) {
        assert_eq!(self.len, src.len, "copy between unequal lengths");
        let mut pieces = SmallVec::<[(*mut u8, usize); 16]>::new();
        src.for_each_piece(|from, len| pieces.push((from, len)));
        let mut pieces = pieces.into_iter();
        let (mut from, mut from_len) = (ptr::null_mut(), 0);
        self.for_each_piece(|mut to, mut len| {
            while len > 0 {
                if from_len == 0 {
                    (from, from_len) = pieces.next().expect("the lengths are equal");
                }
                let part = len.min(from_len);
                // SAFETY: both pieces are mapped while the buffers live, `part` is within both.
                // A guest may hand out overlapping memory: `copy` allows it.
                unsafe {
                    ptr::copy(from, to, part);
                    from = from.add(part);
                    to = to.add(part);
                }
                from_len -= part;
                len -= part;
            }
        });
    }

    /// Fills the memory with `byte`.
    pub fn fill(&self, byte: u8) {
        self.for_each_piece(|ptr, len| {
            // SAFETY: the piece is mapped while `self` lives.
            unsafe { ptr::write_bytes(ptr, byte, len) }
        });
    }

    /// Whether every byte is zero now.
    pub fn is_zero(&self) -> bool {
        let mut zero = true;
        self.for_each_piece(|ptr, len| {
            // SAFETY: the piece is mapped while `self` lives.
            zero = zero && unsafe { is_zero_memory(ptr, len) };
        });
        zero
    }

    /// A private copy of the content.
    pub fn to_heap(&self) -> HeapBuffer {
        let mut heap = HeapBuffer::zeroed(self.len);
        self.copy_to_slice(&mut heap);
        heap
    }

    /// The content as private memory: its own when this is the only clone of a whole heap buffer,
    /// else a copy.
    pub fn into_heap(self) -> HeapBuffer {
        self.try_into_heap()
            .unwrap_or_else(|shared| shared.to_heap())
    }

    /// Gives a heap buffer back when this is the only clone of a whole one.
    pub fn try_into_heap(self) -> Result<HeapBuffer, Buffer> {
        let Buffer {
            memory,
            first,
            pieces,
            skip,
            len,
        } = self;
        let back = |memory| Buffer {
            memory,
            first,
            pieces,
            skip,
            len,
        };
        match memory {
            Memory::Heap(heap) if heap.len == len => {
                Rc::try_unwrap(heap).map_err(|heap| back(Memory::Heap(heap)))
            }
            other => Err(back(other)),
        }
    }

    /// Address and length when the buffer is one piece (or empty).
    pub(crate) fn as_single_piece(&self) -> Option<(*mut u8, usize)> {
        if self.pieces > 1 {
            return None;
        }
        let mut piece = (NonNull::dangling().as_ptr(), 0);
        self.for_each_piece(|ptr, len| piece = (ptr, len));
        Some(piece)
    }

    /// The memory's own list, when the range from `done` bytes on is exactly its tail.
    pub(crate) fn as_whole_list(&self, done: usize) -> Option<&[libc::iovec]> {
        match &self.memory {
            Memory::List(list) if done == 0 && self.len == list.len => Some(&list.list),
            _ => None,
        }
    }

    /// Gives at most `limit` pieces, from `done` bytes on, to `f`.
    pub(crate) fn for_each_iovec(&self, done: usize, limit: usize, mut f: impl FnMut(libc::iovec)) {
        let mut skip = done;
        let mut count = 0;
        self.for_each_piece(|ptr, len| {
            if skip >= len {
                skip -= len;
            } else if count < limit {
                count += 1;
                f(libc::iovec {
                    // SAFETY: `skip` is within the piece.
                    iov_base: unsafe { ptr.add(skip) }.cast(),
                    iov_len: len - skip,
                });
                skip = 0;
            }
        });
    }
}

impl From<&[u8]> for Buffer {
    fn from(bytes: &[u8]) -> Self {
        HeapBuffer::from(bytes).into_buffer()
    }
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buffer({} bytes, {} pieces)", self.len, self.pieces)
    }
}

/// Whether `len` bytes at `ptr` are zero, looking at blocks that the compiler turns into vector
/// instructions and leaving at the first block that is not zero.
///
/// # Safety
/// `len` bytes at `ptr` must be mapped. Another party may write them meanwhile.
unsafe fn is_zero_memory(ptr: *const u8, len: usize) -> bool {
    const WORDS: usize = 32;
    const BLOCK: usize = WORDS * size_of::<u64>();
    let blocks = len / BLOCK;
    for block in 0..blocks {
        // SAFETY: the block is within the range; `read_unaligned` copies it out, so no reference
        // to memory that may change is made.
        let words = unsafe {
            ptr.add(block * BLOCK)
                .cast::<[u64; WORDS]>()
                .read_unaligned()
        };
        if words.iter().fold(0, |all, word| all | word) != 0 {
            return false;
        }
    }
    // SAFETY: within the range.
    (blocks * BLOCK..len).all(|at| unsafe { ptr.add(at).read() } == 0)
}

/// The iovec list behind guest buffers, reusable between requests.
#[derive(Default)]
pub struct IoVecs {
    list: Vec<libc::iovec>,
    len: usize,
    owner: Option<Rc<dyn Any>>,
}

impl IoVecs {
    /// An empty list.
    pub fn new() -> Self {
        Self::default()
    }

    /// Empties the list and drops the owner.
    pub fn clear(&mut self) {
        self.list.clear();
        self.len = 0;
        self.owner = None;
    }

    /// Sets what keeps the memory mapped (for example an `Arc` of the guest memory table).
    pub fn set_owner(&mut self, owner: Rc<dyn Any>) {
        self.owner = Some(owner);
    }

    /// Bytes in all pieces.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no byte in it.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends `len` bytes at `base`; nothing when `len` is zero.
    ///
    /// Panics when the total would overflow or the list would pass 2^32 pieces: whoever reads a
    /// guest's descriptors caps both far below.
    ///
    /// # Safety
    /// The memory must stay mapped, readable and writable while the owner lives.
    pub unsafe fn push(&mut self, base: *mut u8, len: usize) {
        if len == 0 {
            return;
        }
        assert!(self.list.len() < u32::MAX as usize, "too many pieces");
        self.len = self.len.checked_add(len).expect("buffer too long");
        self.list.push(libc::iovec {
            iov_base: base.cast(),
            iov_len: len,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A buffer over pieces of the given lengths, filled with 0, 1, 2, ...
    fn pieces(lengths: &[usize]) -> Buffer {
        let total = lengths.iter().sum();
        let memory = Rc::new(HeapBuffer::zeroed(2 * total));
        let mut list = IoVecs::new();
        let mut at = 0;
        for &len in lengths {
            // SAFETY: within `memory`, which the list owns.
            unsafe { list.push(memory.ptr.as_ptr().add(at), len) };
            at += 2 * len;
        }
        list.set_owner(memory);
        let buffer = Buffer::from_iovecs(Rc::new(list));
        let bytes: Vec<u8> = (0..total).map(|i| i as u8).collect();
        buffer.copy_from_slice(&bytes);
        buffer
    }

    fn bytes(buffer: &Buffer) -> Vec<u8> {
        buffer.to_heap().to_vec()
    }

    #[test]
    fn every_slice_of_a_scattered_buffer_has_the_right_bytes() {
        let buffer = pieces(&[3, 1, 7, 2]);
        let all = bytes(&buffer);
        for start in 0..=13 {
            for end in start..=13 {
                let slice = buffer.slice(start..end);
                assert_eq!(bytes(&slice), &all[start..end]);
                let middle = slice.slice((end - start) / 2..end - start);
                assert_eq!(bytes(&middle), &all[start + (end - start) / 2..end]);
                let mut seen = 0;
                slice.for_each_piece(|_, len| {
                    assert!(len > 0);
                    seen += 1;
                });
                assert_eq!(slice.pieces(), seen);
            }
        }
    }

    #[test]
    fn iovecs_skip_what_is_done_and_stop_at_the_limit() {
        let buffer = pieces(&[3, 1, 7, 2]).slice(1..12);
        let mut list = Vec::new();
        buffer.for_each_iovec(3, 2, |iovec| list.push(iovec));
        let lengths: Vec<usize> = list.iter().map(|iovec| iovec.iov_len).collect();
        assert_eq!(lengths, [7, 1]);
        list.clear();
        buffer.for_each_iovec(0, 2, |iovec| list.push(iovec));
        let lengths: Vec<usize> = list.iter().map(|iovec| iovec.iov_len).collect();
        assert_eq!(lengths, [2, 1]);
    }

    #[test]
    fn copies_between_differently_cut_buffers() {
        let from = pieces(&[5, 4, 4]);
        let to = pieces(&[2, 9, 2]);
        to.fill(0xff);
        to.copy_from(&from);
        assert_eq!(bytes(&to), bytes(&from));
    }

    #[test]
    fn zero_is_told_from_one_set_bit_anywhere() {
        let buffer = Buffer::zeroed(1000);
        assert!(buffer.is_zero());
        // Miri takes its time.
        let step = if cfg!(miri) { 97 } else { 1 };
        for at in (0..1000).step_by(step) {
            buffer.slice(at..at + 1).fill(0x80);
            assert!(!buffer.is_zero());
            assert!(buffer.slice(at + 1..1000).is_zero());
            buffer.slice(at..at + 1).fill(0);
        }
        assert!(Buffer::zeroed(0).is_zero());
    }

    #[test]
    fn only_a_sole_whole_heap_buffer_is_given_back() {
        let buffer = Buffer::from(&b"abc"[..]);
        let clone = buffer.clone();
        let buffer = buffer.try_into_heap().err().unwrap();
        assert_eq!(&*buffer.clone().into_heap(), b"abc");
        drop(clone);
        assert!(buffer.slice(0..2).try_into_heap().is_err());
        assert_eq!(&*buffer.try_into_heap().ok().unwrap(), b"abc");
        assert!(pieces(&[1, 2]).try_into_heap().is_err());
    }

    #[test]
    fn alignment_looks_at_every_piece() {
        let heap = Buffer::zeroed(8192);
        assert!(heap.is_aligned(4096));
        assert!(heap.slice(512..1024).is_aligned(512));
        assert!(!heap.slice(512..1024).is_aligned(4096));
        assert!(!heap.slice(1..513).is_aligned(512));
    }
}
