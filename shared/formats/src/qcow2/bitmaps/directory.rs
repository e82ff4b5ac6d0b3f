//! Entries of the bitmap directory, and the specification's caps.

use super::corrupt;
use crate::qcow2::tables::{Geometry, HostOffset, MAX_HOST_OFFSET};
use block::Error;
use block::bitmap::MAX_NAME;

/// Most bitmaps of an image.
pub(super) const MAX_BITMAPS: u32 = 65535;
/// Longest directory in bytes.
pub(super) const MAX_DIRECTORY_BYTES: u64 = 64 << 20;
/// Most bytes of a bitmap's data.
pub(super) const MAX_PHYSICAL_BYTES: u64 = 512 << 20;
/// log2 of the granularity in bytes.
const GRANULARITY_BITS: std::ops::RangeInclusive<u8> = 9..=31;
/// A dirty tracking bitmap.
const TYPE_DIRTY: u8 = 1;

/// Flags of an entry.
pub(super) mod flag {
    /// Not stored since it was last changed.
    pub(in super::super) const IN_USE: u32 = 1 << 0;
    /// Records as soon as the image is opened for writing.
    pub(in super::super) const AUTO: u32 = 1 << 1;
    /// Usable without knowing the extra data.
    pub(in super::super) const EXTRA_DATA_COMPATIBLE: u32 = 1 << 2;
    /// Every flag that is defined.
    pub(in super::super) const ALL: u32 = IN_USE | AUTO | EXTRA_DATA_COMPATIBLE;
}

/// Length of the fixed part of an entry.
const FIXED: usize = 24;

/// One entry. On disk, all big-endian: 0 table offset u64, 8 table entries u32, 12 flags u32,
/// 16 type u8, 17 granularity bits u8, 18 name length u16, 20 extra data length u32, then extra
/// data, name, and zeroes up to a multiple of eight bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) table_offset: HostOffset,
    pub(super) table_entries: u32,
    pub(super) flags: u32,
    pub(super) granularity_bits: u8,
    pub(super) extra: Vec<u8>,
    pub(super) name: Vec<u8>,
}

/// Where the flags are in an entry.
pub(super) const FLAGS_AT: u64 = 12;

/// Bytes of an entry without extra data.
pub(super) fn length(name: &str) -> u64 {
    ((FIXED + name.len()) as u64).next_multiple_of(8)
}

impl Entry {
    pub(super) fn text(&self) -> String {
        String::from_utf8_lossy(&self.name).into_owned()
    }

    /// Whether everything that the bitmap needs is known.
    pub(super) fn is_usable(&self) -> bool {
        self.extra.is_empty() || self.flags & flag::EXTRA_DATA_COMPATIBLE != 0
    }

    /// Bytes of memory that it takes for a disk of `disk_size` bytes, about.
    pub(super) fn memory(&self, disk_size: u64) -> u64 {
        (disk_size >> self.granularity_bits) / 8 + 8192
    }

    /// Bytes on disk.
    pub(super) fn encoded_length(&self) -> u64 {
        ((FIXED + self.extra.len() + self.name.len()) as u64).next_multiple_of(8)
    }

    pub(super) fn encode(&self, bytes: &mut Vec<u8>) {
        bytes.extend_from_slice(&self.table_offset.0.to_be_bytes());
        bytes.extend_from_slice(&self.table_entries.to_be_bytes());
        bytes.extend_from_slice(&self.flags.to_be_bytes());
        bytes.extend_from_slice(&[TYPE_DIRTY, self.granularity_bits]);
        bytes.extend_from_slice(&(self.name.len() as u16).to_be_bytes());
        bytes.extend_from_slice(&(self.extra.len() as u32).to_be_bytes());
        bytes.extend_from_slice(&self.extra);
        bytes.extend_from_slice(&self.name);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }

    /// Parses the entry at the start of `bytes`; the rest follows.
    fn parse<'b>(bytes: &'b [u8], geometry: &Geometry) -> Result<(Self, &'b [u8]), Error> {
        let short = || corrupt("qcow2: the bitmap directory is too short");
        let fixed = bytes.get(..FIXED).ok_or_else(short)?;
        let number = |at: usize, length: usize| {
            let field = fixed[at..at + length].iter();
            field.fold(0_u64, |value, byte| value << 8 | u64::from(*byte))
        };
        let (name_length, extra_length) = (number(18, 2) as usize, number(20, 4) as usize);
        let extra_end = FIXED.checked_add(extra_length).ok_or_else(short)?;
        let end = extra_end + name_length;
        let extra = bytes.get(FIXED..extra_end).ok_or_else(short)?;
        let name = bytes.get(extra_end..end).ok_or_else(short)?;
        let entry = Self {
            table_offset: HostOffset(number(0, 8)),
            table_entries: number(8, 4) as u32,
            flags: number(12, 4) as u32,
            granularity_bits: fixed[17],
            extra: extra.to_vec(),
            name: name.to_vec(),
        };
        entry.check(fixed[16], geometry)?;
        let rest = bytes.get(end.next_multiple_of(8)..).unwrap_or_default();
        Ok((entry, rest))
    }

    fn check(&self, kind: u8, geometry: &Geometry) -> Result<(), Error> {
        let refuse = |what: &str| Err(corrupt(format!("qcow2: bitmap '{}': {what}", self.text())));
        if self.name.is_empty() || self.name.len() > MAX_NAME {
            return refuse("invalid length of the name");
        }
        if kind != TYPE_DIRTY {
            return refuse("unknown type");
        }
        if self.flags & !flag::ALL != 0 {
            return refuse("unknown flags");
        }
        if !GRANULARITY_BITS.contains(&self.granularity_bits) {
            return refuse("invalid granularity");
        }
        let table_bytes = u64::from(self.table_entries) * 8;
        let end = self.table_offset.0.checked_add(table_bytes);
        if !geometry.is_aligned(self.table_offset.0)
            || end.is_none_or(|end| end > MAX_HOST_OFFSET)
            || (self.table_entries != 0 && self.table_offset.0 == 0)
        {
            return refuse("invalid place of the table");
        }
        if u64::from(self.table_entries) << geometry.cluster_bits
            > MAX_PHYSICAL_BYTES + geometry.cluster_size()
        {
            return refuse("too long a table");
        }
        Ok(())
    }
}

/// Parses a directory of `count` entries.
pub(super) fn parse(
    mut bytes: &[u8],
    count: u32,
    geometry: &Geometry,
) -> Result<Vec<Entry>, Error> {
    let mut entries: Vec<Entry> = Vec::new();
    let mut names = std::collections::HashSet::new();
    for _ in 0..count {
        let (entry, rest) = Entry::parse(bytes, geometry)?;
        if !names.insert(entry.name.clone()) {
            let message = format!("qcow2: two bitmaps are called '{}'", entry.text());
            return Err(corrupt(message));
        }
        entries.push(entry);
        bytes = rest;
    }
    match bytes.is_empty() {
        true => Ok(entries),
        false => Err(corrupt(
            "qcow2: the bitmap directory is longer than its bitmaps",
        )),
    }
}

/// The bytes of a directory.
pub(super) fn encode(entries: &[Entry]) -> Vec<u8> {
    let mut bytes = Vec::new();
    entries.iter().for_each(|entry| entry.encode(&mut bytes));
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::tables::tests::GEOMETRY;

    fn entry(name: &str) -> Entry {
        Entry {
            table_offset: HostOffset(1 << 20),
            table_entries: 3,
            flags: flag::AUTO,
            granularity_bits: 16,
            extra: Vec::new(),
            name: name.into(),
        }
    }

    #[test]
    fn a_directory_reads_as_it_was_written() {
        let entries = vec![entry("a"), entry("another")];
        let bytes = encode(&entries);
        assert_eq!(bytes.len() as u64, length("a") + length("another"));
        assert_eq!(parse(&bytes, 2, &GEOMETRY).unwrap(), entries);
        let first = entries[0].encoded_length() as usize;
        assert!(parse(&bytes, 1, &GEOMETRY).is_err(), "something is left");
        assert!(
            parse(&bytes[..first], 2, &GEOMETRY).is_err(),
            "something is missing"
        );
    }

    #[test]
    fn entries_that_break_the_specification_are_refused() {
        let broken: [fn(&mut Entry); 7] = [
            |entry| entry.flags = 8,
            |entry| entry.granularity_bits = 8,
            |entry| entry.granularity_bits = 32,
            |entry| entry.name.clear(),
            |entry| entry.name = vec![b'x'; MAX_NAME + 1],
            |entry| entry.table_offset = HostOffset(512),
            |entry| entry.table_entries = u32::MAX,
        ];
        for (number, breaks) in broken.iter().enumerate() {
            let mut entry = entry("a");
            breaks(&mut entry);
            let parsed = parse(&encode(&[entry]), 1, &GEOMETRY);
            assert!(parsed.is_err(), "{number}");
        }
        let twice = encode(&[entry("a"), entry("a")]);
        assert!(parse(&twice, 2, &GEOMETRY).is_err());
    }
}
