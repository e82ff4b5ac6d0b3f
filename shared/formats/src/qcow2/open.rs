//! Opening an image.
//!
//! header → children → tables → (writable: refcount table, map of metadata, autoclear bits,
//! replay of the redo log). A read-only image needs nothing but the L1 table.

use super::alloc::Allocator;
use super::bitmaps::Bitmaps;
use super::cache::options::CacheOptions;
use super::cache::{Content, MAX_SLICES, TableCache};
use super::cluster::PairSequence;
use super::compressed::{Inflated, Packing};
use super::crypto::Crypto;
use super::header::{CryptMethod, Header, KNOWN_AUTOCLEAR, field, incompatible};
use super::lazy::LazyRefcounts;
use super::overlap::{Fixed, MetadataMap, OverlapChecks, Structure};
use super::overlay::Overlay;
use super::reclaim::DiscardPolicy;
use super::snapshots::SnapshotTable;
use super::tables::{
    Geometry, HostCluster, HostOffset, MAX_HOST_OFFSET, OFFSET_MASK, REFCOUNT_BLOCK_MASK,
};
use super::{Qcow2, RefcountTable, State, read_bytes};
use crate::two_level::L1Table;
use block::events::Reporter;
use block::redo_log::{Record, RedoLog};
use block::{CheckOptions, Edge, Error, ErrorKind, Repair};
use executor::sync::{Mutex as AsyncMutex, RangeLock};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex};

/// log2 of the bytes of a table that are cached as one, unless tables are smaller or too many.
pub(super) const SLICE_BITS: u32 = 12;
/// How much of a long table is read at once, in bytes.
const READ_STEP: u64 = 1 << 20;

/// Findings of a repair at open that are logged.
const MAX_REPAIR_MESSAGES: usize = 100;

/// How an image is opened.
pub struct OpenOptions {
    /// Nothing is written to the file.
    pub read_only: bool,
    /// Memory for metadata.
    pub caches: CacheOptions,
    /// Where metadata changes survive a kill.
    pub log: RedoLog,
    /// What a writer that was killed left in its log, for an image that is only read.
    pub left_behind: Vec<Record>,
    /// Which discards reach the host.
    pub discards: DiscardPolicy,
    /// The external data file of an image that has one.
    pub data_file: Option<Edge>,
    /// What newly written clusters must not overlap.
    pub overlap_checks: OverlapChecks,
    /// Whether refcounts may stay in memory until the image is closed; otherwise as the image says.
    pub lazy_refcounts: Option<bool>,
    /// What an encrypted image is read and written with.
    pub crypto: Option<Arc<Crypto>>,
    /// Who is told that the image is corrupt.
    pub reporter: Reporter,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            caches: CacheOptions::default(),
            log: RedoLog::disabled(),
            left_behind: Vec::new(),
            discards: DiscardPolicy::default(),
            data_file: None,
            overlap_checks: OverlapChecks::default(),
            lazy_refcounts: None,
            crypto: None,
            reporter: Reporter::default(),
        }
    }
}

/// Data of an encrypted image is of no use without its key.
fn check_crypto(header: &Header, crypto: Option<&Crypto>) -> Result<(), Error> {
    if header.crypt == CryptMethod::None {
        return Ok(());
    }
    if crypto.is_none() {
        let message = "Parameter 'encrypt.key-secret' is required for cipher";
        return Err(Error::new(ErrorKind::Invalid, message));
    }
    if !header.size.is_multiple_of(block::cipher::SECTOR as u64) {
        let message = "qcow2: the size of an encrypted image is not a multiple of 512";
        return Err(Error::new(ErrorKind::Corrupt, message));
    }
    Ok(())
}

pub(super) async fn read_header(file: &Edge) -> Result<Header, Error> {
    let failed = |errno| Error::io("Could not read qcow2 header", errno);
    let start = read_bytes(file, 0, 512).await.map_err(failed)?;
    let length = Header::cluster_size_hint(&start);
    let bytes = read_bytes(file, 0, length).await.map_err(failed)?;
    Header::parse(&bytes)
}

impl Qcow2 {
    /// Opens the image in `file` over `backing`, whatever backing the image names.
    ///
    /// # Errors
    /// `Corrupt` when the image is malformed, `Unsupported` naming the feature, `Io`.
    pub async fn open(
        file: Edge,
        backing: Option<Edge>,
        options: OpenOptions,
    ) -> Result<Self, Error> {
        let header = read_header(&file).await?;
        check_data_file(&header, options.data_file.is_some())?;
        Self::open_parsed(file, backing, header, options).await
    }

    pub(super) async fn open_parsed(
        mut file: Edge,
        mut backing: Option<Edge>,
        mut header: Header,
        mut options: OpenOptions,
    ) -> Result<Self, Error> {
        if !options.read_only {
            check_writable_features(&header)?;
            if header.incompatible & incompatible::DIRTY != 0 {
                if !options.log.recover()?.is_empty() {
                    let parts = Self::complete_mapping((file, backing), header, options);
                    (file, backing, options) = Box::pin(parts).await?;
                }
                header = repaired(&file).await?;
            }
        }
        let left_behind = std::mem::take(&mut options.left_behind);
        let mut image = Self::assemble((file, backing), header, options).await?;
        match image.writable {
            true => image.prepare_for_writing().await?,
            false => image.show_left_behind(&left_behind)?,
        }
        image.load_bitmaps().await?;
        Ok(image)
    }

    /// An image with its L1 table and snapshots, and nothing cached.
    pub(super) async fn assemble(
        (file, backing): (Edge, Option<Edge>),
        header: Header,
        options: OpenOptions,
    ) -> Result<Self, Error> {
        let lazy = LazyRefcounts::new(&header, options.lazy_refcounts)?;
        check_crypto(&header, options.crypto.as_deref())?;
        let sizes = options.caches.sizes(&header)?;
        let geometry = with_slices(&header, &options.caches);
        let l1 = read_l1(&file, &header).await?;
        let snapshots = SnapshotTable::read(&file, &header).await?;
        let cluster_size = geometry.cluster_size();
        let host_end = file
            .node()
            .length()
            .checked_next_multiple_of(cluster_size)
            .filter(|end| *end <= MAX_HOST_OFFSET)
            .ok_or_else(|| Error::new(ErrorKind::Invalid, "qcow2: the file is too long"))?;
        let cluster_bits = geometry.cluster_bits;
        let entries = match geometry.extended_l2 {
            true => Content::ExtendedL2Entries { cluster_bits },
            false => Content::L2Entries { cluster_bits },
        };
        let refcounts = geometry.refcount_slice_bits;
        Ok(Self {
            l2: new_cache(geometry.l2_slice_bits, sizes.l2, entries)?,
            refcounts: new_cache(refcounts, sizes.refcounts, Content::Opaque)?,
            pairs: PairSequence::new(),
            discards: options.discards,
            data_file: options.data_file,
            file,
            backing,
            geometry,
            writable: !options.read_only,
            virtual_size: AtomicU64::new(header.size),
            mappable: AtomicU64::new(header.size),
            machine_state_end: AtomicU64::new(0),
            sparse: Default::default(),
            shrunk: AtomicBool::new(false),
            plain_end: AtomicU64::new(0),
            host_end: AtomicU64::new(host_end),
            changes: AtomicU64::new(0),
            l1,
            state: Mutex::new(State {
                refcount_table: RefcountTable {
                    offset: header.refcount_table_offset,
                    entries: Vec::new(),
                    dirty: Default::default(),
                },
                l1_offset: header.l1_offset,
                l1_dirty: Default::default(),
                allocator: Allocator {
                    scan: 0,
                    append: host_end >> geometry.cluster_bits,
                },
                freed: Vec::new(),
                reclaimable: Default::default(),
                abandoned: Vec::new(),
                packing: Packing::default(),
                metadata: MetadataMap::new(options.overlap_checks),
                snapshots,
                flushes: 0,
                flush_under_way: false,
            }),
            backing_reference: Mutex::new(header.backing_reference()),
            header,
            structure: AsyncMutex::new(()),
            flushing: AsyncMutex::new(Default::default()),
            early_flush: AtomicBool::new(false),
            stalls: Arc::default(),
            guest_locks: RangeLock::new(),
            table_loads: RangeLock::new(),
            snapshotting: AsyncMutex::new(()),
            placing: AsyncMutex::new(()),
            inflated: Inflated::new(cluster_size),
            health: Default::default(),
            log: options.log,
            bitmaps: Bitmaps::default(),
            shows: None,
            reporter: options.reporter,
            crypto: options.crypto,
            overlay: Overlay::default(),
            lazy,
        })
    }

    pub(super) async fn read_refcount_table(&self) -> Result<(), Error> {
        let header = &self.header;
        let length = header.refcount_table_clusters << header.cluster_bits;
        let mut entries = Vec::with_capacity((length / 8) as usize);
        read_words(
            &self.file,
            header.refcount_table_offset,
            length,
            |_, word| {
                entries.push(word);
            },
        )
        .await
        .map_err(|error| error.context("Could not read refcount table"))?;
        self.state().refcount_table.entries = entries;
        Ok(())
    }

    async fn prepare_for_writing(&self) -> Result<(), Error> {
        let header = &self.header;
        self.read_refcount_table().await?;
        self.map_metadata(&mut self.state())?;
        if self
            .state()
            .metadata
            .checks()
            .has(Structure::SnapshotL2Table)
        {
            self.map_snapshot_l2_tables().await?;
        }
        if header.autoclear & !KNOWN_AUTOCLEAR != 0 {
            let cleared = (header.autoclear & KNOWN_AUTOCLEAR).to_be_bytes();
            self.write_bytes(field::AUTOCLEAR as u64, &cleared)
                .await
                .map_err(|errno| Error::io("Could not update qcow2 header", errno))?;
        }
        self.replay().await
    }

    /// Finds the L2 tables of snapshots. Those that the active state shares are known already.
    async fn map_snapshot_l2_tables(&self) -> Result<(), Error> {
        let entries = self.state().snapshots.entries.clone();
        let mut clusters = Vec::new();
        for entry in entries {
            let length = u64::from(entry.l1_entries) * 8;
            read_words(&self.file, entry.l1_offset, length, |_, word| {
                if word & OFFSET_MASK != 0 {
                    let offset = HostOffset(word & OFFSET_MASK);
                    clusters.push(self.geometry.host_cluster(offset));
                }
            })
            .await
            .map_err(|error| error.context("Could not read the L1 table of a snapshot"))?;
            clusters.sort_unstable();
            clusters.dedup();
        }
        let mut state = self.state();
        for cluster in clusters {
            state.metadata.add_snapshot_l2_table(cluster);
        }
        Ok(())
    }

    /// Finds all metadata; refuses an image in which two structures share a place.
    pub(super) fn map_metadata(&self, state: &mut State) -> Result<(), Error> {
        let header = &self.header;
        self.map_snapshots(state);
        self.map_bitmaps(state);
        let map = &mut state.metadata;
        let run = |offset: HostOffset, bytes: u64| self.clusters_of(offset, bytes);
        map.add_fixed(Fixed::Header, run(HostOffset(0), 1));
        map.add_fixed(Fixed::L1Table, run(state.l1_offset, self.l1.len() * 8));
        let refcount_table_bytes = state.refcount_table.entries.len() as u64 * 8;
        let refcount_table = run(state.refcount_table.offset, refcount_table_bytes);
        map.add_fixed(Fixed::RefcountTable, refcount_table);
        if let CryptMethod::Luks { offset, length } = header.crypt {
            map.add_fixed(Fixed::Header, run(HostOffset(offset), length));
        }
        if let Some(what) = map.fixed_conflict() {
            return Err(corrupt(format!("qcow2: {what} overlap")));
        }
        for entry in &state.refcount_table.entries {
            let block = entry & REFCOUNT_BLOCK_MASK;
            let cluster = HostCluster(block >> header.cluster_bits);
            // Whoever needs a block that cannot be one finds the image corrupt.
            if block == 0 || !self.geometry.is_aligned(block) || block >= MAX_HOST_OFFSET {
                continue;
            }
            if !map.add_refcount_block(cluster) {
                let message = format!("qcow2: refcount block at {block:#x} is used twice");
                return Err(corrupt(message));
            }
        }
        for entry in self.l1.iter().map(|entry| entry & OFFSET_MASK) {
            if entry != 0 {
                map.add_l2_table(HostCluster(entry >> header.cluster_bits));
            }
        }
        match map.conflict() {
            None => Ok(()),
            Some((cluster, what)) => {
                let offset = self.geometry.host_offset(cluster).0;
                let message = format!("qcow2: {what} at {offset:#x} overlaps other metadata");
                Err(corrupt(message))
            }
        }
    }
}

/// A writer with lazy refcounts was cut off: refcounts are made right before anything relies on
/// them.
async fn repaired(file: &Edge) -> Result<Header, Error> {
    let name = file.node().name();
    tracing::info!(file = name, "qcow2 image was not closed cleanly; repairing");
    let context = |error: Error| error.context("Could not repair dirty image");
    let mut messages = Vec::new();
    let options = CheckOptions::repairing(Repair::All);
    let checked = super::check::check(file, options, &mut messages).await;
    for message in messages.iter().take(MAX_REPAIR_MESSAGES) {
        tracing::warn!(file = name, "{message}");
    }
    let result = checked.map_err(context)?;
    tracing::info!(file = name, ?result, "qcow2 image repaired");
    let header = read_header(file).await?;
    if header.incompatible & incompatible::DIRTY != 0 {
        let message = "Could not repair dirty image: errors remain";
        return Err(Error::new(ErrorKind::Corrupt, message));
    }
    Ok(header)
}

/// Whether an image is given a data file exactly when it has one.
pub(super) fn check_data_file(header: &Header, is_given: bool) -> Result<(), Error> {
    let message = match (header.incompatible & incompatible::DATA_FILE != 0, is_given) {
        (true, false) => "'data-file' is required for this image",
        (false, true) => "'data-file' can only be set for images with an external data file",
        _ => return Ok(()),
    };
    Err(Error::new(ErrorKind::Invalid, message))
}

fn check_writable_features(header: &Header) -> Result<(), Error> {
    if header.incompatible & incompatible::CORRUPT != 0 {
        let message = "qcow2: Image is corrupt; cannot be opened read/write";
        return Err(Error::new(ErrorKind::Corrupt, message));
    }
    Ok(())
}

fn new_cache(slice_bits: u32, budget: u64, content: Content) -> Result<Arc<TableCache>, Error> {
    let cache = TableCache::new(1 << slice_bits, budget, content);
    let failed = |error| {
        let message = format!("Could not allocate a metadata cache of {budget} bytes: {error}");
        Error::new(ErrorKind::Io, message)
    };
    cache.map(Arc::new).map_err(failed)
}

/// The geometry with the slice sizes that keep the caches' indices within bounds.
fn with_slices(header: &Header, options: &CacheOptions) -> Geometry {
    let mut geometry = header.geometry();
    let tables = header.l1_entries.max(geometry.l1_entries_for(header.size));
    let blocks = (header.refcount_table_clusters << header.cluster_bits) / 8;
    // Twice the present number, so that the image can grow.
    let bits = |tables: u64, wanted: u32| {
        let fits = |bits: &u32| (2 * tables) << (header.cluster_bits - bits) <= MAX_SLICES;
        let smallest = wanted.min(header.cluster_bits);
        (smallest..header.cluster_bits)
            .find(fits)
            .unwrap_or(header.cluster_bits)
    };
    let l2_entry_bits = options.l2_entry.map_or(SLICE_BITS, u64::ilog2);
    geometry.l2_slice_bits = bits(tables, l2_entry_bits);
    geometry.refcount_slice_bits = bits(blocks, SLICE_BITS);
    geometry
}

async fn read_l1(file: &Edge, header: &Header) -> Result<L1Table, Error> {
    let l1 = L1Table::new(header.l1_entries);
    read_words(
        file,
        header.l1_offset,
        header.l1_entries * 8,
        |index, word| {
            if word != 0 {
                l1.set(index, word);
            }
        },
    )
    .await
    .map_err(|error| error.context("Could not read L1 table"))?;
    Ok(l1)
}

/// Calls `each` with the index and value of every 64-bit word of a table.
async fn read_words(
    file: &Edge,
    offset: HostOffset,
    length: u64,
    mut each: impl FnMut(u64, u64),
) -> Result<(), Error> {
    let mut done = 0;
    while done < length {
        let step = READ_STEP.min(length - done);
        let bytes = read_bytes(file, offset.0 + done, step as usize)
            .await
            .map_err(|errno| Error::io(format!("{length} bytes at {:#x}", offset.0), errno))?;
        for (number, chunk) in bytes.chunks_exact(8).enumerate() {
            let word = u64::from_be_bytes(chunk.try_into().expect("chunks of eight bytes"));
            each(done / 8 + number as u64, word);
        }
        done += step;
    }
    Ok(())
}

fn corrupt(message: String) -> Error {
    Error::new(ErrorKind::Corrupt, message)
}
