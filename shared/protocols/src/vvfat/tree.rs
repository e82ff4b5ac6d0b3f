//! What is in a directory of the host, looked at once.
//!
//! Nothing outside of the directory is ever reached: names are resolved beneath it, symbolic links are
//! not followed. What a FAT volume cannot hold (links, sockets, devices, names that are not Unicode) is
//! left out, with a warning.

use block::error::{Error, ErrorKind, Result};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, openat2, statat};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

/// Most files and directories.
const MAX_ENTRIES: usize = 1 << 16;
/// Longest file: what a directory entry can express.
const MAX_FILE: u64 = u32::MAX as u64;

/// A file or a directory.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// The directory that it is in, by number; the top directory has its own.
    pub(super) parent: usize,
    /// What it is called there.
    pub(super) name: String,
    /// When it was changed, in seconds since 1970 (UTC).
    pub(super) modified: i64,
    /// Bytes of a file; `None` for a directory.
    pub(super) size: Option<u32>,
}

/// A directory with all that is in it.
#[derive(Debug)]
pub(super) struct Tree {
    root: OwnedFd,
    /// Each directory's entries follow one another, ordered by name; the first is the top directory.
    entries: Vec<Entry>,
}

const BENEATH: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS);

fn failed(directory: &Path) -> impl FnOnce(io::Error) -> Error {
    let message = format!("Could not read directory {}", directory.display());
    move |_| Error::new(ErrorKind::NotFound, message)
}

impl Tree {
    /// Looks at `directory`, and at all beneath it.
    ///
    /// # Errors
    /// `NotFound` when a directory cannot be read, `Unsupported` naming what does not fit on a FAT
    /// volume.
    pub(super) fn scan(directory: &Path) -> Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(directory, flags, Mode::empty());
        let root = root.map_err(|errno| failed(directory)(errno.into()))?;
        let top = Entry {
            parent: 0,
            name: String::new(),
            modified: modified(&root),
            size: None,
        };
        let mut tree = Self {
            root,
            entries: vec![top],
        };
        let mut next = 0;
        while next < tree.entries.len() {
            if tree.entries[next].size.is_none() {
                let path = directory.join(tree.path(next));
                tree.list(next).map_err(failed(&path))??;
            }
            next += 1;
        }
        Ok(tree)
    }

    /// Adds what is in the directory `parent`.
    fn list(&mut self, parent: usize) -> io::Result<Result<()>> {
        let path = self.path(parent);
        let directory = match parent {
            0 => self.root.try_clone()?,
            _ => self.open_beneath(&path, OFlags::DIRECTORY)?,
        };
        let mut found = Vec::new();
        for item in Dir::read_from(&directory)? {
            let item = item?;
            let name = match item.file_name().to_str() {
                Ok("." | "..") => continue,
                Ok(name) => name.to_owned(),
                Err(_) => {
                    let name = path.join(item.file_name().to_string_lossy().as_ref());
                    tracing::warn!(file = %name.display(), "left out: its name is not Unicode");
                    continue;
                }
            };
            match look(&directory, &path, parent, name)? {
                Ok(Some(entry)) => found.push(entry),
                Ok(None) => {}
                Err(error) => return Ok(Err(error)),
            }
            if self.entries.len() + found.len() > MAX_ENTRIES {
                let message = format!("More than {MAX_ENTRIES} files for one FAT volume");
                return Ok(Err(Error::new(ErrorKind::Unsupported, message)));
            }
        }
        // The order of a file system may change; a volume is to look the same when it is opened again.
        found.sort_by(|one, other| one.name.cmp(&other.name));
        self.entries.append(&mut found);
        Ok(Ok(()))
    }

    fn open_beneath(&self, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
        // Files may have become something else meanwhile: a FIFO would block.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | flags;
        Ok(openat2(&self.root, path, flags, Mode::empty(), BENEATH)?)
    }

    /// All entries.
    pub(super) fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Where an entry is, from the top directory.
    pub(super) fn path(&self, index: usize) -> PathBuf {
        let mut names = Vec::new();
        let mut at = index;
        while at != 0 {
            names.push(self.entries[at].name.as_str());
            at = self.entries[at].parent;
        }
        names.iter().rev().collect()
    }

    /// Opens a file for reading.
    ///
    /// # Errors
    /// The kernel's; `InvalidInput` when it is no file any more.
    pub(super) fn open_file(&self, index: usize) -> io::Result<OwnedFd> {
        let file = File::from(self.open_beneath(&self.path(index), OFlags::empty())?);
        match file.metadata()?.is_file() {
            true => Ok(file.into()),
            false => Err(io::ErrorKind::InvalidInput.into()),
        }
    }
}

/// The entry of `name` in `directory`; none for what is left out.
fn look(
    directory: &OwnedFd,
    path: &Path,
    parent: usize,
    name: String,
) -> io::Result<Result<Option<Entry>>> {
    let stat = statat(directory, name.as_str(), AtFlags::SYMLINK_NOFOLLOW)?;
    let size = match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => None,
        FileType::RegularFile => match u64::try_from(stat.st_size) {
            Ok(size) if size <= MAX_FILE => Some(size as u32),
            _ => {
                let path = path.join(name);
                let message = format!("File {} is too long for FAT (4 GiB)", path.display());
                return Ok(Err(Error::new(ErrorKind::Unsupported, message)));
            }
        },
        _ => {
            let path = path.join(name);
            tracing::warn!(file = %path.display(), "left out: neither a file nor a directory");
            return Ok(Ok(None));
        }
    };
    Ok(Ok(Some(Entry {
        parent,
        name,
        modified: stat.st_mtime,
        size,
    })))
}

fn modified(file: impl AsFd) -> i64 {
    rustix::fs::fstat(file).map_or(0, |stat| stat.st_mtime)
}
