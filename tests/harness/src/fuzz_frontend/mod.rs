//! A front-end that means harm: malformed messages and malformed rings, from a seed.
//!
//! It promises nothing about the outcome of an attack except that the daemon reacts within the
//! front-end's timeout: by an answer, an error status or a closed connection. Whether the daemon is
//! still well afterwards is for the caller to check.

mod chains;
mod messages;

pub use chains::{Attacked, RingAttack, attack_ring};
pub use messages::{attack_messages, truncated_messages};
