//! Copying disks: the engine below `convert`, and the pieces that jobs share.
//!
//! ```text
//!   Walk ── step {range, data | zero | backing} ──► worker (several at a time)
//!    │ block status of the sources                    │ read a chunk ┐ here, or by a crew
//!    │ (holes cost nothing)                           │ Runs: data │ zeroes ┘ of threads
//!    │                                                │ wait for its turn (ascending writes)
//!    ▼                                                ▼      ▼         ▼
//!   Sources: one or more roots, end to end          rate   write   write_zeroes, or nothing
//! ```
//!
//! Owns: [`status`] (who decides the content of a range), [`Sources`], [`Walk`], [`Runs`] (zero
//! detection), what a chunk is read and looked at by, the order of writes, the rate, and [`Copy`], which puts them together. Promises:
//! each byte of the sources is read at most once; what is written reads as the sources did, or an
//! error says which offset failed; at most [`CopyOptions::in_flight`] chunks are in memory; after
//! the first error no request begins, and those under way are waited for. Must not know: formats,
//! files, who is told of the progress.

mod chunk;
mod offload;
mod rate;
mod runs;
mod sources;
pub mod status;
mod transfer;
mod walk;
mod window;

pub use rate::Rate;
pub use runs::{Run, RunRules, Runs, first_difference, first_nonzero};
pub use sources::{Disks, Sources};
pub use walk::{Backed, Kind, Step, Walk};
pub use window::Window;

use crate::root::RootHandle;
use crate::turns::Turns;
use executor::sync::Mutex;
use executor::{Crew, Errno, HeapBuffer};
use std::cell::{Cell, RefCell};
use std::fmt;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::Poll;

/// Bytes that one request reads and writes: few enough that they are still in the processor's cache
/// when they are looked at and written.
pub const CHUNK_BYTES: u64 = 512 << 10;
/// The same where runs of zeroes are looked for that are longer than usual, or clusters compressed
/// side by side.
pub const LONG_CHUNK_BYTES: u64 = 2 << 20;

/// Least run of zeroes that is worth a hole, unless told otherwise, in bytes.
pub const SPARSE_BYTES: u64 = 4096;

/// Lengths are multiples of this many bytes.
pub(crate) const SECTOR: u64 = 512;

/// In which order chunks are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// One after the other, from the first to the last: the target is laid out like the disk.
    #[default]
    Ascending,
    /// As they come.
    Any,
}

/// What an unwritten part of the target reads as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Unwritten {
    /// Not known: zeroes are written.
    #[default]
    Anything,
    /// Zeroes: they need not be written.
    Zeroes,
}

/// How data is stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Store {
    /// Plainly.
    #[default]
    Plain,
    /// Compressed; the target's driver can ([`crate::Driver::compresses`]).
    Compressed {
        /// Bytes that are compressed at a time: the target's clusters.
        cluster: u64,
    },
}

/// Who copies data that both sides store as it is, in files of the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Offload {
    /// This program reads and writes it.
    #[default]
    Never,
    /// The file system shares or copies it where it can. Zeroes in it are not looked for.
    WherePossible,
}

/// What happens when a source cannot be read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnReadError {
    /// The copy ends.
    #[default]
    Fail,
    /// The sectors that cannot be read are zeroes in the target; [`Observer::lost`] is told.
    Salvage,
}

/// How to copy.
#[derive(Clone, Debug)]
pub struct CopyOptions {
    /// Bytes of a chunk, a multiple of 512, and of the cluster of a compressed target. Chunks end at
    /// multiples of it.
    pub chunk: u64,
    /// Chunks in memory at a time, at least one.
    pub in_flight: usize,
    /// The order of writes.
    pub order: Order,
    /// Least run of zero bytes that is not written as data; `None` writes all of them.
    pub sparse: Option<u64>,
    /// What the target reads as before.
    pub unwritten: Unwritten,
    /// Whether the target has a backing that shows what the sources' backing does.
    pub backed: Backed,
    /// How data is stored.
    pub store: Store,
    /// Who copies plain data.
    pub offload: Offload,
    /// Zeroes may give up the target's space, where its node passes discards on.
    pub may_unmap: bool,
    /// What unreadable sectors do.
    pub on_read_error: OnReadError,
    /// Most bytes written in a second.
    pub rate: Option<u64>,
}

impl Default for CopyOptions {
    fn default() -> Self {
        Self {
            chunk: CHUNK_BYTES,
            in_flight: 8,
            order: Order::default(),
            sparse: Some(SPARSE_BYTES),
            unwritten: Unwritten::default(),
            backed: Backed::default(),
            store: Store::default(),
            offload: Offload::default(),
            may_unmap: false,
            on_read_error: OnReadError::default(),
            rate: None,
        }
    }
}

/// Who is told how a copy goes on.
pub trait Observer {
    /// `bytes` more were read (or found to be zeroes that are to be written): portions of
    /// [`Step::ends_portion`].
    fn copied(&self, bytes: u64);
    /// The sector at `offset` could not be read and is zeroes in the target.
    fn lost(&self, offset: u64, errno: Errno);
    /// Nothing is known of the sector at `offset`; it will be read.
    fn status_unknown(&self, offset: u64, errno: Errno);
}

/// Nobody is told.
pub struct Unobserved;

impl Observer for Unobserved {
    fn copied(&self, _bytes: u64) {}
    fn lost(&self, _offset: u64, _errno: Errno) {}
    fn status_unknown(&self, _offset: u64, _errno: Errno) {}
}

/// What failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// Finding out what is in the sources.
    Status,
    /// Reading a source.
    Read,
    /// Writing the target.
    Write,
}

/// The first failure of a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyError {
    /// What failed.
    pub act: Act,
    /// Where: for `Act::Status` in the source, else in the target; bytes.
    pub offset: u64,
    /// Why.
    pub errno: Errno,
}

impl fmt::Display for CopyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.act {
            Act::Status => "reading block status at offset",
            Act::Read => "reading at byte",
            Act::Write => "writing at byte",
        };
        let reason = crate::error::reason(self.errno);
        write!(f, "error while {what} {}: {reason}", self.offset)
    }
}

impl std::error::Error for CopyError {}

/// A copy of all of `sources` to the start of `target`.
pub struct Copy<'a> {
    sources: &'a Sources,
    target: &'a RootHandle,
    options: &'a CopyOptions,
    observer: &'a dyn Observer,
    walk: Mutex<Position<'a>>,
    turns: Turns,
    rate: Option<Rate>,
    failed: Cell<Option<CopyError>>,
    /// Bytes copied that the observer has not been told of.
    untold: Cell<u64>,
    memory: RefCell<Vec<HeapBuffer>>,
    readers: Option<&'a Crew<Sources>>,
    /// The file system cannot.
    is_refused: Cell<bool>,
}

/// Where the walk is, and how many steps it has made.
struct Position<'a> {
    walk: Walk<'a>,
    steps: u64,
}

impl<'a> Copy<'a> {
    /// A copy that has not begun.
    pub fn new(
        (sources, target): (&'a Sources, &'a RootHandle),
        options: &'a CopyOptions,
        observer: &'a dyn Observer,
    ) -> Self {
        let walk = Walk::new(sources, options, observer);
        Self {
            sources,
            target,
            options,
            observer,
            walk: Mutex::new(Position { walk, steps: 0 }),
            turns: Turns::default(),
            rate: options.rate.map(Rate::new),
            failed: Cell::new(None),
            untold: Cell::new(0),
            memory: RefCell::default(),
            readers: None,
            is_refused: Cell::new(false),
        }
    }

    /// Has chunks read and looked at by `readers`, too, whose sources are the same disks
    /// ([`Sources::disks`]).
    #[must_use]
    pub fn with_readers(mut self, readers: Option<&'a Crew<Sources>>) -> Self {
        self.readers = readers;
        self
    }

    /// Copies.
    ///
    /// # Errors
    /// The first failure; what was copied until then stays.
    pub async fn run(&self) -> Result<(), CopyError> {
        let workers = self.options.in_flight.max(1);
        let mut workers: Vec<Option<Pin<Box<dyn Future<Output = ()> + '_>>>> = (0..workers)
            .map(|_| Some(Box::pin(self.work()) as Pin<Box<dyn Future<Output = ()>>>))
            .collect();
        poll_fn(|cx| {
            for worker in &mut workers {
                if let Some(running) = worker
                    && running.as_mut().poll(cx).is_ready()
                {
                    *worker = None;
                }
            }
            match workers.iter().all(Option::is_none) {
                true => Poll::Ready(()),
                false => Poll::Pending,
            }
        })
        .await;
        match self.failed.get() {
            None => Ok(()),
            Some(error) => Err(error),
        }
    }

    /// One of the workers, each with one chunk in hand.
    async fn work(&self) {
        while let Some((step, turn)) = self.next().await {
            if let Err(error) = self.carry_out(step, turn).await {
                self.fail(error);
            }
            self.turns.pass(turn);
        }
    }

    /// The next step and its turn; `None` at the end, and after a failure.
    async fn next(&self) -> Option<(Step, u64)> {
        let mut position = self.walk.lock().await;
        if self.failed.get().is_some() {
            return None;
        }
        match position.walk.next().await {
            Ok(Some(step)) => {
                let turn = position.steps;
                position.steps += 1;
                Some((step, turn))
            }
            Ok(None) => None,
            Err(error) => {
                self.fail(error);
                None
            }
        }
    }

    fn fail(&self, error: CopyError) {
        if self.failed.get().is_none() {
            self.failed.set(Some(error));
        }
        self.turns.give_up();
    }

    /// Counts what was copied, and tells of it at the end of a portion.
    fn count(&self, step: Step) {
        self.untold.set(self.untold.get() + step.range.length);
        if step.ends_portion {
            self.observer.copied(self.untold.take());
        }
    }

    /// Waits until all earlier steps are written, where that matters. False after a failure.
    async fn wait_for(&self, turn: u64) -> bool {
        if self.options.order == Order::Ascending {
            self.turns.wait(turn).await;
        }
        self.failed.get().is_none()
    }
}

#[cfg(test)]
mod tests;
