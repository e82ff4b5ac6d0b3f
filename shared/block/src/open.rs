//! How drivers are found and opened.
//!
//! A driver is one [`DriverEntry`] in the table of its crate; the engine joins the tables into a
//! catalogue. Opening gets an [`OpenRequest`]: the node's own options, and a way to get children:
//! by reference to a node, from an inline definition, or (backing files) by a name that the image
//! holds, under the name policy.
//!
//! Inline children inherit `cache.*` and `force-share`, and `read-only` and `auto-read-only`
//! (backing files are read-only unless told otherwise); their `discard` defaults to `unmap`,
//! because the parent decides what is discarded. Children by reference inherit nothing.

mod names;
mod options;

use crate::check::Purpose;
use crate::driver::{BoxFuture, Driver};
use crate::edge::{Edge, EdgeSpec};
use crate::error::{Error, ErrorKind, Result};
use crate::graph::Graph;
use crate::node::{Node, NodeOptions};
use crate::redo_log::RedoLog;
pub(crate) use names::FileId;
pub(crate) use options::{Inherited, Options};
use serde_json::{Map, Value};
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Longest chain of images, backing files included, and deepest nesting of inline children.
pub const MAX_CHAIN: usize = 200;

/// The protocol that plain file names are opened with.
const FILE_PROTOCOL: &str = "file";

/// One line of a crate's driver table.
pub struct DriverEntry {
    /// Name on the command line.
    pub name: &'static str,
    /// Opens a node. Driver-specific options are taken out of the request; what remains
    /// untaken is refused by the graph ("Parameter 'x' is unexpected").
    #[expect(
        clippy::type_complexity,
        reason = "an alias would hide what a driver has to write"
    )]
    pub open: for<'a> fn(&'a mut OpenRequest<'_>) -> BoxFuture<'a, Result<Box<dyn Driver>>>,
}

/// Where in a tree of definitions a node is opened.
#[derive(Clone, Default)]
pub(crate) struct Place {
    /// Prefix of option names in messages: "file." for the options of the child "file".
    pub(crate) path: String,
    /// Nodes above in the same definition or backing chain.
    pub(crate) depth: usize,
    /// What the node is for; children are always served.
    pub(crate) purpose: Purpose,
    /// The files of the images above in the backing chain.
    pub(crate) chain: Vec<FileId>,
}

/// What a driver's `open` gets.
pub struct OpenRequest<'g> {
    pub(crate) graph: &'g Graph,
    pub(crate) node: NodeOptions,
    pub(crate) options: Options,
    pub(crate) place: Place,
    pub(crate) descriptor: Option<OwnedFd>,
}

impl OpenRequest<'_> {
    /// Options common to all nodes.
    pub fn node(&self) -> &NodeOptions {
        &self.node
    }
    /// What the node is opened for.
    pub fn purpose(&self) -> Purpose {
        self.place.purpose
    }
    /// Lets the driver fall back to read-only (`auto-read-only`).
    pub fn set_read_only(&mut self) {
        self.node.read_only = true;
    }
    /// Takes a string option.
    pub fn take_str(&mut self, name: &str) -> Result<Option<String>> {
        self.options.take_str(name)
    }
    /// Takes an on/off option (JSON boolean, or "on"/"off").
    pub fn take_bool(&mut self, name: &str) -> Result<Option<bool>> {
        self.options.take_bool(name)
    }
    /// Takes a size option (JSON integer, or a number with k/M/G/T suffix), in bytes.
    pub fn take_size(&mut self, name: &str) -> Result<Option<u64>> {
        self.options.take_size(name)
    }
    /// Takes an option that is one of `values`; resolves to the value's index.
    pub fn take_choice(&mut self, name: &str, values: &[&str]) -> Result<Option<usize>> {
        self.options.take_choice(name, values)
    }
    /// Takes a raw option.
    pub fn take(&mut self, name: &str) -> Option<Value> {
        self.options.take(name)
    }
    /// The error for a mandatory option that is not there.
    pub fn missing(&self, name: &str) -> Error {
        self.options.missing(name)
    }
    /// A descriptor that was opened for this node already, by whoever checked its name: to be
    /// used instead of opening `filename`.
    pub fn take_descriptor(&mut self) -> Option<OwnedFd> {
        self.descriptor.take()
    }
    /// The child under option `name`: a node name or an inline definition. `None` when absent;
    /// `Some(None)` when given as null.
    pub async fn child(
        &mut self,
        name: &'static str,
        role: ChildRole,
    ) -> Result<Option<Option<Edge>>> {
        let child = match self.options.take(name) {
            None => return Ok(None),
            Some(Value::Null) if role == ChildRole::Backing => return Ok(Some(None)),
            Some(Value::String(node)) if node.is_empty() && role == ChildRole::Backing => {
                return Ok(Some(None));
            }
            Some(Value::String(node)) => self.graph.find(&node)?,
            Some(Value::Object(options)) => self.open_inline(name, role, options).await?,
            Some(_) => return Err(self.options.wrong_type(name, "BlockdevRef")),
        };
        Ok(Some(Some(self.attach(&child, name, role)?)))
    }
    /// The child under option `name`, which must be there.
    pub async fn required_child(&mut self, name: &'static str, role: ChildRole) -> Result<Edge> {
        match self.child(name, role).await? {
            Some(Some(edge)) => Ok(edge),
            _ => Err(self.missing(name)),
        }
    }
    /// Opens the backing file that an image names, when policy allows: a plain file name that
    /// resolves beneath the directory of `image_file` (or of an allowed directory). The format
    /// must be given: it is never guessed from the content.
    pub async fn backing_named(
        &mut self,
        image_file: &Edge,
        name: &str,
        format: Option<&str>,
    ) -> Result<Edge> {
        let context = |error: Error| error.context("Could not open backing file");
        let child = self
            .open_backing(image_file, name, format)
            .await
            .map_err(context)?;
        self.attach(&child, "backing", ChildRole::Backing)
    }

    /// The redo log of the image in `image_file`, with what a killed process left in it. Keeps
    /// nothing for read-only nodes, and where the graph has no directory for redo logs.
    pub fn redo_log(&self, image_file: &Edge) -> Result<RedoLog> {
        let image = image_file.node();
        let (false, Some(directory)) = (self.node.read_only, self.graph.redo_dir()) else {
            return Ok(RedoLog::disabled());
        };
        let Some(identity) = image.identity() else {
            tracing::warn!(
                node = self.node.node_name,
                file = image.name(),
                "no redo log: unflushed changes of this image do not survive a kill"
            );
            return Ok(RedoLog::disabled());
        };
        let log = RedoLog::open(directory, &identity)?;
        let beating = log.share();
        drop(executor::spawn(async move { beating.heartbeat().await }));
        Ok(log)
    }

    async fn open_backing(
        &self,
        image_file: &Edge,
        name: &str,
        format: Option<&str>,
    ) -> Result<Arc<Node>> {
        let Some(format) = format else {
            let message = format!(
                "the image gives no format for its backing file '{name}', and formats are not probed"
            );
            return Err(Error::new(ErrorKind::Unsupported, message));
        };
        let image = image_file.node().filename();
        let found = names::resolve(&image, name, self.graph.policy())?;
        let mut place = self.below("backing")?;
        place.chain.extend(FileId::of_path(&image));
        place.enter(found.id, name)?;
        let inherited = Inherited::of(&self.node, ChildRole::Backing);
        let file_options = as_map([("driver", FILE_PROTOCOL), ("filename", &found.path)]);
        let mut file_place = place.clone();
        file_place.path.push_str("file.");
        let file = self
            .graph
            .open(Definition {
                options: file_options,
                inherited: Some(inherited),
                place: file_place,
                descriptor: Some(found.descriptor),
            })
            .await?;
        self.graph
            .open(Definition {
                options: as_map([("driver", format), ("file", file.name())]),
                inherited: Some(inherited),
                place,
                descriptor: None,
            })
            .await
    }

    async fn open_inline(
        &self,
        name: &str,
        role: ChildRole,
        options: Map<String, Value>,
    ) -> Result<Arc<Node>> {
        let definition = Definition {
            options,
            inherited: Some(Inherited::of(&self.node, role)),
            place: self.below(name)?,
            descriptor: None,
        };
        self.graph.open(definition).await
    }

    fn below(&self, name: &str) -> Result<Place> {
        let place = Place {
            path: format!("{}{name}.", self.place.path),
            depth: self.place.depth + 1,
            purpose: Purpose::Serve,
            chain: self.place.chain.clone(),
        };
        if place.depth > MAX_CHAIN {
            let message = format!("more than {MAX_CHAIN} nodes below each other");
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        Ok(place)
    }

    fn attach(&self, child: &Arc<Node>, name: &'static str, role: ChildRole) -> Result<Edge> {
        let spec = EdgeSpec {
            parent: self.node.node_name.clone(),
            name,
            role,
            read_only: self.node.read_only,
        };
        Edge::attach(child, spec)
    }
}

impl Place {
    /// Adds a file to the chain; an error when it is there already.
    fn enter(&mut self, id: FileId, name: &str) -> Result<()> {
        if self.chain.contains(&id) {
            let message = format!("backing file '{name}' is an image above it in the chain");
            return Err(Error::new(ErrorKind::Corrupt, message));
        }
        self.chain.push(id);
        Ok(())
    }
}

fn as_map<const N: usize>(options: [(&str, &str); N]) -> Map<String, Value> {
    options
        .into_iter()
        .map(|(name, value)| (name.to_owned(), Value::from(value)))
        .collect()
}

/// What a node is opened from.
pub(crate) struct Definition {
    pub(crate) options: Map<String, Value>,
    /// Present for inline children.
    pub(crate) inherited: Option<Inherited>,
    pub(crate) place: Place,
    pub(crate) descriptor: Option<OwnedFd>,
}

/// What a child is to its parent; decides permissions and inherited options.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChildRole {
    /// Data and metadata of a format.
    Image,
    /// Data only (`data-file`).
    Data,
    /// Read where the parent has nothing.
    Backing,
    /// What a filter passes through to.
    Filtered,
}
