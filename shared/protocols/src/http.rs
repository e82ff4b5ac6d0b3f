//! `http`, `https`: a file on a web server, read in ranges.
//!
//! Options: `url`; `readahead` (bytes that each request asks for beyond what is read, 256 KiB); `timeout` (seconds
//! that a server may be silent, 5; 0: for ever); `sslverify`; `username`, `password-secret`; `proxy-username`,
//! `proxy-password-secret` (for the proxy that the environment names); `cookie` or `cookie-secret`. Names: URLs.
//!
//! ```text
//!   any thread ──► its own Client ──► Pieces (what came last, what is coming)
//!                        └─► libcurl: up to 8 connections, driven by the thread's executor
//! ```
//!
//! A node is read-only, and shows the file as it was when it was opened: length and version (`ETag`, else
//! `Last-Modified`) of each answer are compared, and another version is an error. A server must understand ranges.
//! Redirections are followed to HTTP only, never from https to http, and names and passwords stay with the server
//! that the user named. Must not know: what is in the file.

mod answer;
mod client;
mod pieces;
mod target;
mod trust;

use crate::per_thread::PerThread;
use block::error::Result;
use block::open::DriverEntry;
use block::{
    BlockStatus, BoxFuture, Buffer, ByteRange, Driver, Edge, Errno, Error, ErrorKind,
    ImageIdentity, IoFuture, Limits, OpenRequest, Protocol, Reach, Resize, StatusExtent,
    WriteFlags, ZeroFlags,
};
use client::{Client, Shared};
use serde_json::{Map, Value};
use std::rc::Rc;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use target::Target;

/// The table line of `http`.
pub const ENTRY: DriverEntry = DriverEntry::new(PLAIN, |request| Box::pin(open(request, PLAIN)))
    .with_protocol(protocol(&[PLAIN]))
    .with_strong_options(STRONG_OPTIONS);

/// The table line of `https`.
pub const SECURE_ENTRY: DriverEntry =
    DriverEntry::new(SECURE, |request| Box::pin(open(request, SECURE)))
        .with_protocol(protocol(&[SECURE]))
        .with_strong_options(STRONG_OPTIONS);

const PLAIN: &str = "http";

const SECURE: &str = "https";

const STRONG_OPTIONS: &[&str] = &[
    "url",
    "sslverify",
    "username",
    "password-secret",
    "proxy-username",
    "proxy-password-secret",
    "cookie",
    "cookie-secret",
];

const fn protocol(prefixes: &'static [&'static str]) -> Protocol {
    Protocol {
        prefixes,
        parse: |_, name| Ok(Map::from_iter([("url".to_owned(), name.into())])),
        reach: Reach::Outside,
    }
}

/// Lengths are multiples of this many bytes.
const SECTOR: u64 = 512;

/// Least that is fetched when a file is opened, in bytes.
const FIRST_FETCH: u64 = 4096;

/// Longest read, in bytes.
const MAX_TRANSFER: u32 = 8 << 20;

/// A node on a file of a server.
struct Http {
    driver: &'static str,
    shared: Arc<Shared>,
    clients: PerThread<Client>,
    /// Bytes that the server has.
    length: u64,
}

async fn open(request: &mut OpenRequest<'_>, driver: &'static str) -> Result<Box<dyn Driver>> {
    let target = Target::take(request, driver)?;
    if !request.node().read_only {
        if !request.node().auto_read_only {
            let message = "curl driver does not support writes";
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        request.set_read_only();
    }
    let first_fetch = target.readahead.max(FIRST_FETCH);
    let shared = Arc::new(Shared {
        target,
        remote: OnceLock::new(),
        ports: Mutex::default(),
    });
    let failed = |reason: String| {
        let message = format!("CURL: Error opening file: {reason}");
        Error::new(ErrorKind::Io, message)
    };
    let client = Client::new(Arc::clone(&shared)).map_err(|errno| failed(errno.to_string()))?;
    let remote = match client.first(first_fetch).await {
        Ok(remote) => remote,
        Err(failure) => {
            client.close();
            return Err(failed(failure.to_string()));
        }
    };
    let clients = PerThread::new();
    clients.put(client);
    let node = Http {
        driver,
        shared,
        clients,
        length: remote.length,
    };
    if i64::try_from(node.length()).is_err() {
        node.clients.end(Client::close).await;
        return Err(failed("the file is too large".to_owned()));
    }
    Ok(Box::new(node))
}

impl Http {
    fn client(&self) -> std::result::Result<Rc<Client>, Errno> {
        if let Some(client) = self.clients.get() {
            return Ok(client);
        }
        let client = Client::new(Arc::clone(&self.shared))?;
        self.clients.put(Rc::clone(&client));
        Ok(client)
    }

    /// Reads; behind the end of the file there are zeroes.
    async fn fill(&self, offset: u64, buffer: Buffer) -> std::result::Result<(), Errno> {
        let there = self.length.saturating_sub(offset).min(buffer.len() as u64) as usize;
        buffer.slice(there..buffer.len()).fill(0);
        match there {
            0 => Ok(()),
            _ => self.client()?.read(offset, buffer.slice(0..there)).await,
        }
    }
}

impl Driver for Http {
    fn driver_name(&self) -> &'static str {
        self.driver
    }
    fn length(&self) -> u64 {
        self.length
            .checked_next_multiple_of(SECTOR)
            .unwrap_or(u64::MAX)
    }
    fn limits(&self) -> Limits {
        Limits {
            max_transfer: MAX_TRANSFER,
            ..Limits::default()
        }
    }
    fn grows(&self) -> bool {
        false
    }
    fn read(&self, offset: u64, buffer: Buffer) -> IoFuture<'_> {
        IoFuture::boxed(self.fill(offset, buffer))
    }
    fn write(&self, _offset: u64, _buffer: Buffer, _flags: WriteFlags) -> IoFuture<'_> {
        IoFuture::error(Errno::EROFS)
    }
    fn write_zeroes(&self, _range: ByteRange, _flags: ZeroFlags) -> IoFuture<'_> {
        IoFuture::error(Errno::EROFS)
    }
    fn discard(&self, _range: ByteRange) -> IoFuture<'_> {
        IoFuture::error(Errno::EROFS)
    }
    fn flush(&self) -> IoFuture<'_> {
        IoFuture::done()
    }
    fn block_status(
        &self,
        range: ByteRange,
    ) -> BoxFuture<'_, std::result::Result<StatusExtent, Errno>> {
        let status = BlockStatus {
            data: true,
            allocated: true,
            offset: Some(range.offset),
            ..BlockStatus::default()
        };
        let extent = StatusExtent {
            length: range.length,
            status,
        };
        Box::pin(async move { Ok(extent) })
    }
    fn resize(&self, _resize: Resize) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Err(Error::resize_unsupported()) })
    }
    fn close(&self) -> BoxFuture<'_, std::result::Result<(), Errno>> {
        Box::pin(async {
            self.clients.end(Client::close).await;
            Ok(())
        })
    }
    fn edges(&self) -> Vec<(&'static str, &Edge)> {
        Vec::new()
    }
    fn tcp_peers(&self) -> Vec<u16> {
        let ports = self.shared.ports.lock();
        ports.unwrap_or_else(PoisonError::into_inner).clone()
    }
    fn describe(&self) -> Map<String, Value> {
        Map::new()
    }
    fn filename(&self) -> String {
        match self.shared.target.is_particular {
            true => String::new(),
            false => self.shared.target.place.url.clone(),
        }
    }
    fn identity(&self) -> Option<ImageIdentity> {
        None
    }
}
