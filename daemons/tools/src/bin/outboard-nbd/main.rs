//! `outboard-nbd`: serves an image over NBD, or lists what a server offers.
//!
//! ```text
//!   argv ──getopt──► options::Command ──┬─ Serve ─► image ─► exports::nbd::NbdServer
//!                                       ├─ List ──► client ─► text
//!                                       └─ Connect, Disconnect: the kernel's client
//! ```
//!
//! Command lines, output and exit codes are those of qemu-nbd 7.2. `--fork` forks before anything else happens: the parent ends when
//! the server listens, or failed.

mod address;
mod client;
mod help;
mod image;
mod kernel;
mod list;
mod options;
mod serve;

use options::Command;
use std::process::ExitCode;
use tools::failure::{Failure, Outcome};
use tools::start;
use vhost_daemon::notify::{Background, Daemonized, daemonize};

fn main() -> ExitCode {
    start::main("outboard-nbd", run)
}

fn run(arguments: Vec<String>) -> Outcome {
    match options::parse(arguments)? {
        Command::Help => Ok(help::show()),
        Command::Version => Ok(help::version()),
        Command::ObjectHelp(text) => Ok(help::print(&text)),
        Command::Disconnect(device) => kernel::disconnect(&device),
        Command::List(options) => start::with_tool(async |tool| list::run(tool, &options).await),
        Command::Serve(options) => {
            let background = match options.fork {
                false => None,
                true => match fork()? {
                    None => return Ok(0),
                    background => background,
                },
            };
            start::with_tool(async |tool| serve::run(tool, &options, background).await)
        }
    }
}

/// The daemon's part, or `None` in the parent of one that got ready.
fn fork() -> Result<Option<Background>, Failure> {
    let failed = |error| Failure::message(format!("Failed to fork: {error}"));
    match daemonize().map_err(failed)? {
        Daemonized::Child(background) => Ok(Some(background)),
        Daemonized::Parent { ready: true } => Ok(None),
        // The daemon has said why.
        Daemonized::Parent { ready: false } => Err(Failure::Silent(1)),
    }
}
