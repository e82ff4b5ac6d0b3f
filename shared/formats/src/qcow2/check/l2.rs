//! L2 entries: what they refer to, and which of them the specification does not allow ("Cluster
//! mapping", "Extended L2 Entries").

use super::super::tables::{COMPRESSED, COPIED, HostOffset, OFFSET_MASK, ZERO};
use super::Check;
use super::io::be_word;
use super::layout::{Extent, Layout};
use super::walk::Table;
use block::error::reason;
use block::{Errno, Repair};

/// Reserved bits of an entry that is not compressed.
const RESERVED: u64 = 0x3f00_0000_0000_01fe;
/// Subcluster bitmap: the half that says which are allocated.
const ALLOCATED: u64 = 0xffff_ffff;

/// An entry and, with extended L2 entries, its subcluster bitmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) word: u64,
    pub(super) bitmap: u64,
}

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Compressed,
    /// Has a host cluster: data, or zeroes with storage.
    Allocated,
    ZeroPlain,
    Unallocated,
}

impl Entry {
    /// The entries of a table's bytes.
    pub(super) fn of_table(bytes: &[u8], layout: &Layout) -> Vec<Self> {
        let entries = bytes.chunks_exact(layout.l2_entry_bytes() as usize);
        entries
            .map(|entry| Self {
                word: be_word(&entry[..8]),
                bitmap: if entry.len() > 8 {
                    be_word(&entry[8..])
                } else {
                    0
                },
            })
            .collect()
    }

    pub(super) fn offset(self) -> u64 {
        self.word & OFFSET_MASK
    }

    pub(super) fn kind(self, layout: &Layout) -> Kind {
        let zero = self.word & ZERO != 0 && !layout.has_subclusters();
        // In an external data file, offset 0 is like any other.
        let at_zero = layout.has_data_file() && self.word & COPIED != 0;
        if self.word & COMPRESSED != 0 {
            Kind::Compressed
        } else if self.offset() != 0 || at_zero && !zero {
            Kind::Allocated
        } else if zero {
            Kind::ZeroPlain
        } else {
            Kind::Unallocated
        }
    }

    /// Whether the guest's data is in the host cluster (not just storage kept for zeroes).
    fn contains_data(self, layout: &Layout) -> bool {
        match layout.has_subclusters() {
            true => self.bitmap & ALLOCATED != 0,
            false => self.word & ZERO == 0,
        }
    }
}

/// The bytes of a compressed cluster: from its offset to the end of its last sector.
fn compressed_extent(word: u64, layout: &Layout) -> Extent {
    let offset_bits = 62 - (layout.cluster_bits - 8);
    let offset = word & ((1 << offset_bits) - 1);
    let sectors_mask = (1 << (layout.cluster_bits - 8)) - 1;
    let sectors = (word >> offset_bits & sectors_mask) + 1;
    Extent {
        offset: HostOffset(offset),
        bytes: sectors * 512 - (offset & 511),
    }
}

/// A table being walked.
struct Walk {
    table: Table,
    repair: Repair,
    /// Where the next data cluster would be contiguous; 0 before the first.
    expected: u64,
    /// No more repairs in this table: it overlaps other metadata.
    stop: bool,
}

impl Check<'_> {
    /// Counts the references of an L2 table, as often as it is itself referred to.
    pub(super) async fn walk_l2(&mut self, table: Table, repair: Repair) -> Result<(), Errno> {
        let bytes = self.layout.cluster_size();
        let read = self.io.read(table.offset.0, bytes).await;
        let bytes = read.map_err(|errno| self.unreadable("an L2 table", errno))?;
        let mut walk = Walk {
            table,
            repair,
            expected: 0,
            stop: false,
        };
        let is_empty = |entry: &&Entry| entry.word != 0 || entry.bitmap != 0;
        let entries = Entry::of_table(&bytes, &self.layout);
        for (index, entry) in entries
            .iter()
            .enumerate()
            .filter(|(_, entry)| is_empty(entry))
        {
            self.walk_entry(index, *entry, &mut walk).await?;
            if walk.stop {
                break;
            }
        }
        Ok(())
    }

    async fn walk_entry(
        &mut self,
        index: usize,
        entry: Entry,
        walk: &mut Walk,
    ) -> Result<(), Errno> {
        let times = u64::from(walk.table.total);
        let kind = entry.kind(&self.layout);
        if kind != Kind::Compressed && entry.word & RESERVED != 0 {
            self.bad_entry(
                times,
                format_args!(
                    "ERROR found l2 entry with reserved bits set: {:x}",
                    entry.word
                ),
            );
        }
        match kind {
            Kind::Compressed => self.walk_compressed(index, entry, walk.table),
            Kind::Allocated => self.walk_allocated(index, entry, walk).await,
            Kind::ZeroPlain => Ok(()),
            Kind::Unallocated => {
                if entry.bitmap & ALLOCATED != 0 {
                    self.bad_entry(
                        times,
                        format_args!(
                            "ERROR: Unallocated cluster has non-zero subcluster allocation map"
                        ),
                    );
                }
                Ok(())
            }
        }
    }

    fn bad_entry(&mut self, times: u64, what: std::fmt::Arguments<'_>) {
        self.report.say(what);
        self.result.corruptions += times;
    }

    fn walk_compressed(&mut self, index: usize, entry: Entry, table: Table) -> Result<(), Errno> {
        let times = u64::from(table.total);
        let word = entry.word & !COPIED;
        if entry.word != word {
            self.bad_entry(
                times,
                format_args!(
                    "ERROR: coffset={:#x}: copied flag must never be set for compressed clusters",
                    compressed_extent(word, &self.layout).offset.0
                ),
            );
        }
        if self.layout.has_data_file() {
            self.bad_entry(
                times,
                format_args!("ERROR compressed cluster {index} with data file, entry={word:#x}"),
            );
            return Ok(());
        }
        if entry.bitmap != 0 {
            self.bad_entry(
                times,
                format_args!(
                    "ERROR compressed cluster {index} with non-zero subcluster allocation bitmap, \
                 entry={word:#x}"
                ),
            );
            return Ok(());
        }
        self.count(compressed_extent(word, &self.layout), times)?;
        let active = u64::from(table.active);
        self.result.allocated_clusters += active;
        self.result.compressed_clusters += active;
        // Each shares sectors with its neighbours, so none is read along with them.
        self.result.fragmented_clusters += active;
        Ok(())
    }

    async fn walk_allocated(
        &mut self,
        index: usize,
        entry: Entry,
        walk: &mut Walk,
    ) -> Result<(), Errno> {
        let times = u64::from(walk.table.total);
        let offset = entry.offset();
        if entry.bitmap >> 32 & entry.bitmap != 0 {
            // Which half is right cannot be told, and zeroes would lose the data for sure.
            self.bad_entry(
                times,
                format_args!(
                    "ERROR offset={offset:x}: Allocated cluster has corrupted subcluster \
                     allocation bitmap"
                ),
            );
        }
        if !self.layout.is_aligned(offset) {
            if entry.contains_data(&self.layout) {
                self.bad_entry(
                    times,
                    format_args!(
                        "ERROR offset={offset:x}: Data cluster is not properly aligned; L2 entry \
                         corrupted."
                    ),
                );
            } else {
                self.report.say(format_args!(
                    "{} offset={offset:x}: Preallocated cluster is not properly aligned; L2 \
                     entry corrupted.",
                    self.action()
                ));
                if self.drop_storage(index, walk).await? {
                    return Ok(());
                }
                self.result.corruptions += times;
            }
        }
        if walk.stop {
            return Ok(());
        }
        let active = u64::from(walk.table.active);
        self.result.allocated_clusters += active;
        if walk.expected != 0 && walk.expected != offset {
            self.result.fragmented_clusters += active;
        }
        let bytes = self.layout.cluster_size();
        walk.expected = offset + bytes;
        if self.layout.has_data_file() {
            return Ok(());
        }
        let offset = HostOffset(offset);
        self.count(Extent { offset, bytes }, times)
    }

    /// Takes the storage of a cluster without data away, when repairs are asked for and its table is where no other
    /// metadata is. True when it was done.
    async fn drop_storage(&mut self, index: usize, walk: &mut Walk) -> Result<bool, Errno> {
        if !walk.repair.errors() {
            return Ok(false);
        }
        let place = Extent {
            offset: walk.table.offset,
            bytes: self.layout.cluster_size(),
        };
        if let Some(what) = self.overlap(place) {
            self.report.say(format_args!(
                "ERROR: Overlap check failed: the L2 table at {:#x} lies on {what}",
                place.offset.0
            ));
            self.result.check_errors += 1;
            walk.stop = true;
            return Ok(false);
        }
        let entry_bytes = self.layout.l2_entry_bytes();
        let at = place.offset.0 + index as u64 * entry_bytes;
        // Of subclusters the bitmap tells: zeroes, and what shows the backing. None has data, or this would not be done.
        let word = match self.layout.has_subclusters() {
            true => 0,
            false => ZERO,
        };
        if let Err(errno) = self.io.write(at, &word.to_be_bytes()).await {
            self.report.say(format_args!(
                "ERROR: Failed to overwrite L2 table entry: {}",
                reason(errno)
            ));
            self.result.check_errors += 1;
            return Ok(false);
        }
        self.result.corruptions_fixed += 1;
        Ok(true)
    }

    /// What other metadata an L2 table lies on: structures of fixed place, refcount blocks.
    pub(super) fn overlap(&self, place: Extent) -> Option<&'static str> {
        let layout = &self.layout;
        let header = Extent {
            offset: HostOffset(0),
            bytes: layout.cluster_size(),
        };
        let fixed = [
            (header, "the header"),
            (layout.l1, "the active L1 table"),
            (layout.refcount_table, "the refcount table"),
            (self.snapshots.place, "the snapshot table"),
        ];
        let entries = self.snapshots.entries.iter();
        let snapshots = entries.map(|entry| (entry.l1, "a snapshot's L1 table"));
        let bitmaps = layout
            .bitmaps
            .map(|directory| (directory.place, "the bitmap directory"));
        let touches = |other: Extent| {
            let clusters = |extent: Extent| {
                let end = extent.offset.0.saturating_add(extent.bytes);
                (layout.cluster(extent.offset.0).0, layout.clusters(end))
            };
            let ((start, end), (other_start, other_end)) = (clusters(place), clusters(other));
            other.bytes != 0 && start < other_end && other_start < end
        };
        fixed
            .into_iter()
            .chain(snapshots)
            .chain(bitmaps)
            .find(|(other, _)| touches(*other))
            .map(|(_, what)| what)
            .or_else(|| {
                let bytes = layout.cluster_size();
                let mut blocks = self.refcount_table.iter();
                let is_block = |entry: &u64| {
                    let offset = HostOffset(entry & super::super::tables::REFCOUNT_BLOCK_MASK);
                    offset.0 != 0 && touches(Extent { offset, bytes })
                };
                blocks.any(is_block).then_some("a refcount block")
            })
    }
}
