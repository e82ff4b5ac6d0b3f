//! `vdi`: disks of VirtualBox, dynamic and static (VirtualBox's VDICore.h).
//!
//! ```text
//!   header │ map: u32 for each block of the disk │ block │ block │ ...       blocks of 1 MiB
//!              0xffffffff, 0xfffffffe: zeroes       n: the n-th block of the file
//! ```
//!
//! A block is mapped before the write that allocates it completes: data, count in the header, map, one
//! after the other, all before the next flush returns. What a power cut leaves of an unflushed
//! allocation is a block that reads as zeroes or as what was written: a place in the file that was never
//! written reads as zeroes, and one that was (`places.rs`) is zeroed, and that is durable, before it is
//! mapped. The count is never below what the map uses but for a power cut: it is made good when the
//! image is next written. Blocks are never unmapped.
//!
//! Owns: the map (in memory, at most 64 MiB). Discards change nothing; zeroes change what is mapped only.

mod create;
mod header;
mod places;

use crate::bytes::{read_bytes, write_bytes};
use block::format::{Extent, Fill, Format, Lookup, Mapping, WritePlan};
use block::open::{ChildRole, DriverEntry};
use block::{
    Buffer, ByteRange, CheckOptions, CheckResult, CheckSink, Driver, Edge, Errno, Error, ErrorKind,
    FormatNode, Limits, OpenRequest, Purpose, Resize, ZeroFlags,
};
use executor::sync::{Mutex as AsyncMutex, RangeGuard, RangeLock};
use header::{ALLOCATED_AT, HEADER_BYTES, Header};
use places::{Place, Places};
use serde_json::{Map, Value, json};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The table line of `vdi`.
pub const ENTRY: DriverEntry = DriverEntry::new("vdi", |request| Box::pin(open(request)))
    .with_probe(header::probe)
    .with_create(create::CREATOR);

const SECTOR: u64 = 512;
/// Bytes of a block.
const BLOCK: u64 = 1 << 20;
/// Most blocks of a disk.
const MAX_BLOCKS: u32 = 0x1fff_ff80;
/// Most blocks of a disk that is served: 16 TiB, whose map takes 64 MiB of memory.
const MAX_MAPPED: u32 = 16 << 20;
/// The map's entries of blocks that are not in the file.
const NO_BLOCK: u32 = 0xffff_ffff;
const DISCARDED: u32 = 0xffff_fffe;

/// An open image.
pub struct Vdi {
    file: Edge,
    header: Header,
    map: Box<[AtomicU32]>,
    /// Blocks of the disk that are being allocated.
    blocks: RangeLock,
    places: Mutex<Places>,
    /// What the header in the file counts.
    counted: AsyncMutex<u32>,
}

/// A write that was prepared.
pub struct Token<'a> {
    _block: RangeGuard<'a>,
    /// Where the block goes, unless it has a place.
    place: Option<Place>,
}

async fn open(request: &mut OpenRequest<'_>) -> Result<Box<dyn Driver>, Error> {
    let file = request.required_child("file", ChildRole::Image).await?;
    let image = Vdi::open(file, request.purpose()).await?;
    Ok(Box::new(FormatNode::new(image)))
}

/// Of a disk whose map would take too much memory.
fn too_large(disk: u64) -> Error {
    let most = u64::from(MAX_MAPPED) * BLOCK;
    let message =
        format!("Unsupported VDI image size (size is 0x{disk:x}, max supported is 0x{most:x})");
    Error::new(ErrorKind::Unsupported, message)
}

fn is_mapped(entry: u32) -> bool {
    entry < DISCARDED
}

impl Vdi {
    /// Opens the image in `file`. One that is only described has no map.
    ///
    /// # Errors
    /// `Corrupt`, `Unsupported` naming what it is, `Io`.
    pub async fn open(file: Edge, purpose: Purpose) -> Result<Self, Error> {
        let failed = |what: &str| {
            let context = format!("Could not read the {what}");
            move |errno| Error::io(context, errno)
        };
        let bytes = read_bytes(&file, 0, HEADER_BYTES).await;
        let bytes = bytes.map_err(failed("header"))?;
        let header = Header::parse(bytes.first_chunk().expect("as many as were asked for"))?;
        let mapped = match purpose {
            Purpose::Describe => 0,
            _ if header.blocks > MAX_MAPPED => return Err(too_large(header.disk_bytes)),
            _ => header.blocks,
        };
        let length = mapped as usize * size_of::<u32>();
        let bytes = read_bytes(&file, u64::from(header.map_offset), length).await;
        let bytes = bytes.map_err(failed("block map"))?;
        let entries = bytes
            .as_chunks()
            .0
            .iter()
            .map(|entry| u32::from_le_bytes(*entry));
        let map: Box<[AtomicU32]> = entries.clone().map(AtomicU32::new).collect();
        let mut used: Vec<u32> = entries.filter(|entry| is_mapped(*entry)).collect();
        let room = file
            .node()
            .length()
            .saturating_sub(u64::from(header.data_offset));
        let in_file = u32::try_from(room.div_ceil(BLOCK)).unwrap_or(DISCARDED);
        Ok(Self {
            places: Mutex::new(Places::new(&mut used, in_file)),
            counted: AsyncMutex::new(header.allocated),
            blocks: RangeLock::new(),
            map,
            header,
            file,
        })
    }

    fn places(&self) -> MutexGuard<'_, Places> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn entry(&self, block: u64) -> u32 {
        let entry = self.map.get(block as usize);
        entry.map_or(NO_BLOCK, |entry| entry.load(Ordering::Acquire))
    }

    /// Where a block of the file begins.
    fn host_offset(&self, index: u32) -> u64 {
        u64::from(self.header.data_offset) + u64::from(index) * BLOCK
    }

    fn extent(&self, range: ByteRange) -> Extent {
        let (first, within) = (range.offset / BLOCK, range.offset % BLOCK);
        let entry = self.entry(first);
        let continues = |blocks: u64| match is_mapped(entry) {
            true => u64::from(self.entry(first + blocks)) == u64::from(entry) + blocks,
            false => !is_mapped(self.entry(first + blocks)),
        };
        let mut blocks = 1;
        while blocks * BLOCK - within < range.length && continues(blocks) {
            blocks += 1;
        }
        Extent {
            length: (blocks * BLOCK - within).min(range.length),
            mapping: match is_mapped(entry) {
                true => Mapping::Data(self.host_offset(entry) + within),
                false => Mapping::Zero(None),
            },
            in_place: is_mapped(entry),
        }
    }

    /// Makes the header count at least `count` blocks.
    async fn count(&self, count: u32) -> Result<(), Errno> {
        let mut counted = self.counted.lock().await;
        if *counted < count {
            write_bytes(&self.file, ALLOCATED_AT, &count.to_le_bytes()).await?;
            *counted = count;
        }
        Ok(())
    }

    async fn map_block(&self, block: u64, place: Place) -> Result<(), Errno> {
        if !place.is_fresh {
            // What was there before must not show after a power cut.
            self.file.node().flush().await?;
        }
        let end = self.places().end();
        self.count(end).await?;
        let at = u64::from(self.header.map_offset) + block * size_of::<u32>() as u64;
        write_bytes(&self.file, at, &place.index.to_le_bytes()).await?;
        self.map[block as usize].store(place.index, Ordering::Release);
        Ok(())
    }
}

impl Format for Vdi {
    type Token<'a> = Token<'a>;

    fn name(&self) -> &'static str {
        "vdi"
    }
    fn virtual_size(&self) -> u64 {
        self.header.disk_bytes
    }
    fn limits(&self) -> Limits {
        Limits {
            optimal_transfer: BLOCK as u32,
            zero_alignment: BLOCK as u32,
            ..Limits::default()
        }
    }
    fn file(&self) -> &Edge {
        &self.file
    }
    fn data(&self) -> &Edge {
        &self.file
    }
    fn backing(&self) -> Option<&Edge> {
        None
    }
    fn lookup(&self, range: ByteRange) -> Lookup {
        Lookup::Hit(self.extent(range))
    }
    fn changes(&self) -> Option<u64> {
        // No mapping is ever taken back.
        Some(0)
    }
    async fn resolve(&self, range: ByteRange) -> Result<Extent, Errno> {
        Ok(self.extent(range))
    }
    async fn prepare_write(&self, range: ByteRange) -> Result<WritePlan<Token<'_>>, Errno> {
        let (block, within) = (range.offset / BLOCK, range.offset % BLOCK);
        let range = ByteRange::new(range.offset, range.length.min(BLOCK - within));
        let guard = self.blocks.lock(block..block + 1).await;
        let entry = self.entry(block);
        let place = match is_mapped(entry) {
            true => None,
            false => Some(self.places().take(block, DISCARDED).ok_or(Errno::ENOSPC)?),
        };
        let index = place.map_or(entry, |place| place.index);
        let fill = |length| match place {
            Some(place) if !place.is_fresh && length > 0 => Fill::Zeroes(length),
            _ => Fill::Nothing,
        };
        Ok(WritePlan {
            range,
            host_offset: self.host_offset(index) + within,
            head: fill(within),
            tail: fill(BLOCK - within - range.length),
            token: Token {
                _block: guard,
                place,
            },
        })
    }
    async fn commit<'a>(&'a self, plan: WritePlan<Token<'a>>) -> Result<(), Errno> {
        let Some(place) = plan.token.place else {
            return Ok(());
        };
        let block = plan.range.offset / BLOCK;
        let mapped = self.map_block(block, place).await;
        if mapped.is_err() {
            // The file's map may refer to it all the same: no other block may have it.
            self.places().keep_for(block, place);
        }
        mapped
    }
    async fn abort<'a>(&'a self, plan: WritePlan<Token<'a>>) {
        if let Some(place) = plan.token.place {
            self.places().give_back(place);
        }
    }
    async fn write_zeroes(&self, range: ByteRange, _flags: ZeroFlags) -> Result<u64, Errno> {
        let extent = self.extent(range);
        match extent.mapping {
            Mapping::Zero(_) => Ok(extent.length),
            _ => Err(Errno::EOPNOTSUPP),
        }
    }
    async fn discard(&self, _range: ByteRange) -> Result<(), Errno> {
        Ok(())
    }
    async fn read_encoded(&self, _: u64, _: u64, _: Buffer) -> Result<(), Errno> {
        Err(Errno::EIO)
    }
    async fn flush(&self) -> Result<(), Errno> {
        self.file.node().flush().await
    }
    fn metadata_dirty(&self) -> bool {
        false
    }
    async fn resize(&self, _resize: Resize) -> Result<(), Error> {
        let message = "Image format driver does not support resize";
        Err(Error::new(ErrorKind::Unsupported, message))
    }
    async fn close(&self) -> Result<(), Errno> {
        self.flush().await
    }
    async fn check(
        &self,
        options: CheckOptions,
        sink: &mut dyn CheckSink,
    ) -> Result<CheckResult, Error> {
        if options.repair.leaks() {
            return Err(Error::check_unsupported());
        }
        let mut found = CheckResult::default();
        let mut user = vec![NO_BLOCK; self.map.len()];
        let mut allocated = 0;
        let mut wrong = |text: String| {
            found.corruptions += 1;
            sink.message(&text);
        };
        for block in 0..self.header.blocks {
            let entry = self.entry(u64::from(block));
            match user.get_mut(entry as usize) {
                _ if !is_mapped(entry) => {}
                None => wrong(format!("ERROR: block index {block} too large, is {entry}")),
                Some(user) => {
                    allocated += 1;
                    match *user {
                        NO_BLOCK => *user = entry,
                        other => wrong(format!("ERROR: block index {other} also used by {entry}")),
                    }
                }
            }
        }
        let counted = *self.counted.lock().await;
        if allocated != counted {
            wrong(format!(
                "ERROR: allocated blocks mismatch, is {allocated}, should be {counted}"
            ));
        }
        Ok(found)
    }
    fn describe(&self) -> Map<String, Value> {
        let mut members = Map::new();
        members.insert("cluster-size".into(), json!(BLOCK));
        members.insert("dirty-flag".into(), json!(false));
        members
    }
}
