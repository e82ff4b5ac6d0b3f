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

mod named;
mod names;
mod options;

use crate::amend::Amender;
use crate::check::Purpose;
use crate::create::Creator;
use crate::driver::{BoxFuture, Driver};
use crate::edge::{Beyond, Edge, EdgeSpec};
use crate::error::{Error, ErrorKind, Result};
use crate::events::Reporter;
use crate::graph::Graph;
use crate::measure::MeasureFn;
use crate::naming::{Names, Protocol};
use crate::node::{Node, NodeOptions};
use crate::redo_log::{Record, RedoLog};
use crate::secret::Secret;
pub use named::BackingName;
use named::{Named, files_of};
use names::Access;
pub(crate) use names::FileId;
pub(crate) use options::{Inherited, Options};
use serde_json::{Map, Value};
use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

/// Longest chain of images, backing files included, and deepest nesting of inline children.
pub const MAX_CHAIN: usize = 200;

/// Most children in one list.
const MAX_CHILDREN: usize = 64;

/// The name of a child in a list. Names live as long as the process: there are few.
fn child_name(list: &str, index: usize) -> &'static str {
    static NAMES: Mutex<BTreeSet<&'static str>> = Mutex::new(BTreeSet::new());
    let name = format!("{list}.{index}");
    let mut names = NAMES.lock().unwrap_or_else(PoisonError::into_inner);
    match names.get(name.as_str()) {
        Some(known) => known,
        None => {
            let name: &'static str = name.leak();
            names.insert(name);
            name
        }
    }
}

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
    /// Images can hold compressed clusters ([`Driver::compresses`] tells of one image).
    pub compresses: bool,
    /// Makes new images.
    pub create: Option<Creator>,
    /// Tells how large new images become.
    pub measure: Option<MeasureFn>,
    /// Changes what images were created with.
    pub amend: Option<Amender>,
    /// The names that it is addressed by, and what it touches.
    pub protocol: Option<Protocol>,
    /// The options that decide what is read; a name that ends with a dot stands for all that start
    /// with it. A node with one of them has no plain file name.
    pub strong_options: &'static [&'static str],
    /// What becomes of options when some of them change.
    pub supersede: Option<SupersedeFn>,
}

/// Takes out of the old options of a node what the new ones replace beside their own names, and brings the new
/// ones into one form; both flat ([`crate::naming::flattened`]).
pub type SupersedeFn = fn(new: &mut Map<String, Value>, old: &mut Map<String, Value>) -> Result<()>;

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
            compresses: false,
            create: None,
            measure: None,
            amend: None,
            protocol: None,
            strong_options: &[],
            supersede: None,
        }
    }
    /// The same driver, addressed by names.
    #[must_use]
    pub const fn with_protocol(self, protocol: Protocol) -> Self {
        Self {
            protocol: Some(protocol),
            ..self
        }
    }
    /// The same driver, with options that decide what is read.
    #[must_use]
    pub const fn with_strong_options(self, names: &'static [&'static str]) -> Self {
        Self {
            strong_options: names,
            ..self
        }
    }
    /// The same driver, with options that replace others.
    #[must_use]
    pub const fn with_supersede(self, supersede: SupersedeFn) -> Self {
        Self {
            supersede: Some(supersede),
            ..self
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
    /// The same driver, whose images can hold compressed clusters.
    #[must_use]
    pub const fn with_compression(self) -> Self {
        Self {
            compresses: true,
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
    /// The same driver, measuring new images.
    #[must_use]
    pub const fn with_measure(self, measure: MeasureFn) -> Self {
        Self {
            measure: Some(measure),
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
    /// Who defines the node.
    pub(crate) source: Source,
    /// The name of the node that it takes the place of.
    pub(crate) successor_of: Option<String>,
}

/// Who says what is to be opened.
#[derive(Clone, Default)]
pub(crate) enum Source {
    /// The user.
    #[default]
    User,
    /// An image, by a name in it.
    Image {
        /// What relative names are put behind.
        directory: String,
        /// The name.
        name: String,
    },
}

/// What a driver's `open` gets.
pub struct OpenRequest<'g> {
    pub(crate) graph: &'g Graph,
    pub(crate) node: NodeOptions,
    pub(crate) options: Options,
    pub(crate) place: Place,
    pub(crate) descriptor: Option<OwnedFd>,
    /// The child "file", opened already to find out the format.
    pub(crate) file: Option<Arc<Node>>,
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
    /// Of drivers that only read, before they open children: the node is read-only, or becomes so
    /// where `auto-read-only` lets it.
    ///
    /// # Errors
    /// `Invalid` for a node that is to be written.
    pub fn only_reads(&mut self) -> Result<()> {
        if !self.node.read_only && !self.node.auto_read_only {
            return Err(Error::new(ErrorKind::Invalid, "Image is read-only"));
        }
        self.set_read_only();
        Ok(())
    }
    /// The password that the `secret` object `id` holds.
    ///
    /// # Errors
    /// `NotFound`, `Invalid` when it is no text.
    pub fn secret(&self, id: &str) -> Result<Secret> {
        self.only_for_users("a secret")?;
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
    /// Takes an integer option.
    pub fn take_int(&mut self, name: &str) -> Result<Option<i64>> {
        self.options.take_int(name)
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
    ///
    /// # Errors
    /// `Forbidden` to images.
    pub fn object<T: std::any::Any + Send + Sync>(&self, id: &str) -> Result<Option<Arc<T>>> {
        self.only_for_users("an object")?;
        Ok(self.graph.objects().find(id))
    }
    /// The node called `name`, when there is one.
    ///
    /// # Errors
    /// `Forbidden` to images.
    pub fn find_node(&self, name: &str) -> Result<Option<Arc<Node>>> {
        self.only_for_users("a node")?;
        Ok(self.graph.node(name))
    }
    /// What file names mean.
    pub fn names(&self) -> Names<'_> {
        self.graph.names()
    }
    /// Gives a child, or another option, that was not given.
    pub fn give(&mut self, name: &str, value: Value) {
        self.options.put(name, value);
    }
    /// The error for a mandatory option that is not there: tools have words of their own for some.
    pub fn missing_or(&self, name: &str, words: &str) -> Error {
        match self.graph.probes() {
            true => Error::new(ErrorKind::Invalid, words),
            false => self.missing(name),
        }
    }
    /// How many children the list under option `name` has.
    pub fn count(&self, name: &str) -> usize {
        match self.options.get(name) {
            Some(Value::Array(list)) => list.len(),
            Some(Value::Object(numbered)) => numbered.len(),
            _ => 0,
        }
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
        let opened = if name == "file" {
            self.file.take()
        } else {
            None
        };
        let child = match self.options.take(name) {
            _ if opened.is_some() => opened.ok_or_else(|| self.missing(name))?,
            None => return Ok(None),
            Some(Value::Null) if role == ChildRole::Backing => return Ok(Some(None)),
            Some(Value::String(node)) if node.is_empty() && role == ChildRole::Backing => {
                return Ok(Some(None));
            }
            Some(Value::String(node)) => {
                self.only_for_users("a node")?;
                self.graph.find(&node)?
            }
            Some(Value::Object(options)) => self.open_inline(name, role, options).await?,
            Some(_) => return Err(self.options.wrong_type(name, "BlockdevRef")),
        };
        Ok(Some(Some(self.attach(&child, name, role)?)))
    }
    /// The child under option `name`, which must be there.
    pub async fn required_child(&mut self, name: &'static str, role: ChildRole) -> Result<Edge> {
        match self.child(name, role).await? {
            Some(Some(edge)) => Ok(edge),
            _ if self.graph.probes() => {
                let message = format!("A block device must be specified for \"{name}\"");
                Err(Error::new(ErrorKind::Invalid, message))
            }
            _ => Err(self.missing(name)),
        }
    }
    /// The children in the list under option `name`: node names or inline definitions. They are
    /// called `name.0`, `name.1` and so on.
    pub async fn children(&mut self, name: &str, role: ChildRole) -> Result<Vec<Edge>> {
        let list: Vec<(usize, Value)> = match self.options.take(name) {
            None => Vec::new(),
            Some(Value::Array(list)) if list.len() <= MAX_CHILDREN => {
                list.into_iter().enumerate().collect()
            }
            Some(Value::Object(list)) if list.len() <= MAX_CHILDREN => self.numbered(name, list)?,
            Some(Value::Array(_) | Value::Object(_)) => {
                let message = format!("more than {MAX_CHILDREN} children of one node");
                return Err(Error::new(ErrorKind::Invalid, message));
            }
            Some(_) => return Err(self.options.wrong_type(name, "array")),
        };
        let mut edges = Vec::with_capacity(list.len());
        for (index, child) in list {
            let name = child_name(name, index);
            self.options.put(name, child);
            edges.push(self.required_child(name, role).await?);
        }
        Ok(edges)
    }
    /// The children of a list that was changed: each keeps its number.
    fn numbered(&self, name: &str, list: Map<String, Value>) -> Result<Vec<(usize, Value)>> {
        let mut numbered = Vec::with_capacity(list.len());
        for (index, child) in list {
            match index.parse::<u16>() {
                Ok(index) => numbered.push((usize::from(index), child)),
                Err(_) => return Err(self.options.wrong_type(name, "array")),
            }
        }
        numbered.sort_by_key(|(index, _)| *index);
        Ok(numbered)
    }
    /// The backing of the image in `image_file`, which itself names `named`: what the user gave
    /// under "backing", else what the image names, when policy allows (see [`crate::open`]). Without
    /// a stored format the graph must be one that probes (tools); daemons never guess it. An image
    /// that is only described has none.
    pub async fn backing(
        &mut self,
        image_file: &Edge,
        named: Option<BackingName<'_>>,
    ) -> Result<Option<Edge>> {
        if self.place.purpose == Purpose::Describe {
            // What was given for it is refused with the other options that nobody took.
            if let Some(Value::Null) = self.options.get("backing") {
                self.options.take("backing");
            }
            return Ok(None);
        }
        let context = |error: Error| error.context("Could not open backing file");
        let changes = self.changed_backing(named);
        let (Some(named), true) = (named, changes.is_some() || !self.options.has("backing")) else {
            let given = self.child("backing", ChildRole::Backing).await;
            return given.map(Option::flatten).map_err(context);
        };
        let child = self
            .open_backing(image_file, named, changes.unwrap_or_default())
            .await
            .map_err(context)?;
        self.node.origin.named_backing = Some(child.filename());
        self.attach(&child, "backing", ChildRole::Backing).map(Some)
    }

    /// Options of tools' users for a backing node that leave its file to the image; a definition
    /// with a file gets the format that the image tells, if it has none.
    fn changed_backing(&mut self, named: Option<BackingName<'_>>) -> Option<Map<String, Value>> {
        let named = named.filter(|_| self.graph.probes())?;
        let given = self.options.get_mut("backing")?.as_object_mut()?;
        if given.contains_key("file") || given.contains_key("filename") {
            if let Some(format) = named.format {
                given.entry("driver").or_insert_with(|| format.into());
            }
            return None;
        }
        match self.options.take("backing") {
            Some(Value::Object(given)) => Some(given),
            _ => None,
        }
    }

    /// Opens the file that an image names for its data, under the policy for backing files, and for
    /// writing when this node writes. Users of tools name it as it lies from the working directory.
    pub async fn data_file_named(&mut self, image_file: &Edge, name: &str) -> Result<Edge> {
        let resolve = match self.graph.probes() {
            true => names::resolve_from_here,
            false => names::resolve,
        };
        let directory = image_file.node().base_directory()?;
        let found = resolve(&directory, (name, self.access()), &self.graph.policy())?;
        let child = self.open_found(image_file, ("data-file", name), found);
        self.attach(&child.await?, "data-file", ChildRole::Data)
    }

    /// Opens one of several files that an image names for parts of the disk, as
    /// [`OpenRequest::data_file_named`] does. The child is called `extents.INDEX`; one in the role
    /// of an image holds metadata, too.
    ///
    /// # Errors
    /// `Forbidden` by policy, `Corrupt` for a file of the images above, those of opening a file.
    pub async fn extent_named(
        &mut self,
        image_file: &Edge,
        (index, name): (usize, &str),
        role: ChildRole,
    ) -> Result<Edge> {
        let child_name = child_name("extents", index);
        let directory = image_file.node().base_directory()?;
        let found = names::resolve(&directory, (name, self.access()), &self.graph.policy())?;
        let child = self.open_found(image_file, (child_name, name), found);
        self.attach(&child.await?, child_name, role)
    }

    /// What files that an image names for its data are opened for.
    fn access(&self) -> Access {
        match self.node.read_only {
            true => Access::Read,
            false => Access::ReadWrite,
        }
    }

    /// Opens a file that was found under the policy for names.
    async fn open_found(
        &self,
        image_file: &Edge,
        (child_name, name): (&str, &str),
        found: names::Found,
    ) -> Result<Arc<Node>> {
        let mut place = self.below(child_name)?;
        place.chain.extend(files_of(image_file.node()));
        place.enter(found.id, name)?;
        let definition = Definition {
            options: as_map([("driver", FILE_PROTOCOL), ("filename", &found.path)]),
            inherited: Some(Inherited::of(&self.node, ChildRole::Data)),
            place,
            descriptor: Some(found.descriptor),
            file: None,
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

    /// What the writer of an image left in its redo log when it was killed: without it the file is
    /// older than what the guest was told is done.
    ///
    /// # Errors
    /// What opening the log answers.
    pub fn left_behind(&self, image_file: &Edge) -> Result<Vec<Record>> {
        match (self.graph.redo_dir(), image_file.node().identity()) {
            (Some(directory), Some(identity)) => RedoLog::left_behind(directory, &identity),
            _ => Ok(Vec::new()),
        }
    }

    /// Refuses an image whose writer was killed and left changes in its redo log: a check would not
    /// see them, and a repair would give away what they refer to.
    ///
    /// # Errors
    /// `Busy` naming what to do; what opening the log answers.
    pub fn refuse_left_behind(&self, image_file: &Edge) -> Result<()> {
        let left = self.left_behind(image_file)?.len();
        if left == 0 {
            return Ok(());
        }
        let image = image_file.node();
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
        backing: BackingName<'_>,
        options: Map<String, Value>,
    ) -> Result<Arc<Node>> {
        let named = Named {
            image: image_file.node(),
            backing,
            options,
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
            file: None,
        };
        self.graph.open(definition).await
    }

    /// Refuses what only a user may refer to.
    ///
    /// # Errors
    /// `Forbidden` to images.
    pub fn only_for_users(&self, what: &str) -> Result<()> {
        match &self.place.source {
            Source::User => Ok(()),
            Source::Image { name, .. } => Err(names::forbidden(
                name,
                &format!("{what} of this process is no business of an image"),
            )),
        }
    }

    fn below(&self, name: &str) -> Result<Place> {
        let place = Place {
            path: format!("{}{name}.", self.place.path),
            depth: self.place.depth + 1,
            purpose: match (self.place.purpose, name) {
                (Purpose::Inspect, "backing") => Purpose::Inspect,
                _ => Purpose::Serve,
            },
            chain: self.place.chain.clone(),
            source: self.place.source.clone(),
            successor_of: None,
        };
        if place.depth > MAX_CHAIN {
            let message = format!("more than {MAX_CHAIN} nodes below each other");
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        Ok(place)
    }

    /// The child under option `name`, which must be there and on which more is claimed than its role needs.
    pub async fn required_child_beyond(
        &mut self,
        name: &'static str,
        role: ChildRole,
        beyond: Beyond,
    ) -> Result<Edge> {
        let edge = self.required_child(name, role).await?;
        let child = Arc::clone(edge.child());
        drop(edge);
        let spec = spec_of(&self.node, name, role);
        Edge::attach_beyond(&child, spec, beyond)
    }
    fn attach(&self, child: &Arc<Node>, name: &'static str, role: ChildRole) -> Result<Edge> {
        attach_as(&self.node, child, name, role)
    }
}

/// Attaches to `child` as the node with the options `parent`.
pub(crate) fn attach_as(
    parent: &NodeOptions,
    child: &Arc<Node>,
    name: &'static str,
    role: ChildRole,
) -> Result<Edge> {
    Edge::attach(child, spec_of(parent, name, role))
}

fn spec_of(parent: &NodeOptions, name: &'static str, role: ChildRole) -> EdgeSpec {
    EdgeSpec {
        parent: parent.node_name.clone(),
        name,
        role,
        read_only: parent.read_only,
    }
}

impl Place {
    /// Adds a file to the chain; an error when it is there already.
    pub(super) fn enter(&mut self, id: FileId, name: &str) -> Result<()> {
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
    /// The child "file", when it had to be opened first.
    pub(crate) file: Option<Arc<Node>>,
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
