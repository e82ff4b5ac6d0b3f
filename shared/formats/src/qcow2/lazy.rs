//! Lazy refcounts: what flushes leave in memory, and the mark in the file that tells of it
//! (QEMU docs/interop/qcow2.txt, "lazy refcounts" and the dirty bit).
//!
//! ```text
//!   clean ──(first flush that leaves refcounts: dirty bit, durable before any L2 entry)──► marked
//!   marked ──(close: every refcount durable, then the bit goes)──► clean
//!   marked ──(kill or power cut)──► opened for writing: mapping from the redo log, repair ──► clean
//! ```
//!
//! - Only a guest's flushes, and those that make room, leave refcounts; whoever rests on the refcounts
//!   in the file (snapshots, bitmaps, a check, resizing) flushes them, too.
//! - L2 tables are counted in the file before they are referred to, so a repair finds metadata
//!   counted and data that is not.
//! - While the image is marked, refcounts of the file mean nothing to a successor: it takes what the redo log
//!   holds of the mapping and counts again.
//!
//! Knows neither who allocates nor when flushes come.

use super::header::{Header, incompatible};
use super::open::OpenOptions;
use super::redo::RedoRecord;
use super::tables::HostCluster;
use super::{Qcow2, header};
use block::{Edge, Error, ErrorKind};
use executor::Errno;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{Acquire, Release};

/// Whether refcounts may stay in memory, and what the file says of them.
pub(super) struct LazyRefcounts {
    /// The image, or who opened it, asks for it.
    is_on: bool,
    /// The dirty bit is in the file, or may be.
    marked: AtomicBool,
    /// The dirty bit is durable.
    durable: AtomicBool,
}

/// How much a flush writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scope {
    /// All there is.
    Everything,
    /// Whatever a mapping needs to survive: refcounts may stay in memory where they are lazy.
    Mapping,
}

impl LazyRefcounts {
    /// What `option` asks for, or else the image.
    pub(super) fn new(header: &Header, option: Option<bool>) -> Result<Self, Error> {
        let asked = header.compatible & header::COMPATIBLE_LAZY_REFCOUNTS != 0;
        let is_on = option.unwrap_or(asked);
        if is_on && header.version < 3 {
            let message = "Lazy refcounts require a qcow2 image with at least qemu 1.1 \
                           compatibility level";
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        Ok(Self {
            is_on,
            marked: AtomicBool::new(header.incompatible & incompatible::DIRTY != 0),
            durable: AtomicBool::new(false),
        })
    }

    pub(super) fn is_on(&self) -> bool {
        self.is_on
    }

    /// Whether the file says that its refcounts may be wrong.
    pub(super) fn is_marked(&self) -> bool {
        self.marked.load(Acquire)
    }

    /// Whether that is durable, so that nothing is lost by leaving refcounts in memory.
    pub(super) fn is_durably_marked(&self) -> bool {
        self.durable.load(Acquire)
    }

    /// The file has been flushed since the bit was written.
    pub(super) fn mark_is_durable(&self) {
        self.durable.store(true, Release);
    }
}

impl Qcow2 {
    /// The incompatible features as the file should have them now.
    pub(super) fn incompatible_features(&self) -> u64 {
        let bit = |set, bit| if set { bit } else { 0 };
        let others = self.header.incompatible & !incompatible::DIRTY;
        let corrupt = self.health.corrupt.load(Acquire);
        others
            | bit(self.lazy.is_marked(), incompatible::DIRTY)
            | bit(corrupt, incompatible::CORRUPT)
    }

    /// Writes the incompatible features; who changes one meanwhile is not undone.
    pub(super) async fn write_incompatible_features(&self) -> Result<(), Errno> {
        loop {
            let features = self.incompatible_features();
            let field = header::field::INCOMPATIBLE as u64;
            self.write_bytes(field, &features.to_be_bytes()).await?;
            if features == self.incompatible_features() {
                return Ok(());
            }
        }
    }

    /// Sets the dirty bit; the caller holds `flushing` and flushes the file.
    pub(super) async fn mark_dirty(&self) -> Result<(), Errno> {
        self.lazy.marked.store(true, Release);
        self.write_incompatible_features().await
    }

    /// Takes the dirty bit away, at the end of a close: every refcount is durable. A corrupt image
    /// keeps it.
    pub(super) async fn unmark_dirty(&self) -> Result<(), Errno> {
        if !self.lazy.is_marked() || self.health.corrupt.load(Acquire) {
            return Ok(());
        }
        self.lazy.durable.store(false, Release);
        self.lazy.marked.store(false, Release);
        self.write_incompatible_features().await?;
        self.file.node().flush().await
    }

    /// Has the refcounts around a new table in the file before anything refers to it. They stay dirty:
    /// the flush that writes all refcounts writes these again.
    pub(super) async fn count_in_file(&self, cluster: HostCluster) -> Result<(), Errno> {
        if !self.lazy.is_on {
            return Ok(());
        }
        // No older copy of the slice is being written.
        let _no_flush = self.flushing.lock().await;
        let index = self.geometry.refcount_slice(cluster);
        let copied = {
            let state = self.state();
            // Refcounts that are not cached are in the file.
            self.refcounts.pin(index).map(|slice| {
                let words = 0..self.refcounts.slice_bytes() / 8;
                let bytes: Vec<u8> = words
                    .flat_map(|word| slice.word(word).to_be_bytes())
                    .collect();
                (self.refcount_slice_place(&state, index), bytes)
            })
        };
        match copied {
            Some((place, bytes)) => self.write_bytes(place.0, &bytes).await,
            None => Ok(()),
        }
    }

    /// Brings what the redo log holds of the mapping into the file of an image that is marked as dirty, so
    /// that a repair counts all of it. Answers with what the image is to be opened from afterwards.
    pub(super) async fn complete_mapping(
        (file, backing): (Edge, Option<Edge>),
        header: Header,
        options: OpenOptions,
    ) -> Result<(Edge, Option<Edge>, OpenOptions), Error> {
        let (caches, overlap_checks) = (options.caches, options.overlap_checks);
        let (read_only, lazy_refcounts) = (options.read_only, options.lazy_refcounts);
        let image = Self::assemble((file, backing), header, options).await?;
        image.read_refcount_table().await?;
        image.replay_mapping().await?;
        let failed = |errno| Error::io("cannot write what the redo log holds", errno);
        image.flush_metadata().await.map_err(failed)?;
        let options = OpenOptions {
            read_only,
            caches,
            log: image.log,
            left_behind: Vec::new(),
            discards: image.discards,
            data_file: image.data_file,
            overlap_checks,
            crypto: image.crypto,
            reporter: image.reporter,
            lazy_refcounts,
        };
        Ok((image.file, image.backing, options))
    }

    /// Puts the mapping that the process before had not flushed into the caches, and none of the
    /// refcounts.
    async fn replay_mapping(&self) -> Result<(), Error> {
        let concerns_mapping = |record: &RedoRecord| {
            !matches!(
                record,
                RedoRecord::Refcount { .. } | RedoRecord::Free { .. }
            )
        };
        self.replay_some(concerns_mapping).await
    }
}
