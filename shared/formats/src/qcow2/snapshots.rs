//! Internal snapshots (QEMU docs/interop/qcow2.txt, "Snapshots").
//!
//! ```text
//!   ops.rs         list, create, apply, delete, open: what changes
//!   quiet.rs       no write is under way and none begins; reads go on
//!   transition.rs  the new state beside the old one, then one write of the header's first sector
//!   shadow.rs      refcount blocks of the new state
//!   this file      the snapshot table
//! ```
//!
//! Snapshots share clusters with the active disk. A shared cluster has a refcount above one and
//! no COPIED flag, so a write goes to a new cluster and the snapshot keeps the old one. Refcounts
//! and COPIED flags change together for every cluster of the disk; no order of writes in place
//! would be consistent in between. So the tables that change are written to new places, and the
//! header, which refers to all of them from one sector, is switched.

mod ops;
mod quiet;
mod shadow;
mod transition;

use super::header::{Header, MAX_SNAPSHOTS};
use super::read_bytes;
use super::tables::{HostOffset, MAX_HOST_OFFSET, MAX_L1_BYTES};
use block::{Edge, Errno, Error, ErrorKind, SnapshotInfo};
use std::sync::Arc;

/// Largest snapshot table in bytes.
const MAX_TABLE_BYTES: u64 = 64 << 20;
/// How much of the table is read at once, in bytes.
const READ_STEP: usize = 64 << 10;
/// Largest extra data of an entry in bytes.
const MAX_EXTRA: usize = 1024;
/// Length of the fixed part of an entry in bytes.
const FIXED: usize = 40;

/// Byte offsets of an entry's fields. All are big-endian.
mod field {
    /// u64: where the L1 table is
    pub(super) const L1_OFFSET: usize = 0;
    /// u32: its entries
    pub(super) const L1_ENTRIES: usize = 8;
    /// u16: bytes of the identifier
    pub(super) const ID_LENGTH: usize = 12;
    /// u16: bytes of the name
    pub(super) const NAME_LENGTH: usize = 14;
    /// u32
    pub(super) const DATE_SECONDS: usize = 16;
    /// u32
    pub(super) const DATE_NS: usize = 20;
    /// u64: the guest's clock in nanoseconds
    pub(super) const VM_CLOCK_NS: usize = 24;
    /// u32: bytes of machine state, unless the extra data tells
    pub(super) const VM_STATE_SIZE: usize = 32;
    /// u32: bytes of extra data
    pub(super) const EXTRA_LENGTH: usize = 36;
    /// In the extra data, u64: bytes of machine state
    pub(super) const EXTRA_VM_STATE_SIZE: usize = 0;
    /// In the extra data, u64: bytes of the disk
    pub(super) const EXTRA_DISK_SIZE: usize = 8;
    /// In the extra data, u64: instructions executed, all ones when unknown
    pub(super) const EXTRA_ICOUNT: usize = 16;
}

/// The snapshots of an image, as its table has them.
#[derive(Clone, Default)]
pub(super) struct SnapshotTable {
    pub(super) entries: Vec<SnapshotEntry>,
    pub(super) offset: HostOffset,
    /// Length of the table in bytes.
    pub(super) length: u64,
}

/// One entry of the table.
#[derive(Clone, Debug)]
pub(super) struct SnapshotEntry {
    pub(super) l1_offset: HostOffset,
    pub(super) l1_entries: u32,
    /// The fixed part as it was read.
    fixed: [u8; FIXED],
    extra: Vec<u8>,
    id: Vec<u8>,
    name: Vec<u8>,
    /// Shared with every open view of the snapshot.
    pub(super) shown: Arc<()>,
}

/// A text up to its first zero byte: QEMU's end there.
fn before_zero(bytes: &[u8]) -> &[u8] {
    bytes.split(|byte| *byte == 0).next().unwrap_or_default()
}

fn number(bytes: &[u8], at: usize, length: usize) -> u64 {
    let bytes = bytes.get(at..at + length).unwrap_or_default();
    bytes
        .iter()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

impl SnapshotEntry {
    /// A new entry, whose L1 table has no place yet.
    fn new(info: &SnapshotInfo) -> Self {
        let mut fixed = [0; FIXED];
        let mut put = |at: usize, bytes: &[u8]| fixed[at..at + bytes.len()].copy_from_slice(bytes);
        put(field::DATE_SECONDS, &info.date_seconds.to_be_bytes());
        put(field::DATE_NS, &info.date_ns.to_be_bytes());
        put(field::VM_CLOCK_NS, &info.vm_clock_ns.to_be_bytes());
        let words = [
            info.vm_state_size,
            info.disk_size,
            info.icount.unwrap_or(u64::MAX),
        ];
        Self {
            l1_offset: HostOffset(0),
            l1_entries: 0,
            fixed,
            extra: words.iter().flat_map(|word| word.to_be_bytes()).collect(),
            id: info.id.clone().into_bytes(),
            name: info.name.clone().into_bytes(),
            shown: Arc::default(),
        }
    }

    fn extra_word(&self, at: usize) -> Option<u64> {
        (self.extra.len() >= at + 8).then(|| number(&self.extra, at, 8))
    }

    /// Whether it is the one that [`SnapshotEntry::info`] calls `id`.
    pub(super) fn has_id(&self, id: &str) -> bool {
        before_zero(&self.id) == id.as_bytes()
    }

    /// What is known of it; `disk_size` in bytes where the entry does not tell.
    pub(super) fn info(&self, disk_size: u64) -> SnapshotInfo {
        let text = |bytes: &[u8]| String::from_utf8_lossy(before_zero(bytes)).into_owned();
        let short_state = number(&self.fixed, field::VM_STATE_SIZE, 4);
        SnapshotInfo {
            id: text(&self.id),
            name: text(&self.name),
            vm_state_size: self
                .extra_word(field::EXTRA_VM_STATE_SIZE)
                .unwrap_or(short_state),
            date_seconds: number(&self.fixed, field::DATE_SECONDS, 4) as u32,
            date_ns: number(&self.fixed, field::DATE_NS, 4) as u32,
            vm_clock_ns: number(&self.fixed, field::VM_CLOCK_NS, 8),
            icount: self
                .extra_word(field::EXTRA_ICOUNT)
                .filter(|count| *count != u64::MAX),
            disk_size: self.extra_word(field::EXTRA_DISK_SIZE).unwrap_or(disk_size),
        }
    }

    /// The entry with all that version 3 needs of it; `disk_size` in bytes where it does not tell.
    pub(super) fn completed(&self, disk_size: u64) -> Self {
        let mut entry = self.clone();
        let complete = Self::new(&self.info(disk_size)).extra;
        if let Some(missing) = complete.get(entry.extra.len()..) {
            entry.extra.extend_from_slice(missing);
        }
        entry
    }

    /// Whether version 3 needs more of it.
    pub(super) fn is_incomplete(&self) -> bool {
        self.extra.len() < field::EXTRA_ICOUNT
    }

    /// The value of an identifier that is a number.
    fn numeric_id(&self) -> u64 {
        let text = String::from_utf8_lossy(&self.id);
        text.parse().unwrap_or(0)
    }

    fn encode(&self) -> Vec<u8> {
        let mut bytes = self.fixed.to_vec();
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(field::L1_OFFSET, &self.l1_offset.0.to_be_bytes());
        put(field::L1_ENTRIES, &self.l1_entries.to_be_bytes());
        put(field::ID_LENGTH, &(self.id.len() as u16).to_be_bytes());
        put(field::NAME_LENGTH, &(self.name.len() as u16).to_be_bytes());
        put(
            field::EXTRA_LENGTH,
            &(self.extra.len() as u32).to_be_bytes(),
        );
        for part in [&self.extra, &self.id, &self.name] {
            bytes.extend_from_slice(part);
        }
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }
}

/// A part of a table. Entries are not read one by one: a buffer begins at a page, and what is kept of
/// each entry would lie between two of them and hold both pages.
struct Window<'f> {
    file: &'f Edge,
    start: u64,
    bytes: Vec<u8>,
}

impl Window<'_> {
    async fn read(&mut self, offset: u64, length: usize) -> Result<&[u8], Errno> {
        let within = offset
            .checked_sub(self.start)
            .and_then(|at| usize::try_from(at).ok());
        let there = within.filter(|at| self.bytes.len().saturating_sub(*at) >= length);
        let at = match there {
            Some(at) => at,
            None => {
                self.bytes = read_bytes(self.file, offset, length.max(READ_STEP)).await?;
                self.start = offset;
                0
            }
        };
        Ok(&self.bytes[at..at + length])
    }
}

/// What is said of a snapshot with more extra data than this driver takes.
pub(super) fn extra_error(index: u32) -> String {
    format!("Too much extra metadata in snapshot table entry {index}")
}

/// What helps then.
pub(super) const EXTRA_HINT: &str =
    "You can force-remove this extra metadata with qemu-img check -r all";

/// What helps when `count` snapshots are beyond the limits.
pub(super) fn overhanging_hint(count: u32) -> String {
    format!("You can force-remove all {count} overhanging snapshots with qemu-img check -r all")
}

impl SnapshotTable {
    /// Reads the table that `header` refers to.
    pub(super) async fn read(file: &Edge, header: &Header) -> Result<Self, Error> {
        let mut table = Self {
            offset: header.snapshots_offset,
            ..Self::default()
        };
        let failed = |errno| Error::io("Could not read snapshots", errno);
        let mut window = Window {
            file,
            start: 0,
            bytes: Vec::new(),
        };
        for index in 0..header.snapshots {
            let at = header.snapshots_offset.0 + table.length;
            let fixed = window.read(at, FIXED).await.map_err(failed)?;
            let fixed: [u8; FIXED] = fixed.try_into().expect("as long as was asked for");
            let length = |at, bytes| number(&fixed, at, bytes) as usize;
            let extra = length(field::EXTRA_LENGTH, 4);
            if extra > MAX_EXTRA {
                return Err(
                    Error::new(ErrorKind::Corrupt, extra_error(index)).with_hint(EXTRA_HINT)
                );
            }
            let (id, name) = (length(field::ID_LENGTH, 2), length(field::NAME_LENGTH, 2));
            let rest = window.read(at + FIXED as u64, extra + id + name);
            let rest = rest.await.map_err(failed)?;
            let l1_offset = number(&fixed, field::L1_OFFSET, 8);
            let l1_entries = number(&fixed, field::L1_ENTRIES, 4);
            let aligned = l1_offset & ((1 << header.cluster_bits) - 1) == 0;
            if !aligned || l1_offset >= MAX_HOST_OFFSET || l1_entries * 8 > MAX_L1_BYTES {
                let message = format!("Snapshot table entry {index} has an invalid L1 table");
                return Err(Error::new(ErrorKind::Corrupt, message));
            }
            table.entries.push(SnapshotEntry {
                l1_offset: HostOffset(l1_offset),
                l1_entries: l1_entries as u32,
                extra: rest[..extra].to_vec(),
                id: rest[extra..extra + id].to_vec(),
                name: rest[extra + id..].to_vec(),
                fixed,
                shown: Arc::default(),
            });
            table.length += ((FIXED + rest.len()) as u64).next_multiple_of(8);
            if table.length > MAX_TABLE_BYTES {
                let hint = overhanging_hint(header.snapshots - index);
                return Err(
                    Error::new(ErrorKind::Corrupt, "Snapshot table is too big").with_hint(hint)
                );
            }
        }
        Ok(table)
    }

    /// The bytes of the table.
    ///
    /// # Errors
    /// `Invalid` when the specification's caps are passed.
    fn encode(&self) -> Result<Vec<u8>, Error> {
        let bytes: Vec<u8> = self
            .entries
            .iter()
            .flat_map(SnapshotEntry::encode)
            .collect();
        if bytes.len() as u64 > MAX_TABLE_BYTES || self.entries.len() > MAX_SNAPSHOTS as usize {
            return Err(Error::new(ErrorKind::Invalid, "Snapshot table too large"));
        }
        Ok(bytes)
    }

    /// What `query-named-block-nodes` and `qemu-img info` tell.
    pub(super) fn describe(&self, disk_size: u64) -> Option<serde_json::Value> {
        let describe = |entry: &SnapshotEntry| {
            let info = entry.info(disk_size);
            let mut described = serde_json::json!({
                "vm-clock-nsec": info.vm_clock_ns % 1_000_000_000,
                "name": info.name,
                "date-sec": info.date_seconds,
                "date-nsec": info.date_ns,
                "vm-clock-sec": info.vm_clock_ns / 1_000_000_000,
                "id": info.id,
                "vm-state-size": info.vm_state_size,
            });
            if let Some(icount) = info.icount {
                described["icount"] = icount.into();
            }
            described
        };
        (!self.entries.is_empty()).then(|| self.entries.iter().map(describe).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_end_at_their_first_zero_byte() {
        let info = SnapshotInfo {
            id: "1\0x".into(),
            name: "\0\0".into(),
            vm_state_size: 0,
            date_seconds: 0,
            date_ns: 0,
            vm_clock_ns: 0,
            icount: None,
            disk_size: 0,
        };
        let entry = SnapshotEntry::new(&info);
        let shown = entry.info(0);
        assert_eq!((shown.id.as_str(), shown.name.as_str()), ("1", ""));
        assert!(entry.has_id("1") && !entry.has_id("1\0x"));
    }

    #[test]
    fn an_entry_keeps_what_it_does_not_know() {
        let info = SnapshotInfo {
            id: "7".into(),
            name: "name".into(),
            vm_state_size: 1 << 33,
            date_seconds: 5,
            date_ns: 6,
            vm_clock_ns: 7,
            icount: Some(8),
            disk_size: 1 << 40,
        };
        let mut entry = SnapshotEntry::new(&info);
        entry.extra.extend_from_slice(b"unknown.");
        assert_eq!(entry.info(0), info);
        let bytes = entry.encode();
        assert_eq!(bytes.len() % 8, 0);
        assert_eq!(number(&bytes, field::EXTRA_LENGTH, 4), 24 + 8);
        assert_eq!(&bytes[FIXED + 24..FIXED + 24 + 13], b"unknown.7name");
    }
}
