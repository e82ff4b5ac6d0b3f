//! Replies of the transmission phase.
//!
//! ```text
//!   simple:      0x67446698  error:32            cookie:64                          16 bytes [+ data of a read]
//!   structured:  0x668e33ef  flags:16  kind:16   cookie:64  length:32               20 bytes + payload
//!   extended:    0x6e8a278c  flags:16  kind:16   cookie:64  offset:64  length:64    32 bytes + payload
//! ```
//!
//! A structured reply is a series of chunks with one cookie, of which the last is flagged. A chunk's payload is decoded without its
//! data: of [`ChunkKind::OffsetData`] only the offset, so that the data can be received where it belongs.

use crate::bytes::{Fields, Reader};
use crate::error::{ProtocolError, WireErrno};
use crate::limits::MAX_CHUNK;
use crate::status::BlockStatus;

const SIMPLE_MAGIC: u32 = 0x6744_6698;
const STRUCTURED_MAGIC: u32 = 0x668e_33ef;
const EXTENDED_MAGIC: u32 = 0x6e8a_278c;
const FLAG_DONE: u16 = 1;
const ERROR_BIT: u16 = 1 << 15;

/// Which replies the sides agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplyStyle {
    /// Only simple ones.
    Simple,
    /// Chunks; reads are never answered by a simple reply, everything else may be.
    Structured,
    /// Chunks with extended headers, and nothing else.
    Extended,
}

impl ReplyStyle {
    /// Bytes of the shortest head: all of a simple reply, or the beginning of a chunk's.
    pub fn head_size(self) -> usize {
        match self {
            Self::Simple | Self::Structured => SimpleReply::SIZE,
            Self::Extended => ChunkHeader::EXTENDED_SIZE,
        }
    }
}

/// A reply without chunks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SimpleReply {
    /// Why the request failed; `None` when it did not. The data of a successful read follows.
    pub error: Option<WireErrno>,
    /// The request.
    pub cookie: u64,
}

impl SimpleReply {
    /// Bytes on the wire.
    pub const SIZE: usize = 16;

    /// The wire form.
    pub fn encode(self) -> [u8; Self::SIZE] {
        Fields::new()
            .u32(SIMPLE_MAGIC)
            .u32(WireErrno::encode(self.error))
            .u64(self.cookie)
            .finish()
    }
}

/// What a chunk holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChunkKind {
    /// Nothing.
    None,
    /// An offset and data.
    OffsetData,
    /// An offset and the length of zeroes.
    OffsetHole,
    /// Extents of one metadata context, with 32-bit lengths.
    BlockStatus,
    /// Extents of one metadata context, with 64-bit lengths.
    BlockStatusExtended,
    /// The request failed.
    Error,
    /// The request failed at an offset.
    ErrorOffset,
    /// One that this side does not know. Those with the highest bit are errors.
    Unknown(u16),
}

impl ChunkKind {
    const KNOWN: [(u16, Self); 7] = [
        (0, Self::None),
        (1, Self::OffsetData),
        (2, Self::OffsetHole),
        (5, Self::BlockStatus),
        (6, Self::BlockStatusExtended),
        (ERROR_BIT | 1, Self::Error),
        (ERROR_BIT | 2, Self::ErrorOffset),
    ];

    /// The kind of a wire value.
    pub fn from_wire(value: u16) -> Self {
        let known = Self::KNOWN.iter().find(|(number, _)| *number == value);
        known.map_or(Self::Unknown(value), |(_, kind)| *kind)
    }

    /// The wire value.
    pub fn to_wire(self) -> u16 {
        if let Self::Unknown(value) = self {
            return value;
        }
        let known = Self::KNOWN.iter().find(|(_, kind)| *kind == self);
        known.map_or(0, |(number, _)| *number)
    }

    /// Whether the request failed.
    pub fn is_error(self) -> bool {
        self.to_wire() & ERROR_BIT != 0
    }
}

/// The head of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkHeader {
    /// What it holds.
    pub kind: ChunkKind,
    /// It is the last one of its reply.
    pub done: bool,
    /// The request.
    pub cookie: u64,
    /// The request's offset; only on the wire of extended headers.
    pub offset: u64,
    /// Bytes of payload that follow.
    pub length: u64,
}

impl ChunkHeader {
    /// Bytes on the wire with 32-bit lengths.
    pub const STRUCTURED_SIZE: usize = 20;
    /// Bytes on the wire with 64-bit lengths.
    pub const EXTENDED_SIZE: usize = 32;

    /// Appends the wire form. With 32-bit lengths the sender keeps the payload within them.
    pub fn encode(&self, style: ReplyStyle, out: &mut Vec<u8>) {
        let flags = if self.done { FLAG_DONE } else { 0 };
        if style == ReplyStyle::Extended {
            let head = Fields::<{ Self::EXTENDED_SIZE }>::new()
                .u32(EXTENDED_MAGIC)
                .u16(flags)
                .u16(self.kind.to_wire())
                .u64(self.cookie)
                .u64(self.offset)
                .u64(self.length);
            out.extend_from_slice(&head.finish());
        } else {
            let head = Fields::<{ Self::STRUCTURED_SIZE }>::new()
                .u32(STRUCTURED_MAGIC)
                .u16(flags)
                .u16(self.kind.to_wire())
                .u64(self.cookie)
                .u32(self.length as u32);
            out.extend_from_slice(&head.finish());
        }
    }
}

/// The head of any reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplyHeader {
    /// A simple reply; complete, but for the data of a read.
    Simple(SimpleReply),
    /// A chunk; its payload follows.
    Chunk(ChunkHeader),
}

impl ReplyHeader {
    /// How long the whole head is, from its first four bytes; an error when `style` does not have such replies.
    pub fn size(style: ReplyStyle, magic: [u8; 4]) -> Result<usize, ProtocolError> {
        let found = u32::from_be_bytes(magic);
        match (style, found) {
            (ReplyStyle::Simple | ReplyStyle::Structured, SIMPLE_MAGIC) => Ok(SimpleReply::SIZE),
            (ReplyStyle::Structured, STRUCTURED_MAGIC) => Ok(ChunkHeader::STRUCTURED_SIZE),
            (ReplyStyle::Extended, EXTENDED_MAGIC) => Ok(ChunkHeader::EXTENDED_SIZE),
            _ => Err(ProtocolError::BadMagic {
                what: "a reply",
                found: u64::from(found),
            }),
        }
    }

    /// Decodes a head of [`ReplyHeader::size`] bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, ProtocolError> {
        let mut reader = Reader::new(bytes, "a reply");
        let magic = reader.u32()?;
        if magic == SIMPLE_MAGIC {
            let error = WireErrno::decode(reader.u32()?);
            let cookie = reader.u64()?;
            reader.end()?;
            return Ok(Self::Simple(SimpleReply { error, cookie }));
        }
        let flags = reader.u16()?;
        let kind = ChunkKind::from_wire(reader.u16()?);
        let cookie = reader.u64()?;
        let (offset, length) = match magic {
            STRUCTURED_MAGIC => (0, u64::from(reader.u32()?)),
            EXTENDED_MAGIC => (reader.u64()?, reader.u64()?),
            found => {
                return Err(ProtocolError::BadMagic {
                    what: "a reply",
                    found: u64::from(found),
                });
            }
        };
        reader.end()?;
        if length > u64::from(MAX_CHUNK) {
            return Err(ProtocolError::TooLarge {
                what: "a reply",
                length,
            });
        }
        Ok(Self::Chunk(ChunkHeader {
            kind,
            done: flags & FLAG_DONE != 0,
            cookie,
            offset,
            length,
        }))
    }
}

/// The payload of a chunk, without the data of a read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Chunk {
    /// Nothing.
    None,
    /// Data for this offset follows.
    OffsetData {
        /// The first byte.
        offset: u64,
    },
    /// Zeroes.
    OffsetHole {
        /// The first byte.
        offset: u64,
        /// How many.
        length: u32,
    },
    /// Extents of one metadata context.
    BlockStatus(BlockStatus),
    /// The request failed.
    Error {
        /// Why.
        error: WireErrno,
        /// The server's words for it; may be empty.
        message: String,
        /// Where, if the server knows.
        offset: Option<u64>,
    },
    /// A chunk that this side does not know, and that is no error.
    Unknown(u16),
}

impl Chunk {
    /// Bytes of a data chunk's payload before its data.
    pub const DATA_PREFIX: usize = 8;

    /// Kind and payload (for data: what comes before it).
    pub fn encode(&self, style: ReplyStyle) -> (ChunkKind, Vec<u8>) {
        match self {
            Self::None => (ChunkKind::None, Vec::new()),
            Self::OffsetData { offset } => (ChunkKind::OffsetData, offset.to_be_bytes().to_vec()),
            Self::OffsetHole { offset, length } => {
                let payload = Fields::<12>::new().u64(*offset).u32(*length).finish();
                (ChunkKind::OffsetHole, payload.to_vec())
            }
            Self::BlockStatus(status) if style == ReplyStyle::Extended => {
                (ChunkKind::BlockStatusExtended, status.encode_extended())
            }
            Self::BlockStatus(status) => (ChunkKind::BlockStatus, status.encode_compact()),
            Self::Error {
                error,
                message,
                offset,
            } => {
                let mut payload = (*error as u32).to_be_bytes().to_vec();
                payload.extend_from_slice(&(message.len() as u16).to_be_bytes());
                payload.extend_from_slice(message.as_bytes());
                match offset {
                    None => (ChunkKind::Error, payload),
                    Some(offset) => {
                        payload.extend_from_slice(&offset.to_be_bytes());
                        (ChunkKind::ErrorOffset, payload)
                    }
                }
            }
            Self::Unknown(kind) => (ChunkKind::Unknown(*kind), Vec::new()),
        }
    }

    /// How many bytes of the payload [`Chunk::decode`] takes: all, but for data.
    pub fn decoded_length(header: &ChunkHeader) -> usize {
        match header.kind {
            ChunkKind::OffsetData => Self::DATA_PREFIX.min(header.length as usize),
            _ => header.length as usize,
        }
    }

    /// Decodes the payload ([`Chunk::decoded_length`] bytes of it) that `header` announced.
    pub fn decode(header: &ChunkHeader, payload: &[u8]) -> Result<Self, ProtocolError> {
        let mut reader = Reader::new(payload, "the payload of a reply");
        let chunk = match header.kind {
            ChunkKind::None => Self::None,
            ChunkKind::OffsetData => Self::OffsetData {
                offset: reader.u64()?,
            },
            ChunkKind::OffsetHole => Self::OffsetHole {
                offset: reader.u64()?,
                length: reader.u32()?,
            },
            ChunkKind::BlockStatus => Self::BlockStatus(BlockStatus::decode_compact(&mut reader)?),
            ChunkKind::BlockStatusExtended => {
                Self::BlockStatus(BlockStatus::decode_extended(&mut reader)?)
            }
            kind if kind.is_error() => return decode_error(reader, kind),
            kind => return Ok(Self::Unknown(kind.to_wire())),
        };
        reader.end()?;
        Ok(chunk)
    }
}

/// All error chunks begin with error and message; what an unknown one has behind them is skipped.
fn decode_error(mut reader: Reader<'_>, kind: ChunkKind) -> Result<Chunk, ProtocolError> {
    let value = reader.u32()?;
    let error = WireErrno::decode(value).ok_or(ProtocolError::BadValue {
        what: "the error of a reply",
        value: u64::from(value),
    })?;
    let length = usize::from(reader.u16()?);
    let message = Reader::new(reader.take(length)?, "the message of an error").rest_string()?;
    let offset = match kind {
        ChunkKind::ErrorOffset => Some(reader.u64()?),
        _ => None,
    };
    Ok(Chunk::Error {
        error,
        message,
        offset,
    })
}
