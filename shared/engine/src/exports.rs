//! Commands on exports: `block-export-add`, `block-export-del`, `query-block-exports`,
//! `x-block-export-set-iothread`; those on the NBD server are in [`nbd_server`].
//!
//! ```text
//!   block-export-add ──> running ── block-export-del ──> shutting down ──> BLOCK_EXPORT_DELETED
//! ```
//!
//! Deletion answers at once and goes on by itself: requests in flight complete first.

use std::cell::RefCell;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

use block::Node;
use block::accounting::Accounting;
use executor::sync::Notify;
use exports::nbd::NbdExport;
use exports::{VhostUserBlk, VhostUserBlkOptions};
use qmp::{Arguments, Error, Event, Result, Value, json};
use serde::Deserialize;
use vhost_daemon::Address;

use crate::engine::Engine;
use crate::error::from_block;
use crate::nodes;
use executor::{Handle, IoThread};

pub(crate) mod nbd_server;

/// The types of exports.
const TYPES: [&str; 2] = ["nbd", "vhost-user-blk"];

/// Most iothreads of one export.
const MAX_IOTHREADS: usize = 64;

/// All exports.
#[derive(Default)]
pub(crate) struct Exports {
    entries: RefCell<Vec<Entry>>,
    /// An entry went away.
    removed: Notify,
    nbd: RefCell<Option<nbd_server::Running>>,
}

/// An export that runs.
#[derive(Clone)]
enum Export {
    VhostUserBlk(Rc<VhostUserBlk>),
    Nbd(Rc<NbdExport>),
}

impl Export {
    fn type_name(&self) -> &'static str {
        match self {
            Export::VhostUserBlk(_) => "vhost-user-blk",
            Export::Nbd(_) => "nbd",
        }
    }

    /// The node that it shows; `None` while that is not to be told.
    fn node(&self) -> Option<Arc<Node>> {
        match self {
            Export::VhostUserBlk(export) => export.node(),
            Export::Nbd(export) => Some(Arc::clone(export.node())),
        }
    }

    fn accounting(&self) -> &Arc<Accounting> {
        match self {
            Export::VhostUserBlk(export) => export.accounting(),
            Export::Nbd(export) => export.accounting(),
        }
    }
}

/// What counts the requests of an export.
pub(crate) struct Counted {
    pub(crate) id: String,
    pub(crate) node: Arc<Node>,
    pub(crate) accounting: Arc<Accounting>,
}

/// An export by id.
struct Entry {
    id: String,
    type_name: &'static str,
    /// The node's name when it was last known: a snapshot puts another one there.
    node_name: RefCell<String>,
    /// `None` while it is shutting down.
    running: Option<Export>,
    /// The socket that it made in the file system.
    socket_path: Option<PathBuf>,
    /// Held, so that a thread in use cannot be deleted.
    iothreads: Vec<Rc<IoThread>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Common {
    id: String,
    node_name: String,
    #[serde(default)]
    writable: bool,
    #[serde(default)]
    writethrough: bool,
    /// The threads of an export change by command only, so this is always granted.
    #[serde(rename = "fixed-iothread")]
    _fixed_iothread: Option<bool>,
}

#[derive(Deserialize)]
#[serde(rename = "type", rename_all = "kebab-case")]
enum Kind {
    #[serde(rename_all = "kebab-case")]
    VhostUserBlk {
        addr: SocketAddress,
        /// Listen (the default), or connect to a front-end that listens.
        server: Option<bool>,
        logical_block_size: Option<u64>,
        physical_block_size: Option<u64>,
        /// Offer SECURE_ERASE.
        #[serde(default)]
        secure_erase: bool,
        num_queues: Option<u16>,
        queue_size: Option<u16>,
        serial: Option<String>,
    },
    Nbd(nbd_server::ExportOptions),
}

#[derive(Deserialize)]
#[serde(rename = "type", rename_all = "kebab-case")]
enum SocketAddress {
    Unix { path: String },
    Fd { str: String },
}

pub(crate) async fn block_export_add(
    engine: &Rc<Engine>,
    mut arguments: Arguments,
) -> Result<Value> {
    match arguments.get("type") {
        None => return Err(Error::missing_parameter("type")),
        // As the most telling mistake it goes first.
        Some(Value::String(name)) if !TYPES.contains(&name.as_str()) => {
            return Err(Error::parameter_value("type", name));
        }
        Some(_) => {}
    }
    let iothreads = take_iothreads(&mut arguments)?;
    let common: Common = arguments.take()?;
    let kind: Kind = arguments.parse()?;
    if !qmp::is_identifier(&common.id) {
        return Err(Error::generic("Invalid block export id"));
    }
    let taken = engine.exports.entries.borrow();
    if taken.iter().any(|entry| entry.id == common.id) {
        let id = &common.id;
        return Err(Error::generic(format!(
            "Block export id '{id}' is already in use"
        )));
    }
    drop(taken);
    let node = nodes::find(engine, None, Some(&common.node_name))?;
    let iothreads: Result<Vec<_>> = iothreads
        .iter()
        .map(|id| engine.objects.iothreads().find(id))
        .collect();
    let iothreads = iothreads?;
    let mut socket_path = None;
    let running = match kind {
        Kind::Nbd(options) => {
            let export = nbd_server::export(engine, &node, (&common, options, &iothreads))?;
            Export::Nbd(export)
        }
        kind @ Kind::VhostUserBlk { .. } => {
            let mut options = vhost_user_blk_options(engine, &common, kind)?;
            if let Address::Listen(path) = &options.address {
                socket_path = Some(path.clone());
            }
            options.iothreads = handles(&iothreads);
            let export = VhostUserBlk::start(&node, options).map_err(from_block)?;
            Export::VhostUserBlk(Rc::new(export))
        }
    };
    tracing::info!(export = common.id, node = common.node_name, "export added");
    engine.exports.entries.borrow_mut().push(Entry {
        id: common.id,
        type_name: running.type_name(),
        node_name: RefCell::new(common.node_name),
        running: Some(running),
        socket_path,
        iothreads,
    });
    Ok(json!({}))
}

fn handles(iothreads: &[Rc<IoThread>]) -> Vec<Handle> {
    let handles = iothreads.iter().map(|iothread| iothread.handle().clone());
    handles.collect()
}

/// `iothread`: one id, or a list of them for the queues to be spread over.
fn take_iothreads(arguments: &mut Arguments) -> Result<Vec<String>> {
    let wrong_type = |path| Error::parameter_type(path, "BlockExportIothreads");
    let path = arguments.path_of("iothread");
    let items = match arguments.take_value("iothread") {
        None => return Ok(Vec::new()),
        Some(Value::Array(items)) if !items.is_empty() => items,
        Some(one @ Value::String(_)) => vec![one],
        Some(_) => return Err(wrong_type(path)),
    };
    if items.len() > MAX_IOTHREADS {
        let limit = format!("at most {MAX_IOTHREADS} iothreads");
        return Err(Error::parameter_expects(path, &limit));
    }
    let ids = items.into_iter().map(|item| match item {
        Value::String(id) => Ok(id),
        _ => Err(wrong_type(path.clone())),
    });
    ids.collect()
}

fn vhost_user_blk_options(
    engine: &Engine,
    common: &Common,
    kind: Kind,
) -> Result<VhostUserBlkOptions> {
    let Kind::VhostUserBlk {
        addr,
        server,
        logical_block_size,
        physical_block_size,
        secure_erase,
        num_queues,
        queue_size,
        serial,
    } = kind
    else {
        return Err(Error::parameter_value("type", "nbd"));
    };
    let address = match (addr, server.unwrap_or(true)) {
        (SocketAddress::Unix { path }, true) => Address::Listen(path.into()),
        (SocketAddress::Unix { path }, false) => Address::Connect(path.into()),
        (SocketAddress::Fd { str }, true) => Address::ListenFd(engine.claim_fd(&str)?),
        (SocketAddress::Fd { .. }, false) => {
            let what = "server=off needs an address of type 'unix'";
            return Err(Error::generic(what));
        }
    };
    let mut options = VhostUserBlkOptions::new(&common.id, address);
    options.writable = common.writable;
    let size = |name: &str, bytes: u64| {
        u32::try_from(bytes).map_err(|_| {
            let id = &common.id;
            Error::generic(format!("Property {id}.{name} doesn't take value '{bytes}'"))
        })
    };
    if let Some(bytes) = logical_block_size {
        options.logical_block_size = size("logical-block-size", bytes)?;
    }
    if let Some(bytes) = physical_block_size {
        options.physical_block_size = Some(size("physical-block-size", bytes)?);
    }
    options.writethrough = common.writethrough;
    options.secure_erase = secure_erase;
    options.num_queues = num_queues.unwrap_or(options.num_queues);
    options.queue_size_max = queue_size.unwrap_or(options.queue_size_max);
    options.serial = serial.unwrap_or(options.serial);
    Ok(options)
}

#[derive(Deserialize)]
struct BlockExportDel {
    id: String,
    #[serde(default)]
    mode: DeleteMode,
}

/// Whether an export in use may be deleted. A front-end reconnects and does not count as a user,
/// so both modes end a vhost-user-blk export.
#[derive(Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum DeleteMode {
    #[default]
    Safe,
    Hard,
}

pub(crate) async fn block_export_del(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    let BlockExportDel { id, mode } = arguments.parse()?;
    engine.delete_export(id, mode).await?;
    Ok(json!({}))
}

/// Moves the queues of an export to other threads while it is in use.
pub(crate) async fn set_iothread(engine: &Rc<Engine>, mut arguments: Arguments) -> Result<Value> {
    if arguments.get("iothread").is_none() {
        return Err(Error::missing_parameter("iothread"));
    }
    let names = match arguments.get("iothread") {
        Some(Value::Null) => {
            arguments.take_value("iothread");
            Vec::new()
        }
        _ => take_iothreads(&mut arguments)?,
    };
    let SetIothread { id } = arguments.parse()?;
    let wanted: Result<Vec<_>> = names
        .iter()
        .map(|name| engine.objects.iothreads().find(name))
        .collect();
    let wanted = wanted?;
    let threads = wanted
        .iter()
        .map(|thread| thread.handle().clone())
        .collect();
    // Until the last queue has moved, its old thread is in use as well as its new one.
    let (export, _old) = engine.exports.retarget(&id, wanted)?;
    match export {
        Export::VhostUserBlk(export) => export.set_threads(threads).await.map_err(from_block)?,
        Export::Nbd(export) => export.set_threads(threads),
    }
    Ok(json!({}))
}

impl Exports {
    /// Takes a running export, to be deleted; whether somebody uses it.
    fn take(&self, id: &str, mode: DeleteMode) -> Result<(Export, bool)> {
        let mut entries = self.entries.borrow_mut();
        let Some(entry) = entries.iter_mut().find(|entry| entry.id == id) else {
            return Err(Error::generic(format!("Export '{id}' is not found")));
        };
        let shutting_down = || Error::generic(format!("Export '{id}' is already shutting down"));
        let used = match entry.running.as_ref().ok_or_else(shutting_down)? {
            // A front-end reconnects; whether it is there now says nothing.
            Export::VhostUserBlk(_) => true,
            Export::Nbd(export) => {
                let used = self.nbd_clients_of(export) > 0;
                if used && mode == DeleteMode::Safe {
                    return Err(Error::generic(format!("export '{id}' still in use")));
                }
                used
            }
        };
        let export = entry.running.take().ok_or_else(shutting_down)?;
        Ok((export, used))
    }

    /// The exports that run, in the order in which they were made.
    pub(crate) fn counted(&self) -> Vec<Counted> {
        let entries = self.entries.borrow();
        let counted = entries.iter().filter_map(|entry| {
            let export = entry.running.as_ref()?;
            Some(Counted {
                id: entry.id.clone(),
                node: export.node()?,
                accounting: Arc::clone(export.accounting()),
            })
        });
        counted.collect()
    }

    /// Whether `id` is an export, but not of this type.
    fn is_of_another_type(&self, id: &str, type_name: &str) -> bool {
        let entries = self.entries.borrow();
        let mut others = entries.iter().filter(|entry| entry.type_name != type_name);
        others.any(|entry| entry.id == id)
    }

    /// Whether there is an export of a type.
    fn any(&self, wanted: impl Fn(&str) -> bool) -> bool {
        let entries = self.entries.borrow();
        entries.iter().any(|entry| wanted(entry.type_name))
    }

    /// Notes other iothreads for export `id`; gives the export and the threads that it had.
    fn retarget(&self, id: &str, wanted: Vec<Rc<IoThread>>) -> Result<(Export, Vec<Rc<IoThread>>)> {
        let mut entries = self.entries.borrow_mut();
        let Some(entry) = entries.iter_mut().find(|entry| entry.id == id) else {
            return Err(Error::generic(format!("Export '{id}' is not found")));
        };
        let Some(export) = entry.running.clone() else {
            return Err(Error::generic(format!(
                "Export '{id}' is already shutting down"
            )));
        };
        let old = match export {
            Export::VhostUserBlk(_) => std::mem::replace(&mut entry.iothreads, wanted),
            Export::Nbd(_) => {
                // Clients stay where they are; only new ones go to the new threads.
                entry.iothreads.extend(wanted);
                Vec::new()
            }
        };
        Ok((export, old))
    }
}

#[derive(Deserialize)]
struct SetIothread {
    id: String,
}

pub(crate) async fn query_block_exports(
    engine: &Rc<Engine>,
    arguments: Arguments,
) -> Result<Value> {
    arguments.finish()?;
    let entries = engine.exports.entries.borrow();
    let described = entries.iter().rev().map(|entry| {
        if let Some(node) = entry.running.as_ref().and_then(Export::node) {
            entry.node_name.replace(node.name().to_owned());
        }
        json!({
            "node-name": *entry.node_name.borrow(),
            "shutting-down": entry.running.is_none(),
            "type": entry.type_name,
            "id": entry.id,
        })
    });
    Ok(described.collect())
}

impl Engine {
    /// Begins to delete an export; one that nobody uses is gone when this resolves.
    async fn delete_export(self: &Rc<Self>, id: String, mode: DeleteMode) -> Result<()> {
        let (export, used) = self.exports.take(&id, mode)?;
        if used {
            let engine = Rc::clone(self);
            executor::spawn(async move { engine.finish_export(id, export).await });
        } else {
            self.finish_export(id, export).await;
        }
        Ok(())
    }

    /// Waits for the requests of an export, and forgets it.
    async fn finish_export(&self, id: String, export: Export) {
        match export {
            Export::VhostUserBlk(export) => export.stop().await,
            Export::Nbd(export) => {
                let server = self.exports.nbd_server();
                if let Some(server) = server {
                    server.remove(&export).await;
                }
            }
        }
        self.exports
            .entries
            .borrow_mut()
            .retain(|entry| entry.id != id);
        tracing::info!(export = id, "export removed");
        self.emit(&Event::with_data(
            "BLOCK_EXPORT_DELETED",
            json!({ "id": id }),
        ));
        self.exports.removed.notify_all();
    }

    /// The sockets that exports listen on in the file system.
    pub fn socket_paths(&self) -> Vec<PathBuf> {
        let entries = self.exports.entries.borrow();
        let paths = entries.iter().filter_map(|entry| entry.socket_path.clone());
        paths.chain(self.exports.nbd_socket()).collect()
    }

    /// Ends every export, those already on their way out included, and the NBD server.
    pub async fn stop_all_exports(self: &Rc<Self>) {
        self.stop_exports(|_| true).await;
        self.exports.stop_nbd_server().await;
    }

    /// Ends the exports of a type, and waits for those that are on their way out already.
    async fn stop_exports(self: &Rc<Self>, wanted: impl Fn(&str) -> bool) {
        let mut running = Vec::new();
        for entry in self.exports.entries.borrow_mut().iter_mut() {
            if wanted(entry.type_name)
                && let Some(export) = entry.running.take()
            {
                running.push((entry.id.clone(), export));
            }
        }
        for (id, export) in running {
            let engine = Rc::clone(self);
            executor::spawn(async move { engine.finish_export(id, export).await });
        }
        loop {
            let removed = self.exports.removed.notified();
            if !self.exports.any(&wanted) {
                return;
            }
            removed.await;
        }
    }
}
