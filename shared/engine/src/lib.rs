//! The storage daemon without its process: nodes, exports, iothreads and the commands on them.
//!
//! ```text
//!   command line ──┐                 ┌── Graph (nodes)
//!   QMP monitors ──┴── Engine ───────┼── exports ── sockets, queue threads
//!                        │           └── iothreads
//!                        └── events ──> monitors
//! ```
//!
//! [`Engine`] lives on the control thread. Each QMP command is a line of [`commands::table`] and an
//! async function that takes [`qmp::Arguments`]; a command-line option runs the same function
//! with arguments spelled as strings. The catalogue of drivers is [`catalogue::drivers`].
//!
//! Promises: an error leaves nothing half made; errors have QEMU's classes and texts.
//!
//! Must not know: sockets of monitors, the command line, what a format or protocol does.

mod bitmaps;
mod block_stats;
pub mod catalogue;
mod chardevs;
pub mod commands;
mod engine;
mod error;
mod exports;
mod graph_query;
pub mod host;
pub mod jobs;
mod node_events;
mod nodes;
pub mod objects;
mod overlays;
mod qom;
mod schema;
mod snapshots;
mod transaction;

pub use block::graph::NamePolicy;
pub use engine::{Engine, EngineOptions};

#[cfg(test)]
mod tests;
