//! Leaky buckets: how long a request has to wait for the limits.
//!
//! ```text
//!   request ──► level += bytes or operations          level leaks at the average rate
//!                     level > size? ──► wait until the excess has leaked
//! ```
//!
//! A bucket without a burst rate has the size of a tenth of a second, so that requests that come
//! together are not told apart; one with a burst rate has the size of the longest burst, and a second
//! level, leaking at the burst rate, keeps bursts of more than a second to that rate.

use super::limits::{Direction, RATES, Rate, ThrottleLimits, Unit};
use std::time::Duration;

/// How full a bucket is, in bytes or operations.
#[derive(Clone, Copy, Debug, Default)]
struct Levels {
    average: f64,
    burst: f64,
}

/// The buckets of one group.
#[derive(Debug)]
pub(super) struct Buckets {
    limits: ThrottleLimits,
    levels: [Levels; 6],
    /// When they leaked last, on the executor's clock.
    leaked_at: Duration,
}

impl Buckets {
    /// Empty buckets.
    pub(super) fn new(limits: ThrottleLimits) -> Self {
        Self {
            limits,
            levels: Default::default(),
            leaked_at: Duration::ZERO,
        }
    }

    pub(super) fn limits(&self) -> &ThrottleLimits {
        &self.limits
    }

    /// How long a request in `direction` has to wait at the time `now`.
    pub(super) fn wait(&mut self, direction: Direction, now: Duration) -> Duration {
        self.leak(now);
        let buckets = self.limits.rates.iter().zip(RATES).zip(&self.levels);
        let counting = buckets.filter(|((_, which), _)| which.counts(direction));
        let seconds = counting.map(|((rate, _), levels)| excess_seconds(rate, levels));
        let longest = seconds.fold(0.0, f64::max);
        // To the next nanosecond, or a wait could end before its time has come.
        Duration::from_nanos((longest * 1e9).ceil() as u64)
    }

    /// Counts a request that goes ahead.
    pub(super) fn account(&mut self, direction: Direction, bytes: u64) {
        let operations = match self.limits.iops_size {
            size if size != 0 && bytes > size => bytes as f64 / size as f64,
            _ => 1.0,
        };
        for (which, levels) in RATES.into_iter().zip(&mut self.levels) {
            if which.counts(direction) {
                let amount = match which.unit {
                    Unit::Bytes => bytes as f64,
                    Unit::Operations => operations,
                };
                levels.average += amount;
                levels.burst += amount;
            }
        }
    }

    fn leak(&mut self, now: Duration) {
        let seconds = now.saturating_sub(self.leaked_at).as_secs_f64();
        self.leaked_at = self.leaked_at.max(now);
        for (rate, levels) in self.limits.rates.iter().zip(&mut self.levels) {
            levels.average = (levels.average - rate.average as f64 * seconds).max(0.0);
            levels.burst = (levels.burst - rate.max as f64 * seconds).max(0.0);
        }
    }
}

/// How long it takes until a bucket is not more than full.
fn excess_seconds(rate: &Rate, levels: &Levels) -> f64 {
    if rate.average == 0 {
        return 0.0;
    }
    let (average, max) = (rate.average as f64, rate.max as f64);
    let size = match rate.max {
        0 => average / 10.0,
        _ => max * rate.burst_seconds as f64,
    };
    let excess = levels.average - size;
    if excess > 0.0 {
        return excess / average;
    }
    let burst_excess = levels.burst - max / 10.0;
    match rate.burst_seconds > 1 && burst_excess > 0.0 {
        true => burst_excess / max,
        false => 0.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn buckets(members: &[(&str, i64)]) -> Buckets {
        let mut limits = ThrottleLimits::default();
        for (name, value) in members {
            limits.set(name, *value).unwrap();
        }
        limits.check().unwrap();
        Buckets::new(limits)
    }

    /// Seconds until `requests` requests of `bytes` have gone ahead, one after the other.
    fn seconds(mut buckets: Buckets, (requests, bytes): (u64, u64)) -> f64 {
        let mut now = Duration::from_secs(100);
        buckets.wait(Direction::Write, now);
        let begin = now;
        for _ in 0..requests {
            loop {
                let wait = buckets.wait(Direction::Write, now);
                if wait.is_zero() {
                    break;
                }
                now += wait;
            }
            buckets.account(Direction::Write, bytes);
        }
        (now - begin).as_secs_f64()
    }

    #[test]
    fn the_average_rate_is_kept_after_a_tenth_of_a_second() {
        let taken = seconds(buckets(&[("bps-total", 1000)]), (21, 100));
        // Two requests overfill the bucket; each further one waits for its predecessor's bytes.
        assert!((taken - 1.9).abs() < 1e-6, "{taken}");
    }

    #[test]
    fn a_burst_goes_at_the_burst_rate_and_then_at_the_average() {
        let members = [
            ("iops-write", 10),
            ("iops-write-max", 100),
            ("iops-write-max-length", 3),
        ];
        // 300 operations fill the bucket in 3 s less what leaked and what a tenth of a second takes.
        let burst = seconds(buckets(&members), (300, 512));
        assert!((2.8..3.0).contains(&burst), "{burst}");
        let longer = seconds(buckets(&members), (430, 512));
        let further = longer - burst;
        assert!((9.0..13.0).contains(&further), "{further}");
    }

    #[test]
    fn a_burst_of_a_second_is_free() {
        let members = [("iops-total", 10), ("iops-total-max", 50)];
        assert_eq!(seconds(buckets(&members), (51, 512)), 0.0);
        assert!(seconds(buckets(&members), (60, 512)) > 0.5);
    }

    #[test]
    fn longer_requests_count_as_several_operations() {
        let members = [("iops-total", 10), ("iops-size", 4096)];
        let small = seconds(buckets(&members), (11, 4096));
        let large = seconds(buckets(&members), (11, 8192));
        assert!((large - 2.0 * small).abs() < 0.11, "{small} {large}");
    }

    #[test]
    fn directions_with_limits_of_their_own_do_not_wait_for_each_other() {
        let mut buckets = buckets(&[("bps-read", 1000)]);
        let now = Duration::from_secs(1);
        buckets.account(Direction::Read, 5000);
        assert_eq!(buckets.wait(Direction::Write, now), Duration::ZERO);
        assert!(buckets.wait(Direction::Read, now) > Duration::ZERO);
    }
}
