//! Work that a driver puts off: a flush of metadata begun before anybody has to wait for one.
//!
//! ```text
//!   request on a queue thread ─► format: "half full" ─► want()
//!   the same thread's root, after that poll ─► a task: a request of its own, Node::upkeep
//! ```
//!
//! Upkeep enters at the root whose request asked for it and counts as a request of it: a drain
//! waits for it, edges do not change below it, it ends with the root. It runs on the thread that
//! caused it, beside that thread's requests. There is no standing task, so nothing wakes an idle
//! process.

use crate::driver::BoxFuture;
use crate::node::Node;
use std::cell::Cell;

thread_local! {
    static WANTED: Cell<bool> = const { Cell::new(false) };
}

/// Asks for upkeep of all drivers below the root whose request is being polled on this thread.
pub fn want() {
    WANTED.set(true);
}

/// Whether upkeep was asked for since this was last called.
#[inline]
pub(crate) fn take_wanted() -> bool {
    WANTED.get() && WANTED.replace(false)
}

impl Node {
    /// Lets the driver and those below do what they put off. Failures are theirs to remember.
    pub(crate) fn upkeep(&self) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            for (_, edge) in self.driver().edges() {
                edge.node().upkeep().await;
            }
            if let Err(errno) = self.driver().upkeep().await {
                tracing::debug!(node = self.name(), %errno, "upkeep failed");
            }
        })
    }
}
