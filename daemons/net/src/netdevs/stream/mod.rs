//! `type=stream`: frames on a stream socket, each after its length in four bytes, as QEMU's `-netdev stream`, passt and
//! gvproxy have them.
//!
//! ```text
//!   Stream (control thread) ── attach ──> Lease of the Source ──> StreamQueue and its task (queue thread)
//!     the Source            <── dropped ──┘
//! ```
//!
//! The peer gets and gives finished frames only: there are no offloads. What it sends is not trusted: a length that no frame
//! has ends the connection, and never makes anything grow.

mod queue;
mod source;
#[cfg(test)]
mod tests;

use std::io;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Result, bail};
use executor::JoinHandle;
use executor::sync::Notify;
use serde::Deserialize;

use self::queue::StreamQueue;
pub(super) use self::source::Source;
use super::Context;
use super::address::SocketAddress;
use super::lease::{Pool, Wanted};
use crate::link::Offloads;
use crate::netdev::{Attachment, Netdev, Notice, PeerAddress, QueueMaker};

/// Options of `type=stream`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct StreamOptions {
    /// Where the peer is, or comes to.
    pub addr: SocketAddress,
    /// Whether to wait for peers, one at a time.
    #[serde(default)]
    pub server: bool,
    /// Seconds between a client's tries to connect; absent or 0: one try.
    pub reconnect: Option<u32>,
    /// The same in milliseconds.
    pub reconnect_ms: Option<u32>,
}

/// What the queue tells the control thread.
#[derive(Default)]
struct Status {
    connected: AtomicBool,
    connections: AtomicU64,
    /// Where the last connection leads; `None` before the first.
    peer: Mutex<Option<PeerAddress>>,
    wrong_lengths: AtomicU64,
    /// `connected` or `connections` changed.
    changed: Notify,
}

impl Status {
    fn peer(&self) -> Option<PeerAddress> {
        let peer = self.peer.lock().unwrap_or_else(PoisonError::into_inner);
        peer.clone()
    }

    /// There is a connection, which leads to `peer`.
    fn connect(&self, peer: PeerAddress) {
        *self.peer.lock().unwrap_or_else(PoisonError::into_inner) = Some(peer);
        self.connections.fetch_add(1, Ordering::Release);
        self.connected.store(true, Ordering::Release);
        self.changed.notify_all();
    }
}

/// The back-end.
pub struct Stream {
    kind: &'static str,
    source: Pool<Source>,
    status: Arc<Status>,
    /// Tells of connections that come and go.
    watcher: Option<JoinHandle<()>>,
}

impl Stream {
    /// Opens it: listens, or connects.
    ///
    /// # Errors
    /// Options that exclude each other; what the host refuses.
    pub fn open(options: &StreamOptions, context: &Context<'_>) -> Result<Stream> {
        let every = match (options.reconnect, options.reconnect_ms) {
            (Some(_), Some(_)) => bail!("'reconnect' does not go with 'reconnect-ms'"),
            (Some(seconds), None) => Duration::from_secs(seconds.into()),
            (None, ms) => Duration::from_millis(ms.unwrap_or(0).into()),
        };
        let every = (!every.is_zero()).then_some(every);
        let source = Source::open(&options.addr, options.server, every, context)?;
        Ok(Stream::new("stream", source, context))
    }

    /// A back-end called `kind` that gets its connections from `source`.
    pub(super) fn new(kind: &'static str, source: Source, context: &Context<'_>) -> Stream {
        let status = Arc::<Status>::default();
        let notice = Rc::clone(&context.notice);
        let watcher = executor::spawn(watch(Arc::clone(&status), notice));
        Stream {
            kind,
            source: Pool::new([source]),
            status,
            watcher: Some(watcher),
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let Some(watcher) = self.watcher.take() {
            watcher.cancel();
        }
    }
}

/// Passes on what the queue's thread tells.
async fn watch(status: Arc<Status>, notice: Rc<dyn Fn(Notice)>) {
    let mut seen = 0;
    let mut was_connected = false;
    loop {
        let changed = status.changed.notified();
        let connections = status.connections.load(Ordering::Acquire);
        let connected = status.connected.load(Ordering::Acquire);
        if was_connected && (connections != seen || !connected) {
            notice(Notice::Disconnected);
            was_connected = false;
        }
        if connected
            && !was_connected
            && let Some(peer) = status.peer()
        {
            notice(Notice::Connected(peer));
            was_connected = true;
        }
        seen = connections;
        changed.await;
    }
}

impl Netdev for Stream {
    fn kind(&self) -> &'static str {
        self.kind
    }

    fn max_queues(&self) -> Option<u16> {
        Some(1)
    }

    fn host_offloads(&self) -> Offloads {
        Offloads::NONE
    }

    fn guest_offloads(&self) -> Offloads {
        Offloads::NONE
    }

    fn attach(&self, port: &Attachment, index: u16) -> io::Result<QueueMaker> {
        let none = || Err(io::Error::other("a stream has one queue"));
        let lease = self
            .source
            .lend(&port.port, ("the stream", Wanted::At(index)), none)?;
        let status = Arc::clone(&self.status);
        Ok(Box::new(move || {
            Ok(Rc::new(StreamQueue::new(lease, status)))
        }))
    }

    fn details(&self) -> serde_json::Map<String, serde_json::Value> {
        let mut details = serde_json::Map::new();
        let status = &self.status;
        let connected = status.connected.load(Ordering::Relaxed);
        details.insert("connected".to_owned(), connected.into());
        let connections = status.connections.load(Ordering::Relaxed);
        details.insert("connections".to_owned(), connections.into());
        let wrong = status.wrong_lengths.load(Ordering::Relaxed);
        details.insert("wrong-lengths".to_owned(), wrong.into());
        details
    }
}
