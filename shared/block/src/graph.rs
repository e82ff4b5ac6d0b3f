//! The registry of nodes: names, insertion, removal, the driver catalogue.
//!
//! Owns: every node of the process by name, and which of them the user added (the others are
//! inline children and go with their last parent). Promises: a failed `add` leaves no node behind;
//! a node in use is not removed; parents close before their children. Must not know: concrete
//! drivers.

use crate::amend::{self, AmendRequest};
use crate::check::Purpose;
use crate::driver::BoxFuture;
use crate::error::{Error, ErrorKind, Result};
use crate::events::NodeEvents;
use crate::node::Node;
use crate::objects::Objects;
use crate::open::{
    Definition, DriverEntry, FILE_PROTOCOL, Inherited, OpenRequest, Options, PROBE_BYTES, Place,
    as_map,
};
use crate::secret::Secrets;
use executor::Buffer;
use serde_json::{Map, Value};
use std::cell::{Cell, Ref, RefCell};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What names inside images may open besides files beneath the image's own directory.
#[derive(Clone, Debug, Default)]
pub struct NamePolicy {
    /// Directories given with `--allow-dir`, as absolute paths.
    pub allowed_dirs: Vec<PathBuf>,
}

/// How formats that nobody names are found out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Formats {
    /// They are not: a guest could make a raw disk look like anything.
    Named,
    /// From the image's first bytes, as users of command-line tools expect.
    Probed,
}

struct Entry {
    node: Arc<Node>,
    /// Added by the user, who has to remove it.
    owned: bool,
}

/// All nodes of a process. Used by the control thread only.
pub struct Graph {
    drivers: Vec<&'static DriverEntry>,
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
        let length = file.length().min(PROBE_BYTES as u64) as usize;
        let start = Buffer::zeroed(length);
        file.read(0, start.clone()).await.map_err(|errno| {
            let message = format!(
                "Could not read image for determining its format: {}",
                errno.desc()
            );
            Error::new(ErrorKind::Io, message)
        })?;
        let start = start.to_heap();
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
        // A parent is always younger than its children.
        for node in self.nodes() {
            let closed = self.close(&node).await;
            result = result.and(closed);
            self.forget(&node);
        }
        result
    }

    pub(crate) fn policy(&self) -> Ref<'_, NamePolicy> {
        self.policy.borrow()
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
        })
        .await
    }

    /// Opens a file that was just made, writable and with a generated name.
    pub(crate) async fn open_made(&self, name: String) -> Result<Arc<Node>> {
        let definition = Definition {
            options: as_map([("driver", FILE_PROTOCOL), ("filename", &name)]),
            inherited: Some(Inherited::for_new()),
            place: Place::default(),
            descriptor: None,
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
    fn request(&self, definition: Definition) -> Result<(OpenRequest<'_>, &'static DriverEntry)> {
        let owned = definition.inherited.is_none();
        let mut options = Options::new(definition.options, definition.place.path.clone());
        let driver = options.take_driver()?;
        let entry = self
            .entry(&driver)
            .ok_or_else(|| options.unknown_driver(&driver))?;
        let mut node = options.take_node(definition.inherited.unwrap_or_default())?;
        node.node_name = match options.take_node_name()? {
            Some(name) => name,
            None if owned => {
                let message = "'node-name' must be specified for the root node";
                return Err(Error::new(ErrorKind::Invalid, message));
            }
            None => self.generate_name(),
        };
        self.check_free(&node.node_name)?;
        let request = OpenRequest {
            graph: self,
            node,
            options,
            place: definition.place,
            descriptor: definition.descriptor,
        };
        Ok((request, entry))
    }

    async fn open_one(&self, definition: Definition) -> Result<Arc<Node>> {
        let owned = definition.inherited.is_none();
        let (mut request, entry) = self.request(definition)?;
        let driver = (entry.open)(&mut request).await?;
        let free = request
            .options
            .finish()
            .and_then(|()| self.check_free(&request.node.node_name));
        let node = Node::new(request.node, driver);
        if let Err(error) = free {
            self.close(&node).await.ok();
            return Err(error);
        }
        self.entries.borrow_mut().push(Entry {
            node: Arc::clone(&node),
            owned,
        });
        Ok(node)
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
        let (mut request, entry) = self.request(definition)?;
        let Some(amender) = &entry.amend else {
            return Err(amend::unsupported(entry.name));
        };
        (amender.amend)(&mut request, changes).await?;
        changes.finish()
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
