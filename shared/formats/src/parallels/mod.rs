//! `parallels`: expandable images of Parallels (QEMU docs/interop/parallels.txt), in both forms.
//!
//! ```text
//!   header │ map: u32 for each block of the disk │ block │ block │ ... │ preallocated
//!              0: the backing, or zeroes   n: it is at the n-th sector, or block, of the file
//! ```
//!
//! A block is mapped before the write that allocates it completes (`blocks`): data, then the map's entry.
//! An image that is open for writing is marked as such, durably, before anything else is written, and the
//! mark goes, after everything else, when it is closed. Others refuse to write to an image that still has
//! the mark, and so does this driver, unless the process that set it was killed and left the redo log that
//! says so: its map is never behind what it answered. Opened for reading only, nothing is written.
//!
//! Owns: header and entries; the map takes at most 64 MiB of memory. The file grows ahead of the blocks
//! (`prealloc-size`, `prealloc-mode`) and is cut behind the last one when it is closed. Bitmaps of a format
//! extension are shown while the image is only read; a writer does not keep them up to date, which the
//! mark of the closed image says to others.

mod check;
mod create;
mod extension;
mod header;

use crate::blocks::{BlockMap, Blocks, Layout, NewBlock, Shape};
use crate::bytes::{read_bytes, write_bytes};
use block::bitmap::{BitmapSet, BitmapStore};
use block::format::Mapping;
use block::open::{ChildRole, DriverEntry};
use block::redo_log::Record;
use block::{
    BoxFuture, CheckOptions, CheckResult, CheckSink, Driver, Edge, Errno, Error, ErrorKind,
    FormatNode, OpenRequest, Preallocation, Purpose, RedoLog, Resize,
};
use executor::sync::Mutex as AsyncMutex;
use header::{CLOSED, HEADER_BYTES, Header, IN_USE, IN_USE_AT};
use serde_json::{Map, Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The table line of `parallels`.
pub const ENTRY: DriverEntry = DriverEntry::new("parallels", |request| Box::pin(open(request)))
    .with_probe(header::probe)
    .with_create(create::CREATOR);

const SECTOR: u64 = 512;
/// The entry of a block that is not in the file.
const NOWHERE: u32 = 0;
/// How far the file grows ahead of its blocks, in bytes.
const DEFAULT_AHEAD: u64 = 128 << 20;
/// The record of a redo log: an image is marked as in use by the process that writes it.
const MARKED: Record = Record {
    kind: 1,
    table: 0,
    index: 0,
    value: 0,
};

/// An open image but for its map.
struct Parallels {
    file: Edge,
    backing: Option<Edge>,
    header: Header,
    /// The image was found not to be closed.
    unclean: AtomicBool,
    /// This node set the mark, and takes it away.
    writes: bool,
    log: RedoLog,
    growth: Growth,
    bitmaps: Option<Arc<BitmapSet>>,
}

/// How the file grows.
struct Growth {
    ahead: u64,
    mode: Preallocation,
    /// Length of the file, as far as it is known to be there.
    length: AsyncMutex<u64>,
}

async fn open(request: &mut OpenRequest<'_>) -> Result<Box<dyn Driver>, Error> {
    let ahead = request.take_size("prealloc-size")?.unwrap_or(DEFAULT_AHEAD);
    let mode = match request.take_choice("prealloc-mode", &["falloc", "truncate"])? {
        None | Some(0) => Preallocation::Falloc,
        Some(_) => Preallocation::Off,
    };
    let file = request.required_child("file", ChildRole::Image).await?;
    let bytes = read_bytes(&file, 0, HEADER_BYTES).await;
    let bytes = bytes.map_err(|errno| Error::io("Could not read the header", errno))?;
    let header = Header::parse(bytes.first_chunk().expect("as many as were asked for"))?;
    let backing = request.backing(&file, None).await?;
    let writes = request.purpose() == Purpose::Serve && !request.node().read_only;
    let log = match writes {
        true => request.redo_log(&file)?,
        false => RedoLog::disabled(),
    };
    let growth = Growth {
        ahead,
        mode,
        length: AsyncMutex::new(file.node().length()),
    };
    let image = Parallels {
        file,
        backing,
        header,
        unclean: AtomicBool::new(header.in_use),
        writes,
        log,
        growth,
        bitmaps: None,
    };
    // Nothing may fail once the image is marked.
    request.finish()?;
    let image = image.open(request.purpose()).await?;
    Ok(Box::new(FormatNode::new(image)))
}

impl Parallels {
    /// Reads the map, and marks the image when it is to be written.
    async fn open(mut self, purpose: Purpose) -> Result<Blocks<Self>, Error> {
        let map: BlockMap<u32> = match purpose {
            Purpose::Describe => BlockMap::from_iter([]),
            _ => self.read_map().await?,
        };
        let length = self.file.node().length();
        let has_extension = self.header.extension != 0;
        if self.writes {
            self.check_writable(&map)?;
            if has_extension {
                tracing::warn!("Format Extension ignored in RW mode");
            }
            self.mark().await?;
        } else if has_extension && purpose == Purpose::Serve {
            let bitmaps = extension::load(&self.file, &self.header).await?;
            self.bitmaps = Some(Arc::new(bitmaps));
        }
        let (first_place, unit) = (self.header.first_place(), self.header.unit());
        let places = (u64::from(u32::MAX) - (first_place / unit).min(u64::from(u32::MAX)))
            / (self.header.block_bytes() / unit);
        let shape = Shape {
            disk_bytes: self.header.disk_sectors * SECTOR,
            block_bytes: self.header.block_bytes(),
            lead_bytes: 0,
            first_place,
            max_places: u32::try_from(places).unwrap_or(u32::MAX),
            first_free: if has_extension { length } else { 0 },
            written: length,
            fills_gaps: false,
        };
        Ok(Blocks::new(self, shape, map))
    }

    async fn read_map(&self) -> Result<BlockMap<u32>, Error> {
        let place = (HEADER_BYTES as u64, self.header.entries as usize);
        let how = (u32::from_le_bytes, "Could not read the block map");
        BlockMap::read(&self.file, place, how).await
    }

    /// Refuses to write to an image that another writer left, or whose blocks are its own map.
    fn check_writable(&self, map: &BlockMap<u32>) -> Result<(), Error> {
        let refuse = |message: String| Err(Error::new(ErrorKind::Corrupt, message));
        if self.unclean.load(Ordering::Acquire) && self.log.recover()?.is_empty() {
            let message = "parallels: Image was not closed correctly; cannot be opened read/write";
            return refuse(message.into());
        }
        let map_end = self.header.map_end();
        let within = |entry| self.offset(entry).is_some_and(|offset| offset < map_end);
        match map.iter().position(within) {
            Some(block) => refuse(format!("parallels: cluster {block} overlaps the block map")),
            None => Ok(()),
        }
    }

    /// Marks the image as in use. The redo log knows it first: a kill may come in between.
    async fn mark(&self) -> Result<(), Error> {
        let failed = |errno| Error::io("Could not mark the image as in use", errno);
        if self.log.is_empty() && !self.log.append(&[MARKED]) {
            return Err(failed(Errno::ENOSPC));
        }
        self.write_mark(IN_USE).await.map_err(failed)
    }

    async fn write_mark(&self, mark: u32) -> Result<(), Errno> {
        write_bytes(&self.file, IN_USE_AT, &mark.to_le_bytes()).await?;
        self.file.node().flush().await
    }

    /// Where the block with this entry is.
    fn offset(&self, entry: u32) -> Option<u64> {
        (entry != NOWHERE).then(|| u64::from(entry) * self.header.unit())
    }

    async fn write_entry(&self, block: u64, entry: u32) -> Result<(), Errno> {
        let at = HEADER_BYTES as u64 + block * size_of::<u32>() as u64;
        write_bytes(&self.file, at, &entry.to_le_bytes()).await
    }

    async fn set_length(&self, length: u64, preallocation: Preallocation) -> Result<(), Error> {
        let resize = Resize {
            length,
            preallocation,
        };
        self.file.node().resize(resize).await
    }

    /// Cuts what lies behind the last block.
    async fn cut(&self, end: u64) -> Result<(), Errno> {
        if self.file.node().length() <= end {
            return Ok(());
        }
        let cut = self.set_length(end, Preallocation::Off).await;
        cut.map_err(|error| error.errno.unwrap_or(Errno::EIO))
    }
}

impl Layout for Parallels {
    type Entry = u32;

    fn name(&self) -> &'static str {
        "parallels"
    }
    fn file(&self) -> &Edge {
        &self.file
    }
    fn takes_backing(&self) -> bool {
        true
    }
    fn backing(&self) -> Option<&Edge> {
        self.backing.as_ref()
    }
    fn mapping(&self, entry: u32) -> Mapping {
        self.offset(entry)
            .map_or(Mapping::Unallocated, Mapping::Data)
    }
    async fn reserve(&self, new: NewBlock) -> Result<(), Errno> {
        let end = new.offset + self.header.block_bytes();
        let mut length = self.growth.length.lock().await;
        if *length >= end {
            return Ok(());
        }
        let goal = end.saturating_add(self.growth.ahead).min(i64::MAX as u64);
        let mut grown = self.set_length(goal, self.growth.mode).await;
        if let Err(error) = &grown
            && error.errno == Some(Errno::EOPNOTSUPP)
        {
            tracing::debug!(%error, "no preallocation: the file is only made longer");
            grown = self.set_length(goal, Preallocation::Off).await;
        }
        grown.map_err(|error| error.errno.unwrap_or(Errno::EIO))?;
        *length = goal;
        Ok(())
    }
    async fn map_block(&self, new: NewBlock) -> Result<u32, Errno> {
        let entry = u32::try_from(new.offset / self.header.unit()).map_err(|_| Errno::EFBIG)?;
        self.write_entry(new.block, entry).await?;
        Ok(entry)
    }
    async fn close(&self, end: u64) -> Result<(), Errno> {
        if !self.writes {
            return Ok(());
        }
        self.cut(end).await?;
        self.flush().await?;
        self.write_mark(CLOSED).await?;
        self.log.reset(self.log.mark());
        self.log.remove();
        Ok(())
    }
    async fn check(
        &self,
        map: &BlockMap<u32>,
        options: CheckOptions,
        sink: &mut dyn CheckSink,
    ) -> Result<CheckResult, Error> {
        check::check(self, map, options, sink).await
    }
    fn describe(&self) -> Map<String, Value> {
        let mut members = Map::new();
        members.insert("dirty-flag".into(), json!(false));
        members
    }
    fn bitmap_store(&self) -> Option<&dyn BitmapStore> {
        self.bitmaps.is_some().then_some(self)
    }
}

impl BitmapStore for Parallels {
    fn set(&self) -> &Arc<BitmapSet> {
        let bitmaps = self.bitmaps.as_ref();
        bitmaps.expect("a store is told of when there are bitmaps")
    }
    fn can_store(&self, _name: &str, _granularity: u32) -> Result<(), Error> {
        Err(Error::operation_unsupported())
    }
    fn remove<'a>(&'a self, _name: &'a str) -> BoxFuture<'a, Result<(), Error>> {
        Box::pin(async { Err(Error::operation_unsupported()) })
    }
}
