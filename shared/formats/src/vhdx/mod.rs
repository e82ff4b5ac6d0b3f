//! `vhdx`: disks of Hyper-V, dynamic and fixed ([MS-VHDX], version 1).
//!
//! ```text
//!   identifier, headers, region tables │ log │ table of blocks │ metadata │ block │ block │ ...   regions of whole MiB
//! ```
//!
//! Order of a write that allocates a block, all before it completes:
//!
//! 1. before the first change of all, the header gets new GUIDs, durably (`header.rs`)
//! 2. the file is made longer by a block, and the data is written
//! 3. an entry of the log with the changed page of the table of blocks is written, and only then others see the block (`log`)
//!
//! The next flush makes data and entry durable together: whatever part of an unflushed allocation a power cut leaves, the
//! block reads as zeroes or as what was written, because a place that held something before is zeroed, and
//! that is durable, before it is mapped. Pages are written in their places when half the log is full, and
//! at a clean close, which also takes the log out of the header. An image that was not closed is replayed when it is next
//! opened for writing; to be read, it has to be replayed first, as by QEMU. A flush that fails may
//! have lost entries of the log: none succeeds after it until the image is opened again.
//!
//! Owns: headers, log and tables; the map takes at most 64 MiB of memory. New blocks go behind all that is in the file.

mod bat;
mod create;
mod header;
mod log;
mod metadata;
mod regions;
#[cfg(test)]
mod tests;
mod writer;

use crate::blocks::{self, BlockMap, Blocks, NewBlock};
use bat::{Entry, Layout};
use block::format::Mapping;
use block::open::{ChildRole, DriverEntry};
use block::{
    CheckOptions, CheckResult, CheckSink, Driver, Edge, Errno, Error, ErrorKind, FormatNode,
    OpenRequest, Purpose,
};
use executor::sync::Mutex as AsyncMutex;
use header::{Current, NO_GUID};
use log::Replay;
use metadata::Shape;
use regions::{MAX_FILE, Regions};
use serde_json::{Map, Value, json};
use writer::Writer;

/// The table line of `vhdx`.
pub const ENTRY: DriverEntry = DriverEntry::new("vhdx", |request| Box::pin(open(request)))
    .with_probe(header::probe)
    .with_create(create::CREATOR);

const MIB: u64 = 1 << 20;
/// Bytes of the largest disk.
const MAX_DISK: u64 = 64 << 40;
/// Most entries of a table of blocks that is kept in memory, where they take 64 MiB.
const MAX_MAPPED: u64 = 16 << 20;

/// A part of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FileRegion {
    offset: u64,
    length: u64,
}

/// An open image but for its map.
struct Vhdx {
    file: Edge,
    layout: Layout,
    /// Held while the file is made longer.
    longer: AsyncMutex<()>,
    writer: Writer,
    was_replayed: bool,
}

fn corrupt(what: String) -> Error {
    Error::new(ErrorKind::Corrupt, format!("invalid VHDX image ({what})"))
}

fn unsupported(what: String) -> Error {
    let message = format!("unsupported VHDX image ({what})");
    Error::new(ErrorKind::Unsupported, message)
}

async fn open(request: &mut OpenRequest<'_>) -> Result<Box<dyn Driver>, Error> {
    let file = request.required_child("file", ChildRole::Image).await?;
    let access = match request.node().read_only {
        true => Access::Read,
        false => Access::Write,
    };
    let image = Vhdx::open(file, (request.purpose(), access)).await?;
    Ok(Box::new(FormatNode::new(image)))
}

/// Whether an image may be changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    /// It must not.
    Read,
    /// It may.
    Write,
}

/// Replays the log, if there is anything in it; whether there was.
async fn replay(file: &Edge, current: &mut Current, access: Access) -> Result<bool, Error> {
    if current.header.log_guid == NO_GUID {
        return Ok(false);
    }
    let Some(replay) = Replay::find(file, &current.header).await? else {
        return Ok(false);
    };
    if access == Access::Read {
        let name = file.node().filename();
        let message = format!(
            "VHDX image file '{name}' opened read-only, but contains a log that needs to be replayed"
        );
        let hint = format!("To replay the log, run:\nqemu-img check -r all '{name}'");
        return Err(Error::new(ErrorKind::Invalid, message).with_hint(hint));
    }
    replay.apply(file).await?;
    let cleared = current
        .write(file, |header| header.log_guid = NO_GUID)
        .await;
    cleared.map_err(|errno| Error::io("Could not replay the log", errno))?;
    Ok(true)
}

impl Vhdx {
    /// Opens the image in `file`, replaying its log. One that is only described has no map.
    ///
    /// # Errors
    /// `Corrupt`, `Unsupported` naming what it is, `Invalid` for a log that cannot be replayed because the image is
    /// only read, `Io`.
    async fn open(file: Edge, (purpose, access): (Purpose, Access)) -> Result<Blocks<Self>, Error> {
        let mut current = Current::read(&file).await?;
        let was_replayed = replay(&file, &mut current, access).await?;
        let log = current.header.log;
        let regions = Regions::read(&file, log).await?;
        let layout = Layout {
            shape: metadata::read(&file, &regions).await?,
            log,
            regions,
            file: file.node().length(),
        };
        layout.check()?;
        let map = match purpose {
            Purpose::Describe => std::iter::empty().collect(),
            _ if layout.shape.entries() > MAX_MAPPED => return Err(too_large(&layout.shape)),
            _ => bat::read(&file, regions.bat, &layout.shape).await?,
        };
        if purpose != Purpose::Check {
            let mut first = None;
            bat::check(&map, &layout, &mut |text| {
                first.get_or_insert(text);
            });
            if let Some(text) = first {
                return Err(Error::new(ErrorKind::Corrupt, text));
            }
        }
        let shape = blocks_behind(&layout);
        let image = Self {
            writer: Writer::new(current, file.node().length()),
            longer: AsyncMutex::new(()),
            was_replayed,
            layout,
            file,
        };
        Ok(Blocks::new(image, shape, map))
    }
}

/// New blocks go behind all that is in the file, where nothing was ever written.
fn blocks_behind(layout: &Layout) -> blocks::Shape {
    let Shape {
        disk_bytes,
        block_bytes,
        ..
    } = layout.shape;
    let end = layout.file.next_multiple_of(MIB);
    let most = MAX_FILE.saturating_sub(end) / block_bytes;
    blocks::Shape {
        disk_bytes,
        block_bytes,
        lead_bytes: 0,
        first_place: end,
        max_places: u32::try_from(most).unwrap_or(u32::MAX),
        first_free: end,
        written: end,
        fills_gaps: false,
    }
}

/// Of a disk whose map would take too much memory.
fn too_large(shape: &Shape) -> Error {
    unsupported(format!(
        "{} entries of the block allocation table, max is {MAX_MAPPED}: larger blocks need fewer",
        shape.entries()
    ))
}

impl blocks::Layout for Vhdx {
    type Entry = Entry;

    fn name(&self) -> &'static str {
        "vhdx"
    }
    fn file(&self) -> &Edge {
        &self.file
    }
    fn mapping(&self, entry: Entry) -> Mapping {
        bat::mapping(entry)
    }
    fn is_ready(&self, _block: u64) -> bool {
        self.writer.has_begun()
    }
    async fn make_ready(&self, _block: u64, _entry: Entry) -> Result<(), Errno> {
        self.writer.begin(&self.file).await
    }
    async fn reserve(&self, new: NewBlock) -> Result<(), Errno> {
        self.writer.begin(&self.file).await?;
        self.lengthen(new.offset + self.layout.shape.block_bytes)
            .await
    }
    async fn map_block(&self, new: NewBlock) -> Result<Entry, Errno> {
        self.log_block(new.block, new.offset).await?;
        Ok(bat::present(new.offset))
    }
    async fn flush(&self) -> Result<(), Errno> {
        self.writer.flush(&self.file).await
    }
    fn metadata_dirty(&self) -> bool {
        self.writer.is_dirty()
    }
    async fn close(&self, _end: u64) -> Result<(), Errno> {
        self.writer.flush(&self.file).await?;
        self.end_log().await
    }
    async fn check(
        &self,
        map: &BlockMap<Entry>,
        _options: CheckOptions,
        sink: &mut dyn CheckSink,
    ) -> Result<CheckResult, Error> {
        let mut found = CheckResult::default();
        if self.was_replayed {
            found.corruptions_fixed = 1;
        }
        let mut wrong = |text: String| {
            found.corruptions += 1;
            sink.message(&text);
        };
        let layout = Layout {
            file: self.file.node().length(),
            ..self.layout
        };
        bat::check(map, &layout, &mut wrong);
        bat::check_shared(map, &layout.shape, &mut wrong);
        Ok(found)
    }
    fn describe(&self) -> Map<String, Value> {
        let mut members = Map::new();
        members.insert("cluster-size".into(), json!(self.layout.shape.block_bytes));
        members.insert("dirty-flag".into(), json!(false));
        members
    }
}
