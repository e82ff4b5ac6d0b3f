//! Compressed loop images, version 2 (compressed_loop.h of the cloop kernel module).

use flate2::Compression;
use flate2::write::ZlibEncoder;
use std::io::Write;

const PREAMBLE: &[u8] =
    b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\nexit $?\n";

/// The image of a disk, in blocks of `block_bytes`; the last one is filled up with zeroes.
pub fn image(block_bytes: usize, disk: &[u8]) -> Vec<u8> {
    let blocks: Vec<Vec<u8>> = disk
        .chunks(block_bytes)
        .map(|block| {
            let mut block = block.to_vec();
            block.resize(block_bytes, 0);
            zlib(&block)
        })
        .collect();
    let mut image = PREAMBLE.to_vec();
    image.resize(128, 0);
    image.extend((block_bytes as u32).to_be_bytes());
    image.extend((blocks.len() as u32).to_be_bytes());
    let mut at = (136 + 8 * (blocks.len() + 1)) as u64;
    for block in &blocks {
        image.extend(at.to_be_bytes());
        at += block.len() as u64;
    }
    image.extend(at.to_be_bytes());
    image.extend(blocks.concat());
    image
}

/// A zlib stream.
pub(crate) fn zlib(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
    let written = encoder.write_all(bytes);
    written
        .and_then(|()| encoder.finish())
        .expect("a vector takes everything")
}
