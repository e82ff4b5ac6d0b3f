//! What one message may cost its receiver.

/// The longest string of the protocol (export names, descriptions, metadata contexts), in bytes.
pub const MAX_STRING: usize = 4096;

/// The most data that one request may carry or ask for. The specification asks for requests that are no longer unless the sides
/// agreed on something else.
pub const MAX_PAYLOAD: u32 = 32 << 20;

/// The longest data of an option. A client that sends more is not answered but thrown out; no option with names within
/// [`MAX_STRING`] needs nearly as much.
pub const MAX_OPTION: u32 = 32 << 20;

/// The longest data of an option that is decoded: what is longer is skipped and refused.
pub const MAX_DECODED_OPTION: u32 = 64 << 10;

/// The longest reply to an option that is decoded.
pub const MAX_OPTION_REPLY: u32 = 64 << 10;

/// The most metadata contexts in one query.
pub const MAX_META_QUERIES: usize = 1024;

/// The longest structured chunk: a payload and what describes it.
pub const MAX_CHUNK: u32 = MAX_PAYLOAD + 64;
