//! QEMU's image locks: permissions as byte ranges of the file, held as OFD read locks.
//!
//! ```text
//!   byte 100 + bit   read-locked: the permission is used
//!   byte 200 + bit   read-locked: the permission is not granted to others
//!   bit 0 consistent read, 1 write, 2 write unchanged, 3 resize
//! ```
//! Taking one looks for somebody else's lock on the opposite byte: using `write` (byte 101) is
//! refused when anybody holds byte 201. Both are held first and looked at after, so that of two
//! processes that come at once at least one backs off. Nobody ever holds a write lock, so all
//! that hold the same thing get along.
//!
//! A killed process holds its locks until the kernel has finished what its ring had in flight, some
//! milliseconds after the process itself is gone. A writable node waits for that when it is opened:
//! the lock is also what keeps the predecessor's last writes from landing after the successor's
//! first.

use block::edge::Permissions;
use block::error::Result;
use block::{Errno, Error, ErrorKind};
use executor::File;
use executor::time::{self, Backoff};
use nix::fcntl::{FcntlArg, fcntl};
use std::os::fd::BorrowedFd;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// How long somebody else's lock is waited for before it counts as held on purpose.
const PATIENCE: Duration = Duration::from_secs(1);

/// First and longest time between two looks; nothing announces that a lock is gone.
const LOOK_AGAIN: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(20));

const USED: u64 = 100;
const NOT_SHARED: u64 = 200;

/// The permission that tells a writer.
const WRITE: Permissions = Permissions {
    consistent_read: false,
    write: true,
    write_unchanged: false,
    resize: false,
};

/// `locking=`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Locking {
    /// Lock where the file system can.
    #[default]
    Auto,
    /// Lock, or fail.
    On,
    /// Never lock.
    Off,
}

/// The locks that a node holds on its file.
#[derive(Debug)]
pub struct Locks {
    locking: Locking,
    path: String,
    held: Mutex<Held>,
}

/// Permissions used, and those not shared.
#[derive(Clone, Copy, Debug, Default)]
struct Held {
    used: Permissions,
    not_shared: Permissions,
}

impl Held {
    fn bytes(self) -> impl Iterator<Item = u64> {
        let used = self.used.named().map(|(bit, _)| USED + bit);
        used.chain(self.not_shared.named().map(|(bit, _)| NOT_SHARED + bit))
    }

    fn minus(self, other: Held) -> Held {
        Held {
            used: self.used.minus(other.used),
            not_shared: self.not_shared.minus(other.not_shared),
        }
    }
}

impl Locks {
    /// Nothing held yet. `path` is for messages.
    pub fn new(locking: Locking, path: String) -> Self {
        Self {
            locking,
            path,
            held: Mutex::default(),
        }
    }

    /// Changes what is held; on an error it stays as it was.
    pub fn set(&self, file: &File, used: Permissions, shared: Permissions) -> Result<()> {
        let Some(fd) = file.as_fd().filter(|_| self.locking != Locking::Off) else {
            return Ok(());
        };
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = Held {
            used,
            not_shared: Permissions::ALL.minus(shared),
        };
        let added = wanted.minus(*held);
        match take(fd, added).and_then(|()| self.check(fd, added)) {
            Ok(()) => {
                release(fd, held.minus(wanted));
                *held = wanted;
                Ok(())
            }
            Err(error) => {
                release(fd, added);
                match error.errno {
                    Some(Errno::ENOLCK | Errno::EINVAL | Errno::ENOSYS | Errno::EOPNOTSUPP)
                        if self.locking == Locking::Auto =>
                    {
                        tracing::warn!(path = self.path, %error, "the file cannot be locked");
                        Ok(())
                    }
                    _ => Err(error),
                }
            }
        }
    }

    /// Waits until nobody else writes the file or keeps others from writing it: a killed
    /// predecessor's locks go when the kernel has finished with its ring. Gives up after
    /// [`PATIENCE`], and leaves it to [`Locks::set`] to say what is in the way.
    pub async fn settle(&self, file: &File) {
        let Some(fd) = file.as_fd().filter(|_| self.locking != Locking::Off) else {
            return;
        };
        let writer = Held {
            used: WRITE,
            not_shared: WRITE,
        };
        let begin = time::now();
        let mut backoff = Backoff::new(LOOK_AGAIN);
        // A file that cannot be locked is not waited for.
        let busy = || {
            writer
                .bytes()
                .any(|byte| is_held_elsewhere(fd, byte) == Ok(true))
        };
        while busy() && time::now().saturating_sub(begin) < PATIENCE {
            backoff.pause().await;
        }
    }

    /// Gives everything back.
    pub fn release(&self, file: &File) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(fd) = file.as_fd() {
            release(fd, *held);
        }
        *held = Held::default();
    }

    fn check(&self, fd: BorrowedFd<'_>, added: Held) -> Result<()> {
        for (bit, name) in added.used.named() {
            if is_held_elsewhere(fd, NOT_SHARED + bit).map_err(failed)? {
                return Err(self.refused(format!("Failed to get \"{name}\" lock")));
            }
        }
        for (bit, name) in added.not_shared.named() {
            if is_held_elsewhere(fd, USED + bit).map_err(failed)? {
                return Err(self.refused(format!("Failed to get shared \"{name}\" lock")));
            }
        }
        Ok(())
    }

    fn refused(&self, message: String) -> Error {
        Error::new(ErrorKind::Busy, message).with_hint(format!(
            "Is another process using the image [{}]?",
            self.path
        ))
    }
}

fn range(kind: libc::c_int, byte: u64) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte.cast_signed(),
        l_len: 1,
        l_pid: 0,
    }
}

fn failed(errno: Errno) -> Error {
    Error::io("Failed to lock the file", errno)
}

fn take(fd: BorrowedFd<'_>, added: Held) -> Result<()> {
    for byte in added.bytes() {
        let lock = range(libc::F_RDLCK, byte);
        fcntl(fd, FcntlArg::F_OFD_SETLK(&lock)).map_err(failed)?;
    }
    Ok(())
}

fn release(fd: BorrowedFd<'_>, gone: Held) {
    for byte in gone.bytes() {
        let lock = range(libc::F_UNLCK, byte);
        if let Err(errno) = fcntl(fd, FcntlArg::F_OFD_SETLK(&lock)) {
            tracing::warn!(%errno, byte, "could not unlock");
        }
    }
}

/// Whether another open file description holds a lock on `byte`: a write lock would not be
/// granted.
fn is_held_elsewhere(fd: BorrowedFd<'_>, byte: u64) -> std::result::Result<bool, Errno> {
    let mut lock = range(libc::F_WRLCK, byte);
    fcntl(fd, FcntlArg::F_OFD_GETLK(&mut lock))?;
    Ok(libc::c_int::from(lock.l_type) != libc::F_UNLCK)
}
