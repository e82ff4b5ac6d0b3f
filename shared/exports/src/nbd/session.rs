//! The transmission phase of one client, on one thread.
//!
//! ```text
//!   head ─► checked ─► room in the budget ─► payload ─► task ─► reply
//! ```
//!
//! The next head is received while the tasks run; a client that sends faster than it is served waits for room.

use super::budget::{Budget, Reservation};
use super::export::Core;
use super::handshake::Terms;
use ::nbd::limits::MAX_PAYLOAD;
use ::nbd::{
    Chunk, ChunkHeader, Command, CommandFlags, ReplyStyle, Request, SimpleReply, WireErrno,
};
use block::accounting::{Kind, Outcome, Stamp, ThreadAccount};
use block::{ByteRange, Errno, RootHandle, WriteFlags, ZeroFlags};
use executor::net::Part;
use executor::{Buffer, TaskPool};
use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use transport::Connection;

/// Tasks that are kept for further requests.
const TASKS: usize = 16;
/// `CACHE` reads in pieces of this size.
const CACHE_PIECE: u64 = 1 << 20;

/// One client.
pub(super) struct Session {
    pub(super) core: Arc<Core>,
    pub(super) handle: RootHandle,
    pub(super) connection: Connection,
    pub(super) terms: Terms,
    account: ThreadAccount,
    budget: Rc<Budget>,
    /// A reply could not be sent: the client is gone, whatever of it there is still to receive.
    gone: Cell<bool>,
}

/// A request with what it needs.
struct Job {
    request: Request,
    payload: Buffer,
    /// Why it is refused.
    refused: Option<Refusal>,
    _reservation: Reservation,
}

/// An error and the words for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) error: WireErrno,
    pub(super) message: &'static str,
}

impl From<Errno> for Refusal {
    fn from(errno: Errno) -> Self {
        Self {
            error: WireErrno::from_errno(errno as i32),
            message: "",
        }
    }
}

fn refusal(error: WireErrno, message: &'static str) -> Refusal {
    Refusal { error, message }
}

/// Serves a client until it leaves; its requests are done then.
///
/// # Errors
/// What it did wrong.
pub(super) async fn run(
    connection: Connection,
    core: Arc<Core>,
    terms: Terms,
) -> Result<(), String> {
    let session = Rc::new(Session {
        handle: core.root.attach(),
        account: core.accounting.attach(),
        core,
        connection,
        terms,
        budget: Rc::default(),
        gone: Cell::new(false),
    });
    let ended = session.receive().await;
    session.budget.settled().await;
    session.connection.close().await;
    ended
}

impl Session {
    async fn receive(self: &Rc<Self>) -> Result<(), String> {
        let style = self.terms.headers();
        let head = Buffer::zeroed(style.request_size());
        let mut bytes = [0; Request::MAX_SIZE];
        let bytes = &mut bytes[..style.request_size()];
        let tasks = TaskPool::with_capacity(TASKS);
        loop {
            match self.fill(&head).await? {
                Filled::Whole => head.copy_to_slice(bytes),
                Filled::End => return Ok(()),
            }
            let request = Request::decode(style, bytes).map_err(|error| error.to_string())?;
            if request.command == Command::Disconnect || self.gone.get() {
                return Ok(());
            }
            let payload_length = request.payload_length(style);
            if payload_length > u64::from(MAX_PAYLOAD) {
                return Err(format!("a payload of {payload_length} bytes"));
            }
            let refused = self.check(&request).err();
            let cost = match refused {
                Some(_) => payload_length,
                None => self.cost(&request).max(payload_length),
            };
            let reservation = self.budget.reserve(cost).await;
            let payload = Buffer::zeroed(payload_length as usize);
            if let Filled::End = self.fill(&payload).await? {
                return Err("the stream ends within a payload".to_owned());
            }
            let job = Job {
                request,
                payload,
                refused,
                _reservation: reservation,
            };
            tasks.spawn(Rc::clone(self).perform(job));
        }
    }

    /// Fills a buffer; the stream may end before its first byte.
    async fn fill(&self, buffer: &Buffer) -> Result<Filled, String> {
        match self.connection.recv_exact(buffer.clone()).await {
            Ok(count) if count == buffer.len() => Ok(Filled::Whole),
            Ok(0) => Ok(Filled::End),
            Ok(_) => Err("the stream ends within a request".to_owned()),
            Err(errno) => Err(block::error::reason(errno)),
        }
    }

    /// Bytes that serving a request holds besides its payload.
    fn cost(&self, request: &Request) -> u64 {
        match request.command {
            Command::Read => request.length,
            Command::Cache => CACHE_PIECE.min(request.length),
            Command::BlockStatus => super::status::COST * self.terms.contexts.len() as u64,
            _ => 0,
        }
    }

    /// What the export and the agreement allow.
    fn check(&self, request: &Request) -> Result<(), Refusal> {
        let einval = |message| Err(refusal(WireErrno::Einval, message));
        let fua = CommandFlags::FUA;
        let (allowed, writes) = match request.command {
            Command::Read => (fua.with(CommandFlags::DF), false),
            Command::Write => (fua.with(CommandFlags::PAYLOAD_LEN), true),
            Command::Flush | Command::Cache => (fua, false),
            Command::Trim => (fua, true),
            Command::WriteZeroes => {
                let zeroes = fua.with(CommandFlags::NO_HOLE);
                (zeroes.with(CommandFlags::FAST_ZERO), true)
            }
            Command::BlockStatus if self.terms.contexts.is_empty() => {
                return einval("CMD_BLOCK_STATUS not negotiated");
            }
            Command::BlockStatus => (CommandFlags::REQ_ONE.with(fua), false),
            Command::Disconnect | Command::Unknown(_) => {
                return einval("request type is not known");
            }
        };
        if writes && !self.core.writable {
            return Err(refusal(WireErrno::Eperm, "Export is read-only"));
        }
        if !request.flags.without(allowed).is_empty() {
            return einval("unsupported flags");
        }
        let simple = self.terms.replies == ReplyStyle::Simple;
        if simple && request.flags.contains(CommandFlags::DF) {
            return einval("unsupported flags");
        }
        if request.command == Command::Flush {
            return Ok(());
        }
        if request.command == Command::Read && request.length > u64::from(MAX_PAYLOAD) {
            return einval("the length is beyond the limit");
        }
        self.check_range(request, writes)
    }

    fn check_range(&self, request: &Request, writes: bool) -> Result<(), Refusal> {
        let range = ByteRange::new(request.offset, request.length);
        let size = self.core.size();
        if range.checked_end().is_none_or(|end| end > size) {
            let grows = writes && request.command != Command::Trim;
            let error = match grows {
                true => WireErrno::Enospc,
                false => WireErrno::Einval,
            };
            return Err(refusal(error, "operation past EOF"));
        }
        let minimum = u64::from(self.core.block_sizes().minimum);
        let aligned = (range.offset | range.length).is_multiple_of(minimum);
        if self.terms.keeps_blocks && !aligned {
            return Err(refusal(WireErrno::Einval, "unaligned request"));
        }
        if request.command == Command::BlockStatus && range.length == 0 {
            return Err(refusal(WireErrno::Einval, "need non-zero length"));
        }
        Ok(())
    }

    /// Does a request and answers it. A reply that cannot be sent is one of a client that is gone: the receiver hears of it.
    async fn perform(self: Rc<Self>, job: Job) {
        let request = &job.request;
        let answered = match (job.refused, request.command) {
            (Some(refused), command) => {
                if let Some(kind) = kind_of(command) {
                    self.account.invalid(kind);
                }
                self.answer(request, Err(refused)).await
            }
            (None, Command::Read) => self.read(request).await,
            (None, Command::BlockStatus) => self.block_status(request).await,
            (None, _) => {
                let began = self.begin();
                let result = self.change(request, job.payload.clone()).await;
                self.count((request, began), result.is_ok());
                self.answer(request, result).await
            }
        };
        if answered.is_err() {
            self.gone.set(true);
        }
    }

    /// A request begins.
    pub(super) fn begin(&self) -> Stamp {
        self.account.begin_alone()
    }

    /// Counts a request that began at a time.
    pub(super) fn count(&self, (request, began): (&Request, Stamp), succeeded: bool) {
        let Some(kind) = kind_of(request.command) else {
            return;
        };
        let bytes = match kind {
            Kind::Flush => 0,
            _ => request.length,
        };
        let outcome = match succeeded {
            true => Outcome::Done,
            false => Outcome::Failed,
        };
        self.account.done(began, (kind, bytes), outcome);
    }

    /// Everything that is answered by success or failure alone.
    async fn change(&self, request: &Request, payload: Buffer) -> Result<(), Refusal> {
        let range = ByteRange::new(request.offset, request.length);
        let fua = self.core.writethrough || request.flags.contains(CommandFlags::FUA);
        match request.command {
            Command::Write => {
                self.reach(range).await?;
                let flags = WriteFlags {
                    fua,
                    ..WriteFlags::default()
                };
                self.handle.write(range.offset, payload, flags).await?;
            }
            Command::WriteZeroes => {
                self.reach(range).await?;
                let flags = ZeroFlags {
                    fua,
                    may_unmap: !request.flags.contains(CommandFlags::NO_HOLE),
                    no_fallback: request.flags.contains(CommandFlags::FAST_ZERO),
                };
                self.handle.write_zeroes(range, flags).await?;
            }
            Command::Trim => {
                let range = self.within(range);
                if range.length > 0 {
                    self.handle.discard(range).await?;
                }
                if fua {
                    self.handle.flush().await?;
                }
            }
            Command::Cache => self.cache(self.within(range)).await?,
            Command::Flush => self.handle.flush().await?,
            Command::Read | Command::BlockStatus | Command::Disconnect | Command::Unknown(_) => {}
        }
        Ok(())
    }

    /// Reads a range for what that brings near.
    async fn cache(&self, range: ByteRange) -> Result<(), Errno> {
        let buffer = Buffer::zeroed(CACHE_PIECE.min(range.length) as usize);
        let mut done = 0;
        while done < range.length {
            let piece = CACHE_PIECE.min(range.length - done);
            let part = buffer.slice(0..piece as usize);
            self.handle.read(range.offset + done, part).await?;
            done += piece;
        }
        Ok(())
    }

    /// The part of a range that the node has.
    pub(super) fn within(&self, range: ByteRange) -> ByteRange {
        let left = self.handle.length().saturating_sub(range.offset);
        ByteRange::new(range.offset, range.length.min(left))
    }

    /// Makes the node reach to the end of a range that is written.
    async fn reach(&self, range: ByteRange) -> Result<(), Errno> {
        if self.within(range) == range {
            return Ok(());
        }
        self.core.reach_size().await
    }

    /// A reply without data.
    pub(super) async fn answer(
        &self,
        request: &Request,
        result: Result<(), Refusal>,
    ) -> Result<(), Errno> {
        let refused = match result {
            Ok(()) if self.terms.replies == ReplyStyle::Extended => {
                return self.chunk(request, (Chunk::None, None), Last::Yes).await;
            }
            Ok(()) => None,
            Err(refused) => Some(refused),
        };
        let simple = match self.terms.replies {
            ReplyStyle::Simple => true,
            // Reads and status are never answered by a simple reply.
            ReplyStyle::Structured => refused.is_none(),
            ReplyStyle::Extended => false,
        };
        match refused {
            Some(refused) if !simple => {
                let chunk = Chunk::Error {
                    error: refused.error,
                    message: refused.message.to_owned(),
                    offset: None,
                };
                self.chunk(request, (chunk, None), Last::Yes).await
            }
            refused => {
                let reply = SimpleReply {
                    error: refused.map(|refused| refused.error),
                    cookie: request.cookie,
                };
                let parts = vec![Part::Bytes(reply.encode().to_vec())];
                self.connection.send(parts).await
            }
        }
    }

    /// One chunk of a reply, with the data that belongs to it.
    pub(super) async fn chunk(
        &self,
        request: &Request,
        (chunk, data): (Chunk, Option<Buffer>),
        last: Last,
    ) -> Result<(), Errno> {
        let (kind, payload) = chunk.encode(self.terms.replies);
        let data_length = data.as_ref().map_or(0, Buffer::len);
        let header = ChunkHeader {
            kind,
            done: last == Last::Yes,
            cookie: request.cookie,
            offset: request.offset,
            length: (payload.len() + data_length) as u64,
        };
        let mut bytes = Vec::with_capacity(ChunkHeader::EXTENDED_SIZE + payload.len());
        header.encode(self.terms.replies, &mut bytes);
        bytes.extend_from_slice(&payload);
        let mut parts = vec![Part::Bytes(bytes)];
        parts.extend(data.map(Part::Buffer));
        self.connection.send(parts).await
    }
}

/// What a command counts as.
fn kind_of(command: Command) -> Option<Kind> {
    match command {
        Command::Read => Some(Kind::Read),
        Command::Write | Command::WriteZeroes => Some(Kind::Write),
        Command::Flush => Some(Kind::Flush),
        Command::Trim => Some(Kind::Unmap),
        Command::Cache | Command::BlockStatus | Command::Disconnect | Command::Unknown(_) => None,
    }
}

/// How a receive ended.
enum Filled {
    Whole,
    /// The stream ended before the first byte.
    End,
}

/// Whether a chunk ends its reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Last {
    Yes,
    No,
}
