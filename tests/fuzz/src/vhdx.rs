//! How an input of the target `vhdx` becomes a file: regions of the format are far apart, and most of it is zeroes.
//!
//! ```text
//!   byte 0: bit 0: checksums are made right
//!   then records of 4098 bytes: number of a page (16 bits), the page of 4 KiB
//! ```

use crate::memory_file::MemoryFile;
use samples::vhdx::{Shape, image, seal};
use std::collections::{BTreeMap, BTreeSet};

const PAGE: usize = 4096;
/// The part of the file that pages go to.
const FILE: usize = PAGE << 11;
/// Where headers are, and how long they are.
const SEALED: [(usize, usize); 4] = [
    (64 << 10, PAGE),
    (128 << 10, PAGE),
    (192 << 10, 64 << 10),
    (256 << 10, 64 << 10),
];

/// The file that an input stands for.
pub(crate) fn file(input: &[u8]) -> MemoryFile {
    let (flags, records) = match input.split_first() {
        Some((flags, records)) => (*flags, records),
        None => (0, input),
    };
    let mut pages = BTreeMap::new();
    for record in records.chunks(2 + PAGE) {
        if let Some((number, page)) = record.split_first_chunk() {
            let number = usize::from(u16::from_le_bytes(*number)) % (FILE / PAGE);
            pages.insert(number, page);
        }
    }
    let end = pages.keys().next_back().map_or(0, |last| (last + 1) * PAGE);
    let mut bytes = vec![0; end];
    for (number, page) in &pages {
        bytes[number * PAGE..][..page.len()].copy_from_slice(page);
    }
    if flags & 1 != 0 {
        for (offset, length) in SEALED {
            if let Some(structure) = bytes.get_mut(offset..offset + length) {
                seal(structure);
            }
        }
        for number in pages.keys() {
            seal_entry(&mut bytes[number * PAGE..]);
        }
    }
    // Most pages are in no record, and never looked at.
    let sealed = SEALED.map(|(offset, length)| offset / PAGE..(offset + length) / PAGE);
    let written: BTreeSet<usize> = sealed
        .into_iter()
        .flatten()
        .chain(pages.into_keys())
        .collect();
    MemoryFile::of_pages(written.into_iter().map_while(|number| {
        let page = bytes.get(number * PAGE..(number + 1) * PAGE)?;
        Some((number as u64, page))
    }))
}

/// Makes the checksum right of what looks like an entry of a log, if one begins here. They are short.
fn seal_entry(bytes: &mut [u8]) {
    let length = bytes.get(8..12).and_then(|length| length.first_chunk());
    let length = length.map_or(0, |length| u32::from_le_bytes(*length) as usize);
    let entry = bytes.get_mut(..length.clamp(PAGE, 16 * PAGE));
    if let Some(entry) = entry.filter(|entry| entry.starts_with(b"loge")) {
        seal(entry);
    }
}

/// Images, as inputs.
pub(crate) fn seeds(disk: &[u8]) -> Vec<(String, Vec<u8>)> {
    let mut seeds = Vec::new();
    for sector_bytes in [512, 4096] {
        for is_logged in [false, true] {
            let shape = Shape {
                sector_bytes,
                is_logged,
            };
            let image = image(shape, disk);
            let mut input = vec![1];
            for (number, page) in image.chunks(PAGE).enumerate() {
                let is_last = (number + 1) * PAGE >= image.len();
                if is_last || page.iter().any(|byte| *byte != 0) {
                    input.extend((number as u16).to_le_bytes());
                    input.extend(page);
                }
            }
            seeds.push((format!("{sector_bytes}-{}", u8::from(is_logged)), input));
        }
    }
    seeds
}
