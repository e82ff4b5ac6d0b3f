//! Where in a packed ring: an index and the wrap counter of its lap.

/// A position in a packed ring, modulo two laps: the first has wrap counter 1, the second 0. Ring
/// sizes are powers of two up to 32768, so that two laps fit 16 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position(u16);

impl Position {
    /// Where driver and device begin.
    pub const START: Position = Position(0);

    /// The position that `word` encodes: the index, and the wrap counter in bit 15. `None` when
    /// the index is not below `size`.
    pub fn from_wire(word: u16, size: u16) -> Option<Position> {
        let index = word & 0x7fff;
        let second = if word & 0x8000 == 0 { size } else { 0 };
        (index < size).then_some(Position(index | second))
    }

    /// As [`Position::from_wire`] reads it.
    #[inline]
    pub fn to_wire(self, size: u16) -> u16 {
        self.index(size) | u16::from(self.wrap(size)) << 15
    }

    /// Index of the descriptor.
    #[inline]
    pub fn index(self, size: u16) -> u16 {
        self.0 & (size - 1)
    }

    /// The wrap counter.
    #[inline]
    pub fn wrap(self, size: u16) -> bool {
        self.0 & size == 0
    }

    /// `count` descriptors further.
    #[inline]
    #[must_use]
    pub fn advanced(self, count: u16, size: u16) -> Position {
        Position(self.0.wrapping_add(count) & ((size - 1) | size))
    }

    /// Descriptors from `earlier` to here.
    #[inline]
    pub fn distance_from(self, earlier: Position, size: u16) -> u16 {
        self.0.wrapping_sub(earlier.0) & ((size - 1) | size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_wrap_and_their_counter_flips() {
        for size in [1, 2, 8, 32768] {
            let mut position = Position::START;
            let mut seen = Vec::new();
            for step in 0..4 * u32::from(size) {
                assert_eq!(u32::from(position.index(size)), step % u32::from(size));
                assert_eq!(position.wrap(size), step / u32::from(size) % 2 == 0);
                let word = position.to_wire(size);
                assert_eq!(Position::from_wire(word, size), Some(position));
                seen.push(position);
                position = position.advanced(1, size);
            }
            assert_eq!(position, Position::START);
            assert_eq!(seen[1].distance_from(seen[0], size), 1);
            assert_eq!(
                seen[0].distance_from(seen[1], size),
                2 * size.wrapping_sub(1) + 1
            );
        }
        assert_eq!(Position::from_wire(8, 8), None);
        assert_eq!(Position::from_wire(0x8000, 8), Some(Position::START));
    }
}
