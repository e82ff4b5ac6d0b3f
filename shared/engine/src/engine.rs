//! The engine: what exists, and who hears about it.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

use block::Graph;
use block::graph::NamePolicy;
use executor::Handle;
use executor::sync::{Latch, Mutex};
use qmp::{Arguments, CommandTable, Error, Event, EventSink, EventSinks, Result, Value, Version};
use service::Chardevs;
use vhost_daemon::notify::NamedFds;

use crate::catalogue;
use crate::commands::{self, Handler};
use crate::error::from_block;
use crate::exports::Exports;
use crate::jobs::Jobs;
use crate::node_events::{Reported, emit_reported};
use crate::objects::Objects;

/// How an engine is set up.
pub struct EngineOptions {
    /// What names inside images may open.
    pub name_policy: NamePolicy,
    /// Where the redo logs of writable images are kept: a private directory on tmpfs. Without one,
    /// metadata changes that were not flushed do not survive a kill.
    pub redo_dir: Option<PathBuf>,
    /// Descriptors that were handed over: `addr.type=fd,addr.str=NAME`.
    pub fds: NamedFds,
    /// What `query-version` tells.
    pub version: Version,
    /// The character devices of the process.
    pub chardevs: Rc<Chardevs>,
}

/// Nodes, exports and objects of a process. Lives on the control thread.
pub struct Engine {
    pub(crate) graph: Graph,
    pub(crate) exports: Exports,
    pub(crate) objects: Objects,
    pub(crate) jobs: Jobs,
    pub(crate) version: Version,
    pub(crate) chardevs: Rc<Chardevs>,
    fds: NamedFds,
    table: CommandTable<Handler>,
    /// Held while a command runs: several monitors, one command at a time.
    command: Mutex<()>,
    sinks: EventSinks,
    quit: Latch,
}

impl Engine {
    /// An engine with no node, export or iothread, on the current thread's executor.
    pub fn new(options: EngineOptions) -> Rc<Self> {
        let reported = Arc::<Reported>::default();
        let graph = Graph::new(&catalogue::drivers(), options.name_policy);
        let mut graph = graph.with_events(reported.clone());
        if let Some(redo_dir) = options.redo_dir {
            graph = graph.with_redo_dir(redo_dir);
        }
        let engine = Rc::new(Self {
            graph,
            exports: Exports::default(),
            objects: Objects::default(),
            jobs: Jobs::default(),
            version: options.version,
            chardevs: options.chardevs,
            fds: options.fds,
            table: commands::table(),
            command: Mutex::new(()),
            sinks: EventSinks::default(),
            quit: Latch::new(),
        });
        drop(executor::spawn(emit_reported(
            Rc::downgrade(&engine),
            reported,
        )));
        engine
    }

    /// The commands it knows.
    pub fn commands(&self) -> &CommandTable<Handler> {
        &self.table
    }

    /// Runs the command `name`, as a monitor or the command line asks. Members of the answer are in QEMU's order.
    pub async fn run(self: &Rc<Self>, name: &str, arguments: Arguments) -> Result<Value> {
        let handler = self.table.find(name)?;
        let _one_at_a_time = self.command.lock().await;
        let answer = handler(self, arguments).await?;
        Ok(qmp::json::ordered(&answer))
    }

    /// Sends every later event to `sink` while it lives.
    pub fn subscribe(&self, sink: &Rc<dyn EventSink>) {
        self.sinks.subscribe(sink);
    }

    /// Tells everyone of `event`.
    pub(crate) fn emit(&self, event: &Event) {
        self.sinks.emit(event);
    }

    /// The executors of all iothreads that exist now.
    pub fn thread_handles(&self) -> Vec<Handle> {
        self.objects.iothreads().handles()
    }

    /// The descriptors that were handed over.
    pub fn fds(&self) -> &NamedFds {
        &self.fds
    }

    /// Takes over an inherited descriptor by number or by the name it came with.
    pub(crate) fn claim_fd(&self, name: &str) -> Result<OwnedFd> {
        let claimed = self.fds.claim(name);
        claimed.map_err(|error| Error::generic(error.to_string()))
    }

    /// Asks whoever waits in [`Engine::quit_requested`] to end the process.
    pub fn request_quit(&self) {
        self.quit.set();
    }

    /// Resolves once the `quit` command ran or [`Engine::request_quit`] was called.
    pub async fn quit_requested(&self) {
        self.quit.wait().await;
    }

    /// Directories in which nodes open files as they need them.
    pub fn directories(&self) -> Vec<PathBuf> {
        let nodes = self.graph.nodes();
        let directories = nodes.iter().flat_map(|node| node.driver().directories());
        let mut directories: Vec<PathBuf> = directories.collect();
        directories.sort_unstable();
        directories.dedup();
        directories
    }

    /// TCP ports that nodes connect to when they have to connect again.
    pub fn tcp_peers(&self) -> Vec<u16> {
        let nodes = self.graph.nodes();
        let ports = nodes.iter().flat_map(|node| node.driver().tcp_peers());
        let mut ports: Vec<u16> = ports.collect();
        ports.sort_unstable();
        ports.dedup();
        ports
    }

    /// Cancels all jobs, ends all exports (each request in flight completes), flushes and closes all nodes, forgets
    /// all objects, and with them ends the iothreads.
    ///
    /// # Errors
    /// The first node that could not be flushed or closed; everything is ended nevertheless.
    pub async fn shut_down(self: &Rc<Self>) -> Result<()> {
        self.cancel_all_jobs().await;
        self.stop_all_exports().await;
        let closed = self.graph.close_all().await.map_err(from_block);
        self.objects.clear();
        closed
    }
}
