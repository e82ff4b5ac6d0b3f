//! An L1 table in memory: read without locks on every request, grown without moving.

use std::sync::OnceLock;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Release};

const CHUNK: usize = 4096;
/// Most entries of a table: 32 MiB of memory.
pub(crate) const MAX_ENTRIES: usize = 4 << 20;

/// The L1 table, in host byte order.
pub(crate) struct L1Table {
    chunks: Box<[OnceLock<Box<[AtomicU64]>>]>,
    len: AtomicU64,
}

impl L1Table {
    /// A table of `len` empty entries, at most [`MAX_ENTRIES`].
    pub(crate) fn new(len: u64) -> Self {
        Self {
            chunks: (0..MAX_ENTRIES / CHUNK).map(|_| OnceLock::new()).collect(),
            len: AtomicU64::new(len.min(MAX_ENTRIES as u64)),
        }
    }

    /// Number of entries.
    pub(crate) fn len(&self) -> u64 {
        self.len.load(Acquire)
    }

    /// The entry; empty beyond the end.
    #[inline]
    pub(crate) fn entry(&self, index: u64) -> u64 {
        let chunk = self.chunks.get(index as usize / CHUNK);
        chunk
            .and_then(OnceLock::get)
            .map_or(0, |chunk| chunk[index as usize % CHUNK].load(Acquire))
    }

    /// Changes an entry below the end.
    pub(crate) fn set(&self, index: u64, value: u64) {
        let chunk = &self.chunks[index as usize / CHUNK];
        let chunk = chunk.get_or_init(|| (0..CHUNK).map(|_| AtomicU64::new(0)).collect());
        chunk[index as usize % CHUNK].store(value, Release);
    }

    /// Appends empty entries.
    pub(crate) fn grow(&self, len: u64) {
        self.len.fetch_max(len.min(MAX_ENTRIES as u64), Release);
    }

    /// Every entry in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = u64> {
        (0..self.len()).map(|index| self.entry(index))
    }
}
