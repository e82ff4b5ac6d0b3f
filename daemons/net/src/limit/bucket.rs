//! One token bucket in one atomic: the time at which it is full again.
//!
//! ```text
//!   past ────┬───────────────┬──────────────────────────┬──> time
//!           now          full_at ≤ now + burst       now + burst
//!            └── tokens owed ┘└──── tokens left ────────┘      full_at > now + burst: in debt
//! ```
//!
//! Taking tokens moves `full_at` on by the time that they take to come back. The clock does the rest.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Ticks per nanosecond: a lone 64-byte frame at 100 Gbit/s takes 82 ticks, and 64 bits last for 36 years.
const TICKS_PER_NS: u64 = 16;
const TICKS_PER_S: u64 = TICKS_PER_NS * 1_000_000_000;

/// A duration in ticks.
#[inline]
pub(super) fn ticks(duration: Duration) -> u64 {
    let whole = duration.as_secs().saturating_mul(TICKS_PER_S);
    whole.saturating_add(u64::from(duration.subsec_nanos()) * TICKS_PER_NS)
}

/// Ticks as a duration, rounded up.
pub(super) fn duration(ticks: u64) -> Duration {
    Duration::from_nanos(ticks.div_ceil(TICKS_PER_NS))
}

/// A bucket. Without a rate it limits nothing.
#[derive(Default)]
pub(super) struct Bucket {
    /// Tokens per second; 0: no limit.
    rate: AtomicU64,
    /// Tokens when full.
    burst: AtomicU64,
    /// Ticks in which an empty bucket becomes full.
    burst_ticks: AtomicU64,
    full_at: AtomicU64,
}

impl Bucket {
    #[inline]
    pub(super) fn is_limited(&self) -> bool {
        self.rate.load(Ordering::Relaxed) != 0
    }

    /// Tokens per second, and when full.
    pub(super) fn rate(&self) -> (u64, u64) {
        let (rate, burst) = (&self.rate, &self.burst);
        (rate.load(Ordering::Relaxed), burst.load(Ordering::Relaxed))
    }

    /// Ticks until it is out of debt.
    #[inline]
    pub(super) fn debt(&self, now: u64) -> u64 {
        if !self.is_limited() {
            return 0;
        }
        let allowed = now.saturating_add(self.burst_ticks.load(Ordering::Relaxed));
        self.full_at.load(Ordering::Relaxed).saturating_sub(allowed)
    }

    /// Takes `tokens`, in debt or not.
    #[inline]
    pub(super) fn charge(&self, tokens: u64, now: u64) {
        let rate = self.rate.load(Ordering::Relaxed);
        if rate == 0 {
            return;
        }
        let cost = time_of(tokens, rate);
        self.update(|full_at| full_at.max(now).saturating_add(cost));
    }

    /// Sets tokens per second (0: no limit) and when full. What is owed stays owed.
    pub(super) fn set(&self, (rate, burst): (u64, u64), now: u64) {
        let (before, burst_before) = self.rate();
        self.rate.store(rate, Ordering::Relaxed);
        self.burst.store(burst, Ordering::Relaxed);
        let burst_ticks = if rate == 0 { 0 } else { time_of(burst, rate) };
        self.burst_ticks.store(burst_ticks, Ordering::Relaxed);
        if rate == 0 || before == 0 {
            // A limit that begins, begins with a full bucket.
            self.full_at.store(0, Ordering::Relaxed);
            return;
        }
        self.update(|full_at| {
            let missing = tokens_in(full_at.saturating_sub(now), before);
            // Tokens that a smaller bucket could not hold are not missing from it.
            let missing = missing.saturating_sub(burst_before.saturating_sub(burst));
            now.saturating_add(time_of(missing, rate))
        });
    }

    /// Threads that share it may race: each one's change is made, in some order.
    #[inline]
    fn update(&self, change: impl Fn(u64) -> u64) {
        let changed = |full_at| Some(change(full_at));
        // The closure never refuses.
        let _ = self
            .full_at
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, changed);
    }
}

/// Ticks in which `tokens` come in, rounded up.
#[inline]
fn time_of(tokens: u64, rate: u64) -> u64 {
    match tokens.checked_mul(TICKS_PER_S) {
        Some(product) => product.div_ceil(rate),
        None => {
            let exact = (u128::from(tokens) * u128::from(TICKS_PER_S)).div_ceil(u128::from(rate));
            u64::try_from(exact).unwrap_or(u64::MAX)
        }
    }
}

/// Tokens that come in within `ticks`, rounded up.
fn tokens_in(ticks: u64, rate: u64) -> u64 {
    let exact = (u128::from(ticks) * u128::from(rate)).div_ceil(u128::from(TICKS_PER_S));
    u64::try_from(exact).unwrap_or(u64::MAX)
}
