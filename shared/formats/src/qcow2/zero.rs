//! Zeroes and discards: mapping changes without data.
//!
//! Zeroes work on whole subclusters (clusters, without extended entries), discards on whole clusters
//! as QEMU's do, both in one L2 slice at a time, a bounded number of entries per redo unit. Version 3
//! has zero clusters. In version 2 a cluster can only lose its mapping, which reads as zeroes when
//! there is no backing; with one, zeroes are written by the caller and a discard does nothing,
//! because it would let the backing's content show through.
//!
//! Zeroes for a part of a subcluster take all of it when the rest reads as zeroes and nothing of it is
//! data; else the caller writes them.
//!
//! A host cluster is given up when none of its subclusters holds data any more. In an external data
//! file there is nothing to give up: its storage is discarded while the guest clusters are locked,
//! since the guest's next write goes to the same place. A raw one has to read as zeroes by itself.
//! Of encrypted images storage that stays mapped is discarded after a flush: until the new mapping is
//! durable, a power cut may bring the old one back, and through the cipher holes do not read as zeroes.

use super::cluster::{Cluster, EntryWords, Subclusters};
use super::lazy::Scope;
use super::reclaim::DiscardKind;
use super::redo::{L2Run, RedoRecord};
use super::tables::{ClusterRun, GuestCluster, HostOffset, OFFSET_MASK};
use super::{Qcow2, cache::Pinned};
use block::copy::status;
use block::format::MAX_ZERO_BYTES;
use block::{ByteRange, Format, Mapping, Node, ZeroFlags};
use executor::Errno;
use smallvec::SmallVec;
use std::ops::Range;

/// Entries changed as one unit of the redo log.
const MAX_ENTRIES: u64 = 256;

/// What zeroes may take the place of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Old {
    Anything,
    /// Zeroes, or nothing: data is left alone.
    NoData,
}

/// What becomes of subclusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Erase {
    /// They read as zeroes and keep their storage.
    ZeroKeeping(Old),
    /// They read as zeroes; storage is given up.
    ZeroUnmapping(Old),
    /// The guest needs them no more: zeroes, unless that takes an effort.
    Discard,
    /// Whole clusters lose their mapping, whatever they read as then.
    Unmap,
    /// As `Unmap`, of clusters that the disk does not have any more: their space is given back always.
    Drop,
}

impl Erase {
    /// Whether nothing stays mapped.
    fn unmaps_all(self) -> bool {
        matches!(self, Self::Unmap | Self::Drop)
    }

    /// Whether storage stays mapped.
    fn keeps_storage(self) -> bool {
        matches!(self, Self::ZeroKeeping(_))
    }

    /// Whether it is done to data too.
    fn takes_data(self) -> bool {
        !matches!(
            self,
            Self::ZeroKeeping(Old::NoData) | Self::ZeroUnmapping(Old::NoData)
        )
    }

    /// Why the clusters are given up.
    fn discard_kind(self) -> DiscardKind {
        match self {
            Self::Drop => DiscardKind::Always,
            _ => DiscardKind::Request,
        }
    }
}

impl Qcow2 {
    /// See [`block::Format::write_zeroes`].
    pub(super) async fn zero(&self, range: ByteRange, flags: ZeroFlags) -> Result<u64, Errno> {
        self.check_writable()?;
        let grain = self.geometry.subcluster_size();
        let whole = self.whole_units(range, grain);
        let Some(whole) = whole.filter(|whole| whole.start == range.offset) else {
            return self.zero_part(range, flags).await;
        };
        let erase = match (self.geometry.zero_clusters, flags.may_unmap) {
            (true, true) => Erase::ZeroUnmapping(Old::Anything),
            (true, false) => Erase::ZeroKeeping(Old::Anything),
            (false, _) if self.backing.is_none() => Erase::Unmap,
            (false, _) => return Err(Errno::EOPNOTSUPP),
        };
        let whole = self.without_compressed_end(whole).await?;
        let end = self.erase_some(whole, erase).await?;
        Ok((end - range.offset).min(range.length))
    }

    /// `range` without the compressed cluster at its end of which it is a part, whose subclusters cannot be told apart.
    /// What is short enough to be written at once is written as a whole then, and not data beside zeroes.
    async fn without_compressed_end(&self, range: Range<u64>) -> Result<Range<u64>, Errno> {
        let last = range.end - range.end % self.geometry.cluster_size();
        if last == range.end || range.end >= self.disk_size() {
            return Ok(range);
        }
        let end = ByteRange::new(last, range.end - last);
        let is_compressed = match self.resolve_mapping(end).await?.mapping {
            Mapping::Encoded(_) => true,
            Mapping::Data(_) | Mapping::Zero(_) | Mapping::Unallocated => false,
        };
        match is_compressed {
            false => Ok(range),
            true if range.end - range.start <= MAX_ZERO_BYTES => Err(Errno::EOPNOTSUPP),
            true => Ok(range.start..last),
        }
    }

    /// Zeroes the part of one subcluster at the start of `range`, by making all of it zeroes.
    async fn zero_part(&self, range: ByteRange, flags: ZeroFlags) -> Result<u64, Errno> {
        if !self.geometry.zero_clusters {
            return Err(Errno::EOPNOTSUPP);
        }
        let grain = self.geometry.subcluster_size();
        let start = range.offset / grain * grain;
        let end = start.checked_add(grain).ok_or(Errno::EINVAL)?;
        let part_end = range.checked_end().ok_or(Errno::EINVAL)?.min(end);
        let shown_end = end.min(self.disk_size());
        let rest = [start..range.offset, part_end..shown_end];
        for margin in rest {
            if !self.shows_zeroes(margin).await? {
                return Err(Errno::EOPNOTSUPP);
            }
        }
        // What is written to the rest meanwhile is data.
        let erase = match flags.may_unmap {
            true => Erase::ZeroUnmapping(Old::NoData),
            false => Erase::ZeroKeeping(Old::NoData),
        };
        self.erase_some(start..end, erase).await?;
        Ok(part_end - range.offset)
    }

    /// Whether the mapping says that the guest bytes of `range` read as zeroes.
    async fn shows_zeroes(&self, mut range: Range<u64>) -> Result<bool, Errno> {
        while !range.is_empty() {
            let left = ByteRange::new(range.start, range.end - range.start);
            let extent = self.resolve_mapping(left).await?;
            let length = match (extent.mapping, &self.backing) {
                (Mapping::Zero(_), _) | (Mapping::Unallocated, None) => extent.length,
                (Mapping::Unallocated, Some(backing)) => {
                    let left = ByteRange::new(range.start, extent.length);
                    match zero_length(backing.node(), left).await {
                        0 => return Ok(false),
                        length => length,
                    }
                }
                (Mapping::Data(_) | Mapping::Encoded(_), _) => return Ok(false),
            };
            range.start += length;
        }
        Ok(true)
    }

    /// See [`block::Format::discard`].
    pub(super) async fn discard_range(&self, range: ByteRange) -> Result<(), Errno> {
        self.check_writable()?;
        let erase = match (self.geometry.zero_clusters, &self.backing) {
            (true, _) => Erase::Discard,
            (false, None) => Erase::Unmap,
            (false, Some(_)) => return Ok(()),
        };
        // Nothing is given up for less than a cluster.
        match self.whole_units(range, self.geometry.cluster_size()) {
            Some(whole) => self.erase(whole, erase).await,
            None => Ok(()),
        }
    }

    /// Drops every mapping in `clusters`, which no longer belong to the disk.
    pub(super) async fn unmap(&self, clusters: Range<GuestCluster>) -> Result<(), Errno> {
        let offset = |cluster| self.geometry.guest_offset(cluster);
        let whole = offset(clusters.start)..offset(clusters.end);
        self.erase(whole, Erase::Drop).await
    }

    async fn erase(&self, mut whole: Range<u64>, erase: Erase) -> Result<(), Errno> {
        while !whole.is_empty() {
            whole.start = self.erase_some(whole.clone(), erase).await?;
        }
        Ok(())
    }

    /// The guest bytes of the units of `size` that lie wholly in `range`; the disk's last one ends
    /// where the disk ends.
    fn whole_units(&self, range: ByteRange, size: u64) -> Option<Range<u64>> {
        let end = range.checked_end()?;
        let start = range.offset.checked_next_multiple_of(size)?;
        let end = if end >= self.disk_size() {
            end.checked_next_multiple_of(size)?
        } else {
            end / size * size
        };
        (start < end).then_some(start..end)
    }

    /// Erases some of the whole subclusters of the guest bytes `range`; answers with where it ended.
    async fn erase_some(&self, range: Range<u64>, erase: Erase) -> Result<u64, Errno> {
        let geometry = &self.geometry;
        let first = geometry.guest_cluster(range.start);
        let l1_index = geometry.l1_index(first);
        let shows_something = self.backing.is_some() || self.is_raw_data_file();
        let needs_mark = match erase {
            Erase::Discard => shows_something,
            Erase::ZeroKeeping(_) | Erase::ZeroUnmapping(_) => true,
            Erase::Unmap | Erase::Drop => false,
        };
        if self.l1.entry(l1_index) & OFFSET_MASK == 0 && !needs_mark {
            let covered_end = GuestCluster((l1_index + 1) << geometry.l2_bits());
            return Ok(range.end.min(geometry.guest_offset(covered_end)));
        }
        let limit = geometry.l2_slice_end(first).0.min(first.0 + MAX_ENTRIES);
        let range = range.start..range.end.min(geometry.guest_offset(GuestCluster(limit)));
        let end = GuestCluster(range.end.div_ceil(geometry.cluster_size()));
        let lock = geometry.guest_offset(first)..geometry.guest_offset(end);
        let _locked = self.guest_locks.lock(lock).await;
        if !erase.unmaps_all() {
            self.may_map(geometry.guest_offset(first))?;
        }
        self.make_room().await?;
        self.ensure_l2_table(l1_index).await?;
        let slice = self.load_l2(first).await?.ok_or(Errno::EIO)?;
        let changes = self.changes(&slice, &range, erase).await?;
        let is_encrypted = self.cipher().is_some();
        if !is_encrypted && !self.erase_data(&changes.range, erase).await? {
            return Ok(changes.range.end);
        }
        let pass = erase.discard_kind();
        let records = changes.records(pass);
        if !records.is_empty() {
            let changed = self.log_change(&records, |state| {
                for &entry in &changes.entries {
                    self.set_entry(state, &slice, entry);
                }
                for &run in &changes.freed {
                    state.free(run, pass);
                }
            });
            changed.await?;
            let has_storage = self.data_file.is_some() || !changes.kept.is_empty();
            if is_encrypted && has_storage && self.gives_storage_up(erase) {
                self.flush_scope(Scope::Mapping).await?;
                self.erase_data(&changes.range, erase).await?;
            }
        }
        self.discard_kept(&changes.kept).await;
        Ok(changes.range.end)
    }

    /// Whether the storage of what stays mapped is given up.
    fn gives_storage_up(&self, erase: Erase) -> bool {
        !erase.keeps_storage() && !erase.unmaps_all() && self.discards.request
    }

    /// What erasing the start of `range` changes in the slice that maps it.
    async fn changes(
        &self,
        slice: &Pinned<'_>,
        range: &Range<u64>,
        erase: Erase,
    ) -> Result<Changes, Errno> {
        let geometry = &self.geometry;
        let mut changes = Changes {
            range: range.start..range.start,
            ..Changes::default()
        };
        while changes.range.end < range.end {
            let cluster = geometry.guest_cluster(changes.range.end);
            let cluster_end = geometry.guest_offset(GuestCluster(cluster.0 + 1));
            let part = changes.range.end..range.end.min(cluster_end);
            let touched = geometry.touched(cluster, &part);
            let words = self.entry_words(slice, cluster);
            let old = self.decode_entry(words, cluster).await?;
            let new = match self.erased(&old, touched, erase) {
                Ok(new) => new,
                // What comes before is done; the caller comes back for this.
                Err(_) if !changes.range.is_empty() => break,
                Err(_) if erase == Erase::Discard => words,
                Err(errno) => return Err(errno),
            };
            if new != words {
                let kept = new.descriptor.references(geometry);
                let freed = words.descriptor.references(geometry);
                changes.push(cluster, new, freed.filter(|run| kept != Some(*run)));
                if let (Some(run), true, true) =
                    (kept, new.descriptor.is_copied(), self.keeps(erase))
                {
                    changes.kept.push((run, touched));
                }
            }
            changes.range.end = part.end;
        }
        Ok(changes)
    }

    /// Whether host clusters stay with their entries though their storage is given up.
    fn keeps(&self, erase: Erase) -> bool {
        matches!(erase, Erase::Discard | Erase::ZeroUnmapping(_)) && self.discards.keeps_clusters
    }

    /// The entry that takes the place of `old` when `touched` subclusters are erased.
    fn erased(&self, old: &Cluster, touched: u32, erase: Erase) -> Result<EntryWords, Errno> {
        if erase.unmaps_all() {
            return Ok(EntryWords::default());
        }
        let is_whole = touched == self.geometry.all_subclusters() && erase.takes_data();
        let old = match old {
            // Its subclusters cannot be told apart.
            Cluster::Compressed(_) if !is_whole => return Err(Errno::EOPNOTSUPP),
            Cluster::Compressed(_) => Subclusters {
                allocated: touched,
                ..Subclusters::default()
            },
            Cluster::Standard(old) if old.allocated & touched != 0 && !erase.takes_data() => {
                return Err(Errno::EOPNOTSUPP);
            }
            Cluster::Standard(old) => *old,
        };
        // What is unallocated reads as zeroes anyway when there is nothing below: enough for a discard. Who
        // asks for zeroes means them, whatever becomes the backing later.
        let marked = match (&self.backing, erase) {
            (None, Erase::Discard) => touched & (old.allocated | old.zero),
            _ => touched,
        };
        let mut new = Subclusters {
            allocated: old.allocated & !touched,
            zero: old.zero | marked,
            ..old
        };
        let unmaps = !erase.keeps_storage() && !self.keeps(erase);
        if unmaps && new.allocated == 0 && !self.is_raw_data_file() {
            new.host = None;
            new.copied = false;
        }
        Ok(new.encode(&self.geometry))
    }

    /// Does to an external data file what its content needs. False when the mapping must stay.
    ///
    /// Before the mapping changes, for a power cut may bring the old mapping back: then zeroes are read, too. Not
    /// so through a cipher, so an encrypted file's storage goes once the new mapping is durable.
    async fn erase_data(&self, range: &Range<u64>, erase: Erase) -> Result<bool, Errno> {
        let Some(data) = &self.data_file else {
            return Ok(true);
        };
        let end = range.end.min(self.disk_size());
        let bytes = ByteRange::new(range.start, end.saturating_sub(range.start));
        let is_raw = self.is_raw_data_file() && self.cipher().is_none();
        let unmaps = !erase.keeps_storage();
        let is_wanted = is_raw || self.gives_storage_up(erase);
        if bytes.length == 0 || erase.unmaps_all() || !is_wanted {
            return Ok(true);
        }
        let flags = ZeroFlags {
            may_unmap: unmaps && self.discards.request,
            // Giving space up is not worth writing for.
            no_fallback: !is_raw || erase == Erase::Discard,
            ..ZeroFlags::default()
        };
        match data.node().write_zeroes(bytes, flags).await {
            Err(Errno::EOPNOTSUPP) if erase == Erase::Discard => Ok(!is_raw),
            Err(Errno::EOPNOTSUPP) if !is_raw => Ok(true),
            result => result.map(|()| true),
        }
    }

    /// Gives up the storage of host clusters that stay mapped; in encrypted images that is durable. They are locked, so nobody writes to
    /// them; their subclusters read as zeroes already.
    async fn discard_kept(&self, kept: &[(ClusterRun, u32)]) {
        if !self.discards.request {
            return;
        }
        let geometry = &self.geometry;
        for &(run, touched) in kept {
            let HostOffset(host) = geometry.host_offset(run.first);
            let bits = geometry.subcluster_bits();
            let start = host + (u64::from(touched.trailing_zeros()) << bits);
            let end = host + (u64::from(32 - touched.leading_zeros()) << bits);
            let range = ByteRange::new(start, end - start);
            // Zeroes and not anything: a power cut may bring the old mapping back, of a range that
            // was not discarded but zeroed. Losing the space is all that a failure means.
            let flags = ZeroFlags {
                may_unmap: true,
                no_fallback: true,
                ..ZeroFlags::default()
            };
            let _ = self.file.node().write_zeroes(range, flags).await;
        }
    }
}

/// How many bytes at the start of `range` of a backing chain are known to read as zeroes.
async fn zero_length(backing: &Node, range: ByteRange) -> u64 {
    let within = backing.length().saturating_sub(range.offset);
    if within == 0 {
        return range.length;
    }
    let range = ByteRange::new(range.offset, range.length.min(within));
    match status::above(backing, None, range).await {
        Ok(above) if above.status.zero => above.length,
        _ => 0,
    }
}

/// Entry changes of one unit.
#[derive(Default)]
struct Changes {
    /// Guest bytes.
    range: Range<u64>,
    entries: SmallVec<[(GuestCluster, EntryWords); 16]>,
    freed: SmallVec<[ClusterRun; 16]>,
    /// Host clusters that stay, and the subclusters whose storage is not needed.
    kept: SmallVec<[(ClusterRun, u32); 4]>,
}

impl Changes {
    fn push(&mut self, cluster: GuestCluster, new: EntryWords, freed: Option<ClusterRun>) {
        self.entries.push((cluster, new));
        let Some(run) = freed else { return };
        match self.freed.last_mut() {
            Some(last) if last.end() == run.first.0 => last.count += run.count,
            _ => self.freed.push(run),
        }
    }

    /// The redo records, runs of equal entries as one.
    fn records(&self, pass: DiscardKind) -> SmallVec<[RedoRecord; 16]> {
        let mut records: SmallVec<[RedoRecord; 16]> = SmallVec::new();
        for &(cluster, new) in &self.entries {
            if let Some(RedoRecord::L2(run)) = records.last_mut()
                && run.extend(cluster, new, 0)
            {
                continue;
            }
            records.push(RedoRecord::L2(L2Run {
                first: cluster,
                count: 1,
                value: new,
                contiguous: false,
            }));
        }
        let freed = self.freed.iter().map(|&run| RedoRecord::Free { run, pass });
        records.extend(freed);
        records
    }
}
