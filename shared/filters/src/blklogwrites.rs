//! `blklogwrites`: every change of the disk is also appended to a log, in the format of Linux's
//! device-mapper target `log-writes` (Documentation/admin-guide/device-mapper/log-writes.rst).
//!
//! Options: `file`; `log`; `log-sector-size` (512); `log-append`, which goes on with the log that is there;
//! `log-super-update-interval` (4096 entries).
//!
//! ```text
//!   sector 0    superblock   0 magic u64 · 8 version u64 · 16 entries u64 · 24 sector size u32, little endian
//!   then, each in whole sectors:
//!     entry     0 sector u64 · 8 sectors u64 · 16 flags u64 (1 flush, 2 FUA, 4 discard, 8 mark) · 24 data length u64
//!     data      of a write: `sectors` of them
//! ```
//!
//! Promises: an entry is in the log when its request completes; the superblock counts an entry only
//! once it is written, and all of them after a flush. Entries are written one at a time. Must not
//! know: what is logged to.

use crate::filter::{Filter, FilterNode};
use block::error::Result;
use block::open::{ChildRole, DriverEntry};
use block::{
    Buffer, ByteRange, Driver, Edge, Errno, Error, ErrorKind, HeapBuffer, IoFuture, Limits, Node,
    OpenRequest, WriteFlags, ZeroFlags,
};
use executor::sync::Mutex;

/// The table line of `blklogwrites`.
pub const ENTRY: DriverEntry = DriverEntry::new("blklogwrites", |request| Box::pin(open(request)));

const MAGIC: u64 = 0x006a_7366_7773_6872;
const VERSION: u64 = 1;
const SUPERBLOCK_BYTES: u64 = 28;
const ENTRY_BYTES: u64 = 32;

const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;
const MARK: u64 = 8;
const KNOWN_FLAGS: u64 = FLUSH | FUA | DISCARD | MARK;

const DEFAULT_SECTOR: u64 = 512;
/// The device-mapper target cannot have more.
const MAX_SECTOR: u64 = 1 << 23;
const DEFAULT_INTERVAL: u64 = 4096;

/// Largest write: it is copied behind its entry.
const MAX_TRANSFER: u32 = 64 << 20;

/// The filter.
struct LogWrites {
    file: Edge,
    log: Edge,
    sector_bytes: u64,
    /// The superblock follows after this many entries.
    interval: u64,
    end: Mutex<End>,
}

/// Where the log ends.
struct End {
    sector: u64,
    entries: u64,
}

/// A change of the disk.
struct Change {
    range: ByteRange,
    flags: u64,
    data: Data,
}

/// What a change writes.
enum Data {
    Nothing,
    Bytes(Buffer),
    Zeroes,
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Invalid, message)
}

async fn open(request: &mut OpenRequest<'_>) -> Result<Box<dyn Driver>> {
    let file = request.required_child("file", ChildRole::Filtered).await?;
    let append = request.take_bool("log-append")?.unwrap_or(false);
    let given = request.take_size("log-sector-size")?;
    let interval = request
        .take_size("log-super-update-interval")?
        .unwrap_or(DEFAULT_INTERVAL);
    let log = request.required_child("log", ChildRole::Image).await?;
    if append && given.is_some() {
        let message = "log-append and log-sector-size are mutually exclusive";
        return Err(invalid(message));
    }
    let (sector_bytes, end) = match append {
        true => find_end(log.node()).await?,
        false => {
            let end = End {
                sector: 1,
                entries: 0,
            };
            (check_sector(given.unwrap_or(DEFAULT_SECTOR))?, end)
        }
    };
    if interval == 0 {
        let message = format!("Invalid log superblock update interval {interval}");
        return Err(invalid(message));
    }
    Ok(Box::new(FilterNode(LogWrites {
        file,
        log,
        sector_bytes,
        interval,
        end: Mutex::new(end),
    })))
}

fn check_sector(bytes: u64) -> Result<u64> {
    let possible = bytes.is_power_of_two() && (ENTRY_BYTES..=MAX_SECTOR).contains(&bytes);
    match possible {
        true => Ok(bytes),
        false => Err(invalid(format!("Invalid log sector size {bytes}"))),
    }
}

/// The sector size of a log that is there, and where it ends.
async fn find_end(log: &Node) -> Result<(u64, End)> {
    let superblock = read(log, 0, SUPERBLOCK_BYTES)
        .await
        .map_err(|errno| Error::io("Could not read log superblock", errno))?;
    if word(&superblock, 0) != MAGIC {
        return Err(invalid("Invalid log superblock magic"));
    }
    let version = word(&superblock, 8);
    if version != VERSION {
        return Err(invalid(format!("Unsupported log version {version}")));
    }
    let sector_bytes = check_sector(word(&superblock, 20) >> 32)?;
    let entries = word(&superblock, 16);
    let mut sector = 1_u64;
    for number in 0..entries {
        let failed = |errno| Error::io(format!("Failed to read log entry {number}"), errno);
        let offset = sector.checked_mul(sector_bytes).ok_or(failed(Errno::EIO))?;
        if offset >= log.length() {
            return Err(failed(Errno::EIO));
        }
        let entry = read(log, offset, ENTRY_BYTES).await.map_err(failed)?;
        let flags = word(&entry, 16);
        if flags & !KNOWN_FLAGS != 0 {
            let message = format!("Invalid flags 0x{flags:x} in log entry {number}");
            return Err(invalid(message));
        }
        let data = match flags & DISCARD {
            0 => word(&entry, 8),
            _ => 0,
        };
        sector = sector
            .checked_add(1)
            .and_then(|sector| sector.checked_add(data))
            .ok_or(failed(Errno::EIO))?;
    }
    Ok((sector_bytes, End { sector, entries }))
}

async fn read(log: &Node, offset: u64, length: u64) -> std::result::Result<HeapBuffer, Errno> {
    let buffer = Buffer::zeroed(length as usize);
    log.read(offset, buffer.clone()).await?;
    Ok(buffer.to_heap())
}

/// The number at `offset` of a structure.
fn word(bytes: &[u8], offset: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[offset..offset + 8]);
    u64::from_le_bytes(word)
}

impl LogWrites {
    /// Carries a request out on the disk and logs it then.
    fn logged<'a>(&'a self, request: IoFuture<'a>, change: Change) -> IoFuture<'a> {
        IoFuture::boxed(async move {
            request.await?;
            self.append(change).await
        })
    }

    async fn append(&self, change: Change) -> std::result::Result<(), Errno> {
        let mut end = self.end.lock().await;
        let sectors = change.range.length / self.sector_bytes;
        let data = match &change.data {
            Data::Bytes(data) => data.len() as u64,
            Data::Nothing | Data::Zeroes => 0,
        };
        let mut record = HeapBuffer::zeroed((self.sector_bytes + data) as usize);
        let sector = change.range.offset / self.sector_bytes;
        for (index, number) in [sector, sectors, change.flags].into_iter().enumerate() {
            record[index * 8..index * 8 + 8].copy_from_slice(&number.to_le_bytes());
        }
        if let Data::Bytes(data) = &change.data {
            data.copy_to_slice(&mut record[self.sector_bytes as usize..]);
        }
        let log = self.log.node();
        let at = end.sector * self.sector_bytes;
        let flags = WriteFlags::default();
        log.write(at, record.into_buffer(), flags).await?;
        end.sector += 1 + data / self.sector_bytes;
        if matches!(change.data, Data::Zeroes) {
            let range = ByteRange::new(end.sector * self.sector_bytes, change.range.length);
            log.write_zeroes(range, ZeroFlags::default()).await?;
            end.sector += sectors;
        }
        end.entries += 1;
        if change.flags & FLUSH != 0 || end.entries.is_multiple_of(self.interval) {
            self.write_superblock(end.entries).await?;
        }
        Ok(())
    }

    async fn write_superblock(&self, entries: u64) -> std::result::Result<(), Errno> {
        let mut superblock = HeapBuffer::zeroed(self.sector_bytes as usize);
        for (index, number) in [MAGIC, VERSION, entries].into_iter().enumerate() {
            superblock[index * 8..index * 8 + 8].copy_from_slice(&number.to_le_bytes());
        }
        superblock[24..28].copy_from_slice(&(self.sector_bytes as u32).to_le_bytes());
        let log = self.log.node();
        // The entries first: the superblock vouches for them.
        log.flush().await?;
        let flags = WriteFlags {
            fua: true,
            ..WriteFlags::default()
        };
        log.write(0, superblock.into_buffer(), flags).await
    }
}

impl Filter for LogWrites {
    fn name(&self) -> &'static str {
        "blklogwrites"
    }
    fn edge(&self) -> &Edge {
        &self.file
    }
    fn edges(&self) -> Vec<(&'static str, &Edge)> {
        vec![("file", &self.file), ("log", &self.log)]
    }
    fn limits(&self) -> Limits {
        let child = self.child().driver().limits();
        Limits {
            request_alignment: self.sector_bytes as u32,
            max_transfer: MAX_TRANSFER.max(self.sector_bytes as u32),
            ..child.passed_on()
        }
    }
    fn compresses(&self) -> bool {
        false
    }
    fn write(&self, offset: u64, buffer: Buffer, flags: WriteFlags) -> IoFuture<'_> {
        // The disk and the log get the same bytes, whatever the guest does to its own.
        let buffer = crate::together::private_copy(&buffer);
        let change = Change {
            range: ByteRange::new(offset, buffer.len() as u64),
            flags: 0,
            data: Data::Bytes(buffer.clone()),
        };
        self.logged(self.child().write(offset, buffer, flags), change)
    }
    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> IoFuture<'_> {
        let change = Change {
            range,
            flags: 0,
            data: Data::Zeroes,
        };
        self.logged(self.child().write_zeroes(range, flags), change)
    }
    fn discard(&self, range: ByteRange) -> IoFuture<'_> {
        let change = Change {
            range,
            flags: DISCARD,
            data: Data::Nothing,
        };
        self.logged(self.child().discard(range), change)
    }
    fn flush(&self) -> IoFuture<'_> {
        let change = Change {
            range: ByteRange::new(0, 0),
            flags: FLUSH,
            data: Data::Nothing,
        };
        self.logged(self.child().flush(), change)
    }
}
