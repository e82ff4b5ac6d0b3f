//! What the offline tools share: command lines, images by name, messages, progress.
//!
//! ```text
//!   argv ──getopt──> options, operands ──> ImageSpec ──> Tool::open ──> Graph of the engine's drivers
//!                                                            │
//!            failure: "NAME: message" on stderr, exit code ──┘
//! ```
//!
//! Owns: what QEMU's tools have in common on the command line and in what they print. Must not know:
//! a subcommand, a format.

pub mod dump;
pub mod failure;
pub mod getopt;
pub mod helpers;
pub mod image;
pub mod json;
pub mod options;
pub mod output;
pub mod progress;
pub mod size;
pub mod start;
