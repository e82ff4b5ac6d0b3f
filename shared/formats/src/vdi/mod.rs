//! `vdi`: disks of VirtualBox, dynamic and static (VirtualBox's VDICore.h).
//!
//! ```text
//!   header │ map: u32 for each block of the disk │ block │ block │ ...       blocks of 1 MiB
//!              0xffffffff, 0xfffffffe: zeroes       n: the n-th block of the file
//! ```
//!
//! A block is mapped before the write that allocates it completes: data, count in the header, map, one
//! after the other (`blocks`), all before the next flush returns. What a power cut leaves of an unflushed
//! allocation is a block that reads as zeroes or as what was written. The count is never below what the
//! map uses but for a power cut: it is made good when the image is next written. Blocks are never unmapped.
//!
//! Owns: header and entries; the map takes at most 64 MiB of memory.

mod create;
mod header;

use crate::blocks::{BlockMap, Blocks, Layout, NewBlock, Shape};
use crate::bytes::{read_bytes, write_bytes};
use block::format::Mapping;
use block::open::{ChildRole, DriverEntry};
use block::{
    CheckOptions, CheckResult, CheckSink, Driver, Edge, Errno, Error, ErrorKind, FormatNode,
    OpenRequest, Purpose,
};
use executor::sync::Mutex as AsyncMutex;
use header::{ALLOCATED_AT, HEADER_BYTES, Header};
use serde_json::{Map, Value, json};

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

/// An open image but for its map.
struct Vdi {
    file: Edge,
    header: Header,
    /// What the header in the file counts.
    counted: AsyncMutex<u32>,
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
    async fn open(file: Edge, purpose: Purpose) -> Result<Blocks<Self>, Error> {
        let bytes = read_bytes(&file, 0, HEADER_BYTES).await;
        let bytes = bytes.map_err(|errno| Error::io("Could not read the header", errno))?;
        let header = Header::parse(bytes.first_chunk().expect("as many as were asked for"))?;
        let mapped = match purpose {
            Purpose::Describe => 0,
            _ if header.blocks > MAX_MAPPED => return Err(too_large(header.disk_bytes)),
            _ => header.blocks,
        };
        let place = (u64::from(header.map_offset), mapped as usize);
        let how = (u32::from_le_bytes, "Could not read the block map");
        let map = BlockMap::read(&file, place, how).await?;
        let shape = Shape {
            disk_bytes: header.disk_bytes,
            block_bytes: BLOCK,
            lead_bytes: 0,
            first_place: u64::from(header.data_offset),
            max_places: DISCARDED,
            first_free: 0,
            written: file.node().length(),
            fills_gaps: true,
        };
        let image = Self {
            counted: AsyncMutex::new(header.allocated),
            header,
            file,
        };
        Ok(Blocks::new(image, shape, map))
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
}

impl Layout for Vdi {
    type Entry = u32;

    fn name(&self) -> &'static str {
        "vdi"
    }
    fn file(&self) -> &Edge {
        &self.file
    }
    fn mapping(&self, entry: u32) -> Mapping {
        match is_mapped(entry) {
            true => Mapping::Data(u64::from(self.header.data_offset) + u64::from(entry) * BLOCK),
            false => Mapping::Zero(None),
        }
    }
    async fn map_block(&self, new: NewBlock) -> Result<u32, Errno> {
        self.count(new.places).await?;
        let at = u64::from(self.header.map_offset) + new.block * size_of::<u32>() as u64;
        let index = ((new.offset - u64::from(self.header.data_offset)) / BLOCK) as u32;
        write_bytes(&self.file, at, &index.to_le_bytes()).await?;
        Ok(index)
    }
    async fn check(
        &self,
        map: &BlockMap<u32>,
        options: CheckOptions,
        sink: &mut dyn CheckSink,
    ) -> Result<CheckResult, Error> {
        if options.repair.leaks() {
            return Err(Error::check_unsupported());
        }
        let mut found = CheckResult::default();
        let mut user = vec![NO_BLOCK; map.len()];
        let mut allocated = 0;
        let mut wrong = |text: String| {
            found.corruptions += 1;
            sink.message(&text);
        };
        for block in 0..self.header.blocks {
            let entry = map.get(u64::from(block)).unwrap_or(NO_BLOCK);
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
