//! Random requests from several tasks, and what the disk may hold afterwards.
//!
//! Every request is noted per sector with when it began and ended, so that for any moment of the
//! world's log it is known which contents are allowed: of a sector, what the last flushed request
//! wrote, or what any later one did.

use super::rig::Disk;
use super::snapshots::Taken;
use block::{ByteRange, Errno, ZeroFlags};
use executor::sim::World;
use executor::sync::RangeLock;
use executor::{JoinHandle, spawn};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::cell::{Cell, RefCell};
use std::rc::Rc;

pub(super) const SECTOR: usize = 512;

/// A change of one sector.
#[derive(Clone, Copy, Debug)]
pub(super) struct Change {
    /// What fills the sector: a byte repeated.
    fill: Fill,
    /// The log's length when it began.
    begun: usize,
    /// When it succeeded, by the order of events.
    pub(super) ended: Option<u64>,
}

pub(super) type Fill = u64;

/// What was done to the disk.
pub(super) struct History {
    sectors: RefCell<Vec<Vec<Change>>>,
    /// Flushes that succeeded: when they began by the order of events, the log's length at their
    /// end.
    flushes: RefCell<Vec<(u64, usize)>>,
    clock: Box<dyn Fn() -> usize>,
    events: Cell<u64>,
    pub(super) locks: RangeLock,
    next_fill: Cell<Fill>,
    pub(super) failures: Cell<usize>,
    pub(super) snapshots: RefCell<Vec<Taken>>,
}

impl History {
    pub(super) fn new(size: u64, clock: impl Fn() -> usize + 'static) -> Rc<Self> {
        let untouched = vec![Vec::new(); size as usize / SECTOR];
        Rc::new(Self {
            sectors: RefCell::new(untouched),
            flushes: RefCell::default(),
            clock: Box::new(clock),
            events: Cell::new(0),
            locks: RangeLock::new(),
            next_fill: Cell::new(1),
            failures: Cell::new(0),
            snapshots: RefCell::default(),
        })
    }

    /// A history on a world's log.
    pub(super) fn of_world(size: u64, world: &World) -> Rc<Self> {
        let world = world.clone();
        Self::new(size, move || world.log_len())
    }

    fn sectors_of(range: ByteRange) -> std::ops::Range<usize> {
        range.offset as usize / SECTOR..(range.offset + range.length) as usize / SECTOR
    }

    /// The log grows only when operations are submitted; this tells apart what happens between.
    pub(super) fn event(&self) -> u64 {
        self.events.set(self.events.get() + 1);
        self.events.get()
    }

    /// The log's length.
    pub(super) fn now(&self) -> usize {
        (self.clock)()
    }

    pub(super) fn begin(&self, range: ByteRange, fill: Fill) {
        let begun = (self.clock)();
        for sector in Self::sectors_of(range) {
            self.sectors.borrow_mut()[sector].push(Change {
                fill,
                begun,
                ended: None,
            });
        }
    }

    pub(super) fn end(&self, range: ByteRange, result: Result<(), Errno>) {
        if result.is_err() {
            self.failures.set(self.failures.get() + 1);
            return;
        }
        let ended = self.event();
        for sector in Self::sectors_of(range) {
            let mut sectors = self.sectors.borrow_mut();
            let change = sectors[sector].last_mut().expect("begun before");
            change.ended = Some(ended);
        }
    }

    /// Checks a disk as it is after a power cut at `moment`: flushed changes are there.
    pub(super) fn check_power_cut(&self, disk: &[u8], backing: &[u8], moment: usize) -> Check {
        let flushes = self.flushes.borrow();
        let ended = flushes.iter().filter(|(_, ended)| *ended <= moment);
        let durable = ended.map(|(begun, _)| *begun).max();
        self.check(
            disk,
            backing,
            moment,
            |change| matches!((change.ended, durable), (Some(ended), Some(flush)) if ended < flush),
        )
    }

    /// Checks a disk as it is after a kill at `moment`: completed changes are there.
    pub(super) fn check_kill(&self, disk: &[u8], backing: &[u8], moment: usize) -> Check {
        self.check(disk, backing, moment, |change| change.ended.is_some())
    }

    pub(super) fn check(
        &self,
        disk: &[u8],
        backing: &[u8],
        moment: usize,
        is_certain: impl Fn(&Change) -> bool,
    ) -> Check {
        let sectors = self.sectors.borrow();
        for (number, (changes, bytes)) in sectors.iter().zip(disk.chunks(SECTOR)).enumerate() {
            let last = changes.iter().rposition(&is_certain);
            let first_allowed = last.unwrap_or(0);
            let allowed = changes[first_allowed..]
                .iter()
                .filter(|change| change.begun <= moment)
                .map(|change| change.fill);
            if allowed.clone().any(|fill| is_filled(bytes, fill)) {
                continue;
            }
            let old = backing.get(number * SECTOR..(number + 1) * SECTOR);
            let is_old = || old.map_or(is_filled(bytes, 0), |old| old == bytes);
            if last.is_some() || !is_old() {
                return Err(format!(
                    "sector {number:#x} holds {:x?}, allowed are fills {:x?} (certain: {})",
                    &bytes[..8],
                    allowed.collect::<Vec<_>>(),
                    last.is_some()
                ));
            }
        }
        Ok(())
    }
}

/// An error says which sector is wrong.
pub(super) type Check = Result<(), String>;

fn is_filled(bytes: &[u8], fill: Fill) -> bool {
    let word = fill.to_le_bytes();
    bytes[..8] == word && bytes[8..] == bytes[..bytes.len() - 8]
}

/// The bytes of a fill; 0 is zeroes.
pub(super) fn pattern(fill: Fill, length: usize) -> Vec<u8> {
    let mut bytes = fill.to_le_bytes().repeat(length.div_ceil(8));
    bytes.truncate(length);
    bytes
}

/// What a random workload is like.
#[derive(Clone, Copy)]
pub(super) struct Workload {
    pub(super) seed: u64,
    pub(super) tasks: usize,
    /// Requests of each task.
    pub(super) requests: usize,
    /// Longest request in bytes.
    pub(super) longest: u64,
}

impl Workload {
    /// Runs it to its end.
    pub(super) async fn run(&self, disk: &Disk, history: &Rc<History>) {
        for task in self.start(disk, history) {
            task.await;
        }
    }

    /// Starts its tasks.
    pub(super) fn start(&self, disk: &Disk, history: &Rc<History>) -> Vec<JoinHandle<()>> {
        let tasks = 0..self.tasks as u64;
        tasks
            .map(|number| {
                let random = SmallRng::seed_from_u64(self.seed.wrapping_mul(1000) + number);
                let (disk, history) = (disk.clone(), Rc::clone(history));
                spawn(self.run_task(disk, history, random))
            })
            .collect()
    }

    fn run_task(
        &self,
        disk: Disk,
        history: Rc<History>,
        mut random: SmallRng,
    ) -> impl Future<Output = ()> + 'static {
        let Workload {
            requests, longest, ..
        } = *self;
        async move {
            for _ in 0..requests {
                let size = disk.node.length() / SECTOR as u64;
                let start = random.random_range(0..size);
                let most = (longest / SECTOR as u64).min(size - start);
                let length = match random.random_range(0..3) {
                    0 => 1,
                    1 => most.min(8),
                    _ => random.random_range(1..=most),
                };
                let range = ByteRange::new(start * SECTOR as u64, length * SECTOR as u64);
                request(&disk, &history, range, random.random_range(0..22)).await;
            }
        }
    }
}

/// The clusters that a range touches; the last one ends with the disk.
fn whole_clusters(disk: &Disk, range: ByteRange) -> ByteRange {
    let grain = u64::from(disk.node.driver().limits().optimal_transfer);
    let start = range.offset / grain * grain;
    let end = (range.offset + range.length).next_multiple_of(grain);
    ByteRange::new(start, end.min(disk.node.length()) - start)
}

async fn request(disk: &Disk, history: &History, range: ByteRange, choice: u32) {
    let locked = range.offset..range.offset + range.length;
    let zero = |may_unmap| ZeroFlags {
        may_unmap,
        ..ZeroFlags::default()
    };
    match choice {
        0..10 => {
            let _locked = history.locks.lock(locked).await;
            let fill = history.next_fill.get();
            history.next_fill.set(fill + 1);
            history.begin(range, fill);
            let bytes = pattern(fill, range.length as usize);
            history.end(range, disk.write(range.offset, &bytes).await);
        }
        10..13 => {
            let _locked = history.locks.lock(locked).await;
            history.begin(range, 0);
            let zeroed = disk.root.write_zeroes(range, zero(choice == 10)).await;
            history.end(range, zeroed);
        }
        20.. if disk.node.driver().compresses() => {
            let _locked = history.locks.lock(0..u64::MAX).await;
            // Each cluster is a write of its own: a few tell as much as hundreds.
            let most = 4 * u64::from(disk.node.driver().limits().optimal_transfer);
            let range = ByteRange::new(range.offset, range.length.min(most));
            let range = whole_clusters(disk, range);
            let fill = history.next_fill.get();
            history.next_fill.set(fill + 1);
            history.begin(range, fill);
            let bytes = pattern(fill, range.length as usize);
            history.end(range, disk.write_compressed(range.offset, &bytes).await);
        }
        13 => {
            // What a discard leaves in partial clusters is the format's choice, so whole ones.
            let _locked = history.locks.lock(0..u64::MAX).await;
            let range = whole_clusters(disk, range);
            if !disk.discard_reads_zero {
                disk.root.discard(range).await.unwrap();
                return;
            }
            history.begin(range, 0);
            history.end(range, disk.root.discard(range).await);
        }
        14..17 => {
            let begun = history.event();
            if disk.root.flush().await.is_ok() {
                let ended = (history.clock)();
                history.flushes.borrow_mut().push((begun, ended));
            }
        }
        _ => {
            let _locked = history.locks.lock_shared(locked).await;
            let read = disk.read(range.offset, range.length as usize).await;
            let Ok(bytes) = read else { return };
            let sectors = history.sectors.borrow();
            for (sector, bytes) in History::sectors_of(range).zip(bytes.chunks(SECTOR)) {
                let Some(last) = sectors[sector].last() else {
                    continue;
                };
                if last.ended.is_some() {
                    let right = pattern(last.fill, SECTOR);
                    assert_eq!(bytes, right, "sector {sector:#x} read wrong");
                }
            }
        }
    }
}
