//! What a throttle group allows: six rates, by QEMU's property names.

use block::error::Result;
use block::{Error, ErrorKind};

/// Largest rate.
const MAX_RATE: u64 = 1_000_000_000_000_000;

/// What requests do to the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// They read.
    Read,
    /// They change it.
    Write,
}

/// Which rate: of bytes or of operations, of all requests or of those in one direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Which {
    pub(super) unit: Unit,
    pub(super) direction: Option<Direction>,
}

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unit {
    Bytes,
    Operations,
}

/// The rates, in the order in which they are kept.
pub(super) const RATES: [Which; 6] = [
    which(Unit::Bytes, None),
    which(Unit::Bytes, Some(Direction::Read)),
    which(Unit::Bytes, Some(Direction::Write)),
    which(Unit::Operations, None),
    which(Unit::Operations, Some(Direction::Read)),
    which(Unit::Operations, Some(Direction::Write)),
];

const fn which(unit: Unit, direction: Option<Direction>) -> Which {
    Which { unit, direction }
}

impl Which {
    /// Whether requests in `direction` count.
    pub(super) fn counts(self, direction: Direction) -> bool {
        self.direction.is_none_or(|own| own == direction)
    }
}

/// One rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rate {
    /// Per second, in the long run; 0 = any.
    pub(super) average: u64,
    /// Per second, in bursts; 0 = no bursts.
    pub(super) max: u64,
    /// Longest burst.
    pub(super) burst_seconds: u64,
}

impl Default for Rate {
    fn default() -> Self {
        Self {
            average: 0,
            max: 0,
            burst_seconds: 1,
        }
    }
}

/// The limits of a group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ThrottleLimits {
    /// As [`RATES`].
    pub(super) rates: [Rate; 6],
    /// Longer requests count as several operations of this many bytes; 0 = as one.
    pub(super) iops_size: u64,
}

/// Names of the members of `ThrottleLimits` in QEMU's QMP reference, in the order of its replies.
pub const NAMES: [&str; 19] = [
    "bps-read-max-length",
    "iops-read-max-length",
    "bps-read-max",
    "bps-total",
    "iops-total-max-length",
    "iops-total",
    "iops-write-max",
    "bps-write",
    "bps-total-max",
    "bps-write-max",
    "iops-size",
    "iops-read",
    "iops-write-max-length",
    "iops-write",
    "bps-total-max-length",
    "iops-read-max",
    "bps-read",
    "bps-write-max-length",
    "iops-total-max",
];

/// What of a rate a name means.
enum Part {
    Average,
    Max,
    BurstSeconds,
}

/// The rate that the member `name` is about, by its index; `None` for `iops-size`, and for what is
/// no name.
fn parse(name: &str) -> Option<(usize, Part)> {
    let (unit, rest) = match name.split_once('-')? {
        ("bps", rest) => (0, rest),
        ("iops", rest) => (3, rest),
        _ => return None,
    };
    let (direction, part) = rest.split_once('-').unwrap_or((rest, ""));
    let direction = match direction {
        "total" => 0,
        "read" => 1,
        "write" => 2,
        _ => return None,
    };
    let part = match part {
        "" => Part::Average,
        "max" => Part::Max,
        "max-length" => Part::BurstSeconds,
        _ => return None,
    };
    Some((unit + direction, part))
}

impl ThrottleLimits {
    /// Sets the member `name`, one of [`NAMES`]. What makes no sense is found by
    /// [`ThrottleLimits::check`].
    ///
    /// # Errors
    /// A burst longer than 2^32 seconds.
    pub fn set(&mut self, name: &str, value: i64) -> Result<()> {
        // As in QEMU a negative number is a large one, which the check refuses.
        let number = value.cast_unsigned();
        match parse(name) {
            Some((rate, Part::Average)) => self.rates[rate].average = number,
            Some((rate, Part::Max)) => self.rates[rate].max = number,
            Some((rate, Part::BurstSeconds)) => {
                if value > i64::from(u32::MAX) {
                    let range = format!("[0, {}]", u32::MAX);
                    return invalid(format!("{name} value must be in the range {range}"));
                }
                self.rates[rate].burst_seconds = number;
            }
            None => self.iops_size = number,
        }
        Ok(())
    }

    /// The member `name`, one of [`NAMES`].
    pub fn get(&self, name: &str) -> i64 {
        let number = match parse(name) {
            Some((rate, Part::Average)) => self.rates[rate].average,
            Some((rate, Part::Max)) => self.rates[rate].max,
            Some((rate, Part::BurstSeconds)) => self.rates[rate].burst_seconds,
            None => self.iops_size,
        };
        number.cast_signed()
    }

    /// Refuses limits that make no sense.
    ///
    /// # Errors
    /// With QEMU's words.
    pub fn check(&self) -> Result<()> {
        let operations = &self.rates[3..];
        if self.iops_size != 0 && operations.iter().all(|rate| rate.average == 0) {
            return invalid("iops size requires an iops value to be set");
        }
        for rates in [&self.rates[..3], operations] {
            let both = |number: fn(&Rate) -> u64| {
                number(&rates[0]) != 0 && rates[1..].iter().any(|rate| number(rate) != 0)
            };
            if both(|rate| rate.average) || both(|rate| rate.max) {
                return invalid(
                    "bps/iops/max total values and read/write values cannot be used at the same \
                     time",
                );
            }
        }
        self.rates.iter().try_for_each(Rate::check)
    }

    /// Whether requests in `direction` ever wait.
    pub(super) fn limit(&self, direction: Direction) -> bool {
        let mut rates = self.rates.iter().zip(RATES);
        rates.any(|(rate, which)| rate.average != 0 && which.counts(direction))
    }
}

impl Rate {
    fn check(&self) -> Result<()> {
        let Rate {
            average,
            max,
            burst_seconds,
        } = *self;
        if average > MAX_RATE || max > MAX_RATE {
            return invalid(format!(
                "bps/iops/max values must be within [0, {MAX_RATE}]"
            ));
        }
        if burst_seconds == 0 {
            return invalid("the burst length cannot be 0");
        }
        if burst_seconds > 1 && max == 0 {
            return invalid("burst length set without burst rate");
        }
        if max != 0 && burst_seconds > MAX_RATE / max {
            return invalid("burst length too high for this burst rate");
        }
        if max != 0 && average == 0 {
            return invalid("bps_max/iops_max require corresponding bps/iops values");
        }
        if max != 0 && max < average {
            return invalid("bps_max/iops_max cannot be lower than bps/iops");
        }
        Ok(())
    }
}

fn invalid<T>(message: impl Into<String>) -> Result<T> {
    Err(Error::new(ErrorKind::Invalid, message))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(members: &[(&str, i64)]) -> Result<ThrottleLimits> {
        let mut limits = ThrottleLimits::default();
        for (name, value) in members {
            limits.set(name, *value)?;
        }
        limits.check().map(|()| limits)
    }

    #[test]
    fn members_are_read_back_by_name() {
        for (index, name) in NAMES.iter().enumerate() {
            let mut limits = ThrottleLimits::default();
            limits.set(name, index as i64 + 5).unwrap();
            assert_eq!(limits.get(name), index as i64 + 5, "{name}");
            let others = NAMES.iter().filter(|other| *other != name);
            for other in others {
                let usual = i64::from(other.ends_with("length"));
                assert_eq!(limits.get(other), usual, "{other} after {name}");
            }
        }
    }

    #[test]
    fn limits_that_make_no_sense_are_refused_with_the_peers_words() {
        let both = "bps/iops/max total values and read/write values cannot be used at the same \
                    time";
        let range = "bps/iops/max values must be within [0, 1000000000000000]";
        let cases: [(&[(&str, i64)], &str); 12] = [
            (
                &[("iops-size", 5)],
                "iops size requires an iops value to be set",
            ),
            (&[("bps-total", 1), ("bps-read", 1)], both),
            (
                &[("bps-total", 5), ("bps-total-max", 4)],
                "bps_max/iops_max cannot be lower than bps/iops",
            ),
            (
                &[("bps-total-max", 4)],
                "bps_max/iops_max require corresponding bps/iops values",
            ),
            (
                &[("bps-total", 5), ("bps-total-max-length", 0)],
                "the burst length cannot be 0",
            ),
            (
                &[("bps-total", 5), ("bps-total-max-length", 2)],
                "burst length set without burst rate",
            ),
            (&[("bps-total", 1_000_000_000_000_001)], range),
            (&[("bps-total", -1)], range),
            (
                &[
                    ("bps-total", 5),
                    ("bps-total-max", 1_000_000_000_000_000),
                    ("bps-total-max-length", 2),
                ],
                "burst length too high for this burst rate",
            ),
            (
                &[
                    ("bps-total", 5),
                    ("bps-total-max", 10),
                    ("bps-total-max-length", -2),
                ],
                "burst length too high for this burst rate",
            ),
            (
                &[("bps-total-max-length", 1 << 32)],
                "bps-total-max-length value must be in the range [0, 4294967295]",
            ),
            (&[("iops-total", 9), ("iops-write", 1)], both),
        ];
        for (members, message) in cases {
            assert_eq!(limits(members).unwrap_err().message, message, "{members:?}");
        }
        assert!(limits(&[("bps-total", 5), ("iops-read", 1), ("iops-size", 4096)]).is_ok());
    }
}
