//! A sparse extent as a format: its part of the disk, at the offsets of the whole disk.
//!
//! ```text
//!   header │ descriptor │ redundant directory and tables │ directory and tables │ grain │ grain │ ...
//!   directory: a table each       table: a grain each; 0 not here, 1 zeroes (where the header says so)
//! ```
//!
//! An allocating write completes in this order: the file is made longer than the new grain, and that is
//! durable; data; the entry in the redundant table; the entry in the table. A power cut before the next
//! flush leaves an entry or none, and the grain holds what was written or zeroes, as before: a place that
//! was never written reads as zeroes. Where that is not enough, data is durable before it is mapped: over
//! a parent, whose content a grain of zeroes would hide, and in a place that a failed write left something
//! in. A compressed grain that was not flushed may be unreadable after a power cut. The file is always longer than what any entry refers to, so that no grain is
//! ever given away twice. It grows ahead of use, and is cut to what is used when closed.
//! A table that is missing is made of zeroes, durably, before the directory refers to it. No mapping of
//! a grain is ever taken back: zeroes go to the storage of allocated grains. Compressed grains are
//! written once.

use super::header::Layout;
use super::image::Parent;
use super::space::{Place, Space};
use super::tables::{Locked, Tables};
use super::{Entry, SECTOR, stream};
use crate::bytes::{read_bytes, write_bytes};
use crate::chunks::Chunks;
use block::format::{EncodedBytes, Extent, Fill, Format, Lookup, Mapping, WritePlan};
use block::{Buffer, ByteRange, Edge, Errno, Error, ErrorKind, Limits, Resize, ZeroFlags};
use executor::sync::{Mutex as AsyncMutex, RangeGuard, RangeLock};
use serde_json::{Map, Value};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// By how much the file is made longer than it has to be, in bytes: an eighth of its length, within these.
const MIN_AHEAD: u64 = 1 << 20;
const MAX_AHEAD: u64 = 64 << 20;

/// See the module.
pub(super) struct Sparse {
    pub(super) file: Arc<Edge>,
    pub(super) layout: Layout,
    /// Where it begins on the disk, in bytes.
    pub(super) start: u64,
    parent: Option<Arc<Parent>>,
    /// Another image's content shows where nothing is mapped, even if that image is not open.
    has_parent: bool,
    /// First sectors of the tables, and of their copies.
    directory: Box<[AtomicU64]>,
    redundant: Box<[AtomicU64]>,
    tables: Tables,
    /// Grains that are being allocated.
    grains: RangeLock,
    space: AsyncMutex<Space>,
    /// Decompressed grains.
    chunks: Chunks,
}

/// A write that was prepared.
pub(super) struct Token<'a> {
    _grain: RangeGuard<'a>,
    place: Option<Place>,
    /// Zeroes in its place would hide what the disk showed before.
    hides: bool,
}

/// Where a grain's entry is.
#[derive(Clone, Copy)]
struct Position {
    table: u64,
    index: usize,
}

/// What an extent belongs to.
pub(super) struct Belonging {
    pub(super) start: u64,
    pub(super) parent: Option<Arc<Parent>>,
    pub(super) has_parent: bool,
}

impl Sparse {
    /// Reads the directories of the extent in `file`.
    ///
    /// # Errors
    /// `Io`.
    pub(super) async fn open(
        file: Arc<Edge>,
        layout: Layout,
        to: Belonging,
    ) -> Result<Self, Error> {
        let failed = |errno| {
            let name = file.node().filename();
            Error::io(
                format!("Could not read l1 table from extent '{name}'"),
                errno,
            )
        };
        let directory = read_directory(&file, &layout, Some(layout.directory));
        let directory = directory.await.map_err(failed)?;
        let redundant = read_directory(&file, &layout, layout.redundant);
        let redundant = redundant.await.map_err(failed)?;
        let unit = match layout.compressed {
            true => 1,
            false => layout.grain_sectors,
        };
        Ok(Self {
            start: to.start,
            parent: to.parent,
            has_parent: to.has_parent,
            directory,
            redundant,
            tables: Tables::new(&layout),
            grains: RangeLock::new(),
            space: AsyncMutex::new(Space::new(file.node().length(), unit)),
            chunks: Chunks::new((layout.grain_sectors * SECTOR) as usize),
            layout,
            file,
        })
    }

    pub(super) fn grain_bytes(&self) -> u64 {
        self.layout.grain_sectors * SECTOR
    }

    /// One past its last byte on the disk.
    pub(super) fn end(&self) -> u64 {
        self.start + self.layout.sectors * SECTOR
    }

    fn position(&self, grain: u64) -> Position {
        let entries = u64::from(self.layout.table_entries);
        Position {
            table: grain / entries,
            index: (grain % entries) as usize,
        }
    }

    /// First sector of a table; 0: there is none.
    fn table_sector(&self, table: u64) -> u64 {
        let entry = self.directory.get(table as usize);
        entry.map_or(0, |entry| entry.load(Ordering::Acquire))
    }

    fn table_offset(&self, table: u64) -> Result<Option<u64>, Errno> {
        let length = u64::from(self.layout.table_entries) * self.layout.entry_bytes();
        match super::table_sector(self.layout.encoding, (self.table_sector(table), length)) {
            Ok(None) => Ok(None),
            Ok(Some(sector)) => sector.checked_mul(SECTOR).map(Some).ok_or(Errno::EIO),
            Err(errno) => {
                let file = self.file.node().name();
                tracing::warn!(
                    file,
                    table,
                    "an entry of the grain directory makes no sense"
                );
                Err(errno)
            }
        }
    }

    /// The extent at the start of `range`, if what it takes is in memory.
    #[inline]
    fn extent(&self, range: ByteRange) -> Result<Option<Extent>, Errno> {
        let local = range.offset - self.start;
        let (grain, within) = (local / self.grain_bytes(), local % self.grain_bytes());
        let Position { table, index } = self.position(grain);
        if self.table_sector(table) == 0 {
            return Ok(Some(self.absent(range, table)));
        }
        let seen = self.tables.peek(table, |entries| {
            let first = Entry::of_word(entries[index].load(Ordering::Acquire));
            let mut count = 1;
            while (count * self.grain_bytes()) - within < range.length
                && let Some(next) = entries.get(index + count as usize)
                && self.continues(first, count, Entry::of_word(next.load(Ordering::Acquire)))
            {
                count += 1;
            }
            (first, count)
        });
        let Some((entry, count)) = seen else {
            return Ok(None);
        };
        let length = (count * self.grain_bytes() - within).min(range.length);
        self.mapped(entry, (within, length)).map(Some)
    }

    /// Whether `next` maps the grain `count` behind one as that is mapped, right behind it.
    fn continues(&self, first: Entry, count: u64, next: Entry) -> bool {
        match first {
            Entry::At(sector) if !self.layout.compressed => {
                next == Entry::At(sector + count * self.layout.grain_sectors)
            }
            Entry::At(_) | Entry::Bad => false,
            Entry::Absent | Entry::Zero => next == first,
        }
    }

    fn mapped(&self, entry: Entry, (within, length): (u64, u64)) -> Result<Extent, Errno> {
        let mut in_place = false;
        let mapping = match entry {
            Entry::Absent => Mapping::Unallocated,
            Entry::Zero => Mapping::Zero(None),
            Entry::At(sector) if self.layout.compressed => Mapping::Encoded(sector),
            Entry::At(sector) => {
                in_place = sector >= self.layout.first_grain;
                let offset = sector
                    .checked_mul(SECTOR)
                    .and_then(|it| it.checked_add(within));
                Mapping::Data(offset.ok_or(Errno::EIO)?)
            }
            Entry::Bad => {
                let file = self.file.node().name();
                tracing::warn!(file, "an entry of a grain table makes no sense");
                return Err(Errno::EIO);
            }
        };
        Ok(Extent {
            length,
            mapping,
            in_place,
        })
    }

    /// Where tables are missing.
    fn absent(&self, range: ByteRange, first: u64) -> Extent {
        let table_bytes = self.layout.table_sectors() * SECTOR;
        let end = range.offset - self.start + range.length;
        let mut next = first + 1;
        while next * table_bytes < end && self.table_sector(next) == 0 {
            next += 1;
        }
        let length = self.start + next * table_bytes - range.offset;
        Extent {
            length: length.min(range.length),
            mapping: Mapping::Unallocated,
            in_place: false,
        }
    }

    /// Whether an extent is the parent's, of which it is not known that it is what it was.
    fn is_doubtful(&self, extent: &Extent) -> bool {
        let parent = self.parent.as_ref();
        extent.mapping == Mapping::Unallocated && parent.is_some_and(|it| !it.is_known())
    }

    async fn find(&self, range: ByteRange) -> Result<Extent, Errno> {
        let extent = self.read_extent(range).await?;
        match &self.parent {
            Some(parent) if self.is_doubtful(&extent) => parent.check()?,
            _ => {}
        }
        Ok(extent)
    }

    async fn read_extent(&self, range: ByteRange) -> Result<Extent, Errno> {
        let table = (range.offset - self.start) / (self.layout.table_sectors() * SECTOR);
        loop {
            if let Some(extent) = self.extent(range)? {
                return Ok(extent);
            }
            let locked = self.tables.lock(table).await;
            if let Some(extent) = self.extent(range)? {
                return Ok(extent);
            }
            if let Some(offset) = self.table_offset(table)? {
                self.tables.load(&locked, (&self.file, offset)).await?;
            }
        }
    }

    /// The entry of one grain.
    async fn entry(&self, grain: u64) -> Result<Entry, Errno> {
        let Position { table, index } = self.position(grain);
        loop {
            let look =
                |entries: &[AtomicU64]| Entry::of_word(entries[index].load(Ordering::Acquire));
            if let Some(entry) = self.tables.peek(table, look) {
                return Ok(entry);
            }
            let locked = self.tables.lock(table).await;
            match self.table_offset(table)? {
                None => return Ok(Entry::Absent),
                Some(offset) => self.tables.load(&locked, (&self.file, offset)).await?,
            }
        }
    }

    /// A place for so many sectors, in a file that is durably longer than that.
    async fn take(&self, sectors: u64) -> Result<Place, Errno> {
        let mut space = self.space.lock().await;
        let place = space.peek(sectors).ok_or(Errno::ENOSPC)?;
        let end = place.end() * SECTOR;
        if end > space.durable_length() {
            let length = end + (end / 8).clamp(MIN_AHEAD, MAX_AHEAD);
            self.resize_file(length).await?;
            self.file.node().flush().await?;
            space.grown(length);
        }
        space.take(place);
        Ok(place)
    }

    async fn resize_file(&self, length: u64) -> Result<(), Errno> {
        let resize = Resize::to(length);
        let resized = self.file.node().resize(resize).await;
        resized.map_err(|error| error.errno.unwrap_or(Errno::ENOSPC))
    }

    /// Makes the table of a grain, and its copy, if they are missing.
    async fn make_table(&self, locked: &Locked<'_>, table: u64) -> Result<(), Errno> {
        if self.table_sector(table) != 0 {
            return Ok(());
        }
        let bytes = u64::from(self.layout.table_entries) * self.layout.entry_bytes();
        let sectors = bytes.div_ceil(SECTOR);
        let copies = [
            (self.layout.redundant, &self.redundant),
            (Some(self.layout.directory), &self.directory),
        ];
        let zeroes = vec![0; (sectors * SECTOR) as usize];
        let mut made = Vec::new();
        for (directory, entries) in copies {
            let Some(directory) = directory else { continue };
            let place = self.take(sectors).await?;
            write_bytes(&self.file, place.sector * SECTOR, &zeroes).await?;
            made.push((directory, entries, place.sector));
        }
        self.file.node().flush().await?;
        for (directory, entries, sector) in made {
            let word = u32::try_from(sector).map_err(|_| Errno::ENOSPC)?;
            write_bytes(&self.file, directory + table * 4, &word.to_le_bytes()).await?;
            entries[table as usize].store(sector, Ordering::Release);
        }
        locked.forget();
        Ok(())
    }

    /// Maps a grain in the file, then in memory.
    async fn map(&self, grain: u64, entry: Entry) -> Result<(), Errno> {
        let position = self.position(grain);
        let locked = self.tables.lock(position.table).await;
        self.make_table(&locked, position.table).await?;
        let word = entry.encode().ok_or(Errno::ENOSPC)?.to_le_bytes();
        let copy = self.redundant.get(position.table as usize);
        let copy = copy.map_or(0, |copy| copy.load(Ordering::Acquire));
        let at = |sector: u64| sector * SECTOR + position.index as u64 * word.len() as u64;
        if copy != 0 {
            write_bytes(&self.file, at(copy), &word).await?;
        }
        let table = self.table_sector(position.table);
        let written = write_bytes(&self.file, at(table), &word).await;
        match written {
            Ok(()) => locked.set(position.index, entry),
            Err(_) => locked.forget(),
        }
        written
    }

    /// What the grain at `range` is, with its number; the range is cut to the grain.
    fn grain_of(&self, range: ByteRange) -> (u64, u64, ByteRange) {
        let local = range.offset - self.start;
        let (grain, within) = (local / self.grain_bytes(), local % self.grain_bytes());
        let length = range.length.min(self.grain_bytes() - within);
        (grain, within, ByteRange::new(range.offset, length))
    }

    /// Whether a range is all of a grain, or all that the disk has of the last one.
    fn is_whole(&self, range: ByteRange) -> bool {
        let (_, within, cut) = self.grain_of(range);
        let end = cut.offset + cut.length;
        within == 0 && (cut.length == self.grain_bytes() || end == self.end())
    }

    /// Looks all entries through. Answers with the first sector of the extent that is mapped to where
    /// the file has nothing, or whose entry makes no sense.
    pub(super) async fn first_outside(&self) -> Result<Option<u64>, (u64, Errno)> {
        let length = self.file.node().length();
        let table_sectors = self.layout.table_sectors();
        for table in 0..self.layout.sectors.div_ceil(table_sectors) {
            let first = table * table_sectors;
            let failed = |errno| (first, errno);
            let Some(offset) = self.table_offset(table).map_err(failed)? else {
                continue;
            };
            let entries = self.tables.read(&self.file, offset).await.map_err(failed)?;
            for (entry, sector) in entries
                .iter()
                .zip((first..).step_by(self.layout.grain_sectors as usize))
            {
                match Entry::of_word(*entry) {
                    _ if sector >= self.layout.sectors => break,
                    Entry::At(at) if at.saturating_mul(SECTOR) >= length => {
                        return Ok(Some(sector));
                    }
                    Entry::Bad => return Err((sector, Errno::EIO)),
                    Entry::At(_) | Entry::Absent | Entry::Zero => {}
                }
            }
        }
        Ok(None)
    }
}

/// A directory; empty when there is none.
async fn read_directory(
    file: &Edge,
    layout: &Layout,
    offset: Option<u64>,
) -> Result<Box<[AtomicU64]>, Errno> {
    let Some(offset) = offset else {
        return Ok(Box::default());
    };
    let length = layout.directory_entries * layout.entry_bytes();
    let bytes = read_bytes(file, offset, length as usize).await?;
    Ok(match layout.entry_bytes() {
        8 => {
            let words = bytes.as_chunks().0.iter();
            words
                .map(|it| AtomicU64::new(u64::from_le_bytes(*it)))
                .collect()
        }
        _ => {
            let words = bytes.as_chunks().0.iter();
            words
                .map(|it| AtomicU64::new(u32::from_le_bytes(*it).into()))
                .collect()
        }
    })
}

impl Format for Sparse {
    type Token<'a> = Token<'a>;

    fn name(&self) -> &'static str {
        "vmdk"
    }
    fn virtual_size(&self) -> u64 {
        self.end()
    }
    fn limits(&self) -> Limits {
        Limits {
            optimal_transfer: self.grain_bytes() as u32,
            zero_alignment: self.grain_bytes() as u32,
            ..Limits::default()
        }
    }
    fn file(&self) -> &Edge {
        &self.file
    }
    fn data(&self) -> &Edge {
        &self.file
    }
    fn takes_backing(&self) -> bool {
        true
    }
    fn backing(&self) -> Option<&Edge> {
        self.parent.as_ref().map(|parent| parent.edge())
    }
    fn lookup(&self, range: ByteRange) -> Lookup {
        match self.extent(range) {
            Ok(Some(extent)) if !self.is_doubtful(&extent) => Lookup::Hit(extent),
            Ok(_) | Err(_) => Lookup::Miss,
        }
    }
    fn changes(&self) -> Option<u64> {
        // No mapping of data is ever taken back.
        Some(0)
    }
    async fn resolve(&self, range: ByteRange) -> Result<Extent, Errno> {
        self.find(range).await
    }
    async fn prepare_write(&self, range: ByteRange) -> Result<WritePlan<Token<'_>>, Errno> {
        if self.layout.compressed {
            return Err(Errno::EINVAL);
        }
        let (grain, within, range) = self.grain_of(range);
        let guard = self.grains.lock(grain..grain + 1).await;
        let entry = self.entry(grain).await?;
        let (sector, place) = match entry {
            Entry::At(sector) if sector >= self.layout.first_grain => (sector, None),
            Entry::At(_) | Entry::Bad => return Err(Errno::EIO),
            Entry::Absent | Entry::Zero => {
                if let (Some(parent), Entry::Absent) = (&self.parent, entry) {
                    parent.check()?;
                }
                let place = self.take(self.layout.grain_sectors).await?;
                (place.sector, Some(place))
            }
        };
        let copies = entry == Entry::Absent && self.parent.is_some();
        let hides = entry == Entry::Absent && self.has_parent;
        let fill = |length| match place {
            Some(_) if copies && length > 0 => Fill::Copy(length),
            Some(place) if !place.is_fresh && length > 0 => Fill::Zeroes(length),
            _ => Fill::Nothing,
        };
        let offset = sector
            .checked_mul(SECTOR)
            .and_then(|it| it.checked_add(within));
        Ok(WritePlan {
            range,
            host_offset: offset.ok_or(Errno::EIO)?,
            head: fill(within),
            tail: fill(self.grain_bytes() - within - range.length),
            token: Token {
                _grain: guard,
                place,
                hides: hides || copies,
            },
        })
    }
    async fn commit<'a>(&'a self, plan: WritePlan<Token<'a>>) -> Result<(), Errno> {
        let Some(place) = plan.token.place else {
            return Ok(());
        };
        if !place.is_fresh || plan.token.hides {
            // After a power cut neither what was there before may show, nor zeroes over a parent.
            self.file.node().flush().await?;
        }
        let (grain, ..) = self.grain_of(plan.range);
        // When this fails, the file's table may refer to the place: nothing else may have it.
        self.map(grain, Entry::At(place.sector)).await
    }
    async fn abort<'a>(&'a self, plan: WritePlan<Token<'a>>) {
        if let Some(place) = plan.token.place {
            self.space.lock().await.give_back(place);
        }
    }
    async fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<u64, Errno> {
        let extent = self.find(range).await?;
        let length = extent.length.min(range.length);
        match extent.mapping {
            Mapping::Zero(_) => Ok(length),
            Mapping::Data(offset) if extent.in_place => {
                let storage = ByteRange::new(offset, length);
                self.file.node().write_zeroes(storage, flags).await?;
                Ok(length)
            }
            Mapping::Unallocated if !self.has_parent => Ok(length),
            Mapping::Unallocated
                if self.layout.encoding == super::header::Encoding::SectorsOrZero
                    && self.is_whole(range) =>
            {
                let (grain, _, range) = self.grain_of(range);
                let _guard = self.grains.lock(grain..grain + 1).await;
                // Somebody may have written meanwhile.
                if self.entry(grain).await? == Entry::Absent {
                    self.map(grain, Entry::Zero).await?;
                    return Ok(range.length);
                }
                Err(Errno::EOPNOTSUPP)
            }
            _ => Err(Errno::EOPNOTSUPP),
        }
    }
    async fn discard(&self, _range: ByteRange) -> Result<(), Errno> {
        Ok(())
    }
    async fn read_encoded(&self, offset: u64, sector: u64, buffer: Buffer) -> Result<(), Errno> {
        let (grain, within, _) = self.grain_of(ByteRange::new(offset, 1));
        let first = self.start + grain * self.grain_bytes();
        let length = self.grain_bytes().min(self.end() - first);
        let at = sector.checked_mul(SECTOR).ok_or(Errno::EIO)?;
        let chunk = self.chunks.get(sector, || {
            stream::read_grain(&self.file, (at, self.layout.markers), length as usize)
        });
        crate::chunks::copy_part(&*chunk.await?, within as usize, &buffer)
    }
    fn can_encode(&self) -> bool {
        self.layout.compressed && self.layout.markers
    }
    async fn encode(
        &self,
        range: ByteRange,
        buffer: Buffer,
    ) -> Result<Option<EncodedBytes>, Errno> {
        let first_sector = (range.offset - self.start) / SECTOR;
        stream::encode_grain(first_sector, buffer).await.map(Some)
    }
    async fn store_encoded(&self, range: ByteRange, bytes: EncodedBytes) -> Result<(), Errno> {
        let (grain, ..) = self.grain_of(range);
        let _guard = self.grains.lock(grain..grain + 1).await;
        if self.entry(grain).await? != Entry::Absent {
            tracing::error!("Could not write to allocated cluster for streamOptimized");
            return Err(Errno::EIO);
        }
        let place = self.take((bytes.length as u64).div_ceil(SECTOR)).await?;
        let packed = bytes.memory.into_buffer().slice(0..bytes.length);
        let node = self.file.node();
        let flags = block::WriteFlags::default();
        if let Err(errno) = node.write(place.sector * SECTOR, packed, flags).await {
            self.space.lock().await.give_back(place);
            return Err(errno);
        }
        if !place.is_fresh {
            node.flush().await?;
        }
        self.map(grain, Entry::At(place.sector)).await
    }
    async fn flush(&self) -> Result<(), Errno> {
        self.file.node().flush().await
    }
    fn metadata_dirty(&self) -> bool {
        false
    }
    async fn resize(&self, _resize: Resize) -> Result<(), Error> {
        let message = "Image format driver does not support resize";
        Err(Error::new(ErrorKind::Unsupported, message))
    }
    async fn close(&self) -> Result<(), Errno> {
        self.flush().await?;
        let space = self.space.lock().await;
        match space.unused_from() {
            Some(length) => self.resize_file(length).await,
            None => Ok(()),
        }
    }
    fn describe(&self) -> Map<String, Value> {
        Map::new()
    }
}
