//! File names and options: two ways to say what a node is, and how one becomes the other.
//!
//! ```text
//!   "nbd:unix:/s:exportname=x" ──Names::options──► {"driver": "nbd", "server": {...}, "export": "x"}
//!                                                              │ Graph::open
//!   "nbd+unix:///x?socket=/s", or "json:{...}" ◄──Node::filename── node
//! ```
//!
//! Owns: the seam by which drivers offer names ([`Protocol`]), the parsing of names, relative names
//! included, and the names that nodes are shown by. Promises: a plain file name is given to a node
//! only when opening that name makes the same nodes with the same behaviour; any other node is
//! called `json:` with all options that matter. Must not know: a concrete protocol; whether a name
//! may be opened (that is `open/names.rs`).

mod generate;
mod parse;

pub use parse::{Names, combine, has_protocol, members_of_json};
pub use parse::{flattened, nested};

use crate::error::Result;
use serde_json::{Map, Value};

/// The names that a driver of a protocol is addressed by.
#[derive(Clone, Copy)]
pub struct Protocol {
    /// What stands before the first colon of its names ("nbd", "nbd+unix").
    pub prefixes: &'static [&'static str],
    /// The options that a whole name stands for, without `driver`.
    pub parse: ParseFn,
    /// What a node of this driver may touch.
    pub reach: Reach,
}

/// Reads a name of a protocol.
pub type ParseFn = fn(&Names<'_>, &str) -> Result<Map<String, Value>>;

/// What a driver touches outside of the process; names inside images obey it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Nothing.
    Nothing,
    /// One file of the host, whose name is the option `filename`.
    File,
    /// Sockets, or files by other options.
    Outside,
}

/// Where a driver stands in a stack of nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layer {
    /// Reaches the storage.
    Protocol,
    /// Interprets what a protocol stores; found out by looking at it, when need be.
    Format,
    /// Passes requests on; never there unless asked for.
    Filter,
}

/// What a node was opened with, as far as its name depends on it.
#[derive(Clone, Debug, Default)]
pub struct Origin {
    /// The options that decide what is read, flat ("server.path"); "driver" and "filename" among
    /// them.
    pub(crate) options: Map<String, Value>,
    /// Whether there are more of them than "driver" and "filename".
    pub(crate) distinctive: bool,
    /// The name of the backing node when it was opened because the image names it.
    pub(crate) named_backing: Option<String>,
    /// The image is described only: its backing was never asked for.
    pub(crate) described: bool,
}

impl Origin {
    /// Of a node with `options`, of which those called `strong` decide what is read; a name that
    /// ends with a dot stands for all that start with it.
    pub(crate) fn new(driver: &str, options: &Map<String, Value>, strong: &[&str]) -> Self {
        let mut kept = Map::new();
        let flat = flattened(options);
        kept.insert("driver".to_owned(), driver.into());
        kept.extend(flat.get_key_value("filename").map(cloned));
        let mut distinctive = false;
        for (name, value) in &flat {
            let is_strong = strong.iter().any(|strong| match strong.ends_with('.') {
                true => name.starts_with(strong),
                false => name == strong,
            });
            if is_strong && name != "filename" {
                kept.insert(name.clone(), value.clone());
                distinctive = true;
            }
        }
        Self {
            options: kept,
            distinctive,
            ..Self::default()
        }
    }
}

fn cloned((name, value): (&String, &Value)) -> (String, Value) {
    (name.clone(), value.clone())
}
