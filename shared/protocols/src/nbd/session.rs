//! The transmission phase on one connection: requests go out as they come, one task takes the
//! replies in whatever order the server answers.
//!
//! ```text
//!   call(request) ──► waiting[cookie] ──► a task sends head and payload
//!        ▲                  │
//!        └── outcome ◄── receiver task: reply heads, data straight into the request's buffer
//! ```
//!
//! A session belongs to one thread. It ends at the first error of the connection or of the
//! protocol; what waits then learns which of the two it was. A caller that goes away leaves its
//! request behind: the buffer stays until the reply is there, and the executor counts it among the
//! abandoned operations meanwhile.

use super::handshake::{Agreement, receive, receive_vec};
use block::{Buffer, Errno};
use executor::net::Part;
use executor::sync::Latch;
use executor::{Unfinished, unfinished};
use nbd::limits::{MAX_CHUNK, MAX_PAYLOAD};
use nbd::{Chunk, ChunkHeader, ChunkKind, Command, ReplyHeader, ReplyStyle, Request, StatusExtent};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use transport::Connection;

/// Why a session is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The connection is gone: another one may do.
    Lost,
    /// The server breaks the protocol.
    Broken,
}

/// What a request came to.
pub(super) type Outcome = Result<Answer, Failure>;

/// A good answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Answer {
    /// The first extent, for block status.
    pub(super) extent: Option<StatusExtent>,
}

/// Why there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// The server said so.
    Refused(Errno),
    /// The session ended first.
    Ended(End),
}

/// A request that the server has not answered.
struct Waiting {
    command: Command,
    offset: u64,
    length: u64,
    buffer: Option<Buffer>,
    /// Bytes of a read that have come.
    received: u64,
    error: Option<Errno>,
    extent: Option<StatusExtent>,
    result: Rc<Slot>,
    /// Keeps the request counted when its caller is gone.
    orphan: Option<Unfinished>,
}

#[derive(Default)]
struct Slot {
    outcome: Cell<Option<Outcome>>,
    done: Latch,
}

/// A connection in transmission.
pub(super) struct Session {
    connection: Connection,
    pub(super) agreement: Agreement,
    waiting: RefCell<HashMap<u64, Waiting>>,
    next_cookie: Cell<u64>,
    end: Cell<Option<End>>,
}

/// Marks the request as left behind when its caller goes away.
struct Caller<'s> {
    session: &'s Session,
    cookie: u64,
}

impl Drop for Caller<'_> {
    fn drop(&mut self) {
        if let Some(waiting) = self.session.waiting.borrow_mut().get_mut(&self.cookie) {
            waiting.orphan = unfinished();
        }
    }
}

impl Session {
    /// Starts taking replies on a connection whose handshake is done. It ends with the last
    /// reference, or with the connection.
    pub(super) fn start(connection: Connection, agreement: Agreement) -> Rc<Self> {
        let session = Rc::new(Self {
            connection,
            agreement,
            waiting: RefCell::default(),
            next_cookie: Cell::new(1),
            end: Cell::new(None),
        });
        let receiver = Rc::clone(&session);
        drop(executor::spawn(async move {
            let end = receiver.receive_all().await;
            receiver.finish(end);
        }));
        session
    }

    /// Why the session is over, if it is.
    pub(super) fn end(&self) -> Option<End> {
        self.end.get()
    }

    /// Sends a request and waits for its answer. The data of a write, and the place for that of a
    /// read, are in `buffer`.
    pub(super) async fn call(
        self: &Rc<Self>,
        mut request: Request,
        buffer: Option<Buffer>,
    ) -> Outcome {
        if let Some(end) = self.end.get() {
            return Err(Failure::Ended(end));
        }
        let cookie = self.next_cookie.replace(self.next_cookie.get() + 1);
        request.cookie = cookie;
        let result = Rc::<Slot>::default();
        let payload = buffer.clone().filter(|_| request.command == Command::Write);
        self.waiting.borrow_mut().insert(
            cookie,
            Waiting {
                command: request.command,
                offset: request.offset,
                length: request.length,
                buffer,
                received: 0,
                error: None,
                extent: None,
                result: Rc::clone(&result),
                orphan: None,
            },
        );
        let _caller = Caller {
            session: self,
            cookie,
        };
        self.send(request, payload);
        result.done.wait().await;
        result
            .outcome
            .take()
            .unwrap_or(Err(Failure::Ended(End::Lost)))
    }

    /// Sends in a task of its own: a request is sent whole, whatever becomes of its caller.
    fn send(self: &Rc<Self>, request: Request, payload: Option<Buffer>) {
        let mut head = Vec::with_capacity(Request::MAX_SIZE);
        request.encode(self.agreement.header_style(), &mut head);
        let mut parts = vec![Part::Bytes(head)];
        parts.extend(payload.map(Part::Buffer));
        let session = Rc::clone(self);
        drop(executor::spawn(async move {
            if session.connection.send(parts).await.is_err() {
                session.finish(End::Lost);
            }
        }));
    }

    /// Says goodbye and closes the connection.
    pub(super) async fn disconnect(self: &Rc<Self>) {
        if self.end.get().is_none() {
            let request = Request {
                flags: nbd::CommandFlags::empty(),
                command: Command::Disconnect,
                cookie: 0,
                offset: 0,
                length: 0,
            };
            let mut head = Vec::new();
            request.encode(self.agreement.header_style(), &mut head);
            let sent = self.connection.send(vec![Part::Bytes(head)]).await;
            if let Err(errno) = sent {
                tracing::debug!(%errno, "an NBD server was gone before its client");
            }
        }
        self.finish(End::Lost);
    }

    /// Ends the session; everything that waits learns why.
    fn finish(&self, end: End) {
        if self.end.get().is_none() {
            self.end.set(Some(end));
        }
        self.connection.shutdown();
        for (_, waiting) in self.waiting.take() {
            waiting.result.outcome.set(Some(Err(Failure::Ended(end))));
            waiting.result.done.set();
        }
    }

    /// Takes replies until there are none.
    async fn receive_all(&self) -> End {
        loop {
            if let Err(end) = self.receive_one().await {
                return end;
            }
        }
    }

    async fn receive_one(&self) -> Result<(), End> {
        let lost = |_| End::Lost;
        let broken = |error: nbd::ProtocolError| {
            tracing::warn!(%error, "an NBD server breaks the protocol");
            End::Broken
        };
        let style = self.agreement.replies;
        let mut head = match style {
            ReplyStyle::Extended => receive_vec(&self.connection, style.head_size()).await,
            _ => receive::<16>(&self.connection)
                .await
                .map(|head| head.to_vec()),
        }
        .map_err(lost)?;
        let magic = [head[0], head[1], head[2], head[3]];
        let size = ReplyHeader::size(style, magic).map_err(broken)?;
        if let Some(more) = size.checked_sub(head.len()).filter(|more| *more > 0) {
            head.extend(receive_vec(&self.connection, more).await.map_err(lost)?);
        }
        match ReplyHeader::decode(&head).map_err(broken)? {
            ReplyHeader::Simple(reply) => {
                let error = reply.error.map(|error| Errno::from_raw(error.to_errno()));
                let (command, length) = self.known(reply.cookie)?;
                if command == Command::Read && style != ReplyStyle::Simple {
                    return Err(End::Broken);
                }
                if let (Command::Read, None) = (command, error) {
                    self.receive_data(reply.cookie, (0, length)).await?;
                }
                self.complete(reply.cookie, error)
            }
            ReplyHeader::Chunk(chunk) => self.receive_chunk(chunk).await,
        }
    }

    /// The command and length of a request that waits.
    fn known(&self, cookie: u64) -> Result<(Command, u64), End> {
        let waiting = self.waiting.borrow();
        let known = waiting.get(&cookie).ok_or(End::Broken)?;
        Ok((known.command, known.length))
    }

    /// Receives `length` bytes into the buffer of a read, from `start` on.
    async fn receive_data(&self, cookie: u64, (start, length): (u64, u64)) -> Result<(), End> {
        let buffer = {
            let waiting = self.waiting.borrow();
            let known = waiting.get(&cookie).ok_or(End::Broken)?;
            let end = start.checked_add(length).filter(|end| *end <= known.length);
            let buffer = known.buffer.as_ref().ok_or(End::Broken)?;
            let end = end.ok_or(End::Broken)?;
            buffer.slice(start as usize..end as usize)
        };
        let received = self.connection.recv_exact(buffer).await;
        if received.map_err(|_| End::Lost)? < length as usize {
            return Err(End::Lost);
        }
        self.count(cookie, length)
    }

    /// Counts bytes of a read; no more than were asked for.
    fn count(&self, cookie: u64, length: u64) -> Result<(), End> {
        let mut waiting = self.waiting.borrow_mut();
        let known = waiting.get_mut(&cookie).ok_or(End::Broken)?;
        known.received = known.received.checked_add(length).ok_or(End::Broken)?;
        match known.received <= known.length {
            true => Ok(()),
            false => Err(End::Broken),
        }
    }

    async fn receive_chunk(&self, header: ChunkHeader) -> Result<(), End> {
        if header.length > u64::from(MAX_CHUNK) {
            return Err(End::Broken);
        }
        let (command, _) = self.known(header.cookie)?;
        let decoded = Chunk::decoded_length(&header);
        let payload = receive_vec(&self.connection, decoded)
            .await
            .map_err(|_| End::Lost)?;
        let chunk = Chunk::decode(&header, &payload).map_err(|_| End::Broken)?;
        if header.kind == ChunkKind::OffsetData && command != Command::Read {
            return Err(End::Broken);
        }
        self.take_chunk(&header, (command, chunk)).await?;
        match header.done {
            true => self.complete(header.cookie, None),
            false => Ok(()),
        }
    }

    /// What a chunk says about its request.
    async fn take_chunk(
        &self,
        header: &ChunkHeader,
        (command, chunk): (Command, Chunk),
    ) -> Result<(), End> {
        let cookie = header.cookie;
        let relative = |offset: u64| {
            let waiting = self.waiting.borrow();
            let start = waiting.get(&cookie).map_or(0, |known| known.offset);
            offset.checked_sub(start).ok_or(End::Broken)
        };
        match chunk {
            Chunk::None => Ok(()),
            Chunk::OffsetData { offset } => {
                let length = header.length - Chunk::DATA_PREFIX as u64;
                self.receive_data(cookie, (relative(offset)?, length)).await
            }
            Chunk::OffsetHole { offset, length } if command == Command::Read => {
                self.zero(cookie, (relative(offset)?, u64::from(length)))
            }
            Chunk::BlockStatus(status) if command == Command::BlockStatus => {
                let mut waiting = self.waiting.borrow_mut();
                let known = waiting.get_mut(&cookie).ok_or(End::Broken)?;
                if Some(status.context) == self.agreement.context {
                    known.extent = status.extents.first().copied();
                }
                Ok(())
            }
            Chunk::Error { error, .. } => {
                let errno = Errno::from_raw(error.to_errno());
                let mut waiting = self.waiting.borrow_mut();
                let known = waiting.get_mut(&cookie).ok_or(End::Broken)?;
                known.error.get_or_insert(errno);
                Ok(())
            }
            _ => Err(End::Broken),
        }
    }

    fn zero(&self, cookie: u64, (start, length): (u64, u64)) -> Result<(), End> {
        {
            let waiting = self.waiting.borrow();
            let known = waiting.get(&cookie).ok_or(End::Broken)?;
            let end = start.checked_add(length).filter(|end| *end <= known.length);
            let buffer = known.buffer.as_ref().ok_or(End::Broken)?;
            let end = end.ok_or(End::Broken)?;
            buffer.slice(start as usize..end as usize).fill(0);
        }
        self.count(cookie, length)
    }

    /// Answers a request.
    fn complete(&self, cookie: u64, error: Option<Errno>) -> Result<(), End> {
        let known = self.waiting.borrow_mut().remove(&cookie);
        let known = known.ok_or(End::Broken)?;
        let error = error.or(known.error);
        let outcome = match error {
            Some(errno) => Err(Failure::Refused(errno)),
            None if known.command == Command::Read && known.received != known.length => {
                Err(Failure::Ended(End::Broken))
            }
            None => Ok(Answer {
                extent: known.extent,
            }),
        };
        known.result.outcome.set(Some(outcome));
        known.result.done.set();
        match outcome {
            Err(Failure::Ended(end)) => Err(end),
            _ => Ok(()),
        }
    }
}

/// The longest payload of a request.
pub(super) const MAX_TRANSFER: u32 = MAX_PAYLOAD;
