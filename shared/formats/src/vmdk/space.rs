//! Where in the file of a sparse extent the next grain goes.
//!
//! ```text
//!   0 ... used, or not known │ grain │ grain │ next ... │ durable length of the file
//!                              spare: of no grain, may hold something
//! ```

use super::SECTOR;

/// A place for a grain, or for a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) sector: u64,
    pub(super) sectors: u64,
    /// Nothing has ever been written there.
    pub(super) is_fresh: bool,
}

impl Place {
    /// One past its last sector.
    pub(super) fn end(&self) -> u64 {
        self.sector + self.sectors
    }
}

/// The end of a file.
#[derive(Debug)]
pub(super) struct Space {
    /// Places begin at multiples of so many sectors.
    unit: u64,
    next: u64,
    spare: Vec<Place>,
    /// Length of the file that a power cut does not take back, in bytes.
    durable: u64,
    has_grown: bool,
}

impl Space {
    /// Behind the end of a file of `length` bytes.
    pub(super) fn new(length: u64, unit: u64) -> Self {
        Self {
            next: length.div_ceil(SECTOR).next_multiple_of(unit),
            unit,
            spare: Vec::new(),
            durable: length,
            has_grown: false,
        }
    }

    /// The place that is taken next; `None` when entries cannot tell of any more.
    pub(super) fn peek(&self, sectors: u64) -> Option<Place> {
        let fits = |place: &&Place| place.sectors == sectors;
        if let Some(spare) = self.spare.iter().rfind(fits) {
            return Some(*spare);
        }
        let place = Place {
            sector: self.next,
            sectors,
            is_fresh: true,
        };
        (place.end() <= u64::from(u32::MAX)).then_some(place)
    }

    /// Takes what [`Space::peek`] showed.
    pub(super) fn take(&mut self, place: Place) {
        match self.spare.iter().position(|spare| *spare == place) {
            Some(at) => drop(self.spare.swap_remove(at)),
            None => self.next = place.end().next_multiple_of(self.unit),
        }
    }

    /// Gives a place back, into which something may have been written.
    pub(super) fn give_back(&mut self, place: Place) {
        self.spare.push(Place {
            is_fresh: false,
            ..place
        });
    }

    pub(super) fn durable_length(&self) -> u64 {
        self.durable
    }

    /// The file has a new length, durably.
    pub(super) fn grown(&mut self, length: u64) {
        (self.durable, self.has_grown) = (length, true);
    }

    /// Where the part of the file begins that was made for grains that never came.
    pub(super) fn unused_from(&self) -> Option<u64> {
        let end = self.next * SECTOR;
        (self.has_grown && end < self.durable).then_some(end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_follow_the_end_and_given_back_ones_are_told_as_used() {
        let mut space = Space::new(1000, 8);
        let first = space.peek(8).unwrap();
        assert_eq!((first.sector, first.is_fresh), (8, true));
        space.take(first);
        let second = space.peek(3).unwrap();
        space.take(second);
        assert_eq!((second.sector, space.peek(8).unwrap().sector), (16, 24));
        space.give_back(first);
        let again = space.peek(8).unwrap();
        assert_eq!((again.sector, again.is_fresh), (8, false));
        space.take(again);
        assert_eq!(space.peek(8).unwrap().sector, 24);
        assert_eq!(space.unused_from(), None);
        space.grown(1 << 20);
        assert_eq!(space.unused_from(), Some(24 * SECTOR));
    }

    #[test]
    fn there_is_an_end_of_what_entries_can_tell() {
        let mut space = Space::new((u64::from(u32::MAX) - 8) * SECTOR, 1);
        let last = space.peek(8).unwrap();
        space.take(last);
        assert_eq!(space.peek(1), None);
    }
}
