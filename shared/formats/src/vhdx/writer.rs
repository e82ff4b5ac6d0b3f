//! Changes of the header and of the table of blocks, in their order.
//!
//! ```text
//!   begin: header with new GUIDs, flush ─► in-place writes are let through
//!   allocations ─► pending ─► one of those that wait writes an entry of the log for all ─► the table in memory
//!                                       │ the first of all: flush, entry, flush, header with the log's GUID, flush
//!                                       └ no room: flush, pages in their places, flush, the other half
//!   end: flush, pages in their places, flush, header without the log's GUID, flush
//! ```

use super::bat::{Bat, Entry};
use super::header::{Current, NO_GUID, random_guid};
use super::log::{Lengths, Log, MAX_PAGES, PAGE};
use super::places::Place;
use super::{MIB, Vhdx};
use crate::bytes::write_bytes;
use block::{Edge, Errno};
use executor::sync::{Mutex as AsyncMutex, MutexGuard as AsyncMutexGuard};
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
    /// Entries of the table that are to be logged.
    pending: Mutex<Vec<(u64, Entry)>>,
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

/// Takes a change out of those that are pending, however its request ends.
struct Pending<'a> {
    writer: &'a Writer,
    index: u64,
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        self.writer
            .pending()
            .retain(|(index, _)| *index != self.index);
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

    fn pending(&self) -> MutexGuard<'_, Vec<(u64, Entry)>> {
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
}

impl Vhdx {
    /// Maps a block to a place that its data was written to.
    pub(super) async fn map_block(&self, block: u64, place: Place) -> Result<(), Errno> {
        if !place.is_fresh {
            // What was there before must not show after a power cut.
            self.writer.flush(&self.file).await?;
        }
        let index = self.layout.shape.entry_of(block);
        let entry = Entry::present(place.offset);
        self.writer.pending().push((index, entry));
        let _pending = Pending {
            writer: &self.writer,
            index,
        };
        let mut inner = self.writer.inner.lock().await;
        // Somebody else may have logged it meanwhile.
        while self.bat.get(index) != entry {
            self.log_pending(&mut inner).await?;
        }
        Ok(())
    }

    /// Writes an entry of the log with what is pending, as much of it as fits, and makes it the table's.
    async fn log_pending(&self, inner: &mut AsyncMutexGuard<'_, Inner>) -> Result<(), Errno> {
        if self.writer.failed.load(Ordering::Acquire) {
            return Err(Errno::EIO);
        }
        let changes = self.next_changes();
        let pages = changes
            .iter()
            .map(|(index, _)| Bat::page_of(*index))
            .collect();
        if inner.log.is_none() {
            inner.log = Some(Log::new(self.layout.log, random_guid()?));
        }
        let pages = self.make_room(inner, &pages).await?;
        let Inner {
            current,
            log: Some(log),
            may_be_named,
            is_named,
            flushed_length,
        } = &mut **inner
        else {
            return Err(Errno::EIO);
        };
        let length = self.file.node().length();
        if !*is_named {
            self.writer.flush(&self.file).await?;
            *flushed_length = length;
        }
        let contents = pages.iter().map(|page| {
            let offset = self.page_offset(*page);
            (offset, self.bat.page(*page, &changes))
        });
        let lengths = Lengths {
            flushed: *flushed_length / MIB * MIB,
            last: length.next_multiple_of(MIB),
        };
        let entry = log.entry(&contents.collect::<Vec<_>>(), lengths);
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
        let pending = self.writer.pending();
        let is_pending = |change: &&(u64, Entry)| pending.contains(change);
        for (index, entry) in changes.iter().filter(is_pending) {
            self.bat.set(*index, *entry);
        }
        Ok(())
    }

    /// The pending changes of as many pages as one entry may have.
    fn next_changes(&self) -> Vec<(u64, Entry)> {
        let mut pages = BTreeSet::new();
        let mut changes = self.writer.pending().clone();
        changes.retain(|(index, entry)| {
            let page = Bat::page_of(*index);
            let fits = pages.len() < MAX_PAGES || pages.contains(&page);
            let is_news = self.bat.get(*index) != *entry;
            if fits && is_news {
                pages.insert(page);
            }
            fits && is_news
        });
        changes
    }

    /// The pages of an entry that changes `pages`, for which there is room in the log.
    async fn make_room(
        &self,
        inner: &mut Inner,
        pages: &BTreeSet<u64>,
    ) -> Result<BTreeSet<u64>, Errno> {
        let with = |inner: &Inner| inner.log.as_ref().and_then(|log| log.pages_with(pages));
        if let Some(pages) = with(inner) {
            return Ok(pages);
        }
        self.put_in_place(inner).await?;
        with(inner).ok_or(Errno::EIO)
    }

    fn page_offset(&self, page: u64) -> u64 {
        self.layout.regions.bat.offset + page * PAGE as u64
    }

    /// Writes the pages in the log to their places in the table.
    async fn put_in_place(&self, inner: &mut Inner) -> Result<(), Errno> {
        let Some(log) = &mut inner.log else {
            return Ok(());
        };
        self.writer.flush(&self.file).await?;
        for page in log.waiting() {
            let bytes = self.bat.page(*page, &[]);
            write_bytes(&self.file, self.page_offset(*page), &bytes).await?;
        }
        let length = self.file.node().length();
        self.writer.flush(&self.file).await?;
        inner.flushed_length = length;
        log.emptied();
        Ok(())
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
