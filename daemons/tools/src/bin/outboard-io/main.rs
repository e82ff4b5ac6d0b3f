//! `outboard-io`: reads, writes and torments disk images, one command after the other.
//!
//! ```text
//!   argv ──> options ──> open ──> Session
//!   -c strings, or lines of stdin ──> command::run ──> COMMANDS ──> RootHandle of the open file
//!                                                        │
//!                 stdout, buffered as C does (output) ◄──┴──► stderr
//! ```
//!
//! Command lines, output and exit codes are those of qemu-io 7.2. The requests are the daemons' own,
//! on an executor's `block_on`; those of `aio_*` run beside the commands that follow.
//!
//! A new command is a constant in one of the modules and a line in [`command::COMMANDS`].

mod arguments;
mod asynchronous;
mod breakpoints;
mod command;
mod control;
mod files;
mod help;
mod input;
mod open;
mod reopen;
mod report;
mod requests;
mod session;
mod status;
mod temporary;

use command::Verdict;
use open::OpenArguments;
use session::Session;
use std::process::ExitCode;
use tools::failure::{Failure, Outcome, report};
use tools::getopt::{self, Opt};
use tools::image::{Notation, Tool};
use tools::start;

const OPTIONS: &[Opt] = &[
    Opt::flag(&["h", "help"]),
    Opt::flag(&["V", "version"]),
    Opt::value(&["c", "cmd"]),
    Opt::value(&["f", "format"]),
    Opt::flag(&["r", "read-only"]),
    Opt::flag(&["s", "snapshot"]),
    Opt::flag(&["n", "nocache"]),
    Opt::flag(&["C", "copy-on-read"]),
    Opt::flag(&["m", "misalign"]),
    Opt::flag(&["k", "native-aio"]),
    Opt::value(&["i", "aio"]),
    Opt::value(&["t", "cache"]),
    Opt::value(&["d", "discard"]),
    Opt::value(&["T", "trace"]),
    Opt::flag(&["U", "force-share"]),
    Opt::flag(&["image-opts"]),
    Opt::value(&["object"]),
    Opt::value(&["allow-dir"]),
];

fn main() -> ExitCode {
    start::main("outboard-io", run)
}

/// What the command line asks for.
#[derive(Default)]
struct Invocation {
    commands: Vec<String>,
    objects: Vec<String>,
    directories: Vec<String>,
    notation: Notation,
    open: OpenArguments,
}

fn run(arguments: Vec<String>) -> Outcome {
    let parsed = match getopt::parse(arguments, OPTIONS) {
        Ok(parsed) => parsed,
        Err(Failure::Usage(message)) => {
            report(&message);
            help::show();
            return Ok(1);
        }
        Err(other) => return Err(other),
    };
    let mut invocation = Invocation::default();
    for (name, value) in parsed.options {
        match name {
            "h" => return Ok(help::show()),
            "V" => return Ok(help::version()),
            "c" => invocation.commands.push(value),
            "f" => invocation.open.format = Some(value),
            "object" => invocation.objects.push(value),
            "allow-dir" => invocation.directories.push(value),
            "image-opts" => invocation.notation = Notation::Options,
            // The memory of requests is aligned as it is needed; tracing is by RUST_LOG.
            "m" | "T" => {}
            letter => {
                let letter = letter.chars().next().unwrap_or_default();
                invocation.open.take(letter, &value)?;
            }
        }
    }
    let mut operands = parsed.operands.into_iter();
    let file = operands.next();
    if operands.next().is_some() {
        help::show();
        return Ok(1);
    }
    if invocation.notation == Notation::Options && invocation.open.format.is_some() {
        let message = "--image-opts and -f are mutually exclusive";
        return Err(Failure::message(message));
    }
    let with_file = file.is_some();
    if let Some(file) = file {
        invocation.open.name(file, invocation.notation);
    }
    start::with_tool(async |tool| invocation.perform(tool, with_file).await)
}

impl Invocation {
    async fn perform(&self, tool: &Tool, with_file: bool) -> Outcome {
        for directory in &self.directories {
            tool.allow_dir(directory.as_ref());
        }
        for definition in &self.objects {
            tool.add_object(definition)?;
        }
        let session = Session::new(tool, self.notation);
        if with_file && open::open(&session, &self.open).await.is_err() {
            return Ok(1);
        }
        let verdict = match self.commands.is_empty() {
            true => input::run(&session).await,
            false => self.run_commands(&session).await,
        };
        session.close().await;
        Ok(match verdict {
            Verdict::Done => 0,
            Verdict::Failed => 1,
        })
    }

    async fn run_commands(&self, session: &Session<'_>) -> Verdict {
        let mut verdict = Verdict::Done;
        for line in &self.commands {
            if session.quit.get() {
                break;
            }
            verdict = verdict.and(command::run(session, line).await);
        }
        verdict
    }
}
