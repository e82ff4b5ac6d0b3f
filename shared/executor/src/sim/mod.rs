//! The simulated world: files, time and faults from a seed.
//!
//! A [`World`] holds named files in memory. Operations of executors made with
//! [`crate::Executor::simulated`] complete in a seeded order after seeded delays on a virtual
//! clock. Every write, allocation change, length change and sync is kept in a log, from which
//! the state after a power cut at any point can be made: everything synced, plus a chosen subset
//! of what was not, the last pieces torn at sector boundaries.
//!
//! ```text
//!   op ──> Disk: pending, by virtual time ──> done: contents change, history notes it
//!                                               │
//!   power_cut(prefix, subset) <── Cursor <── History
//! ```
//!
//! A file that `File::open` creates is there after every later cut, empty; emptying a file that is
//! opened is a length change like any other. A write that fails with EIO may have been done in
//! part. A sync that fails leaves the writes it was for in doubt for good: no later sync covers
//! them.
//!
//! Same seed and same program: same order, same delays, same faults, same log.

mod content;
mod disk;
mod log;
#[cfg(test)]
mod tests;

use crate::Errno;
use crate::runtime::{Backend, Inner, with_current};
use crate::sync::short_lock;
use content::Content;
pub(crate) use disk::{Disk, SimFile, Step};
use log::{Cursor, History};
use rand::SeedableRng;
use rand::rngs::SmallRng;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What the world does to operations.
#[derive(Clone, Debug)]
pub struct Config {
    /// Seed of order, delays and fault details; print it when a test fails.
    pub seed: u64,
    /// Longest delay of an operation in virtual microseconds.
    pub max_delay_us: u64,
    /// Give short transfers now and then (the file layer must continue them).
    pub short_transfers: bool,
}

/// Whether the current executor's world is a simulated one: then there are no other threads.
pub fn is_current() -> bool {
    let is_simulated = |inner: &Rc<Inner>| matches!(inner.backend, Backend::Sim(_));
    with_current(|inner| inner.is_some_and(is_simulated))
}

impl Default for Config {
    fn default() -> Self {
        Config {
            seed: 0,
            max_delay_us: 100,
            short_transfers: false,
        }
    }
}

/// A fault to inject.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    /// Which operation (counted from 0 over all files, in submission order).
    pub op_index: u64,
    /// The error it fails with.
    pub errno: Errno,
    /// All later operations fail too (a dead disk).
    pub sticky: bool,
}

/// The simulated files and clock. Clones share one world.
#[derive(Clone)]
pub struct World {
    state: Arc<Mutex<State>>,
}

/// The contents of all files by name.
pub type Image = BTreeMap<PathBuf, Vec<u8>>;

struct State {
    config: Config,
    random: SmallRng,
    /// File numbers by name.
    names: BTreeMap<PathBuf, usize>,
    /// By file number.
    contents: Vec<Content>,
    history: History,
    /// Where the last power cut was looked at.
    cursor: Option<Cursor>,
    faults: Vec<Fault>,
    ops: u64,
    now: Duration,
    /// Whether an executor runs on the world.
    attached: bool,
}

impl World {
    /// An empty world.
    pub fn new(config: Config) -> World {
        Self::with_contents(config, BTreeMap::new())
    }

    /// A world whose files start with (durable) contents.
    pub fn with_files(config: Config, files: Image) -> World {
        let content = |(path, bytes): (PathBuf, Vec<u8>)| (path, Content::new(&bytes));
        Self::with_contents(config, files.into_iter().map(content).collect())
    }

    fn with_contents(config: Config, files: BTreeMap<PathBuf, Content>) -> World {
        let (names, contents): (Vec<_>, Vec<_>) = files.into_iter().unzip();
        let history = History {
            initial: contents.clone(),
            seed: config.seed,
            ..History::default()
        };
        let state = State {
            random: SmallRng::seed_from_u64(config.seed),
            config,
            names: names.into_iter().zip(0..).collect(),
            contents,
            history,
            cursor: None,
            faults: Vec::new(),
            ops: 0,
            now: Duration::ZERO,
            attached: false,
        };
        World {
            state: Arc::new(Mutex::new(state)),
        }
    }

    /// Arranges a fault.
    pub fn inject(&self, fault: Fault) {
        short_lock(&self.state).faults.push(fault);
    }

    /// Takes back all faults: operations submitted from now on succeed.
    pub fn clear_faults(&self) {
        short_lock(&self.state).faults.clear();
    }

    /// Operations submitted until now.
    pub fn op_count(&self) -> u64 {
        short_lock(&self.state).ops
    }

    /// Length of the log: points at which the power can be cut.
    pub fn log_len(&self) -> usize {
        short_lock(&self.state).history.entries.len()
    }

    /// The points of the log at which the power can be cut, parted by the syncs that succeeded:
    /// within one part the same writes are durable.
    pub fn epochs(&self) -> Vec<Range<usize>> {
        short_lock(&self.state).history.epochs()
    }

    /// The present contents (as after a clean shutdown).
    pub fn files(&self) -> Image {
        let state = short_lock(&self.state);
        let file =
            |(path, &number): (&PathBuf, &usize)| (path.clone(), state.contents[number].to_vec());
        state.names.iter().map(file).collect()
    }

    /// Contents after a power cut when `prefix` log entries had been submitted: what was synced
    /// by then plus a subset, chosen by `seed`, of the rest, each entry whole, absent or torn at
    /// `tear` bytes (512 or 4096). `PowerCut { subset: Subset::All/None/.. }` choose the extremes.
    pub fn power_cut(&self, cut: &PowerCut) -> Image {
        let files = self.cut(cut).into_iter();
        files
            .map(|(path, content)| (path, content.to_vec()))
            .collect()
    }

    /// The world that comes up after [`World::power_cut`], with a log of its own. It shares the
    /// unchanged pages, so a crash point costs little even when the files are large.
    pub fn restart(&self, cut: &PowerCut, config: Config) -> World {
        Self::with_contents(config, self.cut(cut))
    }

    fn cut(&self, cut: &PowerCut) -> BTreeMap<PathBuf, Content> {
        let mut state = short_lock(&self.state);
        let cursor = state.cursor.take();
        let mut cursor = match cursor {
            Some(cursor) if !cursor.is_past(cut.prefix) => cursor,
            _ => Cursor::new(&state.history),
        };
        cursor.advance(&state.history, cut.prefix);
        let mut contents = cursor.cut(&state.history, cut);
        state.cursor = Some(cursor);
        let mut files = BTreeMap::new();
        for (path, &number) in &state.names {
            if let Some(content) = contents.get_mut(number).and_then(Option::take) {
                files.insert(path.clone(), content);
            }
        }
        files
    }
}

/// Where and how the power is cut.
#[derive(Clone, Copy, Debug)]
pub struct PowerCut {
    /// Log entries that had been submitted. Those that completed before the next one was
    /// submitted count as completed.
    pub prefix: usize,
    /// What survives of the entries that no sync covers.
    pub subset: Subset,
    /// Granularity of torn writes in bytes.
    pub tear: usize,
}

/// What survives of unsynced entries.
#[derive(Clone, Copy, Debug)]
pub enum Subset {
    /// Nothing.
    None,
    /// Everything (a killed process).
    All,
    /// A random subset from this seed, some entries torn.
    Random(u64),
}
