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
mod bench;
mod bitmap;
mod check;
mod commit;
mod compare;
mod convert;
mod create;
mod dd;
mod help;
mod info;
mod map;
mod measure;
mod rebase;
mod resize;
mod snapshot;
mod text;

use executor::{BufferedWrites, Config};
use std::future::Future;
use std::pin::Pin;
use std::process::ExitCode;
use tools::failure::{Failure, Outcome};
use tools::image::Tool;
use tools::start;

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
    bench::COMMAND,
    bitmap::COMMAND,
    check::COMMAND,
    commit::COMMAND,
    compare::COMMAND,
    convert::COMMAND,
    create::COMMAND,
    dd::COMMAND,
    info::COMMAND,
    map::COMMAND,
    measure::COMMAND,
    rebase::COMMAND,
    resize::COMMAND,
    snapshot::COMMAND,
];

fn main() -> ExitCode {
    start::main("outboard-img", run)
}

fn run(arguments: Vec<String>) -> Outcome {
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
    let config = Config {
        buffered_writes: BufferedWrites::InPlace,
        ..Config::default()
    };
    start::with_executor(&config, async |tool| {
        (command.run)(tool, rest.collect()).await
    })
}
