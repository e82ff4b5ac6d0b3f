//! `vvfat`: a directory of the host as a disk with a FAT volume, to be read.
//!
//! Options: `dir`; `fat-type` (12, 16 or 32; 0: 12 on a floppy disk, else 16); `floppy` (a disk without
//! partitions); `label` (up to 11 bytes, "QEMU VVFAT" by default); `rw` is refused when on. By name:
//! `fat:[floppy:][12:|16:|32:]DIRECTORY`.
//!
//! The directory is looked at when the node is opened: what is added later is not there, what becomes
//! longer ends where it ended, what becomes shorter ends in zeroes. The disk is laid out in the order of
//! names, so that it is the same when it is opened again. Times are UTC.
//!
//! | file | owns |
//! |---|---|
//! | `tree.rs` | what is in the directory, and that nothing else is reached |
//! | `names.rs` | names as FAT has them |
//! | `records.rs` | the records of directories |
//! | `volume.rs` | where everything is on the disk |

mod names;
mod records;
#[cfg(test)]
mod tests;
mod tree;
mod volume;

use block::error::Result;
use block::open::DriverEntry;
use block::{
    BlockStatus, BoxFuture, Buffer, ByteRange, Driver, Edge, Errno, Error, ErrorKind,
    ImageIdentity, IoFuture, Limits, OpenRequest, Protocol, Reach, Resize, StatusExtent,
    WriteFlags, ZeroFlags,
};
use executor::File;
use executor::workers::offload;
use serde_json::{Map, Value, json};
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use tree::Tree;
use volume::{Geometry, Piece, Volume, Width};

const NAME: &str = "vvfat";
const DEFAULT_LABEL: &str = "QEMU VVFAT";
/// Most files that are held open.
const OPEN_FILES: usize = 16;

/// The table line of `vvfat`.
pub const ENTRY: DriverEntry = DriverEntry::new(NAME, |request| Box::pin(open(request)))
    .with_protocol(Protocol {
        prefixes: &["fat"],
        parse: |_, name| Ok(parse(name)),
        reach: Reach::Outside,
    })
    .with_strong_options(&["dir", "fat-type", "floppy", "label", "rw"]);

/// What stands before the directory is in any order; the rest is the directory, whatever is in it.
fn parse(name: &str) -> Map<String, Value> {
    let mut rest = name.strip_prefix("fat:").unwrap_or(name);
    let (mut fat_type, mut is_floppy, mut is_written) = (0, false, false);
    while let Some((word, after)) = rest.split_once(':') {
        match word {
            "12" => fat_type = 12,
            "16" => fat_type = 16,
            "32" => fat_type = 32,
            "floppy" => is_floppy = true,
            "rw" => is_written = true,
            _ => break,
        }
        rest = after;
    }
    let members = [
        ("dir", json!(rest)),
        ("fat-type", json!(fat_type)),
        ("floppy", json!(is_floppy)),
        ("rw", json!(is_written)),
    ];
    Map::from_iter(members.map(|(name, value)| (name.to_owned(), value)))
}

/// A directory shown as a disk.
pub struct Vvfat {
    directory: PathBuf,
    tree: Arc<Tree>,
    volume: Volume,
    /// Files that were read lately, the latest first.
    files: Mutex<Vec<(usize, File)>>,
}

async fn open(request: &mut OpenRequest<'_>) -> Result<Box<dyn Driver>> {
    let invalid = |message: &str| Error::new(ErrorKind::Invalid, message);
    let directory = request.take_str("dir")?;
    let directory =
        directory.ok_or_else(|| invalid("vvfat block driver requires a 'dir' option"))?;
    let width = match request.take_int("fat-type")?.unwrap_or(0) {
        0 => None,
        12 => Some(Width::Twelve),
        16 => Some(Width::Sixteen),
        32 => Some(Width::ThirtyTwo),
        _ => return Err(invalid("Valid FAT types are only 12, 16 and 32")),
    };
    let is_floppy = request.take_bool("floppy")?.unwrap_or(false);
    let label = request.take_str("label")?;
    let label = label.as_deref().unwrap_or(DEFAULT_LABEL).as_bytes();
    let mut padded = [b' '; names::SHORT];
    padded
        .get_mut(..label.len())
        .ok_or_else(|| invalid("vvfat label cannot be longer than 11 bytes"))?
        .copy_from_slice(label);
    if request.take_bool("rw")?.unwrap_or(false) {
        let message = "vvfat is only read: 'rw' is not supported";
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
    request.only_reads()?;
    let path = PathBuf::from(directory);
    let directory = std::path::absolute(&path).unwrap_or(path.clone());
    let shape = Geometry::new(is_floppy, width);
    let looked = offload(move || {
        let tree = Tree::scan(&path)?;
        let volume = Volume::new(&tree, shape, &padded)?;
        Ok::<_, Error>((tree, volume))
    });
    let (tree, volume) = looked.await?;
    Ok(Box::new(Vvfat {
        directory,
        tree: Arc::new(tree),
        volume,
        files: Mutex::default(),
    }))
}

impl Vvfat {
    /// A file, opened if it is not among those that are.
    async fn file(&self, index: usize) -> std::result::Result<File, Errno> {
        let recent = || self.files.lock().unwrap_or_else(PoisonError::into_inner);
        {
            let mut files = recent();
            if let Some(at) = files.iter().position(|(known, _)| *known == index) {
                files[..=at].rotate_right(1);
                return Ok(files[0].1.clone());
            }
        }
        let tree = Arc::clone(&self.tree);
        let opened = offload(move || tree.open_file(index)).await;
        let file = opened.and_then(File::from_fd).map_err(|error| {
            let file = self.directory.join(self.tree.path(index));
            tracing::warn!(file = %file.display(), %error, "a file of a vvfat disk cannot be read");
            to_errno(&error)
        })?;
        let mut files = recent();
        files.truncate(OPEN_FILES - 1);
        files.insert(0, (index, file.clone()));
        Ok(file)
    }

    /// Bytes of a file beyond those that it had when it was looked at are not shown.
    async fn read_file(
        &self,
        (index, offset): (usize, u64),
        buffer: Buffer,
    ) -> std::result::Result<(), Errno> {
        let size = u64::from(self.tree.entries()[index].size.unwrap_or(0));
        let there = size.saturating_sub(offset).min(buffer.len() as u64) as usize;
        buffer.slice(there..buffer.len()).fill(0);
        match there {
            0 => Ok(()),
            _ => {
                let file = self.file(index).await?;
                file.read_at(buffer.slice(0..there), offset).await
            }
        }
    }

    async fn fill(&self, offset: u64, buffer: Buffer) -> std::result::Result<(), Errno> {
        let mut done = 0;
        while done < buffer.len() {
            let (piece, length) = self.volume.piece(offset + done as u64);
            let length = length.min((buffer.len() - done) as u64) as usize;
            let part = buffer.slice(done..done + length);
            match piece {
                Piece::Zero => part.fill(0),
                Piece::Bytes(bytes) => part.copy_from_slice(&bytes[..length]),
                Piece::Fat(start) => {
                    let mut table = vec![0; length];
                    self.volume.fill_fat(start, &mut table);
                    part.copy_from_slice(&table);
                }
                Piece::File(index, at) => self.read_file((index, at), part).await?,
            }
            done += length;
        }
        Ok(())
    }
}

fn to_errno(error: &io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

impl Driver for Vvfat {
    fn driver_name(&self) -> &'static str {
        NAME
    }
    fn directories(&self) -> Vec<PathBuf> {
        vec![self.directory.clone()]
    }
    fn length(&self) -> u64 {
        self.volume.length()
    }
    fn limits(&self) -> Limits {
        Limits::default()
    }
    fn grows(&self) -> bool {
        false
    }
    fn read(&self, offset: u64, buffer: Buffer) -> IoFuture<'_> {
        IoFuture::boxed(self.fill(offset, buffer))
    }
    fn write(&self, _offset: u64, _buffer: Buffer, _flags: WriteFlags) -> IoFuture<'_> {
        IoFuture::error(Errno::EROFS)
    }
    fn write_zeroes(&self, _range: ByteRange, _flags: ZeroFlags) -> IoFuture<'_> {
        IoFuture::error(Errno::EROFS)
    }
    fn discard(&self, _range: ByteRange) -> IoFuture<'_> {
        IoFuture::error(Errno::EROFS)
    }
    fn flush(&self) -> IoFuture<'_> {
        IoFuture::done()
    }
    fn block_status(
        &self,
        range: ByteRange,
    ) -> BoxFuture<'_, std::result::Result<StatusExtent, Errno>> {
        let (piece, length) = self.volume.piece(range.offset);
        let zero = piece == Piece::Zero;
        let extent = StatusExtent {
            length: length.min(range.length),
            status: BlockStatus {
                data: !zero,
                zero,
                allocated: true,
                offset: None,
                compressed: false,
                sparse: false,
            },
        };
        Box::pin(async move { Ok(extent) })
    }
    fn resize(&self, _resize: Resize) -> BoxFuture<'_, Result<()>> {
        let message = "Image format driver does not support resize";
        Box::pin(async move { Err(Error::new(ErrorKind::Unsupported, message)) })
    }
    fn close(&self) -> BoxFuture<'_, std::result::Result<(), Errno>> {
        Box::pin(async { Ok(()) })
    }
    fn edges(&self) -> Vec<(&'static str, &Edge)> {
        Vec::new()
    }
    fn describe(&self) -> Map<String, Value> {
        Map::new()
    }
    fn identity(&self) -> Option<ImageIdentity> {
        None
    }
}
