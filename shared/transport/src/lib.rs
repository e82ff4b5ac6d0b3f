//! Connections of network protocols, whatever protects their bytes.
//!
//! ```text
//!   protocol ──► Connection ──► executor::net::Stream
//! ```
//!
//! Promises: one message is sent as a whole, whoever else sends meanwhile; receiving and sending go on beside each other; payloads of
//! plain connections are not copied.
//!
//! Must not know: what the bytes mean.

mod connection;

pub use connection::Connection;
