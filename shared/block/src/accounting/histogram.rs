//! How many requests took how long.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The most boundaries.
const MAX_BOUNDARIES: usize = 4096;

/// Between which latencies lie: nanoseconds, ascending, none of them 0.
#[derive(Debug, PartialEq, Eq)]
pub struct Boundaries(Vec<u64>);

impl Boundaries {
    /// `None` unless they ascend from more than 0, and are one to 4096.
    pub fn new(list: Vec<u64>) -> Option<Self> {
        let ascends = list.first().is_some_and(|first| *first > 0)
            && list.windows(2).all(|pair| pair[0] < pair[1]);
        (ascends && list.len() <= MAX_BOUNDARIES).then_some(Self(list))
    }

    /// The boundaries.
    pub fn list(&self) -> &[u64] {
        &self.0
    }

    /// How many intervals they bound.
    pub(super) fn bins(&self) -> usize {
        self.0.len() + 1
    }
}

/// One thread's bins: the first is below the first boundary, each other one begins with a boundary.
pub struct Histogram {
    boundaries: Arc<Boundaries>,
    bins: Box<[AtomicU64]>,
}

impl Histogram {
    pub(super) fn new(boundaries: &Arc<Boundaries>) -> Self {
        Self {
            boundaries: Arc::clone(boundaries),
            bins: (0..boundaries.bins()).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// Whether it is for these very boundaries: setting equal ones again begins anew.
    pub(super) fn is_of(&self, boundaries: &Arc<Boundaries>) -> bool {
        Arc::ptr_eq(&self.boundaries, boundaries)
    }

    /// Counts `count` requests of `latency` nanoseconds.
    #[inline]
    pub(super) fn count(&self, latency: u64, count: u64) {
        let bin = self.boundaries.0.partition_point(|from| *from <= latency);
        super::add(&self.bins[bin], count);
    }

    pub(super) fn boundaries(&self) -> &[u64] {
        &self.boundaries.0
    }

    pub(super) fn counts(&self) -> impl Iterator<Item = u64> {
        self.bins.iter().map(|bin| bin.load(Ordering::Relaxed))
    }
}
