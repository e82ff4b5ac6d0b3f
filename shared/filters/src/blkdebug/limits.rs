//! The limits that blkdebug pretends to have.

use block::error::Result;
use block::{ByteRange, Error, ErrorKind, Limits, OpenRequest};

/// Sizes must be below this, in bytes.
const TOO_LARGE: u64 = i32::MAX as u64;

/// Sizes of requests in bytes; 0 = not limited.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sizes {
    align: u64,
    max_transfer: u64,
    opt_write_zero: u64,
    max_write_zero: u64,
    opt_discard: u64,
    max_discard: u64,
}

/// A part of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) range: ByteRange,
    /// It is a multiple of what is best.
    pub(super) aligned: bool,
}

impl Sizes {
    /// Takes the options.
    pub(super) fn take(request: &mut OpenRequest<'_>) -> Result<Self> {
        let mut take = |name| request.take_size(name).map(Option::unwrap_or_default);
        let sizes = Self {
            align: take("align")?,
            max_transfer: take("max-transfer")?,
            opt_write_zero: take("opt-write-zero")?,
            max_write_zero: take("max-write-zero")?,
            opt_discard: take("opt-discard")?,
            max_discard: take("max-discard")?,
        };
        sizes.check().map(|()| sizes)
    }

    fn check(&self) -> Result<()> {
        let refused = |name: &str, value: u64| {
            let message = format!("Cannot meet constraints with {name} {value}");
            Err(Error::new(ErrorKind::Invalid, message))
        };
        let unit = self.align.max(1);
        if self.align != 0 && (!self.align.is_power_of_two() || self.align >= TOO_LARGE) {
            return refused("align", self.align);
        }
        let limited = [
            ("max-transfer", self.max_transfer, unit),
            ("opt-write-zero", self.opt_write_zero, unit),
            (
                "max-write-zero",
                self.max_write_zero,
                self.opt_write_zero.max(unit),
            ),
            ("opt-discard", self.opt_discard, unit),
            ("max-discard", self.max_discard, self.opt_discard.max(unit)),
        ];
        for (name, value, unit) in limited {
            if value >= TOO_LARGE || !value.is_multiple_of(unit) {
                return refused(name, value);
            }
        }
        Ok(())
    }

    /// What the node can take in one call.
    pub(super) fn limits(&self, child: Limits) -> Limits {
        Limits {
            request_alignment: self.align.max(1) as u32,
            max_transfer: self.max_transfer as u32,
            zero_alignment: match self.opt_write_zero {
                0 => child.zero_alignment,
                size => size as u32,
            },
            ..child.passed_on()
        }
    }

    /// The requests that writing zeroes to a range takes.
    pub(super) fn zero_parts(&self, range: ByteRange) -> Vec<Part> {
        parts(range, (self.opt_write_zero, self.max_write_zero))
    }

    /// The requests that discarding a range takes.
    pub(super) fn discard_parts(&self, range: ByteRange) -> Vec<Part> {
        parts(range, (self.opt_discard, self.max_discard))
    }
}

/// Divides `range` at multiples of the best size, the middle into pieces of at most so many bytes.
fn parts(range: ByteRange, (best, most): (u64, u64)) -> Vec<Part> {
    let best = best.max(1);
    let end = range.offset.saturating_add(range.length);
    let body = range.offset.next_multiple_of(best).min(end);
    let body_end = (end - end % best).max(body);
    let most = match most {
        0 => u64::MAX,
        most => most,
    };
    let mut parts = Vec::new();
    let mut add = |from: u64, to: u64, aligned| {
        if from < to {
            let range = ByteRange::new(from, to - from);
            parts.push(Part { range, aligned });
        }
    };
    add(range.offset, body, false);
    let mut at = body;
    while at < body_end {
        let next = at.saturating_add(most).min(body_end);
        add(at, next, true);
        at = next;
    }
    add(body_end, end, false);
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(range: (u64, u64), sizes: (u64, u64)) -> Vec<(u64, u64, bool)> {
        parts(ByteRange::new(range.0, range.1), sizes)
            .into_iter()
            .map(|part| (part.range.offset, part.range.length, part.aligned))
            .collect()
    }

    #[test]
    fn requests_are_cut_at_the_best_size_and_the_largest() {
        assert_eq!(cut((0, 10), (0, 0)), [(0, 10, true)]);
        assert_eq!(cut((1, 2), (4, 0)), [(1, 2, false)]);
        let expected = [(3, 1, false), (4, 8, true), (12, 4, true), (16, 1, false)];
        assert_eq!(cut((3, 14), (4, 8)), expected);
        assert_eq!(cut((5, 0), (4, 8)), []);
    }

    #[test]
    fn limits_that_contradict_each_other_are_refused() {
        let good = Sizes {
            align: 512,
            max_transfer: 1024,
            ..Sizes::default()
        };
        assert!(good.check().is_ok());
        let bad = [
            Sizes { align: 3, ..good },
            Sizes {
                max_transfer: 768,
                ..good
            },
            Sizes {
                opt_discard: 4096,
                max_discard: 2048,
                ..good
            },
        ];
        for sizes in bad {
            assert!(sizes.check().is_err(), "{sizes:?}");
        }
    }
}
