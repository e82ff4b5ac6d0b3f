//! Filters: nodes that pass requests on and change something about them.
//!
//! Each is a module with one [`DriverEntry`]; [`DRIVERS`] is the table that the engine's catalogue
//! takes. [`filter`] has what they share. Must not know: formats, protocols, other filters.

pub mod compress;
pub mod copy_on_read;
pub mod filter;
pub mod throttle;

use block::DriverEntry;

/// The drivers of this crate.
pub static DRIVERS: &[DriverEntry] = &[compress::ENTRY, copy_on_read::ENTRY, throttle::ENTRY];
