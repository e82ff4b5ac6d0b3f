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
//! | others | an error |
//!
//! Among the entries of blocks are those of sector bitmaps, which only differences to other images use: they are kept as
//! they are.

use super::log::PAGE;
use super::metadata::Shape;
use super::regions::Regions;
use super::{FileRegion, MAX_MAPPED, MIB, corrupt};
use crate::bytes::read_bytes;
use block::{Edge, Error};
use std::sync::atomic::{AtomicU32, Ordering};

/// Bytes of an entry in the file.
pub(super) const ENTRY_BYTES: u64 = 8;
/// Entries of a page.
const PER_PAGE: u64 = PAGE as u64 / ENTRY_BYTES;
pub(super) const ZERO: u64 = 2;
pub(super) const FULLY_PRESENT: u64 = 6;
const STATE: u32 = 7;
/// An offset that is too large for any file, in MiB.
const NOWHERE: u32 = (1 << 29) - 1;

/// An entry as it is kept in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry(u32);

/// What an entry says about its block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Zeroes,
    /// The block begins at this offset.
    Present(u64),
    Invalid,
}

impl Entry {
    /// Of a block at an offset of whole MiB.
    pub(super) fn present(offset: u64) -> Self {
        Self(((offset / MIB) as u32) << 3 | FULLY_PRESENT as u32)
    }

    fn unpack(raw: u64) -> Self {
        let state = (raw & u64::from(STATE)) as u32;
        let place = u32::try_from(raw >> 20).unwrap_or(NOWHERE).min(NOWHERE);
        Self(place << 3 | state)
    }

    fn pack(self) -> u64 {
        u64::from(self.0 >> 3) << 20 | u64::from(self.0 & STATE)
    }

    pub(super) fn state(self) -> State {
        match self.0 & STATE {
            0..=3 | 5 => State::Zeroes,
            6 => State::Present(u64::from(self.0 >> 3) * MIB),
            _ => State::Invalid,
        }
    }
}

/// The table.
pub(super) struct Bat {
    entries: Box<[AtomicU32]>,
}

impl Bat {
    /// Of an image that is only described.
    pub(super) fn empty() -> Self {
        Self {
            entries: Box::default(),
        }
    }

    /// Reads the table in `region` for a disk of this shape.
    ///
    /// # Errors
    /// `Io`. The caller has checked how many entries there are.
    pub(super) async fn read(
        file: &Edge,
        region: FileRegion,
        shape: &Shape,
    ) -> Result<Self, Error> {
        let count = shape.entries().min(MAX_MAPPED);
        let mut entries = Vec::with_capacity(count as usize);
        let bytes = count * ENTRY_BYTES;
        for at in (0..bytes).step_by(MIB as usize) {
            let length = MIB.min(bytes - at) as usize;
            let piece = read_bytes(file, region.offset + at, length).await;
            let failed = |errno| Error::io("Could not read the block allocation table", errno);
            let piece = piece.map_err(failed)?;
            let unpack = |raw: &[u8; 8]| AtomicU32::new(Entry::unpack(u64::from_le_bytes(*raw)).0);
            entries.extend(piece.as_chunks().0.iter().map(unpack));
        }
        Ok(Self {
            entries: entries.into(),
        })
    }

    /// The entry with a number.
    pub(super) fn get(&self, index: u64) -> Entry {
        let entry = self.entries.get(index as usize);
        Entry(entry.map_or(0, |entry| entry.load(Ordering::Acquire)))
    }

    pub(super) fn set(&self, index: u64, entry: Entry) {
        if let Some(place) = self.entries.get(index as usize) {
            place.store(entry.0, Ordering::Release);
        }
    }

    /// The page that an entry is in.
    pub(super) fn page_of(index: u64) -> u64 {
        index / PER_PAGE
    }

    /// The bytes of a page, with `changes` that are not made yet.
    pub(super) fn page(&self, page: u64, changes: &[(u64, Entry)]) -> Vec<u8> {
        let first = page * PER_PAGE;
        let entries = first..first + PER_PAGE;
        let mut bytes: Vec<u8> = (entries.clone())
            .flat_map(|index| self.get(index).pack().to_le_bytes())
            .collect();
        for (index, entry) in changes.iter().filter(|(index, _)| entries.contains(index)) {
            let at = ((index - first) * ENTRY_BYTES) as usize;
            bytes[at..at + 8].copy_from_slice(&entry.pack().to_le_bytes());
        }
        bytes
    }

    /// Tells what is wrong with the places of blocks, in the words of QEMU: a block must lie within the file and outside of
    /// all else. The last block may be cut off where the disk ends.
    pub(super) fn check(&self, image: &Layout, wrong: &mut dyn FnMut(String)) {
        let Layout { shape, file, .. } = image;
        for block in 0..shape.blocks() {
            let index = shape.entry_of(block);
            let State::Present(offset) = self.get(index).state() else {
                continue;
            };
            if offset == u64::from(NOWHERE) * MIB {
                wrong(format!("VHDX BAT entry {index} offset overflow."));
                continue;
            }
            let needed = shape
                .block_bytes
                .min(shape.disk_bytes - block * shape.block_bytes);
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
    pub(super) fn check_shared(&self, shape: &Shape, wrong: &mut dyn FnMut(String)) {
        let blocks = 0..shape.blocks();
        let mut places: Vec<u32> = blocks
            .filter_map(|block| {
                let entry = self.get(shape.entry_of(block));
                matches!(entry.state(), State::Present(_)).then_some(entry.0 >> 3)
            })
            .collect();
        places.sort_unstable();
        let place = |mebibytes: u32| FileRegion {
            offset: u64::from(mebibytes) * MIB,
            length: shape.block_bytes,
        };
        for pair in places.windows(2) {
            let [one, other] = [place(pair[0]), place(pair[1])];
            if one.overlaps(&other) {
                wrong(one.overlap(&other));
            }
        }
    }

    /// One past the last byte of all blocks.
    pub(super) fn end(&self, shape: &Shape) -> u64 {
        let ends =
            (0..shape.blocks()).filter_map(|block| match self.get(shape.entry_of(block)).state() {
                State::Present(offset) => Some(offset + shape.block_bytes),
                _ => None,
            });
        ends.max().unwrap_or(0)
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
        for (raw, state) in [
            (0, State::Zeroes),
            (1, State::Zeroes),
            (2, State::Zeroes),
            (3 | 9 << 20, State::Zeroes),
            (4, State::Invalid),
            (6 | 7 << 20, State::Present(7 << 20)),
            (7 | 7 << 20, State::Invalid),
        ] {
            let entry = Entry::unpack(raw);
            assert_eq!((entry.state(), entry.pack()), (state, raw));
        }
        let far = Entry::unpack(!7 | FULLY_PRESENT);
        assert_eq!(far.state(), State::Present(u64::from(NOWHERE) * MIB));
        assert_eq!(Entry::present(5 * MIB), Entry::unpack(6 | 5 << 20));
    }

    #[test]
    fn pages_have_changes_in_them_that_are_not_made_yet() {
        let entries = (0..600).map(|index| AtomicU32::new(index << 3 | 6));
        let bat = Bat {
            entries: entries.collect(),
        };
        assert_eq!((Bat::page_of(511), Bat::page_of(512)), (0, 1));
        let changes = [(511, Entry(0)), (512, Entry::present(MIB)), (599, Entry(2))];
        let page = bat.page(1, &changes);
        let raw = |index: usize| u64::from_le_bytes(*page[index * 8..].first_chunk().unwrap());
        assert_eq!(page.len(), PAGE);
        assert_eq!(
            [raw(0), raw(1), raw(87), raw(88)],
            [6 | 1 << 20, 6 | 513 << 20, 2, 0]
        );
    }
}
