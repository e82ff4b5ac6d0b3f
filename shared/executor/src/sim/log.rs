//! The history of a world, and what a power cut leaves of it.
//!
//! The history is a list of events: entries (writes, changes of allocation and length, syncs)
//! are submitted, later they complete. A cut with prefix `n` falls just before the submission of
//! entry `n`. What is then on stable storage:
//!
//! ```text
//!   completed writes ── a sync submitted after them has completed ──> durable
//!                    ── else ─────────────────────────────────────> any part of them
//!   writes in flight ─────────────────────────────────────────────> any part of them
//!   a sync that failed: for each write that it would have covered it is decided once, by
//!   the seed, whether it reached the disk; later syncs do not cover it any more
//! ```
//!
//! A [`Cursor`] walks the history once, so that cuts at rising prefixes cost only what happened
//! between them.

use super::content::Content;
use super::{PowerCut, Subset};
use crate::file::Fallocate;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::ops::Range;
use std::sync::Arc;

/// What an entry changes.
pub(super) enum Change {
    Write {
        offset: u64,
        data: Arc<[u8]>,
    },
    Allocate {
        mode: Fallocate,
        offset: u64,
        len: u64,
    },
    SetLen(u64),
    Sync,
}

/// How an entry ended.
#[derive(Clone, Copy)]
pub(super) enum Outcome {
    /// Done; of a write the first so many bytes.
    Done(usize),
    /// Failed; of a write the first so many bytes were done.
    Failed(usize),
}

/// One entry of the log.
pub(super) struct Entry {
    pub(super) file: usize,
    pub(super) change: Change,
    pub(super) outcome: Option<Outcome>,
}

impl Entry {
    fn is_durable_sync(&self) -> bool {
        matches!(self.change, Change::Sync) && matches!(self.outcome, Some(Outcome::Done(_)))
    }

    /// The bytes of a write that were written, or, while it is in flight, that may be.
    fn written<'a>(&self, data: &'a [u8], completed: bool) -> &'a [u8] {
        match self.outcome {
            Some(Outcome::Done(len) | Outcome::Failed(len)) if completed => &data[..len],
            _ => data,
        }
    }

    /// Applies what was done, or, of an entry in flight, all that was to be done.
    pub(super) fn apply(&self, content: &mut Content, completed: bool) {
        match &self.change {
            Change::Write { offset, data } => {
                content.write(*offset, self.written(data, completed));
            }
            _ if completed && matches!(self.outcome, Some(Outcome::Failed(_))) => {}
            Change::Sync => {}
            Change::SetLen(len) => content.set_len(*len),
            Change::Allocate { mode, offset, len } => match mode {
                Fallocate::Allocate => content.grow(offset + len),
                Fallocate::PunchHole | Fallocate::ZeroRange => content.punch(*offset..offset + len),
            },
        }
    }

    /// Applies a write block by block of `tear` bytes: each survives or not.
    fn tear(&self, content: &mut Content, completed: bool, tear: u64, random: &mut SmallRng) {
        let Change::Write { offset, data } = &self.change else {
            return;
        };
        let data = self.written(data, completed);
        let end = offset + data.len() as u64;
        let mut start = *offset;
        while start < end {
            let next = end.min((start / tear + 1) * tear);
            if random.random() {
                let within = (start - offset) as usize..(next - offset) as usize;
                content.write(start, &data[within]);
            }
            start = next;
        }
    }
}

/// What happened, in order.
#[derive(Clone, Copy)]
pub(super) enum Event {
    /// A file came into being, on stable storage too.
    Created(usize),
    /// The next entry was submitted.
    Submitted,
    /// An entry has an outcome.
    Completed(usize),
}

/// Everything that happened in a world.
#[derive(Default)]
pub(super) struct History {
    pub(super) entries: Vec<Entry>,
    pub(super) events: Vec<Event>,
    /// Files before the first event, by number.
    pub(super) initial: Vec<Content>,
    /// Decides what failed syncs leave.
    pub(super) seed: u64,
}

impl History {
    /// The prefixes, parted where a sync has succeeded.
    pub(super) fn epochs(&self) -> Vec<Range<usize>> {
        let (mut epochs, mut start, mut submitted) = (Vec::new(), 0, 0);
        for event in &self.events {
            match *event {
                Event::Submitted => submitted += 1,
                Event::Completed(index) if self.entries[index].is_durable_sync() => {
                    // A cut at the prefix `submitted` sees this completion.
                    epochs.push(start..submitted);
                    start = submitted;
                }
                Event::Completed(_) | Event::Created(_) => {}
            }
        }
        epochs.push(start..submitted + 1);
        epochs.retain(|epoch| !epoch.is_empty());
        epochs
    }
}

/// Contents by file number; `None` before the file was created.
type Contents = Vec<Option<Content>>;

/// The state just before the submission of an entry.
pub(super) struct Cursor {
    next_event: usize,
    submitted: usize,
    durable: Contents,
    /// As the process sees it.
    cached: Contents,
    /// Completed, not durable: count at completion, and entry; in order of completion.
    volatile: Vec<(u64, usize)>,
    in_flight: Vec<usize>,
    /// Syncs in flight: entry, and how many completions it covers.
    syncs: Vec<(usize, u64)>,
    completions: u64,
}

impl Cursor {
    pub(super) fn new(history: &History) -> Cursor {
        let initial: Contents = history.initial.iter().cloned().map(Some).collect();
        Cursor {
            next_event: 0,
            submitted: 0,
            durable: initial.clone(),
            cached: initial,
            volatile: Vec::new(),
            in_flight: Vec::new(),
            syncs: Vec::new(),
            completions: 0,
        }
    }

    /// Whether the cursor has passed `prefix` already.
    pub(super) fn is_past(&self, prefix: usize) -> bool {
        self.submitted > prefix
    }

    /// Goes to just before the submission of entry `prefix`.
    pub(super) fn advance(&mut self, history: &History, prefix: usize) {
        while let Some(event) = history.events.get(self.next_event) {
            match *event {
                Event::Submitted if self.submitted == prefix => return,
                Event::Submitted => self.submit(history),
                Event::Completed(index) => self.complete(history, index),
                Event::Created(file) => {
                    self.durable.resize(file + 1, None);
                    self.cached.resize(file + 1, None);
                    self.durable[file] = Some(Content::default());
                    self.cached[file] = Some(Content::default());
                }
            }
            self.next_event += 1;
        }
    }

    fn submit(&mut self, history: &History) {
        let index = self.submitted;
        self.submitted += 1;
        match history.entries[index].change {
            Change::Sync => self.syncs.push((index, self.completions)),
            _ => self.in_flight.push(index),
        }
    }

    fn complete(&mut self, history: &History, index: usize) {
        let entry = &history.entries[index];
        self.completions += 1;
        if let Some(at) = self.syncs.iter().position(|sync| sync.0 == index) {
            let (_, covered) = self.syncs.remove(at);
            return self.complete_sync(history, index, covered);
        }
        self.in_flight.retain(|&other| other != index);
        self.volatile.push((self.completions, index));
        if let Some(content) = &mut self.cached[entry.file] {
            entry.apply(content, true);
        }
    }

    /// Moves what a sync covers to stable storage, or, when it failed, an unknown part of that.
    fn complete_sync(&mut self, history: &History, index: usize, covered: u64) {
        let sync = &history.entries[index];
        let failed = matches!(sync.outcome, Some(Outcome::Failed(_)));
        let mut random = SmallRng::seed_from_u64(history.seed ^ index as u64);
        let Some(durable) = &mut self.durable[sync.file] else {
            return;
        };
        self.volatile.retain(|&(count, index)| {
            let entry = &history.entries[index];
            if count > covered || entry.file != sync.file {
                return true;
            }
            if !failed || random.random() {
                entry.apply(durable, true);
            }
            false
        });
    }

    /// What is left after a power cut here.
    pub(super) fn cut(&self, history: &History, cut: &PowerCut) -> Contents {
        let entries = &history.entries;
        let in_flight = self.in_flight.iter().map(|&index| (index, false));
        let seed = match cut.subset {
            Subset::None => return self.durable.clone(),
            Subset::All => {
                let mut contents = self.cached.clone();
                for (index, completed) in in_flight {
                    let entry = &entries[index];
                    if let Some(content) = &mut contents[entry.file] {
                        entry.apply(content, completed);
                    }
                }
                return contents;
            }
            Subset::Random(seed) => seed,
        };
        let mut contents = self.durable.clone();
        let mut random = SmallRng::seed_from_u64(seed ^ (cut.prefix as u64).rotate_left(32));
        let surviving = f64::from(random.random_range(1..10)) / 10.0;
        let tear = cut.tear.max(1) as u64;
        let completed = self.volatile.iter().map(|&(_, index)| (index, true));
        for (index, completed) in completed.chain(in_flight) {
            let entry = &entries[index];
            let Some(content) = &mut contents[entry.file] else {
                continue;
            };
            if random.random_bool(0.2) {
                entry.tear(content, completed, tear, &mut random);
            } else if random.random_bool(surviving) {
                entry.apply(content, completed);
            }
        }
        contents
    }
}
