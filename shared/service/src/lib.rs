//! What a daemon is apart from what it serves.
//!
//! ```text
//!   command line ──> daemonize? ──> options in order ──> pid file ──> sandbox ──> ready
//!                                                                                  │
//!        exit <── sockets removed <── daemon shut down <── daemon stopped <── quit, SIGTERM
//! ```
//!
//! A daemon implements [`Daemon`] and its `main` is [`run`]: ordered options and QMP commands go to the daemon, everything else
//! happens here. Options run in the order they are given; each is the command-line spelling of a QMP command. Clients of monitors
//! are served once all options have run.
//!
//! Promises: the same habits in every daemon, those of `qemu-storage-daemon`; errors name the option; a panic of any thread ends
//! the process.
//!
//! Must not know: images, frames, what a command does.

pub mod chardev;
mod command_line;
mod life;
mod monitor;
pub mod objects;
mod pidfile;
pub mod private_dir;
mod race;
mod signals;
mod trace;

pub use chardev::{Chardevs, SocketFile};
pub use command_line::{Options, Step, StepOption};
pub use life::{Daemon, Program, Reach, Start, run};
pub use monitor::Server;
