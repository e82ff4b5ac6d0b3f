//! Headers that lie, entries that lead nowhere, and extents as they are put together. What sound images
//! hold is the conformance suite's.

use super::header::{self, Found};
use super::*;
use crate::qcow2::tests::rig::{edge, leaf};
use block::open::ChildRole;
use executor::Executor;
use executor::sim::{Config, Image, World};
use std::path::Path;

const IMAGE: &str = "/simulated/image";

fn with(image: &[u8], changes: &[(usize, &[u8])]) -> Vec<u8> {
    let mut image = image.to_vec();
    for (offset, bytes) in changes {
        image[*offset..offset + bytes.len()].copy_from_slice(bytes);
    }
    image
}

/// What `read` makes of the bytes of a file.
fn reading<T>(image: Vec<u8>, read: impl AsyncFnOnce(&block::Edge) -> T) -> T {
    let world = World::with_files(Config::default(), Image::from([(IMAGE.into(), image)]));
    Executor::simulated(&world).block_on(async {
        let file = edge(&leaf(Path::new(IMAGE)), "file", ChildRole::Image);
        read(&file).await
    })
}

fn refusal(image: Vec<u8>) -> String {
    match reading(image, header::read) {
        Ok(found) => panic!("{found:?} is accepted"),
        Err(error) => error.message,
    }
}

fn disk() -> Vec<u8> {
    samples::disk(256 << 10, 3)
}

/// A hosted header and room for what it refers to.
fn hosted() -> Vec<u8> {
    let mut image = samples::vmdk::stream(&disk());
    image.resize(1 << 20, 0);
    let word = |value: u32| value.to_le_bytes();
    let long = |value: u64| value.to_le_bytes();
    with(
        &image,
        &[
            (4, &word(1)),
            (8, &word(3)),
            (48, &long(21)),
            (56, &long(26)),
            (77, &[0, 0]),
        ],
    )
}

#[test]
fn hosted_headers_that_lie_are_refused_by_name() {
    let most = &[0xff; 8][..];
    for (changes, message) in [
        (&[(0, &b"k"[..])][..], "Image not in VMDK format"),
        (&[(4, &[4])], "Unsupported VMDK version 4"),
        (&[(44, &most[..4])], "L2 table size too big"),
        (&[(44, &[1, 2])], "L2 table size too big"),
        (&[(44, &[0, 0])], "L1 entry size is invalid"),
        (&[(20, &[0])], "L1 entry size is invalid"),
        (&[(20, most)], "Invalid granularity, image may be corrupt"),
        (&[(20, &[129])], "Invalid granularity, image may be corrupt"),
        (
            &[(20, &[0, 0, 1])],
            "Invalid granularity, image may be corrupt",
        ),
        (&[(16, &most[..1])], "L1 size too big"),
        (&[(12, most)], "L1 size too big"),
        (
            &[(64, &[0, 16])],
            "File truncated, expecting at least 2097152 bytes",
        ),
        (
            &[(28, most)],
            "sector 18446744073709551615 is beyond the end of any file",
        ),
        (&[(10, &[1])], "Unsupported VMDK compression algorithm 0"),
        (&[(56, most)], "Invalid footer"),
    ] {
        assert_eq!(refusal(with(&hosted(), changes)), message, "{changes:?}");
    }
    for directory in [48, 56] {
        let outside = refusal(with(&hosted(), &[(directory, &[0, 0, 1])]));
        assert!(outside.starts_with("Could not read l1 table from extent"));
    }
    assert_eq!(refusal(Vec::new()), "Image not in VMDK format");
    let large = &[(20, &[0, 0x20][..]), (77, &[1])];
    let message = "Invalid granularity, image may be corrupt";
    assert_eq!(refusal(with(&hosted(), large)), message);
}

#[test]
fn a_file_without_sectors_leads_to_its_descriptor() {
    let image = with(&hosted(), &[(12, &[0; 8])]);
    let found = reading(image, header::read).unwrap();
    assert!(matches!(found, Found::DescriptorAt(512)), "{found:?}");
}

#[test]
fn footers_that_lie_are_refused() {
    let sample = samples::vmdk::stream(&disk());
    let end = sample.len();
    let found = reading(sample.clone(), header::read).unwrap();
    assert!(matches!(found, Found::Extent(layout) if layout.compressed && layout.markers));
    for (offset, bytes) in [
        (end - 1536 + 8, &[1][..]),
        (end - 1536 + 12, &[2]),
        (end - 1024, b"k"),
        (end - 1024 + 56, &[0xff; 8]),
        (end - 512, &[1]),
        (end - 512 + 8, &[1]),
        (end - 512 + 12, &[1]),
    ] {
        let message = "Invalid footer";
        assert_eq!(refusal(with(&sample, &[(offset, bytes)])), message);
    }
    assert_eq!(refusal(sample[..1024].to_vec()), "Invalid footer");
}

#[test]
fn headers_of_esx_servers_that_lie_are_refused_by_name() {
    let cowd = samples::vmdk::cowd(&disk(), 1);
    for (changes, message) in [
        (
            &[(16, &[0, 0, 1][..])][..],
            "Invalid granularity, image may be corrupt",
        ),
        (&[(16, &[0])], "L1 entry size is invalid"),
        (&[(24, &[0xff; 4])], "L1 size too big"),
        (
            &[(24, &[0])],
            "the grain directory has 0 entries, 1 are needed",
        ),
    ] {
        assert_eq!(refusal(with(&cowd, changes)), message);
    }
    let sample = samples::vmdk::se_sparse(&disk());
    for (changes, message) in [
        (&[(0, &[0][..])][..], "Bad const header magic: 0xcafeba00"),
        (&[(8, &[2])], "Unsupported version: 0x200000002"),
        (&[(24, &[9])], "Unsupported grain size: 0x9"),
        (&[(32, &[1])], "Unsupported grain table size: 0x1"),
        (&[(40, &[1])], "Unsupported flags: 0x1"),
        (&[(48, &[1])], "Unsupported reserved bits: 0x1"),
        (&[(512, &[0])], "Bad volatile header magic: 0xcafeca00"),
        (
            &[(512 + 24, &[1])],
            "Image is dirty, Replaying journal not supported",
        ),
        (
            &[(136, &[0])],
            "the grain directory has 0 entries, 1 are needed",
        ),
        (&[(136, &[0xff; 8])], "L1 size too big"),
    ] {
        let image = with(&sample, changes);
        let refused = reading(image, header::read_se_sparse).map_err(|error| error.message);
        assert_eq!(refused.unwrap_err(), message);
    }
    assert!(reading(sample, header::read_se_sparse).is_ok());
}

#[test]
fn entries_of_ese_tables_are_decoded_and_bad_ones_told() {
    let encoding = Encoding::Numbers {
        tables: 100,
        grains: 1000,
    };
    for (raw, entry) in [
        (0, Entry::Absent),
        (0x1000_0000_0000_0000, Entry::Zero),
        (0x2000_0000_0000_0000, Entry::Zero),
        (0x3001_0000_0000_0000, Entry::At(1008)),
        (0x3000_0000_0000_0001, Entry::At(1000 + 8 * 4096)),
        (0x3fff_ffff_ffff_ffff, Entry::At(1000 + 8 * ((1 << 60) - 1))),
        (1, Entry::Bad),
        (0x4000_0000_0000_0000, Entry::Bad),
    ] {
        let decoded = Entry::decode(encoding, 8, raw);
        let expected = match entry {
            // More sectors than there are bytes.
            Entry::At(sector) if sector >= u64::MAX / SECTOR - 1 => Entry::Bad,
            entry => entry,
        };
        assert_eq!(decoded, expected, "{raw:#x}");
    }
    let bytes = 32 << 10;
    assert_eq!(table_sector(encoding, (0, bytes)), Ok(None));
    assert_eq!(
        table_sector(encoding, (SE_UNMAPPED | 2, bytes)),
        Ok(Some(228))
    );
    assert_eq!(table_sector(encoding, (2, bytes)), Err(Errno::EIO));
    assert_eq!(
        table_sector(encoding, (SE_ZERO | 2, bytes)),
        Err(Errno::EIO)
    );
}
