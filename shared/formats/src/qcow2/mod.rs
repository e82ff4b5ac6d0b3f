//! qcow2 images, versions 2 and 3 (QEMU docs/interop/qcow2.txt).
//!
//! ```text
//!   lookup / resolve      mapping.rs   guest offset → host offset, from cached L2 slices
//!   prepare, commit       write.rs     allocation of clusters, mapping changes
//!   compressed clusters   compressed/  read, packed and written as the format encodes them
//!   the backing's name    backing.rs   changed, and all content dropped in its favour
//!   zeroes, discard       zero.rs      mapping changes without data
//!   subclusters           cluster.rs   what an L2 entry says, one or two words of it
//!   allocation            alloc.rs     free clusters, new refcount blocks, a larger refcount table
//!   giving back           reclaim.rs   when a freed cluster may be used again
//!   flush                 flush.rs     refcounts → data → L2 → L1, each durable before the next
//!   lazy refcounts        lazy.rs      what a flush leaves in memory, and the dirty bit
//!   kill                  redo.rs      metadata changes kept in the redo log, and their replay
//! ```
//!
//! The rules, in full in docs/qcow2.md:
//! - Metadata changes live in memory (cache and redo log) until a flush writes them in order, so
//!   what is on disk is consistent at every moment; a power cut leaks clusters at worst.
//! - Every change of metadata happens under `state`, together with its redo record. A flush
//!   copies what is dirty under the same lock.
//! - A freed cluster keeps its refcount until its release is durable and every request that may
//!   still use it has ended: refcount zero in memory means free to use.
//! - Lock order: guest clusters, `placing`, `structure`, `flushing`, `state`. I/O is never done under
//!   `state`. Who holds `structure` loads refcount blocks but no L2 tables.
//!
//! Refused with the feature's name: unknown incompatible features.

mod alloc;
mod amend;
mod backing;
mod bitmaps;
mod cache;
mod check;
mod cluster;
mod compressed;
mod cover;
mod create;
mod create_entry;
mod crypto;
mod document;
mod driver;
mod entry;
mod flatten;
mod flush;
mod header;
mod lazy;
mod mapping;
mod measure;
mod open;
mod overlap;
mod overlay;
mod preallocate;
mod reclaim;
mod redo;
mod refcount;
mod resize;
mod snapshots;
mod tables;
#[cfg(test)]
pub(crate) mod tests;
mod width;
mod write;
mod zero;

pub use cache::options::CacheOptions;
pub use check::check;
pub use compressed::Codec;
pub use create::{CreateOptions, create, create_with_data};
pub use crypto::{Crypto, Encryption};
pub use entry::ENTRY;
pub use open::OpenOptions;
pub use overlap::OverlapChecks;
pub use reclaim::DiscardPolicy;

use crate::bytes::{read_bytes, write_bytes as write_to};
use crate::two_level::L1Table;
use alloc::Allocator;
use bitmaps::Bitmaps;
use block::events::{Corruption, Reporter};
use block::redo_log::RedoLog;
use block::{BackingReference, Edge, Event};
use cache::{Claim, Pinned, TableCache};
use cluster::PairSequence;
use compressed::{Inflated, Packing};
use executor::sync::{Mutex as AsyncMutex, RangeLock};
use executor::{Buffer, Errno};
use flush::FlushHistory;
use header::Header;
use lazy::LazyRefcounts;
use overlap::MetadataMap;
use overlay::Overlay;
use reclaim::Freed;
use snapshots::SnapshotTable;
use std::collections::{BTreeSet, VecDeque};
use std::fmt::Display;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tables::{ClusterRun, Geometry, HostOffset};

/// An open qcow2 image. What each look-up reads comes first and is in one cache line.
#[repr(C, align(64))]
pub struct Qcow2 {
    geometry: Geometry,
    l2: Arc<TableCache>,
    /// How often look-ups were taken back; see [`Format::changes`].
    changes: AtomicU64,
    /// Bytes of the file that hold or may hold clusters; a multiple of the cluster size.
    host_end: AtomicU64,
    health: Health,
    /// What data is encrypted with.
    crypto: Option<Arc<Crypto>>,
    /// Changes of L2 entries that the file lacks, in an image that is only read.
    overlay: Overlay,
    file: Edge,
    /// The external data file.
    data_file: Option<Edge>,
    backing: Option<Edge>,
    header: Header,
    /// What the image says about its backing now.
    backing_reference: Mutex<BackingReference>,
    writable: bool,
    /// Bytes of the virtual disk.
    virtual_size: AtomicU64,
    /// Guest bytes that may get a mapping; differs from the size while that changes.
    mappable: AtomicU64,
    /// Where the machine state that may be mapped ends, counted as the disk is; 0 when none may.
    machine_state_end: AtomicU64,
    /// Whether mapped storage may be holes of the file, once it is known.
    sparse: std::sync::OnceLock<bool>,
    /// The disk became smaller: the file is cut off when the image is closed.
    shrunk: AtomicBool,
    /// Where the last cluster ends that was taken for plain data, in bytes of the file.
    plain_end: AtomicU64,
    l1: L1Table,
    /// Tells readers of extended L2 entries what changed meanwhile.
    pairs: PairSequence,
    refcounts: Arc<TableCache>,
    discards: DiscardPolicy,
    state: Mutex<State>,
    /// Serialises what adds tables: L2 tables, refcount blocks, the refcount table, resizing.
    structure: AsyncMutex<()>,
    flushing: AsyncMutex<FlushHistory>,
    /// A flush was asked for before anybody needs it, and has not begun.
    early_flush: AtomicBool,
    /// How often a writer had to wait for a flush.
    stalls: Arc<AtomicU64>,
    /// Guest bytes whose mapping is about to change.
    guest_locks: RangeLock,
    /// Held shared while L2 slices are read for a request that holds no guest lock.
    table_loads: RangeLock,
    /// One operation on snapshots at a time.
    snapshotting: AsyncMutex<()>,
    /// Serialises finding places for compressed clusters.
    placing: AsyncMutex<()>,
    /// Compressed clusters read last.
    inflated: Inflated,
    log: RedoLog,
    bitmaps: Bitmaps,
    /// The snapshot that this image shows, when it is a view of one.
    shows: Option<Arc<()>>,
    reporter: Reporter,
    lazy: LazyRefcounts,
}

/// Everything that changes with the metadata.
struct State {
    refcount_table: RefcountTable,
    l1_offset: HostOffset,
    /// Sectors of the L1 table that are not on disk.
    l1_dirty: BTreeSet<u64>,
    allocator: Allocator,
    /// Clusters unlinked by changes that are not durable yet.
    freed: Vec<Freed>,
    /// Clusters whose unlinking is durable.
    reclaimable: VecDeque<Freed>,
    /// Clusters of prepared writes that were dropped.
    abandoned: Vec<ClusterRun>,
    /// Where compressed clusters go.
    packing: Packing,
    metadata: MetadataMap,
    snapshots: SnapshotTable,
    /// Flushes begun.
    flushes: u64,
    flush_under_way: bool,
}

/// The refcount table in memory, in host byte order.
struct RefcountTable {
    offset: HostOffset,
    entries: Vec<u64>,
    /// Sectors of the table that are not on disk.
    dirty: BTreeSet<u64>,
}

/// Bytes of a table that are written as one: no write tears them.
const SECTOR: u64 = 512;

/// The image is corrupt.
const CORRUPT: u8 = 1;
/// A snapshot operation is under way: every write locks its clusters.
const STILL: u8 = 2;

#[derive(Default)]
struct Health {
    /// Metadata is inconsistent: nothing is written any more.
    corrupt: AtomicBool,
    /// Why no write goes in place: [`CORRUPT`], [`STILL`].
    not_in_place: AtomicU8,
    /// Writing metadata failed: flushes fail until the image is opened again.
    failed: AtomicBool,
    /// Redo records are being applied and must stay in the log.
    replaying: AtomicBool,
}

impl Qcow2 {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The mapping has changed, or what may be written in place: extents of earlier look-ups no longer
    /// count.
    fn take_lookups_back(&self) {
        self.changes.fetch_add(1, AcqRel);
    }

    /// From now on no look-up allows writes in place.
    fn keep_writes_from_place(&self, reason: u8) {
        self.health.not_in_place.fetch_or(reason, SeqCst);
        self.take_lookups_back();
    }

    fn check_writable(&self) -> Result<(), Errno> {
        if !self.writable {
            return Err(Errno::EPERM);
        }
        if self.health.corrupt.load(Acquire) {
            return Err(Errno::EIO);
        }
        Ok(())
    }

    /// The slice `index` of `cache`, read from `offset` of the file when it is not cached.
    async fn load<'c>(
        &self,
        cache: &'c TableCache,
        index: u64,
        offset: HostOffset,
    ) -> Result<Pinned<'c>, Errno> {
        loop {
            match cache.claim(index) {
                Claim::Present(slice) => return Ok(slice),
                Claim::Vacant(fill) => {
                    let buffer = Buffer::zeroed(cache.slice_bytes());
                    let of_refcounts = std::ptr::eq(cache, &*self.refcounts);
                    self.event(match of_refcounts {
                        true => Event::RefblockLoad,
                        false => Event::L2Load,
                    })
                    .await;
                    self.file.node().read(offset.0, buffer.clone()).await?;
                    let mut bytes = buffer.to_heap();
                    if std::ptr::eq(cache, &*self.l2) {
                        self.overlay.apply(&self.geometry, index, &mut bytes);
                    }
                    return Ok(fill.complete(&bytes));
                }
                Claim::Busy => {
                    cache.wait_unless(|cache| cache.is_claimable(index)).await;
                }
                Claim::AllDirty => self.flush_metadata().await?,
            }
        }
    }

    /// Whether the external data file has to read as the disk does by itself.
    fn is_raw_data_file(&self) -> bool {
        self.data_file.is_some() && self.header.autoclear & header::AUTOCLEAR_DATA_FILE_RAW != 0
    }

    /// Tells whoever listens below that a request has reached `event`.
    async fn event(&self, event: Event) {
        self.file.node().event(event).await;
    }

    async fn write_bytes(&self, offset: u64, bytes: &[u8]) -> Result<(), Errno> {
        write_to(&self.file, offset, bytes).await
    }

    /// Metadata makes no sense: says so, stops all writing for good, and answers with `EIO`.
    async fn corruption(&self, what: impl Display) -> Errno {
        self.corruption_found(what.to_string().into()).await
    }

    /// [`Qcow2::corruption`], found by a write that would have hit metadata.
    async fn corruption_found(&self, found: Corruption) -> Errno {
        let what = &found.message;
        let node = self.file.node().name();
        let known = self.health.corrupt.swap(true, Relaxed);
        match (known, self.writable) {
            (true, _) => tracing::debug!(file = node, "qcow2: {what}"),
            (false, true) => tracing::error!(
                file = node,
                "qcow2: Marking image as corrupt: {what}; further corruption events will be \
                 suppressed"
            ),
            (false, false) => tracing::error!(
                file = node,
                "qcow2: Image is corrupt: {what}; further non-fatal corruption events will be \
                 suppressed"
            ),
        }
        if !known {
            self.reporter.image_corrupted(found, self.writable);
        }
        self.keep_writes_from_place(CORRUPT);
        if self.writable
            && !known
            && self.header.version >= 3
            && let Err(error) = self.write_incompatible_features().await
        {
            tracing::error!(file = node, %error, "cannot mark the image as corrupt");
        }
        Errno::EIO
    }
}
