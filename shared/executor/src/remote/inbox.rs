//! The queue behind [`super::Shared`], and its handshake with a reader that sleeps.
//!
//! ```text
//!   reader                          other thread
//!   sleeping = true                 push, pending = true
//!   ── fence ──                     ── fence ──
//!   pending? ── yes: stay awake     sleeping? ── yes: wake it
//! ```
//!
//! Of two sequentially consistent fences one is first, and who passed the second sees what the other
//! stored before the first: at least one side sees the other. Anything else that is stored before
//! [`Inbox::rouse`], and looked at after [`Inbox::try_sleep`], is safe in the same way.
//!
//! Does not know how a sleeper is woken. `models.rs` has it checked by loom.

use super::atomics::{AtomicBool, Mutex, fence, locked};
use std::sync::atomic::Ordering::{AcqRel, Relaxed, SeqCst};

/// Items from any thread for one reader.
pub(super) struct Inbox<T> {
    queue: Mutex<Queue<T>>,
    /// There may be items.
    pending: AtomicBool,
    /// The reader sleeps, or is about to. Only swapped, so that each change sees the one before.
    sleeping: AtomicBool,
}

struct Queue<T> {
    items: Vec<T>,
    closed: bool,
}

/// The reader sleeps: it has to be woken, by this caller alone.
#[must_use = "the reader sleeps until somebody wakes it"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reader {
    Sleeps,
    IsAwake,
}

impl<T> Inbox<T> {
    pub(super) fn new() -> Self {
        Self {
            queue: Mutex::new(Queue {
                items: Vec::new(),
                closed: false,
            }),
            pending: AtomicBool::new(false),
            sleeping: AtomicBool::new(false),
        }
    }

    /// Adds an item; gives it back when the inbox is closed.
    pub(super) fn push(&self, item: T) -> Result<Reader, T> {
        let mut queue = locked(&self.queue);
        if queue.closed {
            return Err(item);
        }
        queue.items.push(item);
        drop(queue);
        self.pending.swap(true, AcqRel);
        Ok(self.rouse())
    }

    /// Whether the reader has to be woken. What it shall find is stored before.
    pub(super) fn rouse(&self) -> Reader {
        fence(SeqCst);
        match self.sleeping.load(Relaxed) && self.sleeping.swap(false, AcqRel) {
            true => Reader::Sleeps,
            false => Reader::IsAwake,
        }
    }

    /// Takes what others have queued.
    pub(super) fn take(&self) -> Option<Vec<T>> {
        if !self.has_pending() {
            return None;
        }
        // An item whose mark this wipes out was pushed before the lock is taken.
        self.pending.swap(false, AcqRel);
        Some(std::mem::take(&mut locked(&self.queue).items))
    }

    /// Announces sleep; false when something came in meanwhile.
    pub(super) fn try_sleep(&self) -> bool {
        self.sleeping.swap(true, AcqRel);
        fence(SeqCst);
        !self.has_pending()
    }

    /// Ends what [`Inbox::try_sleep`] announced.
    pub(super) fn awake(&self) {
        self.sleeping.swap(false, AcqRel);
    }

    /// Whether there may be items.
    pub(super) fn has_pending(&self) -> bool {
        self.pending.load(Relaxed)
    }

    /// Refuses further items and gives those that are left.
    pub(super) fn close(&self) -> Vec<T> {
        let mut queue = locked(&self.queue);
        queue.closed = true;
        std::mem::take(&mut queue.items)
    }
}
