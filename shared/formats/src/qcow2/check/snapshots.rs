//! The snapshot table as it is on disk, and a new one without what is beyond the caps ("Snapshot
//! table entry").
//!
//! ```text
//!    0 u64 L1 table offset   8 u32 L1 entries   12 u16 id length   14 u16 name length
//!   16 u32 seconds  20 u32 nanoseconds  24 u64 guest clock  32 u32 VM state bytes
//!   36 u32 extra data length   40 extra data: u64 VM state bytes, u64 disk size, u64 icount, ...
//!      id, name, padding to 8
//! ```

use super::super::header::{MAX_SNAPSHOTS, field};
use super::super::snapshots::{EXTRA_HINT, extra_error, overhanging_hint};
use super::super::tables::{HostCluster, HostOffset};
use super::Check;
use super::layout::{Extent, Raw};
use block::Errno;
use std::fmt;

/// Length of the fixed part of an entry.
const FIXED: usize = 40;
/// Extra data that version 3 requires.
const REQUIRED_EXTRA: u32 = 16;
/// Extra data that this driver knows.
const KNOWN_EXTRA: usize = 24;
/// Most extra data of an entry in bytes.
const MAX_EXTRA: u32 = 1024;
/// Most bytes of the whole table.
const MAX_TABLE_BYTES: u64 = 64 << 20;

/// Before what is said of a table that cannot be read.
const UNREAD: &str = "failed to read the snapshot table: ";

/// A snapshot, as far as a check is concerned.
#[derive(Clone, Debug)]
pub(super) struct SnapshotEntry {
    pub(super) l1: Extent,
    fixed: [u8; FIXED],
    extra: Vec<u8>,
    id: Vec<u8>,
    name: Vec<u8>,
}

/// The table.
#[derive(Default)]
pub(super) struct SnapshotList {
    pub(super) place: Extent,
    pub(super) entries: Vec<SnapshotEntry>,
    /// Clusters that were counted for the table: not those past the end of the file, nor those whose count is full.
    pub(super) counted: Vec<HostCluster>,
}

/// What is wrong with the table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct TableFindings {
    pub(super) corruptions: u64,
}

impl fmt::Display for SnapshotEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let id = String::from_utf8_lossy(&self.id);
        let name = String::from_utf8_lossy(&self.name);
        write!(f, "{} ({})", id.escape_debug(), name.escape_debug())
    }
}

impl SnapshotEntry {
    /// The entry's bytes, with the extra data that every reader knows.
    fn bytes(&self, size: u64) -> Vec<u8> {
        let vm_state = u64::from(Raw(&self.fixed).u32(32));
        let mut known = Vec::with_capacity(KNOWN_EXTRA);
        for value in [vm_state, size, u64::MAX] {
            known.extend(value.to_be_bytes());
        }
        let mut extra = self.extra.clone();
        let whole = extra.len().min(KNOWN_EXTRA) / 8 * 8;
        if extra.len() < KNOWN_EXTRA {
            extra.truncate(whole);
            extra.extend(&known[whole..]);
        }
        let mut fixed = self.fixed;
        fixed[36..].copy_from_slice(&(extra.len() as u32).to_be_bytes());
        let mut bytes = [&fixed, &extra[..], &self.id, &self.name].concat();
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }
}

impl Check<'_> {
    /// Reads the table. What is beyond the caps is an end of the check, unless it is repaired.
    pub(super) async fn read_snapshots(&mut self) -> Result<TableFindings, Errno> {
        let mut findings = TableFindings::default();
        let mut wanted = self.layout.snapshots;
        let offset = self.layout.snapshots_offset;
        self.snapshots = SnapshotList::default();
        self.snapshots.place.offset = offset;
        let errors = self.repair.errors();
        if wanted > MAX_SNAPSHOTS && errors {
            let more = wanted - MAX_SNAPSHOTS;
            self.report
                .say(format_args!("Discarding {more} overhanging snapshots"));
            findings.corruptions += u64::from(more);
            wanted = MAX_SNAPSHOTS;
        }
        let end = offset.0.checked_add(MAX_TABLE_BYTES);
        if wanted > MAX_SNAPSHOTS {
            let more = wanted - MAX_SNAPSHOTS;
            return Err(self.refuse_table(
                format_args!("snapshot table too large\n{}", overhanging_hint(more)),
                Errno::EFBIG,
            ));
        }
        if !self.layout.is_aligned(offset.0) || end.is_none_or(|end| end > i64::MAX as u64) {
            let what = format_args!("{UNREAD}Snapshot table offset invalid");
            return Err(self.refuse_table(what, Errno::EINVAL));
        }
        self.io.begin_pass();
        for number in 0..wanted {
            let entry = self.read_entry(number, &mut findings).await?;
            let length = FIXED as u64 + entry.1;
            let table_bytes = (self.snapshots.place.bytes + length).next_multiple_of(8);
            if table_bytes > MAX_TABLE_BYTES {
                let more = wanted - number;
                if !errors {
                    return Err(self.refuse_table(
                        format_args!(
                            "{UNREAD}Snapshot table is too big\n{}",
                            overhanging_hint(more)
                        ),
                        Errno::EFBIG,
                    ));
                }
                self.report.say(format_args!(
                    "Discarding {more} overhanging snapshots (snapshot table is too big)"
                ));
                findings.corruptions += u64::from(more);
                break;
            }
            self.snapshots.place.bytes = table_bytes;
            self.snapshots.entries.push(entry.0);
        }
        Ok(findings)
    }

    fn refuse_table(&mut self, what: fmt::Arguments<'_>, errno: Errno) -> Errno {
        self.report.fail(format_args!("ERROR {what}"));
        self.result.check_errors += 1;
        errno
    }

    /// An entry, and the length of what follows its fixed part.
    async fn read_entry(
        &mut self,
        number: u32,
        findings: &mut TableFindings,
    ) -> Result<(SnapshotEntry, u64), Errno> {
        let at = self.snapshots.place.offset.0 + self.snapshots.place.bytes;
        let fixed: [u8; FIXED] = self
            .io
            .read(at, FIXED as u64)
            .await?
            .try_into()
            .map_err(|_| Errno::EIO)?;
        let raw = Raw(&fixed);
        let extra_length = raw.u32(36);
        if extra_length > MAX_EXTRA {
            if !self.repair.errors() {
                let what = extra_error(number);
                return Err(
                    self.refuse_table(format_args!("{UNREAD}{what}\n{EXTRA_HINT}"), Errno::EFBIG)
                );
            }
            self.report.say(format_args!(
                "Discarding too much extra metadata in snapshot table entry {number} \
                 ({extra_length} > {MAX_EXTRA})"
            ));
            findings.corruptions += 1;
        }
        if self.layout.version >= 3 && extra_length < REQUIRED_EXTRA {
            self.report.say(format_args!(
                "{} snapshot table entry {number} is incomplete",
                self.action()
            ));
            findings.corruptions += 1;
        }
        let kept = match extra_length > MAX_EXTRA {
            true => KNOWN_EXTRA as u64,
            false => u64::from(extra_length),
        };
        let (id, name) = (u64::from(raw.u16(12)), u64::from(raw.u16(14)));
        let extra_end = at + FIXED as u64 + u64::from(extra_length);
        let entry = SnapshotEntry {
            l1: Extent {
                offset: HostOffset(raw.u64(0)),
                bytes: u64::from(raw.u32(8)) * 8,
            },
            extra: self.io.read(at + FIXED as u64, kept).await?,
            id: self.io.read(extra_end, id).await?,
            name: self.io.read(extra_end + id, name).await?,
            fixed,
        };
        Ok((entry, u64::from(extra_length) + id + name))
    }

    /// Writes the table anew when something in it was wrong: behind everything, counted before the
    /// header refers to it; then the old one is given back.
    pub(super) async fn repair_snapshots(&mut self, findings: TableFindings) -> Result<(), Errno> {
        if !self.repair.errors() || findings.corruptions == 0 {
            return Ok(());
        }
        let size = self.layout.size;
        let entries = self.snapshots.entries.iter();
        let table: Vec<u8> = entries.flat_map(|entry| entry.bytes(size)).collect();
        let clusters = self.layout.clusters(table.len() as u64);
        let before = self.result;
        let rebuilt = self.rebuild_and_recount(clusters).await?;
        self.result = before;
        let place = Extent {
            offset: HostOffset(rebuilt.reserved.0 << self.layout.cluster_bits),
            bytes: table.len() as u64,
        };
        self.switch_snapshots(place, &table).await?;
        self.result.corruptions -= findings.corruptions;
        self.result.corruptions_fixed += findings.corruptions;
        let end = rebuilt.end.0 << self.layout.cluster_bits;
        self.result.image_end_offset = Some(end);
        Ok(())
    }

    async fn switch_snapshots(&mut self, place: Extent, table: &[u8]) -> Result<(), Errno> {
        let count = self.snapshots.entries.len() as u32;
        let mut offset = place.offset;
        if count == 0 {
            offset = HostOffset(0);
        } else {
            self.io.write(place.offset.0, table).await?;
        }
        self.io.flush().await?;
        let fields = [&count.to_be_bytes()[..], &offset.0.to_be_bytes()].concat();
        self.io.write(field::SNAPSHOTS as u64, &fields).await?;
        self.io.flush().await?;
        self.layout.snapshots = count;
        self.layout.snapshots_offset = offset;
        self.snapshots.place = Extent { offset, ..place };
        let old = std::mem::take(&mut self.snapshots.counted);
        if !old.is_empty() {
            for cluster in old {
                self.references.remove(cluster);
            }
            let result = self.result;
            self.compare(block::Repair::Leaks).await?;
            self.result = result;
        }
        Ok(())
    }
}
