//! The commands: their table, how a line becomes a call, what they answer.

use crate::session::Session;
use crate::{asynchronous, breakpoints, control, files, requests, status};
use std::future::Future;
use std::pin::Pin;
use tools::failure::report;
use tools::output;

/// Why a command failed. What is to be said about it is said in [`Problem::report`] alone.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Problem {
    /// A line on stdout.
    Line(String),
    /// A line on stderr, as it is.
    Plain(String),
    /// A line on stderr after the program's name.
    Error(String),
    /// A bad option: a line on stderr, and how the command is called.
    Option(String),
    /// How the command is called.
    Usage,
    /// It was said already, or goes without saying.
    Said,
}

impl Problem {
    /// A line on stdout.
    pub(crate) fn line(text: impl Into<String>) -> Self {
        Self::Line(text.into())
    }
    /// An error of the block layer, with its advice on lines of its own.
    pub(crate) fn block(context: &str, error: &block::Error) -> Self {
        Self::Error(tools::failure::described(context, error))
    }

    fn report(&self, command: &Command) {
        match self {
            Self::Line(text) => output::line(text),
            Self::Plain(text) => eprintln!("{text}"),
            Self::Error(text) => report(text),
            Self::Option(text) => {
                eprintln!("{text}");
                output::line(&command.summary());
            }
            Self::Usage => output::line(&command.summary()),
            Self::Said => {}
        }
    }
}

/// What a command answers.
pub(crate) type Answer = Result<(), Problem>;

/// A command at work.
pub(crate) type Running<'a> = Pin<Box<dyn Future<Output = Answer> + 'a>>;

/// What a command needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Needs {
    /// Nothing.
    Nothing,
    /// An open file.
    File,
    /// An open file that may be written to.
    Write,
    /// An open file that may be written to and get another length.
    Resize,
}

/// One command.
pub(crate) struct Command {
    /// Its names.
    pub(crate) names: &'static [&'static str],
    /// Options and operands.
    pub(crate) syntax: Option<&'static str>,
    /// What it does, in a few words.
    pub(crate) about: &'static str,
    /// More about it; may be empty.
    pub(crate) help: &'static str,
    /// Fewest and most words after the name.
    pub(crate) words: (usize, Option<usize>),
    /// What must be there.
    pub(crate) needs: Needs,
    /// Runs it on the words after its name.
    pub(crate) run: for<'a> fn(&'a Session<'_>, &'a [&'a str]) -> Running<'a>,
}

impl Command {
    /// `name syntax -- about`
    pub(crate) fn summary(&self) -> String {
        let syntax = self.syntax.map_or(String::new(), |text| format!(" {text}"));
        format!("{}{syntax} -- {}", self.names[0], self.about)
    }

    fn check_count(&self, name: &str, count: usize) -> Answer {
        let (fewest, most) = self.words;
        if count >= fewest && most.is_none_or(|most| count <= most) {
            return Ok(());
        }
        let expected = match most {
            None => format!("at least {fewest} arguments"),
            Some(most) if most == fewest => format!("{fewest} arguments"),
            Some(most) => format!("between {fewest} and {most} arguments"),
        };
        Err(Problem::Plain(format!(
            "bad argument count {count} to {name}, expected {expected}"
        )))
    }

    async fn call(&self, session: &Session<'_>, name: &str, words: &[&str]) -> Answer {
        if self.needs != Needs::Nothing && session.image().is_none() {
            return Err(Problem::Plain("no file open, try 'help open'".to_owned()));
        }
        self.check_count(name, words.len())?;
        if let Some(image) = session.image() {
            image.permit(self.needs)?;
        }
        (self.run)(session, words).await
    }
}

/// Every command, by name.
pub(crate) const COMMANDS: &[&Command] = &[
    &control::ABORT,
    &asynchronous::FLUSH,
    &asynchronous::READ,
    &asynchronous::WRITE,
    &status::ALLOC,
    &breakpoints::BREAK,
    &files::CLOSE,
    &requests::DISCARD,
    &requests::FLUSH,
    &control::HELP,
    &status::INFO,
    &status::LENGTH,
    &status::MAP,
    &files::OPEN,
    &control::QUIT,
    &requests::READ,
    &requests::READV,
    &breakpoints::REMOVE,
    &files::REOPEN,
    &breakpoints::RESUME,
    &control::SIGRAISE,
    &control::SLEEP,
    &files::TRUNCATE,
    &breakpoints::WAIT,
    &requests::WRITE,
    &requests::WRITEV,
];

/// The command called `name`.
pub(crate) fn find(name: &str) -> Option<&'static Command> {
    let mut commands = COMMANDS.iter().copied();
    commands.find(|command| command.names.contains(&name))
}

/// Whether a line did what it asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It did, or was empty.
    Done,
    /// It did not, and said so.
    Failed,
}

impl Verdict {
    /// Both.
    pub(crate) fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Done, Self::Done) => Self::Done,
            _ => Self::Failed,
        }
    }
}

/// Runs one line.
pub(crate) async fn run(session: &Session<'_>, line: &str) -> Verdict {
    let words: Vec<&str> = line.split(' ').filter(|word| !word.is_empty()).collect();
    let Some((name, words)) = words.split_first() else {
        return Verdict::Done;
    };
    let Some(command) = find(name) else {
        eprintln!("command \"{name}\" not found");
        return Verdict::Failed;
    };
    match command.call(session, name, words).await {
        Ok(()) => Verdict::Done,
        Err(problem) => {
            problem.report(command);
            Verdict::Failed
        }
    }
}
