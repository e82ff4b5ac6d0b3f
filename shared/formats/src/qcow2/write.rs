//! Writes that change the mapping: prepare (allocate), commit (map) and abort.
//!
//! A prepared write covers guest clusters of one kind in one L2 slice:
//! - data that is in place after all: nothing to change;
//! - neighbouring host clusters of our own, some of whose subclusters are zero or unallocated: written
//!   there, and the entries say so afterwards;
//! - everything else: new host clusters, and whatever the entries referred to is freed.
//!
//! What the plan fills around the data ends where a subcluster does (the cluster, without extended
//! entries), and in a new host cluster where the data ends that the old one had: an entry refers to
//! one host cluster only.
//!
//! The guest clusters are locked and the L2 slice is pinned from prepare to commit, so a commit
//! does no I/O but for a full redo log.

use super::alloc::{Reserved, Storage, Use, Want};
use super::cache::Pinned;
use super::cluster::{Cluster, EntryWords, Subclusters, mask};
use super::lazy::Scope;
use super::reclaim::{DiscardKind, Requests};
use super::redo::{L2Run, RedoRecord};
use super::tables::{COPIED, ClusterRun, GuestCluster, HostOffset, OFFSET_MASK};
use super::{Qcow2, State};
use block::{ByteRange, Event, Fill, Format, WritePlan};
use executor::sync::RangeGuard;
use executor::{Buffer, Errno};
use smallvec::SmallVec;
use std::ops::Range;
use std::sync::atomic::Ordering::Relaxed;

/// State of a prepared write.
pub struct Token<'a> {
    slice: Pinned<'a>,
    change: Option<Change<'a>>,
    /// Released at once when nothing changes: such a write is like any other in place.
    _locked: Option<RangeGuard<'a>>,
}

/// What a commit changes.
struct Change<'a> {
    first: GuestCluster,
    /// Clusters.
    count: u64,
    host: HostOffset,
    /// The entries of the first and the last cluster; those between are all data.
    ends: [Subclusters; 2],
    /// New host clusters, which take the place of whatever was there.
    replaces: bool,
    /// What the entries show afterwards.
    shows: Shows,
    reserved: Option<Reserved<'a>>,
}

/// What the entries of a committed write show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shows {
    /// What was written.
    Data,
    /// What they did before, or zeroes where an entry cannot say so: the clusters are only reserved.
    NoData,
}

impl Token<'_> {
    /// The write is to reserve its clusters only. They hold no data.
    pub(super) fn reserve_only(&mut self) {
        if let Some(change) = &mut self.change {
            change.shows = Shows::NoData;
        }
    }
}

/// Where a write goes.
struct Placement<'a> {
    host: HostOffset,
    /// Clusters.
    count: u64,
    storage: Storage,
    target: Target<'a>,
}

enum Target<'a> {
    /// The mapping stays.
    InPlace,
    /// Host clusters that the entries have already.
    Present,
    /// New ones; the guest's own place in an external data file has no reservation.
    New(Option<Reserved<'a>>),
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
        let mut clusters: SmallVec<[Cluster; 8]> = SmallVec::new();
        for number in first.0..locked_end >> geometry.cluster_bits {
            let cluster = GuestCluster(number);
            let words = self.entry_words(&slice, cluster);
            clusters.push(self.decode_entry(words, cluster).await?);
        }
        let guest = range.offset..end;
        let placement = self.place(&guest, first, &clusters).await?;
        let (plan, change) = self.fit(guest, (first, &clusters), placement);
        let is_in_place = change.is_none();
        Ok(WritePlan {
            range: plan.range,
            host_offset: plan.host_offset,
            head: plan.head,
            tail: plan.tail,
            token: Token {
                slice,
                change,
                _locked: (!is_in_place || self.is_still()).then_some(locked),
            },
        })
    }

    /// Decides where a write of the guest bytes `guest`, which begin in the first of `clusters`, goes.
    async fn place(
        &self,
        guest: &Range<u64>,
        first: GuestCluster,
        clusters: &[Cluster],
    ) -> Result<Placement<'_>, Errno> {
        let cluster = |index: u64| GuestCluster(first.0 + index);
        let is_all_data = |index: u64, state: &Subclusters| {
            self.geometry.touched(cluster(index), guest) & !state.allocated == 0
        };
        if let Some((host, state)) = self.present(&clusters[0]) {
            let mut in_place = is_all_data(0, &state);
            let follows = |index: u64| {
                let (next, state) = self.present(&clusters[index as usize])?;
                let is_neighbour = next.0 == host.0 + (index << self.geometry.cluster_bits);
                is_neighbour.then(|| is_all_data(index, &state))
            };
            let others = (1..clusters.len() as u64).map_while(follows);
            // Data and zeroes on neighbouring clusters are one write; the data's entries stay as they are.
            let more = others.inspect(|is_data| in_place &= is_data).count() as u64;
            return Ok(Placement {
                host,
                count: 1 + more,
                storage: Storage::Anything,
                target: if in_place {
                    Target::InPlace
                } else {
                    Target::Present
                },
            });
        }
        let absent = |state: &&Cluster| self.present(state).is_none();
        let want = clusters.iter().take_while(absent).count() as u64;
        if self.geometry.external_data {
            return Ok(Placement {
                host: HostOffset(self.geometry.guest_offset(first)),
                count: want,
                storage: Storage::Anything,
                target: Target::New(None),
            });
        }
        self.reclaim(Requests::MayRun, 1).await;
        let (run, storage) = self.allocate(want).await?;
        let end = run.end() << self.geometry.cluster_bits;
        self.plain_end.fetch_max(end, Relaxed);
        Ok(Placement {
            host: self.geometry.host_offset(run.first),
            count: run.count,
            // Where data is encrypted, zero bytes on disk do not read as zeroes.
            storage: if self.cipher().is_some() {
                Storage::Anything
            } else {
                storage
            },
            target: Target::New(Some(Reserved::new(self, run))),
        })
    }

    /// The host cluster of a cluster that may be written where it is.
    fn present(&self, cluster: &Cluster) -> Option<(HostOffset, Subclusters)> {
        let Cluster::Standard(state) = cluster else {
            return None;
        };
        let host = state.host?;
        self.is_owned(state.copied, (host, 1))
            .then_some((host, *state))
    }

    /// Fits a write to its place: what is filled around it, and what its entries say then.
    fn fit<'a>(
        &self,
        guest: Range<u64>,
        (first, clusters): (GuestCluster, &[Cluster]),
        placement: Placement<'a>,
    ) -> (WritePlan<()>, Option<Change<'a>>) {
        let geometry = &self.geometry;
        let covered_end = geometry.guest_offset(GuestCluster(first.0 + placement.count));
        let guest = guest.start..guest.end.min(covered_end);
        let last = GuestCluster(first.0 + placement.count - 1);
        let states = [&clusters[0], &clusters[placement.count as usize - 1]];
        let start = geometry.guest_offset(first);
        let mut plan = WritePlan {
            range: ByteRange::new(guest.start, guest.end - guest.start),
            host_offset: placement.host.0 + (guest.start - start),
            head: Fill::Nothing,
            tail: Fill::Nothing,
            token: (),
        };
        let (replaces, reserved) = match placement.target {
            Target::InPlace => return (plan, None),
            Target::Present => (false, None),
            Target::New(reserved) => (true, reserved),
        };
        let written = |cluster: GuestCluster, state: &Cluster| {
            let touched = geometry.touched(cluster, &guest);
            match replaces {
                true => self.filled(state, touched),
                false => touched,
            }
        };
        let masks = [written(first, states[0]), written(last, states[1])];
        let bits = geometry.subcluster_bits();
        let head_start = start + (u64::from(masks[0].trailing_zeros()) << bits);
        let tail_end =
            geometry.guest_offset(last) + (u64::from(32 - masks[1].leading_zeros()) << bits);
        let fill = |cluster, state, range| match self.old_content(cluster, state, &range) {
            // What is there stays there.
            Old::Data if !replaces => Fill::Nothing,
            _ if range.is_empty() => Fill::Nothing,
            Old::Zeroes if placement.storage == Storage::Zeroes => Fill::Nothing,
            Old::Zeroes => Fill::Zeroes(range.end - range.start),
            Old::Data | Old::Other => Fill::Copy(range.end - range.start),
        };
        plan.head = fill(first, states[0], head_start..guest.start);
        plan.tail = fill(last, states[1], guest.end..tail_end);
        let ends = [0, 1].map(|end| self.changed(states[end], masks[end]));
        let change = Change {
            first,
            count: placement.count,
            host: placement.host,
            ends,
            replaces,
            shows: Shows::Data,
            reserved,
        };
        (plan, Some(change))
    }

    /// The subclusters that a new host cluster gets, so that no data of the old one is lost, when
    /// `touched` ones are written.
    fn filled(&self, old: &Cluster, touched: u32) -> u32 {
        match old {
            Cluster::Compressed(_) => self.geometry.all_subclusters(),
            Cluster::Standard(state) => {
                let data = state.allocated | touched;
                mask(data.trailing_zeros()..32 - data.leading_zeros())
            }
        }
    }

    /// What a cluster says when `written` subclusters of it have become data.
    fn changed(&self, old: &Cluster, written: u32) -> Subclusters {
        let old = match old {
            Cluster::Compressed(_) => Subclusters::default(),
            Cluster::Standard(state) => *state,
        };
        Subclusters {
            host: None,
            copied: true,
            allocated: old.allocated | written,
            zero: old.zero & !written,
        }
    }

    /// What the guest bytes `range` of one cluster read as.
    fn old_content(&self, cluster: GuestCluster, state: &Cluster, range: &Range<u64>) -> Old {
        let Cluster::Standard(state) = state else {
            return Old::Other;
        };
        let touched = self.geometry.touched(cluster, range);
        if touched & !state.allocated == 0 {
            return Old::Data;
        }
        let backed = self
            .backing
            .as_ref()
            .map_or(0, |backing| backing.node().length());
        let from_backing = touched & !(state.zero | state.allocated);
        if touched & state.allocated == 0 && (from_backing == 0 || backed <= range.start) {
            return Old::Zeroes;
        }
        Old::Other
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
        self.event(Event::ClusterAlloc).await;
        let (run, _) = self
            .allocate_in(&structure, Want::one(Use::L2Table))
            .await?;
        let reserved = Reserved::new(self, run);
        let table = self.geometry.host_offset(run.first);
        let filled = match self.fill_l2_table(old & OFFSET_MASK, table).await {
            Ok(()) => self.count_in_file(run.first).await,
            Err(errno) => Err(errno),
        };
        if let Err(errno) = filled {
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
        let pass = DiscardKind::Other;
        records.extend(shared.map(|run| RedoRecord::Free { run, pass }));
        let changed = self.log_change(&records, |state| {
            self.set_l1(state, l1_index, value);
            if let Some(run) = shared {
                state.free(run, pass);
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
            self.event(Event::L2AllocCowRead).await;
            file.read(source, buffer.clone()).await?;
        }
        self.event(Event::L2AllocWrite).await;
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
            self.flush_scope(Scope::Mapping).await?;
        }
        Err(Errno::ENOSPC)
    }

    pub(super) async fn commit_write(&self, plan: WritePlan<Token<'_>>) -> Result<(), Errno> {
        let Some(change) = plan.token.change else {
            return Ok(());
        };
        let slice = &plan.token.slice;
        let clusters = || (change.first.0..change.first.0 + change.count).map(GuestCluster);
        let mut records: SmallVec<[RedoRecord; 4]> = SmallVec::new();
        let mut freed: SmallVec<[ClusterRun; 4]> = SmallVec::new();
        if let Some(reserved) = &change.reserved {
            let run = reserved.run();
            records.push(RedoRecord::Refcount { run, value: 1 });
        }
        if change.replaces {
            let old = clusters().map(|cluster| self.entry_words(slice, cluster).descriptor);
            freed.extend(old.filter_map(|entry| entry.references(&self.geometry)));
        }
        let step = self.geometry.cluster_size();
        for cluster in clusters() {
            let words = self.new_entry(&change, (slice, cluster));
            if let Some(RedoRecord::L2(run)) = records.last_mut()
                && run.extend(cluster, words, step)
            {
                continue;
            }
            records.push(RedoRecord::L2(L2Run {
                first: cluster,
                count: 1,
                value: words,
                contiguous: true,
            }));
        }
        let pass = DiscardKind::Never;
        records.extend(freed.iter().map(|&run| RedoRecord::Free { run, pass }));
        let committed = self.log_change(&records, |state| {
            for cluster in clusters() {
                let words = self.new_entry(&change, (slice, cluster));
                self.set_entry(state, slice, (cluster, words));
            }
            freed.iter().for_each(|&run| state.free(run, pass));
        });
        let result = committed.await;
        match (change.reserved, &result) {
            (Some(reserved), Ok(())) => reserved.keep(),
            (Some(reserved), Err(_)) => reserved.give_back(),
            (None, _) => {}
        }
        result
    }

    /// The entry that a commit gives `cluster`.
    fn new_entry(
        &self,
        change: &Change<'_>,
        (slice, cluster): (&Pinned<'_>, GuestCluster),
    ) -> EntryWords {
        let number = cluster.0 - change.first.0;
        let state = match number {
            _ if change.shows == Shows::NoData => {
                self.without_data(self.entry_words(slice, cluster), cluster)
            }
            0 => change.ends[0],
            number if number + 1 == change.count => change.ends[1],
            _ => Subclusters {
                host: None,
                copied: true,
                allocated: self.geometry.all_subclusters(),
                zero: 0,
            },
        };
        let host = change.host.0 + (number << self.geometry.cluster_bits);
        Subclusters {
            host: Some(HostOffset(host)),
            ..state
        }
        .encode(&self.geometry)
    }

    /// What an entry says when it gets a host cluster and no data. A standard entry with a host cluster
    /// is data or zeroes.
    fn without_data(&self, old: EntryWords, cluster: GuestCluster) -> Subclusters {
        let zero = match Cluster::decode(old, cluster, &self.geometry) {
            _ if !self.geometry.extended_l2 => self.geometry.all_subclusters(),
            Some(Cluster::Standard(old)) => old.zero,
            _ => 0,
        };
        Subclusters {
            copied: true,
            zero,
            ..Subclusters::default()
        }
    }

    pub(super) fn abort_write(&self, plan: WritePlan<Token<'_>>) {
        if let Some(reserved) = plan.token.change.and_then(|change| change.reserved) {
            reserved.give_back();
        }
    }
}

/// What a range reads as before a write.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Old {
    /// Data in the cluster's own host cluster, all of it.
    Data,
    Zeroes,
    Other,
}

/// Most clusters of one prepared write.
const MAX_PLAN_CLUSTERS: u64 = 256;
/// How often a change that does not fit into the redo log is tried again after a flush.
pub(super) const MAX_LOG_ATTEMPTS: usize = 64;
