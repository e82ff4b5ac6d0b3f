//! Counting every reference: from the header to the refcount blocks.
//!
//! L1 tables are read first and only the offsets of the L2 tables are kept, sorted, with how often
//! each is referred to. Then each L2 table is read once, in the order of the file.

use super::super::tables::{HostOffset, OFFSET_MASK};
use super::layout::Extent;
use super::{Check, Refcounts};
use block::error::reason;
use block::{Errno, Repair};

/// Reserved bits of an L1 entry.
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;

/// Whose L1 table it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owner {
    Active,
    Snapshot,
}

/// An L2 table and how often L1 tables refer to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Table {
    pub(super) offset: HostOffset,
    /// By the active L1 table.
    pub(super) active: u32,
    /// By any.
    pub(super) total: u32,
}

/// All L2 tables, in the order of the file.
#[derive(Default)]
pub(super) struct Tables {
    sorted: Vec<Table>,
}

impl Tables {
    /// Adds the tables that one L1 table refers to.
    fn absorb(&mut self, mut offsets: Vec<u64>, owner: Owner) {
        offsets.sort_unstable();
        let mut known = std::mem::take(&mut self.sorted).into_iter().peekable();
        let mut merged: Vec<Table> = Vec::with_capacity(known.len());
        for group in offsets.chunk_by(|a, b| a == b) {
            let offset = HostOffset(group[0]);
            while let Some(table) = known.next_if(|table| table.offset < offset) {
                merged.push(table);
            }
            let mut table = known
                .next_if(|table| table.offset == offset)
                .unwrap_or(Table {
                    offset,
                    active: 0,
                    total: 0,
                });
            let times = group.len() as u32;
            table.total = table.total.saturating_add(times);
            if owner == Owner::Active {
                table.active += times;
            }
            merged.push(table);
        }
        merged.extend(known);
        self.sorted = merged;
    }

    /// Bytes that the list takes.
    pub(super) fn memory(&self) -> u64 {
        (self.sorted.capacity() * size_of::<Table>()) as u64
    }
}

impl Check<'_> {
    /// Counts all references. `repair` says whether bad L2 entries are repaired on the way.
    pub(super) async fn walk(&mut self, repair: Repair) -> Result<(), Errno> {
        self.walk_content(repair).await?;
        self.walk_refcount_table(repair).await
    }

    /// Counts all references but those of the refcount structure to itself.
    pub(super) async fn walk_content(&mut self, repair: Repair) -> Result<(), Errno> {
        let cluster_size = self.layout.cluster_size();
        self.io.begin_pass();
        self.tables = Tables::default();
        self.refcount_clusters.clear();
        let header = Extent {
            offset: HostOffset(0),
            bytes: cluster_size,
        };
        self.count(header, 1)?;
        self.walk_l1(self.layout.l1, Owner::Active).await?;
        self.walk_snapshots().await?;
        let tables = self.take_tables();
        let total = tables.len() as u64;
        for (done, table) in tables.iter().enumerate() {
            let place = Extent {
                offset: table.offset,
                bytes: cluster_size,
            };
            self.count(place, u64::from(table.total))?;
            self.walk_l2(*table, repair).await?;
            self.report.sink.progress(done as u64, total);
        }
        self.put_tables(tables);
        let mut counted = Vec::new();
        self.count_and_tell(self.snapshots.place, 1, |cluster| counted.push(cluster))?;
        self.snapshots.counted = counted;
        if let Some(luks) = self.layout.luks {
            self.count(luks, 1)?;
        }
        self.walk_bitmaps().await
    }

    /// The list of tables, to go through while the check does something else.
    pub(super) fn take_tables(&mut self) -> Vec<Table> {
        std::mem::take(&mut self.tables.sorted)
    }

    pub(super) fn put_tables(&mut self, tables: Vec<Table>) {
        self.tables.sorted = tables;
    }

    async fn walk_snapshots(&mut self) -> Result<(), Errno> {
        let entries = std::mem::take(&mut self.snapshots.entries);
        if self.layout.has_data_file() && !entries.is_empty() {
            self.report.say(format_args!(
                "ERROR {} snapshots in image with data file",
                entries.len()
            ));
            self.result.corruptions += 1;
        }
        let mut outcome = Ok(());
        for entry in &entries {
            if !self.layout.is_aligned(entry.l1.offset.0) {
                self.report.say(format_args!(
                    "ERROR snapshot {entry} l1_offset={:#x}: L1 table is not cluster aligned; \
                     snapshot table entry corrupted",
                    entry.l1.offset.0
                ));
                self.result.corruptions += 1;
            } else if entry.l1.bytes > super::super::tables::MAX_L1_BYTES {
                self.report.say(format_args!(
                    "ERROR snapshot {entry} l1_size={:#x}: L1 table is too large; snapshot table \
                     entry corrupted",
                    entry.l1.bytes / 8
                ));
                self.result.corruptions += 1;
            } else {
                outcome = self.walk_l1(entry.l1, Owner::Snapshot).await;
            }
            if outcome.is_err() {
                break;
            }
        }
        self.snapshots.entries = entries;
        outcome
    }

    async fn walk_l1(&mut self, place: Extent, owner: Owner) -> Result<(), Errno> {
        self.count(place, 1)?;
        self.check_memory(place.bytes.min(self.io.length()) * 2)?;
        let read = self.io.words(place).await;
        let words = read.map_err(|errno| self.unreadable("an L1 table", errno))?;
        let mut offsets = Vec::with_capacity(words.len());
        for entry in words.into_iter().filter(|&entry| entry != 0) {
            if entry & L1_RESERVED != 0 {
                self.report.say(format_args!(
                    "ERROR found L1 entry with reserved bits set: {entry:x}"
                ));
                self.result.corruptions += 1;
            }
            let offset = entry & OFFSET_MASK;
            if !self.layout.is_aligned(offset) {
                self.report.say(format_args!(
                    "ERROR l2_offset={offset:x}: Table is not cluster aligned; L1 entry corrupted"
                ));
                self.result.corruptions += 1;
            }
            offsets.push(offset);
        }
        self.tables.absorb(offsets, owner);
        self.check_memory(0)
    }

    /// A structure cannot be read: the check ends.
    pub(super) fn unreadable(&mut self, what: &str, errno: Errno) -> Errno {
        self.report.say(format_args!(
            "ERROR: I/O error while reading {what}: {}",
            reason(errno)
        ));
        self.result.check_errors += 1;
        errno
    }

    async fn walk_refcount_table(&mut self, repair: Repair) -> Result<(), Errno> {
        let place = self.layout.refcount_table;
        self.count_refcounts(place)?;
        for index in 0..self.refcount_table.len() {
            let entry = self.refcount_table[index];
            let offset = entry & super::super::tables::REFCOUNT_BLOCK_MASK;
            if entry != offset {
                self.report.say(format_args!(
                    "ERROR refcount table entry {index} has reserved bits set"
                ));
                self.break_refcounts();
            } else if !self.layout.is_aligned(offset) {
                self.report.say(format_args!(
                    "ERROR refcount block {index} is not cluster aligned; refcount table entry \
                     corrupted"
                ));
                self.break_refcounts();
            } else if self.layout.cluster(offset).0 >= self.references.clusters() {
                self.report.say(format_args!(
                    "{} refcount block {index} is outside image",
                    if repair.errors() {
                        "Repairing"
                    } else {
                        "ERROR"
                    }
                ));
                self.block_outside(HostOffset(offset), repair).await?;
            } else if offset != 0 {
                self.walk_refcount_block(index, HostOffset(offset))?;
            }
        }
        Ok(())
    }

    fn walk_refcount_block(&mut self, index: usize, offset: HostOffset) -> Result<(), Errno> {
        let bytes = self.layout.cluster_size();
        self.count_refcounts(Extent { offset, bytes })?;
        let count = self.references.get(self.layout.cluster(offset.0));
        if count != 1 {
            self.report.say(format_args!(
                "ERROR refcount block {index} refcount={count}"
            ));
            self.break_refcounts();
        }
        Ok(())
    }

    fn break_refcounts(&mut self) {
        self.result.corruptions += 1;
        self.refcounts = Refcounts::Broken;
    }

    /// A block of refcounts past the end of the file: a longer file gives it room, and zeroes.
    async fn block_outside(&mut self, offset: HostOffset, repair: Repair) -> Result<(), Errno> {
        if !repair.errors() {
            self.result.corruptions += 1;
            return Ok(());
        }
        let bytes = self.layout.cluster_size();
        match self.make_room(offset.0.saturating_add(bytes)).await {
            Ok(()) => {
                self.result.corruptions_fixed += 1;
                self.count_refcounts(Extent { offset, bytes })
            }
            Err(errno) => {
                self.report.say(format_args!(
                    "ERROR could not resize image: {}",
                    reason(errno)
                ));
                self.break_refcounts();
                Ok(())
            }
        }
    }

    /// Makes the file longer by no more than what is there already, or a little.
    async fn make_room(&mut self, length: u64) -> Result<(), Errno> {
        const LITTLE: u64 = 64 << 20;
        if length > self.io.length().saturating_mul(2).saturating_add(LITTLE) {
            return Err(Errno::EFBIG);
        }
        self.references.grow(self.layout.clusters(length))?;
        self.io.grow(length).await
    }

    /// Counts a part of the refcount structure, and notes its clusters.
    fn count_refcounts(&mut self, place: Extent) -> Result<(), Errno> {
        let beyond = place.offset.0.saturating_add(place.bytes)
            >= self.io.length().saturating_add(self.layout.cluster_size());
        self.count(place, 1)?;
        if place.bytes != 0 && !beyond {
            let first = self.layout.cluster(place.offset.0).0;
            let last = self.layout.cluster(place.offset.0 + place.bytes - 1).0;
            let clusters = (first..=last).map(super::HostCluster);
            self.refcount_clusters.extend(clusters);
        }
        Ok(())
    }
}
