//! `outboard-blkd`: the storage daemon.
//!
//! ```text
//!   command line ──> daemonize? ──> options in order ──> pid file ──> sandbox ──> ready
//!                                                                                  │
//!        exit <── sockets removed <── nodes closed <── exports drained <── quit, SIGTERM
//! ```
//!
//! Options run in the order they are given; each is the command-line spelling of a QMP command.
//! Clients of monitors are served once all options have run.

mod chardev;
mod daemon;
mod help;
mod monitor;
mod options;
mod pidfile;
mod race;
mod redo_dir;
mod signals;

use std::io::IsTerminal;
use std::process::ExitCode;

use executor::{Config, Executor};
use tracing_subscriber::EnvFilter;
use vhost_daemon::notify::{self, Background, Daemonized};

use crate::daemon::Daemon;
use crate::options::{CommandLine, Invocation};

/// The program's name in messages.
const PROGRAM: &str = "outboard-blkd";

/// Exit status after a panic.
const PANICKED: i32 = 101;

fn main() -> ExitCode {
    let invocation = match options::parse(std::env::args_os().skip(1)) {
        Ok(invocation) => invocation,
        Err(error) => return fail(&error),
    };
    let command_line = match invocation {
        Invocation::Help => return show(help::HELP),
        Invocation::ObjectHelp => return show(help::OBJECTS),
        Invocation::Version => {
            return show(&format!("{PROGRAM} version {}", env!("CARGO_PKG_VERSION")));
        }
        Invocation::Run(command_line) => command_line,
    };
    match start(*command_line) {
        Ok(code) => code,
        Err(error) => fail(&error),
    }
}

fn start(command_line: CommandLine) -> anyhow::Result<ExitCode> {
    let filter = log_filter(command_line.log_level.as_deref())?;
    // The process id that socket activation names is that of the parent.
    let activation_fds = notify::activation_fds()?;
    let background: Option<Background> = match command_line.daemonize {
        false => None,
        true => match notify::daemonize()? {
            Daemonized::Parent { ready: true } => return Ok(ExitCode::SUCCESS),
            Daemonized::Parent { ready: false } => return Ok(ExitCode::FAILURE),
            Daemonized::Child(background) => Some(background),
        },
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .with_target(false)
        .init();
    end_on_panic();
    let signals = signals::Signals::block()?;
    let executor = Executor::new(&Config::default())?;
    let daemon = Daemon::new(command_line, activation_fds)?;
    executor.block_on(daemon.run(signals, background))?;
    Ok(ExitCode::SUCCESS)
}

/// A queue thread that panics would leave its guest waiting for ever; a successor of the whole
/// process finds the requests in flight and serves them.
fn end_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        std::process::exit(PANICKED);
    }));
}

/// `--log-level`, else `$RUST_LOG`, else information about rare changes of state.
fn log_filter(level: Option<&str>) -> anyhow::Result<EnvFilter> {
    let from_env = std::env::var("RUST_LOG").ok();
    let directives = level.or(from_env.as_deref()).unwrap_or("info");
    EnvFilter::try_new(directives)
        .map_err(|error| anyhow::anyhow!("--log-level {directives}: {error}"))
}

fn show(text: &str) -> ExitCode {
    use std::io::Write;
    // A reader that closes its end early has seen enough.
    let _ = writeln!(std::io::stdout(), "{}", text.trim_end());
    ExitCode::SUCCESS
}

fn fail(error: &anyhow::Error) -> ExitCode {
    eprintln!("{PROGRAM}: {error:#}");
    ExitCode::FAILURE
}
