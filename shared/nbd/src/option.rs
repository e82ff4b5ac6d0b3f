//! What a client asks for during the handshake.
//!
//! ```text
//!   IHAVEOPT  option:32  length:32  data
//! ```

use crate::bytes::{Fields, Reader, put_counted_string};
use crate::error::ProtocolError;
use crate::greeting::OPTION_MAGIC;
use crate::limits::{MAX_META_QUERIES, MAX_OPTION};

/// The number of an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names of the specification")]
pub enum OptionKind {
    ExportName,
    Abort,
    List,
    StartTls,
    Info,
    Go,
    StructuredReply,
    ListMetaContext,
    SetMetaContext,
    ExtendedHeaders,
    /// One that this side does not know.
    Unknown(u32),
}

impl OptionKind {
    const KNOWN: [(u32, Self, &'static str); 10] = [
        (1, Self::ExportName, "export name"),
        (2, Self::Abort, "abort"),
        (3, Self::List, "list"),
        (5, Self::StartTls, "starttls"),
        (6, Self::Info, "info"),
        (7, Self::Go, "go"),
        (8, Self::StructuredReply, "structured reply"),
        (9, Self::ListMetaContext, "list meta context"),
        (10, Self::SetMetaContext, "set meta context"),
        (11, Self::ExtendedHeaders, "extended headers"),
    ];

    /// The kind of a wire value.
    pub fn from_wire(value: u32) -> Self {
        let known = Self::KNOWN.iter().find(|(number, ..)| *number == value);
        known.map_or(Self::Unknown(value), |(_, kind, _)| *kind)
    }

    /// The wire value.
    pub fn to_wire(self) -> u32 {
        if let Self::Unknown(value) = self {
            return value;
        }
        let known = Self::KNOWN.iter().find(|(_, kind, _)| *kind == self);
        known.map_or(0, |(number, ..)| *number)
    }

    /// The name that messages use, as QEMU's do.
    pub fn name(self) -> &'static str {
        let known = Self::KNOWN.iter().find(|(_, kind, _)| *kind == self);
        known.map_or("<unknown>", |(_, _, name)| name)
    }
}

/// The head of an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionHeader {
    /// Which option.
    pub kind: OptionKind,
    /// Bytes of data that follow.
    pub length: u32,
}

impl OptionHeader {
    /// Bytes on the wire.
    pub const SIZE: usize = 16;

    /// The wire form.
    pub fn encode(self) -> [u8; Self::SIZE] {
        Fields::new()
            .u64(OPTION_MAGIC)
            .u32(self.kind.to_wire())
            .u32(self.length)
            .finish()
    }

    /// Fails where the conversation cannot go on: a wrong magic number, or data that nobody would skip.
    pub fn decode(bytes: &[u8; Self::SIZE]) -> Result<Self, ProtocolError> {
        let mut reader = Reader::new(bytes, "an option");
        reader.magic(OPTION_MAGIC)?;
        let kind = OptionKind::from_wire(reader.u32()?);
        let length = reader.u32()?;
        if length > MAX_OPTION {
            return Err(ProtocolError::TooLarge {
                what: "an option",
                length: u64::from(length),
            });
        }
        Ok(Self { kind, length })
    }
}

/// A kind of information about an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InfoKind {
    /// Size and flags; always sent.
    Export,
    /// The canonical name.
    Name,
    /// A text for people.
    Description,
    /// Minimum, preferred and maximum size of requests.
    BlockSize,
    /// One that this side does not know.
    Unknown(u16),
}

impl InfoKind {
    /// The kind of a wire value.
    pub fn from_wire(value: u16) -> Self {
        match value {
            0 => Self::Export,
            1 => Self::Name,
            2 => Self::Description,
            3 => Self::BlockSize,
            other => Self::Unknown(other),
        }
    }

    /// The wire value.
    pub fn to_wire(self) -> u16 {
        match self {
            Self::Export => 0,
            Self::Name => 1,
            Self::Description => 2,
            Self::BlockSize => 3,
            Self::Unknown(other) => other,
        }
    }
}

/// The data of `INFO` and `GO`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportQuery {
    /// The export; empty for the default one.
    pub name: String,
    /// What the client wants to know besides size and flags.
    pub infos: Vec<InfoKind>,
}

/// The data of `LIST_META_CONTEXT` and `SET_META_CONTEXT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetaContextQuery {
    /// The export; empty for the default one.
    pub export: String,
    /// Names of contexts, or patterns for them.
    pub queries: Vec<String>,
}

/// An option with its data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClientOption {
    /// Starts transmission; only answered by size and flags, or the end of the connection.
    ExportName(String),
    /// The client leaves.
    Abort,
    /// Asks for the exports.
    List,
    /// Asks for TLS.
    StartTls,
    /// Asks about an export.
    Info(ExportQuery),
    /// Asks about an export and starts transmission.
    Go(ExportQuery),
    /// The client takes structured replies.
    StructuredReply,
    /// Asks for the contexts that there are.
    ListMetaContext(MetaContextQuery),
    /// Chooses contexts for `BLOCK_STATUS`.
    SetMetaContext(MetaContextQuery),
    /// Requests and replies have 64-bit lengths.
    ExtendedHeaders,
    /// One that this side does not know; its data is dropped.
    Unknown(u32),
}

impl ClientOption {
    /// Which option it is.
    pub fn kind(&self) -> OptionKind {
        match self {
            Self::ExportName(_) => OptionKind::ExportName,
            Self::Abort => OptionKind::Abort,
            Self::List => OptionKind::List,
            Self::StartTls => OptionKind::StartTls,
            Self::Info(_) => OptionKind::Info,
            Self::Go(_) => OptionKind::Go,
            Self::StructuredReply => OptionKind::StructuredReply,
            Self::ListMetaContext(_) => OptionKind::ListMetaContext,
            Self::SetMetaContext(_) => OptionKind::SetMetaContext,
            Self::ExtendedHeaders => OptionKind::ExtendedHeaders,
            Self::Unknown(value) => OptionKind::Unknown(*value),
        }
    }

    /// Head and data.
    pub fn encode(&self) -> Vec<u8> {
        let mut data = Vec::new();
        match self {
            Self::ExportName(name) => data.extend_from_slice(name.as_bytes()),
            Self::Info(query) | Self::Go(query) => {
                put_counted_string(&mut data, &query.name);
                data.extend_from_slice(&(query.infos.len() as u16).to_be_bytes());
                for info in &query.infos {
                    data.extend_from_slice(&info.to_wire().to_be_bytes());
                }
            }
            Self::ListMetaContext(query) | Self::SetMetaContext(query) => {
                put_counted_string(&mut data, &query.export);
                data.extend_from_slice(&(query.queries.len() as u32).to_be_bytes());
                for name in &query.queries {
                    put_counted_string(&mut data, name);
                }
            }
            Self::Abort
            | Self::List
            | Self::StartTls
            | Self::StructuredReply
            | Self::ExtendedHeaders
            | Self::Unknown(_) => {}
        }
        let header = OptionHeader {
            kind: self.kind(),
            length: data.len() as u32,
        };
        let mut out = header.encode().to_vec();
        out.append(&mut data);
        out
    }

    /// Decodes the data that `kind` announced. An error is answered with `ERR_INVALID`; the conversation goes on.
    pub fn decode(kind: OptionKind, data: &[u8]) -> Result<Self, ProtocolError> {
        let mut reader = Reader::new(data, "the data of an option");
        let option = match kind {
            OptionKind::ExportName => Self::ExportName(reader.rest_string()?),
            OptionKind::Abort => return Ok(Self::Abort),
            OptionKind::List => Self::List,
            OptionKind::StartTls => Self::StartTls,
            OptionKind::Info => Self::Info(decode_export_query(&mut reader)?),
            OptionKind::Go => Self::Go(decode_export_query(&mut reader)?),
            OptionKind::StructuredReply => Self::StructuredReply,
            OptionKind::ListMetaContext => Self::ListMetaContext(decode_meta(&mut reader)?),
            OptionKind::SetMetaContext => Self::SetMetaContext(decode_meta(&mut reader)?),
            OptionKind::ExtendedHeaders => Self::ExtendedHeaders,
            OptionKind::Unknown(value) => return Ok(Self::Unknown(value)),
        };
        reader.end()?;
        Ok(option)
    }
}

fn decode_export_query(reader: &mut Reader<'_>) -> Result<ExportQuery, ProtocolError> {
    let name = reader.counted_string()?;
    let count = reader.u16()?;
    let mut infos = Vec::new();
    for _ in 0..count {
        infos.push(InfoKind::from_wire(reader.u16()?));
    }
    Ok(ExportQuery { name, infos })
}

fn decode_meta(reader: &mut Reader<'_>) -> Result<MetaContextQuery, ProtocolError> {
    let export = reader.counted_string()?;
    let count = reader.u32()? as usize;
    if count > MAX_META_QUERIES {
        return Err(ProtocolError::TooLarge {
            what: "a list of metadata contexts",
            length: count as u64,
        });
    }
    let mut queries = Vec::new();
    for _ in 0..count {
        queries.push(reader.counted_string()?);
    }
    Ok(MetaContextQuery { export, queries })
}
