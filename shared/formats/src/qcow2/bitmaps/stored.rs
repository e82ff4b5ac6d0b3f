//! Bits on disk: loading, storing, removing.
//!
//! ```text
//!   close   data · tables · directory at new places ─► flush (data, refcounts) ─► extension ─► old freed
//! ```
//!
//! Until the extension is switched, the file has the old directory, in which every bitmap is in
//! use: whoever finds it after a crash does not rely on any. Old clusters are freed as after any
//! other change, once the switch is durable.

use super::directory::{self, Entry, FLAGS_AT, flag};
use super::{Extension, Stored};
use crate::qcow2::alloc::{Contiguous, Reserved};
use crate::qcow2::overlap::Fixed;
use crate::qcow2::reclaim::DiscardKind;
use crate::qcow2::tables::{ClusterRun, HostOffset, MAX_HOST_OFFSET, OFFSET_MASK};
use crate::qcow2::{Qcow2, State, read_bytes};
use block::bitmap::DirtyBitmap;
use block::{ByteRange, Errno, Error};
use std::sync::Arc;

/// A table entry without a cluster: everything is dirty.
const ALL_DIRTY: u64 = 1;

/// Clusters written and not referred to yet.
#[derive(Default)]
struct New<'q>(Vec<Reserved<'q>>);

impl Qcow2 {
    /// Bytes that the bits of a bitmap fill.
    fn bitmap_bytes(bitmap: &DirtyBitmap) -> u64 {
        bitmap.granules().div_ceil(8)
    }

    async fn bitmap_table(&self, entry: &Entry) -> Result<Vec<u64>, Errno> {
        let length = entry.table_entries as usize * 8;
        let bytes = read_bytes(&self.file, entry.table_offset.0, length).await?;
        let words = bytes.chunks_exact(8);
        Ok(words
            .map(|word| u64::from_be_bytes(word.try_into().expect("chunks of eight bytes")))
            .collect())
    }

    /// Adds the stored bits to `bitmap`.
    pub(super) async fn load_bits(&self, entry: &Entry, bitmap: &DirtyBitmap) -> Result<(), Error> {
        let failed = |errno: Errno| Error::io("bitmap data", errno);
        let cluster_size = self.geometry.cluster_size();
        let bytes = Self::bitmap_bytes(bitmap);
        if bytes.div_ceil(cluster_size) != u64::from(entry.table_entries) {
            return Err(super::corrupt("the table does not fit the disk"));
        }
        let table = self.bitmap_table(entry).await.map_err(failed)?;
        for (number, word) in (0..).zip(table) {
            let start = number * cluster_size;
            let length = (bytes - start).min(cluster_size) as usize;
            let data = match word {
                0 => continue,
                ALL_DIRTY => vec![0xff; length],
                place
                    if place & !OFFSET_MASK != 0
                        || !self.geometry.is_aligned(place)
                        || place >= MAX_HOST_OFFSET =>
                {
                    return Err(super::corrupt(format!("invalid table entry {place:#x}")));
                }
                place => read_bytes(&self.file, place, length)
                    .await
                    .map_err(failed)?,
            };
            bitmap.add_bytes(start / 8, &data);
        }
        Ok(())
    }

    /// Marks every stored bitmap as in use, durably.
    pub(super) async fn mark_in_use(&self) -> Result<(), Errno> {
        let (mut at, mut places) = {
            let stored = self.bitmaps.stored();
            (stored.offset.0, Vec::with_capacity(stored.entries.len()))
        };
        for entry in &mut self.bitmaps.stored().entries {
            if entry.flags & flag::IN_USE == 0 {
                entry.flags |= flag::IN_USE;
                places.push((at + FLAGS_AT, entry.flags));
            }
            at += entry.encoded_length();
        }
        for (place, flags) in &places {
            self.write_bytes(*place, &flags.to_be_bytes()).await?;
        }
        match places.is_empty() {
            true => Ok(()),
            false => self.file.node().flush().await,
        }
    }

    /// Stores every persistent bitmap. No request is under way.
    pub(in super::super) async fn store_bitmaps(&self) -> Result<(), Errno> {
        let _changing = self.bitmaps.changing.lock().await;
        let list = self.bitmaps.set.list();
        let is_stored = |bitmap: &&Arc<DirtyBitmap>| {
            bitmap.is_persistent() && !bitmap.is_inconsistent() && !bitmap.is_read_only()
        };
        let persistent: Vec<_> = list.iter().filter(is_stored).cloned().collect();
        if persistent.is_empty() {
            return Ok(());
        }
        let mut entries = self.bitmaps.stored().entries.clone();
        let mut new = New::default();
        let mut old = Vec::new();
        let written = self
            .write_bitmaps(&persistent, &mut entries, (&mut new, &mut old))
            .await;
        match written {
            Ok(()) => self.replace_directory(entries, new, old).await,
            Err(errno) => {
                new.0.into_iter().for_each(Reserved::give_back);
                Err(errno)
            }
        }
    }

    async fn write_bitmaps<'q>(
        &'q self,
        bitmaps: &[Arc<DirtyBitmap>],
        entries: &mut Vec<Entry>,
        (new, old): (&mut New<'q>, &mut Vec<ClusterRun>),
    ) -> Result<(), Errno> {
        for bitmap in bitmaps {
            let (table_offset, table_entries) = self.write_bits(bitmap, new).await?;
            let recording = if bitmap.is_recorded() { flag::AUTO } else { 0 };
            let known = entries
                .iter()
                .position(|entry| entry.name == bitmap.name().as_bytes());
            let known = known.map(|index| entries.remove(index));
            if let Some(entry) = &known {
                old.extend(self.bitmap_runs(entry).await?);
            }
            let (extra, compatible) = known.map_or((Vec::new(), 0), |entry| {
                (entry.extra, entry.flags & flag::EXTRA_DATA_COMPATIBLE)
            });
            entries.push(Entry {
                table_offset,
                table_entries,
                flags: recording | compatible,
                granularity_bits: bitmap.granularity().trailing_zeros() as u8,
                extra,
                name: bitmap.name().as_bytes().to_vec(),
            });
        }
        Ok(())
    }

    /// Writes the bits of a bitmap and their table; answers with the table's place and entries.
    async fn write_bits<'q>(
        &'q self,
        bitmap: &DirtyBitmap,
        new: &mut New<'q>,
    ) -> Result<(HostOffset, u32), Errno> {
        let cluster_size = self.geometry.cluster_size();
        let clusters = Self::bitmap_bytes(bitmap).div_ceil(cluster_size);
        let mut table = Vec::with_capacity(clusters as usize * 8);
        // Bytes of the disk that a cluster of bits stands for.
        let span = cluster_size * 8 * u64::from(bitmap.granularity());
        for number in 0..clusters {
            let part = ByteRange::new(number * span, span);
            let word = match bitmap.next_dirty(part) {
                None => 0,
                Some(_) => {
                    let bits = bitmap.to_bytes(number * cluster_size / 8, cluster_size / 8);
                    self.write_clusters(&bits, new).await?.0
                }
            };
            table.extend_from_slice(&word.to_be_bytes());
        }
        if table.is_empty() {
            return Ok((HostOffset(0), 0));
        }
        let offset = self.write_clusters(&table, new).await?;
        Ok((offset, clusters as u32))
    }

    /// Writes bytes to contiguous clusters of their own, whose rest has no meaning.
    async fn write_clusters<'q>(
        &'q self,
        bytes: &[u8],
        new: &mut New<'q>,
    ) -> Result<HostOffset, Errno> {
        let count = (bytes.len() as u64).div_ceil(self.geometry.cluster_size());
        let Contiguous {
            run,
            parts,
            skipped,
        } = {
            let structure = self.structure.lock().await;
            self.allocate_contiguous(&structure, count).await?
        };
        skipped.into_iter().for_each(Reserved::give_back);
        new.0.extend(parts);
        let offset = self.geometry.host_offset(run.first);
        self.write_bytes(offset.0, bytes).await?;
        Ok(offset)
    }

    /// Makes the file have `entries`, whose bits are in `new`; `old` clusters are no longer used.
    async fn replace_directory<'q>(
        &'q self,
        entries: Vec<Entry>,
        mut new: New<'q>,
        mut old: Vec<ClusterRun>,
    ) -> Result<(), Errno> {
        let bytes = directory::encode(&entries);
        let mut stored = Stored {
            length: bytes.len() as u64,
            ..Stored::default()
        };
        let written = async {
            if !bytes.is_empty() {
                stored.offset = self.write_clusters(&bytes, &mut new).await?;
            }
            // The refcounts of all this are durable before anything refers to it.
            self.flush_metadata().await
        };
        if let Err(errno) = written.await {
            new.0.into_iter().for_each(Reserved::give_back);
            return Err(errno);
        }
        let extension = (!entries.is_empty()).then_some(Extension {
            count: entries.len() as u32,
            length: stored.length,
            offset: stored.offset,
        });
        // From here on the file may refer to the new clusters, whatever is reported.
        new.0.into_iter().for_each(Reserved::keep);
        self.switch_extension(extension).await?;
        stored.entries = entries;
        let before = std::mem::replace(&mut *self.bitmaps.stored(), stored.clone());
        old.push(self.clusters_of(before.offset, before.length));
        let mut state = self.state();
        let place = self.clusters_of(stored.offset, stored.length);
        state.metadata.move_fixed(Fixed::BitmapDirectory, place);
        old.into_iter()
            .filter(|run| run.count != 0)
            .for_each(|run| state.free(run, DiscardKind::Other));
        Ok(())
    }

    /// See [`block::BitmapStore::remove`].
    pub(super) async fn remove_bitmap(&self, name: &str) -> Result<(), Error> {
        let failed =
            |errno| Error::io(format!("Failed to remove bitmap '{name}' from file"), errno);
        let _changing = self.bitmaps.changing.lock().await;
        let mut entries = self.bitmaps.stored().entries.clone();
        let Some(index) = self.bitmaps.stored().position(name) else {
            return Ok(());
        };
        self.check_writable().map_err(failed)?;
        let entry = entries.remove(index);
        let old = self.bitmap_runs(&entry).await.map_err(failed)?;
        let replaced = self.replace_directory(entries, New::default(), old).await;
        replaced.map_err(failed)
    }

    /// The clusters of a bitmap's table and data.
    async fn bitmap_runs(&self, entry: &Entry) -> Result<Vec<ClusterRun>, Errno> {
        let table = self.bitmap_table(entry).await?;
        let data = table.into_iter().filter(|word| word & OFFSET_MASK != 0);
        let data = data.map(|word| self.clusters_of(HostOffset(word & OFFSET_MASK), 1));
        let mut runs: Vec<_> = data.collect();
        runs.push(self.clusters_of(entry.table_offset, u64::from(entry.table_entries) * 8));
        Ok(runs)
    }

    /// The place of the directory.
    pub(in super::super) fn map_bitmaps(&self, state: &mut State) {
        let stored = self.bitmaps.stored();
        let run = self.clusters_of(stored.offset, stored.length);
        state.metadata.add_fixed(Fixed::BitmapDirectory, run);
    }
}
