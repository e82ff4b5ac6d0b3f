//! The registry of nodes: names, insertion, removal, the driver catalogue.
//!
//! Owns: every node of the process by name, and which of them the user added (the others are
//! inline children and go with their last parent). Promises: a failed `add` leaves no node behind;
//! a node in use is not removed; parents close before their children. Must not know: concrete
//! drivers.

mod change;
mod reopen;

pub use change::{Quiet, User, UserKind};
pub use reopen::{ChildChange, Reopen, Undo};

pub(crate) use change::DrainedAbove;

use crate::amend::{self, AmendRequest};
use crate::check::Purpose;
use crate::driver::{BoxFuture, Driver};
use crate::error::{Error, ErrorKind, Result};
use crate::events::{NodeEvents, Reporter};
use crate::naming::{Layer, Origin};
use crate::node::Node;
use crate::objects::Objects;
use crate::open::{
    ChildRole, Definition, DriverEntry, FILE_PROTOCOL, Inherited, OpenRequest, Options,
    PROBE_BYTES, Place, Source,
};
use crate::secret::Secrets;
use executor::{Buffer, HeapBuffer};
use serde_json::{Map, Value};
use std::cell::{Cell, Ref, RefCell};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What names inside images may open besides files beneath the image's own directory.
#[derive(Clone, Debug, Default)]
pub struct NamePolicy {
    /// Directories given with `--allow-dir`, as absolute paths.
    pub allowed_dirs: Vec<PathBuf>,
    /// Drivers that names may ask for though they reach out of the process (`nbd`, `http`).
    pub allowed_drivers: Vec<String>,
}

/// How formats that nobody names are found out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Formats {
    /// They are not: a guest could make a raw disk look like anything.
    Named,
    /// From the image's first bytes, as users of command-line tools expect.
    Probed,
}

/// What a probe looks at.
async fn start_of(file: &Node) -> Result<HeapBuffer> {
    let length = file.length().min(PROBE_BYTES as u64) as usize;
    let start = Buffer::zeroed(length);
    file.read(0, start.clone()).await.map_err(|errno| {
        let message = format!(
            "Could not read image for determining its format: {}",
            crate::error::reason(errno)
        );
        Error::new(ErrorKind::Io, message)
    })?;
    Ok(start.to_heap())
}

fn unknown_driver(name: &str) -> Error {
    Error::new(ErrorKind::NotFound, format!("Unknown driver '{name}'"))
}

struct Entry {
    node: Arc<Node>,
    /// Added by the user, who has to remove it.
    owned: bool,
    origin: OpenedFrom,
}

/// What a node was opened from, for whoever opens it anew.
#[derive(Clone)]
struct OpenedFrom {
    options: Map<String, Value>,
    /// Present for inline children.
    inherited: Option<Inherited>,
    place: Place,
}

impl OpenedFrom {
    fn of(definition: &Definition) -> Box<Self> {
        Box::new(Self {
            options: definition.options.clone(),
            inherited: definition.inherited,
            place: definition.place.clone(),
        })
    }
}

/// All nodes of a process. Used by the control thread only.
pub struct Graph {
    pub(crate) drivers: Vec<&'static DriverEntry>,
    policy: RefCell<NamePolicy>,
    formats: Formats,
    redo_dir: Option<PathBuf>,
    secrets: Secrets,
    objects: Objects,
    events: Option<Arc<dyn NodeEvents>>,
    /// In order of insertion.
    entries: RefCell<Vec<Entry>>,
    generated: Cell<u64>,
}

impl Graph {
    /// An empty graph with the drivers of `tables`.
    pub fn new(tables: &[&'static [DriverEntry]], policy: NamePolicy) -> Graph {
        Graph {
            drivers: tables.iter().flat_map(|table| table.iter()).collect(),
            policy: RefCell::new(policy),
            formats: Formats::Named,
            redo_dir: None,
            secrets: Secrets::default(),
            objects: Objects::default(),
            events: None,
            entries: RefCell::default(),
            generated: Cell::new(0),
        }
    }
    /// Keeps the redo logs of writable images in `directory` (private to the process, on tmpfs);
    /// without one, metadata changes that were not flushed do not survive a kill.
    #[must_use]
    pub fn with_redo_dir(self, directory: PathBuf) -> Graph {
        Graph {
            redo_dir: Some(directory),
            ..self
        }
    }
    /// Lets `events` hear what nodes report.
    #[must_use]
    pub fn with_events(self, events: Arc<dyn NodeEvents>) -> Graph {
        Graph {
            events: Some(events),
            ..self
        }
    }
    /// Finds out the formats of backing files that images do not tell (tools only).
    #[must_use]
    pub fn with_probing(self) -> Graph {
        Graph {
            formats: Formats::Probed,
            ..self
        }
    }
    /// Lets names inside images open files beneath `directory`, an absolute path, too.
    pub fn allow_dir(&self, directory: PathBuf) {
        self.policy.borrow_mut().allowed_dirs.push(directory);
    }
    /// Lets names inside images ask for the driver `name`.
    pub fn allow_driver(&self, name: &str) {
        let mut policy = self.policy.borrow_mut();
        policy.allowed_drivers.push(name.to_owned());
    }
    /// What `secret` objects hold.
    pub fn secrets(&self) -> &Secrets {
        &self.secrets
    }
    /// Other objects that drivers refer to.
    pub fn objects(&self) -> &Objects {
        &self.objects
    }
    /// The driver `name`.
    pub fn entry(&self, name: &str) -> Option<&'static DriverEntry> {
        self.drivers
            .iter()
            .copied()
            .find(|entry| entry.name == name)
    }
    /// The names of all drivers.
    pub fn driver_names(&self) -> impl Iterator<Item = &'static str> {
        self.drivers.iter().map(|entry| entry.name)
    }
    /// The format of the image in `file`, guessed from its first bytes; `raw` when nothing else
    /// fits. Tools only: a guest can make a raw disk look like anything.
    ///
    /// # Errors
    /// `Io` when the bytes cannot be read.
    pub async fn probe(&self, file: &Node) -> Result<&'static str> {
        let start = start_of(file).await?;
        let scores = self.drivers.iter().filter_map(|entry| {
            let score = entry.probe?(&start);
            (score > 0).then_some((score, entry.name))
        });
        // The first of equals, as in the table.
        let best = scores.fold(None, |best: Option<(u8, &'static str)>, this| match best {
            Some(best) if best.0 >= this.0 => Some(best),
            _ => Some(this),
        });
        best.map(|(_, name)| name).ok_or_else(|| {
            let message = "Could not determine image format: No compatible driver found";
            Error::new(ErrorKind::Invalid, message)
        })
    }
    /// Whether the first bytes of `file` are those of an image of `format`.
    pub(crate) async fn is_of(&self, file: &Node, format: &str) -> Result<bool> {
        let start = start_of(file).await?;
        let probe = self.entry(format).and_then(|entry| entry.probe);
        Ok(probe.is_some_and(|probe| probe(&start) > 0))
    }
    /// Opens a node (and inline children) from `--blockdev`/`blockdev-add` options and adds it.
    /// Values may be typed JSON or strings (from `key=value`).
    pub async fn add(&self, options: Map<String, Value>) -> Result<Arc<Node>> {
        self.add_for(Purpose::Serve, options).await
    }
    /// [`Graph::add`] for a purpose.
    pub async fn add_for(
        &self,
        purpose: Purpose,
        options: Map<String, Value>,
    ) -> Result<Arc<Node>> {
        let place = Place {
            purpose,
            ..Place::default()
        };
        let opened = self
            .open(Definition {
                options,
                inherited: None,
                place,
                descriptor: None,
                file: None,
            })
            .await;
        if opened.is_err() {
            self.sweep().await;
        }
        opened
    }
    /// Removes and closes a node that has no parents; inline children go with it.
    pub async fn remove(&self, node_name: &str) -> Result<()> {
        let node = self.node(node_name).ok_or_else(|| {
            let message = format!("Failed to find node with node-name='{node_name}'");
            Error::new(ErrorKind::NotFound, message)
        })?;
        let busy = |message: String| Err(Error::new(ErrorKind::Busy, message));
        if node.users().has_root() {
            return busy(format!("Node {node_name} is in use"));
        }
        if !self.is_owned(node_name) {
            return busy(format!("Node {node_name} is not owned by the monitor"));
        }
        if node.in_use() {
            return busy(format!("Block device {node_name} is in use"));
        }
        let result = self.close(&node).await;
        self.forget(&node);
        drop(node);
        self.sweep().await;
        result
    }
    /// A node by name.
    pub fn node(&self, node_name: &str) -> Option<Arc<Node>> {
        let entries = self.entries.borrow();
        let entry = entries
            .iter()
            .find(|entry| entry.node.name() == node_name)?;
        Some(Arc::clone(&entry.node))
    }
    /// All nodes, newest first (the order of `query-named-block-nodes`).
    pub fn nodes(&self) -> Vec<Arc<Node>> {
        let entries = self.entries.borrow();
        entries
            .iter()
            .rev()
            .map(|entry| Arc::clone(&entry.node))
            .collect()
    }
    /// Whether the user added the node (and did not get it as somebody's inline child).
    pub fn is_owned(&self, node_name: &str) -> bool {
        let entries = self.entries.borrow();
        entries
            .iter()
            .any(|entry| entry.owned && entry.node.name() == node_name)
    }
    /// Flushes and closes every node, parents first. The first error is reported, after all have
    /// been tried. Roots must be gone.
    pub async fn close_all(&self) -> Result<()> {
        let mut result = Ok(());
        loop {
            // Mostly the newest; but a node may have got a younger child since it was opened.
            let nodes = self.nodes();
            let has_no_parent = |node: &&Arc<Node>| !node.has_parent_node();
            let next = nodes.iter().find(has_no_parent).or(nodes.first());
            let Some(node) = next.cloned() else {
                return result;
            };
            drop(nodes);
            let closed = self.close(&node).await;
            result = result.and(closed);
            self.forget(&node);
        }
    }

    pub(crate) fn policy(&self) -> Ref<'_, NamePolicy> {
        self.policy.borrow()
    }

    /// How what happens in `node` is told to who hears events.
    pub fn reporter(&self, node: &Node) -> Reporter {
        Reporter::new(node.name(), self.events())
    }

    pub(crate) fn events(&self) -> Option<Arc<dyn NodeEvents>> {
        self.events.clone()
    }

    pub(crate) fn probes(&self) -> bool {
        self.formats == Formats::Probed
    }

    /// The node that a reference in options means (a name, or a definition of its own): one that is there, or a new one
    /// that goes with its last user.
    ///
    /// # Errors
    /// `NotFound`; those of opening.
    pub async fn find_or_open(&self, reference: Value) -> Result<Arc<Node>> {
        let options = match reference {
            Value::String(name) => return self.find(&name),
            Value::Object(options) => options,
            _ => {
                let message = "Invalid parameter type for 'file', expected: BlockdevRef";
                return Err(Error::new(ErrorKind::Invalid, message));
            }
        };
        self.open(Definition {
            options,
            inherited: Some(Inherited::for_new()),
            place: Place::default(),
            descriptor: None,
            file: None,
        })
        .await
    }

    /// Opens a file that was just made, writable and with a generated name.
    pub(crate) async fn open_made(&self, options: Map<String, Value>) -> Result<Arc<Node>> {
        let definition = Definition {
            options,
            inherited: Some(Inherited::for_new()),
            place: Place::default(),
            descriptor: None,
            file: None,
        };
        self.open(definition).await
    }

    pub(crate) fn redo_dir(&self) -> Option<&Path> {
        self.redo_dir.as_deref()
    }

    /// A node that options refer to.
    pub(crate) fn find(&self, node_name: &str) -> Result<Arc<Node>> {
        self.node(node_name).ok_or_else(|| {
            let message = format!("Cannot find device='{node_name}' nor node-name='{node_name}'");
            Error::new(ErrorKind::NotFound, message)
        })
    }

    /// Opens a node and registers it. Boxed: children open recursively.
    pub(crate) fn open(&self, definition: Definition) -> BoxFuture<'_, Result<Arc<Node>>> {
        Box::pin(self.open_one(definition))
    }

    /// The request that the driver of a definition gets.
    async fn request(
        &self,
        mut definition: Definition,
    ) -> Result<(OpenRequest<'_>, &'static DriverEntry)> {
        if self.probes() && !definition.options.contains_key("driver") {
            self.find_driver(&mut definition).await?;
        }
        let owned = definition.inherited.is_none();
        let mut options = Options::new(definition.options.clone(), definition.place.path.clone());
        let driver = options.take_driver()?;
        let entry = self.entry(&driver).ok_or_else(|| match self.probes() {
            true => unknown_driver(&driver),
            false => Options::unknown_driver(&driver),
        })?;
        if self.probes() && entry.protocol.is_none() {
            let named = self.name_file(&mut definition.options)?;
            if named {
                options = Options::new(definition.options.clone(), definition.place.path.clone());
                options.take_driver()?;
            }
        }
        definition.obey(entry, &self.policy())?;
        let mut origin = Origin::new(&driver, &definition.options, entry.strong_options);
        origin.described = definition.place.purpose == Purpose::Describe;
        let mut node = options.take_node(definition.inherited.unwrap_or_default())?;
        node.node_name = match options.take_node_name()? {
            Some(name) => name,
            None if definition.place.successor_of.is_some() => {
                let name = definition.place.successor_of.take();
                name.unwrap_or_default()
            }
            None if owned => {
                let message = "'node-name' must be specified for the root node";
                return Err(Error::new(ErrorKind::Invalid, message));
            }
            None => self.generate_name(),
        };
        node.origin = origin;
        self.check_free(&node.node_name)?;
        let request = OpenRequest {
            graph: self,
            node,
            options,
            place: definition.place,
            descriptor: definition.descriptor,
            file: definition.file,
        };
        Ok((request, entry))
    }

    /// On command lines a format's `filename` is that of its `file`; whether there was one.
    fn name_file(&self, options: &mut Map<String, Value>) -> Result<bool> {
        let Some(Value::String(name)) = options.get("filename") else {
            return Ok(false);
        };
        let mut file = self.names().options(name)?;
        options.shift_remove("filename");
        if let Some(Value::Object(given)) = options.shift_remove("file") {
            file.extend(given);
        }
        options.insert("file".to_owned(), Value::Object(file));
        Ok(true)
    }

    /// Finds out which driver a definition without one means: that of its `file`'s content, or for
    /// a definition with nothing but a file name the protocol of plain names.
    async fn find_driver(&self, definition: &mut Definition) -> Result<()> {
        let options = &mut definition.options;
        if !definition.place.path.is_empty() && options.contains_key("filename") {
            options.insert("driver".into(), FILE_PROTOCOL.into());
            return Ok(());
        }
        let Some(file) = options.shift_remove("file") else {
            let message = "Must specify either driver or file";
            return Err(Error::new(ErrorKind::Invalid, message));
        };
        let file = match (file, &definition.place.source) {
            (Value::String(name), Source::User) => self.find(&name)?,
            (Value::Object(file), _) => {
                let path = definition.place.path.clone();
                let inherited = definition.inherited.unwrap_or_default();
                let parent = Options::new(options.clone(), path).take_node(inherited)?;
                let mut place = definition.place.clone();
                place.path.push_str("file.");
                place.purpose = Purpose::Serve;
                let definition = Definition {
                    options: file,
                    inherited: Some(Inherited::of(&parent, ChildRole::Image)),
                    place,
                    descriptor: None,
                    file: None,
                };
                self.open(definition).await?
            }
            _ => {
                let message = "A block device must be specified for \"file\"";
                return Err(Error::new(ErrorKind::Invalid, message));
            }
        };
        let driver = self.probe(&file).await?;
        definition.options.insert("driver".into(), driver.into());
        definition.file = Some(file);
        Ok(())
    }

    /// Definitions nest: what is kept on the stack while the driver opens is boxed.
    async fn open_one(&self, definition: Definition) -> Result<Arc<Node>> {
        let origin = OpenedFrom::of(&definition);
        let (mut request, driver) = self.boxed_request(definition).await?;
        let driver = (driver.open)(&mut request).await?;
        match self.register(request, (driver, origin)) {
            Ok(node) => Ok(node),
            Err(refused) => {
                let (unused, error) = *refused;
                self.close(&unused).await.ok();
                Err(error)
            }
        }
    }

    fn boxed_request(
        &self,
        definition: Definition,
    ) -> BoxFuture<'_, Result<(Box<OpenRequest<'_>>, &'static DriverEntry)>> {
        Box::pin(async move {
            let (request, entry) = self.request(definition).await?;
            Ok((Box::new(request), entry))
        })
    }

    /// Makes a node of an opened driver; the node and the reason when it cannot be.
    fn register(
        &self,
        request: Box<OpenRequest<'_>>,
        (driver, origin): (Box<dyn Driver>, Box<OpenedFrom>),
    ) -> std::result::Result<Arc<Node>, Box<(Arc<Node>, Error)>> {
        let free = self
            .check_taken(&request.options, &*driver)
            .and_then(|()| self.check_free(&request.node.node_name));
        let node = Node::new(request.node, driver);
        match free {
            Err(error) => Err(Box::new((node, error))),
            Ok(()) => {
                self.entries.borrow_mut().push(Entry {
                    node: Arc::clone(&node),
                    owned: origin.inherited.is_none(),
                    origin: *origin,
                });
                Ok(node)
            }
        }
    }

    /// Changes what the image that `options` would open was created with. The image must not be
    /// open; its children are, meanwhile.
    ///
    /// # Errors
    /// The driver's; `Unsupported` when it amends nothing.
    pub async fn amend(
        &self,
        options: Map<String, Value>,
        changes: &mut AmendRequest<'_>,
    ) -> Result<()> {
        let definition = Definition {
            options,
            inherited: None,
            place: Place::default(),
            descriptor: None,
            file: None,
        };
        let amended = self.amend_one(definition, changes).await;
        self.sweep().await;
        amended
    }

    async fn amend_one(
        &self,
        definition: Definition,
        changes: &mut AmendRequest<'_>,
    ) -> Result<()> {
        let (mut request, entry) = self.request(definition).await?;
        let Some(amender) = &entry.amend else {
            return Err(amend::unsupported(entry.name));
        };
        (amender.amend)(&mut request, changes).await?;
        changes.finish()
    }

    /// An error for the first option that nobody took, in the words of the block layer for tools
    /// and in those of the schema for QMP.
    fn check_taken(&self, options: &Options, driver: &dyn Driver) -> Result<()> {
        let left = options.left();
        let (true, Some(option)) = (self.probes(), left.first()) else {
            return options.finish();
        };
        let name = driver.driver_name();
        Err(Error::new(
            ErrorKind::Invalid,
            match driver.layer() {
                Layer::Protocol => {
                    format!("Block protocol '{name}' doesn't support the option '{option}'")
                }
                _ => format!("Block format '{name}' does not support the option '{option}'"),
            },
        ))
    }

    fn check_free(&self, node_name: &str) -> Result<()> {
        if self.node(node_name).is_some() {
            let message = format!("Duplicate nodes with node-name='{node_name}'");
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        Ok(())
    }

    fn generate_name(&self) -> String {
        self.generated.set(self.generated.get() + 1);
        format!("#block{:03}", self.generated.get())
    }

    async fn close(&self, node: &Node) -> Result<()> {
        let flushed = match node.options().read_only {
            true => Ok(()),
            false => node.flush().await,
        };
        // Closed in any case: locks are given back and nothing runs on.
        let closed = node.driver().close().await;
        flushed
            .and(closed)
            .map_err(|errno| Error::io(format!("Could not close node '{}'", node.name()), errno))
    }

    fn forget(&self, node: &Arc<Node>) {
        self.entries
            .borrow_mut()
            .retain(|entry| !Arc::ptr_eq(&entry.node, node));
    }

    /// Closes and forgets inline children without a parent.
    pub(crate) async fn sweep(&self) {
        // A node that is being opened, or that somebody holds, has another count.
        let is_orphan = |entry: &Entry| {
            !entry.owned && !entry.node.in_use() && Arc::strong_count(&entry.node) == 1
        };
        loop {
            let orphan = {
                let mut entries = self.entries.borrow_mut();
                entries
                    .iter()
                    .position(is_orphan)
                    .map(|index| entries.remove(index).node)
            };
            let Some(orphan) = orphan else { return };
            if let Err(error) = self.close(&orphan).await {
                tracing::warn!(node = orphan.name(), %error, "closing an unused node failed");
            }
        }
    }
}
