//! Nodes offered over NBD.
//!
//! ```text
//!   control thread:   NbdServer ── accept ──► handshake ── which NbdExport
//!                                                  │ the connection moves
//!   a thread of the export:                  session ── RootHandle
//!                                              │ a task for each request
//! ```
//!
//! Promises: a client costs bounded memory, whatever it sends; requests of one client run beside each other; requests are checked
//! against the export before the node sees them; what a client does wrong ends in an error for that client.
//!
//! Must not know: where listeners come from, QMP.

mod budget;
mod export;
mod handshake;
mod read;
mod server;
mod session;
mod status;

pub use export::{NbdExport, NbdExportOptions, find_bitmap};
pub use server::{NbdServer, NbdServerOptions, Report};

#[cfg(test)]
mod tests;
