//! The block allocation table ([MS-VHDX] 2.5), in memory.
//!
//! ```text
//!   entry, 64 bits:  state (3 bits) │ 17 bits │ offset in the file, in MiB (44 bits)
//!   in memory:       state (3 bits) │ offset in MiB (29 bits)
//! ```
//!
//! | state | reads as |
//! |---|---|
//! | 0 not present, 1 undefined, 2 zero, 3 unmapped, 5 unmapped in early versions | zeroes |
//! | 6 fully present | the block at the offset |
//!
//! Other states are for differences to other images: an image with one of them is refused. Among the entries of blocks are
//! those of sector bitmaps, which only differences use, too: they are not looked at, and stay as they are.

use super::metadata::Shape;
use super::regions::Regions;
use super::{FileRegion, MAX_MAPPED, MIB, corrupt};
use crate::blocks::BlockMap;
use crate::bytes::read_bytes;
use block::format::Mapping;
use block::{Edge, Error};

/// Bytes of an entry in the file.
pub(super) const ENTRY_BYTES: u64 = 8;
pub(super) const ZERO: u64 = 2;
pub(super) const FULLY_PRESENT: u64 = 6;
const STATE: u32 = 7;
/// An offset that is too large for any file, in MiB.
const NOWHERE: u32 = (1 << 29) - 1;

/// An entry as it is kept in memory.
pub(super) type Entry = u32;

/// What is kept of a raw entry.
fn unpack(raw: u64) -> Entry {
    let state = (raw & u64::from(STATE)) as u32;
    let place = u32::try_from(raw >> 20).unwrap_or(NOWHERE).min(NOWHERE);
    (place << 3) | state
}

/// The raw entry of a block at an offset of whole MiB.
pub(super) fn raw_present(offset: u64) -> u64 {
    offset | FULLY_PRESENT
}

/// The entry of a block at an offset of whole MiB.
pub(super) fn present(offset: u64) -> Entry {
    unpack(raw_present(offset))
}

/// Where a block with this entry is. Entries of no use were refused when the image was opened.
pub(super) fn mapping(entry: Entry) -> Mapping {
    match u64::from(entry & STATE) {
        FULLY_PRESENT => Mapping::Data(u64::from(entry >> 3) * MIB),
        _ => Mapping::Zero(None),
    }
}

/// Reads the table in `region`: the entries of the blocks of a disk.
///
/// # Errors
/// `Io`. The caller has checked how many entries there are.
pub(super) async fn read(
    file: &Edge,
    region: FileRegion,
    shape: &Shape,
) -> Result<BlockMap<Entry>, Error> {
    let bytes = shape.entries().min(MAX_MAPPED) * ENTRY_BYTES;
    let mut entries = Vec::with_capacity(shape.blocks().min(MAX_MAPPED) as usize);
    let mut index = 0;
    let per_bitmap = shape.blocks_per_bitmap() + 1;
    for at in (0..bytes).step_by(MIB as usize) {
        let length = MIB.min(bytes - at) as usize;
        let piece = read_bytes(file, region.offset + at, length).await;
        let failed = |errno| Error::io("Could not read the block allocation table", errno);
        for raw in piece.map_err(failed)?.as_chunks().0 {
            index += 1;
            if index % per_bitmap != 0 {
                entries.push(unpack(u64::from_le_bytes(*raw)));
            }
        }
    }
    Ok(entries.into_iter().collect())
}

/// Tells what is wrong with entries and the places of blocks, in the words of QEMU where it has any: a block must lie within
/// the file and outside of all else. The last block may be cut off where the disk ends.
pub(super) fn check(map: &BlockMap<Entry>, image: &Layout, wrong: &mut dyn FnMut(String)) {
    let Layout { shape, file, .. } = image;
    for (block, entry) in (0..).zip(map.iter()) {
        let index = shape.entry_of(block);
        if matches!(entry & STATE, 4 | 7) {
            let state = entry & STATE;
            wrong(format!(
                "VHDX BAT entry {index} has the invalid state {state}."
            ));
        }
        let Mapping::Data(offset) = mapping(entry) else {
            continue;
        };
        if offset == u64::from(NOWHERE) * MIB {
            wrong(format!("VHDX BAT entry {index} offset overflow."));
            continue;
        }
        let rest = shape.disk_bytes - block * shape.block_bytes;
        let needed = shape.block_bytes.min(rest);
        let beyond = |which: &str, at: u64| {
            format!(
                "VHDX BAT entry {index} {which} offset {at} points after end of file ({file}). \
                 Image has probably been truncated."
            )
        };
        if offset >= *file {
            wrong(beyond("start", offset));
        } else if offset + needed > *file {
            wrong(beyond("end", offset + shape.block_bytes - 1));
        }
        let place = FileRegion {
            offset,
            length: shape.block_bytes,
        };
        let used = image.used().into_iter().find(|used| used.overlaps(&place));
        if let Some(used) = used {
            wrong(place.overlap(&used));
        }
    }
}

/// Tells of blocks with bytes in common.
pub(super) fn check_shared(map: &BlockMap<Entry>, shape: &Shape, wrong: &mut dyn FnMut(String)) {
    let offset = |entry| match mapping(entry) {
        Mapping::Data(offset) => Some(offset),
        _ => None,
    };
    let mut places: Vec<u64> = map.iter().filter_map(offset).collect();
    places.sort_unstable();
    let place = |offset: u64| FileRegion {
        offset,
        length: shape.block_bytes,
    };
    for pair in places.windows(2) {
        let [one, other] = [place(pair[0]), place(pair[1])];
        if one.overlaps(&other) {
            wrong(one.overlap(&other));
        }
    }
}

/// Where things are in the file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    pub(super) shape: Shape,
    pub(super) log: FileRegion,
    pub(super) regions: Regions,
    /// Bytes of the file.
    pub(super) file: u64,
}

impl Layout {
    /// What is no block: the headers, the log, the regions.
    pub(super) fn used(&self) -> [FileRegion; 4] {
        let headers = FileRegion {
            offset: 0,
            length: super::header::FIRST_REGION,
        };
        [headers, self.log, self.regions.bat, self.regions.metadata]
    }

    /// Checks that the table of blocks has room for all of them.
    pub(super) fn check(&self) -> Result<(), Error> {
        let (needed, room) = (self.shape.entries() * ENTRY_BYTES, self.regions.bat.length);
        match needed <= room {
            true => Ok(()),
            false => Err(corrupt(format!(
                "the block allocation table needs 0x{needed:x} bytes and has 0x{room:x}"
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_keep_their_state_and_place() {
        for (raw, expected) in [
            (0, Mapping::Zero(None)),
            (1, Mapping::Zero(None)),
            (2, Mapping::Zero(None)),
            (3 | 9 << 20, Mapping::Zero(None)),
            (5, Mapping::Zero(None)),
            (6 | 7 << 20, Mapping::Data(7 << 20)),
        ] {
            assert_eq!(mapping(unpack(raw)), expected);
        }
        let far = unpack(!7 | FULLY_PRESENT);
        assert_eq!(mapping(far), Mapping::Data(u64::from(NOWHERE) * MIB));
        assert_eq!(present(5 * MIB), unpack(6 | 5 << 20));
    }
}
