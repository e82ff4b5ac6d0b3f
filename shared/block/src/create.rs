//! Making images: what a driver offers to `create`, and what its code gets.
//!
//! ```text
//!   qemu-img style "-o name=value" ─┐ OptionSpec: names, kinds, defaults
//!                                   ├──► members as QMP spells them ──► Creator::create
//!   QMP blockdev-create ────────────┘                                       │
//!                                              file() ◄── by name: the protocol makes it
//! ```
//!
//! Owns: the descriptions of options, and the request that a driver's `create` works on. Promises:
//! a name that could not be made into an image does not stay behind as a file; nodes that were
//! opened for the work are closed at its end. Must not know: a concrete format or protocol.

use crate::driver::{BoxFuture, Preallocation, Resize, WriteFlags};
use crate::edge::Edge;
use crate::error::{Error, ErrorKind, Result};
use crate::graph::Graph;
use crate::naming::{combine, has_protocol};
use crate::node::{Node, NodeOptions};
use crate::open::{ChildRole, FILE_PROTOCOL, Options, attach_as};
use crate::redo_log::RedoLog;
use crate::secret::Secret;
use executor::Buffer;
use serde_json::{Map, Value};
use std::cell::RefCell;
use std::sync::Arc;

/// What a probe for the format looks at first, in bytes.
const SECTOR: u64 = 512;

/// What kind of value an option takes on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OptionKind {
    /// Any text.
    Text,
    /// `on` or `off`.
    Switch,
    /// A number.
    Number,
    /// Bytes, with a suffix if wanted.
    Size,
}

/// One option of `create` or `amend` as the tools spell it (`-o name=value`).
#[derive(Clone, Copy, Debug)]
pub struct OptionSpec {
    /// The name in `-o`.
    pub name: &'static str,
    /// Where the value belongs in QMP's object, dots for nesting ("encrypt.key-secret").
    pub member: &'static str,
    /// What it takes.
    pub kind: OptionKind,
    /// One line of help.
    pub help: &'static str,
    /// The value that is meant, and shown, when the option is not given.
    pub default: Option<&'static str>,
    /// Older spellings of values, with those of QMP.
    pub aliases: &'static [(&'static str, &'static str)],
}

impl OptionSpec {
    /// An option without default or aliases.
    pub const fn new(
        (name, member): (&'static str, &'static str),
        kind: OptionKind,
        help: &'static str,
    ) -> Self {
        Self {
            name,
            member,
            kind,
            help,
            default: None,
            aliases: &[],
        }
    }
    /// The same option with a default.
    #[must_use]
    pub const fn with_default(self, value: &'static str) -> Self {
        Self {
            default: Some(value),
            ..self
        }
    }
    /// The same option with older spellings of its values.
    #[must_use]
    pub const fn with_aliases(self, aliases: &'static [(&'static str, &'static str)]) -> Self {
        Self { aliases, ..self }
    }
}

/// How a driver makes images.
pub struct Creator {
    /// Its options, in the order in which they are shown.
    pub options: &'static [OptionSpec],
    /// Tools round the size that they are given up to a multiple of this many bytes.
    pub size_unit: u64,
    /// Makes the image.
    pub create: for<'a> fn(&'a mut CreateRequest<'_>) -> BoxFuture<'a, Result<()>>,
}

/// What an image is made in.
pub enum Target {
    /// A file of this name, which is made (or emptied).
    Name(String),
    /// A node that is there already.
    Node(Arc<Node>),
}

/// What a driver's `create` gets: the options, and a way to its children.
pub struct CreateRequest<'g> {
    graph: &'g Graph,
    driver: &'static str,
    target: Target,
    options: Options,
    /// Files that were made by name, to be deleted when the image fails.
    made: RefCell<Vec<Arc<Node>>>,
}

impl<'g> CreateRequest<'g> {
    /// A request to the driver `driver`.
    pub(crate) fn new(
        graph: &'g Graph,
        (driver, target): (&str, Target),
        members: Map<String, Value>,
    ) -> Result<Self> {
        let entry = graph
            .entry(driver)
            .ok_or_else(|| Error::new(ErrorKind::NotFound, format!("Unknown driver '{driver}'")))?;
        Ok(Self {
            graph,
            driver: entry.name,
            target,
            options: Options::new(members, String::new()),
            made: RefCell::default(),
        })
    }
}

impl CreateRequest<'_> {
    /// The password that the `secret` object `id` holds.
    ///
    /// # Errors
    /// `NotFound`, `Invalid` when it is no text.
    pub fn secret(&self, id: &str) -> Result<Secret> {
        self.graph.secrets().text(id)
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
    /// Takes an option that is one of `values`; resolves to the value's index.
    pub fn take_choice(&mut self, name: &str, values: &[&str]) -> Result<Option<usize>> {
        self.options.take_choice(name, values)
    }
    /// Takes `preallocation`.
    pub fn take_preallocation(&mut self) -> Result<Preallocation> {
        let values = ["off", "metadata", "falloc", "full"];
        Ok(match self.take_choice("preallocation", &values)? {
            None | Some(0) => Preallocation::Off,
            Some(1) => Preallocation::Metadata,
            Some(2) => Preallocation::Falloc,
            Some(_) => Preallocation::Full,
        })
    }
    /// Takes a raw option.
    pub fn take(&mut self, name: &str) -> Option<Value> {
        self.options.take(name)
    }
    /// Takes `size`, which must be there.
    pub fn take_length(&mut self) -> Result<u64> {
        match self.take_size("size")? {
            Some(size) => Ok(size),
            None => Err(self.missing("size")),
        }
    }
    /// An error for the first option that nobody took.
    pub fn finish(&self) -> Result<()> {
        self.options.finish()
    }
    /// The error for a mandatory option that is not there.
    pub fn missing(&self, name: &str) -> Error {
        self.options.missing(name)
    }
    /// The name of the file to make (protocols).
    pub fn filename(&self) -> Result<&str> {
        match &self.target {
            Target::Name(name) => Ok(name),
            Target::Node(_) => Err(Error::new(
                ErrorKind::Invalid,
                format!("Driver '{}' makes files by name only", self.driver),
            )),
        }
    }
    /// The child that the image is written to: made by the protocol of its name, or the node that
    /// was given.
    ///
    /// # Errors
    /// The protocol's; `Busy` when the file or node is in use.
    pub async fn file(&mut self) -> Result<Edge> {
        let node = match &self.target {
            Target::Name(name) => {
                let name = name.clone();
                let members = self.take_file_members();
                self.make(name, members).await?
            }
            Target::Node(node) => Arc::clone(node),
        };
        let file = self.attach(&node, "file", ChildRole::Image)?;
        // What the writer of an earlier image in this file left behind is of no image any more.
        if let (Some(directory), Some(identity)) = (self.graph.redo_dir(), node.identity()) {
            RedoLog::discard(directory, &identity)?;
        }
        Ok(file)
    }
    /// The same as [`CreateRequest::file`] for drivers that add nothing: `members` go to the
    /// protocol, and no child is needed.
    ///
    /// # Errors
    /// The protocol's.
    pub async fn pass_through(&mut self, members: Map<String, Value>) -> Result<()> {
        let Target::Name(name) = &self.target else {
            let message = format!("Driver '{}' makes files by name only", self.driver);
            return Err(Error::new(ErrorKind::Invalid, message));
        };
        let length = members.get("size").and_then(Value::as_u64).unwrap_or(0);
        match self.graph.make_by_name(name, members).await? {
            Made::File(_) => Ok(()),
            Made::Nothing(protocol) => {
                let node = self.graph.open_made(protocol).await?;
                clear(&node, length).await
            }
        }
    }
    /// A second file `name`, made beside the image; empty.
    ///
    /// # Errors
    /// The protocol's.
    pub async fn data_file(&mut self, name: &str) -> Result<Edge> {
        let node = self.make(name.to_owned(), Map::new()).await?;
        self.attach(&node, "data-file", ChildRole::Data)
    }
    /// The node `name`, as the child for data.
    ///
    /// # Errors
    /// `NotFound`, `Busy`.
    pub fn data_node(&mut self, name: &str) -> Result<Edge> {
        let node = self.graph.find(name)?;
        self.attach(&node, "data-file", ChildRole::Data)
    }

    /// What the image `name`, relative to the one that is made, says about itself as one of `format`;
    /// `None` when it is none of that format.
    ///
    /// # Errors
    /// Those of opening its file.
    pub async fn describe_backing(
        &self,
        name: &str,
        format: &str,
    ) -> Result<Option<Map<String, Value>>> {
        let is_relative = !name.starts_with('/') && !has_protocol(name);
        let full = match &self.target {
            Target::Name(target) if is_relative => combine(target, name),
            Target::Node(node) if is_relative => node.absolute_name(name)?,
            Target::Name(_) | Target::Node(_) => name.to_owned(),
        };
        self.graph.describe_named(&full, format).await
    }

    /// Options of the protocol that were given beside those of the format.
    fn take_file_members(&mut self) -> Map<String, Value> {
        let names = ["nocow", "extent-size-hint"];
        let members = names.into_iter().filter_map(|name| {
            let value = self.options.take(name)?;
            Some((name.to_owned(), value))
        });
        members.collect()
    }

    async fn make(&self, name: String, members: Map<String, Value>) -> Result<Arc<Node>> {
        match self.graph.make_by_name(&name, members).await? {
            Made::File(protocol) => {
                let node = self.graph.open_made(protocol).await?;
                self.made.borrow_mut().push(Arc::clone(&node));
                Ok(node)
            }
            Made::Nothing(protocol) => {
                let node = self.graph.open_made(protocol).await?;
                clear(&node, 0).await?;
                Ok(node)
            }
        }
    }

    fn attach(&self, node: &Arc<Node>, name: &'static str, role: ChildRole) -> Result<Edge> {
        let parent = NodeOptions {
            node_name: format!("new {}", self.driver),
            ..NodeOptions::default()
        };
        attach_as(&parent, node, name, role)
    }
}

/// What came of asking a protocol for a file, and the options that open it.
enum Made {
    /// A new file.
    File(Map<String, Value>),
    /// What was there before: the protocol makes no files.
    Nothing(Map<String, Value>),
}

/// Makes sure that nothing is found in what was there before, and that it is long enough.
async fn clear(node: &Node, length: u64) -> Result<()> {
    if node.length() < length {
        let resize = Resize::to(length);
        node.resize(resize).await?;
    }
    let first = Buffer::zeroed(node.length().min(SECTOR) as usize);
    let written = node.write(0, first, WriteFlags::default()).await;
    written.map_err(|errno| Error::io("Failed to clear the new image's first sector", errno))
}

impl Graph {
    /// Makes an image of `driver` in `target`. `members` are those of QMP's
    /// `BlockdevCreateOptions`, without `driver` and `file`.
    ///
    /// # Errors
    /// The driver's; files that were made by name are gone again.
    pub async fn create(
        &self,
        driver: &str,
        target: Target,
        members: Map<String, Value>,
    ) -> Result<()> {
        let entry = self
            .entry(driver)
            .ok_or_else(|| Error::new(ErrorKind::NotFound, format!("Unknown driver '{driver}'")))?;
        let Some(creator) = &entry.create else {
            let message = format!("Driver '{driver}' does not support blockdev-create");
            return Err(Error::new(ErrorKind::Unsupported, message));
        };
        let mut request = CreateRequest {
            graph: self,
            driver: entry.name,
            target,
            options: Options::new(members, String::new()),
            made: RefCell::default(),
        };
        let created = (creator.create)(&mut request).await;
        let created = created.and_then(|()| request.finish());
        let made = request.made.take();
        if created.is_err() {
            for node in &made {
                if let Err(error) = node.driver().delete_file() {
                    tracing::warn!(node = node.name(), %error, "a failed image stays behind");
                }
            }
        }
        drop((request, made));
        self.sweep().await;
        created
    }

    /// Has the protocol of a name make the file; protocols that make none have it already.
    async fn make_by_name(&self, name: &str, members: Map<String, Value>) -> Result<Made> {
        let options = self.names().options(name)?;
        let text = |key: &str| options.get(key).and_then(Value::as_str);
        let protocol = text("driver").unwrap_or(FILE_PROTOCOL);
        let creates = self.entry(protocol).is_some_and(|it| it.create.is_some());
        if !creates {
            return match members.get("preallocation").and_then(Value::as_str) {
                None | Some("off") => Ok(Made::Nothing(options)),
                Some(mode) => Err(Error::new(
                    ErrorKind::Unsupported,
                    format!("Unsupported preallocation mode '{mode}'"),
                )),
            };
        }
        let filename = text("filename").unwrap_or(name).to_owned();
        self.make_file(protocol, filename, members).await?;
        Ok(Made::File(options))
    }

    /// Has the protocol make the file `name`.
    async fn make_file(
        &self,
        protocol: &str,
        name: String,
        members: Map<String, Value>,
    ) -> Result<()> {
        let creator = self.entry(protocol).and_then(|entry| entry.create.as_ref());
        let Some(creator) = creator else {
            let message = format!("Protocol '{protocol}' makes no files");
            return Err(Error::new(ErrorKind::Unsupported, message));
        };
        let mut request = CreateRequest {
            graph: self,
            driver: FILE_PROTOCOL,
            target: Target::Name(name),
            options: Options::new(members, String::new()),
            made: RefCell::default(),
        };
        (creator.create)(&mut request).await?;
        request.finish()
    }
}
