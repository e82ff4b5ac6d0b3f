//! Sums of counters.

use super::{Counters, KINDS, Kind, Slot};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// What was counted of one kind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KindTotals {
    /// Requests that succeeded.
    pub operations: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Requests that failed.
    pub failed: u64,
    /// Requests that made no sense.
    pub invalid: u64,
    /// What all requests took together, failed ones included; nanoseconds.
    pub time: u64,
    /// Boundaries in nanoseconds and the counts between them.
    pub histogram: Option<(Vec<u64>, Vec<u64>)>,
}

/// What was counted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    pub(super) kinds: [KindTotals; KINDS],
    last_access: u64,
}

impl Totals {
    /// Those of one kind.
    pub fn of(&self, kind: Kind) -> &KindTotals {
        &self.kinds[kind as usize]
    }

    /// When the last request ended, on the executor's clock; `None` before the first.
    pub fn last_access(&self) -> Option<Duration> {
        (self.last_access > 0).then(|| Duration::from_nanos(self.last_access))
    }

    pub(super) fn add(&mut self, slot: &Slot) {
        let histograms = slot.histograms();
        let counted = slot.kinds.iter().zip(histograms.iter());
        for (total, (counters, histogram)) in self.kinds.iter_mut().zip(counted) {
            total.add(counters);
            let Some(histogram) = histogram else { continue };
            let new = || {
                (
                    histogram.boundaries().to_vec(),
                    vec![0; histogram.counts().count()],
                )
            };
            let (_, bins) = total.histogram.get_or_insert_with(new);
            for (bin, count) in bins.iter_mut().zip(histogram.counts()) {
                *bin += count;
            }
        }
        self.last_access = self.last_access.max(read(&slot.last_access));
    }
}

fn read(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

impl KindTotals {
    fn add(&mut self, counters: &Counters) {
        self.operations += read(&counters.operations);
        self.bytes += read(&counters.bytes);
        self.failed += read(&counters.failed);
        self.invalid += read(&counters.invalid);
        self.time += read(&counters.time);
    }
}
