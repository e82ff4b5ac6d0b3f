//! The redo log: metadata changes that a kill of the process must not lose.
//!
//! A guest's completed write may live in a cluster whose mapping is only in a metadata cache,
//! because on disk the mapping must not precede the data. The guest outlives the daemon, so a
//! kill must not undo that write. Every change of cached metadata is therefore appended to a log
//! in shared memory (a file on tmpfs) before the write completes, replayed into the cache by
//! the next process that opens the image, and emptied when a flush has made the changes durable.
//! A power cut loses the log together with everything that was not flushed.

use crate::error::Result;

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

/// A redo log. Any thread may append.
pub struct RedoLog {}

impl RedoLog {
    /// A log that keeps nothing (read-only images).
    pub fn disabled() -> RedoLog {
        todo!()
    }
    /// A log in anonymous memory shared by its clones (the simulated world: a killed process's
    /// log is handed to the next).
    pub fn in_memory(capacity: usize) -> RedoLog {
        todo!()
    }
    /// Another handle on the same memory.
    pub fn share(&self) -> RedoLog {
        todo!()
    }
    /// The records of the process before, in order; empty after a clean close or power cut.
    pub fn recover(&self) -> Result<Vec<Record>> {
        todo!()
    }
    /// Appends the records as one unit: after a kill either all of them or none is recovered.
    /// False when the log is full: flush the metadata, [`RedoLog::reset`], and append again.
    pub fn append(&self, records: &[Record]) -> bool {
        todo!()
    }
    /// A mark of what is in the log now.
    pub fn mark(&self) -> Mark {
        todo!()
    }
    /// Everything up to `mark` is durable in the image and is forgotten.
    pub fn reset(&self, mark: Mark) {
        todo!()
    }
}

/// A position in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark(pub u64);
