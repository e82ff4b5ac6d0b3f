//! Images with two levels of tables: the parts that qcow and qed share.
//!
//! ```text
//!   offset ─► L1 (in memory) ─► L2 table (in the file, slices of it cached) ─► cluster
//!
//!   lookup / resolve   mod.rs     no lock and no I/O for what is cached (cache.rs)
//!   prepare, commit    write.rs   clusters at the end of the file (space.rs), then their entries
//! ```
//!
//! What an entry says is the format's business ([`Entries`]).
//!
//! Metadata goes to the file as it changes, so a killed process loses nothing. The order in which a power
//! cut may find it:
//! - The file is durably as long as anything that is handed out of it (space.rs).
//! - A table is zeroes there before the L1 entry that refers to it is written; new ones are never
//!   written at all.
//! - Data is in the file before its L2 entry is. Where the disk would show something else than zeroes if
//!   the data were lost and the entry not (there is a backing file, a place was used before), the
//!   data is durable first. Writes that wait for that share a flush.
//! - Data keeps its place, unless it is stored anew in an encoded form or all content is dropped. No
//!   place is used again while the image is open, so requests under way do no harm.
//! - Encoded clusters whose loss would show nothing but zeroes are not waited for: after a power cut,
//!   those that were never flushed may be unreadable.
//!
//! Memory: 32 MiB for the L1 table and 8 MiB for slices, at most.

mod cache;
mod create;
mod l1;
mod space;
mod write;

pub(crate) use create::NewImage;
pub(crate) use l1::{L1Table, MAX_ENTRIES as MAX_L1_ENTRIES};
pub(crate) use space::Place;
pub(crate) use write::Token;

use crate::bytes::{read_bytes, write_bytes};
use block::format::{Extent, Lookup, Mapping};
use block::{ByteRange, Edge, Errno, Error, Event, ZeroFlags};
use cache::{SLICE_BITS, SliceCache};
use executor::sync::{Mutex as AsyncMutex, RangeLock};
use space::Space;
use std::ops::Range;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{AcqRel, Acquire};

/// How much of an L1 table is read at once, in bytes.
const READ_STEP: u64 = 1 << 20;
/// Most L1 entries without a table that one look-up tells about.
const MAX_EMPTY: u64 = 4096;

/// What an L2 entry says of its cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// Not in the file.
    Unallocated,
    /// Zeroes, whatever the backing file holds.
    Zero,
    /// Plain, at this offset of the file.
    Data(u64),
    /// Something that only the format can decode, by its own descriptor.
    Encoded(u64),
    /// Nothing that the format knows.
    Bad(Errno),
}

/// What the entries of a format's tables mean.
pub(crate) trait Entries: Send + Sync + 'static {
    /// Bytes of an entry.
    const WIDTH: usize;
    /// An entry from its bytes.
    fn load(bytes: &[u8]) -> u64;
    /// An entry's bytes.
    fn store(entry: u64, bytes: &mut [u8]);
    /// Where the L2 table of an L1 entry is, in a file of `end` bytes; `None` without one.
    ///
    /// # Errors
    /// There cannot be one there.
    fn table(&self, entry: u64, end: u64) -> Result<Option<u64>, Errno>;
    /// What an L2 entry says, in a file of `end` bytes.
    fn decode(&self, entry: u64, end: u64) -> Entry;
    /// Whether zero bytes of the file read as zeroes.
    fn zeroes_are_plain(&self) -> bool {
        true
    }
    /// The L2 entry of a cluster of zeroes, if there is such a thing.
    fn zero(&self) -> Option<u64>;
    /// Called before space is taken that the file did not have; a flush follows.
    async fn before_growth(&self, file: &Edge) -> Result<(), Errno>;
}

/// How the tables are laid out.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    /// log2 of the bytes of a cluster.
    pub(crate) cluster_bits: u32,
    /// log2 of the entries of an L2 table.
    pub(crate) l2_bits: u32,
    /// Where the L1 table begins, in bytes.
    pub(crate) l1_offset: u64,
    /// Entries of the L1 table that are in use, at most [`MAX_L1_ENTRIES`].
    pub(crate) l1_entries: u64,
    /// Where nothing is in use any more, in bytes of the file.
    pub(crate) next: u64,
}

impl Shape {
    /// L1 entries for a disk of `size` bytes.
    pub(crate) fn l1_entries_for(&self, size: u64) -> u64 {
        size.div_ceil(1 << (self.cluster_bits + self.l2_bits))
    }
}

/// The tables of an open image.
pub(crate) struct Tables<E> {
    pub(crate) entries: E,
    shape: Shape,
    l1: L1Table,
    cache: SliceCache,
    file: Edge,
    backing: Option<Edge>,
    space: Space,
    /// Clusters of the disk whose mapping is about to change.
    clusters: RangeLock,
    /// Slices: who reads one keeps out who writes entries of it.
    slices: RangeLock,
    /// Serialises adding L2 tables.
    adding: AsyncMutex<()>,
    /// Changes that want what was written before them durable.
    settling: AtomicU64,
    /// How many of these a flush has been for.
    settled: AsyncMutex<u64>,
    /// How often data lost its place; see [`block::Format::changes`].
    changes: AtomicU64,
}

impl<E: Entries> Tables<E> {
    /// The tables of the image in `file`.
    ///
    /// # Errors
    /// `Io` when the L1 table cannot be read.
    pub(crate) async fn open(
        (file, backing): (Edge, Option<Edge>),
        shape: Shape,
        entries: E,
    ) -> Result<Self, Error> {
        let tables = Self {
            entries,
            l1: L1Table::new(0),
            cache: SliceCache::new(1 << SLICE_BITS.min(shape.l2_bits)),
            space: Space::new(&file, shape.next),
            clusters: RangeLock::new(),
            slices: RangeLock::new(),
            adding: AsyncMutex::new(()),
            settling: AtomicU64::new(0),
            settled: AsyncMutex::new(0),
            changes: AtomicU64::new(0),
            shape,
            file,
            backing,
        };
        tables.load_l1(shape.l1_entries).await?;
        Ok(tables)
    }

    /// Reads the L1 table up to `entries`, as far as it is not in memory.
    ///
    /// # Errors
    /// `Io`.
    pub(crate) async fn load_l1(&self, entries: u64) -> Result<(), Error> {
        let mut next = self.l1.len();
        while next < entries {
            let count = (READ_STEP / E::WIDTH as u64).min(entries - next);
            let offset = self.shape.l1_offset + next * E::WIDTH as u64;
            let bytes = read_bytes(&self.file, offset, count as usize * E::WIDTH).await;
            let bytes = bytes.map_err(|errno| Error::io("Could not read L1 table", errno))?;
            for (index, entry) in (next..).zip(bytes.chunks_exact(E::WIDTH)) {
                let entry = E::load(entry);
                if entry != 0 {
                    self.l1.set(index, entry);
                }
            }
            next += count;
        }
        self.l1.grow(entries);
        Ok(())
    }

    pub(crate) fn file(&self) -> &Edge {
        &self.file
    }

    pub(crate) fn backing(&self) -> Option<&Edge> {
        self.backing.as_ref()
    }

    /// See [`block::Format::changes`].
    pub(crate) fn changes(&self) -> u64 {
        self.changes.load(Acquire)
    }

    pub(crate) fn shape(&self) -> &Shape {
        &self.shape
    }

    fn cluster_size(&self) -> u64 {
        1 << self.shape.cluster_bits
    }

    fn slice_bits(&self) -> u32 {
        SLICE_BITS.min(self.shape.l2_bits)
    }

    fn l1_index(&self, cluster: u64) -> u64 {
        cluster >> self.shape.l2_bits
    }

    fn slice_of(&self, cluster: u64) -> u64 {
        cluster >> self.slice_bits()
    }

    fn index_in_slice(&self, cluster: u64) -> usize {
        (cluster & ((1 << self.slice_bits()) - 1)) as usize
    }

    /// Where the L2 table of an L1 entry is.
    fn table(&self, l1_index: u64) -> Result<Option<u64>, Errno> {
        let entry = self.l1.entry(l1_index);
        self.entries.table(entry, self.space.end())
    }

    /// Maps the start of `range` from memory. A slice that is kept has a table: the L1 table, another line
    /// of memory, is asked only without one.
    pub(crate) fn lookup(&self, range: ByteRange) -> Lookup {
        let cluster = range.offset >> self.shape.cluster_bits;
        if let Some(view) = self.cache.view(self.slice_of(cluster)) {
            return match self.extent(range, |index| view.word(index)) {
                Ok(extent) if view.is_valid() => Lookup::Hit(extent),
                _ => Lookup::Miss,
            };
        }
        match self.table(self.l1_index(cluster)) {
            Ok(None) => Lookup::Hit(self.without_table(range)),
            _ => Lookup::Miss,
        }
    }

    /// Maps the start of `range`.
    ///
    /// # Errors
    /// The file's, and those of entries that make no sense.
    pub(crate) async fn resolve(&self, range: ByteRange) -> Result<Extent, Errno> {
        let cluster = range.offset >> self.shape.cluster_bits;
        match self.words(cluster).await? {
            Some(words) => self.extent(range, |index| words[index]),
            None => Ok(self.without_table(range)),
        }
    }

    /// A range that begins where there is no L2 table.
    fn without_table(&self, range: ByteRange) -> Extent {
        let bits = self.shape.cluster_bits + self.shape.l2_bits;
        let first = range.offset >> bits;
        let last = (range.offset + (range.length - 1)) >> bits;
        let last = last.min(first + MAX_EMPTY);
        let end = (first + 1..=last).find(|index| self.l1.entry(*index) != 0);
        let end = end.unwrap_or(last + 1);
        let length = (u128::from(end) << bits) - u128::from(range.offset);
        Extent {
            length: u64::try_from(length).map_or(range.length, |length| length.min(range.length)),
            mapping: Mapping::Unallocated,
            in_place: false,
        }
    }

    /// Maps the start of `range` by the entries of the slice that it begins in.
    fn extent(&self, range: ByteRange, word: impl Fn(usize) -> u64) -> Result<Extent, Errno> {
        let (cluster_size, end) = (self.cluster_size(), self.space.end());
        let cluster = range.offset >> self.shape.cluster_bits;
        let within = range.offset & (cluster_size - 1);
        let first = self.index_in_slice(cluster);
        let entry = self.entries.decode(word(first), end);
        let mapping = match entry {
            Entry::Unallocated => Mapping::Unallocated,
            Entry::Zero => Mapping::Zero(None),
            Entry::Data(offset) => Mapping::Data(offset + within),
            Entry::Encoded(descriptor) => Mapping::Encoded(descriptor),
            Entry::Bad(errno) => return Err(errno),
        };
        let left = (1usize << self.slice_bits()) - first;
        let wanted = (within + range.length).div_ceil(cluster_size);
        let wanted = left.min(usize::try_from(wanted).unwrap_or(usize::MAX));
        let follows = |number: &usize| {
            let next = self.entries.decode(word(first + number), end);
            match entry {
                Entry::Data(offset) => next == Entry::Data(offset + *number as u64 * cluster_size),
                Entry::Encoded(_) => false,
                other => next == other,
            }
        };
        let clusters = 1 + (1..wanted).take_while(follows).count() as u64;
        Ok(Extent {
            length: (clusters * cluster_size - within).min(range.length),
            mapping,
            in_place: matches!(entry, Entry::Data(_)),
        })
    }

    /// The slice that a cluster's entry is in; `None` without an L2 table.
    async fn words(&self, cluster: u64) -> Result<Option<Vec<u64>>, Errno> {
        let Some(table) = self.table(self.l1_index(cluster))? else {
            return Ok(None);
        };
        let slice = self.slice_of(cluster);
        if let Some(words) = self.cached(slice) {
            return Ok(Some(words));
        }
        let _alone = self.slices.lock(slice..slice + 1).await;
        if let Some(words) = self.cached(slice) {
            return Ok(Some(words));
        }
        self.file.node().event(Event::L2Load).await;
        let offset = table + self.offset_in_table(slice << self.slice_bits());
        let bytes = read_bytes(&self.file, offset, E::WIDTH << self.slice_bits()).await?;
        let words: Vec<u64> = bytes.chunks_exact(E::WIDTH).map(E::load).collect();
        self.cache.insert(slice, &words);
        Ok(Some(words))
    }

    /// A copy of a slice that is in memory.
    fn cached(&self, slice: u64) -> Option<Vec<u64>> {
        let view = self.cache.view(slice)?;
        let words = (0..1 << self.slice_bits())
            .map(|index| view.word(index))
            .collect();
        view.is_valid().then_some(words)
    }

    /// Where a cluster's entry is in its L2 table, in bytes.
    fn offset_in_table(&self, cluster: u64) -> u64 {
        (cluster & ((1 << self.shape.l2_bits) - 1)) * E::WIDTH as u64
    }

    /// Changes the entries of clusters of one slice from `first` on, which has an L2 table: in the file,
    /// then in memory.
    async fn set_entries(&self, first: u64, words: &[u64]) -> Result<(), Errno> {
        let table = self.table(self.l1_index(first))?.ok_or(Errno::EIO)?;
        let slice = self.slice_of(first);
        let mut bytes = vec![0; words.len() * E::WIDTH];
        for (entry, word) in bytes.chunks_exact_mut(E::WIDTH).zip(words) {
            E::store(*word, entry);
        }
        let _no_reader = self.slices.lock_shared(slice..slice + 1).await;
        self.file.node().event(Event::L2Update).await;
        let offset = table + self.offset_in_table(first);
        write_bytes(&self.file, offset, &bytes).await?;
        self.cache.set(slice, self.index_in_slice(first), words);
        Ok(())
    }

    /// The clusters of `range` that are in the slice of its first one, at most `most`.
    fn clusters_of(&self, range: ByteRange, most: u64) -> Range<u64> {
        let first = range.offset >> self.shape.cluster_bits;
        let last = (range.offset + (range.length - 1)) >> self.shape.cluster_bits;
        let of_slice = (self.slice_of(first) + 1) << self.slice_bits();
        first..(last + 1).min(of_slice).min(first + most)
    }

    /// Drops all content and cuts the file off at `end`, where the L1 table is the last thing in it. Nothing
    /// else is under way.
    pub(crate) async fn clear(&self, end: u64) -> Result<(), Errno> {
        let node = self.file.node();
        let l1 = ByteRange::new(self.shape.l1_offset, self.l1.len() * E::WIDTH as u64);
        node.write_zeroes(l1, ZeroFlags::default()).await?;
        node.flush().await?;
        (0..self.l1.len())
            .filter(|index| self.l1.entry(*index) != 0)
            .for_each(|index| self.l1.set(index, 0));
        self.cache.forget_all();
        self.changes.fetch_add(1, AcqRel);
        self.space.restart(&self.file, end).await
    }

    /// Flushes the file and cuts it off where the part in use ends. The image is being closed.
    pub(crate) async fn close(&self) -> Result<(), Errno> {
        self.file.node().flush().await?;
        self.space.trim(&self.file).await?;
        self.file.node().flush().await
    }
}
