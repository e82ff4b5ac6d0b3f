//! The network daemon as the control thread sees it: tables of back-ends, ports, groups and threads, and the commands on them.
//!
//! ```text
//!   command line ──┐              ┌── iothreads <── ports, back-ends      (used: cannot be deleted)
//!   QMP monitors ──┴── Netd ──────┼── groups    <── ports
//!                       │         ├── netdevs   <── ports
//!                       │         └── ports ── sockets, queue threads
//!                       └── events ──> monitors;  numbers ──> metrics
//! ```
//!
//! Each QMP command is a line of [`commands::table`] and an async function that takes [`qmp::Arguments`]; a command-line option
//! runs the same function with arguments spelled as strings.
//!
//! Promises: one command at a time; an error leaves nothing half made; what is in use is not deleted.
//!
//! Must not know: rings, frames, sockets of monitors.

mod capture;
mod commands;
mod groups;
mod iothreads;
mod netdevs;
mod ports;
mod query;
mod sandbox;
mod switches;
#[cfg(test)]
mod tests;

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::rc::Rc;

use anyhow::{Context, Result};
use executor::Handle;
use executor::sync::{Latch, Mutex};
use qmp::{Arguments, CommandTable, Event, EventSink, EventSinks, Request, Value, Version};
use service::objects::IoThreads;
use service::{Daemon, Options, Reach, Server, Start, StepOption, private_dir};
use vhost_daemon::notify::NamedFds;

use crate::metrics;
use commands::Handler;
use groups::GroupEntry;
use netdevs::NetdevEntry;
use ports::PortEntry;
pub use query::PortNumbers;

/// What the ordered options make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepKind {
    /// An iothread.
    Object,
    /// A group of rate limits.
    Group,
    /// A back-end.
    Netdev,
    /// A port.
    Port,
    /// The endpoint of metrics.
    Metrics,
}

/// The ordered options of the command line.
pub const STEPS: &[StepOption<StepKind>] = &[
    StepOption {
        name: "object",
        implied_key: "qom-type",
        kind: StepKind::Object,
    },
    StepOption {
        name: "group",
        implied_key: "id",
        kind: StepKind::Group,
    },
    StepOption {
        name: "netdev",
        implied_key: "type",
        kind: StepKind::Netdev,
    },
    StepOption {
        name: "port",
        implied_key: "id",
        kind: StepKind::Port,
    },
    StepOption {
        name: "metrics",
        implied_key: "address",
        kind: StepKind::Metrics,
    },
];

/// The network daemon. Lives on the control thread.
pub struct Netd {
    iothreads: IoThreads,
    groups: RefCell<Vec<GroupEntry>>,
    netdevs: RefCell<Vec<Rc<NetdevEntry>>>,
    ports: RefCell<Vec<Rc<PortEntry>>>,
    metrics: RefCell<Vec<metrics::Endpoint>>,
    allowed_dirs: Vec<PathBuf>,
    /// Where a successor finds what drivers said.
    state_dir: PathBuf,
    fds: NamedFds,
    version: Version,
    table: CommandTable<Handler>,
    /// Held while a command runs: several monitors, one command at a time.
    command: Mutex<()>,
    sinks: EventSinks,
    quit: Latch,
    /// Whether the process is restricted already, for error messages.
    restricted: Cell<bool>,
}

impl Netd {
    /// Tells every client of `event`.
    fn emit(&self, event: &Event) {
        self.sinks.emit(event);
    }

    /// Runs the command `name`, as a monitor or the command line asks.
    async fn command(
        self: &Rc<Self>,
        name: &str,
        arguments: Arguments,
        fds: &mut VecDeque<OwnedFd>,
    ) -> qmp::Result<Value> {
        let handler = self.table.find(name)?;
        let _one_at_a_time = self.command.lock().await;
        handler(self, arguments, fds).await
    }
}

impl Server for Netd {
    async fn run(
        self: &Rc<Self>,
        request: &Request,
        fds: &mut VecDeque<OwnedFd>,
    ) -> qmp::Result<Value> {
        self.table.handler_of(request)?;
        self.command(&request.command, request.arguments(), fds)
            .await
    }

    fn subscribe(&self, sink: &Rc<dyn EventSink>) {
        self.sinks.subscribe(sink);
    }
}

impl Daemon for Netd {
    type Kind = StepKind;

    fn new(options: &Options, start: Start) -> Result<Rc<Self>> {
        let absolute = options.allowed_dirs.iter().map(std::path::absolute);
        let allowed_dirs: std::io::Result<Vec<_>> = absolute.collect();
        Ok(Rc::new(Self {
            iothreads: IoThreads::default(),
            groups: RefCell::default(),
            netdevs: RefCell::default(),
            ports: RefCell::default(),
            metrics: RefCell::default(),
            allowed_dirs: allowed_dirs.context("--allow-dir")?,
            state_dir: private_dir::prepare("--state-dir", options.path("state-dir"))?,
            fds: start.fds,
            version: start.version,
            table: commands::table(),
            command: Mutex::new(()),
            sinks: EventSinks::default(),
            quit: Latch::new(),
            restricted: Cell::new(false),
        }))
    }

    async fn apply(self: &Rc<Self>, kind: StepKind, arguments: Arguments) -> qmp::Result<()> {
        let command = match kind {
            StepKind::Object => "object-add",
            StepKind::Group => "group-add",
            StepKind::Netdev => "netdev_add",
            StepKind::Port => "port-add",
            StepKind::Metrics => {
                let endpoint = metrics::Endpoint::open(self, arguments)?;
                self.metrics.borrow_mut().push(endpoint);
                return Ok(());
            }
        };
        let mut no_fds = VecDeque::new();
        let applied = self.command(command, arguments, &mut no_fds).await;
        applied.map(drop)
    }

    fn fds(&self) -> &NamedFds {
        &self.fds
    }

    fn reach(&self) -> Reach {
        let ports = self.ports.borrow();
        let sockets = ports.iter().filter_map(|port| port.socket_path());
        let netdevs = self.netdevs.borrow();
        let peers = netdevs.iter().filter_map(|netdev| netdev.socket_path());
        let metrics = self.metrics.borrow();
        let endpoints = metrics.iter().filter_map(metrics::Endpoint::socket_path);
        let mut file_dirs = self.allowed_dirs.clone();
        file_dirs.push(self.state_dir.clone());
        Reach {
            file_dirs,
            read_dirs: Vec::new(),
            sockets: sockets.chain(peers).chain(endpoints).collect(),
            tcp_peers: netdevs
                .iter()
                .filter_map(|netdev| netdev.tcp_peer())
                .collect(),
            syscalls: sandbox::SYSCALLS,
        }
    }

    fn threads(&self) -> Vec<Handle> {
        let mut threads = self.iothreads.handles();
        for port in self.ports.borrow().iter() {
            threads.extend(port.own_threads());
        }
        for netdev in self.netdevs.borrow().iter() {
            threads.extend(netdev.own_threads());
        }
        threads
    }

    fn serving(self: &Rc<Self>) {
        self.restricted.set(true);
    }

    fn request_quit(&self) {
        self.quit.set();
    }

    async fn quit_requested(&self) {
        self.quit.wait().await;
    }

    async fn stop(&self) {
        let _alone = self.command.lock().await;
        loop {
            let last = self.ports.borrow_mut().pop();
            let Some(port) = last else { break };
            port.stop().await;
        }
        self.metrics.borrow_mut().clear();
    }

    async fn shut_down(self: &Rc<Self>) -> Result<()> {
        self.stop().await;
        self.netdevs.borrow_mut().clear();
        self.groups.borrow_mut().clear();
        self.iothreads.clear();
        Ok(())
    }
}
