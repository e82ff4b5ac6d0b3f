//! What is done to both images.

use crate::shape::Shape;
use block::ByteRange;
use rand::Rng;
use rand::rngs::SmallRng;

/// What is written.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Content {
    /// One byte everywhere.
    Fill(u8),
    /// [`NOISE`] again and again: what does not shrink.
    Noise,
}

/// The name of the file that holds the noise, and its bytes.
pub(crate) const NOISE: (&str, usize) = ("noise", 7000);

/// One operation; both sides must be able to do it.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Operation {
    /// Plain data.
    Write { range: ByteRange, content: Content },
    /// Whole clusters, compressed where that saves space.
    WriteCompressed { range: ByteRange, content: Content },
    /// Reads as zeroes afterwards; storage may go when `unmap`.
    Zero { range: ByteRange, unmap: bool },
    /// Whole clusters of the range lose their content.
    Discard { range: ByteRange },
    /// What was done is durable.
    Flush,
    /// A new length in bytes.
    Resize { length: u64 },
}

/// What is done to the image's snapshots between two rounds, by number.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Change {
    /// A new one.
    Create(u32),
    /// The disk becomes what it was.
    Apply(u32),
    /// It is forgotten.
    Delete(u32),
}

impl Change {
    /// A change of an image that has the snapshots `kept`.
    pub(crate) fn random(random: &mut SmallRng, kept: &[u32]) -> Self {
        let one = (!kept.is_empty()).then(|| kept[random.random_range(0..kept.len())]);
        match (one, random.random_range(0..4)) {
            (Some(number), 0) => Self::Apply(number),
            (Some(number), 1) => Self::Delete(number),
            _ => Self::Create(kept.last().map_or(0, |last| last + 1)),
        }
    }
}

/// The name of a snapshot: no number, which could be taken for an identifier.
pub(crate) fn snapshot_name(number: u32) -> String {
    format!("s{number}")
}

impl Operation {
    /// An operation on a disk of `length` bytes.
    pub(crate) fn random(random: &mut SmallRng, length: u64, shape: &Shape) -> Self {
        let range = range(random, length, shape.cluster_size);
        let content = match random.random_range(0..4) {
            0 => Content::Noise,
            _ => Content::Fill(random.random()),
        };
        match random.random_range(0..20) {
            0..3 if shape.compresses => Self::WriteCompressed {
                range: clusters(range, shape.cluster_size, length),
                content,
            },
            0..9 => Self::Write { range, content },
            9..13 => Self::Zero {
                range,
                unmap: random.random(),
            },
            // Whether subclusters are discarded is the implementation's choice.
            13..16 if shape.extended_l2 => Self::Discard {
                range: clusters(range, shape.cluster_size, length),
            },
            13..16 => Self::Discard {
                range: sectors(range, length),
            },
            16..19 => Self::Flush,
            _ => Self::Resize {
                length: new_length(random, length, shape.cluster_size),
            },
        }
    }
}

/// A longer or shorter disk. What is left of a cluster that a shorter one cuts, the peer shows again
/// when the disk grows; outboard does not.
fn new_length(random: &mut SmallRng, length: u64, cluster_size: u64) -> u64 {
    let new = random.random_range(length / 1024..length / 256) * 512 + 512;
    match new < length {
        true => new.next_multiple_of(cluster_size).min(length),
        false => new,
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
    clusters(range, 512, length)
}

/// The clusters that a range touches; the disk may end within the last one.
fn clusters(range: ByteRange, cluster_size: u64, length: u64) -> ByteRange {
    let start = range.offset / cluster_size * cluster_size;
    let end = (range.offset + range.length)
        .next_multiple_of(cluster_size)
        .min(length);
    ByteRange::new(start, end - start)
}
