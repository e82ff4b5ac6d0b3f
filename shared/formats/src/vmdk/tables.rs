//! Grain tables in memory: those that were used, up to a bound.
//!
//! ```text
//!   peek(table) ── its slot holds it? ──yes──► look at the entries, no lock taken
//!        └─no──► lock(table) ─► load: read from the file, published in the slot
//!                    └────────► set: an entry, once the file has it
//! ```
//!
//! Each table has one slot, which others share. A slot's version is odd while its table changes, and
//! another one afterwards, so whoever looked meanwhile notices and asks again. An entry that changes by
//! itself is one word. Loading and setting need the slot's lock: what is loaded never misses what is set.

use super::header::Layout;
use super::{Entry, SECTOR};
use crate::bytes::read_bytes;
use block::{Edge, Errno};
use executor::sync::{RangeGuard, RangeLock};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering, fence};

/// Memory for the tables of one extent, in bytes.
const KEPT_BYTES: u64 = 32 << 20;
/// In a slot: no table.
const NO_TABLE: u64 = u64::MAX;

/// See the module.
pub(super) struct Tables {
    slots: Box<[Slot]>,
    busy: RangeLock,
    layout: Layout,
}

struct Slot {
    version: AtomicU64,
    table: AtomicU64,
    entries: OnceLock<Box<[AtomicU64]>>,
}

/// The right to load a table and to change its entries.
pub(super) struct Locked<'a> {
    _busy: RangeGuard<'a>,
    slot: &'a Slot,
    table: u64,
}

impl Tables {
    /// For the tables of an extent.
    pub(super) fn new(layout: &Layout) -> Self {
        let bytes = u64::from(layout.table_entries) * size_of::<u64>() as u64;
        let slots = layout.directory_entries.clamp(1, KEPT_BYTES / bytes);
        let slot = |_| Slot {
            version: AtomicU64::new(0),
            table: AtomicU64::new(NO_TABLE),
            entries: OnceLock::new(),
        };
        Self {
            slots: (0..slots).map(slot).collect(),
            busy: RangeLock::new(),
            layout: layout.clone(),
        }
    }

    fn index(&self, table: u64) -> u64 {
        table % self.slots.len() as u64
    }

    /// What `look` sees of a table's entries, if they are in memory.
    #[inline]
    pub(super) fn peek<T>(&self, table: u64, look: impl FnOnce(&[AtomicU64]) -> T) -> Option<T> {
        let slot = &self.slots[self.index(table) as usize];
        let version = slot.version.load(Ordering::Acquire);
        let is_there = version.is_multiple_of(2) && slot.table.load(Ordering::Relaxed) == table;
        let entries = slot.entries.get().filter(|_| is_there)?;
        let seen = look(entries);
        fence(Ordering::Acquire);
        (slot.version.load(Ordering::Relaxed) == version).then_some(seen)
    }

    /// Keeps others from loading and changing a table.
    pub(super) async fn lock(&self, table: u64) -> Locked<'_> {
        let index = self.index(table);
        Locked {
            _busy: self.busy.lock(index..index + 1).await,
            slot: &self.slots[index as usize],
            table,
        }
    }

    /// Reads the table that begins at `offset` of the file into its slot.
    pub(super) async fn load(
        &self,
        locked: &Locked<'_>,
        (file, offset): (&Edge, u64),
    ) -> Result<(), Errno> {
        let entries = self.read(file, offset).await?;
        locked.publish(&entries);
        Ok(())
    }

    /// Reads the table that begins at `offset` of the file. `EIO` when it does not lie within.
    pub(super) async fn read(&self, file: &Edge, offset: u64) -> Result<Vec<u64>, Errno> {
        let layout = &self.layout;
        let length = u64::from(layout.table_entries) * layout.entry_bytes();
        let node = file.node();
        if offset
            .checked_add(length)
            .is_none_or(|end| end > node.length().next_multiple_of(SECTOR))
        {
            tracing::warn!(
                file = node.name(),
                offset,
                "a grain table lies beyond the end of the file"
            );
            return Err(Errno::EIO);
        }
        let bytes = read_bytes(file, offset, length as usize).await?;
        let decoded = |raw| Entry::decode(layout.encoding, layout.grain_sectors, raw).word();
        Ok(match layout.entry_bytes() {
            8 => bytes
                .as_chunks()
                .0
                .iter()
                .map(|raw| decoded(u64::from_le_bytes(*raw)))
                .collect(),
            _ => {
                let words = bytes.as_chunks().0.iter();
                words
                    .map(|raw| decoded(u32::from_le_bytes(*raw).into()))
                    .collect()
            }
        })
    }
}

impl Locked<'_> {
    fn publish(&self, entries: &[u64]) {
        let new = || entries.iter().map(|_| AtomicU64::new(0)).collect();
        let kept = self.slot.entries.get_or_init(new);
        let version = self.slot.version.load(Ordering::Relaxed);
        self.slot.version.store(version + 1, Ordering::Relaxed);
        fence(Ordering::Release);
        self.slot.table.store(self.table, Ordering::Relaxed);
        for (kept, entry) in kept.iter().zip(entries) {
            kept.store(*entry, Ordering::Relaxed);
        }
        self.slot.version.store(version + 2, Ordering::Release);
    }

    /// An entry that the file has now.
    pub(super) fn set(&self, index: usize, entry: Entry) {
        let is_there = self.slot.table.load(Ordering::Relaxed) == self.table;
        if let Some(entries) = self.slot.entries.get().filter(|_| is_there) {
            entries[index].store(entry.word(), Ordering::Release);
        }
    }

    /// What the file holds is not known: it has to be read again.
    pub(super) fn forget(&self) {
        let version = self.slot.version.load(Ordering::Relaxed);
        self.slot.version.store(version + 1, Ordering::Relaxed);
        fence(Ordering::Release);
        self.slot.table.store(NO_TABLE, Ordering::Relaxed);
        self.slot.version.store(version + 2, Ordering::Release);
    }
}
