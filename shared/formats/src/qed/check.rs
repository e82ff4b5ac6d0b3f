//! Is each cluster referred to once, and does each reference lead somewhere (QEMU
//! docs/interop/qed_spec.txt, "Consistency checking")? Counts and repairs what `qemu-img check` does.
//!
//! ```text
//!   L1 table ─► entries that cannot be ─► 0
//!      └─► L2 tables ─► entries that cannot be ─► 0
//!   clusters that nothing refers to: leaks; several times: errors that stay
//! ```
//!
//! A table that shares a cluster with another one is not looked into, so nothing is read twice. Reads
//! the file alone. Memory: a bit for each of its clusters, as [`CheckOptions::memory`] allows.

use super::QedEntries;
use super::header::{ENTRY_BYTES, Header};
use crate::bytes::{read_bytes, write_bytes};
use crate::two_level::{Entries, Entry};
use block::{CheckOptions, CheckResult, CheckSink, Edge, Errno, Error};

/// How much of a table is read at once, in bytes.
const READ_STEP: u64 = 1 << 20;

/// What a check found out.
pub(super) struct Checked {
    pub(super) result: CheckResult,
    /// Where the last cluster that is referred to ends, in bytes.
    pub(super) used_end: u64,
}

struct Check<'a> {
    file: &'a Edge,
    entries: &'a QedEntries,
    options: CheckOptions,
    end: u64,
    used: Vec<u64>,
    used_end: u64,
    result: CheckResult,
}

/// Checks the image in `file`, and repairs it as `options` say.
///
/// # Errors
/// `Io`: the check could not end.
pub(super) async fn check(
    file: &Edge,
    (header, entries): (&Header, &QedEntries),
    options: CheckOptions,
    sink: &mut dyn CheckSink,
) -> Result<Checked, Error> {
    let failed = |errno| Error::io("Check failed", errno);
    let end = file.node().length();
    let cluster_size = u64::from(header.cluster_size);
    let words = end.div_ceil(cluster_size).div_ceil(64);
    if words.saturating_mul(8) > options.memory {
        sink.error("the file has too many clusters for the memory of a check");
        return Err(failed(Errno::ENOMEM));
    }
    let mut check = Check {
        file,
        entries,
        options,
        end,
        used: vec![0; words as usize],
        used_end: header.header_end(),
        result: CheckResult {
            total_clusters: header.disk_bytes.div_ceil(cluster_size),
            ..CheckResult::default()
        },
    };
    check.run(header, sink).await.map_err(failed)?;
    Ok(Checked {
        result: check.result,
        used_end: check.used_end,
    })
}

impl Check<'_> {
    async fn run(&mut self, header: &Header, sink: &mut dyn CheckSink) -> Result<(), Errno> {
        let table_bytes = header.table_bytes();
        self.refer(header.l1_offset, header.table_size);
        let mut at = 0;
        while at < table_bytes {
            sink.progress(at, table_bytes);
            at += self.check_l1_step(header, at).await?;
        }
        let clusters = self.end.div_ceil(header.cluster_size.into());
        let of_header = u64::from(header.header_size).min(clusters);
        let used: u64 = self
            .used
            .iter()
            .map(|word| u64::from(word.count_ones()))
            .sum();
        self.result.leaks = (clusters - of_header).saturating_sub(used);
        if self.result.corruptions_fixed > 0 {
            self.file.node().flush().await?;
        }
        Ok(())
    }

    /// A part of the L1 table, with the L2 tables.
    async fn check_l1_step(&mut self, header: &Header, at: u64) -> Result<u64, Errno> {
        let step = READ_STEP.min(header.table_bytes() - at);
        let offset = header.l1_offset + at;
        let mut bytes = read_bytes(self.file, offset, step as usize).await?;
        let mut wrong = Vec::new();
        for (index, entry) in bytes.chunks_exact_mut(ENTRY_BYTES as usize).enumerate() {
            match self.entries.table(QedEntries::load(entry), self.end) {
                Ok(None) => {}
                Ok(Some(table)) => {
                    if self.refer(table, header.table_size) {
                        self.check_l2(header, table).await?;
                    }
                }
                Err(_) => {
                    entry.fill(0);
                    wrong.push(index);
                }
            }
        }
        self.repair((offset, &bytes), &wrong).await?;
        Ok(step)
    }

    async fn check_l2(&mut self, header: &Header, table: u64) -> Result<(), Errno> {
        let cluster_size = u64::from(header.cluster_size);
        let (mut at, mut last) = (0, 0);
        while at < header.table_bytes() {
            let step = READ_STEP.min(header.table_bytes() - at);
            let mut bytes = read_bytes(self.file, table + at, step as usize).await?;
            let mut wrong = Vec::new();
            for (index, entry) in bytes.chunks_exact_mut(ENTRY_BYTES as usize).enumerate() {
                let raw = QedEntries::load(entry);
                let decoded = self.entries.decode(raw, self.end);
                if matches!(decoded, Entry::Unallocated | Entry::Zero) {
                    continue;
                }
                self.result.allocated_clusters += 1;
                if last != 0 && raw.wrapping_sub(last) != cluster_size {
                    self.result.fragmented_clusters += 1;
                }
                last = raw;
                match decoded {
                    Entry::Data(offset) => {
                        self.refer(offset, 1);
                    }
                    _ => {
                        entry.fill(0);
                        wrong.push(index);
                    }
                }
            }
            self.repair((table + at, &bytes), &wrong).await?;
            at += step;
        }
        Ok(())
    }

    /// Counts entries that cannot be, and writes what they are now if that is wanted.
    async fn repair(
        &mut self,
        (offset, bytes): (u64, &[u8]),
        wrong: &[usize],
    ) -> Result<(), Errno> {
        let count = wrong.len() as u64;
        if !self.options.repair.leaks() {
            self.result.corruptions += count;
            return Ok(());
        }
        for index in wrong {
            let at = index * ENTRY_BYTES as usize;
            let entry = &bytes[at..at + ENTRY_BYTES as usize];
            write_bytes(self.file, offset + at as u64, entry).await?;
        }
        self.result.corruptions_fixed += count;
        Ok(())
    }

    /// Counts references to clusters; whether they are the first.
    fn refer(&mut self, offset: u64, clusters: u32) -> bool {
        let first = offset >> self.entries.cluster_bits();
        let mut is_first = true;
        for cluster in first..first + u64::from(clusters) {
            let Some(word) = self.used.get_mut((cluster / 64) as usize) else {
                continue;
            };
            let bit = 1 << (cluster % 64);
            if *word & bit != 0 {
                self.result.corruptions += 1;
                is_first = false;
            }
            *word |= bit;
            let end = (cluster + 1) << self.entries.cluster_bits();
            self.used_end = self.used_end.max(end);
        }
        is_first
    }
}
