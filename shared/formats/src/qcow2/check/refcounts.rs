//! The refcounts on disk, and their comparison with what was counted.

use super::super::refcount::{get_in_bytes, set_in_bytes};
use super::super::tables::{HostCluster, HostOffset, REFCOUNT_BLOCK_MASK};
use super::{Check, Refcounts};
use block::error::reason;
use block::{Errno, Repair};

/// One refcount block in memory, for look-ups that stay close together.
#[derive(Default)]
pub(super) struct BlockReader {
    held: Option<(u64, Block)>,
}

/// A refcount block.
enum Block {
    /// There is none: all refcounts are zero.
    Absent,
    /// Its offset makes no sense.
    Unaligned,
    Present(HostOffset, Vec<u8>),
}

/// The clusters that one refcount block covers.
struct Range {
    index: u64,
    first: u64,
    end: u64,
}

impl Check<'_> {
    /// Reads the refcount table.
    pub(super) async fn read_refcount_table(&mut self) -> Result<(), Errno> {
        let read = self.io.words(self.layout.refcount_table).await;
        let table = read.map_err(|errno| self.unreadable("the refcount table", errno))?;
        self.refcount_table = table;
        Ok(())
    }

    async fn read_block(&mut self, index: u64) -> Result<Block, Errno> {
        let entry = self.refcount_table.get(index as usize).copied();
        let offset = entry.unwrap_or(0) & REFCOUNT_BLOCK_MASK;
        if offset == 0 {
            return Ok(Block::Absent);
        }
        if !self.layout.is_aligned(offset) {
            return Ok(Block::Unaligned);
        }
        let bytes = self.layout.cluster_size();
        let read = self.io.read(offset, bytes).await?;
        Ok(Block::Present(HostOffset(offset), read))
    }

    /// The refcount of a cluster on disk; an error when it cannot be told.
    pub(super) async fn refcount(
        &mut self,
        cluster: HostCluster,
        reader: &mut BlockReader,
    ) -> Result<u64, Errno> {
        let bits = self.layout.refcount_block_bits();
        let index = cluster.0 >> bits;
        if reader.held.as_ref().is_none_or(|(held, _)| *held != index) {
            reader.held = Some((index, self.read_block(index).await?));
        }
        match &reader.held {
            Some((_, Block::Present(_, bytes))) => {
                let position = cluster.0 & ((1 << bits) - 1);
                Ok(get_in_bytes(bytes, self.layout.refcount_order, position))
            }
            Some((_, Block::Unaligned)) => Err(Errno::EIO),
            _ => Ok(0),
        }
    }

    /// Compares all refcounts with the references counted, correcting what `repair` says. Answers
    /// with the end of the last cluster that has either.
    pub(super) async fn compare(&mut self, repair: Repair) -> Result<HostCluster, Errno> {
        let bits = self.layout.refcount_block_bits();
        let clusters = self.references.clusters();
        // Where everything is empty the image still ends after its first cluster.
        let mut end = 1;
        let mut first = 0;
        let mut next = NextCluster::default();
        self.io.begin_pass();
        loop {
            // Of a sparse file, blocks that count nothing and that nothing needs may be millions.
            first = next.at_or_after(first, self);
            if first >= clusters {
                break;
            }
            let index = first >> bits;
            let range = Range {
                index,
                first,
                end: ((index + 1) << bits).min(clusters),
            };
            first = range.end;
            end = self.compare_block(&range, repair).await?.unwrap_or(end);
            self.report.sink.progress(range.end, clusters);
        }
        Ok(HostCluster(end))
    }

    async fn compare_block(&mut self, range: &Range, repair: Repair) -> Result<Option<u64>, Errno> {
        let mut block = match self.read_block(range.index).await {
            Ok(block) => block,
            Err(errno) => {
                self.cannot_tell(range, errno);
                return Ok(None);
            }
        };
        match &mut block {
            Block::Unaligned => {
                self.cannot_tell(range, Errno::EIO);
                Ok(None)
            }
            Block::Absent => Ok(self.compare_absent(range)),
            Block::Present(offset, bytes) => {
                let offset = *offset;
                let before = bytes.clone();
                let mut fixes = Fixes::default();
                let end = self.compare_present(range, bytes, (repair, &mut fixes));
                if let Some((start, bytes)) = changed(&before, bytes) {
                    let written = self.io.write(offset.0 + start as u64, bytes).await;
                    self.account(&fixes, written);
                }
                Ok(end)
            }
        }
    }

    fn cannot_tell(&mut self, range: &Range, errno: Errno) {
        for cluster in range.first..range.end {
            self.report.say(format_args!(
                "Can't get refcount for cluster {cluster}: {}",
                reason(errno)
            ));
        }
        self.result.check_errors += range.end - range.first;
    }

    fn compare_absent(&mut self, range: &Range) -> Option<u64> {
        let mut end = None;
        let mut at = self.references.next_used(HostCluster(range.first)).0;
        while at < range.end {
            let counted = self.references.get(HostCluster(at));
            if counted != 0 {
                end = Some(at + 1);
                self.mismatch("ERROR", at, (0, counted));
                self.result.corruptions += 1;
                self.refcounts = Refcounts::Broken;
            }
            at = self.references.next_used(HostCluster(at + 1)).0;
        }
        end
    }

    fn compare_present(
        &mut self,
        range: &Range,
        bytes: &mut [u8],
        (repair, fixes): (Repair, &mut Fixes),
    ) -> Option<u64> {
        let order = self.layout.refcount_order;
        let base = range.index << self.layout.refcount_block_bits();
        let mut end = None;
        for cluster in range.first..range.end {
            let refcount = get_in_bytes(bytes, order, cluster - base);
            let counted = self.references.get(HostCluster(cluster));
            if refcount != 0 || counted != 0 {
                end = Some(cluster + 1);
            }
            if refcount == counted {
                continue;
            }
            if refcount == 0 {
                self.refcounts = Refcounts::Broken;
            }
            let is_leak = refcount > counted;
            let is_fixed = match (refcount, is_leak) {
                (0, _) => false,
                (_, true) => repair.leaks(),
                (_, false) => repair.errors(),
            };
            let action = match (is_fixed, is_leak) {
                (true, _) => "Repairing",
                (false, true) => "Leaked",
                (false, false) => "ERROR",
            };
            self.mismatch(action, cluster, (refcount, counted));
            match (is_fixed, is_leak) {
                (true, true) => fixes.leaks += 1,
                (true, false) => fixes.corruptions += 1,
                (false, true) => self.result.leaks += 1,
                (false, false) => self.result.corruptions += 1,
            }
            if is_fixed {
                set_in_bytes(bytes, order, cluster - base, counted);
            }
        }
        end
    }

    fn mismatch(&mut self, action: &str, cluster: u64, (refcount, counted): (u64, u64)) {
        self.report.say(format_args!(
            "{action} cluster {cluster} refcount={refcount} reference={counted}"
        ));
    }

    /// Counts what one write of a refcount block has corrected, or not.
    fn account(&mut self, fixes: &Fixes, written: Result<(), Errno>) {
        match written {
            Ok(()) => {
                self.result.leaks_fixed += fixes.leaks;
                self.result.corruptions_fixed += fixes.corruptions;
            }
            Err(errno) => {
                self.report.say(format_args!(
                    "ERROR: Failed to write a refcount block: {}",
                    reason(errno)
                ));
                self.result.leaks += fixes.leaks;
                self.result.corruptions += fixes.corruptions;
                self.result.check_errors += 1;
            }
        }
    }
}

/// Finds clusters that have a refcount or a reference. Looks at every entry of the refcount table and
/// every page of references once, in the course of a pass.
#[derive(Default)]
struct NextCluster {
    /// The next cluster that may have references.
    used: u64,
    /// The next one that a refcount block covers.
    counted: u64,
}

impl NextCluster {
    fn at_or_after(&mut self, from: u64, check: &Check<'_>) -> u64 {
        if self.used <= from {
            self.used = check.references.next_used(HostCluster(from)).0;
        }
        if self.counted <= from {
            let bits = check.layout.refcount_block_bits();
            let index = from >> bits;
            let rest = check.refcount_table.iter().enumerate().skip(index as usize);
            let mut blocks = rest.filter(|(_, entry)| *entry & REFCOUNT_BLOCK_MASK != 0);
            let block = blocks.next().map(|(index, _)| (index as u64) << bits);
            self.counted = block.map_or(u64::MAX, |first| first.max(from));
        }
        self.used.min(self.counted)
    }
}

/// What a write of one refcount block corrects.
#[derive(Default)]
struct Fixes {
    leaks: u64,
    corruptions: u64,
}

/// The sectors of a block that changed, as one range.
fn changed<'b>(before: &[u8], after: &'b [u8]) -> Option<(usize, &'b [u8])> {
    const SECTOR: usize = super::super::SECTOR as usize;
    let differs = |index: &usize| {
        let sector = index * SECTOR..(index + 1) * SECTOR;
        before[sector.clone()] != after[sector]
    };
    let mut sectors = (0..after.len() / SECTOR).filter(differs);
    let first = sectors.next()?;
    let last = sectors.next_back().unwrap_or(first);
    let start = first * SECTOR;
    Some((start, &after[start..(last + 1) * SECTOR]))
}
