//! Signals as something to wait for.

use std::os::fd::AsFd;

use anyhow::Result;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// Signals that ask the daemon to end.
pub(crate) struct Signals {
    set: SigSet,
    fd: SignalFd,
}

impl Signals {
    /// Blocks them in this thread and those it makes. Call it before there are others.
    pub(crate) fn block() -> Result<Self> {
        let set: SigSet = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP]
            .into_iter()
            .collect();
        set.thread_block()?;
        let fd = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        Ok(Self { set, fd })
    }

    /// Waits for the first. A second one then ends the process at once.
    pub(crate) async fn wait(self) -> Result<Signal> {
        loop {
            executor::net::poll_fd(self.fd.as_fd(), libc::POLLIN).await?;
            if let Some(info) = self.fd.read_signal()? {
                self.set.thread_unblock()?;
                return Ok(Signal::try_from(info.ssi_signo as i32)?);
            }
        }
    }
}
