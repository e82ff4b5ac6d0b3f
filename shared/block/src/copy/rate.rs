//! A limit of bytes in a second.

use executor::time::{now, sleep};
use std::cell::Cell;
use std::time::Duration;

/// Lets bytes through at a rate. Time that nobody used is not saved up.
pub struct Rate {
    bytes_per_second: u64,
    /// When what was let through has had its time.
    free_at: Cell<Duration>,
}

impl Rate {
    /// So many bytes in a second, at least one.
    pub fn new(bytes_per_second: u64) -> Self {
        Self {
            bytes_per_second: bytes_per_second.max(1),
            free_at: Cell::new(Duration::ZERO),
        }
    }

    /// Waits until `bytes` more may go.
    pub async fn take(&self, bytes: u64) {
        let now = now();
        let starts = self.free_at.get().max(now);
        let nanoseconds = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_second);
        let takes = Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX));
        self.free_at.set(starts.saturating_add(takes));
        if starts > now {
            sleep(starts - now).await;
        }
    }
}
