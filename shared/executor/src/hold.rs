//! Files that stay open as long as the thread's ring has operations: also when the process is killed.
//!
//! ```text
//!   kill -9 ──> descriptors closed ──> the ring's operations end, one by one ──> ring freed ──> held files closed
//! ```
//!
//! A killed process is gone before the kernel has finished what its rings had in flight, and what is in flight may still write to
//! shared memory. A file in the table of a ring is closed after the last of them, so a lock on it tells a successor when that was.
//!
//! Must not know: what the files are.

use crate::runtime::{Backend, Inner, current};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::rc::{Rc, Weak};

/// Keeps a file open in this thread's ring until dropped. `!Send`.
#[derive(Debug)]
#[must_use = "the file is let go when this is dropped"]
pub struct Hold {
    inner: Weak<Inner>,
    slot: u32,
}

/// Puts `file` into the table of the current executor's ring.
///
/// # Errors
/// When the table is full, or the kernel has none. Simulated worlds have nothing to hold and no error.
///
/// # Panics
/// Outside of an executor.
pub fn hold_open(file: BorrowedFd<'_>) -> io::Result<Hold> {
    let inner = current();
    let slot = match &inner.backend {
        Backend::Ring(ring) => ring.borrow_mut().hold(file.as_raw_fd())?,
        Backend::Sim(_) => 0,
    };
    Ok(Hold {
        inner: Rc::downgrade(&inner),
        slot,
    })
}

impl Drop for Hold {
    fn drop(&mut self) {
        if let Some(inner) = self.inner.upgrade()
            && let Backend::Ring(ring) = &inner.backend
        {
            ring.borrow_mut().let_go(self.slot);
        }
    }
}
