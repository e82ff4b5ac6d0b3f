//! Requests of the transmission phase.
//!
//! ```text
//!   compact:   0x25609513  flags:16  command:16  cookie:64  offset:64  length:32            28 bytes
//!   extended:  0x21e41c71  flags:16  command:16  cookie:64  offset:64  length:64            32 bytes
//! ```

use crate::bytes::{Fields, Reader};
use crate::error::ProtocolError;
use crate::flags::CommandFlags;

const COMPACT_MAGIC: u32 = 0x2560_9513;
const EXTENDED_MAGIC: u32 = 0x21e4_1c71;

/// What a request does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names of the specification")]
pub enum Command {
    Read,
    Write,
    Disconnect,
    Flush,
    Trim,
    Cache,
    WriteZeroes,
    BlockStatus,
    /// One that this side does not know.
    Unknown(u16),
}

impl Command {
    const KNOWN: [(Self, &'static str); 8] = [
        (Self::Read, "read"),
        (Self::Write, "write"),
        (Self::Disconnect, "disconnect"),
        (Self::Flush, "flush"),
        (Self::Trim, "trim"),
        (Self::Cache, "cache"),
        (Self::WriteZeroes, "write zeroes"),
        (Self::BlockStatus, "block status"),
    ];

    /// The command of a wire value.
    pub fn from_wire(value: u16) -> Self {
        let known = Self::KNOWN.get(usize::from(value));
        known.map_or(Self::Unknown(value), |(command, _)| *command)
    }

    /// The wire value.
    pub fn to_wire(self) -> u16 {
        match self {
            Self::Read => 0,
            Self::Write => 1,
            Self::Disconnect => 2,
            Self::Flush => 3,
            Self::Trim => 4,
            Self::Cache => 5,
            Self::WriteZeroes => 6,
            Self::BlockStatus => 7,
            Self::Unknown(value) => value,
        }
    }

    /// The name that messages use.
    pub fn name(self) -> &'static str {
        let known = Self::KNOWN.get(usize::from(self.to_wire()));
        known.map_or("<unknown>", |(_, name)| name)
    }
}

/// Which headers the sides agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeaderStyle {
    /// 32-bit lengths.
    Compact,
    /// 64-bit lengths.
    Extended,
}

impl HeaderStyle {
    /// Bytes of a request's head.
    pub fn request_size(self) -> usize {
        match self {
            Self::Compact => 28,
            Self::Extended => 32,
        }
    }
}

/// The head of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// Modifiers.
    pub flags: CommandFlags,
    /// What to do.
    pub command: Command,
    /// The client's name for the request, repeated in its replies.
    pub cookie: u64,
    /// The first byte.
    pub offset: u64,
    /// How many bytes; of the payload instead when [`CommandFlags::PAYLOAD_LEN`] says so.
    pub length: u64,
}

impl Request {
    /// The longest head.
    pub const MAX_SIZE: usize = 32;

    /// Appends the wire form. A compact head carries the lower 32 bits of the length; who sends it keeps within.
    pub fn encode(&self, style: HeaderStyle, out: &mut Vec<u8>) {
        match style {
            HeaderStyle::Compact => {
                let head = self.encode_common::<28>(COMPACT_MAGIC);
                out.extend_from_slice(&head.u32(self.length as u32).finish());
            }
            HeaderStyle::Extended => {
                let head = self.encode_common::<32>(EXTENDED_MAGIC);
                out.extend_from_slice(&head.u64(self.length).finish());
            }
        }
    }

    fn encode_common<const N: usize>(&self, magic: u32) -> Fields<N> {
        Fields::new()
            .u32(magic)
            .u16(self.flags.bits())
            .u16(self.command.to_wire())
            .u64(self.cookie)
            .u64(self.offset)
    }

    /// Decodes a head of [`HeaderStyle::request_size`] bytes. An error ends the connection: what follows cannot be found.
    pub fn decode(style: HeaderStyle, bytes: &[u8]) -> Result<Self, ProtocolError> {
        let mut reader = Reader::new(bytes, "a request");
        let magic = match style {
            HeaderStyle::Compact => COMPACT_MAGIC,
            HeaderStyle::Extended => EXTENDED_MAGIC,
        };
        let found = reader.u32()?;
        reader.check_magic(u64::from(found), u64::from(magic))?;
        let request = Self {
            flags: CommandFlags::from_bits(reader.u16()?),
            command: Command::from_wire(reader.u16()?),
            cookie: reader.u64()?,
            offset: reader.u64()?,
            length: match style {
                HeaderStyle::Compact => u64::from(reader.u32()?),
                HeaderStyle::Extended => reader.u64()?,
            },
        };
        reader.end()?;
        Ok(request)
    }

    /// Bytes of payload behind the head.
    pub fn payload_length(&self, style: HeaderStyle) -> u64 {
        let announced =
            style == HeaderStyle::Extended && self.flags.contains(CommandFlags::PAYLOAD_LEN);
        if announced || self.command == Command::Write {
            self.length
        } else {
            0
        }
    }
}
