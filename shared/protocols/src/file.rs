//! `file`: a regular file of the host.
//!
//! Options: `filename`; `aio` (`threads`, `native`, `io_uring`: accepted for compatibility, the
//! executor's ring is used whatever is asked for); `locking` (`auto`, `on`, `off`); `drop-cache`
//! (accepted, without effect: nothing is cached here). Of the options that every node has,
//! `cache.direct` opens with `O_DIRECT`, and `auto-read-only` falls back to a read-only descriptor
//! when the file may not be written.
//!
//! The length is that of the file, rounded up to a sector (512 bytes); the bytes that the file
//! lacks read as zeroes, and writing there makes it longer. Discard punches a hole, which reads as
//! zeroes. Holes are looked for only by `block_status`, never for I/O.
//!
//! Locks are QEMU's (see [`locks`]) and last as long as the node. Must not know: what is in the
//! file.

mod create;
pub mod locks;

use block::edge::Permissions;
use block::open::DriverEntry;
use block::{
    BlockStatus, BoxFuture, Buffer, ByteRange, Driver, Edge, Errno, Error, ErrorKind,
    ImageIdentity, IoFuture, Limits, OpenRequest, Preallocation, Protocol, Reach, Resize,
    StatusExtent, WriteFlags, ZeroFlags,
};
use executor::file::Fallocate;
use executor::{File, OpenOptions};
use locks::{Locking, Locks};
use serde_json::{Map, Value};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

/// Lengths are multiples of this many bytes.
const SECTOR: u64 = 512;

/// Bytes written to a new file.
const FIRST_BLOCK: u64 = 4096;

/// Bytes written at a time by `preallocation=full`.
const FILL_BYTES: u64 = 1 << 20;

/// The table line of `file`.
pub const ENTRY: DriverEntry = DriverEntry::new("file", |request| Box::pin(open(request)))
    .with_create(create::CREATOR)
    .with_protocol(Protocol {
        prefixes: &["file"],
        parse: |_, name| {
            let path = name.strip_prefix("file:").unwrap_or(name);
            Ok(Map::from_iter([("filename".to_owned(), path.into())]))
        },
        reach: Reach::File,
    });

/// A regular file.
pub struct FileNode {
    file: File,
    path: String,
    length: AtomicU64,
    /// The file system has no `FALLOC_FL_ZERO_RANGE`.
    lacks_zero_range: AtomicBool,
    locks: Locks,
}

async fn open(request: &mut OpenRequest<'_>) -> block::error::Result<Box<dyn Driver>> {
    let path = match request.take_str("filename")? {
        None => return Err(request.missing("filename")),
        Some(path) if path.is_empty() => {
            let message = "The 'file' block driver requires a file name";
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        Some(path) => path,
    };
    let aio = request.take_choice("aio", &["threads", "native", "io_uring"])?;
    let locking = request.take_choice("locking", &["auto", "on", "off"])?;
    request.take_bool("drop-cache")?;
    if aio == Some(1) && !request.node().cache_direct {
        let message = "aio=native was specified, but it requires cache.direct=on, which was not \
                       specified.";
        return Err(Error::new(ErrorKind::Invalid, message));
    }
    let locking = match locking {
        Some(2) => Locking::Off,
        Some(1) => Locking::On,
        _ => Locking::Auto,
    };
    let file = open_file(request, &path)?;
    let node = FileNode::new(file, path, locking)?;
    if !request.node().read_only {
        node.locks.settle(&node.file).await;
    }
    Ok(Box::new(node))
}

fn open_file(request: &mut OpenRequest<'_>, path: &str) -> block::error::Result<File> {
    let failed = |error: io::Error| could_not_open(path, &error);
    if let Some(descriptor) = request.take_descriptor() {
        if request.node().cache_direct {
            set_direct(&descriptor)
                .map_err(|errno| Error::io(format!("Could not open '{path}'"), errno))?;
        }
        return File::from_fd(descriptor).map_err(failed);
    }
    // Before opening: that of a FIFO blocks, that of a device may do anything.
    if let Ok(metadata) = std::fs::metadata(path) {
        check_type(path, &metadata)?;
    }
    let options = OpenOptions {
        write: !request.node().read_only,
        direct: request.node().cache_direct,
        ..OpenOptions::default()
    };
    match File::open(Path::new(path), &options) {
        Err(error) if options.write && request.node().auto_read_only && is_refusal(&error) => {
            request.set_read_only();
            let options = OpenOptions {
                write: false,
                ..options
            };
            File::open(Path::new(path), &options).map_err(failed)
        }
        result => result.map_err(failed),
    }
}

/// Whether a file may be opened for reading though not for writing.
fn is_refusal(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EACCES | libc::EROFS | libc::EPERM)
    )
}

fn could_not_open(path: &str, error: &io::Error) -> Error {
    let errno = Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
    Error::io(format!("Could not open '{path}'"), errno)
}

fn set_direct(descriptor: &impl std::os::fd::AsFd) -> Result<(), Errno> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    fcntl(descriptor, FcntlArg::F_SETFL(OFlag::O_DIRECT)).map(|_| ())
}

fn check_type(path: &str, metadata: &std::fs::Metadata) -> block::error::Result<()> {
    let kind = metadata.file_type();
    if kind.is_file() {
        return Ok(());
    }
    if kind.is_dir() {
        return Err(Error::io(format!("Could not open '{path}'"), Errno::EISDIR));
    }
    let message = format!("'file' driver requires '{path}' to be a regular file");
    let error = Error::new(ErrorKind::Invalid, message);
    Err(match kind.is_block_device() {
        true => error.with_hint("Use driver 'host_device' for a block device."),
        false => error,
    })
}

fn round_up(length: u64) -> u64 {
    length.checked_next_multiple_of(SECTOR).unwrap_or(length)
}

impl FileNode {
    /// A node on an open file; `path` is what it is called in messages.
    pub fn new(file: File, path: String, locking: Locking) -> block::error::Result<Self> {
        let length = file.len().map_err(|error| could_not_open(&path, &error))?;
        Ok(Self {
            locks: Locks::new(locking, path.clone()),
            file,
            path,
            length: AtomicU64::new(round_up(length)),
            lacks_zero_range: AtomicBool::new(false),
        })
    }

    async fn zero(&self, range: ByteRange, flags: ZeroFlags) -> Result<(), Errno> {
        if range.length == 0 {
            return Ok(());
        }
        let end = range.checked_end().ok_or(Errno::EINVAL)?;
        self.reach(range, end).await?;
        if flags.may_unmap {
            return self.allocate(Fallocate::PunchHole, range).await;
        }
        if !self.lacks_zero_range.load(Ordering::Relaxed) {
            match self.allocate(Fallocate::ZeroRange, range).await {
                Err(Errno::EOPNOTSUPP) => self.lacks_zero_range.store(true, Ordering::Relaxed),
                result => return result,
            }
        }
        self.allocate(Fallocate::PunchHole, range).await?;
        self.allocate(Fallocate::Allocate, range).await
    }

    async fn allocate(&self, mode: Fallocate, range: ByteRange) -> Result<(), Errno> {
        self.file.fallocate(mode, range.offset, range.length).await
    }

    /// Makes the file reach `end`, the end of `range`, whose content does not matter. It is done by
    /// a write and not by setting the length, which could cut off what others append meanwhile.
    async fn reach(&self, range: ByteRange, end: u64) -> Result<(), Errno> {
        let length = self.file.len().map_err(|error| to_errno(&error))?;
        if length >= end {
            return Ok(());
        }
        let last = (self.file.alignment().offset.max(1) as u64).min(range.length);
        let zeroes = Buffer::zeroed(last as usize);
        self.file.write_at(zeroes, end - last).await?;
        self.length.fetch_max(round_up(end), Ordering::Relaxed);
        Ok(())
    }

    async fn status(&self, range: ByteRange) -> Result<StatusExtent, Errno> {
        let end = range.checked_end().ok_or(Errno::EINVAL)?;
        let (data, until) = match self.file.next_data(range.offset) {
            // Where holes cannot be told, everything is data.
            Err(_) => (true, end),
            Ok(None) => (false, end),
            Ok(Some((start, _))) if start > range.offset => (false, start),
            Ok(Some((_, data_end))) => (true, data_end.max(range.offset + 1)),
        };
        Ok(StatusExtent {
            length: until.min(end) - range.offset,
            status: BlockStatus {
                data,
                zero: !data,
                allocated: true,
                offset: Some(range.offset),
                compressed: false,
                sparse: false,
            },
        })
    }

    async fn set_length(&self, resize: Resize) -> Result<(), Error> {
        let old = self
            .file
            .len()
            .map_err(|error| self.resize_failed(to_errno(&error)))?;
        if resize.length < old && resize.preallocation != Preallocation::Off {
            let message = "Preallocation can't be used for shrinking files";
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        if resize.preallocation == Preallocation::Metadata {
            let message = "Unsupported preallocation mode: metadata";
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        self.file
            .set_len(resize.length)
            .await
            .map_err(|errno| self.resize_failed(errno))?;
        self.length
            .store(round_up(resize.length), Ordering::Relaxed);
        let added = ByteRange::new(old, resize.length.saturating_sub(old));
        let filled = match resize.preallocation {
            Preallocation::Falloc if added.length > 0 => {
                self.allocate(Fallocate::Allocate, added).await
            }
            Preallocation::Full => self.fill(added).await,
            Preallocation::Off if old == 0 => self.allocate_first_block(added.length).await,
            _ => Ok(()),
        };
        if let Err(errno) = filled {
            self.file.set_len(old).await.ok();
            self.length.store(round_up(old), Ordering::Relaxed);
            let context = "Could not pre-allocate data for the new area";
            return Err(Error::io(context, errno));
        }
        Ok(())
    }

    /// A new file gets its first block: file systems tell the alignment of direct I/O by trying it
    /// there, and a hole answers for every alignment.
    async fn allocate_first_block(&self, length: u64) -> Result<(), Errno> {
        let block = self.file.alignment().offset.max(1) as u64;
        let first = FIRST_BLOCK.max(block).min(length) / block * block;
        let zeroes = Buffer::zeroed(first as usize);
        self.file.write_at(zeroes, 0).await
    }

    /// Writes zeroes to new space, whole aligned blocks around it included where `O_DIRECT` asks
    /// for that.
    async fn fill(&self, added: ByteRange) -> Result<(), Errno> {
        let block = self.file.alignment().offset.max(1) as u64;
        let mut at = added.offset.next_multiple_of(block);
        let end = added.offset + added.length;
        let zeroes = Buffer::zeroed(FILL_BYTES as usize);
        while at < end {
            let length = FILL_BYTES.min(end - at) / block * block;
            if length == 0 {
                break;
            }
            self.file
                .write_at(zeroes.slice(0..length as usize), at)
                .await?;
            at += length;
        }
        Ok(())
    }

    fn resize_failed(&self, errno: Errno) -> Error {
        Error::io(format!("Failed to resize '{}'", self.path), errno)
    }
}

fn to_errno(error: &io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
}

impl Driver for FileNode {
    fn driver_name(&self) -> &'static str {
        "file"
    }
    fn length(&self) -> u64 {
        self.length.load(Ordering::Relaxed)
    }
    fn limits(&self) -> Limits {
        let alignment = self.file.alignment();
        Limits {
            request_alignment: alignment.offset.max(alignment.memory) as u32,
            memory_alignment: alignment.memory as u32,
            ..Limits::default()
        }
    }
    fn grows(&self) -> bool {
        true
    }
    fn prefetch(&self, offset: u64) {
        self.file.prefetch(offset);
    }
    fn can_prefetch(&self) -> bool {
        self.file.is_mapped()
    }
    fn read(&self, offset: u64, buffer: Buffer) -> IoFuture<'_> {
        self.file.read_at(buffer, offset).into()
    }
    fn write(&self, offset: u64, buffer: Buffer, _flags: WriteFlags) -> IoFuture<'_> {
        let end = offset + buffer.len() as u64;
        if end > self.length.load(Ordering::Relaxed) {
            self.length.fetch_max(round_up(end), Ordering::Relaxed);
        }
        self.file.write_at(buffer, offset).into()
    }
    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> IoFuture<'_> {
        IoFuture::boxed(self.zero(range, flags))
    }
    fn discard(&self, range: ByteRange) -> IoFuture<'_> {
        self.file
            .fallocate(Fallocate::PunchHole, range.offset, range.length)
            .into()
    }
    fn flush(&self) -> IoFuture<'_> {
        self.file.sync_data().into()
    }
    fn block_status(&self, range: ByteRange) -> BoxFuture<'_, Result<StatusExtent, Errno>> {
        Box::pin(self.status(range))
    }
    fn resize(&self, resize: Resize) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(self.set_length(resize))
    }
    fn close(&self) -> BoxFuture<'_, Result<(), Errno>> {
        Box::pin(async {
            self.locks.release(&self.file);
            Ok(())
        })
    }
    fn set_permissions(&self, permissions: Permissions, shared: Permissions) -> Result<(), Error> {
        self.locks.set(&self.file, permissions, shared)
    }
    fn delete_file(&self) -> Result<(), Error> {
        std::fs::remove_file(&self.path).map_err(|error| {
            Error::io(
                format!("Could not delete '{}'", self.path),
                to_errno(&error),
            )
        })
    }
    fn edges(&self) -> Vec<(&'static str, &Edge)> {
        Vec::new()
    }
    fn describe(&self) -> Map<String, Value> {
        let blocks = self
            .file
            .as_fd()
            .and_then(|fd| nix::sys::stat::fstat(fd).ok())
            .map(|stat| stat.st_blocks.cast_unsigned().saturating_mul(512));
        blocks
            .map(|bytes| ("actual-size".to_owned(), Value::from(bytes)))
            .into_iter()
            .collect()
    }
    fn filename(&self) -> String {
        self.path.clone()
    }

    fn identity(&self) -> Option<ImageIdentity> {
        let fd = self.file.as_fd()?.try_clone_to_owned().ok()?;
        let metadata = std::fs::File::from(fd).metadata().ok()?;
        let since_epoch = |time: SystemTime| {
            let duration = time.duration_since(UNIX_EPOCH).ok()?;
            u64::try_from(duration.as_nanos()).ok()
        };
        Some(ImageIdentity {
            device: metadata.dev(),
            inode: metadata.ino(),
            born_ns: metadata.created().ok().and_then(since_epoch).unwrap_or(0),
            modified_ns: since_epoch(metadata.modified().ok()?)?,
        })
    }
}
