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

use crate::amend::Amender;
use crate::check::Purpose;
use crate::create::Creator;
use crate::driver::{BoxFuture, Driver};
use crate::edge::{Edge, EdgeSpec};
use crate::error::{Error, ErrorKind, Result};
use crate::events::Reporter;
use crate::graph::Graph;
use crate::node::{Node, NodeOptions};
use crate::redo_log::RedoLog;
use crate::secret::Secret;
use names::Access;
pub(crate) use names::FileId;
pub(crate) use options::{Inherited, Options};
use serde_json::{Map, Value};
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Longest chain of images, backing files included, and deepest nesting of inline children.
pub const MAX_CHAIN: usize = 200;

/// The protocol that plain file names are opened with.
pub(crate) const FILE_PROTOCOL: &str = "file";

/// One line of a crate's driver table.
pub struct DriverEntry {
    /// Name on the command line.
    pub name: &'static str,
    /// Opens a node. Driver-specific options are taken out of the request; what remains
    /// untaken is refused by the graph ("Parameter 'x' is unexpected").
    pub open: OpenFn,
    /// How sure the driver is that an image starting with these bytes (up to
    /// [`PROBE_BYTES`]) is its own: 0 not at all, 100 certain. Asked by tools alone.
    pub probe: Option<fn(&[u8]) -> u8>,
    /// Makes new images.
    pub create: Option<Creator>,
    /// Changes what images were created with.
    pub amend: Option<Amender>,
}

/// Opens a node of one driver.
pub type OpenFn = for<'a> fn(&'a mut OpenRequest<'_>) -> BoxFuture<'a, Result<Box<dyn Driver>>>;

/// How much of an image is looked at to find out its format, in bytes.
pub const PROBE_BYTES: usize = 2048;

impl DriverEntry {
    /// A driver that opens nodes and makes none.
    pub const fn new(name: &'static str, open: OpenFn) -> Self {
        Self {
            name,
            open,
            probe: None,
            create: None,
            amend: None,
        }
    }
    /// The same driver, recognising its images.
    #[must_use]
    pub const fn with_probe(self, probe: fn(&[u8]) -> u8) -> Self {
        Self {
            probe: Some(probe),
            ..self
        }
    }
    /// The same driver, making images.
    #[must_use]
    pub const fn with_create(self, create: Creator) -> Self {
        Self {
            create: Some(create),
            ..self
        }
    }
    /// The same driver, amending images.
    #[must_use]
    pub const fn with_amend(self, amend: Amender) -> Self {
        Self {
            amend: Some(amend),
            ..self
        }
    }
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
    /// How the node reports events.
    pub fn reporter(&self) -> Reporter {
        Reporter::new(&self.node.node_name, self.graph.events())
    }
    /// Lets the driver fall back to read-only (`auto-read-only`).
    pub fn set_read_only(&mut self) {
        self.node.read_only = true;
    }
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
    /// An error for the first option that nobody took. (Opening asks for it by itself.)
    pub fn finish(&self) -> Result<()> {
        self.options.finish()
    }
    /// The error for a mandatory option that is not there.
    pub fn missing(&self, name: &str) -> Error {
        self.options.missing(name)
    }
    /// The object `id`, when it is a `T`.
    pub fn object<T: std::any::Any + Send + Sync>(&self, id: &str) -> Option<Arc<T>> {
        self.graph.objects().find(id)
    }
    /// The node called `name`, when there is one.
    pub fn find_node(&self, name: &str) -> Option<Arc<Node>> {
        self.graph.node(name)
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
    /// resolves beneath the directory of `image_file` (or of an allowed directory). Without a
    /// format the graph must be one that probes (tools); daemons never guess it.
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

    /// Opens the file that an image names for its data, under the policy for backing files, and for
    /// writing when this node writes.
    pub async fn data_file_named(&mut self, image_file: &Edge, name: &str) -> Result<Edge> {
        let context = |error: Error| error.context("Could not open data file");
        let child = self.open_data_file(image_file, name).await;
        self.attach(&child.map_err(context)?, "data-file", ChildRole::Data)
    }

    async fn open_data_file(&self, image_file: &Edge, name: &str) -> Result<Arc<Node>> {
        let access = match self.node.read_only {
            true => Access::Read,
            false => Access::ReadWrite,
        };
        let image = image_file.node().filename();
        let found = names::resolve(&image, (name, access), &self.graph.policy())?;
        let mut place = self.below("data-file")?;
        place.chain.extend(FileId::of_path(&image));
        place.enter(found.id, name)?;
        let definition = Definition {
            options: as_map([("driver", FILE_PROTOCOL), ("filename", &found.path)]),
            inherited: Some(Inherited::of(&self.node, ChildRole::Data)),
            place,
            descriptor: Some(found.descriptor),
        };
        self.graph.open(definition).await
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

    /// Refuses an image whose writer was killed and left changes in its redo log: without them the
    /// file is older than what the guest was told is done, and a repair would give away what they
    /// refer to.
    ///
    /// # Errors
    /// `Busy` naming what to do; what opening the log answers.
    pub fn refuse_left_behind(&self, image_file: &Edge) -> Result<()> {
        let image = image_file.node();
        let (Some(directory), Some(identity)) = (self.graph.redo_dir(), image.identity()) else {
            return Ok(());
        };
        let left = RedoLog::left_behind(directory, &identity)?;
        if left == 0 {
            return Ok(());
        }
        let message = format!(
            "the process that served '{}' was killed and left {left} metadata changes in its redo \
             log; start it again, or open the image for writing once, to complete them",
            image.filename()
        );
        Err(Error::new(ErrorKind::Busy, message))
    }

    async fn open_backing(
        &self,
        image_file: &Edge,
        name: &str,
        format: Option<&str>,
    ) -> Result<Arc<Node>> {
        let image = image_file.node().filename();
        let named = Named {
            image: &image,
            name,
            format,
        };
        let inherited = Inherited::of(&self.node, ChildRole::Backing);
        let place = self.below("backing")?;
        self.graph.open_named(named, inherited, place).await
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
        attach_as(&self.node, child, name, role)
    }
}

/// A backing file as an image names it.
struct Named<'n> {
    /// The file name of the image.
    image: &'n str,
    name: &'n str,
    format: Option<&'n str>,
}

impl Graph {
    /// Opens the backing image of the image in `of`, to be described: under the same policy as
    /// for use, and without its own backing.
    ///
    /// # Errors
    /// As for opening a node; `Forbidden` by policy.
    pub async fn describe_backing(
        &self,
        of: &Node,
        name: &str,
        format: Option<&str>,
    ) -> Result<Arc<Node>> {
        let image = of.filename();
        let named = Named {
            image: &image,
            name,
            format,
        };
        let place = Place {
            purpose: Purpose::Describe,
            ..Place::default()
        };
        let inherited = Inherited::of(of.options(), ChildRole::Backing);
        self.open_named(named, inherited, place).await
    }

    /// Opens what an image names, when policy allows.
    async fn open_named(
        &self,
        Named {
            image,
            name,
            format,
        }: Named<'_>,
        inherited: Inherited,
        mut place: Place,
    ) -> Result<Arc<Node>> {
        if format.is_none() && !self.probes() {
            let message = format!(
                "the image does not tell the format of its backing file '{name}'; \
                 give 'backing' explicitly or store it (qemu-img rebase -u -F)"
            );
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        let found = names::resolve(image, (name, Access::Read), &self.policy())?;
        place.chain.extend(FileId::of_path(image));
        place.enter(found.id, name)?;
        let mut file_place = place.clone();
        file_place.path.push_str("file.");
        file_place.purpose = Purpose::Serve;
        let file = self
            .open(Definition {
                options: as_map([("driver", FILE_PROTOCOL), ("filename", &found.path)]),
                inherited: Some(inherited),
                place: file_place,
                descriptor: Some(found.descriptor),
            })
            .await?;
        let format = match format {
            Some(format) => format,
            None => self.probe(&file).await?,
        };
        self.open(Definition {
            options: as_map([("driver", format), ("file", file.name())]),
            inherited: Some(inherited),
            place,
            descriptor: None,
        })
        .await
    }
}

/// Attaches to `child` as the node with the options `parent`.
pub(crate) fn attach_as(
    parent: &NodeOptions,
    child: &Arc<Node>,
    name: &'static str,
    role: ChildRole,
) -> Result<Edge> {
    let spec = EdgeSpec {
        parent: parent.node_name.clone(),
        name,
        role,
        read_only: parent.read_only,
    };
    Edge::attach(child, spec)
}

impl Place {
    /// Adds a file to the chain; an error when it is there already.
    fn enter(&mut self, id: FileId, name: &str) -> Result<()> {
        if self.chain.contains(&id) {
            let message = format!("the file '{name}' is an image above it in the chain");
            return Err(Error::new(ErrorKind::Corrupt, message));
        }
        self.chain.push(id);
        Ok(())
    }
}

pub(crate) fn as_map<const N: usize>(options: [(&str, &str); N]) -> Map<String, Value> {
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
    /// What a filter passes through to, and fills with what it reads from the backing.
    Populated,
    /// What a filter passes through to, and makes longer ahead of writes.
    Preallocated,
    /// One of several copies of the same content.
    Copy,
    /// One of several copies, which the parent rewrites when it differs from the others.
    RepairedCopy,
}
