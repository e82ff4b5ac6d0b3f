//! What the fuzz targets run, as plain functions: a byte string is an image and a script of
//! requests, and no byte string may make a driver panic, hang or use memory beyond its limits.
//!
//! ```text
//!   input = script (header, steps) ++ image file
//!     │ open in memory ─► steps: read, write, zero, discard ... ─► close ─► check ─► open again
//!     └─ an image that was sound stays sound, and reads back what was written
//! ```
//!
//! `fuzz_targets/` holds the entry points in cargo-fuzz's layout, `seeds` makes the corpus to start
//! from, `regressions/` keeps what fuzzing found. The tests of this crate run all of them once.

mod disk;
pub mod memory_file;
pub mod model;
pub mod qcow2;
pub mod script;
pub mod seeds;
pub mod target;
