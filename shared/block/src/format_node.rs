//! The generic data mover: turns a [`Format`]'s answers into I/O, once for all formats.
//!
//! Reads split by extent; a hit on one plain extent is the data child's own future. Writes go in
//! place where the format says so, otherwise through prepare, copy-on-write and commit.

use crate::format::Format;

/// A format as a driver.
pub struct FormatNode<F: Format> {
    format: F,
}

impl<F: Format> FormatNode<F> {
    /// Wraps an opened format.
    pub fn new(format: F) -> Self {
        Self { format }
    }
    /// The format.
    pub fn format(&self) -> &F {
        &self.format
    }
}
