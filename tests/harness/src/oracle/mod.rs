//! Knows what each sector of a disk may hold, and judges every read.
//!
//! Loads ask for a [`Ticket`] before a request goes out and give it back when it completes. From that
//! the oracle knows for each sector which writes are in flight, which completed, and which of those a
//! flush has made durable:
//!
//! - a read may return, sector by sector, what was current at any moment between its start and its
//!   end; a write in flight may or may not be visible. Read while it changes, a sector may be a mixture of old and new, as the
//!   page cache has it in that moment; before and after it is one or the other;
//! - when the daemon is killed nothing completed may be lost, because the page cache survives; what was
//!   in flight stays in flight, since the next daemon replays it;
//! - at a power cut what completed after the last flush began may be lost, sector by sector
//!   ([`Oracle::judge_after`]).
//!
//! Two changes of one sector never overlap in time: [`Oracle::begin`] refuses the second. Must not
//! know how requests travel.

mod history;
mod pattern;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, bail, ensure};

use crate::driver::{Operation, SECTOR_BYTES, SectorRange};
use history::{Change, History};
pub use pattern::{Found, Generation, fill, inspect};

/// What the disk held before the oracle watched it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Initial {
    /// Zeroes.
    Zero,
    /// Anything; reads of never-written sectors are not judged.
    Unknown,
}

/// How a daemon or machine went down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// `kill -9`: the page cache survives, so everything completed is there.
    Killed,
    /// Power cut: what no flush covered may be gone.
    PowerCut,
}

/// The right to have one request in flight.
#[derive(Debug)]
#[must_use = "a ticket that is not given back keeps its sectors busy"]
pub struct Ticket {
    operation: Operation,
    ranges: Vec<SectorRange>,
    started: u64,
}

/// The model of one disk.
#[derive(Debug)]
pub struct Oracle {
    inner: Mutex<Inner>,
    epoch: AtomicU64,
}

#[derive(Debug)]
struct Inner {
    sectors: Vec<History>,
    clock: u64,
    durable: u64,
    readers: BTreeMap<u64, usize>,
}

impl Oracle {
    /// A model of a disk with `sectors` sectors.
    pub fn new(sectors: u64, initial: Initial) -> Self {
        let content = match initial {
            Initial::Zero => Change::Zero,
            Initial::Unknown => Change::Unknown,
        };
        let inner = Inner {
            sectors: vec![History::new(content); sectors as usize],
            clock: 1,
            durable: 0,
            readers: BTreeMap::new(),
        };
        Self {
            inner: Mutex::new(inner),
            epoch: AtomicU64::new(0),
        }
    }

    /// Size of the disk in sectors.
    pub fn sectors(&self) -> u64 {
        self.lock().sectors.len() as u64
    }

    /// The disk grew; the new sectors hold zeroes.
    pub fn grow(&self, sectors: u64) {
        self.lock()
            .sectors
            .resize(sectors as usize, History::new(Change::Zero));
    }

    /// The `count`th write of `writer` goes out: its ticket and the bytes to write. `None` when
    /// another change of a sector is in flight.
    pub fn begin_write(
        &self,
        range: SectorRange,
        (writer, count): (u16, u64),
    ) -> Option<(Ticket, Vec<u8>)> {
        let generation = Generation::new(writer, count, self.epoch.load(Ordering::Relaxed));
        let change = Change::Written(generation);
        let ticket = self.begin_change(Operation::Write, vec![range], change)?;
        let mut bytes = vec![0; range.bytes()];
        fill(&mut bytes, range.first, generation);
        Some((ticket, bytes))
    }

    /// Any other request goes out; `None` when it would change a sector that is being changed.
    ///
    /// # Panics
    /// For [`Operation::Write`], which needs a generation, and for requests that are neither reads,
    /// flushes, discards nor write-zeroes.
    pub fn begin(&self, operation: Operation, ranges: Vec<SectorRange>) -> Option<Ticket> {
        match operation {
            Operation::Discard => self.begin_change(operation, ranges, Change::Discarded),
            Operation::WriteZeroes | Operation::WriteZeroesUnmap => {
                self.begin_change(operation, ranges, Change::Zero)
            }
            Operation::Read | Operation::Flush => {
                let mut inner = self.lock();
                let started = inner.clock;
                if operation == Operation::Read {
                    *inner.readers.entry(started).or_default() += 1;
                }
                Some(Ticket {
                    operation,
                    ranges,
                    started,
                })
            }
            other => panic!("the oracle does not model {other:?}"),
        }
    }

    /// A request came back with success; `data` is what a read returned.
    ///
    /// # Errors
    /// When a read returned what no correct disk could.
    pub fn complete(&self, ticket: &Ticket, data: &[u8]) -> Result<()> {
        match ticket.operation {
            Operation::Read => self.complete_read(ticket, data),
            Operation::Flush => {
                let mut inner = self.lock();
                inner.durable = inner.durable.max(ticket.started);
                self.epoch.fetch_add(1, Ordering::Relaxed);
                Ok(())
            }
            _ => {
                let mut inner = self.lock();
                inner.clock += 1;
                let (now, keep_from) = (inner.clock, inner.keep_from());
                inner
                    .each(&ticket.ranges)
                    .for_each(|history| history.complete(now, keep_from));
                Ok(())
            }
        }
    }

    /// A request came back with an error status: a change may or may not have happened.
    pub fn fail(&self, ticket: &Ticket) {
        let mut inner = self.lock();
        match ticket.operation {
            Operation::Read => inner.forget_reader(ticket.started),
            Operation::Flush => {}
            _ => {
                inner.clock += 1;
                let now = inner.clock;
                inner
                    .each(&ticket.ranges)
                    .for_each(|history| history.fail(now));
            }
        }
    }

    /// Judges a read of `range` done after a loss with nothing in flight, and takes what it found
    /// for the truth from then on.
    ///
    /// # Errors
    /// When something is lost that this kind of loss may not lose.
    pub fn judge_after(&self, loss: Loss, range: SectorRange, data: &[u8]) -> Result<()> {
        let found = inspect_all(range, data)?;
        let mut inner = self.lock();
        let since = match loss {
            Loss::Killed => inner.clock,
            Loss::PowerCut => inner.durable,
        };
        for (sector, found) in (range.first..).zip(found) {
            let history = &mut inner.sectors[sector as usize];
            ensure_allowed(history, sector, found, since)
                .with_context(|| format!("after {loss:?}"))?;
            history.settle(found);
        }
        Ok(())
    }

    /// Writes the disk as it should be now into a sparse raw file.
    ///
    /// # Errors
    /// When the file cannot be written, or a sector is uncertain: in flight, unknown, or discarded
    /// and not read since.
    pub fn write_raw(&self, path: &Path) -> Result<()> {
        let inner = self.lock();
        let file = File::create(path).with_context(|| format!("creating {}", path.display()))?;
        file.set_len((inner.sectors.len() * SECTOR_BYTES) as u64)?;
        let mut bytes = [0; SECTOR_BYTES];
        for (sector, history) in (0u64..).zip(&inner.sectors) {
            match history.certain() {
                Some(Change::Zero) => {}
                Some(Change::Written(generation)) => {
                    fill(&mut bytes, sector, generation);
                    file.write_all_at(&bytes, sector * SECTOR_BYTES as u64)?;
                }
                _ => bail!(
                    "sector {sector} is uncertain: {}",
                    history.describe(inner.clock)
                ),
            }
        }
        Ok(())
    }

    fn begin_change(
        &self,
        operation: Operation,
        ranges: Vec<SectorRange>,
        change: Change,
    ) -> Option<Ticket> {
        let mut inner = self.lock();
        if inner.each(&ranges).any(|history| history.is_busy()) {
            return None;
        }
        inner
            .each(&ranges)
            .for_each(|history| history.begin(change));
        Some(Ticket {
            operation,
            ranges,
            started: inner.clock,
        })
    }

    fn complete_read(&self, ticket: &Ticket, data: &[u8]) -> Result<()> {
        let range = ticket.ranges[0];
        let found = inspect_all(range, data)?;
        let mut inner = self.lock();
        inner.forget_reader(ticket.started);
        let sectors = found.into_iter().zip(data.chunks_exact(SECTOR_BYTES));
        for (sector, (found, bytes)) in (range.first..).zip(sectors) {
            let history = &inner.sectors[sector as usize];
            let is_corrupt = matches!(found, Found::Corrupt { .. });
            if is_corrupt && history.allows_mixture((sector, bytes), ticket.started) {
                continue;
            }
            ensure_allowed(history, sector, found, ticket.started)?;
        }
        Ok(())
    }

    /// A read of `range` with nothing in flight found `data`: judges it, and settles for discarded
    /// sectors which of their possible contents they have.
    ///
    /// # Errors
    /// When the data is wrong.
    pub fn observe(&self, range: SectorRange, data: &[u8]) -> Result<()> {
        let found = inspect_all(range, data)?;
        let mut inner = self.lock();
        let now = inner.clock;
        for (sector, found) in (range.first..).zip(found) {
            let history = &mut inner.sectors[sector as usize];
            ensure_allowed(history, sector, found, now)?;
            history.observe(found);
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// The histories of `ranges`, which must not overlap.
    fn each<'a>(
        &'a mut self,
        ranges: &'a [SectorRange],
    ) -> impl Iterator<Item = &'a mut History> + 'a {
        let mut sorted: Vec<SectorRange> = ranges.to_vec();
        sorted.sort_unstable_by_key(|range| range.first);
        let mut rest = self.sectors.as_mut_slice();
        let mut at = 0;
        sorted.into_iter().flat_map(move |range| {
            let (_, tail) = std::mem::take(&mut rest).split_at_mut((range.first - at) as usize);
            let (wanted, tail) = tail.split_at_mut(range.count as usize);
            (rest, at) = (tail, range.end());
            wanted.iter_mut()
        })
    }

    fn keep_from(&self) -> u64 {
        let oldest_reader = self.readers.keys().next().copied().unwrap_or(u64::MAX);
        self.durable.min(oldest_reader)
    }

    fn forget_reader(&mut self, started: u64) {
        if let Some(count) = self.readers.get_mut(&started) {
            *count -= 1;
            if *count == 0 {
                self.readers.remove(&started);
            }
        }
    }
}

fn inspect_all(range: SectorRange, data: &[u8]) -> Result<Vec<Found>> {
    ensure!(
        data.len() == range.bytes(),
        "{} bytes for {range:?}",
        data.len()
    );
    let sectors = (range.first..).zip(data.chunks_exact(SECTOR_BYTES));
    Ok(sectors
        .map(|(sector, bytes)| inspect(bytes, sector))
        .collect())
}

fn ensure_allowed(history: &History, sector: u64, found: Found, since: u64) -> Result<()> {
    ensure!(
        history.allows(found, since),
        "sector {sector} holds {found:?}, possible are {}",
        history.describe(since)
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const RANGE: SectorRange = SectorRange { first: 2, count: 2 };

    fn write(oracle: &Oracle, count: u64) -> Vec<u8> {
        let (ticket, data) = oracle.begin_write(RANGE, (1, count)).unwrap();
        oracle.complete(&ticket, &[]).unwrap();
        data
    }

    fn flush(oracle: &Oracle) {
        let ticket = oracle.begin(Operation::Flush, Vec::new()).unwrap();
        oracle.complete(&ticket, &[]).unwrap();
    }

    #[test]
    fn only_a_power_cut_may_lose_what_no_flush_covered() {
        for loss in [Loss::Killed, Loss::PowerCut] {
            let oracle = Oracle::new(8, Initial::Zero);
            let first = write(&oracle, 1);
            flush(&oracle);
            let second = write(&oracle, 2);
            let mixed = [&first[..SECTOR_BYTES], &second[SECTOR_BYTES..]].concat();
            assert_eq!(
                oracle.judge_after(loss, RANGE, &mixed).is_ok(),
                loss == Loss::PowerCut
            );
        }
    }

    #[test]
    fn no_loss_excuses_a_flushed_write() {
        let oracle = Oracle::new(8, Initial::Zero);
        let first = write(&oracle, 1);
        let second = write(&oracle, 2);
        flush(&oracle);
        assert!(oracle.judge_after(Loss::PowerCut, RANGE, &first).is_err());
        assert!(
            oracle
                .judge_after(Loss::PowerCut, RANGE, &[0; 2 * SECTOR_BYTES])
                .is_err()
        );
        assert!(oracle.judge_after(Loss::PowerCut, RANGE, &second).is_ok());
    }

    #[test]
    fn a_flush_covers_only_what_completed_before_it_began() {
        let oracle = Oracle::new(8, Initial::Zero);
        let flush = oracle.begin(Operation::Flush, Vec::new()).unwrap();
        write(&oracle, 1);
        oracle.complete(&flush, &[]).unwrap();
        let lost = [0; 2 * SECTOR_BYTES];
        assert!(oracle.judge_after(Loss::PowerCut, RANGE, &lost).is_ok());
    }

    #[test]
    fn a_second_change_of_a_busy_sector_is_refused() {
        let oracle = Oracle::new(8, Initial::Zero);
        let (ticket, _) = oracle.begin_write(RANGE, (1, 1)).unwrap();
        let overlapping = vec![SectorRange::new(6, 1), SectorRange::new(3, 2)];
        assert!(
            oracle
                .begin(Operation::Discard, overlapping.clone())
                .is_none()
        );
        oracle.complete(&ticket, &[]).unwrap();
        assert!(oracle.begin(Operation::Discard, overlapping).is_some());
    }

    #[test]
    fn a_read_during_a_write_sees_old_or_new_sectors() {
        let oracle = Oracle::new(8, Initial::Zero);
        let read = oracle.begin(Operation::Read, vec![RANGE]).unwrap();
        let data = write(&oracle, 1);
        let torn = [&data[..SECTOR_BYTES], &[0; SECTOR_BYTES][..]].concat();
        assert!(oracle.complete(&read, &torn).is_ok());
        let later = oracle.begin(Operation::Read, vec![RANGE]).unwrap();
        assert!(oracle.complete(&later, &torn).is_err());
    }
}
