//! Look-ups made for an announcement, kept for the request that was announced.
//!
//! ```text
//!   announcement   number of changes ─ look-up ─► slot of this thread: node, offset, extent, number
//!   request        slot of this node and offset, still the same number of changes?
//!                    yes ─► its extent                 no ─► a look-up as ever
//! ```
//!
//! A request is announced while the one before it is served, which pushes the tables out of the
//! nearest cache: looking twice would fetch them twice. Two slots, because the next announcement
//! precedes the announced request.
//!
//! Why the number suffices: whoever changes a mapping counts the change afterwards and before the
//! request that asked for it completes, and before what the old mapping referred to is freed. So a
//! request that begins later, or that [`crate::epoch`] does not wait for, sees another number. One
//! that sees the same began beside the change and may go by the old mapping, as any look-up may
//! that comes a moment earlier.

use crate::driver::ByteRange;
use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};

/// Tells the nodes of the process apart, for ever: addresses come back.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct NodeId(u64);

impl NodeId {
    /// One that no node had before.
    pub(super) fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// An extent of plain data.
#[derive(Clone, Copy)]
pub(super) struct Announced {
    pub(super) node: NodeId,
    /// [`crate::Format::changes`] before the look-up.
    pub(super) changes: u64,
    /// Where it begins on the virtual disk, and how long it is.
    pub(super) range: ByteRange,
    pub(super) host_offset: u64,
    pub(super) in_place: bool,
}

const NOTHING: Announced = Announced {
    node: NodeId(0),
    changes: 0,
    range: ByteRange::new(0, 0),
    host_offset: 0,
    in_place: false,
};

struct Slots {
    slots: [Cell<Announced>; 2],
    last: Cell<usize>,
}

thread_local! {
    static SLOTS: Slots = const {
        Slots { slots: [const { Cell::new(NOTHING) }; 2], last: Cell::new(0) }
    };
}

/// Keeps an extent for a request on this thread, in place of the one before the last.
#[inline]
pub(super) fn keep(announced: Announced) {
    SLOTS.with(|slots| {
        let last = slots.last.get() ^ 1;
        slots.last.set(last);
        slots.slots[last & 1].set(announced);
    });
}

/// The extent kept for `range` of `node`, as it was; it covers the range.
#[inline]
pub(super) fn find(node: NodeId, range: ByteRange) -> Option<Announced> {
    SLOTS.with(|slots| {
        let fits = |kept: &Announced| {
            kept.range.offset == range.offset
                && kept.node == node
                && kept.range.length >= range.length
        };
        slots.slots.iter().map(Cell::get).find(fits)
    })
}
