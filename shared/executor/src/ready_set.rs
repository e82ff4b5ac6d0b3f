//! Readiness of descriptors that a library owns, opens and closes as it likes.
//!
//! ```text
//!   library: "tell me when 7 is readable" ──► watch ──► epoll ◄── one poll of the ring
//! ```
//!
//! The executor's own streams transfer through the ring and need none of this. A library that does its
//! own transfers only says which numbers it waits for; epoll forgets a descriptor that is closed, so
//! nothing keeps a connection open that the library has ended. System calls: `epoll_create1`,
//! `epoll_ctl`, `epoll_wait`.

#![expect(
    unsafe_code,
    reason = "descriptors of a library are known by number only"
)]

use crate::Errno;
use crate::net::poll_fd;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use std::os::fd::{AsFd, BorrowedFd, RawFd};

/// Descriptors that one wait reports.
const BATCH: usize = 32;

/// What a descriptor is waited for, or is ready for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Readiness {
    /// Data can be received.
    pub readable: bool,
    /// Data can be sent.
    pub writable: bool,
    /// It failed, or the peer is gone. Always waited for.
    pub broken: bool,
}

/// Descriptors, and what each is waited for.
pub struct ReadySet {
    epoll: Epoll,
}

impl ReadySet {
    /// An empty set.
    ///
    /// # Errors
    /// Those of `epoll_create1`.
    pub fn new() -> Result<Self, Errno> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        Ok(Self { epoll })
    }

    /// Waits for `wanted` on a descriptor from now on, and for nothing else.
    ///
    /// # Errors
    /// Those of `epoll_ctl`: no such descriptor, or one that is always ready.
    ///
    /// # Panics
    /// When the number is -1.
    pub fn watch(&self, descriptor: RawFd, wanted: Readiness) -> Result<(), Errno> {
        let mut flags = EpollFlags::empty();
        flags.set(EpollFlags::EPOLLIN, wanted.readable);
        flags.set(EpollFlags::EPOLLOUT, wanted.writable);
        let mut event = EpollEvent::new(flags, u64::from(descriptor.cast_unsigned()));
        // SAFETY: borrowed for the two calls only; the kernel refuses a number that is not open.
        let borrowed = unsafe { BorrowedFd::borrow_raw(descriptor) };
        match self.epoll.modify(borrowed, &mut event) {
            Err(Errno::ENOENT) => self.epoll.add(borrowed, event),
            result => result,
        }
    }

    /// Waits for nothing on a descriptor; one that is closed already is no error.
    pub fn forget(&self, descriptor: RawFd) {
        // SAFETY: borrowed for the call only; the kernel refuses a number that is not open.
        let borrowed = unsafe { BorrowedFd::borrow_raw(descriptor) };
        // Closing has removed it.
        let _ = self.epoll.delete(borrowed);
    }

    /// Waits until a descriptor is ready; some of those that are.
    ///
    /// # Errors
    /// Those of the ring's poll and of `epoll_wait`.
    pub async fn ready(&self) -> Result<Vec<(RawFd, Readiness)>, Errno> {
        poll_fd(self.epoll.0.as_fd(), libc::POLLIN).await?;
        let mut events = [EpollEvent::empty(); BATCH];
        let count = self.epoll.wait(&mut events, EpollTimeout::ZERO)?;
        Ok(events[..count].iter().map(readiness).collect())
    }
}

fn readiness(event: &EpollEvent) -> (RawFd, Readiness) {
    let seen = event.events();
    let readiness = Readiness {
        readable: seen.contains(EpollFlags::EPOLLIN),
        writable: seen.contains(EpollFlags::EPOLLOUT),
        broken: seen.intersects(EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP),
    };
    (event.data() as RawFd, readiness)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Config, Executor, time};
    use std::io::Write;
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    const READABLE: Readiness = Readiness {
        readable: true,
        writable: false,
        broken: false,
    };

    #[test]
    fn what_is_watched_is_reported_until_it_is_forgotten() {
        let executor = Executor::new(&Config::default()).unwrap();
        executor.block_on(async {
            let (near, mut far) = UnixStream::pair().unwrap();
            let set = ReadySet::new().unwrap();
            let number = near.as_raw_fd();
            let writable = Readiness {
                writable: true,
                ..Readiness::default()
            };
            set.watch(number, writable).unwrap();
            assert_eq!(set.ready().await, Ok(vec![(number, writable)]));
            set.watch(number, READABLE).unwrap();
            far.write_all(b"x").unwrap();
            assert_eq!(set.ready().await, Ok(vec![(number, READABLE)]));
            set.forget(number);
            let moment = Duration::from_millis(20);
            assert_eq!(time::timeout(moment, set.ready()).await, None);
        });
    }

    #[test]
    fn a_descriptor_that_was_closed_is_no_error_to_forget_and_one_to_watch() {
        let (near, _far) = UnixStream::pair().unwrap();
        let number = near.as_raw_fd();
        let set = ReadySet::new().unwrap();
        set.watch(number, READABLE).unwrap();
        drop(near);
        set.forget(number);
        assert_eq!(set.watch(RawFd::MAX, READABLE), Err(Errno::EBADF));
    }
}
