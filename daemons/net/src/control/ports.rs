//! `port-add`, `port-del`, `set_link`, `set-port-rate`, `set-port-guard`, `set-port-mtu`, `announce-self`.
//!
//! ```text
//!   port-add ──> listening ── front-end ──> connected ── front-end leaves ──> listening
//!                    └──────── port-del: its rings stop, its socket and its own threads go ──────┘
//! ```

use std::cell::{Cell, RefCell};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::rc::{Rc, Weak};
use std::sync::Arc;

use executor::{Handle, IoThread, IoThreadOptions, JoinHandle};
use nix::sys::socket::{UnixAddr, getsockname};
use qmp::{Arguments, Error, ErrorClass, Event, Result, Value, json};
use serde::Deserialize;
use service::objects;
use vhost_daemon::Address;

use super::Netd;
use super::netdevs::NetdevEntry;
use crate::frame::MacAddress;
use crate::guard::{Guard, GuardOptions};
use crate::limit::Limits;
use crate::options::{PortArguments, RateSetting, SocketAddress, take_guard, take_rate};
use crate::port::{LiveLimits, Port, PortHooks, PortState};

/// How a port gets what a daemon that serves cannot open.
const REMEDY: &str = "sockets can be made where there are others already, or passed with getfd";

/// A port by id.
pub(super) struct PortEntry {
    id: String,
    netdev: Rc<NetdevEntry>,
    address: SocketAddress,
    hooks: PortHooks,
    queues: u16,
    /// `None` while it is ending.
    port: RefCell<Option<Rc<Port>>>,
    /// Threads of its own.
    own: Vec<Rc<IoThread>>,
    /// Held, so that a thread in use cannot be deleted.
    _iothreads: Vec<Rc<IoThread>>,
    rate_rx: RefCell<RateSetting>,
    rate_tx: RefCell<RateSetting>,
    guard: RefCell<Option<GuardOptions>>,
    /// Whether clients were told that a front-end is there.
    connected: Cell<bool>,
    /// The guest's address as clients were told.
    mac: Cell<MacAddress>,
    watcher: RefCell<Option<JoinHandle<()>>>,
    /// [`crate::port::PortOptions::kept`]
    kept: Option<PathBuf>,
}

impl PortEntry {
    /// Its name.
    pub(super) fn id(&self) -> &str {
        &self.id
    }

    /// The name of its back-end.
    pub(super) fn netdev_id(&self) -> &str {
        self.netdev.id()
    }

    /// Its back-end's type.
    pub(super) fn netdev_kind(&self) -> &'static str {
        self.netdev.netdev().kind()
    }

    /// Where its front-end is met.
    pub(super) fn address(&self) -> &SocketAddress {
        &self.address
    }

    /// What is counted, and what can be changed.
    pub(super) fn hooks(&self) -> &PortHooks {
        &self.hooks
    }

    /// Queue pairs that it offers.
    pub(super) fn queues(&self) -> u16 {
        self.queues
    }

    /// The rates of what the guest receives and sends.
    pub(super) fn rates(&self) -> (RateSetting, RateSetting) {
        (self.rate_rx.borrow().clone(), self.rate_tx.borrow().clone())
    }

    /// What the guest may claim to be.
    pub(super) fn guard(&self) -> Option<GuardOptions> {
        self.guard.borrow().clone()
    }

    /// The port as it is now; `None` while it is ending.
    pub(super) fn state(&self) -> Option<PortState> {
        self.port.borrow().as_ref().map(|port| port.state())
    }

    /// The socket that it made, or will make, in the file system.
    pub(super) fn socket_path(&self) -> Option<PathBuf> {
        match &self.address {
            SocketAddress::Listen(path) => Some(path.clone()),
            SocketAddress::Connect(_) | SocketAddress::Fd(_) => None,
        }
    }

    /// The executors of its own threads.
    pub(super) fn own_threads(&self) -> impl Iterator<Item = Handle> {
        self.own.iter().map(|thread| thread.handle().clone())
    }

    /// Whether one of its directions shares the group `id`.
    pub(super) fn is_in_group(&self, id: &str) -> bool {
        [&self.rate_rx, &self.rate_tx]
            .iter()
            .any(|rate| rate.borrow().group.as_deref() == Some(id))
    }

    /// The port; `None` while it is ending.
    fn running(&self) -> Option<Rc<Port>> {
        self.port.borrow().clone()
    }

    /// Ends it: its rings stop, its capture is complete, its socket goes. No other command runs meanwhile, so that nobody else
    /// holds the port.
    pub(super) async fn stop(&self) {
        let port = self.port.borrow_mut().take();
        if let Some(port) = port.and_then(Rc::into_inner) {
            port.stop().await;
        }
        self.hooks.capture.stop();
        if let Some(watcher) = self.watcher.take() {
            watcher.cancel();
        }
    }

    /// Nobody will go on where it ended.
    fn forget(&self) {
        if let Some(path) = &self.kept
            && let Err(error) = std::fs::remove_file(path)
        {
            tracing::warn!(port = self.id, "cannot remove {}: {error}", path.display());
        }
    }

    /// Tells clients what has changed since they were told last: a front-end has come or gone, the guest has another address.
    fn tell(&self, netd: &Netd) {
        let state = self.state();
        if let Some(mac) = state.as_ref().map(|state| state.mac)
            && self.mac.replace(mac) != mac
        {
            let data = json!({ "name": self.id, "path": format!("/ports/{}", self.id) });
            netd.emit(&Event::with_data("NIC_RX_FILTER_CHANGED", data));
        }
        let connected = state.is_some_and(|state| state.connected);
        if self.connected.replace(connected) == connected {
            return;
        }
        let name = match connected {
            true => "PORT_CONNECTED",
            false => "PORT_DISCONNECTED",
        };
        netd.emit(&Event::with_data(name, json!({ "id": self.id })));
    }

    fn set_rate(
        netd: &Netd,
        live: &LiveLimits,
        current: &RefCell<RateSetting>,
        setting: RateSetting,
    ) -> Result<()> {
        let group = setting.group.as_deref().map(|id| netd.group(id));
        let group = group.transpose()?;
        let before = live.get();
        let same_group = current.borrow().group == setting.group;
        let wanted = setting.rate.is_limited() || group.is_some();
        match before {
            // A debt stays when a rate changes.
            Some(limits) if same_group && wanted => limits.set(&setting.rate),
            before => {
                live.set(wanted.then(|| match group {
                    Some(group) => Arc::new(Limits::in_group(&setting.rate, group)),
                    None => Arc::new(Limits::new(&setting.rate)),
                }));
                if let Some(before) = before {
                    // Whoever waits for the old limits looks at the new ones.
                    before.set(&Default::default());
                }
            }
        }
        current.replace(setting);
        Ok(())
    }

    fn set_guard(&self, options: Option<GuardOptions>) -> Result<()> {
        let guard = options.clone().map(Guard::new).transpose();
        let guard = guard.map_err(|error| Error::generic(format!("guard: {error}")))?;
        self.hooks.guard.set(guard.map(Arc::new));
        self.guard.replace(options);
        Ok(())
    }
}

#[derive(Deserialize)]
struct Identity {
    id: String,
}

impl Netd {
    /// The port `id`.
    pub(super) fn port(&self, id: &str) -> Result<Rc<PortEntry>> {
        let ports = self.ports.borrow();
        let found = ports.iter().find(|entry| entry.id == id);
        found.cloned().ok_or_else(|| {
            let what = format!("Device '{id}' not found");
            Error::new(ErrorClass::DeviceNotFound, what)
        })
    }

    /// The ports that `name` means: one port, or those of a back-end.
    fn ports_named(&self, name: &str) -> Result<Vec<Rc<PortEntry>>> {
        if self.netdev(name).is_ok() && self.port(name).is_err() {
            let ports = self.ports.borrow();
            let attached = ports.iter().filter(|port| port.netdev_id() == name);
            return Ok(attached.cloned().collect());
        }
        Ok(vec![self.port(name)?])
    }

    fn address(&self, address: &SocketAddress) -> Result<Address> {
        Ok(match address {
            SocketAddress::Listen(path) => Address::Listen(path.clone()),
            SocketAddress::Connect(path) => Address::Connect(path.clone()),
            SocketAddress::Fd(name) => {
                let claimed = self.fds.claim(name);
                Address::ListenFd(claimed.map_err(|error| Error::generic(error.to_string()))?)
            }
        })
    }
}

pub(super) async fn add(netd: &Rc<Netd>, arguments: Arguments) -> Result<Value> {
    let mut arguments = PortArguments::parse(arguments)?;
    let id = arguments.options.id.clone();
    if netd.port(&id).is_ok() {
        return Err(Error::generic(format!("Duplicate ID '{id}' for port")));
    }
    for path in [&mut arguments.address]
        .into_iter()
        .filter_map(|address| match address {
            SocketAddress::Listen(path) | SocketAddress::Connect(path) => Some(path),
            SocketAddress::Fd(_) => None,
        })
    {
        // The working directory changes when the daemon goes into the background.
        *path = std::path::absolute(&*path)
            .map_err(|error| Error::generic(format!("socket '{}': {error}", path.display())))?;
    }
    let netdev = netd.netdev(&arguments.netdev)?;
    let shared: Result<Vec<_>> = arguments
        .iothreads
        .iter()
        .map(|id| netd.iothreads.find(id))
        .collect();
    let shared = shared?;
    let queues = arguments.options.queues;
    let mut own = Vec::new();
    if shared.is_empty() && netdev.netdev().thread().is_none() {
        for index in 0..queues {
            let name = format!("{id}.{index}");
            own.push(objects::start_iothread(&name, IoThreadOptions::default())?);
        }
    }
    let threads = shared.iter().chain(&own);
    let threads: Vec<Handle> = threads.map(|thread| thread.handle().clone()).collect();
    let mut entry = PortEntry {
        id: id.clone(),
        hooks: PortHooks::new(queues),
        address: arguments.address,
        netdev,
        queues,
        port: RefCell::default(),
        own,
        _iothreads: shared,
        rate_rx: RefCell::default(),
        rate_tx: RefCell::default(),
        guard: RefCell::default(),
        connected: Cell::new(false),
        mac: Cell::new(arguments.options.mac),
        watcher: RefCell::default(),
        kept: None,
    };
    let hooks = &entry.hooks;
    PortEntry::set_rate(netd, &hooks.rx_limits, &entry.rate_rx, arguments.rate_rx)?;
    PortEntry::set_rate(netd, &hooks.tx_limits, &entry.rate_tx, arguments.rate_tx)?;
    entry.set_guard(arguments.guard)?;
    let address = netd.address(&entry.address)?;
    arguments.options.kept = Some(netd.state_dir.join(state_file(&id, &address)));
    entry.kept.clone_from(&arguments.options.kept);
    let (carrier, hooks) = (entry.netdev.netdev(), entry.hooks.clone());
    let started = Port::start(arguments.options, carrier, address, threads, hooks).await;
    let port = started.map_err(|error| netd.explained(&error, REMEDY))?;
    if !arguments.link {
        port.set_link(false).await;
    }
    entry.port.replace(Some(Rc::new(port)));
    let entry = Rc::new(entry);
    watch(netd, &entry);
    tracing::info!(port = id, netdev = entry.netdev_id(), "port added");
    netd.ports.borrow_mut().push(entry);
    Ok(json!({}))
}

/// The name of the file in which a port's successor finds what its driver said: the same for the same port at the same socket, and for
/// no other daemon's.
fn state_file(id: &str, address: &Address) -> String {
    let path = match address {
        Address::Listen(path) | Address::Connect(path) => Some(path.clone()),
        Address::ListenFd(socket) => {
            let name = getsockname::<UnixAddr>(socket.as_raw_fd()).ok();
            name.and_then(|name| name.path().map(PathBuf::from))
        }
    };
    let mut hasher = DefaultHasher::new();
    (id, path).hash(&mut hasher);
    format!("net-{:016x}", hasher.finish())
}

/// Makes events of the port's changes until it ends.
fn watch(netd: &Rc<Netd>, entry: &Rc<PortEntry>) {
    let netd = Rc::downgrade(netd);
    let changed = Arc::clone(&entry.hooks.changed);
    let watched: Weak<PortEntry> = Rc::downgrade(entry);
    let watcher = executor::spawn(async move {
        loop {
            let change = changed.notified();
            let (Some(netd), Some(entry)) = (netd.upgrade(), watched.upgrade()) else {
                return;
            };
            entry.tell(&netd);
            drop((netd, entry));
            change.await;
        }
    });
    entry.watcher.replace(Some(watcher));
}

pub(super) async fn del(netd: &Rc<Netd>, arguments: Arguments) -> Result<Value> {
    let Identity { id } = arguments.parse()?;
    let entry = netd.port(&id)?;
    netd.ports.borrow_mut().retain(|entry| entry.id != id);
    entry.stop().await;
    entry.forget();
    entry.tell(netd);
    tracing::info!(port = id, "port removed");
    Ok(json!({}))
}

#[derive(Deserialize)]
struct Link {
    name: String,
    up: bool,
}

pub(super) async fn set_link(netd: &Rc<Netd>, arguments: Arguments) -> Result<Value> {
    let Link { name, up } = arguments.parse()?;
    for entry in netd.ports_named(&name)? {
        if let Some(port) = entry.running() {
            port.set_link(up).await;
        }
    }
    Ok(json!({}))
}

pub(super) async fn set_rate(netd: &Rc<Netd>, mut arguments: Arguments) -> Result<Value> {
    let rx = take_rate(&mut arguments, "rate-rx")?;
    let tx = take_rate(&mut arguments, "rate-tx")?;
    let Identity { id } = arguments.parse()?;
    let entry = netd.port(&id)?;
    // Both are checked before one is changed.
    for group in [&rx, &tx]
        .into_iter()
        .flatten()
        .filter_map(|setting| setting.group.as_deref())
    {
        netd.group(group)?;
    }
    if let Some(rx) = rx {
        PortEntry::set_rate(netd, &entry.hooks.rx_limits, &entry.rate_rx, rx)?;
    }
    if let Some(tx) = tx {
        PortEntry::set_rate(netd, &entry.hooks.tx_limits, &entry.rate_tx, tx)?;
    }
    Ok(json!({}))
}

pub(super) async fn set_guard(netd: &Rc<Netd>, mut arguments: Arguments) -> Result<Value> {
    if arguments.get("guard").is_none() {
        return Err(Error::missing_parameter("guard"));
    }
    let guard = take_guard(&mut arguments)?;
    let Identity { id } = arguments.parse()?;
    netd.port(&id)?.set_guard(guard)?;
    Ok(json!({}))
}

#[derive(Deserialize)]
struct Mtu {
    id: String,
    mtu: u16,
}

pub(super) async fn set_mtu(netd: &Rc<Netd>, arguments: Arguments) -> Result<Value> {
    let Mtu { id, mtu } = arguments.parse()?;
    let entry = netd.port(&id)?;
    if let Some(port) = entry.running() {
        let set = port.set_mtu(mtu);
        set.map_err(|error| Error::generic(format!("{error:#}")))?;
    }
    Ok(json!({}))
}

#[derive(Deserialize)]
struct Interfaces {
    interfaces: Option<Vec<String>>,
}

/// Makes the network learn anew where guests are: those of the ports named, or of all.
pub(super) async fn announce_self(netd: &Rc<Netd>, arguments: Arguments) -> Result<Value> {
    let Interfaces { interfaces } = arguments.parse()?;
    let ports = match interfaces {
        None => netd.ports.borrow().clone(),
        Some(names) => {
            let ports: Result<Vec<_>> = names.iter().map(|id| netd.port(id)).collect();
            ports?
        }
    };
    for entry in ports {
        if let Some(port) = entry.running() {
            port.announce();
        }
    }
    Ok(json!({}))
}
