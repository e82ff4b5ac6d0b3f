//! COPIED flags: set exactly where the refcount is one, in the active L1 and L2 tables.

use super::super::tables::{COPIED, HostCluster, HostOffset, OFFSET_MASK};
use super::Check;
use super::l2::{Entry, Kind};
use super::layout::Extent;
use super::refcounts::BlockReader;
use block::{Errno, Repair};

impl Check<'_> {
    /// Checks the flags and corrects them: when all errors are to be repaired, or when nothing but
    /// leaks was wrong and they are gone, so that the refcounts are right.
    pub(super) async fn check_copied(&mut self) -> Result<(), Errno> {
        let result = &self.result;
        let sound = result.check_errors == 0 && result.corruptions == 0 && result.leaks == 0;
        let repair = match (self.repair, sound) {
            (Repair::Leaks, true) | (Repair::All, _) => Repair::All,
            _ => Repair::None,
        };
        self.io.begin_pass();
        let mut reader = BlockReader::default();
        self.check_l1(repair, &mut reader).await?;
        let tables = self.take_tables();
        let total = tables.len() as u64;
        for (done, table) in tables.iter().enumerate() {
            if table.active != 0 && table.offset.0 != 0 {
                let times = u64::from(table.active);
                let checked = self.check_l2((table.offset, times), repair, &mut reader);
                checked.await?;
            }
            self.report.sink.progress(done as u64, total);
        }
        self.put_tables(tables);
        if repair.errors() {
            self.io.flush().await?;
        }
        Ok(())
    }

    async fn check_l1(&mut self, repair: Repair, reader: &mut BlockReader) -> Result<(), Errno> {
        let read = self.io.words(self.layout.l1).await;
        let mut words = read.map_err(|errno| self.unreadable("the L1 table", errno))?;
        let mut fixes = Vec::new();
        for (index, entry) in words.iter_mut().enumerate() {
            let offset = *entry & OFFSET_MASK;
            if offset == 0 {
                continue;
            }
            let Ok(refcount) = self.refcount(self.layout.cluster(offset), reader).await else {
                continue;
            };
            if (refcount == 1) == (*entry & COPIED != 0) {
                continue;
            }
            self.report.say(format_args!(
                "{} OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={entry:x} \
                 refcount={refcount}",
                action(repair)
            ));
            if repair.errors() {
                *entry ^= COPIED;
                fixes.push(index);
            } else {
                self.result.corruptions += 1;
            }
        }
        if let (false, Some(what)) = (fixes.is_empty(), self.l1_overlap()) {
            self.report.say(format_args!(
                "ERROR: Could not write L1 table; metadata overlap check failed: it lies on {what}"
            ));
            self.result.corruptions += fixes.len() as u64;
            self.result.check_errors += 1;
            return Err(Errno::EIO);
        }
        for index in fixes {
            let at = self.layout.l1.offset.0 + index as u64 * 8;
            let written = self.io.write(at, &words[index].to_be_bytes()).await;
            self.copied_written(1, written)?;
        }
        Ok(())
    }

    /// What other metadata the active L1 table lies on.
    fn l1_overlap(&self) -> Option<&'static str> {
        let l1 = self.layout.l1;
        let first = self.layout.cluster(l1.offset.0).0;
        let last = self.layout.cluster(l1.offset.0 + l1.bytes.max(1) - 1).0;
        // The table itself is one reference, and nothing else may have any.
        let shared = |cluster| self.references.get(HostCluster(cluster)) > 1;
        (first..=last).any(shared).then_some("other data")
    }

    async fn check_l2(
        &mut self,
        (offset, times): (HostOffset, u64),
        repair: Repair,
        reader: &mut BlockReader,
    ) -> Result<(), Errno> {
        let bytes = self.layout.cluster_size();
        let read = self.io.read(offset.0, bytes).await;
        let mut table = read.map_err(|errno| self.unreadable("an L2 table", errno))?;
        let entries = Entry::of_table(&table, &self.layout);
        let mut fixed = 0;
        for (index, entry) in entries.into_iter().enumerate() {
            if entry.kind(&self.layout) != Kind::Allocated {
                continue;
            }
            let refcount = match self.layout.has_data_file() {
                true => Ok(1),
                false => {
                    let cluster = self.layout.cluster(entry.offset());
                    self.refcount(cluster, reader).await
                }
            };
            let Ok(refcount) = refcount else { continue };
            if (refcount == 1) == (entry.word & COPIED != 0) {
                continue;
            }
            self.report.say(format_args!(
                "{} OFLAG_COPIED data cluster: l2_entry={:x} refcount={refcount}",
                action(repair),
                entry.word
            ));
            if repair.errors() {
                let at = index * self.layout.l2_entry_bytes() as usize;
                table[at..at + 8].copy_from_slice(&(entry.word ^ COPIED).to_be_bytes());
                fixed += 1;
            } else {
                self.result.corruptions += times;
            }
        }
        if fixed == 0 {
            return Ok(());
        }
        if let Some(what) = self.overlap(Extent { offset, bytes }) {
            self.report.say(format_args!(
                "ERROR: Could not write L2 table; metadata overlap check failed: it lies on {what}"
            ));
            self.result.corruptions += fixed;
            self.result.check_errors += 1;
            return Err(Errno::EIO);
        }
        let written = self.io.write(offset.0, &table).await;
        self.copied_written(fixed, written)
    }

    fn copied_written(&mut self, fixed: u64, written: Result<(), Errno>) -> Result<(), Errno> {
        match written {
            Ok(()) => self.result.corruptions_fixed += fixed,
            Err(_) => {
                self.result.corruptions += fixed;
                self.result.check_errors += 1;
            }
        }
        written
    }
}

fn action(repair: Repair) -> &'static str {
    if repair.errors() {
        "Repairing"
    } else {
        "ERROR"
    }
}
