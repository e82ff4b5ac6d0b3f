//! Disks of VMware that qemu-img reads and does not write (Virtual Disk Format 5.0): a stream whose tables
//! stand behind its grains, and extents of ESX servers.

use flate2::Compression;
use flate2::write::ZlibEncoder;
use std::io::Write;

const SECTOR: usize = 512;
/// Sectors of a grain of a stream.
const GRAIN: usize = 128;
/// Kinds of markers.
const TABLE: u32 = 1;
const DIRECTORY: u32 = 2;
const FOOTER: u32 = 3;
const END: u32 = 0;

fn put(bytes: &mut [u8], offset: usize, field: &[u8]) {
    bytes[offset..offset + field.len()].copy_from_slice(field);
}

fn sector_of(image: &[u8]) -> u32 {
    u32::try_from(image.len() / SECTOR).expect("samples are small")
}

fn pad(image: &mut Vec<u8>, sectors: usize) {
    image.resize(image.len().next_multiple_of(sectors * SECTOR), 0);
}

/// A marker of metadata of so many sectors.
fn marker(sectors: u64, kind: u32) -> [u8; SECTOR] {
    let mut bytes = [0; SECTOR];
    put(&mut bytes, 0, &sectors.to_le_bytes());
    put(&mut bytes, 12, &kind.to_le_bytes());
    bytes
}

fn hosted(disk: &[u8], directory: u64) -> [u8; SECTOR] {
    let mut header = [0; SECTOR];
    put(&mut header, 0, b"KDMV");
    let capacity = disk.len().div_ceil(SECTOR) as u64;
    for (offset, field) in [(4, 3_u32), (8, 0x3_0001), (44, 512)] {
        put(&mut header, offset, &field.to_le_bytes());
    }
    for (offset, field) in [
        (12, capacity),
        (20, GRAIN as u64),
        (28, 1),
        (36, 20),
        (56, directory),
        (64, 128),
    ] {
        put(&mut header, offset, &field.to_le_bytes());
    }
    put(&mut header, 73, b"\n \r\n\x01\x00");
    header
}

/// The text that says what an image with one extent of `sectors` is.
pub fn descriptor(create_type: &str, extents: &str) -> String {
    format!(
        "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\ncreateType=\"{create_type}\"\n\n\
         # Extent description\n{extents}\n# The Disk Data Base\n#DDB\nddb.adapterType = \"ide\"\n"
    )
}

/// A stream-optimized image: compressed grains, then tables, the directory and a footer with the header.
pub fn stream(disk: &[u8]) -> Vec<u8> {
    let mut image = hosted(disk, u64::MAX).to_vec();
    let sectors = disk.len().div_ceil(SECTOR);
    let line = format!("RW {sectors} SPARSE \"stream.vmdk\"\n");
    image.extend_from_slice(descriptor("streamOptimized", &line).as_bytes());
    pad(&mut image, 128);
    let mut entries = Vec::new();
    for (number, grain) in disk.chunks(GRAIN * SECTOR).enumerate() {
        let mut whole = grain.to_vec();
        whole.resize(GRAIN * SECTOR, 0);
        if whole.iter().all(|byte| *byte == 0) {
            entries.push(0);
            continue;
        }
        let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(&whole).expect("memory takes everything");
        let packed = encoder.finish().expect("memory takes everything");
        entries.push(sector_of(&image));
        image.extend_from_slice(&((number * GRAIN) as u64).to_le_bytes());
        image.extend_from_slice(
            &u32::try_from(packed.len())
                .expect("a grain is small")
                .to_le_bytes(),
        );
        image.extend_from_slice(&packed);
        pad(&mut image, 1);
    }
    let mut tables = Vec::new();
    for table in entries.chunks(512) {
        image.extend_from_slice(&marker(4, TABLE));
        tables.push(sector_of(&image));
        image.extend(table.iter().flat_map(|entry| entry.to_le_bytes()));
        image.resize(image.len() + (512 - table.len()) * 4, 0);
    }
    image.extend_from_slice(&marker(1, DIRECTORY));
    let directory = sector_of(&image);
    image.extend(tables.iter().flat_map(|table| table.to_le_bytes()));
    pad(&mut image, 1);
    image.extend_from_slice(&marker(1, FOOTER));
    image.extend_from_slice(&hosted(disk, directory.into()));
    image.extend_from_slice(&marker(0, END));
    image
}

/// An extent of an ESX server, with grains of so many sectors and no tables where there is nothing.
pub fn cowd(disk: &[u8], grain_sectors: usize) -> Vec<u8> {
    let grain = grain_sectors * SECTOR;
    let tables = disk.len().div_ceil(grain).div_ceil(4096);
    let mut image = vec![0; 4 * SECTOR];
    put(&mut image, 0, b"COWD");
    let capacity = disk.len().div_ceil(SECTOR) as u32;
    for (offset, field) in [
        (4, 1),
        (8, 3),
        (12, capacity),
        (16, grain_sectors as u32),
        (20, 4),
        (24, tables as u32),
    ] {
        put(&mut image, offset, &field.to_le_bytes());
    }
    image.resize(4 * SECTOR + tables * 4, 0);
    pad(&mut image, 1);
    for (number, part) in disk.chunks(4096 * grain).enumerate() {
        if part.iter().all(|byte| *byte == 0) {
            continue;
        }
        let table = sector_of(&image);
        put(&mut image, 4 * SECTOR + number * 4, &table.to_le_bytes());
        image.resize(image.len() + 4096 * 4, 0);
        for (index, bytes) in part.chunks(grain).enumerate() {
            if bytes.iter().any(|byte| *byte != 0) {
                let at = sector_of(&image);
                put(
                    &mut image,
                    table as usize * SECTOR + index * 4,
                    &at.to_le_bytes(),
                );
                image.extend_from_slice(bytes);
                pad(&mut image, 1);
                image.resize(
                    image.len() + grain - bytes.len().next_multiple_of(SECTOR),
                    0,
                );
            }
        }
    }
    image
}

/// A seSparse extent; every second grain of zeroes is said to be so, and the others are not there.
pub fn se_sparse(disk: &[u8]) -> Vec<u8> {
    let grain = 8 * SECTOR;
    let grains = disk.len().div_ceil(grain);
    let tables = grains.div_ceil(4096);
    let directory_sectors = (tables * 8).div_ceil(SECTOR);
    let (directory, first_table) = (2, 2 + directory_sectors);
    let first_grain = first_table + tables * 64;
    let mut image = vec![0; first_grain * SECTOR];
    let places = [
        (10, 1),
        (11, 1),
        (16, directory),
        (17, directory_sectors),
        (18, first_table),
        (19, tables * 64),
        (24, first_grain),
    ];
    let numbers = [
        (0, 0xcafe_babe),
        (1, 0x2_0000_0001),
        (2, disk.len().div_ceil(SECTOR)),
        (3, 8),
        (4, 64),
    ];
    for (index, field) in numbers.into_iter().chain(places) {
        put(&mut image, index * 8, &(field as u64).to_le_bytes());
    }
    put(&mut image, SECTOR, &0xcafe_cafe_u64.to_le_bytes());
    for table in 0..tables {
        let entry = 0x1000_0000_0000_0000 | table as u64;
        put(
            &mut image,
            directory * SECTOR + table * 8,
            &entry.to_le_bytes(),
        );
    }
    let mut stored = 0_u64;
    for (number, bytes) in disk.chunks(grain).enumerate() {
        let entry = if bytes.iter().any(|byte| *byte != 0) {
            image.extend_from_slice(bytes);
            pad(&mut image, 1);
            image.resize(
                image.len() + grain - bytes.len().next_multiple_of(SECTOR),
                0,
            );
            stored += 1;
            0x3000_0000_0000_0000 | ((stored - 1) & 0xfff) << 48 | (stored - 1) >> 12
        } else if number % 2 == 0 {
            0x2000_0000_0000_0000
        } else {
            0
        };
        put(
            &mut image,
            first_table * SECTOR + number * 8,
            &entry.to_le_bytes(),
        );
    }
    image
}

/// A sparse extent with a descriptor inside, 4 KiB grains, and its directory and tables twice.
pub fn sparse(disk: &[u8]) -> Vec<u8> {
    let grain = 8 * SECTOR;
    let mut image = hosted(disk, 26).to_vec();
    for (offset, field) in [(4, 2_u32), (8, 7)] {
        put(&mut image, offset, &field.to_le_bytes());
    }
    for (offset, field) in [(20, 8_u64), (48, 21)] {
        put(&mut image, offset, &field.to_le_bytes());
    }
    put(&mut image, 77, &[0, 0]);
    let line = format!(
        "RW {} SPARSE \"sparse.vmdk\"\n",
        disk.len().div_ceil(SECTOR)
    );
    image.extend_from_slice(descriptor("monolithicSparse", &line).as_bytes());
    image.resize(128 * SECTOR, 0);
    for directory in [21_u32, 26] {
        put(
            &mut image,
            directory as usize * SECTOR,
            &(directory + 1).to_le_bytes(),
        );
    }
    for (index, bytes) in disk.chunks(grain).take(512).enumerate() {
        let entry = match bytes.iter().all(|byte| *byte == 0) {
            true => (index % 2) as u32,
            false => sector_of(&image),
        };
        for table in [22, 27] {
            put(&mut image, table * SECTOR + index * 4, &entry.to_le_bytes());
        }
        if entry > 1 {
            image.extend_from_slice(bytes);
            image.resize(image.len().next_multiple_of(grain), 0);
        }
    }
    image
}
