//! The other side, for the tests of this crate and of devices: a front-end, and a driver for each layout of rings.
//!
//! Blocking and simple; whatever does not happen in time ends the test.

#![expect(missing_docs, reason = "the names of the specifications")]
#![expect(clippy::unwrap_used, reason = "a test ends where something fails")]

pub mod front_end;
pub mod packed_driver;
