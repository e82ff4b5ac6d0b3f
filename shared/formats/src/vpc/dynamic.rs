//! A dynamic disk: blocks in the order of their first write, each behind a bitmap of its sectors.
//!
//! ```text
//!   copy of the footer │ header │ map │ bitmap, block │ bitmap, block │ ... │ footer
//! ```
//!
//! The footer is where blocks go next, so it moves first, some blocks ahead, and the old one is written
//! over once the new one is durable:
//!
//! ```text
//!   footer at the new end → flush → bitmaps of the new places → flush     once for some blocks
//!   data → map                                                            for each block
//! ```
//!
//! Wherever the power fails, the last sector of the file is a footer, or the copy at its start stands
//! alone; bitmaps, which say that all sectors of a block count, are durable before the map refers to them.
//! When the image is closed, the footer moves back to the end of the last block, in the same order. A block
//! that another program made, with bits that are not set, gets them when it is first written: bits that are
//! not set say that nothing was.

use super::SECTOR;
use super::footer::{FOOTER_BYTES, Footer, HEADER_BYTES, Header};
use crate::blocks::{BlockMap, Blocks, Layout, NewBlock, Shape};
use crate::bytes::{read_bytes, write_bytes};
use block::format::Mapping;
use block::{Edge, Errno, Error, ErrorKind, Purpose, Resize};
use executor::sync::Mutex as AsyncMutex;
use serde_json::{Map, Value, json};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// The entry of a block that is not in the file.
const NOWHERE: u32 = u32::MAX;
/// Places that the footer moves ahead at a time.
const AHEAD: u64 = 16;

/// An open image but for its map.
pub(super) struct Dynamic {
    file: Edge,
    header: Header,
    /// The copy at the start of the file, which never changes.
    footer: [u8; FOOTER_BYTES],
    /// Where the first new block goes.
    first_place: u64,
    /// Blocks without a place.
    unmapped: AtomicU32,
    /// One bit for each block whose bitmap is known to be full.
    full: Box<[AtomicU64]>,
    room: AsyncMutex<Room>,
}

/// How far the file is ready for new blocks.
struct Room {
    /// Places up to here have their bitmaps, and the footer is behind them.
    end: u64,
    has_grown: bool,
}

/// What [`Dynamic::open`] needs to know.
pub(super) struct Opened {
    pub(super) footer: Footer,
    pub(super) bytes: [u8; FOOTER_BYTES],
    pub(super) disk_bytes: u64,
    pub(super) purpose: Purpose,
    /// The image may be written.
    pub(super) writes: bool,
    /// The last sector of the file, when it is a footer.
    pub(super) at_end: Option<Footer>,
}

fn corrupt(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, message)
}

impl Dynamic {
    /// Opens the image in `file`. One that is only described has no map.
    pub(super) async fn open(file: Edge, opened: Opened) -> Result<Blocks<Self>, Error> {
        let header = read_header(&file, &opened).await?;
        if opened.writes && opened.at_end.is_some_and(|at_end| at_end != opened.footer) {
            let message = "vpc: the footer and its copy disagree; cannot be opened read/write";
            return Err(corrupt(message));
        }
        let map = match opened.purpose {
            Purpose::Describe => BlockMap::from_iter([]),
            _ => read_map(&file, &header).await?,
        };
        let first_place = first_place(&header, &map);
        let length = file.node().length();
        if first_place > length {
            return Err(corrupt(
                "block-vpc: free_data_block_offset points after the end of file. The image has been truncated.",
            ));
        }
        if opened.writes {
            check_writable(&header, opened.footer.header_offset, &map)?;
        }
        let footer_bytes = FOOTER_BYTES as u64;
        // In the place of the first new block's bitmap.
        let is_next = opened.at_end.is_some() && first_place + footer_bytes == length;
        let places = (u64::from(u32::MAX) - first_place / SECTOR) * SECTOR;
        let stride = header.bitmap_bytes() + u64::from(header.block_bytes);
        let shape = Shape {
            disk_bytes: opened.disk_bytes,
            block_bytes: u64::from(header.block_bytes),
            lead_bytes: header.bitmap_bytes(),
            first_place,
            max_places: u32::try_from(places / stride).unwrap_or(u32::MAX),
            first_free: 0,
            written: if is_next { first_place } else { length },
            fills_gaps: false,
        };
        let unmapped = map.iter().filter(|entry| *entry == NOWHERE).count();
        let words = map.len().div_ceil(64);
        let image = Self {
            file,
            header,
            footer: opened.bytes,
            first_place,
            unmapped: AtomicU32::new(unmapped as u32),
            full: (0..words).map(|_| AtomicU64::new(0)).collect(),
            room: AsyncMutex::new(Room {
                end: first_place,
                has_grown: false,
            }),
        };
        Ok(Blocks::new(image, shape, map))
    }

    fn stride(&self) -> u64 {
        self.header.bitmap_bytes() + u64::from(self.header.block_bytes)
    }

    fn bitmap_offset(entry: u32) -> u64 {
        u64::from(entry) * SECTOR
    }

    fn full_bit(&self, block: u64) -> Option<(&AtomicU64, u64)> {
        let word = self.full.get((block / 64) as usize)?;
        Some((word, 1 << (block % 64)))
    }

    fn set_full(&self, block: u64) {
        if let Some((word, bit)) = self.full_bit(block) {
            word.fetch_or(bit, Ordering::Release);
        }
    }

    /// The bitmap of a block all of whose sectors count.
    fn full_bitmap(&self) -> Vec<u8> {
        vec![0xff; self.header.bitmap_bytes() as usize]
    }

    async fn write_footer(&self, at: u64) -> Result<(), Errno> {
        write_bytes(&self.file, at, &self.footer).await?;
        self.file.node().flush().await
    }

    /// Moves the footer behind `end` and writes the bitmaps of the places from `room.end` to there.
    async fn grow(&self, room: &mut Room, end: u64) -> Result<(), Errno> {
        let file_end = self.file.node().length();
        room.has_grown = true;
        if end + FOOTER_BYTES as u64 > file_end {
            self.write_footer(end).await?;
        }
        let mut at = room.end;
        while at < end {
            write_bytes(&self.file, at, &self.full_bitmap()).await?;
            at += self.stride();
        }
        self.file.node().flush().await?;
        room.end = end;
        Ok(())
    }
}

async fn read_header(file: &Edge, opened: &Opened) -> Result<Header, Error> {
    let at = opened.footer.header_offset;
    if at > i64::MAX as u64 / 2 {
        return Err(corrupt(
            "invalid VPC image: dynamic disk header beyond 2^62",
        ));
    }
    let bytes = read_bytes(file, at, HEADER_BYTES).await;
    let bytes = bytes.map_err(|errno| Error::io("Error reading dynamic VHD header", errno))?;
    let bytes = bytes.first_chunk().expect("as many as were asked for");
    Header::parse(bytes, opened.disk_bytes)
}

async fn read_map(file: &Edge, header: &Header) -> Result<BlockMap<u32>, Error> {
    let place = (header.map_offset, header.entries as usize);
    let how = (u32::from_be_bytes, "Error reading pagetable");
    BlockMap::read(file, place, how).await
}

/// Behind the map and all blocks.
fn first_place(header: &Header, map: &BlockMap<u32>) -> u64 {
    let stride = header.bitmap_bytes() + u64::from(header.block_bytes);
    let used = map.iter().filter(|entry| *entry != NOWHERE);
    let end = used
        .map(|entry| Dynamic::bitmap_offset(entry) + stride)
        .max();
    end.unwrap_or(0).max(header.map_end())
}

/// Refuses to write to an image whose blocks are its own headers or map.
fn check_writable(header: &Header, header_offset: u64, map: &BlockMap<u32>) -> Result<(), Error> {
    let stride = header.bitmap_bytes() + u64::from(header.block_bytes);
    let metadata = [
        (0, FOOTER_BYTES as u64),
        (header_offset, header_offset + HEADER_BYTES as u64),
        (header.map_offset, header.map_end()),
    ];
    let overlaps = |entry: u32| {
        let start = Dynamic::bitmap_offset(entry);
        entry != NOWHERE
            && metadata
                .iter()
                .any(|(from, to)| start < *to && start + stride > *from)
    };
    match map.iter().position(overlaps) {
        Some(block) => Err(corrupt(format!(
            "vpc: block {block} overlaps the image's headers"
        ))),
        None => Ok(()),
    }
}

impl Layout for Dynamic {
    type Entry = u32;

    fn name(&self) -> &'static str {
        "vpc"
    }
    fn file(&self) -> &Edge {
        &self.file
    }
    fn mapping(&self, entry: u32) -> Mapping {
        match entry {
            NOWHERE => Mapping::Zero(None),
            entry => Mapping::Data(Self::bitmap_offset(entry) + self.header.bitmap_bytes()),
        }
    }
    fn is_ready(&self, block: u64) -> bool {
        self.full_bit(block)
            .is_some_and(|(word, bit)| word.load(Ordering::Acquire) & bit != 0)
    }
    async fn make_ready(&self, block: u64, entry: u32) -> Result<(), Errno> {
        let at = Self::bitmap_offset(entry);
        let bitmap = self.full_bitmap();
        if read_bytes(&self.file, at, bitmap.len()).await? != bitmap {
            write_bytes(&self.file, at, &bitmap).await?;
        }
        self.set_full(block);
        Ok(())
    }
    async fn reserve(&self, new: NewBlock) -> Result<(), Errno> {
        let end = new.offset + self.stride();
        let mut room = self.room.lock().await;
        if end <= room.end {
            return Ok(());
        }
        let unmapped = u64::from(self.unmapped.load(Ordering::Relaxed));
        let ahead = AHEAD.min(unmapped).saturating_sub(1);
        self.grow(&mut room, end + ahead * self.stride()).await
    }
    async fn map_block(&self, new: NewBlock) -> Result<u32, Errno> {
        let entry = u32::try_from(new.offset / SECTOR).map_err(|_| Errno::EFBIG)?;
        let at = self.header.map_offset + new.block * size_of::<u32>() as u64;
        write_bytes(&self.file, at, &entry.to_be_bytes()).await?;
        self.set_full(new.block);
        self.unmapped.fetch_sub(1, Ordering::Relaxed);
        Ok(entry)
    }
    async fn close(&self, end: u64) -> Result<(), Errno> {
        self.flush().await?;
        let room = self.room.lock().await;
        let length = end.max(self.first_place) + FOOTER_BYTES as u64;
        if !room.has_grown || self.file.node().length() <= length {
            return Ok(());
        }
        self.write_footer(length - FOOTER_BYTES as u64).await?;
        let resize = Resize::to(length);
        let cut = self.file.node().resize(resize).await;
        cut.map_err(|error| error.errno.unwrap_or(Errno::EIO))?;
        self.flush().await
    }
    fn describe(&self) -> Map<String, Value> {
        let mut members = Map::new();
        members.insert("cluster-size".into(), json!(self.header.block_bytes));
        members.insert("dirty-flag".into(), json!(false));
        members
    }
}
