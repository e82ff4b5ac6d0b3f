//! Unix and TCP stream sockets and descriptor readiness on the ring.

use crate::Errno;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

/// A connected stream socket (unix or TCP).
pub struct Stream {}

impl Stream {
    /// Takes over a connected socket.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Stream> {
        todo!()
    }
    /// Connects to a unix socket.
    pub async fn connect_unix(path: &Path) -> Result<Stream, Errno> {
        todo!()
    }
    /// Receives at most `len` bytes; empty at end of stream.
    pub async fn recv(&self, len: usize) -> Result<Vec<u8>, Errno> {
        todo!()
    }
    /// Receives at most `len` bytes and at most `max_fds` descriptors passed along. More
    /// descriptors than that are closed and the result is `EMSGSIZE`.
    pub async fn recv_with_fds(
        &self,
        len: usize,
        max_fds: usize,
    ) -> Result<(Vec<u8>, Vec<OwnedFd>), Errno> {
        todo!()
    }
    /// Sends all of `data`.
    pub async fn send_all(&self, data: Vec<u8>) -> Result<(), Errno> {
        todo!()
    }
    /// Sends all of `data`, passing `fds` with its first byte.
    pub async fn send_with_fds(
        &self,
        data: Vec<u8>,
        fds: &[std::os::fd::BorrowedFd<'_>],
    ) -> Result<(), Errno> {
        todo!()
    }
    /// Shuts both directions down; pending receives end.
    pub fn shutdown(&self) {
        todo!()
    }
}

/// A listening socket.
pub struct Listener {}

impl Listener {
    /// Takes over a bound, listening socket (socket activation).
    pub fn from_fd(fd: OwnedFd) -> io::Result<Listener> {
        todo!()
    }
    /// Binds a unix socket, replacing a stale one that nobody listens on.
    pub fn bind_unix(path: &Path) -> io::Result<Listener> {
        todo!()
    }
    /// The next connection.
    pub async fn accept(&self) -> Result<Stream, Errno> {
        todo!()
    }
}

/// Waits for `events` (`libc::POLLIN`, ...) on a descriptor; resolves to the events seen.
pub async fn poll_fd(fd: std::os::fd::BorrowedFd<'_>, events: i16) -> Result<i16, Errno> {
    todo!()
}
