//! Metadata changes in the redo log, and their replay.
//!
//! A record holds absolute values, so that applying it to an image that has the change already
//! (a flush was under way) does nothing. The exception is `Free`, which is forgotten together with
//! the flush that made it durable, before the refcounts go down.
//!
//! Replay puts the records into the cache as dirty metadata, as if they had just been made: first
//! the tables (L1, refcount table), then refcounts, then L2 entries, so that a flush forced by a
//! full cache in between is ordered as any other.

use super::cluster::EntryWords;
use super::reclaim::DiscardKind;
use super::tables::{COPIED, ClusterRun, GuestCluster, HostCluster, L2Entry, OFFSET_MASK};
use super::{Qcow2, SECTOR, State};
use block::redo_log::Record;
use block::{Error, ErrorKind};
use std::sync::atomic::Ordering::{AcqRel, Release};

/// A metadata change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RedoRecord {
    /// An entry of the active L1 table.
    L1 { index: u64, value: u64 },
    /// An entry of the refcount table.
    RefcountTable { index: u64, value: u64 },
    /// The refcounts of a run of clusters.
    Refcount { run: ClusterRun, value: u64 },
    /// L2 entries: `value`, `value` one step further, ...
    L2(L2Run),
    /// A reference to a run of clusters is gone; whether the host is told.
    Free { run: ClusterRun, pass: DiscardKind },
}

/// Consecutive L2 entries with evenly spaced values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct L2Run {
    pub(super) first: GuestCluster,
    pub(super) count: u64,
    pub(super) value: EntryWords,
    /// Whether each entry is one cluster further than the one before, or the same.
    pub(super) contiguous: bool,
}

impl L2Run {
    /// Adds the entry of the next cluster; false when it does not continue the run.
    pub(super) fn extend(&mut self, cluster: GuestCluster, words: EntryWords, step: u64) -> bool {
        let step = if self.contiguous { step } else { 0 };
        let next = self.value.descriptor.0.wrapping_add(self.count * step);
        let continues = self.first.0 + self.count == cluster.0
            && words.descriptor.0 == next
            && words.bitmap == self.value.bitmap;
        self.count += u64::from(continues);
        continues
    }
}

const L1: u64 = 1;
const REFCOUNT_TABLE: u64 = 2;
const REFCOUNT: u64 = 3;
const L2_SAME: u64 = 4;
const L2_CONTIGUOUS: u64 = 5;
const FREE: u64 = 6;
const EXTENDED_SAME: u64 = 7;
const EXTENDED_CONTIGUOUS: u64 = 8;
/// The records of extended entries need their last field for the bitmap: the number of entries is in
/// the kind's upper half.
const COUNT_SHIFT: u32 = 32;

impl RedoRecord {
    pub(super) fn encode(self) -> Record {
        let (kind, table, index, value) = match self {
            Self::L1 { index, value } => (L1, 0, index, value),
            Self::RefcountTable { index, value } => (REFCOUNT_TABLE, 0, index, value),
            Self::Refcount { run, value } => (REFCOUNT, run.first.0, run.count, value),
            Self::L2(run) => return run.encode(),
            Self::Free { run, pass } => (FREE, run.first.0, run.count, pass.number()),
        };
        Record {
            kind,
            table,
            index,
            value,
        }
    }

    pub(super) fn decode(record: &Record) -> Option<Self> {
        let run = ClusterRun {
            first: HostCluster(record.table),
            count: record.index,
        };
        let (index, value) = (record.index, record.value);
        Some(match record.kind {
            L1 => Self::L1 { index, value },
            REFCOUNT_TABLE => Self::RefcountTable { index, value },
            REFCOUNT => Self::Refcount { run, value },
            FREE => Self::Free {
                run,
                pass: DiscardKind::from_number(value),
            },
            _ => Self::L2(L2Run::decode(record)?),
        })
    }
}

impl L2Run {
    fn encode(self) -> Record {
        let (first, descriptor) = (self.first.0, self.value.descriptor.0);
        if self.value.bitmap == 0 {
            return Record {
                kind: if self.contiguous {
                    L2_CONTIGUOUS
                } else {
                    L2_SAME
                },
                table: first,
                index: self.count,
                value: descriptor,
            };
        }
        let kind = if self.contiguous {
            EXTENDED_CONTIGUOUS
        } else {
            EXTENDED_SAME
        };
        Record {
            kind: kind | self.count << COUNT_SHIFT,
            table: first,
            index: descriptor,
            value: self.value.bitmap,
        }
    }

    fn decode(record: &Record) -> Option<Self> {
        let first = GuestCluster(record.table);
        let contiguous = |even, odd| match record.kind & ((1 << COUNT_SHIFT) - 1) {
            kind if kind == even => Some(false),
            kind if kind == odd => Some(true),
            _ => None,
        };
        if record.kind >> COUNT_SHIFT == 0 {
            return Some(Self {
                first,
                count: record.index,
                value: EntryWords {
                    descriptor: L2Entry(record.value),
                    bitmap: 0,
                },
                contiguous: contiguous(L2_SAME, L2_CONTIGUOUS)?,
            });
        }
        Some(Self {
            first,
            count: record.kind >> COUNT_SHIFT,
            value: EntryWords {
                descriptor: L2Entry(record.index),
                bitmap: record.value,
            },
            contiguous: contiguous(EXTENDED_SAME, EXTENDED_CONTIGUOUS)?,
        })
    }
}

/// The error for records that no driver of this image has written.
pub(super) fn does_not_fit() -> Error {
    Error::new(
        ErrorKind::Corrupt,
        "the redo log does not fit the qcow2 image",
    )
}

impl Qcow2 {
    /// Logs `records` and makes the `change` they describe, as one to every flush. False when the
    /// log has no room: flush metadata and try again.
    #[must_use]
    pub(super) fn log_and(&self, records: &[RedoRecord], change: impl FnOnce(&mut State)) -> bool {
        let encoded: smallvec::SmallVec<[Record; 4]> =
            records.iter().map(|record| record.encode()).collect();
        let mut state = self.state();
        if !self.log.append(&encoded) {
            return false;
        }
        change(&mut state);
        true
    }

    /// Puts what the process before had not flushed into the cache, as dirty metadata.
    pub(super) async fn replay(&self) -> Result<(), Error> {
        self.replay_some(|_| true).await
    }

    /// [`Qcow2::replay`] of the records that are `wanted`.
    pub(super) async fn replay_some(
        &self,
        wanted: impl Fn(&RedoRecord) -> bool,
    ) -> Result<(), Error> {
        let records = self.log.recover()?;
        if records.is_empty() {
            return Ok(());
        }
        let decoded: Option<Vec<RedoRecord>> = records.iter().map(RedoRecord::decode).collect();
        let decoded = decoded.filter(|records| records.iter().all(|record| self.fits(record)));
        let mut records = decoded.ok_or_else(does_not_fit)?;
        records.retain(wanted);
        tracing::info!(records = records.len(), "replaying metadata changes");
        self.health.replaying.store(true, Release);
        self.replay_tables(&records);
        for record in &records {
            if let RedoRecord::Refcount { run, value } = *record {
                self.replay_refcounts(run, value).await?;
            }
        }
        for record in &records {
            if let RedoRecord::L2(run) = *record {
                self.replay_l2(run).await?;
            }
        }
        for record in &records {
            if let RedoRecord::Free { run, pass } = *record {
                self.state().free(run, pass);
            }
        }
        self.health.replaying.store(false, Release);
        Ok(())
    }

    pub(super) fn fits(&self, record: &RedoRecord) -> bool {
        let within = |run: &ClusterRun| {
            let most = super::tables::MAX_HOST_OFFSET >> self.geometry.cluster_bits;
            run.first
                .0
                .checked_add(run.count)
                .is_some_and(|end| end <= most)
        };
        match record {
            RedoRecord::L1 { index, .. } => *index < self.l1.len(),
            RedoRecord::RefcountTable { index, .. } => {
                *index < self.state().refcount_table.entries.len() as u64
            }
            RedoRecord::Refcount { run, .. } | RedoRecord::Free { run, .. } => within(run),
            RedoRecord::L2(run) => {
                let end = run.first.0.checked_add(run.count);
                let most = self.l1.len() << self.geometry.l2_bits();
                end.is_some_and(|end| end <= most)
            }
        }
    }

    fn replay_tables(&self, records: &[RedoRecord]) {
        let mut state = self.state();
        for record in records {
            match *record {
                RedoRecord::L1 { index, value } => self.set_l1(&mut state, index, value),
                RedoRecord::RefcountTable { index, value } => {
                    state.refcount_table.set(index, value);
                    let cluster = HostCluster(value >> self.geometry.cluster_bits);
                    state.metadata.add_refcount_block(cluster);
                }
                _ => {}
            }
        }
    }

    /// Changes an L1 entry in memory; the caller has logged it.
    pub(super) fn set_l1(&self, state: &mut State, index: u64, value: u64) {
        let old = self.l1.entry(index) & OFFSET_MASK;
        let cluster = |offset: u64| HostCluster(offset >> self.geometry.cluster_bits);
        if old != 0 {
            state.metadata.remove_l2_table(cluster(old));
        }
        if value & OFFSET_MASK != 0 {
            state.metadata.add_l2_table(cluster(value & OFFSET_MASK));
        }
        self.l1.set(index, value);
        state.l1_dirty.insert(index * 8 / SECTOR);
    }

    async fn replay_refcounts(&self, run: ClusterRun, value: u64) -> Result<(), Error> {
        let structure = self.structure.lock().await;
        let mut pins = super::alloc::Pins::default();
        let end = run.end() << self.geometry.cluster_bits;
        self.host_end.fetch_max(end, AcqRel);
        loop {
            let attempt = {
                let mut state = self.state();
                state.allocator.append = state.allocator.append.max(run.end());
                self.set_refcounts(run, value)
            };
            let Err(need) = attempt else { return Ok(()) };
            let provided = self.provide(&structure, need, &mut pins).await;
            provided.map_err(|errno| Error::io("cannot replay refcounts", errno))?;
        }
    }

    async fn replay_l2(&self, run: L2Run) -> Result<(), Error> {
        let failed = |errno| Error::io("cannot replay L2 entries", errno);
        let end = run.first.0 + run.count;
        let mut cluster = run.first;
        while cluster.0 < end {
            let Some(slice) = self.load_l2(cluster).await.map_err(failed)? else {
                return Err(Error::new(
                    ErrorKind::Corrupt,
                    "the redo log refers to an L2 table that the image lacks",
                ));
            };
            let slice_end = self.geometry.l2_slice_end(cluster).0.min(end);
            let step = match run.contiguous {
                true => self.geometry.cluster_size(),
                false => 0,
            };
            let mut state = self.state();
            for number in cluster.0..slice_end {
                let mut words = run.value;
                let distance = (number - run.first.0) * step;
                words.descriptor.0 = words.descriptor.0.wrapping_add(distance);
                self.set_entry(&mut state, &slice, (GuestCluster(number), words));
            }
            cluster = GuestCluster(slice_end);
        }
        Ok(())
    }

    /// An L1 entry for a table that nothing else refers to.
    pub(super) const fn owned_table(offset: u64) -> u64 {
        offset | COPIED
    }
}
