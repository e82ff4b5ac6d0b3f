//! Control-path errors: what failed, on what, and why.
//!
//! The hot path uses [`executor::Errno`] alone.

use executor::Errno;

/// What kind of failure it is; decides the QMP error class and exit codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// A bad option or combination of options.
    Invalid,
    /// No such node, driver or file.
    NotFound,
    /// In use, locked or blocked by a permission.
    Busy,
    /// The image is malformed.
    Corrupt,
    /// The image uses what this build does not support.
    Unsupported,
    /// Policy forbids it (a name inside an image).
    Forbidden,
    /// The host failed an operation.
    Io,
}

/// A control-path error with its message chain.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// The kind.
    pub kind: ErrorKind,
    /// The whole message, in QEMU's words where scripts read it.
    pub message: String,
    /// The host's error, when there is one.
    pub errno: Option<Errno>,
    /// Advice for a human, on a line of its own (command lines print it, QMP does not).
    pub hint: Option<String>,
}

/// Control-path result.
pub type Result<T> = std::result::Result<T, Error>;

pub use executor::reason;

impl Error {
    /// An error of `kind` with a message.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            errno: None,
            hint: None,
        }
    }
    /// A host error: `message: reason`.
    pub fn io(message: impl std::fmt::Display, errno: Errno) -> Self {
        Self {
            kind: ErrorKind::Io,
            message: format!("{message}: {}", reason(errno)),
            errno: Some(errno),
            hint: None,
        }
    }
    /// The answer of a format that has no check.
    pub fn check_unsupported() -> Self {
        Self::new(
            ErrorKind::Unsupported,
            "This image format does not support checks",
        )
    }
    /// The answer of a driver whose length stays as it is.
    pub fn resize_unsupported() -> Self {
        Self::new(
            ErrorKind::Unsupported,
            "Image format driver does not support resize",
        )
    }
    /// The answer of a driver that has no such operation.
    pub fn operation_unsupported() -> Self {
        Self {
            errno: Some(Errno::EOPNOTSUPP),
            ..Self::new(ErrorKind::Unsupported, reason(Errno::EOPNOTSUPP))
        }
    }
    /// The same error with advice for a human.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
    /// The same error with `context: ` before its message.
    #[must_use]
    pub fn context(mut self, context: impl std::fmt::Display) -> Self {
        self.message = format!("{context}: {}", self.message);
        self
    }
}
