//! `file`: a regular file of the host; `host_device`: a block or character device; `host_cdrom`: the
//! same, by the name that it has in QEMU where guests see trays.
//!
//! Options: `filename`; `aio` (`threads`, `native`, `io_uring`: accepted for compatibility, the
//! executor's ring is used whatever is asked for); `locking` (`auto`, `on`, `off`); `drop-cache`
//! and `x-check-cache-dropped` (accepted, without effect: nothing is cached here), `aio-max-batch`
//! (the same: the ring has no such limit); `pr-manager` is refused. Of the options that every node has,
//! `cache.direct` opens with `O_DIRECT`, and `auto-read-only` falls back to a read-only descriptor
//! when the file may not be written.
//!
//! The length is that of the file, rounded up to a sector (512 bytes); the bytes that the file
//! lacks read as zeroes, and writing there makes it longer (a device has the length that it has).
//! Discard punches a hole, which reads as
//! zeroes. Holes are looked for only by `block_status`, never for I/O.
//!
//! Locks are QEMU's (see [`locks`]) and last as long as the node. Must not know: what is in the
//! file.

mod create;
pub mod locks;

use block::edge::Permissions;
use block::naming::has_protocol;
use block::open::DriverEntry;
use block::{
    BlockStatus, BoxFuture, Buffer, ByteRange, Driver, Edge, Errno, Error, ErrorKind,
    ImageIdentity, IoFuture, Limits, OpenRequest, Preallocation, Protocol, Reach, Resize,
    StatusExtent, Stored, StoredUse, WriteFlags, ZeroFlags,
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
pub const ENTRY: DriverEntry =
    DriverEntry::new("file", |request| Box::pin(open(request, Storage::File)))
        .with_create(create::CREATOR)
        .with_protocol(Protocol {
            prefixes: &["file"],
            parse: |_, name| Ok(filename_of(&without_prefix("file:", name))),
            reach: Reach::File,
        });

/// The table line of `host_device`.
pub const DEVICE_ENTRY: DriverEntry = DriverEntry::new("host_device", |request| {
    Box::pin(open(request, Storage::Device))
})
.with_protocol(Protocol {
    prefixes: &["host_device"],
    parse: |_, name| Ok(filename_of(&without_prefix("host_device:", name))),
    reach: Reach::Outside,
});

/// The table line of `host_cdrom`.
pub const CDROM_ENTRY: DriverEntry = DriverEntry::new("host_cdrom", |request| {
    Box::pin(open(request, Storage::Cdrom))
})
.with_protocol(Protocol {
    prefixes: &["host_cdrom"],
    parse: |_, name| Ok(filename_of(&without_prefix("host_cdrom:", name))),
    reach: Reach::Outside,
});

/// The path behind `prefix`, spelled so that no protocol is seen in it.
fn without_prefix(prefix: &str, name: &str) -> String {
    match name.strip_prefix(prefix) {
        Some(path) if has_protocol(path) => format!("./{path}"),
        Some(path) => path.to_owned(),
        None => name.to_owned(),
    }
}

fn filename_of(path: &str) -> Map<String, Value> {
    Map::from_iter([("filename".to_owned(), path.into())])
}

/// What a node's bytes are in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Storage {
    /// A regular file.
    File,
    /// A block or character device: its length is what it is.
    Device,
    /// A device with a tray.
    Cdrom,
}

impl Storage {
    fn driver_name(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Device => "host_device",
            Self::Cdrom => "host_cdrom",
        }
    }

    /// Whether a file of this kind is what the driver is for.
    fn check(self, path: &str, kind: std::fs::FileType) -> block::error::Result<()> {
        let wanted = match self {
            Self::File if kind.is_file() => return Ok(()),
            Self::File => "a regular file",
            _ if kind.is_block_device() || kind.is_char_device() => return Ok(()),
            _ => "either a character or block device",
        };
        let name = self.driver_name();
        let message = format!("'{name}' driver requires '{path}' to be {wanted}");
        let error = Error::new(ErrorKind::Invalid, message);
        Err(match self == Self::File && kind.is_block_device() {
            true => error.with_hint("Use driver 'host_device' for a block device."),
            false => error,
        })
    }
}

/// A regular file, or a device.
pub struct FileNode {
    file: File,
    storage: Storage,
    is_character_device: bool,
    path: String,
    length: AtomicU64,
    discards: Discards,
    /// The file system has no `FALLOC_FL_ZERO_RANGE`.
    lacks_zero_range: AtomicBool,
    locks: Locks,
}

/// Discards that the kernel was asked for.
#[derive(Default)]
struct Discards {
    done: AtomicU64,
    failed: AtomicU64,
    /// Bytes of those that were done.
    bytes: AtomicU64,
}

impl Discards {
    fn count(&self, range: ByteRange, succeeded: bool) {
        if succeeded {
            self.done.fetch_add(1, Ordering::Relaxed);
            self.bytes.fetch_add(range.length, Ordering::Relaxed);
        } else {
            self.failed.fetch_add(1, Ordering::Relaxed);
        }
    }
}

async fn open(
    request: &mut OpenRequest<'_>,
    storage: Storage,
) -> block::error::Result<Box<dyn Driver>> {
    let path = match request.take_str("filename")? {
        None => return Err(request.missing("filename")),
        Some(path) if path.is_empty() => {
            let name = storage.driver_name();
            let message = format!("The '{name}' block driver requires a file name");
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        Some(path) => path,
    };
    let aio = request.take_choice("aio", &["threads", "native", "io_uring"])?;
    let locking = request.take_choice("locking", &["auto", "on", "off"])?;
    request.take_bool("drop-cache")?;
    request.take_bool("x-check-cache-dropped")?;
    request.take_size("aio-max-batch")?;
    if request.take_str("pr-manager")?.is_some() {
        let message = "pr-manager is not supported: no SCSI command is passed to a device";
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
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
    let file = open_file(request, (&path, storage))?;
    let mut node = FileNode::new(file, path, locking)?;
    node.storage = storage;
    if !request.node().read_only {
        node.locks.settle(&node.file).await;
    }
    Ok(Box::new(node))
}

fn open_file(
    request: &mut OpenRequest<'_>,
    (path, storage): (&str, Storage),
) -> block::error::Result<File> {
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
        let kind = metadata.file_type();
        if kind.is_dir() && !request.node().read_only {
            return Err(Error::io(format!("Could not open '{path}'"), Errno::EISDIR));
        }
        storage.check(path, kind)?;
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

/// What the mode says that a file is; `None` in a simulated world.
fn file_kind(file: &File) -> Option<libc::mode_t> {
    let stat = nix::sys::stat::fstat(file.as_fd()?).ok()?;
    Some(stat.st_mode & libc::S_IFMT)
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
            is_character_device: file_kind(&file) == Some(libc::S_IFCHR),
            file,
            storage: Storage::File,
            path,
            length: AtomicU64::new(round_up(length)),
            discards: Discards::default(),
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

    /// Devices take whole blocks only, and some take nothing: the node writes zeroes then.
    async fn zero_device(&self, range: ByteRange, flags: ZeroFlags) -> Result<(), Errno> {
        let mode = match flags.may_unmap {
            true => Fallocate::PunchHole,
            false => Fallocate::ZeroRange,
        };
        match self.allocate(mode, range).await {
            Err(Errno::EINVAL) => Err(Errno::EOPNOTSUPP),
            result => result,
        }
    }

    /// A device that cannot give blocks up keeps them.
    async fn punch_hole(&self, range: ByteRange) -> Result<(), Errno> {
        let result = self.allocate(Fallocate::PunchHole, range).await;
        self.discards.count(range, result.is_ok());
        match result {
            // Devices may take none.
            Err(Errno::EINVAL | Errno::EOPNOTSUPP) if self.storage != Storage::File => Ok(()),
            result => result,
        }
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
        // Direct I/O has no part of a block: the last one is data to its end.
        let block = u64::from(self.limits().request_alignment);
        let until = match data {
            true => until.checked_next_multiple_of(block).unwrap_or(until),
            false => until,
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
        if self.storage != Storage::File {
            return self.check_device_length(resize);
        }
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

    fn check_device_length(&self, resize: Resize) -> Result<(), Error> {
        let refuse = |message: &str| Err(Error::new(ErrorKind::Unsupported, message));
        match resize.length.cmp(&self.length.load(Ordering::Relaxed)) {
            std::cmp::Ordering::Equal => Ok(()),
            std::cmp::Ordering::Greater => refuse("Cannot grow device files"),
            std::cmp::Ordering::Less => refuse("Cannot resize device files"),
        }
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
        self.storage.driver_name()
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
        self.storage == Storage::File
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
    fn reads_zero_when_new(&self) -> bool {
        // Other files keep what they held when they are made anew.
        file_kind(&self.file).is_none_or(|kind| kind == libc::S_IFREG)
    }
    fn write(&self, offset: u64, buffer: Buffer, _flags: WriteFlags) -> IoFuture<'_> {
        let end = offset + buffer.len() as u64;
        if end > self.length.load(Ordering::Relaxed) {
            self.length.fetch_max(round_up(end), Ordering::Relaxed);
        }
        self.file.write_at(buffer, offset).into()
    }
    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> IoFuture<'_> {
        match self.storage {
            Storage::File => IoFuture::boxed(self.zero(range, flags)),
            Storage::Device | Storage::Cdrom => IoFuture::boxed(self.zero_device(range, flags)),
        }
    }
    fn discard(&self, range: ByteRange) -> IoFuture<'_> {
        IoFuture::boxed(self.punch_hole(range))
    }
    fn flush(&self) -> IoFuture<'_> {
        let sync = self.file.sync_data();
        if !self.is_character_device {
            return sync.into();
        }
        // Most of them have nothing that could be made durable, and say so.
        IoFuture::boxed(async move {
            match sync.await {
                Err(Errno::EINVAL) => Ok(()),
                result => result,
            }
        })
    }
    fn block_status(&self, range: ByteRange) -> BoxFuture<'_, Result<StatusExtent, Errno>> {
        Box::pin(self.status(range))
    }
    fn stored(&self, range: ByteRange, _purpose: StoredUse) -> Option<Stored<'_>> {
        (self.storage == Storage::File).then_some(Stored {
            file: &self.file,
            offset: range.offset,
        })
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
    fn statistics(&self) -> Map<String, Value> {
        let counted = [
            ("discard-nb-ok", &self.discards.done),
            ("discard-nb-failed", &self.discards.failed),
            ("discard-bytes-ok", &self.discards.bytes),
        ];
        let counted = counted.into_iter();
        counted
            .map(|(name, count)| (name.to_owned(), count.load(Ordering::Relaxed).into()))
            .collect()
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
