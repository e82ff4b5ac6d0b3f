//! One transfer: the syscall or submission entry for what is left of it, and what a result means.
#![expect(unsafe_code, reason = "vectored I/O takes raw pointers")]

use super::{Fallocate, File};
use crate::{Buffer, Errno};
use io_uring::squeue::Entry;
use io_uring::{opcode, types};
use nix::fcntl::{FallocateFlags, fallocate};
use smallvec::SmallVec;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Pieces that the kernel takes in one call (IOV_MAX).
pub(super) const MAX_PIECES: usize = libc::UIO_MAXIOV as usize;
/// Bytes that the kernel transfers in one call (MAX_RW_COUNT).
const MAX_BYTES: usize = 0x7fff_f000;

/// Which way the bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// From the file to memory.
    Read,
    /// From memory to the file.
    Write,
}

/// A transfer on the ring.
pub(crate) struct Transfer {
    pub(crate) file: File,
    pub(crate) buffer: Buffer,
    /// Where the buffer's first byte is in the file.
    pub(crate) offset: u64,
    /// Bytes transferred already.
    pub(crate) done: usize,
    pub(crate) direction: Direction,
}

impl Transfer {
    /// The entry for what is left. `iovecs` is scratch space that outlives the operation.
    pub(crate) fn entry(&self, iovecs: &mut Vec<libc::iovec>) -> Entry {
        let fd = types::Fd(self.file.raw_fd());
        let offset = self.offset + self.done as u64;
        if let Some((ptr, len)) = self.buffer.as_single_piece() {
            // SAFETY: `done` is below `len`.
            let ptr = unsafe { ptr.add(self.done) };
            let len = (len - self.done).min(MAX_BYTES) as u32;
            return match self.direction {
                Direction::Read => opcode::Read::new(fd, ptr, len).offset(offset).build(),
                Direction::Write => opcode::Write::new(fd, ptr, len).offset(offset).build(),
            };
        }
        let list = match self.buffer.as_whole_list(self.done) {
            Some(list) if list.len() <= MAX_PIECES => list,
            _ => {
                iovecs.clear();
                let push = |iovec| iovecs.push(iovec);
                self.buffer.for_each_iovec(self.done, MAX_PIECES, push);
                iovecs
            }
        };
        let (ptr, len) = (list.as_ptr(), list.len() as u32);
        match self.direction {
            Direction::Read => opcode::Readv::new(fd, ptr, len).offset(offset).build(),
            Direction::Write => opcode::Writev::new(fd, ptr, len).offset(offset).build(),
        }
    }

    /// Takes in a result: the final one (0 or a negative errno), or `None` when more is to do.
    pub(crate) fn advance(&mut self, result: i32) -> Option<i32> {
        let Ok(len) = usize::try_from(result) else {
            return Some(result);
        };
        self.done += len;
        if self.done == self.buffer.len() {
            return Some(0);
        }
        if self.direction == Direction::Write {
            return if len == 0 { Some(-libc::EIO) } else { None };
        }
        if len == 0 || self.ends_unaligned() {
            return Some(self.fill_past_end());
        }
        None
    }

    /// Whether a direct read stopped where no direct read can go on: at the end of the file.
    fn ends_unaligned(&self) -> bool {
        let at = self.offset + self.done as u64;
        self.file.is_direct() && !at.is_multiple_of(self.file.alignment().offset as u64)
    }

    /// Zeroes what lies past the end of the file.
    fn fill_past_end(&self) -> i32 {
        let at = self.offset + self.done as u64;
        if self.ends_unaligned() && self.file.len().is_ok_and(|len| len > at) {
            return -libc::EIO;
        }
        self.buffer.slice(self.done..self.buffer.len()).fill(0);
        0
    }
}

/// A change of allocation.
pub(crate) struct Allocation {
    pub(crate) file: File,
    pub(crate) mode: Fallocate,
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

impl Allocation {
    fn flags(&self) -> FallocateFlags {
        let keep = FallocateFlags::FALLOC_FL_KEEP_SIZE;
        match self.mode {
            Fallocate::Allocate => FallocateFlags::empty(),
            Fallocate::PunchHole => FallocateFlags::FALLOC_FL_PUNCH_HOLE | keep,
            Fallocate::ZeroRange => FallocateFlags::FALLOC_FL_ZERO_RANGE | keep,
        }
    }

    pub(crate) fn entry(&self) -> Entry {
        opcode::Fallocate::new(types::Fd(self.file.raw_fd()), self.len)
            .offset(self.offset)
            .mode(self.flags().bits())
            .build()
    }

    /// Does it by a syscall.
    pub(super) fn now(&self, fd: BorrowedFd<'_>) -> Result<(), Errno> {
        let offset = i64::try_from(self.offset).map_err(|_| Errno::EFBIG)?;
        let len = i64::try_from(self.len).map_err(|_| Errno::EFBIG)?;
        loop {
            match fallocate(fd, self.flags(), offset, len) {
                Err(Errno::EINTR) => {}
                result => return result,
            }
        }
    }
}

/// Has the kernel copy `len` bytes from one file to another, at these offsets.
pub(super) fn copy_range(
    (from, offset): (BorrowedFd<'_>, u64),
    (to, to_offset): (BorrowedFd<'_>, u64),
    len: u64,
) -> Result<(), Errno> {
    let mut offset = i64::try_from(offset).map_err(|_| Errno::EFBIG)?;
    let mut to_offset = i64::try_from(to_offset).map_err(|_| Errno::EFBIG)?;
    let mut left = len;
    while left > 0 {
        let asked = left.min(MAX_BYTES as u64) as usize;
        // SAFETY: two valid descriptors, and offsets that outlive the call.
        let copied = unsafe {
            let (from, to) = (from.as_raw_fd(), to.as_raw_fd());
            libc::copy_file_range(from, &raw mut offset, to, &raw mut to_offset, asked, 0)
        };
        match u64::try_from(copied) {
            // The source ends here.
            Ok(0) => return Err(Errno::ENODATA),
            Ok(copied) => left -= copied,
            Err(_) if Errno::last() == Errno::EINTR => {}
            Err(_) => return Err(Errno::last()),
        }
    }
    Ok(())
}

/// What one syscall is to transfer.
pub(super) struct Piece<'a> {
    pub(super) buffer: &'a Buffer,
    pub(super) offset: u64,
    pub(super) done: usize,
    pub(super) direction: Direction,
    /// Fail with EAGAIN instead of waiting.
    pub(super) nowait: bool,
}

/// Transfers what one syscall takes; the number of bytes.
pub(super) fn transfer_once(fd: BorrowedFd<'_>, piece: &Piece<'_>) -> Result<usize, Errno> {
    let result = match piece.buffer.as_single_piece() {
        // A vectored call costs a twelfth more.
        Some(memory) if !piece.nowait => transfer_plain(fd, piece, memory),
        _ => transfer_vectored(fd, piece),
    };
    usize::try_from(result).map_err(|_| Errno::last())
}

fn transfer_plain(fd: BorrowedFd<'_>, piece: &Piece<'_>, (ptr, len): (*mut u8, usize)) -> isize {
    let offset = (piece.offset + piece.done as u64) as i64;
    let (fd, len) = (fd.as_raw_fd(), len - piece.done);
    // SAFETY: `done` is at most the length; the buffer keeps its memory mapped during the call.
    unsafe {
        let ptr = ptr.add(piece.done).cast();
        match piece.direction {
            Direction::Read => libc::pread(fd, ptr, len, offset),
            Direction::Write => libc::pwrite(fd, ptr, len, offset),
        }
    }
}

fn transfer_vectored(fd: BorrowedFd<'_>, piece: &Piece<'_>) -> isize {
    let mut scratch = SmallVec::<[libc::iovec; 16]>::new();
    let list = match piece.buffer.as_whole_list(piece.done) {
        Some(list) if list.len() <= MAX_PIECES => list,
        _ => {
            let push = |iovec| scratch.push(iovec);
            piece.buffer.for_each_iovec(piece.done, MAX_PIECES, push);
            &scratch
        }
    };
    let (fd, ptr, count) = (fd.as_raw_fd(), list.as_ptr(), list.len() as i32);
    let offset = (piece.offset + piece.done as u64) as i64;
    let flags = if piece.nowait { libc::RWF_NOWAIT } else { 0 };
    // SAFETY: the list names memory that the buffer keeps mapped during the call.
    unsafe {
        match piece.direction {
            Direction::Read => libc::preadv2(fd, ptr, count, offset, flags),
            Direction::Write => libc::pwritev2(fd, ptr, count, offset, flags),
        }
    }
}
