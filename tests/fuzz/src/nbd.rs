//! An NBD server and whatever a client may send.
//!
//! ```text
//!   input = kind of export ++ all that the client sends, from its flags to the end of the stream
//!     │ server on a disk in memory ◄── socket ── client: sends, reads what comes, goes
//!     └─ the server has greeted, has let the client go, and ends
//! ```
//!
//! No bytes may make it panic, wait for something that does not come, or use memory beyond its limits.

use crate::memory_file::MemoryFile;
use block::bitmap::BitmapOptions;
use block::{DirtyBitmap, Node, NodeOptions};
use executor::net::{Listener, Stream};
use executor::{Config, Executor, time};
use exports::nbd::{NbdExport, NbdExportOptions, NbdServer, NbdServerOptions};
use std::cell::LazyCell;
use std::os::fd::{AsFd, AsRawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// Name of the export.
pub const EXPORT: &str = "disk";
/// Length of the disk in bytes: its last sector is cut short.
pub const LENGTH: u64 = (1 << 20) - 100;
/// Name of its bitmap.
pub const BITMAP: &str = "bitmap";

/// The bits of an input's first byte.
pub mod kind {
    /// Clients may write.
    pub const WRITABLE: u8 = 1;
    /// One client at a time.
    pub const ONE_CLIENT: u8 = 2;
    /// Requests have to be whole blocks of 4 KiB.
    pub const BLOCKS: u8 = 4;
}

/// Replies beyond this many bytes are not waited for: the client is gone.
const MOST_RECEIVED: usize = 64 << 20;
/// Longer than any conversation takes.
const PATIENCE: Duration = Duration::from_secs(60);
/// What a server says first.
const GREETING: &[u8] = b"NBDMAGICIHAVEOPT";

thread_local! {
    static EXECUTOR: LazyCell<Executor> = LazyCell::new(|| {
        Executor::new(&Config::default()).expect("io_uring works on this machine")
    });
}

/// Runs one input.
///
/// # Panics
/// When a property does not hold.
pub fn run(input: &[u8]) {
    let Some((kind, bytes)) = input.split_first() else {
        return;
    };
    EXECUTOR.with(|executor| {
        let ended = executor.block_on(time::timeout(PATIENCE, converse(*kind, bytes)));
        assert!(ended.is_some(), "the conversation does not end");
    });
}

async fn converse(kind: u8, bytes: &[u8]) {
    let (listener, address) = listen();
    let has = |bit| kind & bit != 0;
    let server = NbdServer::start(
        vec![listener],
        NbdServerOptions {
            max_connections: has(kind::ONE_CLIENT).then_some(1),
            handshake_timeout: None,
            report: Some(Rc::new(|_| ())),
            ..NbdServerOptions::default()
        },
    );
    let export = Rc::new(export(kind));
    assert!(server.add(Rc::clone(&export)), "it has no export yet");
    let client = UnixStream::connect_addr(&address).expect("the server listens");
    let client = Rc::new(Stream::from_fd(client.into()).expect("a socket"));
    let sender = executor::spawn({
        let (client, bytes) = (Rc::clone(&client), bytes.to_vec());
        async move {
            // The server may have gone first.
            let _ = client.send_all(bytes).await;
            let fd = client.as_fd().as_raw_fd();
            let _ = nix::sys::socket::shutdown(fd, nix::sys::socket::Shutdown::Write);
        }
    });
    receive(&client).await;
    client.shutdown();
    sender.await;
    server.remove(&export).await;
    server.stop().await;
}

/// Reads to the end of the stream, or until it is enough.
async fn receive(client: &Stream) {
    let mut total = 0;
    let mut head = Vec::new();
    while let Ok(bytes) = client.recv(64 << 10).await {
        if bytes.is_empty() {
            break;
        }
        total += bytes.len();
        if head.len() < GREETING.len() {
            head.extend_from_slice(&bytes);
        }
        if total > MOST_RECEIVED {
            break;
        }
    }
    assert!(head.starts_with(GREETING), "{head:02x?} is no greeting");
}

fn export(kind: u8) -> NbdExport {
    let file = MemoryFile::new(&vec![0x5a; LENGTH as usize]);
    let options = NodeOptions {
        node_name: "node".to_owned(),
        discard: block::Discard::Unmap,
        ..NodeOptions::default()
    };
    let node = Node::new(options, Box::new(file));
    let writable = kind & kind::WRITABLE != 0;
    let bitmap = DirtyBitmap::new(BitmapOptions {
        name: Some(BITMAP.to_owned()),
        granularity: 65536,
        size: node.length(),
    });
    let bitmap = Arc::new(bitmap.expect("a good granularity"));
    if !writable {
        bitmap.disable();
    }
    node.bitmaps().attach(Arc::clone(&bitmap));
    let options = NbdExportOptions {
        name: EXPORT.to_owned(),
        description: Some("a disk in memory".to_owned()),
        writable,
        bitmaps: vec![bitmap],
        allocation_depth: true,
        minimum_block: match kind & kind::BLOCKS {
            0 => 1,
            _ => 4096,
        },
        ..NbdExportOptions::default()
    };
    NbdExport::new(&node, options).expect("nobody else uses the node")
}

/// A listener that is found by its address alone.
fn listen() -> (Listener, SocketAddr) {
    let any = SocketAddr::from_abstract_name(unique_name()).expect("a short name");
    let listener = UnixListener::bind_addr(&any).expect("a name of its own");
    let listener = Listener::from_fd(listener.into()).expect("a socket");
    (listener, any)
}

fn unique_name() -> String {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("outboard-fuzz-{}-{number}", std::process::id())
}
