//! Headers that are refused, and images whose numbers lead nowhere. What sound images hold is the
//! conformance suite's.

use super::*;
use crate::samples_on_disk::{open_error, opened, read};
use samples::bochs::{Shape, image};

fn sample() -> Vec<u8> {
    let shape = Shape {
        version: 2,
        extent_bytes: 4096,
        spare: 0,
    };
    image(shape, &samples::disk(64 << 10, 3))
}

fn with(changes: &[(usize, &[u8])]) -> Vec<u8> {
    let mut image = sample();
    for (offset, bytes) in changes {
        image[*offset..offset + bytes.len()].copy_from_slice(bytes);
    }
    image
}

#[test]
fn headers_that_lie_are_refused_by_name() {
    let u32_max = &[0xff; 4][..];
    for (changes, message) in [
        (&[(0, &b"b"[..])][..], "Image not in Bochs format"),
        (&[(32, b"r")], "Image not in Bochs format"),
        (&[(64, &[1, 0, 3, 0])], "Image not in Bochs format"),
        (&[(72, u32_max)], "Catalog size is too large"),
        (&[(72, &[0, 0, 0, 0x40])], "Catalog size is too large"),
        (
            &[(72, &[15, 0, 0, 0])],
            "Catalog size is too small for this disk size",
        ),
        (
            &[(88, &[0, 0, 0, 0, 0, 0, 0, 0xff])],
            "Catalog size is too small for this disk size",
        ),
        (
            &[(76, &[0, 0, 0, 0])],
            "Bitmap size 0 is too small for extents of 4096 bytes",
        ),
        (&[(80, &[0, 0, 0, 0])], "Extent size must be at least 512"),
        (
            &[(80, &[1, 16, 0, 0])],
            "Extent size 4097 is not a power of two",
        ),
        (
            &[(80, &[0, 0, 0, 0x80])],
            "Extent size 2147483648 is too large",
        ),
    ] {
        let message = message.to_owned();
        assert_eq!(open_error(with(changes), Bochs::open), message);
    }
    let short = sample()[..60].to_vec();
    assert_eq!(open_error(short, Bochs::open), "Image not in Bochs format");
}

#[test]
fn a_header_anywhere_and_a_huge_bitmap_overflow_nothing() {
    // The catalog is read from behind the end of the file: every entry is the first extent.
    let image = with(&[(68, &[0xff; 4]), (76, &[0xff; 4])]);
    opened(image, Bochs::open, async |disk| {
        read(disk, 0, 64 << 10).await.unwrap();
    });
    // An entry whose extent no offset expresses.
    let image = with(&[(512, &[0xfe, 0xff, 0xff, 0xff]), (76, &[0xff; 4])]);
    opened(image, Bochs::open, async |disk| {
        assert_eq!(read(disk, 0, 512).await, Err(Errno::EIO));
        let range = ByteRange::new(0, 512);
        let status = disk.block_status(range).await;
        assert_eq!(status.map(|_| ()), Err(Errno::EIO));
    });
}

#[test]
fn only_whole_headers_are_recognised() {
    let image = sample();
    assert_eq!(header::probe(&image), 100);
    assert_eq!(header::probe(&image[..511]), 0);
    assert_eq!(header::probe(&[0; 512]), 0);
}

#[test]
fn sectors_that_are_not_stored_are_zeroes_by_status() {
    let mut disk = vec![0; 16 << 10];
    disk[5 * 512..6 * 512].fill(1);
    let shape = Shape {
        version: 1,
        extent_bytes: 4096,
        spare: 0,
    };
    opened(image(shape, &disk), Bochs::open, async |node| {
        let status = async |offset: u64| {
            let range = ByteRange::new(offset, (16 << 10) - offset);
            let extent = node.block_status(range).await.unwrap();
            (extent.length, extent.status.zero, extent.status.offset)
        };
        assert_eq!(status(0).await, (5 * 512, true, None));
        // Behind the header, a catalog of four entries, and the bitmap.
        let data = 512 + 16 + 512;
        assert_eq!(status(2600).await, (472, false, Some(data + 2600)));
        assert_eq!(status(6 * 512).await, (1024, true, None));
        assert_eq!(status(4096).await, (12 << 10, true, None));
    });
}
