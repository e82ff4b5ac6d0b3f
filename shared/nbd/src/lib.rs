//! The NBD protocol's wire format, for servers and clients, without any I/O.
//!
//! ```text
//!   handshake:     Greeting ─► ClientFlags ─► (OptionHeader, ClientOption)* ─► (OptionReplyHeader, OptionReply)*
//!   transmission:  Request [+ payload] ─► SimpleReply | ChunkHeader (+ Chunk)*
//! ```
//!
//! Specification: `doc/proto.md` of NetworkBlockDevice/nbd. Each type has an `encode`, that appends to or returns bytes, and a
//! `decode`, that takes exactly the bytes that its header announced. Who moves the bytes reads a fixed head (`SIZE`), asks the
//! decoded head how much follows, and reads that.
//!
//! Every byte of a peer is hostile: each decoder checks lengths against [`limits`] before anything is reserved, and none panics.
//! Unknown options, commands, replies and information are values of their own, for their receiver to refuse or to skip.
//!
//! Must not know: sockets, exports, TLS.

mod bytes;
mod error;
mod flags;
mod greeting;
pub mod limits;
mod option;
mod option_reply;
mod reply;
mod request;
mod status;

pub use error::{ProtocolError, WireErrno};
pub use flags::{CommandFlags, ExportFlags};
pub use greeting::{ClientFlags, ExportNameReply, Greeting, OldstyleExport};
pub use option::{ClientOption, ExportQuery, InfoKind, MetaContextQuery, OptionHeader, OptionKind};
pub use option_reply::{
    BlockSizes, ErrorReply, ExportInfo, OptionReply, OptionReplyHeader, ReplyErrorKind,
};
pub use reply::{Chunk, ChunkHeader, ChunkKind, ReplyHeader, ReplyStyle, SimpleReply};
pub use request::{Command, HeaderStyle, Request};
pub use status::{
    BASE_ALLOCATION, BaseAllocation, BlockStatus, QEMU_ALLOCATION_DEPTH, QEMU_DIRTY_BITMAP_PREFIX,
    StatusExtent,
};
