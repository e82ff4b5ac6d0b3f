//! A tool's start and end.

use crate::failure::{self, Failure, Outcome};
use crate::image::Tool;
use crate::output;
use executor::{Config, Executor};
use std::process::ExitCode;
use tracing_subscriber::fmt::format;

/// A whole run: names the program for its messages (`name` unless its first argument says another),
/// runs `run` on the arguments, reports its failure.
pub fn main(name: &str, run: impl FnOnce(Vec<String>) -> Outcome) -> ExitCode {
    failure::set_program(std::env::args_os().next(), name);
    log_warnings();
    let code = arguments().and_then(run);
    let code = code.unwrap_or_else(Failure::report);
    output::flush();
    ExitCode::from(code)
}

/// Runs `work` on an executor of its own with no image open, and closes what it leaves open.
///
/// # Errors
///
/// Those of `work`, then those of closing.
pub fn with_tool(work: impl AsyncFnOnce(&Tool) -> Outcome) -> Outcome {
    with_executor(&Config::default(), work)
}

/// The same on an executor that is set up by `config`.
///
/// # Errors
///
/// As above.
pub fn with_executor(config: &Config, work: impl AsyncFnOnce(&Tool) -> Outcome) -> Outcome {
    let failed = |error| Failure::message(format!("Could not start: {error}"));
    let executor = Executor::new(config).map_err(failed)?;
    executor.block_on(async {
        let tool = Tool::new();
        let outcome = work(&tool).await;
        let closed = tool.close().await;
        let code = outcome?;
        closed.map(|()| code)
    })
}

/// The arguments after the program's name.
fn arguments() -> Result<Vec<String>, Failure> {
    let mut arguments = Vec::new();
    for argument in std::env::args_os().skip(1) {
        let text = argument.into_string();
        arguments.push(
            text.map_err(|raw| Failure::message(format!("{}: not valid UTF-8", raw.display())))?,
        );
    }
    Ok(arguments)
}

/// Errors of all libraries but those that a failed read tells too, and what formats repair by themselves.
const TOLD: &str = "error,formats::qcow2::compressed=off,formats::qcow2::open=warn";

/// What the libraries report goes to stderr, the messages alone; `RUST_LOG` changes how much that is.
fn log_warnings() {
    use tracing_subscriber::EnvFilter;
    let directives = std::env::var("RUST_LOG").unwrap_or_else(|_| TOLD.to_owned());
    let filter = EnvFilter::try_new(directives).unwrap_or_else(|_| EnvFilter::new(TOLD));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .fmt_fields(format::debug_fn(|writer, field, value| {
            match field.name() == "message" {
                true => write!(writer, "{value:?}"),
                false => Ok(()),
            }
        }))
        .with_ansi(false)
        .with_level(false)
        .without_time()
        .with_target(false)
        .init();
}
