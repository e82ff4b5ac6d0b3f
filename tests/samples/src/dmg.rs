//! Disk images of macOS, "UDIF": chunks, a property list that says where they are, a trailer.

use crate::{SECTOR, cloop, is_zero};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use std::io::Write;

/// How the chunks that are not all zeroes are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codec {
    /// As they are.
    Raw,
    /// Deflated.
    Zlib,
    /// By bzip2.
    Bzip2,
}

/// Where the table of chunks is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    /// In a property list.
    Xml,
    /// In a resource fork.
    Fork,
}

/// Choices of an image.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// How chunks are stored.
    pub codec: Codec,
    /// Where the table is.
    pub table: Table,
    /// Bytes of a chunk: whole sectors.
    pub chunk_bytes: usize,
    /// Chunks in one partition's table.
    pub chunks_per_table: usize,
    /// Bytes before the chunks.
    pub data_fork: usize,
}

/// A chunk type of zeroes, of which nothing is stored.
const ZERO: u32 = 0;
/// The end of a table.
const LAST: u32 = 0xffff_ffff;

/// The image of a disk of whole sectors.
pub fn image(shape: Shape, disk: &[u8]) -> Vec<u8> {
    let mut image = vec![0xee; shape.data_fork];
    let mut tables = Vec::new();
    let chunks: Vec<&[u8]> = disk.chunks(shape.chunk_bytes).collect();
    let mut first = 0;
    for part in chunks.chunks(shape.chunks_per_table) {
        let start = image.len() - shape.data_fork;
        let mut entries = Vec::new();
        let mut sectors = 0;
        for chunk in part {
            let count = (chunk.len() / SECTOR) as u64;
            let at = (image.len() - shape.data_fork - start) as u64;
            let (kind, stored) = encode(shape.codec, chunk);
            entries.push([
                u64::from(kind) << 32,
                sectors,
                count,
                at,
                stored.len() as u64,
            ]);
            image.extend(stored);
            sectors += count;
        }
        entries.push([u64::from(LAST) << 32, sectors, 0, 0, 0]);
        tables.push(table([first, sectors, start as u64], &entries));
        first += sectors;
    }
    let at = image.len();
    match shape.table {
        Table::Xml => image.extend(property_list(&tables).into_bytes()),
        Table::Fork => image.extend(resource_fork(&tables)),
    }
    let place = [at as u64, (image.len() - at) as u64];
    image.extend(trailer(shape, place, first));
    image
}

fn encode(codec: Codec, chunk: &[u8]) -> (u32, Vec<u8>) {
    if is_zero(chunk) {
        return (ZERO, Vec::new());
    }
    match codec {
        Codec::Raw => (1, chunk.to_vec()),
        Codec::Zlib => (0x8000_0005, cloop::zlib(chunk)),
        Codec::Bzip2 => {
            let level = bzip2::Compression::default();
            let mut encoder = bzip2::write::BzEncoder::new(Vec::new(), level);
            let written = encoder.write_all(chunk);
            let stored = written.and_then(|()| encoder.finish());
            (0x8000_0006, stored.expect("a vector takes everything"))
        }
    }
}

/// A "mish" block: a head of 204 bytes, then chunks of five 64-bit fields.
fn table([first, sectors, start]: [u64; 3], entries: &[[u64; 5]]) -> Vec<u8> {
    let mut block = b"mish\0\0\0\x01".to_vec();
    for field in [first, sectors, start] {
        block.extend(field.to_be_bytes());
    }
    block.resize(200, 0);
    block.extend((entries.len() as u32).to_be_bytes());
    let fields = entries.iter().flatten();
    block.extend(fields.flat_map(|field| field.to_be_bytes()));
    block
}

fn property_list(tables: &[Vec<u8>]) -> String {
    let mut text = "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<plist version=\"1.0\">\n<dict>\n\
                    <key>resource-fork</key>\n<dict>\n<key>blkx</key>\n<array>\n"
        .to_owned();
    for table in tables {
        text += "<dict>\n<key>Data</key>\n<data>\n";
        let encoded = STANDARD.encode(table);
        for line in encoded.as_bytes().chunks(52) {
            text += "\t\t\t\t";
            text += std::str::from_utf8(line).expect("base64 is ASCII");
            text += "\n";
        }
        text += "</data>\n</dict>\n";
    }
    // Something else that is data, too.
    text += "</array>\n<key>plst</key>\n<array>\n<data>\nAAAA\n</data>\n";
    text + "</array>\n</dict>\n</dict>\n</plist>\n"
}

/// A head of 16 bytes, zeroes up to 256, then the blocks, each with its length; no map.
fn resource_fork(tables: &[Vec<u8>]) -> Vec<u8> {
    let with_length = |table: &Vec<u8>| [&(table.len() as u32).to_be_bytes()[..], table].concat();
    let data: Vec<u8> = tables.iter().flat_map(with_length).collect();
    let mut fork = Vec::new();
    for field in [256, 256 + data.len(), data.len(), 0] {
        fork.extend((field as u32).to_be_bytes());
    }
    fork.resize(256, 0);
    fork.extend(data);
    fork
}

fn trailer(shape: Shape, place: [u64; 2], sectors: u64) -> Vec<u8> {
    let mut trailer = vec![0; SECTOR];
    let mut put = |offset: usize, bytes: &[u8]| {
        trailer[offset..offset + bytes.len()].copy_from_slice(bytes);
    };
    put(0, b"koly\0\0\0\x04\0\0\x02\0\0\0\0\x01");
    put(0x18, &(shape.data_fork as u64).to_be_bytes());
    let at = match shape.table {
        Table::Fork => 0x28,
        Table::Xml => 0xd8,
    };
    put(at, &place[0].to_be_bytes());
    put(at + 8, &place[1].to_be_bytes());
    put(0x1ec, &sectors.to_be_bytes());
    trailer
}
