//! Reads: one piece, or chunks of data and holes.

use super::session::{Last, Refusal, Session};
use ::nbd::{Chunk, CommandFlags, ReplyStyle, Request, SimpleReply};
use block::{ByteRange, Errno};
use executor::Buffer;
use executor::net::Part;

/// Shorter reads are answered in one piece: looking for holes costs more than sending zeroes.
const SPARSE_FROM: u64 = 64 << 10;

impl Session {
    /// Reads and answers.
    pub(super) async fn read(&self, request: &Request) -> Result<(), Errno> {
        if self.terms.replies == ReplyStyle::Simple {
            return self.read_simple(request).await;
        }
        let whole = request.flags.contains(CommandFlags::DF) || request.length < SPARSE_FROM;
        if whole {
            let range = ByteRange::new(request.offset, request.length);
            return match self.load_all(request).await {
                Ok(buffer) => self.send_data(request, (range, buffer), Last::Yes).await,
                Err(errno) => self.answer(request, Err(Refusal::from(errno))).await,
            };
        }
        let began = self.begin();
        let sent = self.read_pieces(request).await?;
        self.count((request, began), sent.is_ok());
        match sent {
            Ok(()) => Ok(()),
            Err(errno) => self.answer(request, Err(Refusal::from(errno))).await,
        }
    }

    /// Sends the range as chunks; why it cannot be read. Fails when it cannot be sent.
    async fn read_pieces(&self, request: &Request) -> Result<Result<(), Errno>, Errno> {
        let mut done = 0;
        while done < request.length {
            let rest = ByteRange::new(request.offset + done, request.length - done);
            match self.read_piece(request, rest).await? {
                Ok(length) => done += length,
                Err(errno) => return Ok(Err(errno)),
            }
        }
        Ok(Ok(()))
    }

    /// The content of the whole range of a request, which is counted.
    async fn load_all(&self, request: &Request) -> Result<Buffer, Errno> {
        let began = self.begin();
        let range = ByteRange::new(request.offset, request.length);
        let loaded = self.load(range).await;
        self.count((request, began), loaded.is_ok());
        loaded
    }

    /// Sends the start of `rest` as one chunk; how long that was, or why it cannot be read. Fails when it cannot be sent.
    async fn read_piece(
        &self,
        request: &Request,
        rest: ByteRange,
    ) -> Result<Result<u64, Errno>, Errno> {
        let status = match self.status_at(rest).await {
            Ok(status) => status,
            Err(errno) => return Ok(Err(errno)),
        };
        let piece = ByteRange::new(rest.offset, status.length.min(rest.length));
        let last = match piece.length == rest.length {
            true => Last::Yes,
            false => Last::No,
        };
        if status.zero {
            let hole = Chunk::OffsetHole {
                offset: piece.offset,
                length: piece.length as u32,
            };
            self.chunk(request, (hole, None), last).await?;
            return Ok(Ok(piece.length));
        }
        match self.load(piece).await {
            Ok(buffer) => self.send_data(request, (piece, buffer), last).await?,
            Err(errno) => return Ok(Err(errno)),
        }
        Ok(Ok(piece.length))
    }

    async fn read_simple(&self, request: &Request) -> Result<(), Errno> {
        match self.load_all(request).await {
            Ok(buffer) => {
                let reply = SimpleReply {
                    error: None,
                    cookie: request.cookie,
                };
                let head = Part::Bytes(reply.encode().to_vec());
                self.connection.send(vec![head, Part::Buffer(buffer)]).await
            }
            Err(errno) => self.answer(request, Err(Refusal::from(errno))).await,
        }
    }

    async fn send_data(
        &self,
        request: &Request,
        (range, buffer): (ByteRange, Buffer),
        last: Last,
    ) -> Result<(), Errno> {
        let chunk = Chunk::OffsetData {
            offset: range.offset,
        };
        self.chunk(request, (chunk, Some(buffer)), last).await
    }

    /// The content of a range. What the node does not have of the last sector is zeroes.
    async fn load(&self, range: ByteRange) -> Result<Buffer, Errno> {
        let buffer = Buffer::zeroed(range.length as usize);
        let within = self.within(range);
        if within.length > 0 {
            let part = buffer.slice(0..within.length as usize);
            self.handle.read(within.offset, part).await?;
        }
        Ok(buffer)
    }
}
