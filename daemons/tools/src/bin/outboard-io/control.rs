//! The commands that are about the run itself.

use crate::arguments::{integer, number};
use crate::command::{Answer, COMMANDS, Command, Needs, Problem, Running, find};
use nix::sys::signal::{Signal, raise};
use std::time::Duration;
use tools::output;

/// How many signals there are.
const SIGNALS: u64 = 65;

pub(crate) const ABORT: Command = Command {
    names: &["abort"],
    syntax: None,
    about: "simulate a program crash using abort(3)",
    help: "",
    words: (0, Some(0)),
    needs: Needs::Nothing,
    run: |_, _| -> Running<'_> { Box::pin(async { std::process::abort() }) },
};

pub(crate) const QUIT: Command = Command {
    names: &["quit", "q"],
    syntax: None,
    about: "exit the program",
    help: "",
    words: (0, None),
    needs: Needs::Nothing,
    run: |session, _| -> Running<'_> {
        Box::pin(async {
            session.quit.set(true);
            Ok(())
        })
    },
};

pub(crate) const HELP: Command = Command {
    names: &["help", "?"],
    syntax: Some("[command]"),
    about: "help for one or all commands",
    help: "",
    words: (0, Some(1)),
    needs: Needs::Nothing,
    run: |_, words| -> Running<'_> { Box::pin(async { help(words) }) },
};

pub(crate) const SIGRAISE: Command = Command {
    names: &["sigraise"],
    syntax: Some("signal"),
    about: "raises a signal",
    help: "
 Sends the signal with this number to the program itself.

 Example:
 'sigraise 15' - raises SIGTERM
",
    words: (1, Some(1)),
    needs: Needs::Nothing,
    run: |_, words| -> Running<'_> { Box::pin(async { sigraise(words) }) },
};

pub(crate) const SLEEP: Command = Command {
    names: &["sleep"],
    syntax: None,
    about: "waits for the given value in milliseconds",
    help: "",
    words: (1, Some(1)),
    needs: Needs::Nothing,
    run: |_, words| -> Running<'_> { Box::pin(sleep(words)) },
};

fn help(words: &[&str]) -> Answer {
    let Some(name) = words.first() else {
        for command in COMMANDS {
            output::line(&command.summary());
        }
        output::line("\nUse 'help commandname' for extended help.");
        return Ok(());
    };
    let Some(command) = find(name) else {
        return Err(Problem::line(format!("command {name} not found")));
    };
    output::line(&command.summary());
    if !command.help.is_empty() {
        output::line(command.help);
    }
    Ok(())
}

fn sigraise(words: &[&str]) -> Answer {
    let text = words.first().ok_or(Problem::Usage)?;
    let value = number(text)?;
    if value > SIGNALS {
        return Err(Problem::line(format!(
            "signal argument '{text}' is too large to be a valid signal"
        )));
    }
    // What was printed is to be seen, whatever the signal does.
    output::flush();
    // Zero is no signal, and those that have no name are not raised either.
    if let Ok(signal) = Signal::try_from(value as i32) {
        raise(signal).map_err(|errno| Problem::Error(block::error::reason(errno)))?;
    }
    Ok(())
}

async fn sleep(words: &[&str]) -> Answer {
    let text = words.first().ok_or(Problem::Usage)?;
    let invalid = || Problem::line(format!("{text} is not a valid number"));
    let milliseconds = integer(text).ok_or_else(invalid)?;
    executor::time::sleep(Duration::from_millis(milliseconds)).await;
    Ok(())
}
