//! What is asked of the back-end, and the loop that asks.

use std::str::FromStr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use harness::driver::Operation;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::clock::ticks;
use crate::histogram::Histogram;
use crate::queue::{Command, FastQueue};

/// A back-end that completes nothing for so long is given up.
const STALL_S: u16 = 20;
/// How long a hybrid wait polls before it sleeps.
const HYBRID_SPIN_NS: f64 = 50_000.0;

/// The order and kind of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pattern {
    /// One operation at random places.
    Random(Operation),
    /// One operation, place after place.
    Sequential(Operation),
    /// Reads and writes at random places.
    Mixed,
    /// Writes at random places with a flush now and then.
    FlushMix,
    /// Flushes only.
    Flush,
}

impl FromStr for Pattern {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        Ok(match name {
            "randread" => Self::Random(Operation::Read),
            "randwrite" => Self::Random(Operation::Write),
            "read" => Self::Sequential(Operation::Read),
            "write" => Self::Sequential(Operation::Write),
            "randrw" => Self::Mixed,
            "flush-mix" => Self::FlushMix,
            "flush" => Self::Flush,
            "write-zeroes" => Self::Sequential(Operation::WriteZeroes),
            "rand-write-zeroes" => Self::Random(Operation::WriteZeroes),
            "discard" => Self::Sequential(Operation::Discard),
            "rand-discard" => Self::Random(Operation::Discard),
            _ => return Err(format!("unknown pattern {name:?}")),
        })
    }
}

/// How completions are awaited.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Wait {
    /// Busy polling.
    Poll,
    /// Sleeping on the eventfd.
    Block,
    /// 50 us of polling, then sleeping.
    Hybrid,
}

/// Where requests go: blocks of `block_bytes` from `offset` on, or, with a stride, the first
/// `stride_len` bytes of every `stride`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Extent {
    pub(crate) offset: u64,
    pub(crate) blocks: u64,
    pub(crate) block_bytes: u64,
    pub(crate) stride: u64,
    pub(crate) stride_len: u64,
}

impl Extent {
    #[inline]
    fn sector(&self, block: u64) -> u64 {
        let at = block * self.block_bytes;
        if self.stride == 0 {
            return (self.offset + at) / 512;
        }
        (self.offset + at / self.stride_len * self.stride + at % self.stride_len) / 512
    }
}

/// Everything that all threads share.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Job {
    pub(crate) pattern: Pattern,
    pub(crate) extent: Extent,
    pub(crate) wait: Wait,
    /// Stop after that many requests per queue; 0 = when told.
    pub(crate) ops: u64,
    /// Resubmit when that many slots are free.
    pub(crate) batch: usize,
    pub(crate) depth: usize,
    pub(crate) read_percent: u32,
    pub(crate) flush_every: u64,
    pub(crate) seed: u64,
    pub(crate) ticks_per_ns: f64,
}

/// Signals between the threads of a run.
#[derive(Debug, Default)]
pub(crate) struct Control {
    pub(crate) counting: AtomicBool,
    pub(crate) stop: AtomicBool,
    pub(crate) finished: AtomicUsize,
}

/// One queue's load and results.
pub(crate) struct Lane {
    queue: FastQueue,
    free: Vec<u16>,
    started: Vec<u64>,
    rng: SmallRng,
    next: u64,
    issued: u64,
    /// Blocks from here on are this lane's when it goes through them in order.
    first: u64,
    count: u64,
    pub(crate) latencies: Histogram,
    pub(crate) completed: u64,
    pub(crate) errors: u64,
}

impl Lane {
    /// Lane `index` of `lanes`.
    pub(crate) fn new(queue: FastQueue, job: &Job, (index, lanes): (u64, u64)) -> Self {
        let blocks = job.extent.blocks;
        let sequential = matches!(job.pattern, Pattern::Sequential(_));
        let (first, end) = if sequential {
            (blocks * index / lanes, blocks * (index + 1) / lanes)
        } else {
            (0, blocks)
        };
        Self {
            queue,
            free: (0..job.depth as u16).rev().collect(),
            started: vec![0; job.depth],
            rng: SmallRng::seed_from_u64(job.seed.wrapping_add(index)),
            next: 0,
            issued: 0,
            first,
            count: end - first,
            latencies: Histogram::default(),
            completed: 0,
            errors: 0,
        }
    }

    /// Kicks sent and interrupts received.
    pub(crate) fn notifications(&self) -> (u64, u64) {
        (self.queue.kicks, self.queue.interrupts)
    }

    /// Requests issued.
    pub(crate) fn issued(&self) -> u64 {
        self.issued
    }

    fn in_flight(&self, job: &Job) -> usize {
        job.depth - self.free.len()
    }

    fn is_done(&self, job: &Job) -> bool {
        job.ops != 0 && self.issued >= job.ops
    }

    #[inline]
    fn choose(&mut self, job: &Job) -> Command {
        let operation = match job.pattern {
            Pattern::Random(operation) => operation,
            Pattern::Sequential(operation) => {
                let block = self.first + self.next % self.count;
                self.next += 1;
                return Command {
                    operation,
                    sector: job.extent.sector(block),
                };
            }
            Pattern::Mixed if self.rng.random_range(0..100) < job.read_percent => Operation::Read,
            Pattern::Mixed => Operation::Write,
            Pattern::FlushMix if self.issued % (job.flush_every + 1) == job.flush_every => {
                Operation::Flush
            }
            Pattern::FlushMix => Operation::Write,
            Pattern::Flush => Operation::Flush,
        };
        if operation == Operation::Flush {
            return Command {
                operation,
                sector: 0,
            };
        }
        let block = self.first + self.rng.random_range(0..self.count);
        Command {
            operation,
            sector: job.extent.sector(block),
        }
    }

    #[inline]
    fn submit(&mut self, job: &Job) {
        let now = ticks();
        while !self.is_done(job) {
            let Some(slot) = self.free.pop() else { break };
            let command = self.choose(job);
            if command.operation == Operation::Write {
                self.queue.stamp(usize::from(slot), self.issued);
            }
            self.started[usize::from(slot)] = now;
            self.queue.push(usize::from(slot), command);
            self.issued += 1;
        }
        self.queue.publish();
    }

    /// Takes what is complete; true when there was something.
    #[inline]
    fn reap(&mut self, counting: bool) -> bool {
        let Some(mut done) = self.queue.pop() else {
            return false;
        };
        let now = ticks();
        loop {
            let (slot, status) = done;
            self.errors += u64::from(status != 0);
            if counting {
                self.latencies.add(now.wrapping_sub(self.started[slot]));
                self.completed += 1;
            }
            self.free.push(slot as u16);
            match self.queue.pop() {
                Some(next) => done = next,
                None => return true,
            }
        }
    }
}

/// Drives `lanes` on this thread until told to stop, or until each has issued its share.
pub(crate) fn drive(job: &Job, lanes: &mut [Lane], control: &Control) {
    let spin = match job.wait {
        Wait::Poll => u64::MAX,
        Wait::Hybrid => (HYBRID_SPIN_NS * job.ticks_per_ns) as u64,
        Wait::Block => 0,
    };
    let stall = (f64::from(STALL_S) * 1e9 * job.ticks_per_ns) as u64;
    lanes
        .iter()
        .for_each(|lane| lane.queue.suppress_interrupts());
    let mut last_progress = ticks();
    loop {
        let counting = control.counting.load(Ordering::Relaxed);
        let stopping = control.stop.load(Ordering::Relaxed);
        let mut progress = false;
        for lane in lanes.iter_mut() {
            progress |= lane.reap(counting);
            let free = lane.free.len();
            let room = free > 0 && (free >= job.batch || free == job.depth);
            if room && !stopping && !lane.is_done(job) {
                lane.submit(job);
            }
        }
        if lanes
            .iter()
            .all(|lane| lane.in_flight(job) == 0 && (stopping || lane.is_done(job)))
        {
            break;
        }
        let silent = ticks().wrapping_sub(last_progress);
        if progress {
            last_progress = ticks();
        } else if silent < spin {
            core::hint::spin_loop();
            if silent > stall {
                give_up(job, lanes);
                break;
            }
        } else if !sleep(lanes) {
            give_up(job, lanes);
            break;
        }
    }
    control.finished.fetch_add(1, Ordering::Relaxed);
}

fn give_up(job: &Job, lanes: &mut [Lane]) {
    lanes
        .iter_mut()
        .for_each(|lane| lane.errors += lane.in_flight(job) as u64);
    eprintln!("vublk-bench: no completion for {STALL_S} s");
}

/// Waits for an interrupt; false when none comes.
fn sleep(lanes: &mut [Lane]) -> bool {
    let mut ready = false;
    for lane in lanes.iter() {
        ready |= lane.queue.want_interrupt();
    }
    if !ready {
        let mut fds: Vec<PollFd<'_>> = lanes
            .iter()
            .map(|lane| PollFd::new(lane.queue.call_fd(), PollFlags::POLLIN))
            .collect();
        let limit = PollTimeout::from(STALL_S * 1000 + 500);
        if !poll(&mut fds, limit).is_ok_and(|count| count > 0) {
            return false;
        }
        lanes
            .iter_mut()
            .for_each(|lane| lane.queue.take_interrupt());
    }
    lanes
        .iter()
        .for_each(|lane| lane.queue.suppress_interrupts());
    true
}
