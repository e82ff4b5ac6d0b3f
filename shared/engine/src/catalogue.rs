//! The drivers that `--blockdev` knows: the tables of the protocol, format and filter crates, joined.

use block::DriverEntry;

/// Every driver table. A new driver is a line in its crate's table.
pub fn drivers() -> [&'static [DriverEntry]; 3] {
    [protocols::DRIVERS, formats::DRIVERS, filters::DRIVERS]
}

/// Whether the driver `name` amends images.
pub(crate) fn amends(name: &str) -> bool {
    let mut entries = drivers().into_iter().flatten();
    entries.any(|entry| entry.name == name && entry.amend.is_some())
}

/// Whether there is a driver called `name`.
pub(crate) fn knows(name: &str) -> bool {
    let mut entries = drivers().into_iter().flatten();
    entries.any(|entry| entry.name == name)
}
