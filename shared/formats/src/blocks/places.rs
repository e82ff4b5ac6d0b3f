//! Where in the file the next block goes.
//!
//! ```text
//!   0 ... │ in use │ spare │ in use │ ... │ next │ stale ... │ fresh
//!                    └ of no block          └ of no block yet  └ never written: reads as zeroes
//! ```
//!
//! A place that may hold something of old is told as such: it is zeroed around what is written there.

use std::ops::Range;

/// A place for a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// Its number in the file.
    pub(super) index: u32,
    /// Nothing has ever been written there.
    pub(super) is_fresh: bool,
}

/// What is known of a file when it is opened.
#[derive(Clone, Copy, Debug)]
pub(super) struct Known {
    /// Places between others that no block has are taken first; otherwise they are left alone.
    pub(super) fills_gaps: bool,
    /// The first place that may be taken when no gap is.
    pub(super) first_free: u32,
    /// The first place that was never written.
    pub(super) fresh: u32,
}

/// The places of a file that are free.
#[derive(Debug, Default)]
pub(super) struct Places {
    spare: Vec<Range<u32>>,
    /// Places that are one block's and no other's, by the block.
    kept: Vec<(u64, u32)>,
    next: u32,
    fresh: u32,
}

impl Places {
    /// By the places that the map refers to.
    pub(super) fn new(used: &mut [u32], known: Known) -> Self {
        used.sort_unstable();
        let end = used.last().map_or(0, |last| last.saturating_add(1));
        // Maps that lead far beyond have no gaps worth filling.
        let gaps = match known.fills_gaps && end <= known.fresh {
            true => gaps_between(used),
            false => Vec::new(),
        };
        let next = end.max(known.first_free);
        Self {
            spare: gaps,
            kept: Vec::new(),
            next,
            fresh: known.fresh.max(next),
        }
    }

    /// Takes a place below `end` for a block; `None` when there is none.
    pub(super) fn take(&mut self, block: u64, end: u32) -> Option<Place> {
        let kept = self.kept.iter().find(|(of, _)| *of == block);
        let kept = kept.map(|(_, index)| *index);
        if let Some(index) = kept.or_else(|| self.take_spare()) {
            let is_fresh = false;
            return Some(Place { index, is_fresh });
        }
        let index = self.next;
        if index >= end {
            return None;
        }
        self.next += 1;
        let is_fresh = index >= self.fresh;
        Some(Place { index, is_fresh })
    }

    fn take_spare(&mut self) -> Option<u32> {
        let index = self.spare.last_mut()?.next_back()?;
        if self.spare.last().is_some_and(Range::is_empty) {
            self.spare.pop();
        }
        Some(index)
    }

    /// Gives a place back. One that is kept for its block stays so: the file's map may refer to it.
    pub(super) fn give_back(&mut self, place: Place) {
        if self.kept.iter().all(|(_, index)| *index != place.index) {
            self.spare.push(place.index..place.index + 1);
        }
    }

    /// Keeps a place for the block that it was taken for, from now on.
    pub(super) fn keep_for(&mut self, block: u64, place: Place) {
        let kept = (block, place.index);
        if !self.kept.contains(&kept) {
            self.kept.push(kept);
        }
    }

    /// One past the last place that was ever taken.
    pub(super) fn end(&self) -> u32 {
        self.next
    }
}

/// The runs of places that are not among those in use, which are sorted.
fn gaps_between(used: &[u32]) -> Vec<Range<u32>> {
    let mut from = 0;
    let mut gaps = Vec::new();
    for index in used {
        if *index > from {
            gaps.push(from..*index);
        }
        from = index.saturating_add(1);
    }
    gaps
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOWN: Known = Known {
        fills_gaps: true,
        first_free: 0,
        fresh: 5,
    };

    fn place(index: u32, is_fresh: bool) -> Place {
        Place { index, is_fresh }
    }

    #[test]
    fn gaps_are_filled_first_and_what_may_hold_something_is_told() {
        let mut places = Places::new(&mut [3, 0, 1], KNOWN);
        let taken: Vec<_> = (0..4).map(|_| places.take(0, 100).unwrap()).collect();
        let expected = [
            place(2, false),
            place(4, false),
            place(5, true),
            place(6, true),
        ];
        assert_eq!(taken, expected);
        places.give_back(taken[3]);
        assert_eq!(places.take(0, 100), Some(place(6, false)));
        assert_eq!((places.take(0, 7), places.end()), (None, 7));
        places.keep_for(5, taken[0]);
        assert_eq!(places.take(4, 7), None);
        assert_eq!(places.take(5, 7), Some(taken[0]));
        // Whatever becomes of the next attempt.
        places.give_back(taken[0]);
        assert_eq!(places.take(4, 7), None);
        assert_eq!(places.take(5, 7), Some(taken[0]));
    }

    #[test]
    fn gaps_that_may_hold_something_else_are_left_alone() {
        let known = Known {
            fills_gaps: false,
            first_free: 4,
            fresh: 5,
        };
        let mut places = Places::new(&mut [1, 1, 3], known);
        let taken = [(); 2].map(|()| places.take(0, 100).unwrap());
        assert_eq!(taken, [place(4, false), place(5, true)]);
    }

    #[test]
    fn a_map_of_one_far_place_has_one_long_gap() {
        let fresh = u32::MAX;
        let mut places = Places::new(&mut [u32::MAX - 2], Known { fresh, ..KNOWN });
        let taken = [(); 2].map(|()| places.take(0, u32::MAX).unwrap().index);
        assert_eq!(taken, [u32::MAX - 3, u32::MAX - 4]);
        let mut places = Places::new(&mut [u32::MAX - 2], KNOWN);
        assert_eq!(places.take(0, u32::MAX), Some(place(u32::MAX - 1, true)));
        assert_eq!(places.take(0, u32::MAX), None);
    }
}
