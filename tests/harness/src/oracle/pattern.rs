//! What a written sector looks like: its own number, who wrote it, when, and a body derived from both.
//!
//! ```text
//! offset 0  u64 sector number
//!        8  u64 generation: writer in the top 16 bits, that writer's counter below
//!       16  u64 flush epoch in which the write began
//!       24  61 words derived from the three
//! ```

use std::fmt;

use crate::driver::SECTOR_BYTES;

const WORDS: usize = SECTOR_BYTES / 8;
const HEADER_WORDS: usize = 3;

/// Names one write uniquely.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Generation {
    id: u64,
    epoch: u64,
}

impl Generation {
    /// The `count`th write of `writer`, begun when `epoch` flushes had completed.
    ///
    /// # Panics
    /// When `count` is zero or needs more than 48 bits.
    pub fn new(writer: u16, count: u64, epoch: u64) -> Self {
        assert!((1..1 << 48).contains(&count), "write counter {count}");
        Self {
            id: u64::from(writer) << 48 | count,
            epoch,
        }
    }

    fn seed(self, sector: u64) -> u64 {
        mix(sector ^ self.id.rotate_left(24) ^ self.epoch.rotate_left(48))
    }

    /// The words that it makes of `sector`.
    pub(super) fn words(self, sector: u64) -> impl Iterator<Item = u64> {
        let seed = self.seed(sector);
        (0..WORDS).map(move |index| match index {
            0 => sector,
            1 => self.id,
            2 => self.epoch,
            _ => body_word(seed, index),
        })
    }
}

impl fmt::Debug for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (writer, count) = (self.id >> 48, self.id & ((1 << 48) - 1));
        write!(
            f,
            "write {count} of writer {writer} in epoch {}",
            self.epoch
        )
    }
}

/// What a sector turned out to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// All zero.
    Zero,
    /// An intact write to this very sector.
    Written(Generation),
    /// Neither: torn inside a sector, another sector's data, or garbage.
    Corrupt {
        /// The sector number stored in it.
        sector: u64,
        /// The generation stored in it.
        generation: Generation,
        /// First word that is wrong.
        word: usize,
    },
}

/// Fills `into` with the sectors from `first` on, as written by `generation`.
pub fn fill(into: &mut [u8], first: u64, generation: Generation) {
    for (sector, bytes) in (first..).zip(into.chunks_exact_mut(SECTOR_BYTES)) {
        for (word, value) in bytes.chunks_exact_mut(8).zip(generation.words(sector)) {
            word.copy_from_slice(&value.to_le_bytes());
        }
    }
}

/// Reads one sector back.
pub fn inspect(bytes: &[u8], sector: u64) -> Found {
    let word = |index: usize| crate::wire::read_u64(bytes, index * 8);
    let (stored, generation) = (
        word(0),
        Generation {
            id: word(1),
            epoch: word(2),
        },
    );
    let seed = generation.seed(sector);
    let wrong = if stored == sector {
        (HEADER_WORDS..WORDS).find(|&index| word(index) != body_word(seed, index))
    } else {
        Some(0)
    };
    match wrong {
        None => Found::Written(generation),
        Some(_) if bytes.iter().all(|&byte| byte == 0) => Found::Zero,
        Some(word) => Found::Corrupt {
            sector: stored,
            generation,
            word,
        },
    }
}

fn body_word(seed: u64, index: usize) -> u64 {
    (seed ^ index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn mix(mut value: u64) -> u64 {
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filled_sector_is_recognised_only_at_its_own_place() {
        let mut bytes = vec![0; 2 * SECTOR_BYTES];
        let generation = Generation::new(3, 7, 9);
        fill(&mut bytes, 40, generation);
        assert_eq!(
            inspect(&bytes[..SECTOR_BYTES], 40),
            Found::Written(generation)
        );
        assert_eq!(
            inspect(&bytes[SECTOR_BYTES..], 41),
            Found::Written(generation)
        );
        assert!(matches!(
            inspect(&bytes[SECTOR_BYTES..], 40),
            Found::Corrupt { sector: 41, .. }
        ));
    }

    #[test]
    fn a_torn_sector_is_corrupt_and_a_zero_sector_is_zero() {
        let (mut old, mut new) = ([0; SECTOR_BYTES], [0; SECTOR_BYTES]);
        fill(&mut old, 5, Generation::new(1, 1, 0));
        fill(&mut new, 5, Generation::new(1, 2, 0));
        old[..256].copy_from_slice(&new[..256]);
        assert!(matches!(inspect(&old, 5), Found::Corrupt { word: 32, .. }));
        assert_eq!(inspect(&[0; SECTOR_BYTES], 5), Found::Zero);
    }
}
