//! Formats with one level of mapping: a disk of blocks of one size, and for each block an entry that says
//! where in the file it is.
//!
//! ```text
//!   Layout: what is special to the format        Blocks<Layout>: a `block::Format`
//!     shape, mapping of an entry        ◄────────  look-ups, merged into long extents
//!     reserve a place, map a block      ◄────────  prepare, commit, abort; who may write where
//!     check, describe, flush, close     ◄────────
//! ```
//!
//! A block gets its place with the first write to it, and keeps it. The order, which [`Layout`] may not
//! weaken:
//!
//! ```text
//!   reserve(place) → data → flush, unless the place is fresh → map_block → the write completes
//! ```
//!
//! A fresh place was never written and reads as zeroes, so a power cut shows zeroes or what was written
//! there, in whatever order things reach the disk. Around what is written to any other place zeroes are
//! written, too, and all that is durable before the map refers to it; so is a block that showed a backing
//! file, with the rest of what it showed. When `map_block` fails, the map in the
//! file may refer to the place or not: it stays that block's own (`places.rs`).
//!
//! Owns: the map in memory, a lock for each block that is being allocated, the places. Discards change
//! nothing; zeroes change what is mapped only. Must not know: how entries, headers and files look.

mod map;
mod places;

pub(crate) use map::{BlockMap, Entry};

use block::format::{Extent, Fill, Format, Lookup, Mapping, WritePlan};
use block::{
    ByteRange, CheckOptions, CheckResult, CheckSink, Edge, Errno, Error, Limits, Resize, ZeroFlags,
};
use executor::sync::{RangeGuard, RangeLock};
use places::{Known, Place, Places};
use serde_json::{Map, Value};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The numbers of an image that do not change while it is open. All in bytes but for `max_places`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    /// Length of the disk.
    pub(crate) disk_bytes: u64,
    /// Length of a block, at most `u32::MAX`; the last one may end behind the disk.
    pub(crate) block_bytes: u64,
    /// What a place has before the block's content: a bitmap of its sectors, say.
    pub(crate) lead_bytes: u64,
    /// Where the first place begins. Entries may lead elsewhere, but nothing new goes there.
    pub(crate) first_place: u64,
    /// Places are counted up to this.
    pub(crate) max_places: u32,
    /// New places, gaps apart, begin here or later.
    pub(crate) first_free: u64,
    /// Nothing was ever written from here on.
    pub(crate) written: u64,
    /// Gaps between blocks are free, and taken first; otherwise they may hold what the map does not tell.
    pub(crate) fills_gaps: bool,
}

impl Shape {
    fn place_bytes(&self) -> u64 {
        self.lead_bytes + self.block_bytes
    }
    /// Places that end before `offset`, and the one that it is in.
    fn places_before(&self, offset: u64) -> u32 {
        let places = offset
            .saturating_sub(self.first_place)
            .div_ceil(self.place_bytes());
        u32::try_from(places).unwrap_or(u32::MAX)
    }
    /// Where a place begins.
    fn offset(&self, place: Place) -> u64 {
        self.first_place + u64::from(place.index) * self.place_bytes()
    }
    /// The places that a block at `host_offset` lies in: one, or two when it is not aligned as they are.
    fn places_of(&self, host_offset: u64) -> impl Iterator<Item = u32> + use<> {
        let stride = self.place_bytes();
        let start = host_offset.saturating_sub(self.lead_bytes);
        let within = start.checked_sub(self.first_place);
        let first = within.map(|within| within / stride);
        let second = match within {
            Some(within) if !within.is_multiple_of(stride) => first.map(|first| first + 1),
            Some(_) => None,
            // It may reach into the first one.
            None => (start.saturating_add(stride) > self.first_place).then_some(0),
        };
        let places = [first, second].into_iter().flatten();
        // Those that cannot be counted are never taken.
        places.filter_map(|place| u32::try_from(place).ok())
    }
}

/// A block that got its place.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NewBlock {
    /// Its number on the disk.
    pub(crate) block: u64,
    /// Where its place begins: what is before the content, if anything.
    pub(crate) offset: u64,
    /// Places that were taken so far, with gaps between them.
    pub(crate) places: u32,
}

/// What is special to a format.
pub(crate) trait Layout: Send + Sync + 'static {
    /// What the map holds.
    type Entry: Entry;

    /// See [`Format::name`].
    fn name(&self) -> &'static str;
    /// The file.
    fn file(&self) -> &Edge;
    /// See [`Format::takes_backing`].
    fn takes_backing(&self) -> bool {
        false
    }
    /// See [`Format::backing`].
    fn backing(&self) -> Option<&Edge> {
        None
    }
    /// Where the first byte of a block with this entry is: `Data`, or `Zero(None)` and `Unallocated` for
    /// blocks without a place.
    fn mapping(&self, entry: Self::Entry) -> Mapping;
    /// Whether a block that has a place may be written as it is; otherwise [`Layout::make_ready`]
    /// comes first.
    fn is_ready(&self, _block: u64) -> bool {
        true
    }
    /// Makes a block with this entry ready to be written in place. It is locked meanwhile.
    async fn make_ready(&self, _block: u64, _entry: Self::Entry) -> Result<(), Errno> {
        Ok(())
    }
    /// A block is about to be written to a new place: makes room in the file. What it writes in the
    /// place is gone from memory if the data cannot be written, and the place is some other block's then.
    async fn reserve(&self, _new: NewBlock) -> Result<(), Errno> {
        Ok(())
    }
    /// Makes the file's map refer to a place whose content is written; resolves to the entry. Others
    /// may be mapped meanwhile. It survives a kill when it resolves, and power loss after the next flush.
    async fn map_block(&self, new: NewBlock) -> Result<Self::Entry, Errno>;
    /// See [`Format::flush`].
    async fn flush(&self) -> Result<(), Errno> {
        self.file().node().flush().await
    }
    /// See [`Format::metadata_dirty`]; `map_block` leaves nothing in memory when it is never so.
    fn metadata_dirty(&self) -> bool {
        false
    }
    /// See [`Format::close`]. `end` is where the last place in use ends.
    async fn close(&self, _end: u64) -> Result<(), Errno> {
        self.flush().await
    }
    /// See [`Format::check`]; nothing else happens when `options` ask for repairs.
    async fn check(
        &self,
        _map: &BlockMap<Self::Entry>,
        _options: CheckOptions,
        _sink: &mut dyn CheckSink,
    ) -> Result<CheckResult, Error> {
        Err(Error::check_unsupported())
    }
    /// See [`Format::resize`].
    async fn resize(&self, _resize: Resize) -> Result<(), Error> {
        Err(Error::resize_unsupported())
    }
    /// See [`Format::describe`].
    fn describe(&self) -> Map<String, Value>;
    /// See [`Format::bitmap_store`].
    fn bitmap_store(&self) -> Option<&dyn block::bitmap::BitmapStore> {
        None
    }
}

/// An open image.
pub(crate) struct Blocks<L: Layout> {
    layout: L,
    shape: Shape,
    map: BlockMap<L::Entry>,
    /// Blocks of the disk that are being allocated.
    busy: RangeLock,
    places: Mutex<Places>,
}

/// A write that was prepared.
pub(crate) struct Token<'a> {
    _block: RangeGuard<'a>,
    /// Where the block goes, unless it has a place.
    place: Option<Place>,
}

impl<L: Layout> Blocks<L> {
    /// An image with this map, which the layout has found to be sound enough to be used.
    pub(crate) fn new(layout: L, shape: Shape, map: BlockMap<L::Entry>) -> Self {
        let mut used = Vec::new();
        for entry in map.iter() {
            if let Mapping::Data(host_offset) = layout.mapping(entry) {
                used.extend(shape.places_of(host_offset));
            }
        }
        let known = Known {
            fills_gaps: shape.fills_gaps,
            first_free: shape.places_before(shape.first_free),
            fresh: shape.places_before(shape.written),
        };
        Self {
            places: Mutex::new(Places::new(&mut used, known)),
            busy: RangeLock::new(),
            layout,
            shape,
            map,
        }
    }

    fn places(&self) -> MutexGuard<'_, Places> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where a block begins.
    fn mapping(&self, block: u64) -> Mapping {
        let entry = self.map.get(block);
        entry.map_or(Mapping::Zero(None), |entry| self.layout.mapping(entry))
    }

    fn extent(&self, range: ByteRange) -> Extent {
        let size = self.shape.block_bytes;
        let (first, within) = (range.offset / size, range.offset % size);
        let start = self.mapping(first);
        let in_place = matches!(start, Mapping::Data(_)) && self.layout.is_ready(first);
        let continues = |blocks: u64| {
            let next = self.mapping(first + blocks);
            match (start, next) {
                (Mapping::Data(start), Mapping::Data(next)) => {
                    Some(next) == start.checked_add(blocks * size)
                        && in_place == self.layout.is_ready(first + blocks)
                }
                _ => start == next,
            }
        };
        let mut blocks = 1;
        while blocks * size - within < range.length && continues(blocks) {
            blocks += 1;
        }
        Extent {
            length: (blocks * size - within).min(range.length),
            mapping: match start {
                Mapping::Data(start) => Mapping::Data(start.saturating_add(within)),
                other => other,
            },
            in_place,
        }
    }

    fn new_block(&self, block: u64, place: Place) -> NewBlock {
        NewBlock {
            block,
            offset: self.shape.offset(place),
            places: self.places().end(),
        }
    }

    /// Whether a block shows something else than zeroes as long as it has no place.
    fn shows_backing(&self, block: u64) -> bool {
        self.mapping(block) == Mapping::Unallocated && self.layout.backing().is_some()
    }

    async fn map_block(&self, block: u64, place: Place) -> Result<(), Errno> {
        if !place.is_fresh || self.shows_backing(block) {
            // What was there before must not show after a power cut, nor zeroes that never were.
            self.layout.flush().await?;
        }
        let entry = self.layout.map_block(self.new_block(block, place)).await?;
        self.map.set(block, entry);
        Ok(())
    }

    /// The place of a block: the one that it has, or a new one.
    async fn place(&self, block: u64) -> Result<(u64, Option<Place>), Errno> {
        let entry = self.map.get(block).ok_or(Errno::EINVAL)?;
        if let Mapping::Data(host_offset) = self.layout.mapping(entry) {
            if !self.layout.is_ready(block) {
                self.layout.make_ready(block, entry).await?;
            }
            return Ok((host_offset, None));
        }
        let place = self.places().take(block, self.shape.max_places);
        let place = place.ok_or(Errno::ENOSPC)?;
        let reserved = self.layout.reserve(self.new_block(block, place)).await;
        if let Err(errno) = reserved {
            self.places().give_back(place);
            return Err(errno);
        }
        let host_offset = self.shape.offset(place) + self.shape.lead_bytes;
        Ok((host_offset, Some(place)))
    }
}

impl<L: Layout> Format for Blocks<L> {
    type Token<'a> = Token<'a>;

    fn name(&self) -> &'static str {
        self.layout.name()
    }
    fn virtual_size(&self) -> u64 {
        self.shape.disk_bytes
    }
    fn limits(&self) -> Limits {
        let block_bytes = u32::try_from(self.shape.block_bytes).unwrap_or(u32::MAX);
        Limits {
            optimal_transfer: block_bytes,
            zero_alignment: block_bytes,
            ..Limits::default()
        }
    }
    fn file(&self) -> &Edge {
        self.layout.file()
    }
    fn takes_backing(&self) -> bool {
        self.layout.takes_backing()
    }
    fn backing(&self) -> Option<&Edge> {
        self.layout.backing()
    }
    fn lookup(&self, range: ByteRange) -> Lookup {
        Lookup::Hit(self.extent(range))
    }
    fn changes(&self) -> Option<u64> {
        // No mapping is ever taken back.
        Some(0)
    }
    async fn resolve(&self, range: ByteRange) -> Result<Extent, Errno> {
        Ok(self.extent(range))
    }
    async fn prepare_write(&self, range: ByteRange) -> Result<WritePlan<Token<'_>>, Errno> {
        let size = self.shape.block_bytes;
        let (block, within) = (range.offset / size, range.offset % size);
        let range = ByteRange::new(range.offset, range.length.min(size - within));
        let guard = self.busy.lock(block..block + 1).await;
        let (host_offset, place) = self.place(block).await?;
        let fill = |length| match place {
            None => Fill::Nothing,
            Some(_) if length == 0 => Fill::Nothing,
            Some(_) if self.shows_backing(block) => Fill::Copy(length),
            Some(place) if place.is_fresh => Fill::Nothing,
            Some(_) => Fill::Zeroes(length),
        };
        Ok(WritePlan {
            range,
            host_offset: host_offset.checked_add(within).ok_or(Errno::EFBIG)?,
            head: fill(within),
            tail: fill(size - within - range.length),
            token: Token {
                _block: guard,
                place,
            },
        })
    }
    async fn commit<'a>(&'a self, plan: WritePlan<Token<'a>>) -> Result<(), Errno> {
        let Some(place) = plan.token.place else {
            return Ok(());
        };
        let block = plan.range.offset / self.shape.block_bytes;
        let mapped = self.map_block(block, place).await;
        if mapped.is_err() {
            // The file's map may refer to it all the same: no other block may have it.
            self.places().keep_for(block, place);
        }
        mapped
    }
    async fn abort<'a>(&'a self, plan: WritePlan<Token<'a>>) {
        if let Some(place) = plan.token.place {
            self.places().give_back(place);
        }
    }
    async fn write_zeroes(&self, range: ByteRange, _flags: ZeroFlags) -> Result<u64, Errno> {
        let extent = self.extent(range);
        match extent.mapping {
            Mapping::Zero(_) => Ok(extent.length),
            Mapping::Unallocated if self.layout.backing().is_none() => Ok(extent.length),
            _ => Err(Errno::EOPNOTSUPP),
        }
    }
    async fn flush(&self) -> Result<(), Errno> {
        self.layout.flush().await
    }
    fn metadata_dirty(&self) -> bool {
        self.layout.metadata_dirty()
    }
    async fn close(&self) -> Result<(), Errno> {
        let end = self.places().end();
        let is_fresh = false;
        let end = self.shape.offset(Place {
            index: end,
            is_fresh,
        });
        self.layout.close(end).await
    }
    async fn check(
        &self,
        options: CheckOptions,
        sink: &mut dyn CheckSink,
    ) -> Result<CheckResult, Error> {
        self.layout.check(&self.map, options, sink).await
    }
    async fn resize(&self, resize: Resize) -> Result<(), Error> {
        self.layout.resize(resize).await
    }
    fn describe(&self) -> Map<String, Value> {
        self.layout.describe()
    }
    fn bitmap_store(&self) -> Option<&dyn block::bitmap::BitmapStore> {
        self.layout.bitmap_store()
    }
}

#[cfg(test)]
mod tests;
