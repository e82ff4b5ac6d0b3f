//! Changing the virtual size: growing (with a larger L1 table when needed) and shrinking.
//!
//! ```text
//!   grow     larger L1 table · nothing old beyond the end · preallocation · flush · size
//!   shrink   size · no mapping beyond it · flush · L2 tables beyond it · flush
//! ```
//!
//! The size in the header is one sector, written when everything that it shows is durable, so a
//! power cut leaves the old size or the new one. What a shrinking that was cut short leaves mapped
//! beyond the end goes before the disk grows again. The redo log has records of the mappings and
//! tables, none of the size: it is durable when it changes.
//!
//! Requests may run meanwhile. Nothing is mapped beyond `mappable`: it is looked at under the lock
//! of the guest clusters, which the unmapping takes too.

use super::alloc::{Contiguous, Reserved, Structure};
use super::overlap::Fixed;
use super::reclaim::DiscardKind;
use super::redo::RedoRecord;
use super::tables::{
    ClusterRun, GuestCluster, HostCluster, HostOffset, MAX_HOST_OFFSET, MAX_L1_BYTES, OFFSET_MASK,
    REFCOUNT_BLOCK_MASK,
};
use super::{Qcow2, cache, header};
use block::{ByteRange, Error, ErrorKind, Event, Mapping, Preallocation, Resize, ZeroFlags};
use executor::Errno;
use std::ops::Range;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};

impl Qcow2 {
    /// Bytes of the virtual disk.
    pub(super) fn disk_size(&self) -> u64 {
        self.virtual_size.load(Acquire)
    }

    /// Whether the guest cluster at `offset` may get a mapping. Asked under its lock.
    pub(super) fn may_map(&self, offset: u64) -> Result<(), Errno> {
        let of_disk = offset < self.mappable.load(Acquire);
        let of_state =
            offset >= self.machine_state_start() && offset < self.machine_state_end.load(Acquire);
        match of_disk || of_state {
            true => Ok(()),
            false => Err(Errno::EINVAL),
        }
    }

    /// Where saved machine state begins: behind everything that the disk's L1 entries map.
    pub(super) fn machine_state_start(&self) -> u64 {
        let geometry = &self.geometry;
        geometry.l1_entries_for(self.disk_size()) * geometry.l1_entry_coverage()
    }

    /// Lets machine state up to `end` be mapped.
    pub(super) async fn reserve_state(&self, end: u64) -> Result<(), Errno> {
        self.check_writable()?;
        let _alone = self.snapshotting.lock().await;
        let grown = self.grow_l1(end).await;
        grown.map_err(|error| error.errno.unwrap_or(Errno::EIO))?;
        self.machine_state_end.fetch_max(end, AcqRel);
        Ok(())
    }

    pub(super) async fn resize_disk(&self, resize: Resize) -> Result<(), Error> {
        let failed = |errno| Error::io("Could not resize the image", errno);
        self.check_writable().map_err(failed)?;
        if !resize.length.is_multiple_of(512) {
            let message = "The new size must be a multiple of 512";
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        let _alone = self.snapshotting.lock().await;
        let old = self.disk_size();
        let has_snapshots = !self.state().snapshots.entries.is_empty();
        if has_snapshots && self.header.version < 3 {
            let message = "Can't resize a v2 image which has snapshots";
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        self.check_bitmaps_resizable()?;
        // What was machine state may become a part of the disk.
        self.machine_state_end.store(0, Release);
        self.flush_metadata().await.map_err(failed)?;
        match resize.length.cmp(&old) {
            std::cmp::Ordering::Less => {
                self.shrink(resize.length).await.map_err(failed)?;
                self.resize_data_file(resize.length, resize).await
            }
            std::cmp::Ordering::Equal => Ok(()),
            std::cmp::Ordering::Greater => self.grow(old..resize.length, resize).await,
        }
    }

    async fn grow(&self, added: Range<u64>, resize: Resize) -> Result<(), Error> {
        let failed = |errno| Error::io("Could not resize the image", errno);
        self.grow_l1(added.end).await?;
        self.mappable.store(added.end, Release);
        let grown = self.fill_added(&added, resize.preallocation).await;
        let grown = match grown {
            Ok(()) => self.set_size(added.end).await.map_err(failed),
            Err(error) => Err(error),
        };
        if grown.is_err() {
            self.mappable.store(added.start, Release);
        }
        grown
    }

    /// Sees to it that the new part reads as zeroes, and is allocated as asked for.
    async fn fill_added(
        &self,
        added: &Range<u64>,
        preallocation: Preallocation,
    ) -> Result<(), Error> {
        let failed = |errno| Error::io("Failed to zero the new area", errno);
        let cluster_size = self.geometry.cluster_size();
        let start = added.start.next_multiple_of(cluster_size);
        let end = added.end.next_multiple_of(cluster_size);
        if start < end {
            let clusters = self.geometry.guest_cluster(start)..self.geometry.guest_cluster(end);
            self.unmap(clusters).await.map_err(failed)?;
        }
        let resize = Resize {
            length: added.end,
            preallocation,
        };
        self.resize_data_file(added.start, resize).await?;
        let backed = self.backing.as_ref();
        let backed = backed.map_or(0, |backing| backing.node().length());
        let mut at = start;
        // Version 2 has no zero clusters: there the caller writes zeroes afterwards.
        while at < backed.min(end) && self.geometry.zero_clusters {
            let range = ByteRange::new(
                at,
                (end - at).min(backed.next_multiple_of(cluster_size) - at),
            );
            at += self
                .zero(range, ZeroFlags::default())
                .await
                .map_err(failed)?;
        }
        if preallocation != Preallocation::Off || self.is_raw_data_file() {
            let start = match self.is_tail_unmapped(added.start).await.map_err(failed)? {
                true => added.start / cluster_size * cluster_size,
                false => start,
            };
            self.preallocate(start..added.end, preallocation).await?;
        }
        self.flush_metadata().await.map_err(failed)
    }

    /// Whether the disk's last cluster, of which growing uses the rest, holds nothing and shows nothing.
    async fn is_tail_unmapped(&self, old: u64) -> Result<bool, Errno> {
        if self.backing.is_some() || old.is_multiple_of(self.geometry.cluster_size()) {
            return Ok(false);
        }
        let tail = self.resolve_mapping(ByteRange::new(old, 1)).await?;
        Ok(tail.mapping == Mapping::Unallocated && !self.geometry.extended_l2)
    }

    async fn set_size(&self, length: u64) -> Result<(), Errno> {
        let field = header::field::SIZE as u64;
        self.write_bytes(field, &length.to_be_bytes()).await?;
        self.file.node().flush().await?;
        self.virtual_size.store(length, Release);
        Ok(())
    }

    async fn shrink(&self, length: u64) -> Result<(), Errno> {
        let cluster_size = self.geometry.cluster_size();
        let old = self.disk_size();
        let first = GuestCluster(length.div_ceil(cluster_size));
        // Saved machine state goes with its L2 tables.
        let end = GuestCluster(self.l1.len() << self.geometry.l2_bits());
        self.mappable.store(length, Release);
        if let Err(errno) = self.set_size(length).await {
            self.mappable.store(old, Release);
            return Err(errno);
        }
        self.unmap(first..end).await?;
        self.flush_metadata().await?;
        self.drop_l2_tables(self.geometry.l1_entries_for(length))
            .await?;
        self.flush_metadata().await?;
        self.shrunk.store(true, Relaxed);
        Ok(())
    }

    /// Frees the L2 tables from an L1 entry on. They map nothing, nothing can be mapped in them,
    /// and none of their slices is dirty.
    pub(super) async fn drop_l2_tables(&self, first_index: u64) -> Result<(), Errno> {
        let _structure = self.structure.lock().await;
        for index in first_index..self.l1.len() {
            let table = self.l1.entry(index) & OFFSET_MASK;
            if table == 0 {
                continue;
            }
            let run = ClusterRun {
                first: self.geometry.host_cluster(HostOffset(table)),
                count: 1,
            };
            let pass = DiscardKind::Other;
            let records = [
                RedoRecord::L1 { index, value: 0 },
                RedoRecord::Free { run, pass },
            ];
            let changed = self.log_change(&records, |state| {
                self.set_l1(state, index, 0);
                state.free(run, pass);
            });
            changed.await?;
        }
        Ok(())
    }

    /// Lets the file end where its last cluster does. Storage behind the data is not written when the
    /// file ends there.
    pub(super) async fn complete_last_cluster(&self) -> Result<(), Errno> {
        let (node, end) = (self.file.node(), self.plain_end.load(Relaxed));
        if !node.grows() || node.length() >= end || self.shrunk.load(Relaxed) {
            return Ok(());
        }
        let resize = Resize::to(end);
        let completed = node.resize(resize).await;
        completed.map_err(|error| error.errno.unwrap_or(Errno::EIO))
    }

    /// Cuts the file off behind the last cluster that is counted. The image is being closed.
    pub(super) async fn trim_file(&self) -> Result<(), Errno> {
        let structure = self.structure.lock().await;
        let length = self.file.node().length();
        let mut clusters = length.div_ceil(self.geometry.cluster_size());
        let mut pins = super::alloc::Pins::default();
        loop {
            clusters = self.end_of_refcount_blocks(clusters);
            let Some(last) = clusters.checked_sub(1).map(HostCluster) else {
                break;
            };
            let counted = self.refcount(&self.state(), last);
            match counted {
                Ok(0) => clusters -= 1,
                Ok(_) => break,
                Err(need) => self.provide(&structure, need, &mut pins).await?,
            }
        }
        let end = clusters << self.geometry.cluster_bits;
        if end >= length {
            return Ok(());
        }
        let resize = Resize::to(end);
        let trimmed = self.file.node().resize(resize).await;
        trimmed.map_err(|error| error.errno.unwrap_or(Errno::EIO))
    }

    /// `clusters`, or where the last refcount block below it ends: a sparse file may be much longer.
    fn end_of_refcount_blocks(&self, clusters: u64) -> u64 {
        let state = self.state();
        let entries = &state.refcount_table.entries;
        let covering = clusters.div_ceil(1 << self.geometry.refcount_block_bits());
        let known = &entries[..entries.len().min(covering as usize)];
        let last = known
            .iter()
            .rposition(|entry| entry & REFCOUNT_BLOCK_MASK != 0);
        let end = last.map_or(0, |last| {
            (last as u64 + 1) << self.geometry.refcount_block_bits()
        });
        clusters.min(end)
    }

    /// Makes the L1 table large enough for `length` bytes.
    async fn grow_l1(&self, length: u64) -> Result<(), Error> {
        let geometry = &self.geometry;
        let needed = geometry.l1_entries_for(length);
        let slices_per_table = 1 << (geometry.cluster_bits - geometry.l2_slice_bits);
        if needed * 8 > MAX_L1_BYTES || needed * slices_per_table > cache::MAX_SLICES {
            return Err(Error::io("Failed to grow the L1 table", Errno::EFBIG));
        }
        if needed <= self.l1.len() {
            return Ok(());
        }
        let moved = self.move_l1(needed).await;
        moved.map_err(|errno| Error::io("Failed to grow the L1 table", errno))
    }

    async fn move_l1(&self, entries: u64) -> Result<(), Errno> {
        let geometry = &self.geometry;
        let structure = self.structure.lock().await;
        self.event(Event::L1GrowAllocTable).await;
        let clusters = (entries * 8).div_ceil(geometry.cluster_size());
        let Contiguous {
            run,
            parts,
            skipped,
        } = self.allocate_contiguous(&structure, clusters).await?;
        skipped.into_iter().for_each(Reserved::give_back);
        self.flush_metadata().await?;
        let mut bytes: Vec<u8> = self.l1.iter().flat_map(u64::to_be_bytes).collect();
        bytes.resize((clusters << geometry.cluster_bits) as usize, 0);
        let offset = geometry.host_offset(run.first);
        self.event(Event::L1GrowWriteTable).await;
        self.write_bytes(offset.0, &bytes).await?;
        self.file.node().flush().await?;
        self.event(Event::L1GrowActivateTable).await;
        let mut field = (entries as u32).to_be_bytes().to_vec();
        field.extend_from_slice(&offset.0.to_be_bytes());
        let at = header::field::L1_SIZE as u64;
        self.write_bytes(at, &field).await?;
        self.file.node().flush().await?;
        let mut state = self.state();
        let old = ClusterRun {
            first: geometry.host_cluster(state.l1_offset),
            count: (self.l1.len() * 8).div_ceil(geometry.cluster_size()),
        };
        state.l1_offset = offset;
        state.metadata.move_fixed(Fixed::L1Table, run);
        parts.into_iter().for_each(Reserved::keep);
        self.l1.grow(entries);
        if old.count != 0 {
            state.free(old, DiscardKind::Other);
        }
        Ok(())
    }

    /// Exactly `count` contiguous clusters, all or nothing.
    pub(super) async fn allocate_contiguous(
        &self,
        structure: &Structure<'_>,
        count: u64,
    ) -> Result<Contiguous<'_>, Errno> {
        let mut held: Vec<Reserved<'_>> = Vec::new();
        match self.extend_to(count, structure, &mut held).await {
            Ok(run) => {
                let clusters = run.first.0..run.end();
                let (parts, skipped) = held
                    .into_iter()
                    .partition(|part| clusters.contains(&part.run().first.0));
                Ok(Contiguous {
                    run,
                    parts,
                    skipped,
                })
            }
            Err(errno) => {
                held.into_iter().for_each(Reserved::give_back);
                Err(errno)
            }
        }
    }

    /// Allocates until the last parts of `held` are `count` clusters in one piece.
    async fn extend_to<'q>(
        &'q self,
        count: u64,
        structure: &Structure<'_>,
        held: &mut Vec<Reserved<'q>>,
    ) -> Result<ClusterRun, Errno> {
        let most = MAX_HOST_OFFSET >> self.geometry.cluster_bits;
        let is_long = self.needs_cover(count);
        let mut whole: Option<ClusterRun> = None;
        loop {
            if is_long && whole.is_none() {
                self.cover(structure, count).await?;
            }
            let want = count - whole.map_or(0, |run| run.count);
            let (run, _) = self.allocate_in(structure, want).await?;
            held.push(Reserved::new(self, run));
            if run.end() > most {
                return Err(Errno::EFBIG);
            }
            let longer = match whole {
                Some(before) if before.end() == run.first.0 => ClusterRun {
                    first: before.first,
                    count: before.count + run.count,
                },
                _ => run,
            };
            if longer.count == count {
                return Ok(longer);
            }
            let first = longer.first;
            let goes_on = !is_long || self.is_covered(ClusterRun { first, count });
            whole = goes_on.then_some(longer);
        }
    }

    /// The run of clusters that `bytes` from a cluster boundary take.
    pub(super) fn clusters_of(&self, offset: HostOffset, bytes: u64) -> ClusterRun {
        let first = self.geometry.host_cluster(offset);
        ClusterRun {
            first: HostCluster(first.0),
            count: bytes.div_ceil(self.geometry.cluster_size()),
        }
    }
}
