//! `vhdx`: disks of Hyper-V, dynamic and fixed ([MS-VHDX], version 1).
//!
//! ```text
//!   identifier, headers, region tables │ log │ table of blocks │ metadata │ block │ block │ ...   regions of whole MiB
//! ```
//!
//! Order of a write that allocates a block, all before it completes:
//!
//! 1. before the first change of all, the header gets new GUIDs, durably (`header.rs`)
//! 2. the file is made longer by a block (`places.rs`), and the data is written
//! 3. an entry of the log with the changed page of the table of blocks is written, and only then others see the block (`log`)
//!
//! The next flush makes data and entry durable together: whatever part of an unflushed allocation a power cut leaves, the
//! block reads as zeroes or as what was written, because a place that held something before is zeroed, and
//! that is durable, before it is mapped. Pages are written in their places when half the log is full, and
//! at a clean close, which also takes the log out of the header. An image that was not closed is replayed when it is next
//! opened for writing; to be read, it has to be replayed first, as by QEMU. A flush that fails may
//! have lost entries of the log: none succeeds after it until the image is opened again.
//!
//! Owns: the table of blocks (in memory, at most 64 MiB). Blocks are never unmapped: discards change nothing, zeroes
//! change what is mapped only.

mod bat;
mod create;
mod header;
mod log;
mod metadata;
mod places;
mod regions;
#[cfg(test)]
mod tests;
mod writer;

use bat::{Bat, Layout, State};
use block::format::{Extent, Fill, Format, Lookup, Mapping, WritePlan};
use block::open::{ChildRole, DriverEntry};
use block::{
    ByteRange, CheckOptions, CheckResult, CheckSink, Driver, Edge, Errno, Error, ErrorKind,
    FormatNode, Limits, OpenRequest, Purpose, ZeroFlags,
};
use executor::sync::{Mutex as AsyncMutex, RangeGuard, RangeLock};
use header::{Current, NO_GUID};
use log::Replay;
use places::{Place, Places};
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

/// An open image.
pub struct Vhdx {
    file: Edge,
    layout: Layout,
    bat: Bat,
    /// Blocks of the disk that are being allocated.
    blocks: RangeLock,
    places: AsyncMutex<Places>,
    writer: Writer,
    was_replayed: bool,
}

/// A write that was prepared.
pub struct Token<'a> {
    _block: RangeGuard<'a>,
    /// Where the block goes, unless it has a place.
    place: Option<Place>,
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
pub enum Access {
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
    pub async fn open(file: Edge, (purpose, access): (Purpose, Access)) -> Result<Self, Error> {
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
        let shape = &layout.shape;
        let bat = match purpose {
            Purpose::Describe => Bat::empty(),
            _ if shape.entries() > MAX_MAPPED => return Err(too_large(shape)),
            _ => Bat::read(&file, regions.bat, shape).await?,
        };
        if purpose != Purpose::Check {
            let mut first = None;
            bat.check(&layout, &mut |text| {
                first.get_or_insert(text);
            });
            if let Some(text) = first {
                return Err(Error::new(ErrorKind::Corrupt, text));
            }
        }
        let ends = layout.used().map(|region| region.end());
        let end = ends.into_iter().fold(bat.end(shape), u64::max);
        Ok(Self {
            places: AsyncMutex::new(Places::new(shape.block_bytes, end, MAX_FILE)),
            writer: Writer::new(current, file.node().length()),
            blocks: RangeLock::new(),
            was_replayed,
            layout,
            bat,
            file,
        })
    }

    fn block_bytes(&self) -> u64 {
        self.layout.shape.block_bytes
    }

    fn state(&self, block: u64) -> State {
        self.bat.get(self.layout.shape.entry_of(block)).state()
    }

    fn extent(&self, range: ByteRange) -> Option<Extent> {
        let bytes = self.block_bytes();
        let (first, within) = (range.offset / bytes, range.offset % bytes);
        let state = self.state(first);
        let continues = |blocks: u64| match (state, self.state(first + blocks)) {
            (State::Present(at), State::Present(other)) => other == at + blocks * bytes,
            (one, other) => one == other,
        };
        let mut blocks = 1;
        while blocks * bytes - within < range.length && continues(blocks) {
            blocks += 1;
        }
        let (mapping, in_place) = match state {
            State::Invalid => return None,
            State::Zeroes => (Mapping::Zero(None), false),
            // The first change of all has to pass by the header.
            State::Present(at) => (Mapping::Data(at + within), self.writer.has_begun()),
        };
        Some(Extent {
            length: (blocks * bytes - within).min(range.length),
            mapping,
            in_place,
        })
    }
}

/// Of a disk whose map would take too much memory.
fn too_large(shape: &metadata::Shape) -> Error {
    unsupported(format!(
        "{} entries of the block allocation table, max is {MAX_MAPPED}: larger blocks need fewer",
        shape.entries()
    ))
}

impl Format for Vhdx {
    type Token<'a> = Token<'a>;

    fn name(&self) -> &'static str {
        "vhdx"
    }
    fn virtual_size(&self) -> u64 {
        self.layout.shape.disk_bytes
    }
    fn limits(&self) -> Limits {
        Limits {
            optimal_transfer: self.block_bytes() as u32,
            zero_alignment: self.block_bytes() as u32,
            ..Limits::default()
        }
    }
    fn file(&self) -> &Edge {
        &self.file
    }
    fn lookup(&self, range: ByteRange) -> Lookup {
        self.extent(range).map_or(Lookup::Miss, Lookup::Hit)
    }
    fn changes(&self) -> Option<u64> {
        // No mapping is ever taken back.
        Some(0)
    }
    async fn resolve(&self, range: ByteRange) -> Result<Extent, Errno> {
        self.extent(range).ok_or(Errno::EIO)
    }
    async fn prepare_write(&self, range: ByteRange) -> Result<WritePlan<Token<'_>>, Errno> {
        let bytes = self.block_bytes();
        let (block, within) = (range.offset / bytes, range.offset % bytes);
        let range = ByteRange::new(range.offset, range.length.min(bytes - within));
        let guard = self.blocks.lock(block..block + 1).await;
        self.writer.begin(&self.file).await?;
        let (at, place) = match self.state(block) {
            State::Invalid => return Err(Errno::EIO),
            State::Present(at) => (at, None),
            State::Zeroes => {
                let place = self.places.lock().await.take(block, &self.file).await?;
                (place.offset, Some(place))
            }
        };
        let fill = |length| match place {
            Some(place) if !place.is_fresh && length > 0 => Fill::Zeroes(length),
            _ => Fill::Nothing,
        };
        Ok(WritePlan {
            range,
            host_offset: at + within,
            head: fill(within),
            tail: fill(bytes - within - range.length),
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
        let block = plan.range.offset / self.block_bytes();
        let mapped = self.map_block(block, place).await;
        if mapped.is_err() {
            // The log in the file may map it all the same: no other block may have it.
            self.places.lock().await.keep_for(block, place);
        }
        mapped
    }
    async fn abort<'a>(&'a self, plan: WritePlan<Token<'a>>) {
        if let Some(place) = plan.token.place {
            self.places.lock().await.give_back(place);
        }
    }
    async fn write_zeroes(&self, range: ByteRange, _flags: ZeroFlags) -> Result<u64, Errno> {
        let extent = self.extent(range).ok_or(Errno::EIO)?;
        match extent.mapping {
            Mapping::Zero(_) => Ok(extent.length),
            _ => Err(Errno::EOPNOTSUPP),
        }
    }
    async fn flush(&self) -> Result<(), Errno> {
        self.writer.flush(&self.file).await
    }
    fn metadata_dirty(&self) -> bool {
        self.writer.is_dirty()
    }
    async fn close(&self) -> Result<(), Errno> {
        self.flush().await?;
        self.end_log().await
    }
    async fn check(
        &self,
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
        self.bat.check(&layout, &mut wrong);
        self.bat.check_shared(&layout.shape, &mut wrong);
        Ok(found)
    }
    fn describe(&self) -> Map<String, Value> {
        let mut members = Map::new();
        members.insert("cluster-size".into(), json!(self.block_bytes()));
        members.insert("dirty-flag".into(), json!(false));
        members
    }
}
