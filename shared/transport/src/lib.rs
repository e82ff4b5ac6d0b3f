//! Connections of network protocols, whatever protects their bytes.
//!
//! ```text
//!   protocol ──► Connection ──┬───────────────────────────────────► executor::net::Stream
//!                             └─ Tls (records in memory) ─ bytes ──►
//! ```
//!
//! Promises: one message is sent as a whole, whoever else sends meanwhile; receiving and sending go on beside each other; payloads of
//! plain connections are not copied; a peer that fails verification is never talked to.
//!
//! OpenSSL speaks TLS: rustls has neither external pre-shared keys nor anonymous key exchange, which credentials can ask for. It sees
//! memory only; sockets are the executor's.
//!
//! Must not know: what the bytes mean.

mod authorization;
mod connection;
mod credentials;
pub mod names;
mod tls;

pub use authorization::{Access, Authorization, Rule, RuleFormat};
pub use connection::Connection;
pub use credentials::{CredentialKind, Credentials, CredentialsError, Endpoint, PeerCheck};
pub use tls::TlsError;
