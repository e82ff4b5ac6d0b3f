//! The versions that one sector may hold.
//!
//! A sector's history is a list of completed changes, each with the time of its completion, oldest
//! first, and at most one change in flight. Times are the oracle's logical clock. A discard leaves
//! the sector with its earlier content or zeroes until observed, and a failed change may or may not
//! have happened; both are transparent: what was possible before them stays possible.

use super::pattern::{Found, Generation};

/// What a change makes of a sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// Content that nobody knows; only at the start of a history.
    Unknown,
    /// Zeroes.
    Zero,
    /// A write.
    Written(Generation),
    /// Zeroes, or what was there before.
    Discarded,
    /// A write that failed: its data, or what was there before.
    MaybeWritten(Generation),
}

impl Change {
    fn allows(self, found: Found) -> bool {
        match (self, found) {
            (Self::Unknown, _) => true,
            (Self::Zero | Self::Discarded, Found::Zero) => true,
            (Self::Written(mine) | Self::MaybeWritten(mine), Found::Written(theirs)) => {
                mine == theirs
            }
            _ => false,
        }
    }

    /// The words that it leaves in `sector`; none where that is not known.
    fn words(self, sector: u64) -> Box<dyn Iterator<Item = Option<u64>>> {
        match self {
            Self::Unknown => Box::new(std::iter::repeat(None)),
            Self::Zero | Self::Discarded => Box::new(std::iter::repeat(Some(0))),
            Self::Written(generation) | Self::MaybeWritten(generation) => {
                Box::new(generation.words(sector).map(Some))
            }
        }
    }

    fn is_transparent(self) -> bool {
        matches!(self, Self::Discarded | Self::MaybeWritten(_))
    }
}

#[derive(Clone, Copy, Debug)]
struct Version {
    completed: u64,
    change: Change,
}

/// The versions of one sector.
#[derive(Clone, Debug)]
pub(super) struct History {
    versions: Vec<Version>,
    pending: Option<Change>,
}

impl History {
    /// A sector that has always held `content`.
    pub(super) fn new(content: Change) -> Self {
        Self {
            versions: vec![Version {
                completed: 0,
                change: content,
            }],
            pending: None,
        }
    }

    pub(super) fn is_busy(&self) -> bool {
        self.pending.is_some()
    }

    pub(super) fn begin(&mut self, change: Change) {
        self.pending = Some(change);
    }

    /// The pending change is complete at `now`; versions that no observer from `keep_from` on can
    /// see are dropped.
    pub(super) fn complete(&mut self, now: u64, keep_from: u64) {
        if let Some(change) = self.pending.take() {
            self.versions.push(Version {
                completed: now,
                change,
            });
        }
        let first = self.opaque_at(keep_from);
        self.versions.drain(..first);
    }

    /// The pending change failed at `now`.
    pub(super) fn fail(&mut self, now: u64) {
        let change = match self.pending.take() {
            Some(Change::Written(generation)) => Change::MaybeWritten(generation),
            Some(_) => Change::Discarded,
            None => return,
        };
        self.versions.push(Version {
            completed: now,
            change,
        });
    }

    /// True when `found` may be seen by somebody who started to look at `since` and looks now.
    pub(super) fn allows(&self, found: Found, since: u64) -> bool {
        let pending = self.pending.is_some_and(|change| change.allows(found));
        pending
            || self.versions[self.opaque_at(since)..]
                .iter()
                .any(|v| v.change.allows(found))
    }

    /// True when `bytes` of the sector `number` may be seen by somebody who looks from `since` to now, because it changes
    /// meanwhile: each byte is of one of its contents.
    pub(super) fn allows_mixture(&self, (number, bytes): (u64, &[u8]), since: u64) -> bool {
        let seen = &self.versions[self.opaque_at(since)..];
        let changes = self.pending.is_some() || seen.iter().any(|v| v.completed > since);
        let contents = seen.iter().map(|v| v.change).chain(self.pending);
        let mut known = vec![false; bytes.len()];
        for content in contents {
            let words = content.words(number).map(|word| word.map(u64::to_le_bytes));
            let bytes_of_words =
                words.flat_map(|word| (0..8).map(move |at| word.map(|word| word[at])));
            for ((known, found), byte) in known.iter_mut().zip(bytes).zip(bytes_of_words) {
                *known |= byte.is_none_or(|byte| *found == byte);
            }
        }
        changes && known.into_iter().all(|known| known)
    }

    /// The sector was seen to hold `found` with nothing in flight: that is its content now.
    pub(super) fn observe(&mut self, found: Found) {
        let last = self.versions.len() - 1;
        if self.versions[last].change.is_transparent() {
            self.versions[last].change = content_of(found);
        }
    }

    /// The content, when it is certain.
    pub(super) fn certain(&self) -> Option<Change> {
        let change = self.versions.last()?.change;
        let known = !change.is_transparent() && change != Change::Unknown;
        (known && self.pending.is_none()).then_some(change)
    }

    /// After a loss at which everything completed by `durable` survived: whatever was seen there
    /// then is the only version left.
    pub(super) fn settle(&mut self, found: Found) {
        self.versions = vec![Version {
            completed: 0,
            change: content_of(found),
        }];
        self.pending = None;
    }

    pub(super) fn describe(&self, since: u64) -> String {
        let seen = &self.versions[self.opaque_at(since)..];
        format!(
            "{:?} pending {:?}",
            seen.iter().map(|v| v.change).collect::<Vec<_>>(),
            self.pending
        )
    }

    /// Index of the oldest version that can be seen at `time` or later: the last opaque one
    /// completed by then.
    fn opaque_at(&self, time: u64) -> usize {
        let current = self
            .versions
            .partition_point(|v| v.completed <= time)
            .max(1);
        (0..current)
            .rev()
            .find(|&index| !self.versions[index].change.is_transparent())
            .unwrap_or(0)
    }
}

fn content_of(found: Found) -> Change {
    match found {
        Found::Zero => Change::Zero,
        Found::Written(generation) => Change::Written(generation),
        Found::Corrupt { .. } => Change::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(count: u64) -> (Change, Found) {
        let generation = Generation::new(1, count, 0);
        (Change::Written(generation), Found::Written(generation))
    }

    #[test]
    fn a_reader_may_see_what_was_current_since_it_started() {
        let ((first, see_first), (second, see_second)) = (written(1), written(2));
        let mut history = History::new(Change::Zero);
        history.begin(first);
        assert!(history.allows(Found::Zero, 1) && history.allows(see_first, 1));
        history.complete(2, 1);
        history.begin(second);
        history.complete(5, 1);
        assert!(history.allows(see_first, 3) && history.allows(see_second, 3));
        assert!(!history.allows(Found::Zero, 3));
        assert!(history.allows(see_second, 5) && !history.allows(see_first, 5));
    }

    #[test]
    fn a_mixture_of_old_and_new_may_be_seen_only_beside_the_write() {
        let (write, _) = written(1);
        let mut torn = vec![0; crate::driver::SECTOR_BYTES];
        crate::oracle::fill(&mut torn, 5, Generation::new(1, 1, 0));
        // A copy may be looked at between any two bytes.
        torn[..27].fill(0);
        let mut history = History::new(Change::Zero);
        assert!(!history.allows_mixture((5, &torn), 0));
        history.begin(write);
        assert!(history.allows_mixture((5, &torn), 1));
        assert!(!history.allows_mixture((6, &torn), 1), "another sector's");
        history.complete(3, 1);
        assert!(
            history.allows_mixture((5, &torn), 2),
            "begun before the end"
        );
        assert!(!history.allows_mixture((5, &torn), 3));
    }

    #[test]
    fn a_discard_leaves_old_content_or_zeroes_until_observed() {
        let (write, seen) = written(1);
        let mut history = History::new(Change::Zero);
        history.begin(write);
        history.complete(1, 1);
        history.begin(Change::Discarded);
        history.complete(2, 2);
        assert!(history.allows(seen, 3) && history.allows(Found::Zero, 3));
        history.observe(Found::Zero);
        assert!(!history.allows(seen, 3) && history.certain() == Some(Change::Zero));
    }

    #[test]
    fn pruning_keeps_what_a_power_cut_could_bring_back() {
        let ((first, see_first), (second, _)) = (written(1), written(2));
        let mut history = History::new(Change::Zero);
        history.begin(first);
        history.complete(3, 0);
        history.begin(second);
        history.complete(4, 0);
        assert!(history.allows(Found::Zero, 0) && history.allows(see_first, 0));
        history.complete(5, 4);
        assert!(
            !history.allows(see_first, 0),
            "dropped once a flush made its successor durable"
        );
    }
}
