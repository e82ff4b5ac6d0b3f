//! Headers and offsets that are refused, and blocks that cannot be read. What sound images hold is
//! the conformance suite's.

use super::*;
use crate::samples_on_disk::{open_error, opened, read};
use samples::cloop::image;

fn with(changes: &[(usize, &[u8])]) -> Vec<u8> {
    let mut image = image(4096, &samples::disk(64 << 10, 3));
    for (offset, bytes) in changes {
        image[*offset..offset + bytes.len()].copy_from_slice(bytes);
    }
    image
}

#[test]
fn headers_that_lie_are_refused_by_name() {
    for (changes, message) in [
        (
            &[(128, &[0, 0, 2, 1][..])][..],
            "block_size 513 must be a multiple of 512",
        ),
        (&[(128, &[0; 4])], "block_size cannot be zero"),
        (
            &[(128, &[0xff, 0xff, 0xfe, 0])],
            "block_size 4294966784 must be 64 MB or less",
        ),
        (
            &[(132, &[0xff; 4])],
            "n_blocks 4294967295 must be 536870911 or less",
        ),
        (
            &[(132, &[4, 0, 0, 1])],
            "image requires too many offsets, try increasing block size",
        ),
        (
            &[(132, &[0, 1, 0, 0])],
            "the offsets end at 524432, beyond the end of the file",
        ),
        (
            &[(136, &[0, 0, 0, 0, 0xff]), (144, &[0, 0, 0, 0, 0xfe])],
            "offsets not monotonically increasing at index 1, image file is corrupt",
        ),
        (
            &[(136, &[0; 8]), (144, &[0xff; 8])],
            "invalid compressed block size at index 1, image file is corrupt",
        ),
    ] {
        assert_eq!(open_error(with(changes), Cloop::open), message);
    }
}

#[test]
fn a_block_that_is_broken_or_beyond_the_end_cannot_be_read_and_the_others_can() {
    let sound = with(&[]);
    let first = u64::from_be_bytes(*sound[136..].first_chunk().unwrap()) as usize;
    let image = with(&[(first, &[0; 8])]);
    opened(image, Cloop::open, async |disk| {
        assert_eq!(read(disk, 0, 512).await, Err(Errno::EIO));
        assert_eq!(read(disk, 2000, 4096).await, Err(Errno::EIO));
        let expected = samples::disk(64 << 10, 3);
        assert_eq!(read(disk, 4096, 4096).await.unwrap(), expected[4096..8192]);
    });
    let cut = sound[..sound.len() - 512].to_vec();
    opened(cut, Cloop::open, async |disk| {
        assert_eq!(read(disk, (64 << 10) - 1, 1).await, Err(Errno::EIO));
        read(disk, 0, 512).await.unwrap();
    });
}

#[test]
fn images_are_recognised_by_their_script() {
    assert_eq!(probe(&with(&[])), 2);
    assert_eq!(probe(b"#!/bin/sh\n"), 0);
}
