//! The log: every change of the table of blocks goes through it.
//!
//! ```text
//!   │ first half              │ second half             │
//!   │ entry │ entry │ entry ──┼► entry │ entry │        │      each: all pages not yet in their place
//! ```
//!
//! An entry holds the changed pages of the table and all that earlier entries of its half changed; it is its own tail. So one
//! entry is all that a replay needs, and it does no harm when an unflushed one before it is lost, or one
//! behind it torn. When a half is full:
//!
//! 1. flush: its entries, and the data that they refer to, are durable; so nobody needs the other half
//! 2. the pages are written in their places in the table
//! 3. flush: the half itself is needed no longer, when the next entry, in the other half, is there
//!
//! The first entry of all is durable before the header names the log. A clean close writes the pages in place
//! and takes the name away.
//!
//! Owns: places and numbers of entries, the pages that are not in their places. Must not know: what pages mean.

pub(super) mod entry;
mod replay;

use super::header::Guid;
use super::{FileRegion, MIB};
pub(super) use entry::PAGE;
use entry::{NewEntry, entry_bytes};
pub(super) use replay::Replay;
use std::collections::{BTreeMap, BTreeSet};

/// Longest half, in bytes: a replay takes no longer than that, however long the log.
const MAX_HALF: u64 = 2 * MIB;

/// Most pages of one entry, and so at a time in the log alone: half the smallest log has room for it.
pub(super) const MAX_PAGES: usize = 64;

/// Pages by their offset in the file.
pub(super) type Pages = BTreeMap<u64, Vec<u8>>;

/// The log of an image that is written.
pub(super) struct Log {
    guid: Guid,
    half: u64,
    is_second: bool,
    /// Where in the half the next entry goes.
    next: u64,
    sequence: u64,
    /// Pages of the table that are in the log and not in their places.
    waiting: Pages,
}

/// What entries say of the file's length: known to be durable, and as it is now.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lengths {
    pub(super) flushed: u64,
    pub(super) last: u64,
}

/// An entry, and where in the log it goes.
pub(super) struct Placed {
    pub(super) at: u64,
    pub(super) bytes: Vec<u8>,
}

impl Log {
    /// An empty log in `region`, with a GUID that none before it had.
    pub(super) fn new(region: FileRegion, guid: Guid) -> Self {
        Self {
            guid,
            half: (region.length / 2).min(MAX_HALF),
            is_second: false,
            next: 0,
            sequence: 1,
            waiting: Pages::new(),
        }
    }

    pub(super) fn guid(&self) -> Guid {
        self.guid
    }

    /// Pages that are not in their places.
    pub(super) fn waiting(&self) -> &Pages {
        &self.waiting
    }

    /// Whether there is room in this half for an entry that changes the pages at `offsets`.
    pub(super) fn has_room_for(&self, offsets: &BTreeSet<u64>) -> bool {
        let others = self
            .waiting
            .keys()
            .filter(|offset| !offsets.contains(offset));
        let pages = offsets.len() + others.count();
        pages <= MAX_PAGES && self.next + entry_bytes(pages) <= self.half
    }

    /// An entry with `pages`.
    pub(super) fn entry(&self, pages: &Pages, lengths: Lengths) -> Placed {
        let half = if self.is_second { self.half } else { 0 };
        let at = half + self.next;
        let entry = NewEntry {
            guid: self.guid,
            sequence: self.sequence,
            at,
            flushed: lengths.flushed,
            last: lengths.last,
        };
        let bytes = entry.encode(pages);
        Placed { at, bytes }
    }

    /// An entry with `pages`, all that are waiting among them, was written.
    pub(super) fn written(&mut self, pages: Pages) {
        self.next += entry_bytes(pages.len());
        self.sequence += 1;
        self.waiting = pages;
    }

    /// All pages are in their places, durably.
    pub(super) fn emptied(&mut self) {
        self.waiting.clear();
        self.is_second = !self.is_second;
        self.next = 0;
    }
}
