//! Verified load: random requests on one queue, every answer judged by the oracle.
//!
//! A load is reproducible from its seed as far as the back-end's timing allows. It ends when its
//! [`Stop`] says so, with nothing in flight. [`verify_all`] then reads the whole disk back.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::driver::{
    Alignment, Completion, Layout, Operation, Queue, Request, STATUS_OK, SectorRange,
};
use crate::oracle::{Oracle, Ticket};
use crate::progress::Progress;

/// Sectors of the requests with which [`verify_all`] reads back.
const VERIFY_SECTORS: u64 = 256;

/// Relative frequency of operations.
#[derive(Clone, Copy, Debug)]
pub struct Mix {
    /// Reads.
    pub read: u32,
    /// Writes.
    pub write: u32,
    /// Flushes.
    pub flush: u32,
    /// Discards.
    pub discard: u32,
    /// Write-zeroes, with and without unmap.
    pub zeroes: u32,
}

impl Mix {
    /// Reads, writes and flushes.
    pub const TRANSFERS: Self = Self {
        read: 45,
        write: 52,
        flush: 3,
        discard: 0,
        zeroes: 0,
    };
    /// Everything.
    pub const ALL: Self = Self {
        read: 38,
        write: 45,
        flush: 3,
        discard: 7,
        zeroes: 7,
    };
    /// Reads only.
    pub const READS: Self = Self {
        read: 1,
        write: 0,
        flush: 0,
        discard: 0,
        zeroes: 0,
    };

    fn pick(&self, rng: &mut SmallRng) -> Operation {
        let choices = [
            (self.read, Operation::Read),
            (self.write, Operation::Write),
            (self.flush, Operation::Flush),
            (self.discard, Operation::Discard),
            (self.zeroes, Operation::WriteZeroes),
        ];
        let mut at = rng.random_range(0..choices.iter().map(|c| c.0).sum());
        for (weight, operation) in choices {
            if at < weight {
                let unmap = operation == Operation::WriteZeroes && rng.random();
                return if unmap {
                    Operation::WriteZeroesUnmap
                } else {
                    operation
                };
            }
            at -= weight;
        }
        unreachable!("the weights add up to more than the number drawn")
    }
}

/// What a load does.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Which operations.
    pub mix: Mix,
    /// Longest transfer in sectors.
    pub max_sectors: u64,
    /// Most data segments per transfer.
    pub max_segments: usize,
    /// How segments are aligned.
    pub alignment: Alignment,
    /// Requests in flight.
    pub depth: usize,
    /// Seed of everything random.
    pub seed: u64,
    /// The part of the disk that is used; `None` for all of it.
    pub area: Option<SectorRange>,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            mix: Mix::ALL,
            max_sectors: 128,
            max_segments: 8,
            alignment: Alignment::Byte,
            depth: 16,
            seed: 1,
            area: None,
        }
    }
}

/// When a load ends.
#[derive(Clone, Copy, Debug)]
pub enum Stop<'a> {
    /// After that many requests.
    After(u64),
    /// When the flag is set.
    When(&'a AtomicBool),
}

impl Stop<'_> {
    fn reached(self, issued: u64) -> bool {
        match self {
            Self::After(count) => issued >= count,
            Self::When(flag) => flag.load(Ordering::Relaxed),
        }
    }
}

/// What a load did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Summary {
    /// Requests completed.
    pub requests: u64,
    /// Flushes among them.
    pub flushes: u64,
    /// Bytes read and written.
    pub bytes: u64,
    /// Longest time from submission to completion.
    pub slowest: Duration,
}

impl Summary {
    /// Both together.
    #[must_use]
    pub fn merge(self, other: Self) -> Self {
        Self {
            requests: self.requests + other.requests,
            flushes: self.flushes + other.flushes,
            bytes: self.bytes + other.bytes,
            slowest: self.slowest.max(other.slowest),
        }
    }
}

/// A load on one queue.
pub struct Load<'a> {
    queue: &'a mut Queue,
    oracle: &'a Oracle,
    plan: Plan,
    progress: Option<&'a Progress>,
    rng: SmallRng,
    tickets: HashMap<u64, Ticket>,
    issued: u64,
    summary: Summary,
}

impl<'a> Load<'a> {
    /// `plan` on `queue`, judged by `oracle`.
    pub fn new(queue: &'a mut Queue, oracle: &'a Oracle, plan: Plan) -> Self {
        let seed = plan
            .seed
            .wrapping_mul(0x9e37_79b9)
            .wrapping_add(queue.index() as u64);
        let rng = SmallRng::seed_from_u64(seed);
        let tickets = HashMap::new();
        let summary = Summary::default();
        Self {
            queue,
            oracle,
            plan,
            progress: None,
            rng,
            tickets,
            issued: 0,
            summary,
        }
    }

    /// Reports completions to `progress`.
    #[must_use]
    pub fn reporting_to(mut self, progress: &'a Progress) -> Self {
        self.progress = Some(progress);
        self
    }

    /// Runs until `stop` and until everything issued is back.
    ///
    /// # Errors
    /// At the first wrong answer, error status, protocol violation or missing completion.
    pub fn run(mut self, stop: Stop<'_>) -> Result<Summary> {
        let seed = self.plan.seed;
        let index = self.queue.index();
        let outcome = self.cycle(stop);
        outcome.with_context(|| format!("load with seed {seed} on queue {index}"))?;
        Ok(self.summary)
    }

    fn cycle(&mut self, stop: Stop<'_>) -> Result<()> {
        loop {
            let running = !stop.reached(self.issued);
            while running
                && self.queue.outstanding() < self.plan.depth
                && self.queue.has_room(self.plan.max_segments)
                && !stop.reached(self.issued)
            {
                if !self.issue()? {
                    break;
                }
            }
            if self.queue.outstanding() == 0 {
                if !running {
                    return Ok(());
                }
                // Every range drawn was busy with another queue's request.
                std::thread::yield_now();
                continue;
            }
            let done = self.queue.completion()?;
            self.finish(done)?;
            while let Some(done) = self.queue.try_completion()? {
                self.finish(done)?;
            }
        }
    }

    /// Issues one random request; false when its sectors are busy.
    fn issue(&mut self) -> Result<bool> {
        let operation = self.plan.mix.pick(&mut self.rng);
        let range = self.random_range();
        // Numbers writes of all loads of a test apart: the seed differs between them.
        let name = (
            self.writer(),
            (self.plan.seed & 0xffff) << 32 | (self.issued + 1),
        );
        let (ticket, data) = match operation {
            Operation::Write => match self.oracle.begin_write(range, name) {
                Some((ticket, data)) => (Some(ticket), data),
                None => (None, Vec::new()),
            },
            _ => (self.oracle.begin(operation, vec![range]), Vec::new()),
        };
        let Some(ticket) = ticket else {
            return Ok(false);
        };
        let request = match operation {
            Operation::Flush => Request::flush(),
            Operation::Read | Operation::Write => {
                let segments = self.rng.random_range(1..=self.plan.max_segments);
                let bytes = range.bytes();
                let alignment = self.plan.alignment;
                let layout = Layout::scattered(&mut self.rng, bytes, segments, alignment);
                Request::transfer(operation, range, layout)
            }
            _ => Request::clear(operation, range),
        };
        self.issued += 1;
        self.tickets.insert(self.issued, ticket);
        self.queue.submit(request, &data, self.issued)?;
        Ok(true)
    }

    fn finish(&mut self, done: Completion) -> Result<()> {
        let ticket = self
            .tickets
            .remove(&done.token)
            .context("completion without a ticket")?;
        ensure!(
            done.status == STATUS_OK,
            "{:?} of {:?} ended with status {}",
            done.operation,
            done.range,
            done.status
        );
        self.oracle
            .complete(&ticket, &done.data)
            .with_context(|| format!("{:?} of {:?}", done.operation, done.range))?;
        self.summary.requests += 1;
        match done.operation {
            Operation::Flush => self.summary.flushes += 1,
            Operation::Read | Operation::Write => self.summary.bytes += done.range.bytes() as u64,
            _ => {}
        }
        self.summary.slowest = self.summary.slowest.max(done.submitted.elapsed());
        if let Some(progress) = self.progress {
            progress.advance(Instant::now());
        }
        Ok(())
    }

    fn random_range(&mut self) -> SectorRange {
        let area = self
            .plan
            .area
            .unwrap_or_else(|| SectorRange::new(0, self.oracle.sectors()));
        let longest = self.plan.max_sectors.min(area.count);
        // Small requests dominate, long ones still occur.
        let limit = if self.rng.random_ratio(3, 4) {
            longest.min(16)
        } else {
            longest
        };
        let count = self.rng.random_range(1..=limit);
        let first = area.first + self.rng.random_range(0..=area.count - count);
        SectorRange::new(first, count)
    }

    fn writer(&self) -> u16 {
        self.queue.index() as u16 + 1
    }
}

/// The same plan on every queue, each on a thread of its own.
///
/// # Errors
/// The first error of any queue.
pub fn run_on_all(
    queues: &mut [Queue],
    oracle: &Oracle,
    plan: &Plan,
    stop: Stop<'_>,
) -> Result<Summary> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = queues
            .iter_mut()
            .map(|queue| scope.spawn(move || Load::new(queue, oracle, plan.clone()).run(stop)))
            .collect();
        threads
            .into_iter()
            .try_fold(Summary::default(), |sum, thread| {
                Ok(sum.merge(
                    thread
                        .join()
                        .expect("a load returns errors, it does not panic")?,
                ))
            })
    })
}

/// Reads the whole disk with nothing else in flight; settles what discarded sectors hold.
///
/// # Errors
/// When a sector is wrong.
pub fn verify_all(queue: &mut Queue, oracle: &Oracle) -> Result<()> {
    let sectors = oracle.sectors();
    let mut next = 0;
    loop {
        while next < sectors && queue.has_room(1) {
            let range = SectorRange::new(next, VERIFY_SECTORS.min(sectors - next));
            queue.submit(Request::contiguous(Operation::Read, range), &[], next)?;
            next = range.end();
        }
        if queue.outstanding() == 0 {
            return Ok(());
        }
        let done = queue.completion()?;
        let range = done.range;
        oracle
            .observe(range, &done.ok()?)
            .with_context(|| format!("final read of {range:?}"))?;
    }
}
