//! QMP, QEMU's machine protocol, without any I/O.
//!
//! ```text
//!   bytes ──Session::feed──> json::Stream ──> Session::next_request ──> Request
//!                                                                          │ CommandTable
//!   bytes <──Session::take_output── Session::reply / Session::event <── handler
//! ```
//!
//! The crate owns the wire: the JSON dialect and how it resynchronises after garbage, greeting,
//! capabilities negotiation, the shape of commands, replies, errors and events, the typing of
//! arguments ([`Arguments`]), and the `key=value` option syntax ([`keyval`]) that stands for the
//! same arguments on a command line. A daemon moves the bytes and owns the commands; handlers may
//! be plain functions or return futures, [`CommandTable`] does not care.
//!
//! Every peer byte is hostile: [`json`] bounds size, tokens and nesting of a message.
//!
//! Must not know: sockets, threads, block devices, machines.

mod arguments;
mod error;
mod event;
pub mod json;
pub mod keyval;
mod session;
mod table;

pub use arguments::{Arguments, Syntax};
pub use error::{Error, ErrorClass, Result};
pub use event::{Event, EventSink, EventSinks};
pub use session::{Request, Session, SessionOptions, Version, VersionTriple};
pub use table::{Command, CommandTable, SyncHandler};

pub use serde_json::{Map, Value, json};

/// Whether `id` may name an object, a chardev, an export or any other thing that a user names.
pub fn is_identifier(id: &str) -> bool {
    id.starts_with(|c: char| c.is_ascii_alphabetic())
        && id
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b))
}
