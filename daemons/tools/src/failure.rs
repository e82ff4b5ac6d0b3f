//! How commands fail, and the one place where messages get their prefix.

use std::ffi::OsString;
use std::path::Path;
use std::sync::OnceLock;

static PROGRAM: OnceLock<String> = OnceLock::new();

/// The exit code of a command.
pub type Outcome = Result<u8, Failure>;

/// Why a command ends early.
#[derive(Debug)]
pub enum Failure {
    /// The command line is wrong: says so, and where to find help.
    Usage(String),
    /// Lines for stderr, the first with the program's name before it, and the exit code.
    Message(String, u8),
    /// Everything has been said; the exit code.
    Silent(u8),
}

impl Failure {
    /// A mistake on the command line.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::Usage(message.into())
    }
    /// A failure with exit code 1.
    pub fn message(message: impl Into<String>) -> Self {
        Self::Message(message.into(), 1)
    }
    /// An error of the block layer, with what it is about before it.
    pub fn block(context: &str, error: &block::Error) -> Self {
        Self::message(described(context, error))
    }
    /// The same failure with another exit code.
    pub fn with_code(self, code: u8) -> Self {
        match self {
            Self::Message(message, _) => Self::Message(message, code),
            other => other,
        }
    }
    /// Says it, and gives the exit code.
    pub fn report(self) -> u8 {
        match self {
            Self::Usage(message) => {
                report(&message);
                eprintln!("Try '{} --help' for more information", program());
                1
            }
            Self::Message(message, code) => {
                report(&message);
                code
            }
            Self::Silent(code) => code,
        }
    }
}

/// `context: error`, with the error's advice on lines of its own.
pub fn described(context: &str, error: &block::Error) -> String {
    let separator = if context.is_empty() { "" } else { ": " };
    let hint = error.hint.as_deref().map(|hint| format!("\n{hint}"));
    format!(
        "{context}{separator}{}{}",
        error.message,
        hint.unwrap_or_default()
    )
}

/// Remembers what the program was called; `default` when its first argument does not say.
pub fn set_program(argument: Option<OsString>, default: &str) {
    let name = argument
        .as_deref()
        .and_then(|path| Path::new(path).file_name());
    let name = name.map_or(default.to_owned(), |name| name.to_string_lossy().into());
    PROGRAM.get_or_init(|| name);
}

/// What the program was called.
pub fn program() -> &'static str {
    PROGRAM.get().map_or("outboard", String::as_str)
}

/// An error line.
pub fn report(message: &str) {
    eprintln!("{}: {message}", program());
}

/// A warning line.
pub fn warn(message: &str) {
    report(&format!("warning: {message}"));
}
