//! What the fuzz targets run, as plain functions: a byte string is an image and a script of
//! requests, a frame and what is to be done with it, or a client's side of a conversation, and no byte
//! string may make a driver, a port or a server panic, hang or use memory beyond its limits.
//!
//! ```text
//! qcow2:
//!   input = script (header, steps) ++ image file
//!     │ open in memory ─► steps: read, write, zero, discard ... ─► close ─► check ─► open again
//!     └─ an image that was sound stays sound, and reads back what was written
//! bochs, cloop, dmg, parallels, qcow, qed, vdi, vhdx, vmdk, vpc:
//!   input = script ++ image file
//!     │ open in memory ─► steps ─► close
//! luks:
//!   input = choice ++ header
//!     │ describe ─► open with a password ─► erase a slot ─► read again
//!     └─ a volume that opens gives back what it encrypts
//! net_frame:
//!   input = offloads, rules, virtio-net header ++ frame
//!     │ guard ─► header check ─► finish for the receiver
//!     └─ what goes out needs no more than the receiver does
//! nbd_server:
//!   input = kind of export ++ all that a client sends
//!     │ a server on a disk in memory, a socket, a client that reads what comes
//!     └─ the server lets the client go, and ends
//! ```
//!
//! `fuzz_targets/` holds the entry points in cargo-fuzz's layout, `seeds` makes the corpus to start
//! from, `regressions/` keeps what fuzzing found. The tests of this crate run all of them once.

mod disk;
pub mod image;
pub mod luks;
pub mod luks_seeds;
pub mod memory_file;
pub mod model;
pub mod nbd;
pub mod nbd_seeds;
pub mod net_frame;
pub mod net_seeds;
mod processor_time;
pub mod qcow2;
pub mod script;
pub mod seeds;
pub mod target;
mod vhdx;
