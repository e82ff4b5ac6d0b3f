//! The two ways in which front-end and back-end find each other.

use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Pause between attempts to connect to a socket that nobody listens on yet. A listening socket
/// raises no event for those who want to connect, so VMMs retry as well.
const RETRY: Duration = Duration::from_micros(500);

/// Where the back-end is met.
#[derive(Debug)]
pub enum Endpoint {
    /// The back-end listens on this path.
    Connect(PathBuf),
    /// The front-end listens, the back-end connects, again and again.
    Accept(UnixListener),
}

impl Endpoint {
    /// A connection to the back-end.
    ///
    /// # Errors
    /// When there is none within `limit`.
    pub fn open(&self, limit: Duration) -> Result<UnixStream> {
        match self {
            Self::Connect(path) => {
                let start = Instant::now();
                loop {
                    match UnixStream::connect(path) {
                        Ok(stream) => return Ok(stream),
                        Err(error)
                            if start.elapsed() < limit
                                && matches!(
                                    error.kind(),
                                    ErrorKind::ConnectionRefused | ErrorKind::NotFound
                                ) =>
                        {
                            std::thread::park_timeout(RETRY);
                        }
                        Err(error) => bail!("connecting to {}: {error}", path.display()),
                    }
                }
            }
            Self::Accept(listener) => {
                let mut fds = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
                let ready = poll(&mut fds, PollTimeout::try_from(limit)?)?;
                ensure!(ready > 0, "the back-end did not connect within {limit:?}");
                Ok(listener.accept().context("accept")?.0)
            }
        }
    }
}
