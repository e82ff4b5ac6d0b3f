//! The first bytes of a connection, and the replies that are older than options.
//!
//! ```text
//!   server                                           client
//!   NBDMAGIC IHAVEOPT flags:16        ──────►
//!                                     ◄──────        flags:32
//!   (oldstyle) NBDMAGIC cliserv size:64 flags:32 zeroes:124 ──────►  transmission at once
//! ```

use crate::bytes::{Fields, Reader};
use crate::error::ProtocolError;
use crate::flags::ExportFlags;

const NBD_MAGIC: u64 = 0x4e42_444d_4147_4943;
pub(crate) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;

const FIXED_NEWSTYLE: u32 = 1 << 0;
const NO_ZEROES: u32 = 1 << 1;

/// How a server starts the conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Greeting {
    /// Options are negotiated.
    Newstyle {
        /// The server answers options that it does not know ("fixed").
        fixed: bool,
        /// The server can leave out the padding of [`ExportNameReply`].
        no_zeroes: bool,
    },
    /// The server has one export and says so at once; the rest of it ([`OldstyleExport::SIZE`] bytes) follows.
    Oldstyle,
}

impl Greeting {
    /// Bytes that tell the two apart: both magic numbers.
    pub const MAGIC_SIZE: usize = 16;
    /// Bytes behind the magic numbers of a newstyle server: its flags.
    pub const FLAGS_SIZE: usize = 2;

    /// What this server's side says: fixed newstyle, without padding.
    pub fn encode() -> [u8; 18] {
        Fields::new()
            .u64(NBD_MAGIC)
            .u64(OPTION_MAGIC)
            .u16((FIXED_NEWSTYLE | NO_ZEROES) as u16)
            .finish()
    }

    /// Whether the server negotiates options; if so its flags follow.
    pub fn decode_magic(bytes: &[u8; Self::MAGIC_SIZE]) -> Result<bool, ProtocolError> {
        let mut reader = Reader::new(bytes, "the server's greeting");
        reader.magic(NBD_MAGIC)?;
        match reader.u64()? {
            OLDSTYLE_MAGIC => Ok(false),
            found => reader.check_magic(found, OPTION_MAGIC).map(|()| true),
        }
    }

    /// The flags of a newstyle server.
    pub fn decode_flags(bytes: [u8; Self::FLAGS_SIZE]) -> Self {
        let flags = u32::from(u16::from_be_bytes(bytes));
        Self::Newstyle {
            fixed: flags & FIXED_NEWSTYLE != 0,
            no_zeroes: flags & NO_ZEROES != 0,
        }
    }
}

/// What the client answers to a newstyle greeting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClientFlags {
    /// The client knows that unknown options are answered.
    pub fixed: bool,
    /// The padding of [`ExportNameReply`] is left out.
    pub no_zeroes: bool,
}

impl ClientFlags {
    /// Bytes on the wire.
    pub const SIZE: usize = 4;

    /// The wire form.
    pub fn encode(self) -> [u8; Self::SIZE] {
        let fixed = if self.fixed { FIXED_NEWSTYLE } else { 0 };
        let no_zeroes = if self.no_zeroes { NO_ZEROES } else { 0 };
        (fixed | no_zeroes).to_be_bytes()
    }

    /// Refuses flags that no server offers.
    pub fn decode(bytes: [u8; Self::SIZE]) -> Result<Self, ProtocolError> {
        let flags = u32::from_be_bytes(bytes);
        if flags & !(FIXED_NEWSTYLE | NO_ZEROES) != 0 {
            return Err(ProtocolError::BadValue {
                what: "the client's flags",
                value: u64::from(flags),
            });
        }
        Ok(Self {
            fixed: flags & FIXED_NEWSTYLE != 0,
            no_zeroes: flags & NO_ZEROES != 0,
        })
    }
}

/// The answer to [`ClientOption::ExportName`](crate::ClientOption::ExportName), which has no other form of reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExportNameReply {
    /// The size of the export in bytes.
    pub size: u64,
    /// What it can do.
    pub flags: ExportFlags,
}

impl ExportNameReply {
    /// Bytes on the wire, padding left out.
    pub const SIZE: usize = 10;
    /// Bytes of padding, unless both sides said that there is none.
    pub const PADDING: usize = 124;

    /// The wire form without padding.
    pub fn encode(self) -> [u8; Self::SIZE] {
        Fields::new().u64(self.size).u16(self.flags.bits()).finish()
    }

    /// Decodes the part before the padding.
    pub fn decode(bytes: &[u8; Self::SIZE]) -> Result<Self, ProtocolError> {
        let mut reader = Reader::new(bytes, "the reply to an export name");
        Ok(Self {
            size: reader.u64()?,
            flags: ExportFlags::from_bits(reader.u16()?),
        })
    }
}

/// What follows the magic numbers of an oldstyle server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OldstyleExport {
    /// The size of the export in bytes.
    pub size: u64,
    /// What it can do.
    pub flags: ExportFlags,
}

impl OldstyleExport {
    /// Bytes on the wire, padding included.
    pub const SIZE: usize = 12 + 124;

    /// Decodes size, flags and padding; only the lower half of the flags is those of an export.
    pub fn decode(bytes: &[u8; Self::SIZE]) -> Result<Self, ProtocolError> {
        let mut reader = Reader::new(bytes, "the server's greeting");
        let size = reader.u64()?;
        let flags = reader.u32()?;
        Ok(Self {
            size,
            flags: ExportFlags::from_bits(flags as u16),
        })
    }
}
