//! Protocol drivers: the leaves of the graph, which hold bytes somewhere.
//!
//! Each driver is a module with one [`DriverEntry`]; [`DRIVERS`] is the table that the engine's
//! catalogue takes. Must not know: formats, other protocols, who reads and writes.

pub mod file;
pub mod http;
pub mod nbd;
pub mod null;
mod per_thread;
pub mod vvfat;

use block::DriverEntry;

/// The drivers of this crate.
pub static DRIVERS: &[DriverEntry] = &[
    file::ENTRY,
    file::DEVICE_ENTRY,
    file::CDROM_ENTRY,
    http::ENTRY,
    http::SECURE_ENTRY,
    nbd::ENTRY,
    null::ENTRY,
    null::AIO_ENTRY,
    vvfat::ENTRY,
];
