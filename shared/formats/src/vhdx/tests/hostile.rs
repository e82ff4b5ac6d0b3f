//! Images and logs that lie.

use super::super::header::{Current, Guid, is_sealed, seal};
use super::super::log::Pages;
use super::super::log::entry::{EntryHeader, NewEntry, PAGE};
use super::*;
use block::Resize;
use std::sync::LazyLock;

const GUID: Guid = [0x5a; 16];

fn with(changes: &[(u64, &[u8])]) -> Vec<u8> {
    static SOUND: LazyLock<Vec<u8>> = LazyLock::new(|| new_image(3 * MIB, Kind::Fixed));
    let mut image = SOUND.clone();
    for (offset, bytes) in changes {
        image[*offset as usize..][..bytes.len()].copy_from_slice(bytes);
    }
    image
}

fn refusal(image: Vec<u8>, how: (Purpose, Access)) -> String {
    let world = world(image.clone());
    let message = match with_disk(&world, how, async |_| ()) {
        Ok(()) => panic!("the image is opened"),
        Err(error) => error.message,
    };
    assert!(content(&world) == image, "{message}: something was written");
    message
}

#[test]
fn images_that_lie_are_refused_by_name() {
    const ITEMS: u64 = METADATA + (64 << 10);
    let present = |mebibytes: u64| (mebibytes << 20 | 6).to_le_bytes();
    let entry = |number: u64, field: u64| METADATA + 32 + number * 32 + field;
    let required = [&[9; 16][..], &[0; 8], &[4]].concat();
    for (changes, message) in [
        (&[(0, &b"V"[..])][..], "Image not in VHDX format"),
        (
            &[(65536, b"X"), (131_072, b"X")],
            "No valid VHDX header found",
        ),
        (
            &[(196_608, b"X"), (262_144, b"X")],
            "invalid VHDX image (no sound region table)",
        ),
        (&[(METADATA, b"M")], "invalid VHDX image (no metadata)"),
        (
            &[(METADATA + 10, &[0, 8])],
            "invalid VHDX image (2048 metadata items)",
        ),
        (
            &[(METADATA + 10, &[4])],
            "invalid VHDX image (no metadata item for the physical sector size)",
        ),
        (
            &[(METADATA + 10, &[3])],
            "invalid VHDX image (no metadata item for the sector size)",
        ),
        (
            &[(METADATA + 10, &[1])],
            "invalid VHDX image (no metadata item for the disk size)",
        ),
        (
            &[(METADATA + 10, &[0])],
            "invalid VHDX image (no metadata item for the file parameters)",
        ),
        (
            &[(entry(0, 18), &[0])],
            "invalid VHDX image (a metadata item at 0x0 of 0x8 bytes)",
        ),
        (
            &[(entry(0, 20), &[7])],
            "invalid VHDX image (a metadata item of 7 bytes)",
        ),
        (
            &[(entry(1, 18), &[0xff; 6])],
            "invalid VHDX image (a metadata item at 0xffff0008 of 0xffffffff bytes)",
        ),
        (
            &[(METADATA + 10, &[6]), (entry(5, 0), &required)],
            "unsupported VHDX image (a required metadata item that is not known)",
        ),
        (
            &[(ITEMS + 4, &[2])],
            "unsupported VHDX image (a difference to another image)",
        ),
        (
            &[(ITEMS + 2, &[0x30])],
            "invalid VHDX image (blocks of 3145728 bytes)",
        ),
        (
            &[(ITEMS + 2, &[0x08])],
            "invalid VHDX image (blocks of 524288 bytes)",
        ),
        (
            &[(ITEMS + 2, &[0, 0x20])],
            "invalid VHDX image (blocks of 536870912 bytes)",
        ),
        (
            &[(ITEMS + 8, &[1])],
            "invalid VHDX image (a disk of 3145729 bytes)",
        ),
        (
            &[(ITEMS + 13, &[0x80])],
            "invalid VHDX image (a disk of 140737491501056 bytes)",
        ),
        (
            &[(ITEMS + 33, &[4])],
            "invalid VHDX image (sectors of 1024 bytes)",
        ),
        (
            &[(ITEMS + 37, &[0])],
            "invalid VHDX image (sectors of 0 bytes)",
        ),
        // 2 TiB: 16 MiB of table.
        (
            &[(ITEMS + 8, &[0, 0, 0, 0, 0, 2])],
            "invalid VHDX image (the block allocation table needs 0x1000ff8 bytes and has 0x100000)",
        ),
        (
            &[(BAT + 8, &present(7))],
            "VHDX BAT entry 1 start offset 7340032 points after end of file (7340032). Image has probably been truncated.",
        ),
        (
            &[(BAT + 8, &present(3))],
            "VHDX region 3145728-4194304 overlaps with region 3145728-4194304",
        ),
        (
            &[(BAT + 8, &present(1))],
            "VHDX region 1048576-2097152 overlaps with region 1048576-2097152",
        ),
        (
            &[(BAT + 8, &present(0))],
            "VHDX region 0-1048576 overlaps with region 0-1048576",
        ),
        (
            &[(BAT + 8, &[0xff; 8])],
            "VHDX BAT entry 1 has the invalid state 7.",
        ),
        (
            &[(BAT + 8, &[0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff])],
            "VHDX BAT entry 1 offset overflow.",
        ),
        (
            &[(BAT + 8, &[4])],
            "VHDX BAT entry 1 has the invalid state 4.",
        ),
    ] {
        assert_eq!(refusal(with(changes), WRITING), message);
    }
    let mut short = with(&[]);
    short.truncate(4 << 20);
    let message = refusal(short.clone(), READING);
    assert!(
        message.contains("points after end of file (4194304)"),
        "{message}"
    );
    short.truncate(3 << 20);
    let message = "invalid VHDX image (a region ends at 0x400000, the file at 0x300000)";
    assert_eq!(refusal(short, READING), message);
}

#[test]
fn what_the_peer_would_read_is_read() {
    // One region table, and one header, are enough.
    for changes in [
        &[][..],
        &[(196_608, &b"X"[..])],
        &[(262_144, b"X")],
        &[(65536, b"X")],
        &[(131_072, b"X")],
    ] {
        let length = with_disk(&world(with(changes)), READING, async |node| node.length());
        assert_eq!(length.unwrap(), 3 * MIB);
    }
}

#[test]
fn too_large_a_table_is_described_and_not_opened() {
    let mut image = new_image(0, Kind::NotPresent);
    // 64 TiB, and a table of 513 MiB behind all else, of which the file has nothing but its length.
    image[METADATA as usize + (64 << 10) + 8..][..8].copy_from_slice(&(64_u64 << 40).to_le_bytes());
    let bat = [
        (4_u64 << 20).to_le_bytes().to_vec(),
        (513_u32 << 20).to_le_bytes().to_vec(),
    ];
    for table in [192 << 10, 256 << 10] {
        let table = &mut image[table..][..64 << 10];
        table[32..44].copy_from_slice(&bat.concat());
        seal(table);
    }
    let world = world(image);
    Executor::simulated(&world).block_on(async {
        let resize = Resize::to(517 << 20);
        file().node().resize(resize).await.unwrap();
    });
    let how = (Purpose::Describe, Access::Read);
    let length = with_disk(&world, how, async |node| node.length());
    assert_eq!(length.unwrap(), 64 << 40);
    let error = with_disk(&world, READING, async |_| ()).unwrap_err();
    assert!(
        error.message.contains("max is 16777216"),
        "{}",
        error.message
    );
}

#[test]
fn a_check_tells_all_that_is_wrong() {
    let present = |mebibytes: u64| (mebibytes << 20 | 6).to_le_bytes();
    let image = with(&[
        (BAT, &present(5)),
        (BAT + 8, &present(5)),
        (BAT + 16, &present(9)),
    ]);
    let how = (Purpose::Check, Access::Read);
    let (found, said) = with_disk(&world(image), how, async |node| {
        let mut said = Vec::new();
        let checked = node.driver().check(Default::default(), &mut said).await;
        (checked.unwrap(), said)
    })
    .unwrap();
    assert_eq!(found.corruptions, 2);
    assert_eq!(
        said,
        [
            "VHDX BAT entry 2 start offset 9437184 points after end of file (7340032). Image has probably been truncated.",
            "VHDX region 5242880-6291456 overlaps with region 5242880-6291456",
        ]
    );
}

/// An image whose header names a log that begins with `log`.
fn with_log(log: &[u8]) -> Vec<u8> {
    let world = world(with(&[(MIB, log)]));
    Executor::simulated(&world).block_on(async {
        let file = file();
        let mut current = Current::read(&file).await.unwrap();
        current
            .write(&file, |header| header.log_guid = GUID)
            .await
            .unwrap();
    });
    content(&world)
}

fn entry(pages: &Pages, change: impl FnOnce(&mut NewEntry)) -> Vec<u8> {
    let mut entry = NewEntry {
        guid: GUID,
        sequence: 1,
        at: 0,
        flushed: 7 << 20,
        last: 7 << 20,
    };
    change(&mut entry);
    entry.encode(pages)
}

fn page(offset: u64) -> Pages {
    Pages::from([(offset, vec![3; PAGE])])
}

/// A zero descriptor in place of the entry's data descriptor.
fn zeroing(offset: u64, length: u64) -> Vec<u8> {
    let mut bytes = entry(&page(offset), |_| ());
    bytes[64..68].copy_from_slice(b"zero");
    bytes[72..80].copy_from_slice(&length.to_le_bytes());
    seal(&mut bytes);
    bytes
}

#[test]
fn logs_that_lie_change_nothing() {
    let changes =
        |offset: u64, length: u64| format!("the log changes 0x{length:x} bytes at 0x{offset:x}");
    let sealed = |at: usize, value: u8| {
        let mut bytes = entry(&page(BAT), |_| ());
        bytes[at] ^= value;
        seal(&mut bytes);
        bytes
    };
    let lies = "entry 1 of the log lies".to_owned();
    for (log, message) in [
        (entry(&page(7 << 20), |_| ()), changes(7 << 20, 4096)),
        (
            entry(&page(u64::MAX - 4095), |_| ()),
            changes(u64::MAX - 4095, 4096),
        ),
        // The identifier, a header, the log itself.
        (entry(&page(0), |_| ()), changes(0, 4096)),
        (entry(&page(65536), |_| ()), changes(65536, 4096)),
        (entry(&page(MIB + 8192), |_| ()), changes(MIB + 8192, 4096)),
        (zeroing(6 << 20, 2 << 20), changes(6 << 20, 2 << 20)),
        (zeroing(4096, 2 << 20), changes(4096, 2 << 20)),
        (zeroing(BAT, u64::MAX - 4095), changes(BAT, u64::MAX - 4095)),
        (
            entry(&page(BAT), |entry| entry.flushed = 8 << 20),
            "the file is shorter than the 0x800000 bytes that its log was written for".to_owned(),
        ),
        (
            entry(&page(BAT), |entry| entry.last = 1 << 60),
            format!("a file of 0x{:x} bytes", 1_u64 << 60),
        ),
        // A descriptor's signature, offset and number; a data sector's signature and number.
        (sealed(64, 1), lies.clone()),
        (sealed(80, 1), lies.clone()),
        (sealed(88, 2), lies.clone()),
        (sealed(4096, 1), lies.clone()),
        (sealed(4100, 1), lies.clone()),
        (sealed(8191, 1), lies),
    ] {
        let expected = format!("invalid VHDX image ({message})");
        assert_eq!(refusal(with_log(&log), WRITING), expected);
    }
}

#[test]
fn a_log_of_broken_entries_is_given_up() {
    let mut sector = entry(&page(BAT), |_| ());
    sector.truncate(PAGE);
    sector[8..12].copy_from_slice(&(1_u32 << 20).to_le_bytes());
    assert!(EntryHeader::parse(&sector, &GUID, MIB).is_some() && !is_sealed(&sector));
    let message = "VHDX log is corrupt: too many of its entries are broken";
    assert_eq!(refusal(with_log(&sector.repeat(256)), WRITING), message);
    // One of them is what a power cut leaves.
    let length = with_disk(&world(with_log(&sector)), READING, async |node| {
        node.length()
    });
    assert_eq!(length.unwrap(), 3 * MIB);
}

#[test]
fn a_log_is_replayed_once_and_for_writing_only() {
    // The third block becomes zeroes; the file gets longer.
    let mut table = vec![0; PAGE];
    for (number, mebibytes) in [4_u64, 5].into_iter().enumerate() {
        let raw = mebibytes << 20 | 6;
        table[number * 8..][..8].copy_from_slice(&raw.to_le_bytes());
    }
    let log = entry(&Pages::from([(BAT, table.clone())]), |entry| {
        entry.last = 9 << 20
    });
    let image = with_log(&log);
    let message = refusal(image.clone(), READING);
    assert!(
        message.contains("contains a log that needs to be replayed"),
        "{message}"
    );
    let world = world(image);
    let checked = |how| {
        with_disk(&world, how, async |node| {
            let checked = node
                .driver()
                .check(Default::default(), &mut block::check::Silent)
                .await;
            let checked = checked.unwrap();
            (checked.corruptions, checked.corruptions_fixed)
        })
        .unwrap()
    };
    assert_eq!(checked((Purpose::Check, Access::Write)), (0, 1));
    let after = content(&world);
    assert_eq!(after.len(), 9 << 20);
    assert!(after[BAT as usize..][..PAGE] == table);
    assert_eq!(checked((Purpose::Check, Access::Read)), (0, 0));
    assert!(content(&world) == after);
}

#[test]
fn zeroes_of_a_log_are_written() {
    let image = with_log(&zeroing(BAT, 4096));
    assert_ne!(image[BAT as usize], 0);
    let world = world(image);
    with_disk(&world, WRITING, async |node| {
        assert_eq!(read(&node, 0, 512).await, [0; 512]);
    })
    .unwrap();
    assert!(
        content(&world)[BAT as usize..][..PAGE]
            .iter()
            .all(|byte| *byte == 0)
    );
}
