//! The simulated world: files, time and faults from a seed.
//!
//! A [`World`] holds named files in memory. Operations of executors made with
//! [`crate::Executor::simulated`] complete in a seeded order after seeded delays on a virtual
//! clock. Every write, allocation change, length change and sync is kept in a log, from which
//! the state after a power cut at any point can be made: everything synced, plus a chosen subset
//! of what was not, the last pieces torn at sector boundaries.

use crate::Errno;
use std::collections::BTreeMap;
use std::path::PathBuf;

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
pub struct World {}

/// The contents of all files by name.
pub type Image = BTreeMap<PathBuf, Vec<u8>>;

impl World {
    /// An empty world.
    pub fn new(config: Config) -> World {
        todo!()
    }
    /// A world whose files start with (durable) contents.
    pub fn with_files(config: Config, files: Image) -> World {
        todo!()
    }
    /// Arranges a fault.
    pub fn inject(&self, fault: Fault) {
        todo!()
    }
    /// Operations submitted until now.
    pub fn op_count(&self) -> u64 {
        todo!()
    }
    /// Length of the log: points at which the power can be cut.
    pub fn log_len(&self) -> usize {
        todo!()
    }
    /// The present contents (as after a clean shutdown).
    pub fn files(&self) -> Image {
        todo!()
    }
    /// Contents after a power cut when `prefix` log entries had been submitted: what was synced
    /// by then plus a subset, chosen by `seed`, of the rest, each entry whole, absent or torn at
    /// `tear` bytes (512 or 4096). `PowerCut { subset: Subset::All/None/.. }` choose the extremes.
    pub fn power_cut(&self, cut: &PowerCut) -> Image {
        todo!()
    }
}

/// Where and how the power is cut.
#[derive(Clone, Copy, Debug)]
pub struct PowerCut {
    /// Log entries that had been submitted.
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

use crate::OpenOptions;
use crate::op::Op;
use std::time::Duration;

pub(crate) struct Disk {}
#[derive(Debug)]
pub(crate) struct SimFile {}
pub(crate) enum Step {
    Completed(u32, i32),
    Deadline,
    Nothing,
}
impl World {
    pub(crate) fn disk(&self) -> Disk {
        todo!()
    }
}
impl Disk {
    pub(crate) fn submit(&self, slot: u32, op: &Op) {
        todo!()
    }
    pub(crate) fn step(&self, deadline: Option<Duration>) -> Step {
        todo!()
    }
    pub(crate) fn now(&self) -> Duration {
        todo!()
    }
    pub(crate) fn open(
        &self,
        path: &std::path::Path,
        options: &OpenOptions,
    ) -> std::io::Result<SimFile> {
        todo!()
    }
}
impl SimFile {
    pub(crate) fn len(&self) -> u64 {
        todo!()
    }
    pub(crate) fn next_data(&self, offset: u64) -> Option<(u64, u64)> {
        todo!()
    }
}
