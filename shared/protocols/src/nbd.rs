//! `nbd`: an export of an NBD server.
//!
//! Options: `server` (`inet`, `unix` with `abstract` and `tight`, `vsock`, `fd`), or the older `path`, `host` and `port`;
//! `export`; `tls-creds`, the id of a `tls-creds-*` object, and `tls-hostname`, whose certificate is
//! expected (that of `host` when absent); `x-dirty-bitmap`, a metadata context whose flags are shown
//! in the place of those of `base:allocation`; `reconnect-delay` and `open-timeout`, in seconds.
//! Names: `nbd:...` and URIs (see [`name`]).
//!
//! ```text
//!   any thread ──► its own Link, if the server allows several connections
//!              └─► else the link of the thread that opened the node, through a private buffer
//!   Link ──► Session (one connection in transmission) ──► transport::Connection
//! ```
//!
//! What a server says is checked: a reply that fits no request, or the wrong one, ends the
//! connection for good. Must not know: what is in the export.

mod handshake;
mod link;
mod name;
mod session;
mod target;

use block::error::Result;
use block::open::DriverEntry;
use block::{
    BlockStatus, BoxFuture, Buffer, ByteRange, Driver, Edge, Errno, Error, ErrorKind,
    ImageIdentity, IoFuture, Limits, OpenRequest, Protocol, Reach, Resize, StatusExtent,
    WriteFlags, ZeroFlags,
};
use executor::{Handle, HeapBuffer};
use handshake::Agreement;
use link::Link;
use nbd::{BaseAllocation, Command, CommandFlags, ExportFlags, Request};
use serde_json::{Map, Value};
use session::{Answer, MAX_TRANSFER};
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use target::Target;

/// The table line of `nbd`.
pub const ENTRY: DriverEntry = DriverEntry::new("nbd", |request| Box::pin(open(request)))
    .with_protocol(Protocol {
        prefixes: &["nbd", "nbd+tcp", "nbd+unix"],
        parse: |_, name| name::parse(name),
        reach: Reach::Outside,
    })
    .with_strong_options(&[
        "path",
        "host",
        "port",
        "export",
        "tls-creds",
        "tls-hostname",
        "server.",
    ]);

/// Most connections of a node.
const MAX_LINKS: usize = 16;

/// Longest request without a payload, in bytes; a multiple of every alignment.
const MAX_RANGE: u64 = 1 << 30;

const SECTOR: u64 = 512;

static NEXT_NODE: AtomicU64 = AtomicU64::new(1);

thread_local! {
    /// The links of this thread, by node.
    static LINKS: RefCell<Vec<(u64, Way)>> = const { RefCell::new(Vec::new()) };
}

/// How a thread reaches the server.
#[derive(Clone)]
enum Way {
    /// By a connection of its own.
    Own(Rc<Link>),
    /// By that of the first thread.
    First,
}

/// A node on an export.
struct Nbd {
    id: u64,
    target: Arc<Target>,
    agreement: Agreement,
    /// The threads with a link, that of the first one first.
    threads: Mutex<Vec<Handle>>,
}

async fn open(request: &mut OpenRequest<'_>) -> Result<Box<dyn Driver>> {
    let target = Arc::new(Target::take(request)?);
    let session = link::first_session(&target).await?;
    let agreement = session.agreement;
    let node = Nbd {
        id: NEXT_NODE.fetch_add(1, Ordering::Relaxed),
        target: Arc::clone(&target),
        agreement,
        threads: Mutex::new(vec![Handle::current()]),
    };
    let link = Link::up(target, session);
    if let Err(error) = node.check(request) {
        link.close().await;
        return Err(error);
    }
    node.keep(Way::Own(link));
    Ok(Box::new(node))
}

impl Nbd {
    /// Whether the export serves for what the node is opened for.
    fn check(&self, request: &mut OpenRequest<'_>) -> Result<()> {
        let refuse = |message: &str| Err(Error::new(ErrorKind::Invalid, message));
        if i64::try_from(self.agreement.size).is_err() {
            return refuse("the export is too large");
        }
        if self.target.dirty_bitmap.is_some() && self.agreement.context.is_none() {
            let name = self.target.dirty_bitmap.as_deref().unwrap_or_default();
            return refuse(&format!("requested x-dirty-bitmap {name} not found"));
        }
        if self.can(ExportFlags::READ_ONLY) && !request.node().read_only {
            if !request.node().auto_read_only {
                return refuse("request on write denied without write permission");
            }
            request.set_read_only();
        }
        Ok(())
    }

    fn can(&self, flag: ExportFlags) -> bool {
        self.agreement.flags.contains(flag)
    }

    fn keep(&self, way: Way) {
        LINKS.with_borrow_mut(|links| {
            links.retain(|(known, _)| *known != self.id);
            links.push((self.id, way));
        });
    }

    /// This thread's way to the server; a connection of its own if it may have one.
    async fn way(&self) -> Way {
        if let Some(way) = way_of(self.id) {
            return way;
        }
        if !self.can(ExportFlags::CAN_MULTI_CONN) || !self.enter() {
            return Way::First;
        }
        // Other requests do not wait for the connection.
        self.keep(Way::First);
        match link::attempt(&self.target).await {
            Ok(session) if session.agreement == self.agreement => {
                let way = Way::Own(Link::up(Arc::clone(&self.target), session));
                self.keep(way.clone());
                way
            }
            Ok(session) => {
                session.disconnect().await;
                Way::First
            }
            Err(error) => {
                tracing::warn!(%error, "one more connection to the NBD server is not to be had");
                Way::First
            }
        }
    }

    /// Counts this thread among those with a link; false when there are enough.
    fn enter(&self) -> bool {
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        let has_room = (1..MAX_LINKS).contains(&threads.len());
        if has_room {
            threads.push(Handle::current());
        }
        has_room
    }

    async fn call(
        &self,
        request: Request,
        buffer: Option<Buffer>,
    ) -> std::result::Result<Answer, Errno> {
        match self.way().await {
            Way::Own(link) => link.call(request, buffer).await,
            Way::First => self.call_elsewhere(request, buffer).await,
        }
    }

    /// Has the first link's thread do it, on private memory.
    async fn call_elsewhere(
        &self,
        request: Request,
        buffer: Option<Buffer>,
    ) -> std::result::Result<Answer, Errno> {
        let first = {
            let threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
            threads.first().cloned()
        };
        let first = first.ok_or(Errno::EIO)?;
        let id = self.id;
        let private = match (&buffer, request.command) {
            (Some(data), Command::Write) => Some(data.to_heap()),
            (Some(place), _) => Some(HeapBuffer::zeroed(place.len())),
            (None, _) => None,
        };
        let answered = first.call(move || async move {
            let Some(Way::Own(link)) = way_of(id) else {
                return Err(Errno::EIO);
            };
            let memory = private.map(HeapBuffer::into_buffer);
            let answer = link.call(request, memory.clone()).await?;
            let read = memory.filter(|_| request.command == Command::Read);
            Ok::<_, Errno>((answer, read.map(|read| read.to_heap())))
        });
        let (answer, read) = answered.await.ok_or(Errno::EIO)??;
        if let (Some(place), Some(read)) = (buffer, read) {
            place.copy_from_slice(&read);
        }
        Ok(answer)
    }

    fn request(command: Command, range: ByteRange) -> Request {
        Request {
            flags: CommandFlags::empty(),
            command,
            cookie: 0,
            offset: range.offset,
            length: range.length,
        }
    }

    /// A request without payload, in as many pieces as its length takes.
    async fn in_pieces(&self, mut request: Request) -> std::result::Result<(), Errno> {
        let end = request
            .offset
            .checked_add(request.length)
            .ok_or(Errno::EINVAL)?;
        while request.offset < end {
            request.length = MAX_RANGE.min(end - request.offset);
            self.call(request, None).await?;
            request.offset += request.length;
        }
        Ok(())
    }

    async fn transfer(&self, request: Request, buffer: Buffer) -> std::result::Result<(), Errno> {
        match buffer.is_empty() {
            true => Ok(()),
            false => self.call(request, Some(buffer)).await.map(drop),
        }
    }

    async fn status(&self, range: ByteRange) -> std::result::Result<StatusExtent, Errno> {
        let all = |length| StatusExtent {
            length,
            status: BlockStatus {
                data: true,
                allocated: true,
                offset: Some(range.offset),
                ..BlockStatus::default()
            },
        };
        if self.agreement.context.is_none() {
            return Ok(all(range.length));
        }
        let asked = ByteRange::new(range.offset, range.length.min(MAX_RANGE));
        let request = Request {
            flags: CommandFlags::REQ_ONE,
            ..Self::request(Command::BlockStatus, asked)
        };
        let answer = self.call(request, None).await?;
        let Some(extent) = answer.extent else {
            return Ok(all(range.length));
        };
        let flags = BaseAllocation::from_wire(extent.flags);
        let mut shown = all(extent.length.min(asked.length));
        shown.status.data = !flags.hole;
        shown.status.zero = flags.zero;
        // A hole of unknown content is still the export's. Flags of other contexts say nothing of
        // content: what has neither's marks is shown as nowhere.
        let is_marked = shown.status.data || shown.status.zero;
        if !is_marked && !self.target.shows_allocation() {
            shown.status.allocated = false;
            shown.status.offset = None;
        }
        Ok(shown)
    }
}

fn way_of(id: u64) -> Option<Way> {
    LINKS.with_borrow(|links| {
        let found = links.iter().find(|(known, _)| *known == id);
        found.map(|(_, way)| way.clone())
    })
}

/// Ends the current thread's link of a node.
async fn close_link(id: u64) {
    let way = way_of(id);
    LINKS.with_borrow_mut(|links| links.retain(|(known, _)| *known != id));
    if let Some(Way::Own(link)) = way {
        link.close().await;
    }
}

impl Driver for Nbd {
    fn driver_name(&self) -> &'static str {
        "nbd"
    }
    fn tcp_peers(&self) -> Vec<u16> {
        self.target.tcp_port().into_iter().collect()
    }
    fn length(&self) -> u64 {
        self.agreement.size
    }
    fn limits(&self) -> Limits {
        let sizes = self.agreement.sizes;
        // A server that says nothing may be too old for less than sectors, unless its export shows
        // otherwise.
        let assumed = match self.agreement.context {
            None if self.agreement.size.is_multiple_of(SECTOR) => SECTOR as u32,
            _ => 1,
        };
        let minimum = sizes.map_or(assumed, |sizes| sizes.minimum);
        let maximum = sizes.map_or(MAX_TRANSFER, |sizes| sizes.maximum.min(MAX_TRANSFER));
        Limits {
            request_alignment: minimum,
            memory_alignment: 1,
            max_transfer: maximum / minimum * minimum,
            optimal_transfer: 0,
            zero_alignment: 0,
        }
    }
    fn grows(&self) -> bool {
        false
    }
    fn read(&self, offset: u64, buffer: Buffer) -> IoFuture<'_> {
        let range = ByteRange::new(offset, buffer.len() as u64);
        IoFuture::boxed(self.transfer(Self::request(Command::Read, range), buffer))
    }
    fn write(&self, offset: u64, buffer: Buffer, _flags: WriteFlags) -> IoFuture<'_> {
        let range = ByteRange::new(offset, buffer.len() as u64);
        IoFuture::boxed(self.transfer(Self::request(Command::Write, range), buffer))
    }
    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> IoFuture<'_> {
        let is_fast = self.can(ExportFlags::SEND_FAST_ZERO);
        if !self.can(ExportFlags::SEND_WRITE_ZEROES) || (flags.no_fallback && !is_fast) {
            return IoFuture::error(Errno::EOPNOTSUPP);
        }
        let mut asked = CommandFlags::empty();
        if !flags.may_unmap {
            asked = asked.with(CommandFlags::NO_HOLE);
        }
        if flags.no_fallback {
            asked = asked.with(CommandFlags::FAST_ZERO);
        }
        IoFuture::boxed(self.in_pieces(Request {
            flags: asked,
            ..Self::request(Command::WriteZeroes, range)
        }))
    }
    fn discard(&self, range: ByteRange) -> IoFuture<'_> {
        match self.can(ExportFlags::SEND_TRIM) {
            true => IoFuture::boxed(self.in_pieces(Self::request(Command::Trim, range))),
            false => IoFuture::done(),
        }
    }
    fn flush(&self) -> IoFuture<'_> {
        if !self.can(ExportFlags::SEND_FLUSH) {
            return IoFuture::done();
        }
        let request = Self::request(Command::Flush, ByteRange::new(0, 0));
        IoFuture::boxed(async move { self.call(request, None).await.map(drop) })
    }
    fn block_status(
        &self,
        range: ByteRange,
    ) -> BoxFuture<'_, std::result::Result<StatusExtent, Errno>> {
        Box::pin(self.status(range))
    }
    fn resize(&self, resize: Resize) -> BoxFuture<'_, Result<()>> {
        let size = self.agreement.size;
        Box::pin(async move {
            let refuse = |message: &str| Err(Error::new(ErrorKind::Unsupported, message));
            match resize.length.cmp(&size) {
                std::cmp::Ordering::Equal => Ok(()),
                std::cmp::Ordering::Greater => refuse("Cannot grow NBD nodes"),
                std::cmp::Ordering::Less => refuse("Cannot resize NBD nodes"),
            }
        })
    }
    fn close(&self) -> BoxFuture<'_, std::result::Result<(), Errno>> {
        Box::pin(async {
            let threads = {
                let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
                std::mem::take(&mut *threads)
            };
            let id = self.id;
            for thread in threads {
                match thread.is_current() {
                    true => close_link(id).await,
                    // A thread that has ended took its link along.
                    false => drop(thread.call(move || close_link(id)).await),
                }
            }
            Ok(())
        })
    }
    fn edges(&self) -> Vec<(&'static str, &Edge)> {
        Vec::new()
    }
    fn describe(&self) -> Map<String, Value> {
        Map::new()
    }
    fn filename(&self) -> String {
        name::generate(&self.target)
    }
    fn base_directory(&self) -> Option<Result<String>> {
        let message = "Cannot generate a base directory for NBD nodes";
        Some(Err(Error::new(ErrorKind::Invalid, message)))
    }
    fn identity(&self) -> Option<ImageIdentity> {
        None
    }
}
