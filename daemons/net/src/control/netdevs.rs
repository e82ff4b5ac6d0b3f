//! `netdev_add`, `netdev_del`, `query-netdevs`: back-ends.

use std::cell::RefCell;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::rc::{Rc, Weak};

use executor::{Handle, IoThread, IoThreadOptions};
use qmp::{Arguments, Error, ErrorClass, Event, Map, Result, Value, json};
use serde::Deserialize;
use service::objects;

use super::Netd;
use crate::netdev::{Netdev, Notice};
use crate::netdevs::{self, Context, NetdevOptions};

/// How a back-end gets what a daemon that serves cannot open.
const REMEDY: &str = "pass an open descriptor with getfd, or name the back-end on the command line";

/// A back-end by id.
pub(super) struct NetdevEntry {
    id: String,
    netdev: Rc<dyn Netdev>,
    socket_path: Option<PathBuf>,
    tcp_peer: Option<u16>,
    /// Threads of its own.
    own: Vec<Rc<IoThread>>,
    /// Held, so that a thread in use cannot be deleted.
    _iothreads: Vec<Rc<IoThread>>,
    /// Back-ends that this one uses.
    uses: Vec<Rc<NetdevEntry>>,
}

impl NetdevEntry {
    /// Its name.
    pub(super) fn id(&self) -> &str {
        &self.id
    }

    /// What ports attach to.
    pub(super) fn netdev(&self) -> Rc<dyn Netdev> {
        Rc::clone(&self.netdev)
    }

    /// The socket that it made in the file system.
    pub(super) fn socket_path(&self) -> Option<PathBuf> {
        self.socket_path.clone()
    }

    /// The TCP port that it connects to.
    pub(super) fn tcp_peer(&self) -> Option<u16> {
        self.tcp_peer
    }

    /// The executors of its own threads.
    pub(super) fn own_threads(&self) -> impl Iterator<Item = Handle> {
        self.own.iter().map(|thread| thread.handle().clone())
    }
}

#[derive(Deserialize)]
struct Identity {
    id: String,
}

/// The threads that a back-end asks for while it is opened.
#[derive(Default)]
struct Threads {
    own: RefCell<Vec<Rc<IoThread>>>,
    shared: RefCell<Vec<Rc<IoThread>>>,
}

impl Threads {
    fn give(&self, netd: &Netd, id: &str, wanted: Option<&str>) -> anyhow::Result<Handle> {
        let (thread, list) = match wanted {
            Some(name) => (netd.iothreads.find(name)?, &self.shared),
            None => {
                let options = IoThreadOptions::default();
                (objects::start_iothread(id, options)?, &self.own)
            }
        };
        let handle = thread.handle().clone();
        list.borrow_mut().push(thread);
        Ok(handle)
    }
}

impl Netd {
    /// The back-end `id`.
    pub(super) fn netdev(&self, id: &str) -> Result<Rc<NetdevEntry>> {
        let netdevs = self.netdevs.borrow();
        let found = netdevs.iter().find(|entry| entry.id == id);
        found.cloned().ok_or_else(|| not_found(id))
    }

    /// The ports that are attached to the back-end `id`.
    fn attached(&self, id: &str) -> Vec<String> {
        let ports = self.ports.borrow();
        let attached = ports.iter().filter(|port| port.netdev_id() == id);
        attached.map(|port| port.id().to_owned()).collect()
    }

    /// The back-ends that use the back-end `id`.
    fn users(&self, id: &str) -> Vec<String> {
        let netdevs = self.netdevs.borrow();
        let uses = |entry: &NetdevEntry| entry.uses.iter().any(|used| used.id == id);
        let users = netdevs.iter().filter(|entry| uses(entry));
        users.map(|entry| entry.id.clone()).collect()
    }

    /// Adds what the sandbox has to do with a refusal, and what to do about it.
    pub(super) fn explained(&self, error: &anyhow::Error, remedy: &str) -> Error {
        let refused = error.chain().any(|cause| {
            let cause = cause.downcast_ref::<io::Error>();
            cause.is_some_and(|cause| cause.kind() == io::ErrorKind::PermissionDenied)
        });
        if refused && self.restricted.get() {
            return Error::generic(format!(
                "{error:#} (a daemon that serves has given up privileges and paths: {remedy})"
            ));
        }
        Error::generic(format!("{error:#}"))
    }
}

fn not_found(id: &str) -> Error {
    let what = format!("Device '{id}' not found");
    Error::new(ErrorClass::DeviceNotFound, what)
}

pub(super) async fn add(netd: &Rc<Netd>, mut arguments: Arguments) -> Result<Value> {
    // The type goes first, as the most telling mistake.
    if arguments.get("type").is_none() {
        return Err(Error::missing_parameter("type"));
    }
    let Identity { id } = arguments.take()?;
    let options: NetdevOptions = arguments.parse()?;
    if !qmp::is_identifier(&id) {
        return Err(Error::parameter_expects("id", "an identifier"));
    }
    if netd.netdev(&id).is_ok() {
        return Err(Error::generic(format!("Duplicate ID '{id}' for netdev")));
    }
    let threads = Threads::default();
    let uses = RefCell::new(Vec::new());
    let context = Context {
        id: &id,
        netdev: &|name| {
            let entry = netd.netdev(name)?;
            let netdev = entry.netdev();
            uses.borrow_mut().push(entry);
            Ok(netdev)
        },
        descriptor: &|name| -> anyhow::Result<OwnedFd> { Ok(netd.fds.claim(name)?) },
        thread: &|wanted| threads.give(netd, &id, wanted),
        notice: notice(netd, &id),
    };
    let opened = netdevs::open(&options, &context);
    let netdev = opened.map_err(|error| netd.explained(&error, REMEDY))?;
    tracing::info!(netdev = id, kind = netdev.kind(), "netdev added");
    netd.netdevs.borrow_mut().push(Rc::new(NetdevEntry {
        id,
        netdev,
        socket_path: options.socket_path().map(Path::to_owned),
        tcp_peer: options.tcp_peer(),
        own: threads.own.take(),
        _iothreads: threads.shared.take(),
        uses: uses.take(),
    }));
    Ok(json!({}))
}

/// Makes events of what happens to the back-end `id`, for as long as the daemon lives.
fn notice(netd: &Rc<Netd>, id: &str) -> Rc<dyn Fn(Notice)> {
    let netd: Weak<Netd> = Rc::downgrade(netd);
    let id = id.to_owned();
    Rc::new(move |notice| {
        let Some(netd) = netd.upgrade() else { return };
        let event = match notice {
            Notice::Connected(peer) => {
                let data = json!({ "netdev-id": id, "addr": peer });
                Event::with_data("NETDEV_STREAM_CONNECTED", data)
            }
            Notice::Disconnected => {
                let data = json!({ "netdev-id": id });
                Event::with_data("NETDEV_STREAM_DISCONNECTED", data)
            }
        };
        netd.emit(&event);
    })
}

pub(super) async fn del(netd: &Rc<Netd>, arguments: Arguments) -> Result<Value> {
    let Identity { id } = arguments.parse()?;
    netd.netdev(&id)?;
    for (kind, users) in [("port", netd.attached(&id)), ("netdev", netd.users(&id))] {
        if let Some(user) = users.first() {
            let what = format!("netdev '{id}' is in use by {kind} '{user}'");
            return Err(Error::generic(what));
        }
    }
    // Dropped outside of the borrow: it may tell of its end.
    let mut kept = netd.netdevs.take();
    let index = kept.iter().position(|entry| entry.id == id);
    let removed = index.map(|index| kept.remove(index));
    netd.netdevs.replace(kept);
    drop(removed);
    tracing::info!(netdev = id, "netdev removed");
    Ok(json!({}))
}

pub(super) async fn query(netd: &Rc<Netd>, arguments: Arguments) -> Result<Value> {
    arguments.finish()?;
    let netdevs = netd.netdevs.borrow();
    let described = netdevs.iter().map(|entry| {
        let mut members = Map::new();
        members.insert("id".into(), json!(entry.id));
        members.insert("type".into(), json!(entry.netdev.kind()));
        members.insert("ports".into(), json!(netd.attached(&entry.id)));
        if let Some(most) = entry.netdev.max_queues() {
            members.insert("max-queues".into(), json!(most));
        }
        members.extend(entry.netdev.details());
        Value::Object(members)
    });
    Ok(described.collect())
}
