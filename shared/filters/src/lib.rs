//! Filters: nodes that pass requests on and change something about them.
//!
//! Each is a module with one [`DriverEntry`]; [`DRIVERS`] is the table that the engine's catalogue
//! takes. Must not know: formats, protocols, other filters.

pub mod compress;

use block::DriverEntry;

/// The drivers of this crate.
pub static DRIVERS: &[DriverEntry] = &[compress::ENTRY];
