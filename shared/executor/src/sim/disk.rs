//! The disk of a simulated executor: operations wait for their virtual time, then take effect.

use super::content::Content;
use super::log::{Change, Entry, Event, Outcome};
use super::{State, World};
use crate::file::Direction;
use crate::op::Op;
use crate::sync::short_lock;
use crate::{Buffer, Errno, OpenOptions};
use rand::Rng;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Size of the pieces at which transfers are cut short, in bytes.
const SECTOR: usize = 512;

/// When an operation takes effect: its time, then chance, then order of submission.
type When = (Duration, u64, u64);

/// An operation under way.
struct Pending {
    slot: u32,
    /// The fault that waits for it.
    fault: Option<Errno>,
    effect: Effect,
}

enum Effect {
    Read {
        file: usize,
        buffer: Buffer,
        offset: u64,
    },
    /// An entry of the log.
    Logged(usize),
    /// Fails whatever happens.
    Refused(Errno),
}

/// What [`Disk::step`] did.
pub(crate) enum Step {
    /// The operation in this slot has this result.
    Completed(u32, i32),
    /// The clock has reached the deadline.
    Deadline,
    /// There is nothing to wait for.
    Nothing,
}

/// A world as its executor sees it.
pub(crate) struct Disk {
    world: World,
    pending: RefCell<BTreeMap<When, Pending>>,
}

impl World {
    /// The disk for an executor; one at a time.
    pub(crate) fn disk(&self) -> Disk {
        let attached = std::mem::replace(&mut short_lock(&self.state).attached, true);
        assert!(
            !attached,
            "a simulated world runs on one executor at a time"
        );
        Disk {
            world: self.clone(),
            pending: RefCell::default(),
        }
    }
}

impl Disk {
    /// Lets another executor have the world.
    pub(crate) fn detach(&self) {
        short_lock(&self.world.state).attached = false;
    }

    pub(crate) fn now(&self) -> Duration {
        short_lock(&self.world.state).now
    }

    pub(crate) fn open(&self, path: &Path, options: &OpenOptions) -> io::Result<SimFile> {
        let mut state = short_lock(&self.world.state);
        let number = match state.names.get(path) {
            Some(&number) => number,
            None if options.create => state.create(path),
            None => return Err(io::ErrorKind::NotFound.into()),
        };
        if options.truncate && state.contents[number].len() > 0 {
            let index = state.submit_entry(number, Change::SetLen(0));
            state.complete_entry(index, Outcome::Done(0));
        }
        Ok(SimFile {
            world: self.world.clone(),
            number,
            path: path.to_path_buf(),
            writable: options.write,
        })
    }

    /// Begins an operation.
    pub(crate) fn submit(&self, slot: u32, op: &Op) {
        let mut state = short_lock(&self.world.state);
        let (when, fault) = state.schedule();
        let effect = self.effect(&mut state, op);
        drop(state);
        let pending = Pending {
            slot,
            fault,
            effect,
        };
        self.pending.borrow_mut().insert(when, pending);
    }

    fn effect(&self, state: &mut State, op: &Op) -> Effect {
        let (file, change) = match op {
            Op::Transfer(transfer) => {
                let file = transfer.file.sim();
                let buffer = transfer.buffer.slice(transfer.done..transfer.buffer.len());
                let offset = transfer.offset + transfer.done as u64;
                if transfer.direction == Direction::Read {
                    let file = self.number(file);
                    return Effect::Read {
                        file,
                        buffer,
                        offset,
                    };
                }
                let data = Arc::from(&*buffer.to_heap());
                (file, Change::Write { offset, data })
            }
            Op::Sync(file) => (file.sim(), Change::Sync),
            Op::SetLen(file, len) => (file.sim(), Change::SetLen(*len)),
            Op::Allocate(allocation) => {
                if allocation.offset.checked_add(allocation.len).is_none() {
                    return Effect::Refused(Errno::EFBIG);
                }
                let change = Change::Allocate {
                    mode: allocation.mode,
                    offset: allocation.offset,
                    len: allocation.len,
                };
                (allocation.file.sim(), change)
            }
            _ => return Effect::Refused(Errno::ENOSYS),
        };
        if !file.writable && !matches!(change, Change::Sync) {
            return Effect::Refused(Errno::EBADF);
        }
        Effect::Logged(state.submit_entry(self.number(file), change))
    }

    fn number(&self, file: &SimFile) -> usize {
        let same = Arc::ptr_eq(&file.world.state, &self.world.state);
        assert!(same, "a file of another simulated world is used");
        file.number
    }

    /// Goes to the next event, at most to `deadline`.
    pub(crate) fn step(&self, deadline: Option<Duration>) -> Step {
        let mut pending = self.pending.borrow_mut();
        let next = pending.first_entry();
        let next = next.filter(|entry| deadline.is_none_or(|deadline| entry.key().0 <= deadline));
        let mut state = short_lock(&self.world.state);
        let Some(next) = next else {
            let Some(deadline) = deadline else {
                return Step::Nothing;
            };
            state.now = state.now.max(deadline);
            return Step::Deadline;
        };
        state.now = state.now.max(next.key().0);
        let done = next.remove();
        let result = match done.fault {
            Some(errno) => state.fail(done.effect, errno),
            None => state.perform(done.effect),
        };
        Step::Completed(done.slot, result)
    }
}

impl State {
    fn create(&mut self, path: &Path) -> usize {
        let number = self.contents.len();
        self.contents.push(Content::default());
        self.names.insert(path.to_path_buf(), number);
        self.history.events.push(Event::Created(number));
        number
    }

    /// Counts an operation; when it takes effect and with what fault.
    fn schedule(&mut self) -> (When, Option<Errno>) {
        let index = self.ops;
        self.ops += 1;
        let hits = |fault: &&super::Fault| {
            fault.op_index == index || (fault.sticky && fault.op_index < index)
        };
        let fault = self.faults.iter().find(hits).map(|fault| fault.errno);
        let delay_us = self.random.random_range(0..=self.config.max_delay_us);
        let time = self.now + Duration::from_micros(delay_us);
        ((time, self.random.random(), index), fault)
    }

    fn submit_entry(&mut self, file: usize, change: Change) -> usize {
        self.history.events.push(Event::Submitted);
        self.history.entries.push(Entry {
            file,
            change,
            outcome: None,
        });
        self.history.entries.len() - 1
    }

    fn complete_entry(&mut self, index: usize, outcome: Outcome) {
        self.history.events.push(Event::Completed(index));
        let entry = &mut self.history.entries[index];
        entry.outcome = Some(outcome);
        entry.apply(&mut self.contents[entry.file], true);
    }

    /// How much of a transfer of `len` bytes is done.
    fn shorten(&mut self, len: usize) -> usize {
        if !self.config.short_transfers || len <= SECTOR || !self.random.random_bool(0.25) {
            return len;
        }
        self.random.random_range(1..len.div_ceil(SECTOR)) * SECTOR
    }

    fn perform(&mut self, effect: Effect) -> i32 {
        match effect {
            Effect::Refused(errno) => -(errno as i32),
            Effect::Read {
                file,
                buffer,
                offset,
            } => {
                let mut bytes = vec![0; self.shorten(buffer.len())];
                let count = self.contents[file].read(offset, &mut bytes);
                buffer.slice(0..count).copy_from_slice(&bytes[..count]);
                count as i32
            }
            Effect::Logged(index) => {
                let len = match &self.history.entries[index].change {
                    Change::Write { data, .. } => data.len(),
                    _ => 0,
                };
                let len = self.shorten(len);
                self.complete_entry(index, Outcome::Done(len));
                len as i32
            }
        }
    }

    /// Fails an operation. A write that fails with EIO may have been done in part.
    fn fail(&mut self, effect: Effect, errno: Errno) -> i32 {
        if let Effect::Logged(index) = effect {
            let mut done = 0;
            if let Change::Write { data, .. } = &self.history.entries[index].change
                && errno == Errno::EIO
                && self.random.random()
            {
                done = self.random.random_range(0..=data.len() / SECTOR) * SECTOR;
            }
            self.complete_entry(index, Outcome::Failed(done));
        }
        -(errno as i32)
    }
}

/// A file of a simulated world.
pub(crate) struct SimFile {
    world: World,
    number: usize,
    path: PathBuf,
    writable: bool,
}

impl SimFile {
    #[cfg(test)]
    pub(super) fn world(&self) -> &World {
        &self.world
    }

    pub(crate) fn len(&self) -> u64 {
        short_lock(&self.world.state).contents[self.number].len()
    }

    pub(crate) fn next_data(&self, offset: u64) -> Option<(u64, u64)> {
        short_lock(&self.world.state).contents[self.number].next_data(offset)
    }
}

impl std::fmt::Debug for SimFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "simulated {}", self.path.display())
    }
}
