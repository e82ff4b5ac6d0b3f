//! Roots: where requests enter the graph (exports, tools, jobs).
//!
//! A [`Root`] holds permissions on a node. Each thread that issues requests attaches and gets a
//! [`RootHandle`], which counts its requests in flight in thread-local cells, pins the request
//! epoch and obeys drain: while a root is drained, new requests wait.

use crate::driver::{ByteRange, IoFuture, WriteFlags, ZeroFlags};
use crate::edge::Permissions;
use crate::error::Result;
use crate::node::Node;
use executor::{Buffer, Errno};
use std::future::Future;
use std::sync::Arc;

/// A user of a node.
#[derive(Clone)]
pub struct Root {}

impl Root {
    /// Takes `permissions` on `node`, tolerating others with `shared`; `Busy` on a conflict.
    pub fn new(
        name: &str,
        node: &Arc<Node>,
        permissions: Permissions,
        shared: Permissions,
    ) -> Result<Root> {
        todo!()
    }
    /// The node.
    pub fn node(&self) -> &Arc<Node> {
        todo!()
    }
    /// A handle for the current thread's executor.
    pub fn attach(&self) -> RootHandle {
        todo!()
    }
    /// Stops new requests on every thread and waits until none is in flight. Nests.
    pub async fn drain(&self) -> Drained {
        todo!()
    }
    /// Calls `notify` (on any thread) after the node's length changed.
    pub fn on_resize(&self, notify: Box<dyn Fn(u64) + Send + Sync>) {
        todo!()
    }
}

/// Requests wait until this is dropped.
pub struct Drained {}

/// A root on one thread; `!Send`.
pub struct RootHandle {}

impl RootHandle {
    /// Length of the node in bytes.
    pub fn length(&self) -> u64 {
        todo!()
    }
    /// Fills `buffer` from `offset`. `EINVAL` beyond the end.
    pub fn read(&self, offset: u64, buffer: Buffer) -> RootFuture<'_> {
        todo!()
    }
    /// Writes `buffer` at `offset`. `EPERM` without write permission.
    pub fn write(&self, offset: u64, buffer: Buffer, flags: WriteFlags) -> RootFuture<'_> {
        todo!()
    }
    /// Makes `range` read as zeroes.
    pub fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> RootFuture<'_> {
        todo!()
    }
    /// Discards `range`.
    pub fn discard(&self, range: ByteRange) -> RootFuture<'_> {
        todo!()
    }
    /// Every request completed before this call is durable when it resolves.
    pub fn flush(&self) -> RootFuture<'_> {
        todo!()
    }
    /// Requests in flight on this thread.
    pub fn in_flight(&self) -> usize {
        todo!()
    }
}

/// A request in flight: its node future plus the counts it holds until it ends.
pub struct RootFuture<'a> {
    inner: IoFuture<'a>,
}

impl Future for RootFuture<'_> {
    type Output = std::result::Result<(), Errno>;
    fn poll(
        self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Self::Output> {
        std::pin::Pin::new(&mut self.get_mut().inner).poll(cx)
    }
}
