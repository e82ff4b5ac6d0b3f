//! `type=passt`: a network without privileges, made by a `passt` process that is started and supervised here.
//!
//! ```text
//!   outboard-netd (sandboxed) ◄── connected sockets (SCM_RIGHTS) ── keeper ── starts, waits for, ends ──> passt
//!         │    control socket: closed when this process ends ──────────┘                                   │
//!         └────────────────────────── frames with lengths (`stream`) ──────────────────────────────────────┘
//! ```
//!
//! A sandboxed daemon can start no process. So a second process of the same program, the keeper, is started before: it starts
//! passt with one end of a socket pair and sends the other end here, and does the same again, after a pause that grows, when
//! passt has ended. It takes no orders: all that it ever hears from here is that this process, or the back-end, is gone. Then
//! it ends passt and itself.
//!
//! While there is no passt, frames for the network are dropped.

mod keeper;
#[cfg(test)]
mod tests;

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;

pub use self::keeper::run_as_keeper;
use super::Context;
use super::stream::{Source, Stream};
use crate::link::Offloads;
use crate::netdev::{Attachment, Netdev, QueueMaker};

/// Options of `type=passt`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct PasstOptions {
    /// The program; absent: `passt`, looked for in `$PATH`.
    pub path: Option<String>,
    /// Its arguments besides `--foreground` and `--fd`.
    pub args: Vec<String>,
}

/// The back-end: a stream whose peer is a process of its own.
pub struct Passt {
    stream: Stream,
    keeper: Child,
    /// The keeper's control socket, to end it with.
    control: UnixStream,
}

impl Passt {
    /// Starts passt.
    ///
    /// # Errors
    /// A program that cannot be started; a daemon that is in its sandbox already.
    pub fn open(options: &PasstOptions, context: &Context<'_>) -> Result<Passt> {
        // The program may have been replaced on disk: this is the one that runs.
        let mut keeper = Command::new("/proc/self/exe");
        keeper.arg0(keeper::NAME);
        Self::open_with(keeper, options, context)
    }

    /// As [`Passt::open`], with another program as the keeper; it gets the arguments of [`keeper::run`].
    fn open_with(
        mut keeper: Command,
        options: &PasstOptions,
        context: &Context<'_>,
    ) -> Result<Passt> {
        let (control, theirs) = UnixStream::pair().context("cannot make a socket pair")?;
        let program = options.path.as_deref().unwrap_or("passt");
        keeper.arg(program).args(&options.args);
        keeper.stdin(Stdio::from(std::os::fd::OwnedFd::from(theirs)));
        keeper.stdout(Stdio::null());
        // Not ended by what is typed at a terminal: it goes after this process.
        keeper.process_group(0);
        let keeper = keeper.spawn().map_err(|error| {
            let advice = match error.kind() {
                io::ErrorKind::PermissionDenied => {
                    " (in the sandbox no process can be started: name passt on the command line)"
                }
                _ => "",
            };
            anyhow::Error::new(error).context(format!("cannot start a process{advice}"))
        })?;
        // Dropping it ends the keeper, whatever happens below.
        let kept = control.try_clone();
        let mut keeper = Keeper(Some(keeper));
        let first = match keeper::first_answer(&control) {
            Ok(Ok(first)) => first,
            Ok(Err(why)) => bail!("cannot start '{program}': {why}"),
            Err(error) => {
                return Err(
                    anyhow::Error::new(error).context("the keeper of passt does not answer")
                );
            }
        };
        let source = Source::Helper {
            first: Some(executor::net::Stream::from_fd(first)?),
            helper: executor::net::Stream::from_fd(control.into())?,
        };
        Ok(Passt {
            stream: Stream::new("passt", source, context),
            control: kept.context("cannot duplicate a socket")?,
            keeper: keeper.0.take().expect("it was put in above"),
        })
    }
}

/// A keeper that is waited for when it is not to be used.
struct Keeper(Option<Child>);

impl Drop for Keeper {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            end(child);
        }
    }
}

/// Waits for a keeper that has been told to end.
fn end(child: &mut Child) {
    if let Err(error) = child.wait() {
        tracing::warn!(%error, "cannot wait for the keeper of passt");
    }
}

impl Drop for Passt {
    fn drop(&mut self) {
        // Whoever else holds this socket: the keeper sees its end.
        if let Err(error) = self.control.shutdown(Shutdown::Both) {
            tracing::debug!(%error, "the keeper of passt has ended before");
        }
        end(&mut self.keeper);
    }
}

impl Netdev for Passt {
    fn kind(&self) -> &'static str {
        self.stream.kind()
    }

    fn max_queues(&self) -> Option<u16> {
        self.stream.max_queues()
    }

    fn host_offloads(&self) -> Offloads {
        self.stream.host_offloads()
    }

    fn guest_offloads(&self) -> Offloads {
        self.stream.guest_offloads()
    }

    fn attach(&self, port: &Attachment, index: u16) -> io::Result<QueueMaker> {
        self.stream.attach(port, index)
    }

    fn details(&self) -> serde_json::Map<String, serde_json::Value> {
        let mut details = self.stream.details();
        details.insert("keeper-pid".to_owned(), self.keeper.id().into());
        details
    }
}
