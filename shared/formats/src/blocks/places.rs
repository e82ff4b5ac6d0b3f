//! Where in the file the next block goes.
//!
//! ```text
//!   0 ... │ in use │ spare │ in use │ ... │ next │ stale ... │ fresh
//!                    └ of no block          └ of no block yet  └ never written: reads as zeroes
//! ```
//!
//! A place that may hold something of old is told as such: it is zeroed around what is written there.

/// A place for a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// What the block map says.
    pub(super) index: u32,
    /// Nothing has ever been written there.
    pub(super) is_fresh: bool,
}

/// The places of a file that are free.
#[derive(Debug, Default)]
pub(super) struct Places {
    spare: Vec<u32>,
    /// Places that are one block's and no other's, by the block.
    kept: Vec<(u64, u32)>,
    next: u32,
    fresh: u32,
}

impl Places {
    /// By what the map refers to, and how many blocks the file has room for.
    pub(super) fn new(used: &mut [u32], in_file: u32) -> Self {
        used.sort_unstable();
        let next = used.last().map_or(0, |last| last + 1);
        // Maps that lead far beyond have no gaps worth filling.
        let gaps = match next <= in_file {
            true => (0..next)
                .filter(|index| used.binary_search(index).is_err())
                .collect(),
            false => Vec::new(),
        };
        Self {
            spare: gaps,
            kept: Vec::new(),
            next,
            fresh: in_file.max(next),
        }
    }

    /// Takes a place below `end` for a block; `None` when there is none.
    pub(super) fn take(&mut self, block: u64, end: u32) -> Option<Place> {
        let kept = self.kept.iter().position(|(of, _)| *of == block);
        let kept = kept.map(|at| self.kept.swap_remove(at).1);
        if let Some(index) = kept.or_else(|| self.spare.pop()) {
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

    /// Gives a place back.
    pub(super) fn give_back(&mut self, place: Place) {
        self.spare.push(place.index);
    }

    /// Keeps a place for the block that it was taken for.
    pub(super) fn keep_for(&mut self, block: u64, place: Place) {
        self.kept.push((block, place.index));
    }

    /// One past the last place that was ever taken.
    pub(super) fn end(&self) -> u32 {
        self.next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_filled_first_and_what_may_hold_something_is_told() {
        let mut places = Places::new(&mut [3, 0, 1], 5);
        let taken: Vec<_> = (0..4).map(|_| places.take(0, 100).unwrap()).collect();
        let place = |index, is_fresh| Place { index, is_fresh };
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
    }
}
