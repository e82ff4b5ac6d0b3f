//! What is done to both images.

use block::ByteRange;
use rand::Rng;
use rand::rngs::SmallRng;

/// One operation; both sides must be able to do it.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Operation {
    /// Every byte of the range becomes the fill.
    Write { range: ByteRange, fill: u8 },
    /// Reads as zeroes afterwards; storage may go when `unmap`.
    Zero { range: ByteRange, unmap: bool },
    /// Whole clusters of the range lose their content.
    Discard { range: ByteRange },
    /// What was done is durable.
    Flush,
    /// A new length in bytes.
    Resize { length: u64 },
}

impl Operation {
    /// An operation on a disk of `length` bytes with clusters of `cluster_size`.
    pub(crate) fn random(random: &mut SmallRng, length: u64, cluster_size: u64) -> Self {
        let range = range(random, length, cluster_size);
        match random.random_range(0..20) {
            0..9 => Self::Write {
                range,
                fill: random.random(),
            },
            9..13 => Self::Zero {
                range,
                unmap: random.random(),
            },
            13..16 => Self::Discard {
                range: sectors(range, length),
            },
            16..19 => Self::Flush,
            _ => Self::Resize {
                length: random.random_range(length / 1024..length / 256) * 512 + 512,
            },
        }
    }
}

/// Byte, sector or cluster granular; short or long.
fn range(random: &mut SmallRng, length: u64, cluster_size: u64) -> ByteRange {
    let grain = match random.random_range(0..4) {
        0 => 1,
        1 | 2 => 512,
        _ => cluster_size.min(length),
    };
    let grains = length / grain;
    let start = random.random_range(0..grains);
    let most = match random.random_range(0..3) {
        0 => 1,
        1 => 4 * cluster_size / grain,
        _ => grains,
    };
    let count = random.random_range(1..=most.clamp(1, grains - start));
    ByteRange::new(start * grain, count * grain)
}

/// The sectors that a range touches: discards are in sectors.
fn sectors(range: ByteRange, length: u64) -> ByteRange {
    let start = range.offset / 512 * 512;
    let end = (range.offset + range.length)
        .next_multiple_of(512)
        .min(length);
    ByteRange::new(start, end - start)
}
