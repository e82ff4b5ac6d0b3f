//! The records of a FAT directory: 32 bytes each, long names in records of their own before the short
//! one ("FAT Directory Structure", "FAT Long Directory Entries").

use super::names::{Names, SHORT, checksum};
use chrono::{DateTime, Datelike, Timelike};

/// Bytes of a record.
pub(super) const RECORD: usize = 32;
/// UTF-16 units of a long name that a record holds, and where they are in it.
const UNITS: usize = 13;
const UNIT_PLACES: [(usize, usize); 3] = [(1, 5), (14, 6), (28, 2)];
/// Marks the record with the end of a long name, which stands first.
const LAST: u8 = 0x40;

const ATTRIBUTE_LABEL: u8 = 0x08;
const ATTRIBUTE_DIRECTORY: u8 = 0x10;
const ATTRIBUTE_FILE: u8 = 0x20;
const ATTRIBUTE_LONG: u8 = 0x0f;

/// What a record says of a file or a directory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Facts {
    /// Bytes of a file; `None` for a directory.
    pub(super) size: Option<u32>,
    /// The first cluster, 0 without one.
    pub(super) cluster: u32,
    /// Seconds since 1970.
    pub(super) modified: i64,
}

/// Records that a file takes.
pub(super) fn count(names: &Names) -> usize {
    1 + names
        .long
        .as_ref()
        .map_or(0, |long| long.len().div_ceil(UNITS))
}

/// The record of the volume's label.
pub(super) fn label(label: &[u8; SHORT], modified: i64) -> [u8; RECORD] {
    let facts = Facts {
        size: Some(0),
        cluster: 0,
        modified,
    };
    short(label, ATTRIBUTE_LABEL, facts)
}

/// The records "." and ".." of a directory.
pub(super) fn dots(here: Facts, above: Facts) -> [[u8; RECORD]; 2] {
    [
        short(b".          ", ATTRIBUTE_DIRECTORY, here),
        short(b"..         ", ATTRIBUTE_DIRECTORY, above),
    ]
}

/// Appends the records of a file or a directory.
pub(super) fn append(records: &mut Vec<u8>, names: &Names, facts: Facts) {
    if let Some(long) = &names.long {
        let checksum = checksum(&names.short);
        for number in (1..=long.len().div_ceil(UNITS)).rev() {
            records.extend(long_part(long, number, checksum));
        }
    }
    let attribute = match facts.size {
        Some(_) => ATTRIBUTE_FILE,
        None => ATTRIBUTE_DIRECTORY,
    };
    records.extend(short(&names.short, attribute, facts));
}

/// The `number`th part of a long name, counted from 1.
fn long_part(long: &[u16], number: usize, checksum: u8) -> [u8; RECORD] {
    let is_last = number * UNITS >= long.len();
    let mut record = [0; RECORD];
    record[0] = number as u8 | if is_last { LAST } else { 0 };
    record[11] = ATTRIBUTE_LONG;
    record[13] = checksum;
    // A zero ends the name, and ones fill what is left.
    let rest = long[(number - 1) * UNITS..].iter().copied();
    let mut units = rest.chain([0]).chain(std::iter::repeat(0xffff));
    for (at, count) in UNIT_PLACES {
        for place in record[at..at + 2 * count].chunks_exact_mut(2) {
            let unit = units.next().unwrap_or_default();
            place.copy_from_slice(&unit.to_le_bytes());
        }
    }
    record
}

fn short(name: &[u8; SHORT], attribute: u8, facts: Facts) -> [u8; RECORD] {
    let (date, time) = date_and_time(facts.modified);
    let mut record = [0; RECORD];
    record[..SHORT].copy_from_slice(name);
    record[11] = attribute;
    let mut put = |at: usize, value: u16| record[at..at + 2].copy_from_slice(&value.to_le_bytes());
    put(14, time);
    put(16, date);
    put(18, date);
    put(20, (facts.cluster >> 16) as u16);
    put(22, time);
    put(24, date);
    put(26, facts.cluster as u16);
    record[28..].copy_from_slice(&facts.size.unwrap_or(0).to_le_bytes());
    record
}

/// FAT's date and time, which begin with 1980, in steps of two seconds; UTC.
fn date_and_time(seconds: i64) -> (u16, u16) {
    const FIRST: (u16, u16) = (1 << 5 | 1, 0);
    const LAST: (u16, u16) = (127 << 9 | 12 << 5 | 31, 23 << 11 | 59 << 5 | 29);
    let Some(moment) = DateTime::from_timestamp(seconds, 0) else {
        return FIRST;
    };
    match moment.year() {
        ..1980 => FIRST,
        2108.. => LAST,
        year => {
            let date = ((year - 1980) as u32) << 9 | moment.month() << 5 | moment.day();
            let time = moment.hour() << 11 | moment.minute() << 5 | (moment.second() / 2);
            (date as u16, time as u16)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_fat_and_end_where_it_ends() {
        assert_eq!(date_and_time(0), (33, 0));
        assert_eq!(date_and_time(315_532_800), (33, 0));
        // 2024-02-29 23:59:59
        let leap = date_and_time(1_709_251_199);
        assert_eq!(leap, (44 << 9 | 2 << 5 | 29, 23 << 11 | 59 << 5 | 29));
        assert_eq!(date_and_time(i64::MAX), (33, 0));
        assert_eq!(date_and_time(5_000_000_000).0 >> 9, 127);
    }
}
