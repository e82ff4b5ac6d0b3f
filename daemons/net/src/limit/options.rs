//! What can be said of a rate.

use serde::{Deserialize, Serialize};

/// Fraction of a second that the bucket holds when no burst is given.
const BURST_FRACTION: u64 = 10;
/// Bytes that a bucket holds at least: a frame of the largest size to be segmented.
const MIN_BURST_BYTES: u64 = 64 << 10;
/// Packets that a bucket holds at least.
const MIN_BURST_PACKETS: u64 = 32;

/// A rate, with its bursts. Absent or 0: not limited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct RateOptions {
    /// Bytes per second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// Bytes that may go at once after a pause; by default those of a tenth of a second, at least 64 KiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_burst: Option<u64>,
    /// Packets per second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub packets: Option<u64>,
    /// Packets that may go at once after a pause; by default those of a tenth of a second, at least 32.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub packets_burst: Option<u64>,
}

/// Why a rate makes no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RateError {
    /// A burst of what is not limited.
    #[error("'{0}-burst' needs a rate of {0}")]
    BurstWithoutRate(&'static str),
    /// A bucket that holds nothing.
    #[error("'{0}-burst' must be at least 1")]
    EmptyBurst(&'static str),
    /// A number that is negative where it was written.
    #[error("'{0}' must be below 2^63")]
    TooLarge(&'static str),
}

impl RateOptions {
    /// Whether it limits anything.
    pub fn is_limited(&self) -> bool {
        self.bytes.unwrap_or(0) != 0 || self.packets.unwrap_or(0) != 0
    }

    /// Refuses what makes no sense.
    ///
    /// # Errors
    /// A burst without a rate, or an empty one; a number of 2^63 or more, which is how QMP's negative numbers
    /// arrive.
    pub fn check(&self) -> Result<(), RateError> {
        for (name, value) in [
            ("bytes", self.bytes),
            ("bytes-burst", self.bytes_burst),
            ("packets", self.packets),
            ("packets-burst", self.packets_burst),
        ] {
            if i64::try_from(value.unwrap_or(0)).is_err() {
                return Err(RateError::TooLarge(name));
            }
        }
        for (name, rate, burst) in [
            ("bytes", self.bytes, self.bytes_burst),
            ("packets", self.packets, self.packets_burst),
        ] {
            match (rate.unwrap_or(0), burst) {
                (_, None) => {}
                (0, Some(_)) => return Err(RateError::BurstWithoutRate(name)),
                (_, Some(0)) => return Err(RateError::EmptyBurst(name)),
                _ => {}
            }
        }
        Ok(())
    }

    /// Bytes per second and bytes when full.
    pub(super) fn bytes_bucket(&self) -> (u64, u64) {
        bucket(self.bytes, self.bytes_burst, MIN_BURST_BYTES)
    }

    /// Packets per second and packets when full.
    pub(super) fn packets_bucket(&self) -> (u64, u64) {
        bucket(self.packets, self.packets_burst, MIN_BURST_PACKETS)
    }
}

fn bucket(rate: Option<u64>, burst: Option<u64>, least: u64) -> (u64, u64) {
    match rate.unwrap_or(0) {
        0 => (0, 0),
        rate => (rate, burst.unwrap_or((rate / BURST_FRACTION).max(least))),
    }
}
