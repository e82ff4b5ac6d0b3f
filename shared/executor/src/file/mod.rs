//! Files: every transfer is whole (short transfers are continued, reads past the end give
//! zeroes) and positioned.
//!
//! How a transfer reaches the kernel depends on the file: tmpfs is read and written inline, through
//! a shared mapping where that is safe ([`mapped`]), else by `pread` and `pwrite`; a buffered file is read without blocking first (`RWF_NOWAIT`), else and for writes it goes to the
//! ring (unless the executor has writes done in place), `O_DIRECT` goes to the ring. In a simulated world a file is a
//! byte array with a write log.

mod host;
mod mapped;
mod streaming;
mod transfer;

use crate::op::{InFlight, Op};
use crate::runtime::{Backend, with_current};
use crate::sim::SimFile;
use crate::{Buffer, Errno};
use host::{HostFile, Mode};
use std::future::Future;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
pub(crate) use transfer::{Allocation, Direction, Transfer};

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
pub struct File {
    kind: Arc<Kind>,
}

enum Kind {
    Host(HostFile),
    Sim(SimFile),
}

impl File {
    /// Opens `path` on the current executor's world (the host's files, or the simulated ones).
    pub fn open(path: &Path, options: &OpenOptions) -> io::Result<File> {
        let kind = with_current(|executor| match executor.map(|inner| &inner.backend) {
            Some(Backend::Sim(disk)) => disk.open(path, options).map(Kind::Sim),
            _ => HostFile::open(path, options).map(Kind::Host),
        })?;
        Ok(File {
            kind: Arc::new(kind),
        })
    }

    /// Takes over an open descriptor of a regular file or block device.
    pub fn from_fd(fd: OwnedFd) -> io::Result<File> {
        let kind = Arc::new(Kind::Host(HostFile::from_fd(fd)?));
        Ok(File { kind })
    }

    /// The raw descriptor for locks and ioctls; `None` in a simulated world.
    pub fn as_fd(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        match &*self.kind {
            Kind::Host(host) => Some(host.fd()),
            Kind::Sim(_) => None,
        }
    }

    /// Current length in bytes (block devices too).
    pub fn len(&self) -> io::Result<u64> {
        match &*self.kind {
            Kind::Host(host) => host.len(),
            Kind::Sim(sim) => Ok(sim.len()),
        }
    }

    /// Whether the length is zero.
    pub fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Alignments needed by transfers.
    pub fn alignment(&self) -> Alignment {
        match &*self.kind {
            Kind::Host(host) => host.alignment,
            Kind::Sim(_) => Alignment {
                memory: 1,
                offset: 1,
            },
        }
    }

    /// Whether parts of it may be reached through a mapping.
    pub fn is_mapped(&self) -> bool {
        matches!(&*self.kind, Kind::Host(host) if host.mappings.is_some())
    }

    /// Brings the first bytes at `offset` near when they are in mapped memory: a hint.
    #[inline]
    pub fn prefetch(&self, offset: u64) {
        if let Kind::Host(host) = &*self.kind
            && let Some(mappings) = &host.mappings
        {
            mappings.prefetch(offset);
        }
    }

    /// Fills `buffer` from `offset`; bytes past the end of file are zeroes.
    ///
    /// The operation begins here, not at the first poll.
    pub fn read_at(&self, buffer: Buffer, offset: u64) -> FileOp {
        self.transfer(buffer, offset, Direction::Read)
    }

    /// Writes the whole `buffer` at `offset`; a write past the end grows the file.
    ///
    /// The operation begins here, not at the first poll.
    pub fn write_at(&self, buffer: Buffer, offset: u64) -> FileOp {
        self.transfer(buffer, offset, Direction::Write)
    }

    fn transfer(&self, buffer: Buffer, offset: u64, direction: Direction) -> FileOp {
        let end = offset.checked_add(buffer.len() as u64);
        if end.is_none_or(|end| end > i64::MAX as u64) {
            return FileOp::ready(Err(Errno::EFBIG));
        }
        if buffer.is_empty() {
            return FileOp::ready(Ok(()));
        }
        let mut done = 0;
        if let Kind::Host(host) = &*self.kind {
            match host.transfer_inline(&buffer, offset, direction) {
                Ok(len) if len == buffer.len() => return FileOp::ready(Ok(())),
                Ok(len) => done = len,
                Err(errno) => return FileOp::ready(Err(errno)),
            }
        }
        FileOp::begin(Op::Transfer(Transfer {
            file: self.clone(),
            buffer,
            offset,
            done,
            direction,
        }))
    }

    /// `fdatasync`: every completed write is on stable storage when it resolves.
    pub fn sync_data(&self) -> FileOp {
        match &*self.kind {
            // tmpfs has no stable storage.
            Kind::Host(host) if host.mode == Mode::Inline => FileOp::ready(host.stamp()),
            _ => FileOp::begin(Op::Sync(self.clone())),
        }
    }

    /// Changes the allocation of `len` bytes at `offset`. `EOPNOTSUPP` when the file system
    /// cannot.
    pub fn fallocate(&self, mode: Fallocate, offset: u64, len: u64) -> FileOp {
        if len == 0 {
            return FileOp::ready(Ok(()));
        }
        let allocation = Allocation {
            file: self.clone(),
            mode,
            offset,
            len,
        };
        match &*self.kind {
            Kind::Host(host) if host.mode == Mode::Inline => {
                FileOp::ready(host.allocate(&allocation))
            }
            _ => FileOp::begin(Op::Allocate(allocation)),
        }
    }

    /// Copies `len` bytes at `offset` to a place in another file without bringing them here: shared
    /// where the file system can do that, else copied within the kernel, on a worker thread.
    ///
    /// # Errors
    /// The kernel's, mostly because it cannot do it for these two files (`EXDEV`, `EINVAL`,
    /// `EOPNOTSUPP`); `ENODATA` when the file ends before. Some bytes may have been copied.
    pub async fn copy_range(
        &self,
        offset: u64,
        (to, to_offset): (&File, u64),
        len: u64,
    ) -> Result<(), Errno> {
        let (from, to) = (self.clone(), to.clone());
        crate::workers::offload(move || match (&*from.kind, &*to.kind) {
            (Kind::Host(from), Kind::Host(to)) => {
                transfer::copy_range((from.fd(), offset), (to.fd(), to_offset), len)
            }
            _ => Err(Errno::EOPNOTSUPP),
        })
        .await
    }

    /// Sets the length; new bytes read as zeroes.
    pub fn set_len(&self, len: u64) -> FileOp {
        match &*self.kind {
            Kind::Host(host) if host.mode == Mode::Inline => FileOp::ready(host.set_len(len)),
            _ => FileOp::begin(Op::SetLen(self.clone(), len)),
        }
    }

    /// Sets the length without the ring, for kernels whose ring cannot.
    pub(crate) fn set_len_now(&self, len: u64) -> Result<(), Errno> {
        match &*self.kind {
            Kind::Host(host) => host.set_len(len),
            Kind::Sim(_) => Err(Errno::EINVAL),
        }
    }

    /// Next data and hole at or after `offset`, as `(start of data, end of data)`; `None` when
    /// only a hole follows.
    pub fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        match &*self.kind {
            Kind::Host(host) => host.next_data(offset),
            Kind::Sim(sim) => Ok(sim.next_data(offset)),
        }
    }

    /// The descriptor that submission entries name.
    pub(crate) fn raw_fd(&self) -> RawFd {
        match &*self.kind {
            Kind::Host(host) => host.fd().as_raw_fd(),
            Kind::Sim(_) => panic!("a simulated file is used on a real executor"),
        }
    }

    /// Its mappings, if it may be mapped.
    #[cfg(test)]
    fn mappings(&self) -> Option<&mapped::Mappings> {
        match &*self.kind {
            Kind::Host(host) => host.mappings.as_ref(),
            Kind::Sim(_) => None,
        }
    }

    /// The simulated file.
    pub(crate) fn sim(&self) -> &SimFile {
        match &*self.kind {
            Kind::Sim(sim) => sim,
            Kind::Host(_) => panic!("a host's file is used in a simulated world"),
        }
    }

    /// Whether the page cache is bypassed.
    pub(crate) fn is_direct(&self) -> bool {
        matches!(&*self.kind, Kind::Host(host) if host.mode == Mode::Direct)
    }
}

impl std::fmt::Debug for File {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &*self.kind {
            Kind::Host(host) => write!(f, "File({}, {:?})", host.fd().as_raw_fd(), host.mode),
            Kind::Sim(sim) => write!(f, "File({sim:?})"),
        }
    }
}

/// One file operation in flight. Resolves once; dropping it lets the kernel finish on the buffer
/// that the ring keeps.
pub struct FileOp {
    state: FileOpState,
}

enum FileOpState {
    Ready(Result<(), Errno>),
    InFlight(InFlight),
    Taken,
}

impl FileOp {
    /// An operation that is done.
    pub fn ready(result: Result<(), Errno>) -> FileOp {
        FileOp {
            state: FileOpState::Ready(result),
        }
    }

    /// The result, when the operation was done as it began (a caller may save itself the count of
    /// what is in flight).
    pub fn result(&self) -> Option<Result<(), Errno>> {
        match self.state {
            FileOpState::Ready(result) => Some(result),
            _ => None,
        }
    }

    fn begin(op: Op) -> FileOp {
        FileOp {
            state: FileOpState::InFlight(InFlight::begin(op)),
        }
    }
}

impl Future for FileOp {
    type Output = Result<(), Errno>;
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let result = match &mut self.state {
            FileOpState::Ready(result) => *result,
            FileOpState::InFlight(operation) => match operation.poll(cx) {
                Poll::Ready((result, _op)) if result < 0 => Err(Errno::from_raw(-result)),
                Poll::Ready(_) => Ok(()),
                Poll::Pending => return Poll::Pending,
            },
            FileOpState::Taken => panic!("a file operation is polled after it finished"),
        };
        self.state = FileOpState::Taken;
        Poll::Ready(result)
    }
}
