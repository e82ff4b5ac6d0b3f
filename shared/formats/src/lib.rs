//! Image formats: they say where data is, and move none of it.
//!
//! Each format is a module with one [`DriverEntry`]; [`DRIVERS`] is the table that the engine's
//! catalogue takes. Must not know: protocols, other formats, who reads and writes.

pub mod luks;
pub mod qcow2;
pub mod raw;

use block::DriverEntry;

/// The drivers of this crate.
pub static DRIVERS: &[DriverEntry] = &[luks::ENTRY, qcow2::ENTRY, raw::ENTRY];
