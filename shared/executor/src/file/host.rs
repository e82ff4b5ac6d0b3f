//! Files of the host: opening, what kind of I/O serves them, and transfers without the ring.

use super::mapped::{Done, Mappings, protection};
use super::transfer::{Direction, MAX_PIECES, Piece, transfer_once};
use super::{Alignment, Allocation, Fallocate, OpenOptions};
use crate::runtime::with_current;
use crate::{Buffer, BufferedWrites, Errno};
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sys::stat::{FileStat, Mode as Permissions, SFlag, fstat};
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};
use nix::unistd::{Whence, ftruncate, lseek};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

/// Alignment that serves every direct I/O file known, for kernels that do not tell.
const DIRECT_ALIGN: usize = 4096;

/// How transfers reach the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// By copying or by syscalls that do not block: the file lives in memory.
    Inline,
    /// Reads by syscall when the page cache has the data, the rest by the ring.
    Cached,
    /// By the ring.
    Direct,
}

/// An open file of the host.
pub(super) struct HostFile {
    fd: OwnedFd,
    pub(super) mode: Mode,
    pub(super) alignment: Alignment,
    is_block_device: bool,
    /// Of a file that lives in memory.
    pub(super) mappings: Option<Mappings>,
    /// Cleared when the file system does not know reads that must not wait.
    nowait: AtomicBool,
}

impl HostFile {
    pub(super) fn open(path: &Path, options: &OpenOptions) -> io::Result<HostFile> {
        let mut flags = OFlag::O_CLOEXEC | OFlag::O_NOCTTY;
        flags |= if options.write {
            OFlag::O_RDWR
        } else {
            OFlag::O_RDONLY
        };
        flags.set(OFlag::O_DIRECT, options.direct);
        flags.set(OFlag::O_CREAT, options.create);
        flags.set(OFlag::O_TRUNC, options.truncate);
        let permissions = Permissions::from_bits_truncate(0o644);
        Self::from_fd(open(path, flags, permissions)?)
    }

    pub(super) fn from_fd(fd: OwnedFd) -> io::Result<HostFile> {
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
        let stat = fstat(&fd)?;
        let kind = file_type(&stat);
        let is_block_device = kind == SFlag::S_IFBLK;
        if kind == SFlag::S_IFDIR {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        let mode = if kind == SFlag::S_IFREG && fstatfs(&fd)?.filesystem_type() == TMPFS_MAGIC {
            Mode::Inline
        } else if flags.contains(OFlag::O_DIRECT) {
            Mode::Direct
        } else {
            Mode::Cached
        };
        let alignment = match mode {
            Mode::Direct => direct_alignment(fd.as_fd()),
            Mode::Inline | Mode::Cached => Alignment {
                memory: 1,
                offset: 1,
            },
        };
        let mappings = match mode {
            Mode::Inline => protection(flags).ok().and_then(|p| Mappings::new(&stat, p)),
            Mode::Cached | Mode::Direct => None,
        };
        Ok(HostFile {
            fd,
            mappings,
            mode,
            alignment,
            is_block_device,
            nowait: AtomicBool::new(true),
        })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    pub(super) fn len(&self) -> io::Result<u64> {
        let len = if self.is_block_device {
            lseek(&self.fd, 0, Whence::SeekEnd)?
        } else {
            fstat(&self.fd)?.st_size
        };
        u64::try_from(len).map_err(|_| io::ErrorKind::InvalidData.into())
    }

    pub(super) fn set_len(&self, len: u64) -> Result<(), Errno> {
        let new = i64::try_from(len).map_err(|_| Errno::EFBIG)?;
        match &self.mappings {
            Some(mappings) => mappings.shrink(len, u64::MAX, || ftruncate(&self.fd, new)),
            None => ftruncate(&self.fd, new),
        }
    }

    /// See [`super::File::next_data`]. Where the file system cannot tell, all is data.
    pub(super) fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        let len = self.len()?;
        if offset >= len {
            return Ok(None);
        }
        let from = i64::try_from(offset).map_err(|_| Errno::EFBIG)?;
        let start = match lseek(&self.fd, from, Whence::SeekData) {
            Ok(start) => start,
            Err(Errno::ENXIO) => return Ok(None),
            Err(Errno::EINVAL | Errno::EOPNOTSUPP) => return Ok(Some((offset, len))),
            Err(errno) => return Err(errno.into()),
        };
        let end = lseek(&self.fd, start, Whence::SeekHole)?;
        Ok(Some((start as u64, end as u64)))
    }

    /// Changes the allocation by a syscall.
    pub(super) fn allocate(&self, allocation: &Allocation) -> Result<(), Errno> {
        let now = || allocation.now(self.fd());
        match (&self.mappings, allocation.mode) {
            (Some(mappings), Fallocate::PunchHole | Fallocate::ZeroRange) => {
                mappings.shrink(allocation.offset, allocation.len, now)
            }
            _ => now(),
        }
    }

    /// Takes note of what was written through a mapping.
    pub(super) fn stamp(&self) -> Result<(), Errno> {
        match &self.mappings {
            Some(mappings) => mappings.stamp(self.fd()),
            None => Ok(()),
        }
    }

    /// Transfers without the ring what can be had without waiting; how many bytes that was.
    #[inline]
    pub(super) fn transfer_inline(
        &self,
        buffer: &Buffer,
        offset: u64,
        direction: Direction,
    ) -> Result<usize, Errno> {
        let Some(mappings) = &self.mappings else {
            return self.transfer_by_syscall(buffer, offset, direction);
        };
        if mappings.transfer(buffer, offset, direction) {
            return Ok(buffer.len());
        }
        let shrinks = mappings.shrinks();
        let result = self.transfer_by_syscall(buffer, offset, direction);
        if result.is_ok() {
            let len = buffer.len();
            let done = Done {
                offset,
                len,
                direction,
                shrinks,
            };
            mappings.consider(self.fd(), &done);
        }
        result
    }

    fn transfer_by_syscall(
        &self,
        buffer: &Buffer,
        offset: u64,
        direction: Direction,
    ) -> Result<usize, Errno> {
        let nowait = match (self.mode, direction) {
            (Mode::Inline, _) => false,
            (Mode::Cached, Direction::Read) if self.nowait.load(Ordering::Relaxed) => true,
            (Mode::Cached, Direction::Write) if writes_in_place() => false,
            (Mode::Cached | Mode::Direct, _) => return Ok(0),
        };
        let mut piece = Piece {
            buffer,
            offset,
            done: 0,
            direction,
            nowait,
        };
        loop {
            match transfer_once(self.fd(), &piece) {
                Ok(0) if direction == Direction::Read => {
                    buffer.slice(piece.done..buffer.len()).fill(0);
                    return Ok(buffer.len());
                }
                Ok(0) => return Err(Errno::EIO),
                Ok(len) => piece.done += len,
                Err(Errno::EINTR) => continue,
                Err(Errno::EAGAIN) if nowait => return Ok(piece.done),
                Err(Errno::EOPNOTSUPP) if nowait => {
                    self.nowait.store(false, Ordering::Relaxed);
                    return Ok(piece.done);
                }
                Err(errno) => return Err(errno),
            }
            let whole = piece.done == buffer.len();
            // A short read that must not wait stops at what the cache lacks.
            if whole || (nowait && buffer.pieces() <= MAX_PIECES) {
                return Ok(piece.done);
            }
        }
    }
}

/// Whether the executor writes buffered files by itself.
fn writes_in_place() -> bool {
    with_current(|executor| {
        executor.is_some_and(|inner| inner.buffered_writes.get() == BufferedWrites::InPlace)
    })
}

fn file_type(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT
}

/// What the file system says about direct I/O on `fd`.
#[expect(unsafe_code, reason = "nix has no statx")]
fn direct_alignment(fd: BorrowedFd<'_>) -> Alignment {
    use std::os::fd::AsRawFd;
    let careful = Alignment {
        memory: DIRECT_ALIGN,
        offset: DIRECT_ALIGN,
    };
    // SAFETY: all-zero is a valid `statx`.
    let mut found: libc::statx = unsafe { std::mem::zeroed() };
    let path = c"".as_ptr();
    // SAFETY: a valid descriptor, an empty path and room for the answer.
    let result = unsafe {
        let flags = libc::AT_EMPTY_PATH;
        libc::statx(
            fd.as_raw_fd(),
            path,
            flags,
            libc::STATX_DIOALIGN,
            &raw mut found,
        )
    };
    let told = result == 0 && found.stx_mask & libc::STATX_DIOALIGN != 0;
    if !told || found.stx_dio_offset_align == 0 || found.stx_dio_mem_align == 0 {
        return careful;
    }
    Alignment {
        memory: found.stx_dio_mem_align as usize,
        offset: found.stx_dio_offset_align as usize,
    }
}
