//! When and how to dial a back-end that is not there: a watch on the socket's directory and a growing delay.
//!
//! Three things can bring a back-end back: its socket file appears (the watch sees it), it begins to listen on a file that
//! exists already (only trying shows it, hence the delay), or it never went because a supervisor keeps the socket.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};

use super::wire::Link;
use crate::events::Notifier;

/// Grows from one failed attempt to the next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Backoff {
    failures: u32,
}

impl Backoff {
    const FIRST: Duration = Duration::from_millis(2);
    const AWAY_MAX: Duration = Duration::from_millis(50);
    const REFUSED: Duration = Duration::from_secs(1);

    /// How long to wait after nobody answered.
    pub(super) fn after_absence(&mut self) -> Duration {
        let delay = Self::FIRST * (1 << self.failures.min(5));
        self.failures = self.failures.saturating_add(1);
        delay.min(Self::AWAY_MAX)
    }

    /// How long to wait after a back-end turned out not to fit: somebody has to act first.
    pub(super) fn after_refusal(self) -> Duration {
        Self::REFUSED
    }

    /// The back-end is there.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }
}

/// Knows where the back-end listens.
pub(super) struct Dialer {
    path: PathBuf,
    address: UnixAddr,
    watch: Inotify,
    wake: Arc<Notifier>,
}

impl Dialer {
    /// Prepares to dial `path`; its directory must exist.
    pub(super) fn new(path: &Path, wake: Arc<Notifier>) -> Result<Self> {
        let address = UnixAddr::new(path).context("the path is too long for a socket")?;
        let watch = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)
            .context("watch on the socket's directory")?;
        let directory = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let appears = AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO;
        watch
            .add_watch(directory, appears)
            .with_context(|| format!("watch on the directory {}", directory.display()))?;
        Ok(Self {
            path: path.to_owned(),
            address,
            watch,
            wake,
        })
    }

    /// Tries to connect.
    pub(super) fn dial(&self) -> std::result::Result<Link, Errno> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
        connect(socket.as_raw_fd(), &self.address)?;
        Ok(Link::new(UnixStream::from(socket), self.wake.clone()))
    }

    /// Reads what the watch has seen; returns whether that was the socket.
    pub(super) fn socket_appeared(&self) -> bool {
        let mut appeared = false;
        while let Ok(events) = self.watch.read_events() {
            appeared |= events
                .iter()
                .any(|event| event.name.as_deref() == self.path.file_name());
        }
        appeared
    }

    /// Readable when something appeared beside the socket.
    pub(super) fn watch(&self) -> BorrowedFd<'_> {
        self.watch.as_fd()
    }

    /// Raised when the worker has an order.
    pub(super) fn wake(&self) -> &Notifier {
        &self.wake
    }

    /// Where the back-end listens.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_delay_grows_to_its_bound_and_starts_again() {
        let mut backoff = Backoff::default();
        let delays: Vec<_> = (0..8)
            .map(|_| backoff.after_absence().as_millis())
            .collect();
        assert_eq!(delays, [2, 4, 8, 16, 32, 50, 50, 50]);
        backoff.clear();
        assert_eq!(backoff.after_absence().as_millis(), 2);
    }

    #[test]
    fn a_missing_back_end_is_an_error_and_its_arrival_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.sock");
        let dialer = Dialer::new(&path, Arc::new(Notifier::new().unwrap())).unwrap();
        assert_eq!(dialer.dial().err(), Some(Errno::ENOENT));
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert!(dialer.socket_appeared());
        assert!(dialer.dial().is_ok());
        std::fs::write(dir.path().join("other"), "").unwrap();
        assert!(!dialer.socket_appeared());
    }

    #[test]
    fn a_path_that_no_socket_can_have_is_refused() {
        let path = "/".to_owned() + &"x".repeat(200);
        assert!(Dialer::new(Path::new(&path), Arc::new(Notifier::new().unwrap())).is_err());
    }
}
