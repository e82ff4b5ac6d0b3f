//! Writes that change the mapping: prepare (allocate), commit (map) and abort.
//!
//! A prepared write covers guest clusters of one kind in one L2 slice:
//! - data clusters that are in place after all: nothing to change;
//! - zero clusters with reserved storage: written there, the zero flag goes;
//! - everything else: new clusters, and whatever the entries referred to is freed.
//!
//! The guest clusters are locked and the L2 slice is pinned from prepare to commit, so a commit
//! does no I/O but for a full redo log.

use super::alloc::{Reserved, Storage};
use super::cache::Pinned;
use super::reclaim::Requests;
use super::redo::{L2Run, RedoRecord};
use super::tables::{COPIED, ClusterRun, GuestCluster, HostOffset, L2Entry, L2Kind, OFFSET_MASK};
use super::{Qcow2, State};
use block::{ByteRange, Fill, WritePlan};
use executor::sync::RangeGuard;
use executor::{Buffer, Errno};
use smallvec::SmallVec;
use std::sync::atomic::Ordering::Relaxed;

/// State of a prepared write.
pub struct Token<'a> {
    slice: Pinned<'a>,
    first: GuestCluster,
    change: Change<'a>,
    /// Released at once when nothing changes: such a write is like any other in place.
    _locked: Option<RangeGuard<'a>>,
}

enum Change<'a> {
    /// The mapping stays.
    None,
    /// Zero clusters become data where they are.
    Reuse(ClusterRun),
    /// New clusters take the place of whatever was there.
    Map(Reserved<'a>),
}

impl Qcow2 {
    pub(super) async fn prepare(&self, range: ByteRange) -> Result<WritePlan<Token<'_>>, Errno> {
        self.check_writable()?;
        let geometry = &self.geometry;
        let first = geometry.guest_cluster(range.offset);
        let slice_end = geometry.guest_offset(geometry.l2_slice_end(first));
        let most = geometry.guest_offset(GuestCluster(first.0 + MAX_PLAN_CLUSTERS));
        let end = range.checked_end().ok_or(Errno::EINVAL)?;
        let end = end.min(slice_end).min(most);
        let locked_end = end.next_multiple_of(geometry.cluster_size());
        let lock = geometry.guest_offset(first)..locked_end;
        let locked = self.guest_locks.lock(lock).await;
        self.may_map(geometry.guest_offset(first))?;
        self.make_room().await?;
        self.ensure_l2_table(geometry.l1_index(first)).await?;
        let slice = self.load_l2(first).await?.ok_or(Errno::EIO)?;
        let entry = geometry.entry_position(first).entry;
        let clusters =
            ((locked_end - geometry.guest_offset(first)) >> geometry.cluster_bits) as usize;
        let entries: SmallVec<[L2Entry; 32]> = (entry..entry + clusters)
            .map(|entry| L2Entry(slice.word(entry)))
            .collect();
        let placement = self.place(first, &entries).await?;
        let range = ByteRange::new(range.offset, end - range.offset);
        Ok(self.plan(range, placement, (slice, first), locked))
    }

    fn plan<'a>(
        &self,
        range: ByteRange,
        placement: Placement<'a>,
        (slice, first): (Pinned<'a>, GuestCluster),
        locked: RangeGuard<'a>,
    ) -> WritePlan<Token<'a>> {
        let cluster_size = self.geometry.cluster_size();
        let start = range.offset & !(cluster_size - 1);
        let covered_end = start + placement.count * cluster_size;
        let end = (range.offset + range.length).min(covered_end);
        let head = range.offset - start;
        let entry = self.geometry.entry_position(first).entry;
        let last = L2Entry(slice.word(entry + placement.count as usize - 1));
        let fill = |entry, offset, length| match placement.storage {
            _ if length == 0 => Fill::Nothing,
            Storage::InPlace => Fill::Nothing,
            Storage::Zeroes if self.reads_zero(entry, offset) => Fill::Nothing,
            _ if self.reads_zero(entry, offset) => Fill::Zeroes(length),
            _ => Fill::Copy(length),
        };
        let (head_fill, tail_fill) = (
            fill(L2Entry(slice.word(entry)), start, head),
            fill(last, end, covered_end - end),
        );
        let is_in_place = placement.storage == Storage::InPlace;
        WritePlan {
            range: ByteRange::new(range.offset, end - range.offset),
            host_offset: placement.host.0 + head,
            head: head_fill,
            tail: tail_fill,
            token: Token {
                slice,
                first,
                change: placement.change,
                _locked: (!is_in_place || self.is_still()).then_some(locked),
            },
        }
    }

    /// Whether the cluster of `entry` reads as zeroes from `offset` on.
    fn reads_zero(&self, entry: L2Entry, offset: u64) -> bool {
        match entry.kind(&self.geometry) {
            L2Kind::ZeroPlain | L2Kind::ZeroAllocated(_) => true,
            L2Kind::Unallocated => {
                let backing = self.backing.as_ref();
                backing.is_none_or(|backing| backing.node().length() <= offset)
            }
            _ => false,
        }
    }

    /// Decides where the write to the clusters of `entries` goes.
    async fn place(
        &self,
        first: GuestCluster,
        entries: &[L2Entry],
    ) -> Result<Placement<'_>, Errno> {
        let cluster_size = self.geometry.cluster_size();
        let run_of = |step: u64| {
            let same = |(number, entry): &(usize, &L2Entry)| {
                entry.0 == entries[0].0.wrapping_add(step * *number as u64)
            };
            entries.iter().enumerate().take_while(same).count() as u64
        };
        match self.reusable(entries[0]) {
            Some((host, change)) => {
                let count = run_of(cluster_size);
                let owned = host.0 + count * cluster_size <= self.host_end.load(Relaxed);
                let run = ClusterRun {
                    first: self.geometry.host_cluster(host),
                    count: if owned { count } else { 1 },
                };
                Ok(Placement {
                    host,
                    count: run.count,
                    storage: match change {
                        Reuse::Data => Storage::InPlace,
                        Reuse::Zero => Storage::Anything,
                    },
                    change: match change {
                        Reuse::Data => Change::None,
                        Reuse::Zero => Change::Reuse(run),
                    },
                })
            }
            None => {
                let fresh = entries
                    .iter()
                    .take_while(|entry| self.reusable(**entry).is_none());
                let mut want = 0;
                for entry in fresh {
                    if entry.kind(&self.geometry) == L2Kind::Invalid {
                        return Err(self.invalid_entry(first, entry.0).await);
                    }
                    want += 1;
                }
                self.reclaim(Requests::MayRun, 1).await;
                let (run, storage) = self.allocate(want).await?;
                Ok(Placement {
                    host: self.geometry.host_offset(run.first),
                    count: run.count,
                    storage,
                    change: Change::Map(Reserved::new(self, run)),
                })
            }
        }
    }

    /// The host cluster of an entry that may be written where it is.
    fn reusable(&self, entry: L2Entry) -> Option<(HostOffset, Reuse)> {
        let (host, reuse) = match entry.kind(&self.geometry) {
            L2Kind::Data(host) => (host, Reuse::Data),
            L2Kind::ZeroAllocated(host) => (host, Reuse::Zero),
            _ => return None,
        };
        let end = host.0 + self.geometry.cluster_size();
        (entry.is_copied() && end <= self.host_end.load(Relaxed)).then_some((host, reuse))
    }

    /// Sees to it that the L1 entry refers to an L2 table of its own.
    pub(super) async fn ensure_l2_table(&self, l1_index: u64) -> Result<(), Errno> {
        let owned = |entry: u64| entry & OFFSET_MASK != 0 && entry & COPIED != 0;
        if owned(self.l1.entry(l1_index)) {
            return Ok(());
        }
        let structure = self.structure.lock().await;
        let old = self.l1.entry(l1_index);
        if owned(old) {
            return Ok(());
        }
        let (run, _) = self.allocate_in(&structure, 1).await?;
        let reserved = Reserved::new(self, run);
        let table = self.geometry.host_offset(run.first);
        if let Err(errno) = self.fill_l2_table(old & OFFSET_MASK, table).await {
            reserved.give_back();
            return Err(errno);
        }
        let value = Self::owned_table(table.0);
        let shared = (old & OFFSET_MASK != 0).then(|| ClusterRun {
            first: self.geometry.host_cluster(HostOffset(old & OFFSET_MASK)),
            count: 1,
        });
        let mut records: SmallVec<[RedoRecord; 3]> = SmallVec::new();
        records.push(RedoRecord::Refcount { run, value: 1 });
        records.push(RedoRecord::L1 {
            index: l1_index,
            value,
        });
        records.extend(shared.map(|run| RedoRecord::Free { run }));
        let changed = self.log_change(&records, |state| {
            self.set_l1(state, l1_index, value);
            if let Some(run) = shared {
                state.free(run);
            }
        });
        let result = changed.await;
        match result {
            Ok(()) => reserved.keep(),
            Err(_) => reserved.give_back(),
        }
        result
    }

    /// Writes a new L2 table: a copy of the one at `source`, or empty when that is 0.
    async fn fill_l2_table(&self, source: u64, table: HostOffset) -> Result<(), Errno> {
        let cluster_size = self.geometry.cluster_size();
        let file = self.file.node();
        let buffer = Buffer::zeroed(cluster_size as usize);
        if !self.geometry.is_aligned(source) {
            let what = format!("L2 table offset {source:#x} unaligned");
            return Err(self.corruption(what).await);
        }
        if source != 0 {
            file.read(source, buffer.clone()).await?;
        }
        file.write(table.0, buffer, block::WriteFlags::default())
            .await
    }

    /// Logs `records` with the `change` they describe, flushing metadata when the log is full.
    pub(super) async fn log_change(
        &self,
        records: &[RedoRecord],
        mut change: impl FnMut(&mut State),
    ) -> Result<(), Errno> {
        for _ in 0..MAX_LOG_ATTEMPTS {
            if self.log_and(records, &mut change) {
                return Ok(());
            }
            self.stalls.fetch_add(1, Relaxed);
            self.flush_metadata().await?;
        }
        Err(Errno::ENOSPC)
    }

    pub(super) async fn commit_write(&self, plan: WritePlan<Token<'_>>) -> Result<(), Errno> {
        let token = plan.token;
        let (run, reserved) = match token.change {
            Change::None => return Ok(()),
            Change::Reuse(run) => (run, None),
            Change::Map(reserved) => (reserved.run(), Some(reserved)),
        };
        let slice = &token.slice;
        let entry = self.geometry.entry_position(token.first).entry;
        let host = self.geometry.host_offset(run.first);
        let mut records: SmallVec<[RedoRecord; 4]> = SmallVec::new();
        let mut freed: SmallVec<[ClusterRun; 4]> = SmallVec::new();
        if reserved.is_some() {
            records.push(RedoRecord::Refcount { run, value: 1 });
            let old = (entry..entry + run.count as usize).map(|entry| L2Entry(slice.word(entry)));
            freed.extend(old.filter_map(|entry| entry.references(&self.geometry)));
        }
        records.push(RedoRecord::L2(L2Run {
            first: token.first,
            count: run.count,
            value: L2Entry::data(host).0,
            contiguous: true,
        }));
        records.extend(freed.iter().map(|&run| RedoRecord::Free { run }));
        let committed = self.log_change(&records, |state| {
            for number in 0..run.count {
                let offset = HostOffset(host.0 + (number << self.geometry.cluster_bits));
                slice.set_word(entry + number as usize, L2Entry::data(offset).0);
            }
            freed.iter().for_each(|&run| state.free(run));
        });
        let result = committed.await;
        match (reserved, &result) {
            (Some(reserved), Ok(())) => reserved.keep(),
            (Some(reserved), Err(_)) => reserved.give_back(),
            (None, _) => {}
        }
        result
    }

    pub(super) fn abort_write(&self, plan: WritePlan<Token<'_>>) {
        if let Change::Map(reserved) = plan.token.change {
            reserved.give_back();
        }
    }
}

/// Most clusters of one prepared write.
const MAX_PLAN_CLUSTERS: u64 = 256;
/// How often a change that does not fit into the redo log is tried again after a flush.
pub(super) const MAX_LOG_ATTEMPTS: usize = 64;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Reuse {
    Data,
    Zero,
}

struct Placement<'a> {
    host: HostOffset,
    /// Clusters.
    count: u64,
    storage: Storage,
    change: Change<'a>,
}
