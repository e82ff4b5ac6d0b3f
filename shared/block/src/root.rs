//! Roots: where requests enter the graph (exports, tools, jobs).
//!
//! A [`Root`] holds permissions on a node. Each thread that issues requests attaches and gets a
//! [`RootHandle`], which counts its requests in flight in thread-local cells, pins the request
//! epoch and obeys drain: while a root is drained, new requests wait.
//!
//! ```text
//!   drain():  every thread: paused +1, wait for its in-flight count to reach 0 ──► Drained
//!   request:  paused = 0 → counted, runs        paused > 0 → waits, runs after the last resume
//!   drop(Drained): every thread: paused -1
//! ```
//!
//! Promises: no shared memory is written on the request path; a request that is done at once
//! costs neither an allocation nor a count. Must not know: who issues the requests, what the
//! node does with them.

mod drain;
mod hurry;
#[cfg(all(test, loom))]
mod models;
mod request;

/// What draining stands on; models have loom's.
mod platform {
    pub(super) use executor::Handle;
    pub(super) use executor::sync::Notify;
    pub(super) use std::sync::atomic::AtomicUsize;
    pub(super) use std::sync::{Mutex, MutexGuard};
    pub(super) use std::thread_local;
}

pub use drain::Drained;
pub use hurry::Hurried;
pub use request::{RootFuture, RootHandle, Visit};

use crate::edge::{Claim, Edge, EdgeSpec, Permissions};
use crate::error::Result;
use crate::node::{Node, Parent, ResizeListener};
use crate::open::ChildRole;
use drain::Threads;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// What a root calls its node.
pub(crate) const EDGE_NAME: &str = "root";

/// Hears of a new length, in bytes.
type ResizeCallback = Arc<dyn Fn(u64) + Send + Sync>;

/// A user of a node.
#[derive(Clone)]
pub struct Root {
    shared: Arc<Shared>,
}

struct Shared {
    edge: Edge,
    permissions: Permissions,
    threads: Threads,
    write_through: AtomicBool,
    callbacks: Mutex<Vec<ResizeCallback>>,
    this: Weak<Shared>,
}

impl Root {
    /// Takes `permissions` on `node`, tolerating others with `shared`; `Busy` on a conflict,
    /// `Invalid` when a read-only node is to be written. `name` is for messages; it may be empty.
    pub fn new(
        name: &str,
        node: &Arc<Node>,
        permissions: Permissions,
        shared: Permissions,
    ) -> Result<Root> {
        let label = match name {
            "" => "an unnamed block device".to_owned(),
            name => format!("block device '{name}'"),
        };
        let claim = Claim {
            permissions,
            shared,
        };
        let spec = EdgeSpec {
            parent: label.clone(),
            name: EDGE_NAME,
            role: ChildRole::Filtered,
            read_only: !permissions.write,
        };
        let edge = Edge::attach_claim(node, spec, (label, claim))?;
        let shared = Arc::new_cyclic(|this| Shared {
            edge,
            permissions,
            threads: Threads::default(),
            write_through: AtomicBool::new(false),
            callbacks: Mutex::default(),
            this: this.clone(),
        });
        let listener: Weak<Shared> = Arc::downgrade(&shared);
        shared.edge.listen(listener);
        Ok(Root { shared })
    }
    /// The node.
    pub fn node(&self) -> &Arc<Node> {
        self.shared.edge.child()
    }
    /// The edge to the node, to point it at another one.
    pub fn edge(&self) -> &Edge {
        &self.shared.edge
    }
    /// Each write through the handles attached from now on is durable when it completes, as if it
    /// had [`crate::WriteFlags::fua`].
    pub fn write_through(&self) {
        self.shared.write_through.store(true, Ordering::Relaxed);
    }
    /// A handle for the current thread's executor.
    pub fn attach(&self) -> RootHandle {
        RootHandle::new(Arc::clone(&self.shared))
    }
    /// Stops new requests on every thread and waits until none is in flight. Nests.
    pub async fn drain(&self) -> Drained {
        drain::drain(&self.shared).await
    }
    /// Lets requests go on that drivers below hold back, until the answer is dropped. (A drain does
    /// that, too.)
    pub fn hurry(&self) -> Hurried {
        self.shared.hurry()
    }
    /// Calls `notify` (on any thread) after the node's length changed.
    pub fn on_resize(&self, notify: Box<dyn Fn(u64) + Send + Sync>) {
        self.shared.callbacks().push(notify.into());
    }
}

impl Shared {
    fn hurry(&self) -> Hurried {
        Hurried::new(self.edge.node())
    }
    fn callbacks(&self) -> std::sync::MutexGuard<'_, Vec<ResizeCallback>> {
        self.callbacks
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl ResizeListener for Shared {
    fn as_parent(&self) -> Option<Parent> {
        let shared = self.this.upgrade()?;
        Some(Parent::Root(Root { shared }))
    }
    fn child_resized(&self) {
        let callbacks = self.callbacks().clone();
        let length = self.edge.node().length();
        for callback in callbacks {
            callback(length);
        }
    }
}
