//! The redo log: metadata changes that a kill of the process must not lose.
//!
//! A guest's completed write may live in a cluster whose mapping is only in a metadata cache,
//! because on disk the mapping must not precede the data. The guest outlives the daemon, so a
//! kill must not undo that write. Every change of cached metadata is therefore appended to a log
//! in shared memory (a file on tmpfs) before the write completes, replayed into the cache by
//! the next process that opens the image, and emptied when a flush has made the changes durable.
//! A power cut loses the log together with everything that was not flushed.
//!
//! ```text
//!   words  0 magic  1 device  2 inode  3,4 boot id  5 head  6 tail  7 alive until
//!         8 born  9 capacity  16 record 0 (kind, table, index, value)  20 record 1  ...
//! ```
//!
//! The records are a ring of `capacity`, which doubles when it is full, up to a limit: records whose
//! place differs in the larger ring are copied to its upper half, then one store makes it valid.
//!
//! `head` and `tail` count records since the log was made. A unit of records is published by one
//! store of `tail`, so a kill leaves all of it or nothing. The log belongs to one image (device,
//! inode and time of birth) in one boot of the host; when the inode has been born again the image of
//! the log is gone, and the log with it. With every unit, and while it holds anything about once a
//! second, it is stamped with the time: an image modified clearly later was written by another program after the
//! daemon's death, and replaying would corrupt it.

use crate::error::{Error, ErrorKind, Result};
use executor::sync::Notify;
use executor::{SharedMemory, time};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// One metadata change; the meaning of the fields is the format's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// What kind of table.
    pub kind: u64,
    /// Which table (mostly its host offset).
    pub table: u64,
    /// Which entry.
    pub index: u64,
    /// The new value.
    pub value: u64,
}

/// A position in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark(pub u64);

/// Which image a log belongs to, as `stat` tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageIdentity {
    /// Device number.
    pub device: u64,
    /// Inode number.
    pub inode: u64,
    /// Time of birth, nanoseconds since the epoch, 0 where the file system does not tell: inode
    /// numbers of deleted images are used again.
    pub born_ns: u64,
    /// Time of last modification, nanoseconds since the epoch.
    pub modified_ns: u64,
}

/// A redo log. Any thread may append.
pub struct RedoLog {
    inner: Option<Arc<Inner>>,
}

struct Inner {
    memory: SharedMemory,
    /// Most records that it grows to.
    most: u64,
    path: Option<PathBuf>,
    appending: Mutex<()>,
    /// Told when the log is no longer empty, and when it goes.
    filled: Arc<Notify>,
}

/// "outboard" in ASCII, with the layout's version in the lowest byte.
const MAGIC: u64 = 0x6f75_7462_6f61_7201;
const HEADER_WORDS: usize = 16;
const RECORD_WORDS: usize = 4;
/// Records in a log made by [`RedoLog::open`]: 1 MiB of memory.
const DEFAULT_CAPACITY: usize = 32_768;
/// Records in a log that has grown as far as it does: 4 MiB of memory.
const MAX_CAPACITY: usize = 131_072;
/// How often a log that holds something is stamped.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// How much later than the last stamp the dying process may still have modified the image.
const GRACE_NS: u64 = 3_000_000_000;

mod word {
    pub(super) const MAGIC: usize = 0;
    pub(super) const DEVICE: usize = 1;
    pub(super) const INODE: usize = 2;
    pub(super) const BOOT_ID: usize = 3;
    pub(super) const HEAD: usize = 5;
    pub(super) const TAIL: usize = 6;
    pub(super) const ALIVE: usize = 7;
    pub(super) const BORN: usize = 8;
    pub(super) const CAPACITY: usize = 9;
}

impl RedoLog {
    /// A log that keeps nothing: read-only images, and offline tools, which end with a flush.
    pub fn disabled() -> RedoLog {
        RedoLog { inner: None }
    }

    /// A log in anonymous memory shared by its handles: in the simulated world a killed
    /// process's log is handed to the next through [`RedoLog::share`].
    pub fn in_memory(capacity: usize) -> RedoLog {
        RedoLog::in_memory_growing(capacity, capacity)
    }

    /// [`RedoLog::in_memory`] that grows up to `most` records.
    pub fn in_memory_growing(capacity: usize, most: usize) -> RedoLog {
        let memory = SharedMemory::anonymous(words_for(most));
        memory[word::CAPACITY].store(capacity as u64, Relaxed);
        RedoLog::over(memory, most, None)
    }

    /// Opens the log of `image` in `directory` (private to the daemon, on tmpfs), making it when
    /// absent and emptying it when it is from an earlier boot of the host or of an image that is
    /// gone.
    ///
    /// # Errors
    /// `Io` when the file cannot be made or mapped; `Corrupt` when it is not a redo log, or when
    /// the image was modified by another program since.
    pub fn open(directory: &Path, image: &ImageIdentity) -> Result<RedoLog> {
        let path = path_of(directory, image);
        let (words, most) = (words_for(DEFAULT_CAPACITY), words_for(MAX_CAPACITY));
        let memory = SharedMemory::open(&path, words, most).map_err(|error| {
            Error::new(
                ErrorKind::Io,
                format!("cannot open redo log {}: {error}", path.display()),
            )
        })?;
        let log = RedoLog::over(memory, MAX_CAPACITY, Some(path));
        log.adopt(image)?;
        Ok(log)
    }

    /// The changes that a process that was killed left for `image`. Makes no log.
    ///
    /// # Errors
    /// As [`RedoLog::open`].
    pub fn left_behind(directory: &Path, image: &ImageIdentity) -> Result<Vec<Record>> {
        match path_of(directory, image).exists() {
            true => Self::open(directory, image)?.recover(),
            false => Ok(Vec::new()),
        }
    }

    /// Forgets what a process that was killed left for `image`: another image is made in its file.
    ///
    /// # Errors
    /// `Io` when the log cannot be removed.
    pub fn discard(directory: &Path, image: &ImageIdentity) -> Result<()> {
        let path = path_of(directory, image);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                let message = format!("cannot remove redo log {}: {error}", path.display());
                Err(Error::new(ErrorKind::Io, message))
            }
            _ => Ok(()),
        }
    }

    fn over(memory: SharedMemory, most: usize, path: Option<PathBuf>) -> RedoLog {
        let inner = Inner {
            memory,
            most: most as u64,
            path,
            appending: Mutex::new(()),
            filled: Arc::new(Notify::new()),
        };
        RedoLog {
            inner: Some(Arc::new(inner)),
        }
    }

    /// Checks that what is in the memory belongs to `image`, or starts afresh.
    fn adopt(&self, image: &ImageIdentity) -> Result<()> {
        let Some(inner) = &self.inner else {
            return Ok(());
        };
        let boot = boot_id();
        let memory = &inner.memory;
        let magic = memory[word::MAGIC].load(Acquire);
        let same_boot = boot[0] == memory[word::BOOT_ID].load(Relaxed)
            && boot[1] == memory[word::BOOT_ID + 1].load(Relaxed);
        if magic != 0 && magic != MAGIC {
            return Err(inner.corrupt("not a redo log of this version"));
        }
        let same_birth = memory[word::BORN].load(Relaxed) == image.born_ns;
        if magic == MAGIC && same_boot && same_birth {
            return inner.check(image);
        }
        memory[word::MAGIC].store(0, Release);
        memory[word::DEVICE].store(image.device, Relaxed);
        memory[word::INODE].store(image.inode, Relaxed);
        memory[word::BORN].store(image.born_ns, Relaxed);
        memory[word::BOOT_ID].store(boot[0], Relaxed);
        memory[word::BOOT_ID + 1].store(boot[1], Relaxed);
        memory[word::HEAD].store(0, Relaxed);
        memory[word::TAIL].store(0, Relaxed);
        memory[word::CAPACITY].store(DEFAULT_CAPACITY as u64, Relaxed);
        memory[word::MAGIC].store(MAGIC, Release);
        Ok(())
    }

    /// Another handle on the same memory.
    pub fn share(&self) -> RedoLog {
        RedoLog {
            inner: self.inner.clone(),
        }
    }

    /// The records of the process before, in order; empty after a clean close or power cut. They
    /// stay in the log until [`RedoLog::reset`].
    ///
    /// # Errors
    /// `Corrupt` when the log's counters make no sense.
    pub fn recover(&self) -> Result<Vec<Record>> {
        let Some(inner) = &self.inner else {
            return Ok(Vec::new());
        };
        let (head, tail) = inner.bounds();
        if tail
            .checked_sub(head)
            .is_none_or(|held| held > inner.capacity())
        {
            return Err(inner.corrupt(&format!("impossible bounds {head}..{tail}")));
        }
        Ok((head..tail)
            .map(|position| inner.record(position))
            .collect())
    }

    /// Appends the records as one unit: after a kill either all of them or none is recovered.
    /// False when the log is full: flush the metadata, [`RedoLog::reset`], and append again.
    #[must_use]
    pub fn append(&self, records: &[Record]) -> bool {
        let Some(inner) = &self.inner else {
            return true;
        };
        let _appending = inner
            .appending
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let (head, tail) = inner.bounds();
        let end = tail + records.len() as u64;
        while end - head > inner.capacity() {
            if !inner.grow(head, tail) {
                return false;
            }
        }
        for (position, record) in (tail..end).zip(records) {
            inner.store(position, record);
        }
        // The regular stamp comes late on a host with too much work, and the kill may come first.
        inner.stamp();
        if head == tail {
            inner.filled.notify_all();
        }
        inner.memory[word::TAIL].store(end, Release);
        true
    }

    /// Whether a flush should begin before the log is full.
    pub fn is_half_full(&self) -> bool {
        self.inner.as_ref().is_some_and(|inner| {
            let (head, tail) = inner.bounds();
            tail.wrapping_sub(head) > inner.capacity() / 2
        })
    }

    /// A mark of what is in the log now.
    pub fn mark(&self) -> Mark {
        Mark(self.inner.as_ref().map_or(0, |inner| inner.bounds().1))
    }

    /// Everything up to `mark` is durable in the image and is forgotten.
    pub fn reset(&self, mark: Mark) {
        let Some(inner) = &self.inner else { return };
        let _appending = inner
            .appending
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let (head, tail) = inner.bounds();
        inner.memory[word::HEAD].store(mark.0.clamp(head, tail), Release);
    }

    /// Whether nothing would be recovered.
    pub fn is_empty(&self) -> bool {
        self.inner.as_ref().is_none_or(|inner| {
            let (head, tail) = inner.bounds();
            head == tail
        })
    }

    /// Keeps the stamp fresh while the log holds something: a task of the control thread. Ends
    /// when every other handle is gone, and sleeps while the log is empty.
    pub async fn heartbeat(self) {
        let Some(inner) = self.inner else { return };
        let filled = Arc::clone(&inner.filled);
        let log = Arc::downgrade(&inner);
        drop(inner);
        loop {
            let filled_again = filled.notified();
            let Some(inner) = log.upgrade() else { return };
            let (head, tail) = inner.bounds();
            if head == tail {
                drop(inner);
                filled_again.await;
            } else {
                inner.stamp();
                drop(inner);
                time::sleep(HEARTBEAT).await;
            }
        }
    }

    /// Removes the log's file when it is empty (after a clean close).
    pub fn remove(&self) {
        if let Some(Inner {
            path: Some(path), ..
        }) = self.inner.as_deref()
            && self.is_empty()
            && let Err(error) = std::fs::remove_file(path)
        {
            tracing::warn!(path = %path.display(), %error, "redo log not removed");
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.filled.notify_all();
    }
}

impl Inner {
    fn bounds(&self) -> (u64, u64) {
        (
            self.memory[word::HEAD].load(Acquire),
            self.memory[word::TAIL].load(Acquire),
        )
    }

    fn capacity(&self) -> u64 {
        self.memory[word::CAPACITY].load(Acquire)
    }

    /// Doubles the ring, which holds `head..tail`; false when that is not to be. A kill at any
    /// moment leaves the old ring or the new one.
    fn grow(&self, head: u64, tail: u64) -> bool {
        let old = self.capacity();
        let new = old * 2;
        if new > self.most || self.memory.grow(words_for(new as usize)).is_err() {
            return false;
        }
        for position in (head..tail).filter(|position| position % new >= old) {
            let record = self.record(position);
            store(slot(&self.memory, position % new), &record);
        }
        self.memory[word::CAPACITY].store(new, Release);
        true
    }

    fn words(&self, position: u64) -> &[AtomicU64] {
        slot(&self.memory, position % self.capacity())
    }

    fn record(&self, position: u64) -> Record {
        let words = self.words(position);
        let [kind, table, index, value] = [0, 1, 2, 3].map(|i: usize| words[i].load(Relaxed));
        Record {
            kind,
            table,
            index,
            value,
        }
    }

    fn store(&self, position: u64, record: &Record) {
        store(self.words(position), record);
    }

    fn stamp(&self) {
        self.memory[word::ALIVE].store(wall_clock_ns(), Relaxed);
    }

    /// Checks a log of this boot against the image it is opened for.
    fn check(&self, image: &ImageIdentity) -> Result<()> {
        let capacity = self.capacity();
        if !(1..=self.most).contains(&capacity) || words_for(capacity as usize) > self.memory.len()
        {
            return Err(self.corrupt(&format!("impossible capacity {capacity}")));
        }
        if self.memory[word::DEVICE].load(Relaxed) != image.device
            || self.memory[word::INODE].load(Relaxed) != image.inode
        {
            return Err(self.corrupt("belongs to another image"));
        }
        let (head, tail) = self.bounds();
        let alive = self.memory[word::ALIVE].load(Relaxed);
        if head != tail && image.modified_ns > alive.saturating_add(GRACE_NS) {
            return Err(self.corrupt(&format!(
                "the image was changed by another program after the daemon that served it died; \
                 {} metadata changes no longer fit (remove the log to use the image as it is)",
                tail.wrapping_sub(head)
            )));
        }
        Ok(())
    }

    fn corrupt(&self, reason: &str) -> Error {
        let name = self
            .path
            .as_deref()
            .map_or("(in memory)".into(), Path::to_string_lossy);
        Error::new(ErrorKind::Corrupt, format!("redo log {name}: {reason}"))
    }
}

const fn words_for(records: usize) -> usize {
    HEADER_WORDS + records * RECORD_WORDS
}

/// The words of the record in the ring's `place`-th slot.
fn slot(memory: &SharedMemory, place: u64) -> &[AtomicU64] {
    let first = words_for(place as usize);
    &memory[first..first + RECORD_WORDS]
}

fn store(words: &[AtomicU64], record: &Record) {
    let values = [record.kind, record.table, record.index, record.value];
    for (word, value) in words.iter().zip(values) {
        word.store(value, Relaxed);
    }
}

fn path_of(directory: &Path, image: &ImageIdentity) -> PathBuf {
    directory.join(format!("redo-{:x}-{:x}", image.device, image.inode))
}

fn wall_clock_ns() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |now| now.as_nanos() as u64)
}

/// The kernel's random identifier of this boot; zero where it is not told.
fn boot_id() -> [u64; 2] {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    let half = |range| {
        digits
            .get(range)
            .and_then(|hex| u64::from_str_radix(hex, 16).ok())
    };
    [half(0..16).unwrap_or(0), half(16..32).unwrap_or(0)]
}

#[cfg(test)]
mod tests;
