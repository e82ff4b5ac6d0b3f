//! Files: every transfer is whole (short transfers are continued, reads past the end give
//! zeroes) and positioned.
//!
//! How a transfer reaches the kernel depends on the file: tmpfs is read and written inline
//! (`preadv2`), a buffered file is tried without blocking first (`RWF_NOWAIT`) and goes to the
//! ring when that would block, `O_DIRECT` goes to the ring. In a simulated world a file is a
//! byte array with a write log.

use crate::{Buffer, Errno};
use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll};

/// How a file is opened.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// Open for writing too.
    pub write: bool,
    /// Bypass the page cache (`O_DIRECT`).
    pub direct: bool,
    /// Create the file when absent.
    pub create: bool,
    /// Truncate to length 0.
    pub truncate: bool,
}

/// Alignments that direct I/O on a file needs, in bytes; 1 means none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alignment {
    /// Of buffer addresses.
    pub memory: usize,
    /// Of file offsets and lengths.
    pub offset: usize,
}

/// What [`File::fallocate`] does to a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fallocate {
    /// Allocate blocks; grows the file when the range ends past it.
    Allocate,
    /// Deallocate; the range reads as zeroes; the length stays.
    PunchHole,
    /// Zero the range, keeping it allocated; the length stays.
    ZeroRange,
}

/// An open file. Clones share the descriptor; any thread with an executor may use it.
#[derive(Clone)]
pub struct File {}

impl File {
    /// Opens `path` on the current executor's world (the host's files, or the simulated ones).
    pub fn open(path: &Path, options: &OpenOptions) -> io::Result<File> {
        todo!()
    }
    /// Takes over an open descriptor of a regular file or block device.
    pub fn from_fd(fd: OwnedFd) -> io::Result<File> {
        todo!()
    }
    /// The raw descriptor for locks and ioctls; `None` in a simulated world.
    pub fn as_fd(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        todo!()
    }
    /// Current length in bytes (block devices too).
    pub fn len(&self) -> io::Result<u64> {
        todo!()
    }
    /// Whether the length is zero.
    pub fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
    /// Alignments needed by transfers.
    pub fn alignment(&self) -> Alignment {
        todo!()
    }
    /// Fills `buffer` from `offset`; bytes past the end of file are zeroes.
    pub fn read_at(&self, buffer: Buffer, offset: u64) -> FileOp {
        todo!()
    }
    /// Writes the whole `buffer` at `offset`.
    pub fn write_at(&self, buffer: Buffer, offset: u64) -> FileOp {
        todo!()
    }
    /// `fdatasync`: every completed write is on stable storage when it resolves.
    pub fn sync_data(&self) -> FileOp {
        todo!()
    }
    /// Changes the allocation of `len` bytes at `offset`.
    pub fn fallocate(&self, mode: Fallocate, offset: u64, len: u64) -> FileOp {
        todo!()
    }
    /// Sets the length; new bytes read as zeroes.
    pub fn set_len(&self, len: u64) -> FileOp {
        todo!()
    }
    /// Next data and hole at or after `offset`, as `(start of data, end of data)`; `None` when
    /// only a hole follows.
    pub fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        todo!()
    }
}

/// One file operation in flight. Resolves once; dropping it lets the kernel finish on the buffer
/// that the ring keeps.
pub struct FileOp {}

impl Future for FileOp {
    type Output = Result<(), Errno>;
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        todo!()
    }
}
