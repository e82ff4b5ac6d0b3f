//! `outboard-img`: makes, describes and changes image files, offline.
//!
//! ```text
//!   argv ──getopt──> subcommand (a file each) ──> ImageSpec ──> Tool::open ──> Graph of the engine's drivers
//!                         │                                                          │
//!                         └── text or JSON on stdout, "NAME: message" on stderr, exit code
//! ```
//!
//! Command lines, output and exit codes are those of qemu-img 7.2. The commands run the daemons'
//! own code on an executor's `block_on`.
//!
//! A new subcommand is a file with a [`Command`] and a line in [`COMMANDS`].

mod amend;
mod bitmap;
mod check;
mod create;
mod failure;
mod getopt;
mod help;
mod image;
mod info;
mod json;
mod map;
mod options;
mod progress;
mod resize;
mod size;
mod snapshot;
mod text;

use executor::{Config, Executor};
use failure::{Failure, Outcome};
use image::Tool;
use std::future::Future;
use std::pin::Pin;
use std::process::ExitCode;

/// A subcommand.
pub(crate) struct Command {
    /// Its name on the command line.
    pub(crate) name: &'static str,
    /// What follows the name, for `--help`.
    pub(crate) usage: &'static str,
    /// Runs it on the arguments after its name.
    pub(crate) run: for<'a> fn(&'a Tool, Vec<String>) -> Running<'a>,
}

/// A subcommand at work.
pub(crate) type Running<'a> = Pin<Box<dyn Future<Output = Outcome> + 'a>>;

/// Every subcommand, by name.
pub(crate) const COMMANDS: &[Command] = &[
    amend::COMMAND,
    bitmap::COMMAND,
    check::COMMAND,
    create::COMMAND,
    info::COMMAND,
    map::COMMAND,
    resize::COMMAND,
    snapshot::COMMAND,
];

fn main() -> ExitCode {
    failure::set_program(std::env::args_os().next());
    log_warnings();
    match run() {
        Ok(code) => ExitCode::from(code),
        Err(failure) => ExitCode::from(failure.report()),
    }
}

/// What the libraries warn of goes to stderr; `RUST_LOG` changes how much that is.
fn log_warnings() {
    use tracing_subscriber::EnvFilter;
    let directives = std::env::var("RUST_LOG").unwrap_or_else(|_| "error".to_owned());
    let filter = EnvFilter::try_new(directives).unwrap_or_else(|_| EnvFilter::new("error"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .without_time()
        .with_target(false)
        .init();
}

fn run() -> Outcome {
    let mut arguments = Vec::new();
    for argument in std::env::args_os().skip(1) {
        let text = argument.into_string();
        arguments.push(
            text.map_err(|raw| Failure::message(format!("{}: not valid UTF-8", raw.display())))?,
        );
    }
    let mut rest = arguments.into_iter();
    let name = loop {
        match rest.next() {
            None => return Err(Failure::usage("Not enough arguments")),
            Some(option) if ["-h", "--help"].contains(&&*option) => return Ok(help::show()),
            Some(option) if ["-V", "--version"].contains(&&*option) => return Ok(help::version()),
            Some(option) if option == "-T" || option == "--trace" => {
                if rest.next().is_none() {
                    let message = format!("missing argument for option '{option}'");
                    return Err(Failure::usage(message));
                }
            }
            Some(option) if option.starts_with("--trace=") => {}
            Some(option) if option.starts_with('-') && option.len() > 1 => {
                return Err(Failure::usage(format!("unrecognized option '{option}'")));
            }
            Some(name) => break name,
        }
    };
    let Some(command) = COMMANDS.iter().find(|command| command.name == name) else {
        return Err(Failure::usage(format!("Command not found: {name}")));
    };
    let failed = |error| Failure::message(format!("Could not start: {error}"));
    let executor = Executor::new(&Config::default()).map_err(failed)?;
    executor.block_on(async {
        let tool = Tool::new();
        let outcome = (command.run)(&tool, rest.collect()).await;
        let closed = tool.close().await;
        let code = outcome?;
        closed.map(|()| code)
    })
}
