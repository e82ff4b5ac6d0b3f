//! A client's byte stream: a socket, host files, or memory.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use executor::Errno;
use executor::net::{Stream, poll_fd};

use super::ring::Ring;

/// Bytes per read.
const READ_BYTES: usize = 16 << 10;
/// Descriptors that may come with one read.
const MAX_FDS: usize = 16;
/// A pipe that is ready for output takes this many bytes without blocking.
const PIPE_BYTES: usize = 4096;

/// Where bytes come from and go to.
pub(crate) enum Channel {
    /// A unix or TCP socket.
    Socket(Stream),
    /// Standard input and output.
    Stdio,
    /// Files of the host: pipes, terminals, plain files.
    Files {
        /// Nothing ever comes without one.
        input: Option<File>,
        /// Where output goes.
        output: File,
    },
    /// Output is kept for who asks for it; nothing ever comes.
    Ring(Rc<RefCell<Ring>>),
    /// Output goes nowhere; nothing ever comes.
    Null,
}

impl Channel {
    /// The next bytes, empty at the end, and descriptors that came along.
    pub(crate) async fn receive(&self) -> Result<(Vec<u8>, Vec<OwnedFd>), Errno> {
        match self {
            Self::Socket(stream) => stream.recv_with_fds(READ_BYTES, MAX_FDS).await,
            Self::Stdio => read(io::stdin().as_fd()).await,
            Self::Files {
                input: Some(input), ..
            } => read(input.as_fd()).await,
            Self::Files { input: None, .. } | Self::Ring(_) | Self::Null => {
                std::future::pending().await
            }
        }
    }

    /// Sends all of `bytes`.
    pub(crate) async fn send(&self, bytes: Vec<u8>) -> Result<(), Errno> {
        match self {
            Self::Socket(stream) => stream.send_all(bytes).await,
            Self::Stdio => write(io::stdout().as_fd(), &bytes).await,
            Self::Files { output, .. } => write(output.as_fd(), &bytes).await,
            Self::Ring(ring) => {
                ring.borrow_mut().write(&bytes);
                Ok(())
            }
            Self::Null => Ok(()),
        }
    }

    /// Ends a receive that waits.
    pub(crate) fn shut_down(&self) {
        if let Self::Socket(stream) = self {
            stream.shutdown();
        }
    }
}

async fn read(file: BorrowedFd<'_>) -> Result<(Vec<u8>, Vec<OwnedFd>), Errno> {
    poll_fd(file, libc::POLLIN).await?;
    let mut bytes = vec![0; READ_BYTES];
    let length = nix::unistd::read(file, &mut bytes)?;
    bytes.truncate(length);
    Ok((bytes, Vec::new()))
}

async fn write(file: BorrowedFd<'_>, mut bytes: &[u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        poll_fd(file, libc::POLLOUT).await?;
        let chunk = &bytes[..bytes.len().min(PIPE_BYTES)];
        bytes = &bytes[nix::unistd::write(file, chunk)?..];
    }
    Ok(())
}
