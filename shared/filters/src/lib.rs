//! Filters: nodes that pass requests on and change something about them.
//!
//! Each is a module with one [`DriverEntry`]; [`DRIVERS`] is the table that the engine's catalogue
//! takes. [`filter`] has what those with one child share; `blkverify` and `quorum` have several. Must not know: formats, protocols, other filters.

pub mod blkdebug;
pub mod blklogwrites;
pub mod blkverify;
pub mod compress;
pub mod copy_on_read;
pub mod filter;
pub mod preallocate;
pub mod quorum;
pub mod throttle;
mod together;

use block::DriverEntry;

/// The drivers of this crate.
pub static DRIVERS: &[DriverEntry] = &[
    blkdebug::ENTRY,
    blklogwrites::ENTRY,
    blkverify::ENTRY,
    compress::ENTRY,
    copy_on_read::ENTRY,
    preallocate::ENTRY,
    quorum::ENTRY,
    throttle::ENTRY,
];
