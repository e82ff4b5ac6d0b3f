//! What a server answers to an option.
//!
//! ```text
//!   magic:64  option:32  reply:32  length:32  data
//! ```

use crate::bytes::{Fields, Reader, put_counted_string};
use crate::error::ProtocolError;
use crate::flags::ExportFlags;
use crate::limits::MAX_OPTION_REPLY;
use crate::option::{InfoKind, OptionKind};

const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const ERROR_BIT: u32 = 1 << 31;

const ACK: u32 = 1;
const SERVER: u32 = 2;
const INFO: u32 = 3;
const META_CONTEXT: u32 = 4;

/// The head of a reply to an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionReplyHeader {
    /// The option that is answered.
    pub option: OptionKind,
    /// Bytes of data that follow.
    pub length: u32,
    reply: u32,
}

impl OptionReplyHeader {
    /// Bytes on the wire.
    pub const SIZE: usize = 20;

    /// Fails where the conversation cannot go on.
    pub fn decode(bytes: &[u8; Self::SIZE]) -> Result<Self, ProtocolError> {
        let mut reader = Reader::new(bytes, "the reply to an option");
        reader.magic(REPLY_MAGIC)?;
        let option = OptionKind::from_wire(reader.u32()?);
        let reply = reader.u32()?;
        let length = reader.u32()?;
        if length > MAX_OPTION_REPLY {
            return Err(ProtocolError::TooLarge {
                what: "the reply to an option",
                length: u64::from(length),
            });
        }
        Ok(Self {
            option,
            length,
            reply,
        })
    }
}

/// Sizes of requests that an export asks for, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSizes {
    /// Offsets and lengths are multiples of it.
    pub minimum: u32,
    /// Requests of multiples of it are served best.
    pub preferred: u32,
    /// The longest payload.
    pub maximum: u32,
}

/// One piece of information about an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExportInfo {
    /// Size and flags.
    Export {
        /// The size in bytes.
        size: u64,
        /// What it can do.
        flags: ExportFlags,
    },
    /// The canonical name.
    Name(String),
    /// A text for people.
    Description(String),
    /// Sizes of requests.
    BlockSize(BlockSizes),
    /// Something that this side does not know.
    Unknown(u16),
}

/// Why an option was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names of the specification")]
pub enum ReplyErrorKind {
    Unsupported,
    Policy,
    Invalid,
    Platform,
    TlsRequired,
    UnknownExport,
    Shutdown,
    BlockSizeRequired,
    TooBig,
    ExtendedHeadersRequired,
    /// One that this side does not know, with the error bit.
    Other(u32),
}

impl ReplyErrorKind {
    const KNOWN: [(u32, Self); 10] = [
        (1, Self::Unsupported),
        (2, Self::Policy),
        (3, Self::Invalid),
        (4, Self::Platform),
        (5, Self::TlsRequired),
        (6, Self::UnknownExport),
        (7, Self::Shutdown),
        (8, Self::BlockSizeRequired),
        (9, Self::TooBig),
        (10, Self::ExtendedHeadersRequired),
    ];

    fn from_wire(value: u32) -> Self {
        let number = value & !ERROR_BIT;
        let known = Self::KNOWN.iter().find(|(known, _)| *known == number);
        known.map_or(Self::Other(value), |(_, kind)| *kind)
    }

    /// The wire value.
    pub fn to_wire(self) -> u32 {
        if let Self::Other(value) = self {
            return value | ERROR_BIT;
        }
        let known = Self::KNOWN.iter().find(|(_, kind)| *kind == self);
        known.map_or(ERROR_BIT, |(number, _)| ERROR_BIT | number)
    }
}

impl ErrorReply {
    /// What a client tells its user, in QEMU's words.
    pub fn describe(&self, option: OptionKind) -> String {
        let which = format!("option {} ({})", option.to_wire(), option.name());
        match self.kind {
            ReplyErrorKind::Unsupported => format!("Server does not support {which}"),
            ReplyErrorKind::Policy => format!("Denied by server for {which}"),
            ReplyErrorKind::Invalid => format!("Invalid parameters for {which}"),
            ReplyErrorKind::Platform => format!("Server lacks support for {which}"),
            ReplyErrorKind::TlsRequired => format!("TLS negotiation required before {which}"),
            ReplyErrorKind::UnknownExport => "Requested export not available".to_owned(),
            ReplyErrorKind::Shutdown => format!("Server shutting down before {which}"),
            ReplyErrorKind::BlockSizeRequired => {
                format!("Server requires INFO_BLOCK_SIZE for {which}")
            }
            ReplyErrorKind::TooBig
            | ReplyErrorKind::ExtendedHeadersRequired
            | ReplyErrorKind::Other(_) => format!("Unknown error code when asking for {which}"),
        }
    }

    /// Lines that help: advice, and the server's own words.
    pub fn hint(&self) -> Option<String> {
        let advice = match self.kind {
            ReplyErrorKind::TlsRequired => Some("Did you forget a valid tls-creds?".to_owned()),
            _ => None,
        };
        let words =
            (!self.message.is_empty()).then(|| format!("server reported: {}", self.message));
        let lines: Vec<String> = advice.into_iter().chain(words).collect();
        (!lines.is_empty()).then(|| lines.join("\n"))
    }
}

/// A refusal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ErrorReply {
    /// Why.
    pub kind: ReplyErrorKind,
    /// The server's words for it; may be empty.
    pub message: String,
}

/// A reply to an option. An option may be answered by several, of which `Ack` or `Error` is the last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OptionReply {
    /// The option is done.
    Ack,
    /// One export, in answer to `LIST`.
    Server {
        /// Its name.
        name: String,
        /// A text for people; may be empty.
        description: String,
    },
    /// One piece of information, in answer to `INFO` and `GO`.
    Info(ExportInfo),
    /// One context, in answer to `LIST_META_CONTEXT` and `SET_META_CONTEXT`.
    MetaContext {
        /// The number that `BLOCK_STATUS` replies use.
        id: u32,
        /// Its name.
        name: String,
    },
    /// The option is refused.
    Error(ErrorReply),
    /// A reply that this side does not know; its data is dropped.
    Unknown(u32),
}

impl OptionReply {
    /// Head and data.
    pub fn encode(&self, option: OptionKind) -> Vec<u8> {
        let mut data = Vec::new();
        let reply = match self {
            Self::Ack => ACK,
            Self::Server { name, description } => {
                put_counted_string(&mut data, name);
                data.extend_from_slice(description.as_bytes());
                SERVER
            }
            Self::Info(info) => {
                encode_info(&mut data, info);
                INFO
            }
            Self::MetaContext { id, name } => {
                data.extend_from_slice(&id.to_be_bytes());
                data.extend_from_slice(name.as_bytes());
                META_CONTEXT
            }
            Self::Error(error) => {
                data.extend_from_slice(error.message.as_bytes());
                error.kind.to_wire()
            }
            Self::Unknown(reply) => *reply,
        };
        let mut out = Fields::<{ OptionReplyHeader::SIZE }>::new()
            .u64(REPLY_MAGIC)
            .u32(option.to_wire())
            .u32(reply)
            .u32(data.len() as u32)
            .finish()
            .to_vec();
        out.append(&mut data);
        out
    }

    /// Decodes the data that `header` announced.
    pub fn decode(header: &OptionReplyHeader, data: &[u8]) -> Result<Self, ProtocolError> {
        let mut reader = Reader::new(data, "the reply to an option");
        let reply = match header.reply {
            ACK => Self::Ack,
            SERVER => Self::Server {
                name: reader.counted_string()?,
                description: reader.rest_string()?,
            },
            INFO => return decode_info(reader).map(Self::Info),
            META_CONTEXT => Self::MetaContext {
                id: reader.u32()?,
                name: reader.rest_string()?,
            },
            error if error & ERROR_BIT != 0 => Self::Error(ErrorReply {
                kind: ReplyErrorKind::from_wire(error),
                message: reader.rest_string()?,
            }),
            other => return Ok(Self::Unknown(other)),
        };
        reader.end()?;
        Ok(reply)
    }
}

fn encode_info(data: &mut Vec<u8>, info: &ExportInfo) {
    let kind = match info {
        ExportInfo::Export { .. } => InfoKind::Export,
        ExportInfo::Name(_) => InfoKind::Name,
        ExportInfo::Description(_) => InfoKind::Description,
        ExportInfo::BlockSize(_) => InfoKind::BlockSize,
        ExportInfo::Unknown(kind) => InfoKind::Unknown(*kind),
    };
    data.extend_from_slice(&kind.to_wire().to_be_bytes());
    match info {
        ExportInfo::Export { size, flags } => {
            data.extend_from_slice(&size.to_be_bytes());
            data.extend_from_slice(&flags.bits().to_be_bytes());
        }
        ExportInfo::Name(text) | ExportInfo::Description(text) => {
            data.extend_from_slice(text.as_bytes());
        }
        ExportInfo::BlockSize(sizes) => {
            for size in [sizes.minimum, sizes.preferred, sizes.maximum] {
                data.extend_from_slice(&size.to_be_bytes());
            }
        }
        ExportInfo::Unknown(_) => {}
    }
}

fn decode_info(mut reader: Reader<'_>) -> Result<ExportInfo, ProtocolError> {
    let info = match InfoKind::from_wire(reader.u16()?) {
        InfoKind::Export => ExportInfo::Export {
            size: reader.u64()?,
            flags: ExportFlags::from_bits(reader.u16()?),
        },
        InfoKind::Name => ExportInfo::Name(reader.rest_string()?),
        InfoKind::Description => ExportInfo::Description(reader.rest_string()?),
        InfoKind::BlockSize => ExportInfo::BlockSize(BlockSizes {
            minimum: reader.u32()?,
            preferred: reader.u32()?,
            maximum: reader.u32()?,
        }),
        InfoKind::Unknown(kind) => return Ok(ExportInfo::Unknown(kind)),
    };
    reader.end()?;
    Ok(info)
}
