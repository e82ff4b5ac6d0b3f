//! The part of an input that says what is done with the image.
//!
//! | bytes | meaning |
//! |---|---|
//! | 0 | bit 0: read-only; bit 1: over a backing; bits 4..6: cache size, see [`Script::cache_bytes`] |
//! | 1 | number of steps, at most [`MAX_STEPS`] |
//! | 2.. | steps of 8 bytes: kind (one of the target's), fill, length in 64-byte units (16 bits), position (32 bits), little-endian |
//! | rest | the image |

use crate::target::Target;
use block::ByteRange;

/// Most steps of a script.
pub const MAX_STEPS: usize = 24;
const STEP_BYTES: usize = 8;
const LENGTH_UNIT: u64 = 64;

/// What a step does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Reads.
    Read,
    /// Writes a repeated byte.
    Write,
    /// Writes zeroes, keeping storage.
    Zero,
    /// Writes zeroes, giving storage up.
    ZeroUnmap,
    /// Discards.
    Discard,
    /// Flushes.
    Flush,
    /// Asks what is known about a range.
    Status,
    /// Changes the length.
    Resize,
    /// Writes whole clusters, compressed.
    Compress,
    /// Takes a snapshot.
    Snapshot,
    /// Goes back to a snapshot.
    Apply,
    /// Deletes a snapshot.
    Delete,
    /// Reads a snapshot without applying it.
    View,
    /// Closes the image and opens it again.
    Reopen,
    /// The process ends without closing the image, and the next one opens it.
    Kill,
    /// Adds a persistent bitmap.
    AddBitmap,
    /// Removes a bitmap.
    RemoveBitmap,
    /// Makes a bitmap clean.
    ClearBitmap,
}

/// One step.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// What it does.
    pub kind: Kind,
    /// The byte that it writes.
    pub fill: u8,
    length: u16,
    position: u32,
}

/// An input taken apart.
#[derive(Debug)]
pub struct Script<'i> {
    /// The image is opened read-only.
    pub read_only: bool,
    /// The image lies over a backing.
    pub has_backing: bool,
    /// Memory for each metadata cache in bytes.
    pub cache_bytes: u64,
    /// What is done.
    pub steps: Vec<Step>,
    /// The image file.
    pub image: &'i [u8],
}

impl<'i> Script<'i> {
    /// Takes an input of a target apart; `None` when it is too short.
    pub fn parse(target: Target, input: &'i [u8]) -> Option<Self> {
        Self::of_kinds(target.kinds(), input)
    }

    /// The same for steps of these kinds.
    pub fn of_kinds(kinds: &[Kind], input: &'i [u8]) -> Option<Self> {
        let (&[flags, count], rest) = input.split_first_chunk()?;
        let count = usize::from(count).min(MAX_STEPS);
        let (steps, image) = rest.split_at_checked(count * STEP_BYTES)?;
        Some(Self {
            read_only: flags & 1 != 0,
            has_backing: flags & 2 != 0,
            cache_bytes: 4096 << (flags >> 4 & 7),
            steps: steps
                .chunks_exact(STEP_BYTES)
                .map(|bytes| Step::parse(kinds, bytes))
                .collect(),
            image,
        })
    }
}

impl Step {
    fn parse(kinds: &[Kind], bytes: &[u8]) -> Self {
        Self {
            kind: kinds[usize::from(bytes[0]) % kinds.len()],
            fill: bytes[1],
            length: u16::from_le_bytes([bytes[2], bytes[3]]),
            position: u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
        }
    }

    /// The range of a disk of `disk_bytes` that the step is about; empty for an empty disk. Positions
    /// are a fraction of the disk, so that a mutated size does not move them all out of it.
    pub fn range(&self, disk_bytes: u64) -> ByteRange {
        let scaled = (u128::from(disk_bytes) * u128::from(self.position)) >> 32;
        let offset = scaled as u64;
        let length = (u64::from(self.length) * LENGTH_UNIT).min(disk_bytes - offset);
        // Odd fills keep the byte as it is, even ones take the sector.
        match self.fill % 2 {
            0 => {
                let start = offset / 512 * 512;
                ByteRange::new(start, length.next_multiple_of(512).min(disk_bytes - start))
            }
            _ => ByteRange::new(offset, length),
        }
    }

    /// A step as it is written in an input; `None` when the target has no such steps.
    pub fn encode(
        target: Target,
        (kind, fill): (Kind, u8),
        length_bytes: u64,
        fraction: f64,
    ) -> Option<[u8; STEP_BYTES]> {
        Self::of_kinds(target.kinds(), (kind, fill), length_bytes, fraction)
    }

    /// The same for steps of these kinds.
    pub fn of_kinds(
        kinds: &[Kind],
        (kind, fill): (Kind, u8),
        length_bytes: u64,
        fraction: f64,
    ) -> Option<[u8; STEP_BYTES]> {
        let kind = kinds.iter().position(|known| *known == kind)? as u8;
        let length = (length_bytes / LENGTH_UNIT) as u16;
        let position = (fraction * f64::from(u32::MAX)) as u32;
        let mut bytes = [0; STEP_BYTES];
        bytes[0] = kind;
        bytes[1] = fill;
        bytes[2..4].copy_from_slice(&length.to_le_bytes());
        bytes[4..].copy_from_slice(&position.to_le_bytes());
        Some(bytes)
    }
}
