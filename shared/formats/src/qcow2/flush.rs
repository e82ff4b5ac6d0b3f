//! Writing metadata back in order.
//!
//! ```text
//!   copy what is dirty, note the redo log's mark           (under the state lock)
//!   1 refcount blocks, or the mark that they stay in memory (lazy.rs)
//!                          2 flush: data (its own file first), refcounts and new tables are durable
//!   3 refcount table, flush (only when it changed)
//!   4 L2 tables            5 flush
//!   6 L1 table, flush      (only when it changed)
//!   reset the redo log to the mark; clusters freed before the copy are reclaimable
//! ```
//!
//! What is written is the copy, not the present content: an entry made meanwhile refers to data
//! that step 2 did not cover. Slices stay in the cache until their copy is written. One flush runs
//! at a time; those that waited share the result of one that began after they asked.

use super::cache::{DirtySlice, TableCache};
use super::lazy::Scope;
use super::reclaim::{Freed, RECLAIM_PER_FLUSH, Requests};
use super::tables::{HostOffset, OFFSET_MASK};
use super::{Qcow2, SECTOR, State};
use block::redo_log::Mark;
use block::{Event, IoFuture, WriteFlags};
use executor::{Buffer, Errno};
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use std::task::Poll;

/// Most writes of one step in flight at once.
const MAX_WRITES: usize = 32;

/// What flushes leave for those that wait.
#[derive(Default)]
pub(super) struct FlushHistory {
    /// Number of the last flush that succeeded.
    completed: u64,
    /// Number of the last one that left nothing in memory.
    wrote_everything: u64,
}

/// What one flush writes.
struct Snapshot<'q> {
    image: &'q Qcow2,
    /// Refcounts stay in memory, and nothing in the file says so yet.
    marks: bool,
    refcounts: Vec<DirtySlice>,
    refcount_table: Sectors,
    l2: Vec<DirtySlice>,
    l1: Sectors,
    freed: Vec<Freed>,
    mark: Mark,
    number: u64,
    success: bool,
}

/// Sectors of a table: their numbers and contents.
#[derive(Default)]
struct Sectors {
    table: u64,
    sectors: Vec<(u64, Vec<u8>)>,
}

impl Qcow2 {
    /// Whether there is metadata that a flush of this scope would write.
    pub(super) fn is_metadata_dirty(&self, scope: Scope) -> bool {
        let state = self.state();
        let may_stay = scope == Scope::Mapping && self.lazy.is_durably_marked();
        self.l2.dirty_count() != 0
            || (self.refcounts.dirty_count() != 0 && !may_stay)
            || !state.l1_dirty.is_empty()
            || !state.refcount_table.dirty.is_empty()
            || !state.freed.is_empty()
            || state.flush_under_way
            || self.health.failed.load(Acquire)
    }

    /// Makes all data and metadata of requests completed before the call durable.
    pub(super) async fn flush_metadata(&self) -> Result<(), Errno> {
        self.flush_scope(Scope::Everything).await
    }

    /// [`Qcow2::flush_metadata`], or only what a power cut and a kill would lose.
    pub(super) async fn flush_scope(&self, scope: Scope) -> Result<(), Errno> {
        let begun = self.state().flushes;
        let mut history = self.flushing.lock().await;
        let shared = match scope {
            Scope::Everything => history.wrote_everything,
            Scope::Mapping => history.completed,
        };
        if shared > begun {
            return Ok(());
        }
        if self.health.failed.load(Acquire) {
            return Err(Errno::EIO);
        }
        let leaves_refcounts =
            scope == Scope::Mapping && self.lazy.is_on() && !self.refcounts.is_half_dirty();
        let mut snapshot = self.take_snapshot(leaves_refcounts);
        // What fills up from here on belongs to the next flush, which may be asked for.
        self.early_flush.store(false, Release);
        let result = snapshot.write().await;
        match result {
            Ok(()) => {
                history.completed = snapshot.number;
                if !leaves_refcounts {
                    history.wrote_everything = snapshot.number;
                }
                snapshot.success = true;
            }
            Err(Errno::ENOSPC | Errno::EDQUOT) => {}
            Err(errno) => {
                tracing::warn!(%errno, "qcow2 metadata not written; flushes fail from now on");
                self.health.failed.store(true, Release);
            }
        }
        result
    }

    /// Sees to it that caches and redo log can take a change. At half it has a flush begun beside
    /// the requests; only when that does not keep up a writer waits for one.
    pub(super) async fn make_room(&self) -> Result<(), Errno> {
        let caches = [&self.l2, &self.refcounts];
        let half_full = self.log.is_half_full() || caches.iter().any(|cache| cache.is_half_dirty());
        if half_full && !self.early_flush.swap(true, AcqRel) {
            block::upkeep::want();
        }
        if caches.iter().any(|cache| cache.is_mostly_dirty()) {
            self.stalls.fetch_add(1, Relaxed);
            self.flush_scope(Scope::Mapping).await?;
        }
        Ok(())
    }

    /// The flush that [`Qcow2::make_room`] asked for.
    pub(super) async fn flush_early(&self) -> Result<(), Errno> {
        if !self.early_flush.load(Acquire) {
            return Ok(());
        }
        self.flush_scope(Scope::Mapping).await?;
        self.reclaim(Requests::MayRun, RECLAIM_PER_FLUSH).await;
        Ok(())
    }

    fn take_snapshot(&self, leaves_refcounts: bool) -> Snapshot<'_> {
        let mut state = self.state();
        let state = &mut *state;
        state.flushes += 1;
        state.flush_under_way = true;
        let table = &mut state.refcount_table;
        let refcount_table = Sectors {
            table: table.offset.0,
            sectors: std::mem::take(&mut table.dirty)
                .into_iter()
                .map(|sector| {
                    let first = (sector * SECTOR / 8) as usize;
                    let words = table.entries.iter().skip(first).take((SECTOR / 8) as usize);
                    (sector, words.flat_map(|word| word.to_be_bytes()).collect())
                })
                .collect(),
        };
        let l1 = Sectors {
            table: state.l1_offset.0,
            sectors: std::mem::take(&mut state.l1_dirty)
                .into_iter()
                .map(|sector| (sector, self.l1_sector(sector)))
                .collect(),
        };
        Snapshot {
            image: self,
            marks: leaves_refcounts
                && self.refcounts.dirty_count() != 0
                && !self.lazy.is_durably_marked(),
            refcounts: match leaves_refcounts {
                true => Vec::new(),
                false => self.refcounts.take_dirty(),
            },
            refcount_table,
            l2: self.l2.take_dirty(),
            l1,
            freed: std::mem::take(&mut state.freed),
            mark: self.log.mark(),
            number: state.flushes,
            success: false,
        }
    }

    fn l1_sector(&self, sector: u64) -> Vec<u8> {
        let first = sector * SECTOR / 8;
        let end = (first + SECTOR / 8).min(self.l1.len());
        (first..end)
            .flat_map(|index| self.l1.entry(index).to_be_bytes())
            .collect()
    }

    /// Where a refcount slice is on disk. Its block exists: the slice was loaded from it.
    pub(super) fn refcount_slice_place(&self, state: &State, index: u64) -> HostOffset {
        let table_index = self.geometry.refcount_table_index_of_slice(index);
        let block = state.refcount_table.block(table_index);
        HostOffset(block + self.geometry.refcount_slice_offset(index))
    }

    fn l2_slice_place(&self, index: u64) -> HostOffset {
        let table = self.l1.entry(self.geometry.l1_index_of_slice(index)) & OFFSET_MASK;
        HostOffset(table + self.geometry.l2_slice_offset(index))
    }

    /// Writes dirty slices of a cache, several at once, in order of place. Each is copied when its
    /// turn comes.
    async fn write_slices(
        &self,
        cache: &TableCache,
        mut slices: Vec<(HostOffset, &DirtySlice)>,
    ) -> Result<(), Errno> {
        slices.sort_unstable_by_key(|(place, _)| *place);
        for batch in slices.chunks(MAX_WRITES) {
            let copies: Vec<(u64, Vec<u8>)> = batch
                .iter()
                .map(|(place, slice)| (place.0, cache.copy(slice)))
                .collect();
            let pieces = copies.iter().map(|(place, bytes)| (*place, &bytes[..]));
            self.write_pieces(pieces.collect()).await?;
        }
        Ok(())
    }

    /// Writes pieces of metadata, several at once, in order of place.
    async fn write_pieces(&self, mut pieces: Vec<(u64, &[u8])>) -> Result<(), Errno> {
        pieces.sort_unstable_by_key(|(offset, _)| *offset);
        for batch in pieces.chunks(MAX_WRITES) {
            let writes = batch.iter().map(|(offset, bytes)| {
                let buffer = Buffer::zeroed(bytes.len());
                buffer.copy_from_slice(bytes);
                let node = self.file.node();
                node.write(*offset, buffer, WriteFlags::default())
            });
            join(writes.collect()).await?;
        }
        Ok(())
    }
}

impl Snapshot<'_> {
    async fn write(&self) -> Result<(), Errno> {
        let image = self.image;
        let file = image.file.node();
        let refcounts = {
            let state = image.state();
            let place = |slice: &DirtySlice| image.refcount_slice_place(&state, slice.index);
            let slices = self.refcounts.iter();
            slices.map(|slice| (place(slice), slice)).collect()
        };
        if !self.refcounts.is_empty() {
            image.event(Event::RefblockUpdatePart).await;
        }
        image.write_slices(&image.refcounts, refcounts).await?;
        if self.marks {
            image.mark_dirty().await?;
        }
        image.event(Event::FlushToDisk).await;
        if let Some(data) = &image.data_file {
            data.node().flush().await?;
        }
        file.flush().await?;
        if self.marks {
            image.lazy.mark_is_durable();
        }
        if !self.refcount_table.sectors.is_empty() {
            image.event(Event::ReftableUpdate).await;
            image.write_pieces(self.refcount_table.pieces()).await?;
            file.flush().await?;
        }
        if !self.l2.is_empty() {
            let l2 = self.l2.iter();
            let slices = l2.map(|slice| (image.l2_slice_place(slice.index), slice));
            image.event(Event::L2Update).await;
            image.write_slices(&image.l2, slices.collect()).await?;
            file.flush().await?;
        }
        if !self.l1.sectors.is_empty() {
            image.event(Event::L1Update).await;
            image.write_pieces(self.l1.pieces()).await?;
            file.flush().await?;
        }
        Ok(())
    }
}

impl Sectors {
    fn pieces(&self) -> Vec<(u64, &[u8])> {
        let place = |sector: u64| self.table + sector * SECTOR;
        let sectors = self.sectors.iter();
        sectors
            .map(|(sector, bytes)| (place(*sector), bytes.as_slice()))
            .collect()
    }
}

/// Ends the flush: what was not written is dirty again, also when the flush was dropped half-way.
impl Drop for Snapshot<'_> {
    fn drop(&mut self) {
        let image = self.image;
        let mut state = image.state();
        state.flush_under_way = false;
        let freed = std::mem::take(&mut self.freed);
        if self.success {
            state.reclaimable.extend(freed);
            if !image.health.replaying.load(Acquire) {
                image.log.reset(self.mark);
            }
        } else {
            state.freed.extend(freed);
            let numbers = |sectors: &Sectors| -> Vec<u64> {
                sectors.sectors.iter().map(|(number, _)| *number).collect()
            };
            state.l1_dirty.extend(numbers(&self.l1));
            state
                .refcount_table
                .dirty
                .extend(numbers(&self.refcount_table));
        }
        for slice in &self.refcounts {
            image.refcounts.written(slice, self.success);
        }
        for slice in &self.l2 {
            image.l2.written(slice, self.success);
        }
    }
}

/// Awaits all of `futures`; answers with the first failure after all have ended.
async fn join(mut futures: Vec<IoFuture<'_>>) -> Result<(), Errno> {
    let mut result = Ok(());
    poll_fn(|context| {
        futures.retain_mut(|future| match Pin::new(future).poll(context) {
            Poll::Ready(outcome) => {
                result = result.and(outcome);
                false
            }
            Poll::Pending => true,
        });
        if futures.is_empty() {
            Poll::Ready(result)
        } else {
            Poll::Pending
        }
    })
    .await
}
