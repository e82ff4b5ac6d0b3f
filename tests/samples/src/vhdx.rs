//! Disks of Hyper-V ([MS-VHDX]), dynamic, with what nobody here writes: sectors of 4096 bytes, a table of regions that is there
//! once, metadata from the user, blocks in any order, and a log with something to be replayed.

use crate::is_zero;

const MIB: usize = 1 << 20;
/// Where things are in the image.
const LOG: usize = 5 * MIB;
const BAT: usize = 3 * MIB;
const METADATA: usize = 2 * MIB;
const DATA: usize = 6 * MIB;
const SECTOR: usize = 4096;
const GUID: [u8; 16] = [0x33; 16];

/// The choices that the format leaves.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Bytes of a sector: 512 or 4096. The disk is of whole sectors.
    pub sector_bytes: u32,
    /// The table of blocks is in the log and not in its place.
    pub is_logged: bool,
}

/// Makes the checksum right of a structure whose checksum is at offset 4.
pub fn seal(structure: &mut [u8]) {
    structure[4..8].fill(0);
    let sum = crc32c::crc32c(structure);
    structure[4..8].copy_from_slice(&sum.to_le_bytes());
}

fn put(image: &mut [u8], offset: usize, fields: &[&[u8]]) {
    let fields = fields.concat();
    image[offset..offset + fields.len()].copy_from_slice(&fields);
}

/// The image of a disk, in blocks of 1 MiB. Blocks of zeroes are left out, in all the states that there are for it; the others are
/// stored last first.
pub fn image(shape: Shape, disk: &[u8]) -> Vec<u8> {
    let blocks: Vec<&[u8]> = disk.chunks(MIB).collect();
    assert!(
        blocks.len() <= 4096,
        "one entry for a bitmap would be among them"
    );
    let mut image = vec![0; DATA];
    put(&mut image, 0, &[b"vhdxfile"]);
    headers(&mut image, shape);
    regions(&mut image);
    metadata(&mut image, shape, disk.len() as u64);
    let mut table = vec![0; SECTOR.max(blocks.len() * 8).next_multiple_of(SECTOR)];
    for (number, block) in blocks.iter().enumerate().rev() {
        let entry = match is_zero(block) {
            true => [0, 2, 1, 3][number % 4],
            false => image.len() as u64 | 6,
        };
        put(&mut table, number * 8, &[&entry.to_le_bytes()]);
        if entry & 7 == 6 {
            image.extend_from_slice(block);
            image.resize(image.len().next_multiple_of(MIB), 0);
        }
    }
    match shape.is_logged {
        true => log(&mut image, &table),
        false => put(&mut image, BAT, &[&table]),
    }
    image
}

fn headers(image: &mut [u8], shape: Shape) {
    // The second header holds.
    for (place, sequence) in [(64 << 10, 6_u64), (128 << 10, 7)] {
        let log = match shape.is_logged {
            true => GUID,
            false => [0; 16],
        };
        let lengths = [
            (MIB as u32).to_le_bytes().to_vec(),
            (LOG as u64).to_le_bytes().to_vec(),
        ];
        let fields: [&[u8]; 7] = [
            b"head\0\0\0\0",
            &sequence.to_le_bytes(),
            &[1; 16],
            &[2; 16],
            &log,
            &[0, 0, 1, 0],
            &lengths.concat(),
        ];
        put(image, place, &fields);
        seal(&mut image[place..place + 4096]);
    }
}

fn regions(image: &mut [u8]) {
    let bat = *b"\x66\x77\xc2\x2d\x23\xf6\x00\x42\x9d\x64\x11\x5e\x9b\xfd\x4a\x08";
    let metadata = *b"\x06\xa2\x7c\x8b\x90\x47\x9a\x4b\xb8\xfe\x57\x5f\x05\x0f\x88\x6e";
    let place = 192 << 10;
    put(image, place, &[b"regi\0\0\0\0", &[2, 0, 0, 0, 0, 0, 0, 0]]);
    for (number, (guid, offset)) in [(metadata, METADATA), (bat, BAT)].into_iter().enumerate() {
        let fields: [&[u8]; 4] = [
            &guid,
            &(offset as u64).to_le_bytes(),
            &(MIB as u32).to_le_bytes(),
            &[1, 0, 0, 0],
        ];
        put(image, place + 16 + 32 * number, &fields);
    }
    seal(&mut image[place..place + (64 << 10)]);
}

fn metadata(image: &mut [u8], shape: Shape, disk_bytes: u64) {
    let sector = shape.sector_bytes.to_le_bytes();
    let items: [([u8; 16], u8, &[u8]); 6] = [
        (*b"of a user's own\0", 1, b"anything"),
        (
            *b"\x24\x42\xa5\x2f\x1b\xcd\x76\x48\xb2\x11\x5d\xbe\xd8\x3b\xf4\xb8",
            6,
            &disk_bytes.to_le_bytes(),
        ),
        (
            *b"\xab\x12\xca\xbe\xe6\xb2\x23\x45\x93\xef\xc3\x09\xe0\x00\xc7\x46",
            6,
            &[3; 16],
        ),
        (
            *b"\x1d\xbf\x41\x81\x6f\xa9\x09\x47\xba\x47\xf2\x33\xa8\xfa\xab\x5f",
            6,
            &sector,
        ),
        (
            *b"\xc7\x48\xa3\xcd\x5d\x44\x71\x44\x9c\xc9\xe9\x88\x52\x51\xc5\x56",
            6,
            &4096_u32.to_le_bytes(),
        ),
        (
            *b"\x37\x67\xa1\xca\x36\xfa\x43\x4d\xb3\xb6\x33\xf0\xaa\x44\xe7\x6b",
            4,
            &[0, 0, 0x10, 0, 0, 0, 0, 0],
        ),
    ];
    put(image, METADATA, &[b"metadata", &[0, 0, items.len() as u8]]);
    let mut offset = 64 << 10;
    for (number, (guid, flags, value)) in items.into_iter().enumerate() {
        let place: [&[u8]; 4] = [
            &guid,
            &(offset as u32).to_le_bytes(),
            &(value.len() as u32).to_le_bytes(),
            &[flags],
        ];
        put(image, METADATA + 32 + 32 * number, &place);
        put(image, METADATA + offset, &[value]);
        offset += value.len();
    }
}

/// Two entries: one that zeroes the table's first sector, and one that has it. The second is about the end of the log.
fn log(image: &mut [u8], table: &[u8]) {
    let end = image.len() as u64;
    let mut at = MIB - 2 * SECTOR;
    let tail = at as u32;
    for sequence in [41_u64, 42] {
        let pages: Vec<&[u8]> = match sequence {
            41 => Vec::new(),
            _ => table.chunks(SECTOR).collect(),
        };
        let count = pages.len().max(1) as u32;
        assert!(count <= 126, "one sector of descriptors");
        let mut entry = vec![0; SECTOR * (1 + pages.len())];
        let fields: [&[u8]; 9] = [
            b"loge\0\0\0\0",
            &(entry.len() as u32).to_le_bytes(),
            &tail.to_le_bytes(),
            &sequence.to_le_bytes(),
            &count.to_le_bytes(),
            &[0; 4],
            &GUID,
            &end.to_le_bytes(),
            &end.to_le_bytes(),
        ];
        put(&mut entry, 0, &fields);
        if pages.is_empty() {
            let length = (SECTOR as u64).to_le_bytes();
            let fields: [&[u8]; 4] = [
                b"zero\0\0\0\0",
                &length,
                &(BAT as u64).to_le_bytes(),
                &sequence.to_le_bytes(),
            ];
            put(&mut entry, 64, &fields);
        }
        for (number, page) in pages.iter().enumerate() {
            let offset = (BAT + number * SECTOR) as u64;
            let fields: [&[u8]; 5] = [
                b"desc",
                &page[SECTOR - 4..],
                &page[..8],
                &offset.to_le_bytes(),
                &sequence.to_le_bytes(),
            ];
            put(&mut entry, 64 + 32 * number, &fields);
            let fields: [&[u8]; 4] = [
                b"data\0\0\0\0",
                &page[8..SECTOR - 4],
                &(sequence as u32).to_le_bytes(),
                &[],
            ];
            put(&mut entry, SECTOR * (1 + number), &fields);
        }
        seal(&mut entry);
        for sector in entry.chunks(SECTOR) {
            put(image, LOG + at, &[sector]);
            at = (at + SECTOR) % MIB;
        }
    }
}
