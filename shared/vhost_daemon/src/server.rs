//! Getting and keeping a front-end: listening, connecting, socket activation, reconnect.
//!
//! ```text
//!   Listen:  bind ──> accept ──> session ──ends──> accept ...   (others wait in the backlog)
//!   Connect: connect ──ok──> session ──ends──┐
//!               ▲   └─fails─> back-off ──────┤
//!               └────────────────────────────┘
//! ```
//!
//! Promises: one session at a time, and the next begins only after every queue of the last has
//! drained. The device outlives its front-ends.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

/// Where the front-end is met.
#[derive(Debug)]
pub enum Address {
    /// Listen on a unix socket at this path.
    Listen(PathBuf),
    /// Accept on a socket that listens already (systemd socket activation, `addr.type=fd`).
    ListenFd(OwnedFd),
    /// Connect to a listening front-end, again and again until it is there.
    Connect(PathBuf),
}
