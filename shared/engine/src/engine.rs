//! The engine: what exists, and who hears about it.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::os::fd::{OwnedFd, RawFd};
use std::path::PathBuf;
use std::rc::{Rc, Weak};

use block::Graph;
use block::graph::NamePolicy;
use executor::Handle;
use executor::sync::{Mutex, Notify};
use qmp::{Arguments, CommandTable, Error, Event, Result, Value, Version};

use crate::catalogue;
use crate::commands::{self, Handler};
use crate::error::from_block;
use crate::exports::Exports;
use crate::iothread::IoThread;

/// How an engine is set up.
#[derive(Debug)]
pub struct EngineOptions {
    /// What names inside images may open.
    pub name_policy: NamePolicy,
    /// Where the redo logs of writable images are kept: a private directory on tmpfs. Without one,
    /// metadata changes that were not flushed do not survive a kill.
    pub redo_dir: Option<PathBuf>,
    /// Descriptors that came with a name (socket activation): `addr.type=fd,addr.str=NAME`.
    pub named_fds: BTreeMap<String, RawFd>,
    /// What `query-version` tells.
    pub version: Version,
}

/// Hears every event. It must not call back into the engine.
pub trait EventSink {
    /// Something happened.
    fn event(&self, event: &Event);
}

/// Nodes, exports and iothreads of a process. Lives on the control thread.
pub struct Engine {
    pub(crate) graph: Graph,
    pub(crate) exports: Exports,
    pub(crate) iothreads: RefCell<Vec<Rc<IoThread>>>,
    pub(crate) version: Version,
    named_fds: BTreeMap<String, RawFd>,
    table: CommandTable<Handler>,
    /// Held while a command runs: several monitors, one command at a time.
    command: Mutex<()>,
    sinks: RefCell<Vec<Weak<dyn EventSink>>>,
    quit: Quit,
}

/// Whether the process is to end.
struct Quit {
    requested: Cell<bool>,
    changed: Notify,
}

impl Engine {
    /// An engine with no node, export or iothread.
    pub fn new(options: EngineOptions) -> Rc<Self> {
        let mut graph = Graph::new(&catalogue::drivers(), options.name_policy);
        if let Some(redo_dir) = options.redo_dir {
            graph = graph.with_redo_dir(redo_dir);
        }
        Rc::new(Self {
            graph,
            exports: Exports::default(),
            iothreads: RefCell::default(),
            version: options.version,
            named_fds: options.named_fds,
            table: commands::table(),
            command: Mutex::new(()),
            sinks: RefCell::default(),
            quit: Quit {
                requested: Cell::new(false),
                changed: Notify::new(),
            },
        })
    }

    /// The commands it knows.
    pub fn commands(&self) -> &CommandTable<Handler> {
        &self.table
    }

    /// Runs the command `name`, as a monitor or the command line asks.
    pub async fn run(self: &Rc<Self>, name: &str, arguments: Arguments) -> Result<Value> {
        let handler = self.table.find(name)?;
        let _one_at_a_time = self.command.lock().await;
        handler(self, arguments).await
    }

    /// Sends every later event to `sink` while it lives.
    pub fn subscribe(&self, sink: &Rc<dyn EventSink>) {
        let mut sinks = self.sinks.borrow_mut();
        sinks.retain(|known| known.strong_count() > 0);
        sinks.push(Rc::downgrade(sink));
    }

    /// Tells everyone of `event`.
    pub(crate) fn emit(&self, event: &Event) {
        let sinks: Vec<_> = self
            .sinks
            .borrow()
            .iter()
            .filter_map(Weak::upgrade)
            .collect();
        for sink in sinks {
            sink.event(event);
        }
    }

    /// The executors of all iothreads that exist now.
    pub fn thread_handles(&self) -> Vec<Handle> {
        let iothreads = self.iothreads.borrow();
        iothreads
            .iter()
            .map(|iothread| iothread.handle().clone())
            .collect()
    }

    /// The iothread object `id`.
    pub(crate) fn iothread(&self, id: &str) -> Result<Rc<IoThread>> {
        let iothreads = self.iothreads.borrow();
        let found = iothreads.iter().find(|iothread| iothread.id() == id);
        found
            .cloned()
            .ok_or_else(|| Error::generic(format!("iothread \"{id}\" not found")))
    }

    /// Takes over an inherited descriptor by number or by the name it came with.
    pub fn claim_fd(&self, name: &str) -> Result<OwnedFd> {
        let number = match name.parse::<RawFd>() {
            Ok(number) => number,
            Err(_) => *self.named_fds.get(name).ok_or_else(|| {
                Error::generic(format!("No file descriptor named '{name}' was passed"))
            })?,
        };
        vhost_daemon::notify::claim_inherited(number).map_err(|error| {
            Error::generic(format!("Cannot use file descriptor '{name}': {error}"))
        })
    }

    /// Asks whoever waits in [`Engine::quit_requested`] to end the process.
    pub fn request_quit(&self) {
        self.quit.requested.set(true);
        self.quit.changed.notify_all();
    }

    /// Resolves once the `quit` command ran or [`Engine::request_quit`] was called.
    pub async fn quit_requested(&self) {
        loop {
            let changed = self.quit.changed.notified();
            if self.quit.requested.get() {
                return;
            }
            changed.await;
        }
    }

    /// Ends all exports (each request in flight completes), flushes and closes all nodes, ends
    /// all iothreads.
    ///
    /// # Errors
    /// The first node that could not be flushed or closed; everything is ended nevertheless.
    pub async fn shut_down(self: &Rc<Self>) -> Result<()> {
        self.stop_all_exports().await;
        let closed = self.graph.close_all().await.map_err(from_block);
        self.iothreads.borrow_mut().clear();
        closed
    }
}
