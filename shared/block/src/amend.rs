//! Changing what an image was created with, offline.
//!
//! An amendment may replace any structure of an image, so it does not happen on an open node: the
//! driver gets the request with which it would be opened, takes its children (and with them their
//! locks), and works on those. The exception is what a format changes beside its data while it
//! serves ([`crate::Driver::amend`]: key slots). Owns: what such code gets. Must not know: a concrete
//! format.

use crate::create::OptionSpec;
use crate::driver::BoxFuture;
use crate::error::{Error, ErrorKind, Result};
use crate::node::Node;
use crate::open::{OpenRequest, Options};
use crate::secret::{self, Secret, Secrets};
use serde_json::{Map, Value};

/// Whether an amendment may make an image inaccessible (`--force`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Force {
    /// It is refused then.
    #[default]
    Refuse,
    /// The user knows.
    Allow,
}

/// Hears how far an amendment is: done, and total, in units of its own; both may change.
pub type ProgressFn<'p> = &'p mut dyn FnMut(u64, u64);

/// What is to be changed, and who is told how far it is.
pub struct AmendRequest<'p> {
    options: Options,
    secrets: Option<&'p Secrets>,
    /// Whether dangerous changes are made.
    pub force: Force,
    progress: ProgressFn<'p>,
    is_open: bool,
}

impl<'p> AmendRequest<'p> {
    /// `members` as QMP spells them ("lazy-refcounts", "encrypt": {...}).
    pub fn new(members: Map<String, Value>, force: Force, progress: ProgressFn<'p>) -> Self {
        Self {
            options: Options::new(members, String::new()),
            secrets: None,
            force,
            progress,
            is_open: false,
        }
    }
    /// The driver has opened what it amends: errors from here on are about the changes.
    pub fn opened(&mut self) {
        self.is_open = true;
    }
    /// Whether the image was opened.
    pub fn is_open(&self) -> bool {
        self.is_open
    }
    /// The same request, with the passwords that it may name.
    #[must_use]
    pub fn with_secrets(self, secrets: &'p Secrets) -> Self {
        Self {
            secrets: Some(secrets),
            ..self
        }
    }
    /// The password that the `secret` object `id` holds.
    ///
    /// # Errors
    /// `NotFound`, `Invalid` when it is no text.
    pub fn secret(&self, id: &str) -> Result<Secret> {
        match self.secrets {
            Some(secrets) => secrets.text(id),
            None => Err(secret::not_found(id)),
        }
    }
    /// Takes a string option.
    pub fn take_str(&mut self, name: &str) -> Result<Option<String>> {
        self.options.take_str(name)
    }
    /// Takes an on/off option.
    pub fn take_bool(&mut self, name: &str) -> Result<Option<bool>> {
        self.options.take_bool(name)
    }
    /// Takes a number or a size in bytes.
    pub fn take_size(&mut self, name: &str) -> Result<Option<u64>> {
        self.options.take_size(name)
    }
    /// Takes a raw option.
    pub fn take(&mut self, name: &str) -> Option<Value> {
        self.options.take(name)
    }
    /// An error for the first option that nobody took.
    pub fn finish(&self) -> Result<()> {
        self.options.finish()
    }
    /// Tells how far the work is.
    pub fn progress(&mut self, done: u64, total: u64) {
        (self.progress)(done, total);
    }
}

/// How a driver amends images.
pub struct Amender {
    /// Its options, as the tools spell them.
    pub options: &'static [OptionSpec],
    /// Makes the changes. The open request is what the image would be opened with.
    pub amend: AmendFn,
}

/// Changes an image of one driver.
pub type AmendFn =
    for<'a> fn(&'a mut OpenRequest<'_>, &'a mut AmendRequest<'_>) -> BoxFuture<'a, Result<()>>;

impl Node {
    /// Changes what the image was created with while it serves. See [`crate::Driver::amend`].
    ///
    /// # Errors
    /// `Invalid` when the node is read-only, or for an option that the driver has not got; the
    /// driver's.
    pub async fn amend(&self, changes: &mut AmendRequest<'_>) -> Result<()> {
        if self.options().read_only {
            let message = "Block node is read-only";
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        self.driver().amend(changes).await?;
        changes.finish()
    }
}

/// The error of a driver that amends nothing while it serves.
pub(crate) fn unsupported_online() -> Error {
    let message = "Driver does not support x-blockdev-amend";
    Error::new(ErrorKind::Unsupported, message)
}

/// The error of a driver that amends nothing.
pub fn unsupported(driver: &str) -> Error {
    let message = format!("Format driver '{driver}' does not support option amendment");
    Error::new(ErrorKind::Unsupported, message)
}
