//! Entries of the log ([MS-VHDX] 2.3.1): what they look like.
//!
//! ```text
//!   header (64 bytes) │ descriptors (32 bytes each), to the end of a sector │ data sector │ ...    sectors of 4 KiB
//! ```
//!
//! | offset | field of the header, little-endian |
//! |---|---|
//! | 0, 4 | signature, CRC-32C of the whole entry with this field zero |
//! | 8, 12 | bytes of the entry; where in the log the oldest entry is that has to be replayed with it |
//! | 16, 24 | sequence number, count of descriptors |
//! | 32 | GUID of the log |
//! | 48, 56 | the file was durably as long as that, and becomes as long as that |
//!
//! | offset | data descriptor | zero descriptor |
//! |---|---|---|
//! | 0 | signature | signature |
//! | 4 | last four bytes of the 4 KiB | |
//! | 8 | first eight bytes of them | how many bytes are zeroed |
//! | 16, 24 | offset in the file, sequence number | the same |
//!
//! A data sector has its signature and half of the sequence number in place of the first eight bytes, and the other half
//! in place of the last four.

use super::super::header::{Guid, checksum, field, seal};
use super::Pages;

/// Bytes of a sector of the log, and of what a data descriptor is about.
pub(in super::super) const PAGE: usize = 4096;
const SIGNATURE: &[u8; 4] = b"loge";
const DATA_SECTOR: &[u8; 4] = b"data";
const DATA: &[u8; 4] = b"desc";
const ZERO: &[u8; 4] = b"zero";
pub(super) const HEADER_BYTES: usize = 64;
pub(super) const DESCRIPTOR_BYTES: usize = 32;

/// The header of an entry. Its checksum is yet to be compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) struct EntryHeader {
    pub(super) length: u64,
    pub(super) tail: u64,
    pub(super) sequence: u64,
    pub(super) descriptors: u32,
    pub(super) flushed: u64,
    pub(super) last: u64,
}

/// Bytes of the sectors that hold a header and so many descriptors.
pub(super) fn descriptor_area(descriptors: u32) -> u64 {
    let bytes = HEADER_BYTES as u64 + u64::from(descriptors) * DESCRIPTOR_BYTES as u64;
    bytes.next_multiple_of(PAGE as u64)
}

/// Bytes of an entry that holds so many pages.
pub(super) fn entry_bytes(pages: usize) -> u64 {
    descriptor_area(pages as u32) + (pages * PAGE) as u64
}

impl EntryHeader {
    /// The header of an entry of the log `guid` of `log` bytes, when the sector begins with one.
    pub(in super::super) fn parse(sector: &[u8], guid: &Guid, log: u64) -> Option<Self> {
        let header = Self {
            length: u32::from_le_bytes(field(sector, 8)).into(),
            tail: u32::from_le_bytes(field(sector, 12)).into(),
            sequence: u64::from_le_bytes(field(sector, 16)),
            descriptors: u32::from_le_bytes(field(sector, 24)),
            flushed: u64::from_le_bytes(field(sector, 48)),
            last: u64::from_le_bytes(field(sector, 56)),
        };
        let is_ours = sector.starts_with(SIGNATURE) && field(sector, 32) == *guid;
        let page = PAGE as u64;
        let fits = header.length.is_multiple_of(page)
            && (descriptor_area(header.descriptors)..=log).contains(&header.length);
        let has_tail = header.tail.is_multiple_of(page) && header.tail < log;
        (is_ours && fits && has_tail && header.sequence != 0).then_some(header)
    }
}

/// What an entry changes in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Descriptor {
    Data {
        offset: u64,
        first: [u8; 8],
        last: [u8; 4],
    },
    Zero {
        offset: u64,
        length: u64,
    },
}

impl Descriptor {
    /// A descriptor of the entry with the number `sequence`.
    pub(super) fn parse(bytes: &[u8], sequence: u64) -> Option<Self> {
        let offset = u64::from_le_bytes(field(bytes, 16));
        let length = u64::from_le_bytes(field(bytes, 8));
        let page = PAGE as u64;
        if u64::from_le_bytes(field(bytes, 24)) != sequence || !offset.is_multiple_of(page) {
            return None;
        }
        match &field(bytes, 0) {
            DATA => Some(Self::Data {
                offset,
                first: field(bytes, 8),
                last: field(bytes, 4),
            }),
            ZERO if length.is_multiple_of(page) => Some(Self::Zero { offset, length }),
            _ => None,
        }
    }
}

/// The bytes that belong in the file, from a data sector of the entry `sequence`.
pub(super) fn restore(
    sector: &[u8],
    (first, last): ([u8; 8], [u8; 4]),
    sequence: u64,
) -> Option<Vec<u8>> {
    let high = u64::from(u32::from_le_bytes(field(sector, 4)));
    let low = u64::from(u32::from_le_bytes(field(sector, PAGE - 4)));
    if !sector.starts_with(DATA_SECTOR) || high << 32 | low != sequence {
        return None;
    }
    let mut page = sector[..PAGE].to_vec();
    page[..8].copy_from_slice(&first);
    page[PAGE - 4..].copy_from_slice(&last);
    Some(page)
}

/// An entry that is to be written.
pub(in super::super) struct NewEntry {
    pub(in super::super) guid: Guid,
    pub(in super::super) sequence: u64,
    /// Where in the log it goes: nothing before it has to be replayed.
    pub(in super::super) at: u64,
    pub(in super::super) flushed: u64,
    pub(in super::super) last: u64,
}

impl NewEntry {
    /// The entry's bytes.
    pub(in super::super) fn encode(&self, pages: &Pages) -> Vec<u8> {
        let area = descriptor_area(pages.len() as u32) as usize;
        let mut bytes = vec![0; area];
        bytes.reserve_exact(pages.len() * PAGE);
        let mut put = |offset: usize, field: &[u8]| {
            bytes[offset..offset + field.len()].copy_from_slice(field);
        };
        put(0, SIGNATURE);
        put(8, &(entry_bytes(pages.len()) as u32).to_le_bytes());
        put(12, &(self.at as u32).to_le_bytes());
        put(16, &self.sequence.to_le_bytes());
        put(24, &(pages.len() as u32).to_le_bytes());
        put(32, &self.guid);
        put(48, &self.flushed.to_le_bytes());
        put(56, &self.last.to_le_bytes());
        for (number, (offset, page)) in pages.iter().enumerate() {
            let at = HEADER_BYTES + number * DESCRIPTOR_BYTES;
            put(at, DATA);
            put(at + 4, &page[PAGE - 4..]);
            put(at + 8, &page[..8]);
            put(at + 16, &offset.to_le_bytes());
            put(at + 24, &self.sequence.to_le_bytes());
        }
        let high = (self.sequence >> 32) as u32;
        for page in pages.values() {
            bytes.extend(DATA_SECTOR);
            bytes.extend(high.to_le_bytes());
            bytes.extend(&page[8..PAGE - 4]);
            bytes.extend((self.sequence as u32).to_le_bytes());
        }
        seal(&mut bytes);
        bytes
    }
}

/// The checksum of an entry, piece by piece.
pub(super) struct RunningSum {
    sum: Option<u32>,
}

impl RunningSum {
    pub(super) const fn new() -> Self {
        Self { sum: None }
    }
    /// Adds the next bytes; the first piece has the header.
    pub(super) fn add(&mut self, bytes: &[u8]) {
        self.sum = Some(match self.sum {
            None => checksum(bytes),
            Some(sum) => crc32c::crc32c_append(sum, bytes),
        });
    }
    /// Whether it is what the entry that begins with `header` says.
    pub(super) fn is_that_of(&self, header: &[u8]) -> bool {
        self.sum == Some(u32::from_le_bytes(field(header, 4)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry() -> (NewEntry, Pages) {
        let entry = NewEntry {
            guid: [7; 16],
            sequence: 0x1_0000_0002,
            at: 8192,
            flushed: 3 << 20,
            last: 4 << 20,
        };
        let pages = [2_u64 << 20, (2 << 20) + 4096];
        let page = |offset: u64| (offset, (0..PAGE).map(|byte| (byte * 7) as u8).collect());
        (entry, pages.map(page).into())
    }

    #[test]
    fn what_is_encoded_is_parsed() {
        let (entry, pages) = entry();
        let bytes = entry.encode(&pages);
        assert_eq!(bytes.len() as u64, entry_bytes(2));
        let header = EntryHeader::parse(&bytes, &entry.guid, 1 << 20).unwrap();
        let expected = EntryHeader {
            length: bytes.len() as u64,
            tail: 8192,
            sequence: entry.sequence,
            descriptors: 2,
            flushed: 3 << 20,
            last: 4 << 20,
        };
        assert_eq!(header, expected);
        let mut sum = RunningSum::new();
        bytes.chunks(PAGE).for_each(|piece| sum.add(piece));
        assert!(sum.is_that_of(&bytes));
        for (number, (offset, page)) in pages.iter().enumerate() {
            let at = HEADER_BYTES + number * DESCRIPTOR_BYTES;
            let descriptor = Descriptor::parse(&bytes[at..], entry.sequence).unwrap();
            let Descriptor::Data {
                offset: place,
                first,
                last,
            } = descriptor
            else {
                panic!("{descriptor:?}");
            };
            assert_eq!(place, *offset);
            let sector = &bytes[PAGE * (1 + number)..];
            let restored = restore(sector, (first, last), entry.sequence);
            assert_eq!(restored.as_ref(), Some(page));
            assert_eq!(restore(sector, (first, last), 2), None);
        }
    }

    #[test]
    fn headers_that_lie_are_no_entries() {
        let (entry, pages) = entry();
        let bytes = entry.encode(&pages);
        for (at, value) in [
            (0, 0),     // no signature
            (8, 1),     // not of whole sectors
            (9, 0),     // nothing
            (11, 0xff), // longer than the log
            (12, 1),    // a tail within a sector
            (15, 1),    // a tail behind the log
            (27, 0xff), // more descriptors than there is room for
            (32, 8),    // of another log
        ] {
            let mut changed = bytes.clone();
            changed[at] = value;
            assert_eq!(
                EntryHeader::parse(&changed, &entry.guid, 1 << 20),
                None,
                "{at}"
            );
        }
        let mut unnumbered = bytes;
        unnumbered[16..24].fill(0);
        assert_eq!(EntryHeader::parse(&unnumbered, &entry.guid, 1 << 20), None);
    }

    #[test]
    fn the_second_sector_of_descriptors_begins_without_a_header() {
        for (descriptors, sectors) in [(0, 1), (126, 1), (127, 2), (254, 2), (255, 3)] {
            assert_eq!(descriptor_area(descriptors), sectors * PAGE as u64);
        }
        assert_eq!(descriptor_area(u32::MAX), (1 << 37) + 4096);
    }
}
