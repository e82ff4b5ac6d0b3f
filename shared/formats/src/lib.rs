//! Image formats: they say where data is, and move none of it.
//!
//! Each format is a module with one [`DriverEntry`]; [`DRIVERS`] is the table that the engine's
//! catalogue takes; docs/adding-a-format.md shows how one comes about. Must not know: protocols, other formats, who reads and writes.

mod blocks;
pub mod bochs;
mod bytes;
mod chunks;
pub mod cloop;
mod codec;
pub mod dmg;
pub mod luks;
pub mod parallels;
pub mod qcow;
pub mod qcow2;
pub mod qed;
pub mod raw;
#[cfg(test)]
mod samples_on_disk;
mod two_level;
pub mod vdi;
pub mod vhdx;
pub mod vmdk;
pub mod vpc;

use block::DriverEntry;

/// The drivers of this crate.
pub static DRIVERS: &[DriverEntry] = &[
    bochs::ENTRY,
    cloop::ENTRY,
    dmg::ENTRY,
    luks::ENTRY,
    parallels::ENTRY,
    qcow::ENTRY,
    qcow2::ENTRY,
    qed::ENTRY,
    raw::ENTRY,
    vdi::ENTRY,
    vhdx::ENTRY,
    vmdk::ENTRY,
    vpc::ENTRY,
];
