//! Trailers and tables that are refused, and chunks that cannot be read. What sound images hold is
//! the conformance suite's.

use super::*;
use crate::samples_on_disk::{open_error, opened, read};
use samples::dmg::{Codec, Shape, Table, image};

const DISK: usize = 64 << 10;

/// What the images hold: no chunk of it is all zeroes.
fn content() -> Vec<u8> {
    let mut disk = samples::disk(DISK, 3);
    disk.iter_mut().step_by(512).for_each(|byte| *byte |= 1);
    disk
}

fn sample(codec: Codec, table: Table) -> Vec<u8> {
    let shape = Shape {
        codec,
        table,
        chunk_bytes: 8192,
        chunks_per_table: 3,
        data_fork: 0,
    };
    image(shape, &content())
}

/// Changes fields of the trailer.
fn with_trailer(changes: &[(usize, u64)]) -> Vec<u8> {
    let mut image = sample(Codec::Zlib, Table::Xml);
    let trailer = image.len() - 512;
    for (offset, field) in changes {
        image[trailer + offset..][..8].copy_from_slice(&field.to_be_bytes());
    }
    image
}

/// Changes the first chunk in the resource fork: a field of its entry.
fn with_entry(field: usize, value: &[u8]) -> Vec<u8> {
    let mut image = sample(Codec::Zlib, Table::Fork);
    let found = image.windows(4).position(|bytes| bytes == b"mish");
    let at = found.unwrap() + 204 + field;
    image[at..at + value.len()].copy_from_slice(value);
    image
}

#[test]
fn trailers_that_lie_are_refused_by_name() {
    let whole = sample(Codec::Zlib, Table::Xml);
    let trailer = whole.len() as u64 - 512;
    let list = u64::from_be_bytes(*whole[whole.len() - 512 + 216..].first_chunk().unwrap());
    let max = u64::MAX;
    for (changes, message) in [
        (
            &[(24, max)][..],
            format!("the data fork at {max} begins behind the trailer"),
        ),
        (
            &[(216, max)],
            format!(
                "the property list of {} bytes at {max} does not end before the trailer",
                trailer - list
            ),
        ),
        (
            &[(40, 1), (48, max)],
            format!("the resource fork of {max} bytes at 1 does not end before the trailer"),
        ),
        (
            &[(224, 0)],
            "neither a resource fork nor a property list".to_owned(),
        ),
        (
            &[(492, max)],
            format!("a disk of {max} sectors is too large"),
        ),
    ] {
        assert_eq!(open_error(with_trailer(changes), Dmg::open), message);
    }
    let short = whole[..600].to_vec();
    assert_eq!(
        open_error(short, Dmg::open),
        "Could not locate UDIF trailer in dmg file"
    );
    assert_eq!(
        open_error(Vec::new(), Dmg::open),
        "dmg file must be at least 512 bytes long"
    );
}

#[test]
fn property_lists_that_are_none_are_refused() {
    let with_list = |find: &str, replace: &str| {
        let mut image = sample(Codec::Zlib, Table::Xml);
        let found = image
            .windows(find.len())
            .position(|at| at == find.as_bytes());
        image[found.unwrap()..][..replace.len()].copy_from_slice(replace.as_bytes());
        open_error(image, Dmg::open)
    };
    for (find, replace, message) in [
        (
            "<data>\n\t",
            "<data>\n!",
            "data in the property list is no base64",
        ),
        (
            "<data>\nAAAA\n</data>",
            "<data>\nAAAA\n<xxxx>",
            "data without an end in the property list",
        ),
    ] {
        assert_eq!(with_list(find, replace), message);
    }
}

#[test]
fn chunks_that_lie_are_refused_by_name() {
    let message = |image| open_error(image, Dmg::open);
    assert_eq!(
        message(with_entry(16, &[0, 0, 0, 0, 0, 2, 0, 1])),
        "sector count 131073 for chunk 0 is larger than max (131072)"
    );
    assert_eq!(
        message(with_entry(32, &[0, 0, 0, 0, 4, 0, 0, 1])),
        "length 67108865 for chunk 0 is larger than max (67108864)"
    );
    for field in [8, 24] {
        assert_eq!(
            message(with_entry(field, &[0xff; 8])),
            "chunk 0 lies beyond any disk or file"
        );
    }
    for (kind, name) in [(4, "ADC"), (7, "lzfse"), (8, "lzma")] {
        assert_eq!(
            message(with_entry(0, &[0x80, 0, 0, kind])),
            format!("chunks compressed with {name} are not supported")
        );
    }
    assert_eq!(
        message(with_entry(0, &[0x12, 0, 0, 0])),
        "chunk 0 has the unknown type 0x12000000"
    );
}

#[test]
fn sectors_without_a_chunk_and_broken_chunks_cannot_be_read() {
    for image in [
        // A chunk that says that it is the end of its table.
        with_entry(0, &[0xff; 4]),
        // One that is shorter, one that holds too little, and one that is not in the file.
        with_entry(16, &[0, 0, 0, 0, 0, 0, 0, 0]),
        with_entry(32, &[0, 0, 0, 0, 0, 0, 0, 3]),
        with_entry(24, &[0x10]),
    ] {
        opened(image, Dmg::open, async |disk| {
            assert_eq!(read(disk, 0, 512).await, Err(Errno::EIO));
            let next = read(disk, 8192, 512).await;
            assert_eq!(next.unwrap(), content()[8192..8704]);
        });
    }
}

#[test]
fn bzip2_and_a_file_that_ends_within_a_sector_are_read() {
    for (codec, table) in [(Codec::Bzip2, Table::Xml), (Codec::Zlib, Table::Fork)] {
        let image = sample(codec, table);
        assert!(!image.len().is_multiple_of(512));
        opened(image, Dmg::open, async |disk| {
            assert_eq!(read(disk, 0, DISK).await.unwrap(), content());
        });
    }
}
