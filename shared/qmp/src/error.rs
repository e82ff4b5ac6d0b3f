//! Errors as a QMP client sees them: a class to act on and a description to show.

use serde::Serialize;
use std::fmt::Display;

/// What a command gives: a value for `return`, or an error.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The classes that clients distinguish. Anything new is a `GenericError`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum ErrorClass {
    /// Any failure that no other class names.
    GenericError,
    /// The command does not exist, or may not be used now.
    CommandNotFound,
    /// The device exists but is not in use.
    DeviceNotActive,
    /// No such device.
    DeviceNotFound,
    /// The host's KVM lacks what the command needs.
    KVMMissingCap,
}

/// A failed command.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, thiserror::Error)]
#[error("{desc}")]
pub struct Error {
    /// What a program looks at.
    pub class: ErrorClass,
    /// What a human reads.
    pub desc: String,
}

impl Error {
    /// An error of `class`.
    pub fn new(class: ErrorClass, desc: impl Into<String>) -> Self {
        let desc = desc.into();
        Self { class, desc }
    }

    /// A `GenericError`.
    pub fn generic(desc: impl Into<String>) -> Self {
        Self::new(ErrorClass::GenericError, desc)
    }

    /// No command is called `name`.
    pub fn command_not_found(name: &str) -> Self {
        Self::new(
            ErrorClass::CommandNotFound,
            format!("The command {name} has not been found"),
        )
    }

    /// A required parameter is absent.
    pub fn missing_parameter(name: impl Display) -> Self {
        Self::generic(format!("Parameter '{name}' is missing"))
    }

    /// A parameter that the command does not know.
    pub fn unexpected_parameter(name: impl Display) -> Self {
        Self::generic(format!("Parameter '{name}' is unexpected"))
    }

    /// A parameter of the wrong JSON type.
    pub fn parameter_type(name: impl Display, expected: &str) -> Self {
        Self::generic(format!(
            "Invalid parameter type for '{name}', expected: {expected}"
        ))
    }

    /// A parameter whose value is not one of the allowed words.
    pub fn parameter_value(name: impl Display, value: impl Display) -> Self {
        Self::generic(format!(
            "Parameter '{name}' does not accept value '{value}'"
        ))
    }

    /// A parameter that must be `expected` (a phrase).
    pub fn parameter_expects(name: impl Display, expected: &str) -> Self {
        Self::generic(format!("Parameter '{name}' expects {expected}"))
    }
}
