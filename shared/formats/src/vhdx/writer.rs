//! Changes of the header and of the table of blocks, in their order.
//!
//! ```text
//!   begin: header with new GUIDs, flush ─► in-place writes are let through
//!   allocations ─► pending ─► one of those that wait writes an entry of the log for all
//!                                       │ the first of all: flush, entry, flush, header with the log's GUID, flush
//!                                       └ no room: flush, pages in their places, flush, the other half
//!   end: flush, pages in their places, flush, header without the log's GUID, flush
//! ```

use super::bat::{ENTRY_BYTES, raw_present};
use super::header::{Current, NO_GUID, random_guid};
use super::log::{Lengths, Log, MAX_PAGES, PAGE, Pages};
use super::{MIB, Vhdx};
use crate::bytes::{read_bytes, write_bytes};
use block::{Edge, Errno, Resize};
use executor::sync::Mutex as AsyncMutex;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What is changed, and how far it has come.
pub(super) struct Writer {
    /// The header has what it needs for changes of the disk.
    begun: AtomicBool,
    /// Entries of the log: written, and known to be durable.
    written: AtomicU64,
    durable: AtomicU64,
    /// A flush failed: what was written before is lost or not.
    failed: AtomicBool,
    /// Changes of the table that are to be logged.
    pending: Mutex<Vec<Change>>,
    inner: AsyncMutex<Inner>,
}

struct Inner {
    current: Current,
    /// Absent until there is something to log.
    log: Option<Log>,
    /// The header in the file may name the log.
    may_be_named: bool,
    /// It does, and the log has an entry.
    is_named: bool,
    /// The file is durably as long as this, in bytes.
    flushed_length: u64,
}

/// A change of the table of blocks: an entry, by its offset in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Change {
    at: u64,
    raw: u64,
}

/// Where the page begins that has the byte at `offset`.
fn page_of(offset: u64) -> u64 {
    offset / PAGE as u64 * PAGE as u64
}

/// Takes a change out of those that are pending, however its request ends.
struct Pending<'a> {
    writer: &'a Writer,
    change: Change,
}

impl Pending<'_> {
    fn is_there(&self) -> bool {
        self.writer.pending().contains(&self.change)
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        self.writer
            .pending()
            .retain(|change| *change != self.change);
    }
}

impl Writer {
    /// Of an image with this header.
    pub(super) fn new(current: Current, length: u64) -> Self {
        Self {
            begun: AtomicBool::new(false),
            written: AtomicU64::new(0),
            durable: AtomicU64::new(0),
            failed: AtomicBool::new(false),
            pending: Mutex::default(),
            inner: AsyncMutex::new(Inner {
                may_be_named: false,
                is_named: false,
                log: None,
                // Before the first entry, all is flushed.
                flushed_length: length,
                current,
            }),
        }
    }

    fn pending(&self) -> MutexGuard<'_, Vec<Change>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether blocks may be written in place.
    pub(super) fn has_begun(&self) -> bool {
        self.begun.load(Ordering::Acquire)
    }

    /// Whether a flush has to pass by here.
    pub(super) fn is_dirty(&self) -> bool {
        let durable = self.durable.load(Ordering::Acquire);
        self.written.load(Ordering::Acquire) != durable || self.failed.load(Ordering::Acquire)
    }

    /// Notes that the log in the file may have lost something.
    fn fail(&self, errno: Errno) -> Errno {
        self.failed.store(true, Ordering::Release);
        errno
    }

    /// Before the first change of the disk: tells so in the header.
    pub(super) async fn begin(&self, file: &Edge) -> Result<(), Errno> {
        if self.has_begun() {
            return Ok(());
        }
        let mut inner = self.inner.lock().await;
        if self.has_begun() {
            return Ok(());
        }
        let (file_write, data_write) = (random_guid()?, random_guid()?);
        let changed = inner.current.write(file, |header| {
            header.file_write = file_write;
            header.data_write = data_write;
        });
        changed.await?;
        self.begun.store(true, Ordering::Release);
        Ok(())
    }

    /// Makes data and log durable.
    pub(super) async fn flush(&self, file: &Edge) -> Result<(), Errno> {
        if self.failed.load(Ordering::Acquire) {
            return Err(Errno::EIO);
        }
        let written = self.written.load(Ordering::Acquire);
        let flushed = file.node().flush().await;
        flushed.map_err(|errno| self.fail(errno))?;
        self.durable.fetch_max(written, Ordering::AcqRel);
        Ok(())
    }

    /// The pending changes of as many pages as one entry may have, and where these begin.
    fn next_changes(&self) -> (Vec<Change>, BTreeSet<u64>) {
        let mut offsets = BTreeSet::new();
        let mut changes = self.pending().clone();
        changes.retain(|change| {
            let offset = page_of(change.at);
            let fits = offsets.len() < MAX_PAGES || offsets.contains(&offset);
            if fits {
                offsets.insert(offset);
            }
            fits
        });
        (changes, offsets)
    }
}

impl Vhdx {
    /// Makes the file's table of blocks refer to a place that a block was written to.
    pub(super) async fn log_block(&self, block: u64, offset: u64) -> Result<(), Errno> {
        let change = Change {
            at: self.layout.regions.bat.offset + self.layout.shape.entry_of(block) * ENTRY_BYTES,
            raw: raw_present(offset),
        };
        self.writer.pending().push(change);
        let pending = Pending {
            writer: &self.writer,
            change,
        };
        let mut inner = self.writer.inner.lock().await;
        // Somebody else may have logged it meanwhile.
        while pending.is_there() {
            self.log_pending(&mut inner).await?;
        }
        Ok(())
    }

    /// Writes an entry of the log with what is pending, as much of it as fits.
    async fn log_pending(&self, inner: &mut Inner) -> Result<(), Errno> {
        if self.writer.failed.load(Ordering::Acquire) {
            return Err(Errno::EIO);
        }
        let (changes, offsets) = self.writer.next_changes();
        let log = match inner.log.take() {
            Some(log) => log,
            None => Log::new(self.layout.log, random_guid()?),
        };
        if !inner.log.insert(log).has_room_for(&offsets) {
            self.put_in_place(inner).await?;
        }
        let Inner {
            current,
            log: Some(log),
            may_be_named,
            is_named,
            flushed_length,
        } = inner
        else {
            return Err(Errno::EIO);
        };
        let pages = self.changed_pages(log, (&changes, &offsets)).await?;
        let length = self.file.node().length();
        if !*is_named {
            self.writer.flush(&self.file).await?;
            *flushed_length = length;
        }
        let lengths = Lengths {
            flushed: *flushed_length / MIB * MIB,
            last: length.next_multiple_of(MIB),
        };
        let entry = log.entry(&pages, lengths);
        let at = self.layout.log.offset + entry.at;
        write_bytes(&self.file, at, &entry.bytes).await?;
        self.writer.written.fetch_add(1, Ordering::AcqRel);
        if !*is_named {
            // An entry that is not durable would leave a log with nothing in it.
            self.writer.flush(&self.file).await?;
            *may_be_named = true;
            let guid = log.guid();
            let named = current.write(&self.file, |header| header.log_guid = guid);
            named.await.map_err(|errno| self.writer.fail(errno))?;
            *is_named = true;
        }
        log.written(pages);
        let mut pending = self.writer.pending();
        pending.retain(|change| !changes.contains(change));
        Ok(())
    }

    /// The pages that are waiting, and those at `offsets`, with `changes` in them.
    async fn changed_pages(
        &self,
        log: &Log,
        (changes, offsets): (&[Change], &BTreeSet<u64>),
    ) -> Result<Pages, Errno> {
        let mut pages = log.waiting().clone();
        for offset in offsets {
            if !pages.contains_key(offset) {
                pages.insert(*offset, read_bytes(&self.file, *offset, PAGE).await?);
            }
        }
        for Change { at, raw } in changes {
            if let Some(page) = pages.get_mut(&page_of(*at)) {
                let within = (at % PAGE as u64) as usize;
                page[within..within + size_of::<u64>()].copy_from_slice(&raw.to_le_bytes());
            }
        }
        Ok(pages)
    }

    /// Writes the pages in the log to their places in the table.
    async fn put_in_place(&self, inner: &mut Inner) -> Result<(), Errno> {
        let Some(log) = &mut inner.log else {
            return Ok(());
        };
        self.writer.flush(&self.file).await?;
        for (offset, page) in log.waiting() {
            write_bytes(&self.file, *offset, page).await?;
        }
        let length = self.file.node().length();
        self.writer.flush(&self.file).await?;
        inner.flushed_length = length;
        log.emptied();
        Ok(())
    }

    /// Makes the file as long as `end`, if it is shorter.
    pub(super) async fn lengthen(&self, end: u64) -> Result<(), Errno> {
        let _longer = self.longer.lock().await;
        let node = self.file.node();
        if end <= node.length() {
            return Ok(());
        }
        let resize = Resize::to(end);
        let resized = node.resize(resize).await;
        resized.map_err(|error| error.errno.unwrap_or(Errno::ENOSPC))
    }

    /// Empties the log, and takes it out of the header.
    pub(super) async fn end_log(&self) -> Result<(), Errno> {
        let mut inner = self.writer.inner.lock().await;
        if !inner.may_be_named {
            return Ok(());
        }
        self.put_in_place(&mut inner).await?;
        let cleared = inner
            .current
            .write(&self.file, |header| header.log_guid = NO_GUID);
        cleared.await.map_err(|errno| self.writer.fail(errno))?;
        inner.may_be_named = false;
        inner.is_named = false;
        // The next entry begins another log.
        inner.log = None;
        Ok(())
    }
}
