//! Internal snapshots: the seam of the formats that keep several states of a disk in one image.
//!
//! ```text
//!   Driver::snapshots() ──► Snapshots: list · create · apply · delete · open (a read view)
//! ```
//!
//! Owns the trait, what is known of a snapshot, and how one is found by identifier or name.
//! Promises of an implementation: requests may run on every thread while any of these run; a
//! failure leaves the image as it was; a power cut leaves it as before or as after. Must not know:
//! how a format keeps its snapshots.

use crate::driver::{BoxFuture, Driver};
use crate::error::{Error, ErrorKind, Result};

/// One internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Unique in the image; a decimal number when this code chose it.
    pub id: String,
    /// The user's name; several snapshots of an image may share one.
    pub name: String,
    /// Bytes of saved machine state, 0 for a snapshot of the disk alone.
    pub vm_state_size: u64,
    /// When it was taken, in seconds since 1970.
    pub date_seconds: u32,
    /// The rest of the date in nanoseconds.
    pub date_ns: u32,
    /// The guest's clock in nanoseconds.
    pub vm_clock_ns: u64,
    /// Instructions executed by the guest, where they are counted.
    pub icount: Option<u64>,
    /// Length of the disk in bytes.
    pub disk_size: u64,
}

/// What a new snapshot is to be called, and when it is taken.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NewSnapshot {
    /// The user's name.
    pub name: String,
    /// In seconds since 1970.
    pub date_seconds: u32,
    /// The rest of the date in nanoseconds.
    pub date_ns: u32,
    /// The guest's clock in nanoseconds.
    pub vm_clock_ns: u64,
    /// Instructions executed by the guest, where they are counted.
    pub icount: Option<u64>,
}

impl NewSnapshot {
    /// A snapshot of this moment, to the microsecond.
    pub fn now(name: impl Into<String>) -> Self {
        let since = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap_or_default();
        Self {
            name: name.into(),
            date_seconds: since.as_secs() as u32,
            date_ns: since.subsec_micros() * 1000,
            ..Self::default()
        }
    }
}

/// Which snapshot is meant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Selector<'a> {
    /// Its identifier.
    pub id: Option<&'a str>,
    /// Its name.
    pub name: Option<&'a str>,
}

impl Selector<'_> {
    /// The first of `list` that has all that is asked for.
    pub fn find<'l>(&self, list: &'l [SnapshotInfo]) -> Option<&'l SnapshotInfo> {
        list.iter().find(|snapshot| {
            self.id.is_none_or(|id| id == snapshot.id)
                && self.name.is_none_or(|name| name == snapshot.name)
        })
    }
}

/// The first of `list` whose name is `text`, else the one whose identifier it is.
pub fn find_by_id_or_name<'l>(list: &'l [SnapshotInfo], text: &str) -> Option<&'l SnapshotInfo> {
    let by_name = list.iter().find(|snapshot| snapshot.name == text);
    by_name.or_else(|| list.iter().find(|snapshot| snapshot.id == text))
}

/// The snapshots of an open image. Called by the control thread; requests run meanwhile.
pub trait Snapshots {
    /// Whether this image can have snapshots at all; `Unsupported` with the reason when not.
    fn check(&self) -> Result<()>;
    /// All snapshots, oldest first.
    fn list(&self) -> Vec<SnapshotInfo>;
    /// Takes a snapshot of the disk as it is; every write completed before the call is in it.
    fn create(&self, new: NewSnapshot) -> BoxFuture<'_, Result<SnapshotInfo>>;
    /// Makes the disk what it was when snapshot `id` was taken, its length included; the caller
    /// then tells the node's users ([`crate::Node::apply_snapshot`] does both).
    fn apply<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<()>>;
    /// Deletes the snapshot `id`.
    fn delete<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<()>>;
    /// A read-only driver that shows the disk as it was when snapshot `id` was taken. The snapshot
    /// cannot be deleted while it lives.
    fn open<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<Box<dyn Driver>>>;
}

/// The error for a driver that keeps no snapshots.
pub fn not_supported(driver_name: &str) -> Error {
    let message = format!("Block format '{driver_name}' does not support internal snapshots");
    Error::new(ErrorKind::Unsupported, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(id: &str, name: &str) -> SnapshotInfo {
        SnapshotInfo {
            id: id.into(),
            name: name.into(),
            vm_state_size: 0,
            date_seconds: 0,
            date_ns: 0,
            vm_clock_ns: 0,
            icount: None,
            disk_size: 0,
        }
    }

    #[test]
    fn a_name_is_found_before_an_identifier() {
        let list = [snapshot("1", "2"), snapshot("2", "x")];
        assert_eq!(find_by_id_or_name(&list, "2").unwrap().id, "1");
        assert_eq!(find_by_id_or_name(&list, "1").unwrap().id, "1");
        assert_eq!(find_by_id_or_name(&list, "3"), None);
    }

    #[test]
    fn a_selector_wants_all_that_it_names() {
        let list = [snapshot("1", "a"), snapshot("2", "a")];
        let select = |id, name| Selector { id, name }.find(&list).map(|found| &found.id[..]);
        assert_eq!(select(None, Some("a")), Some("1"));
        assert_eq!(select(Some("2"), Some("a")), Some("2"));
        assert_eq!(select(Some("2"), Some("b")), None);
    }
}
