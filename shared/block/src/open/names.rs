//! The policy for names that images hold.
//!
//! An image may come from anybody, so a name in it opens nothing but a regular file that resolves
//! beneath the directory of the image that names it, or beneath a directory that the user allowed.
//! `openat2(RESOLVE_BENEATH)` does the resolving: no `..` and no symbolic link leads out, however
//! the tree changes meanwhile. The descriptor that was checked is the one that is used.
//! Names with a protocol (`json:`, `nbd:`, ...) become nodes that obey the same policy: files are
//! found as above (relative to where the process is), and drivers that reach for anything else are
//! refused unless the user allowed them.

use crate::error::{Error, ErrorKind, Result};
use crate::graph::NamePolicy;
use crate::open::Inherited;
use executor::Errno;
use nix::fcntl::{FcntlArg, OFlag, OpenHow, ResolveFlag, fcntl, openat2};
use nix::sys::stat::{SFlag, fstat};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

/// Longest name, in bytes (that of qcow2).
const MAX_NAME: usize = 1023;

/// A file's identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileId {
    device: u64,
    inode: u64,
}

impl FileId {
    /// The identity of the file at `path`, if there is one.
    pub(crate) fn of_path(path: &str) -> Option<FileId> {
        use std::os::unix::fs::MetadataExt;
        let metadata = std::fs::metadata(path).ok()?;
        Some(FileId {
            device: metadata.dev(),
            inode: metadata.ino(),
        })
    }
}

/// What a file is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    ReadWrite,
}

impl Access {
    /// What a node with these options does.
    pub(crate) fn of(inherited: &Inherited) -> Self {
        match inherited.is_read_only() {
            true => Self::Read,
            false => Self::ReadWrite,
        }
    }
}

/// A file that a name was allowed to open.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) path: String,
    pub(crate) id: FileId,
    pub(crate) descriptor: OwnedFd,
}

/// Opens `name`, which an image in `directory` (with a slash at the end; "" is the current one)
/// holds.
pub(crate) fn resolve(
    directory: &str,
    (name, access): (&str, Access),
    policy: &NamePolicy,
) -> Result<Found> {
    check_form(name)?;
    let prefix = Path::new(directory);
    let directory = match directory {
        "" => PathBuf::from("."),
        directory => PathBuf::from(directory),
    };
    let mut refusal = None;
    if !name.starts_with('/') {
        match open_beneath(&directory, Path::new(name), access) {
            Err(Errno::EXDEV) => refusal = Some("it leads out of the directory of the image"),
            result => {
                // The path as users know it: no "./" before what is beside the image.
                return finish(result, &prefix.join(name), name);
            }
        }
    }
    for allowed in &policy.allowed_dirs {
        let Some(inner) = beneath(allowed, &directory, name) else {
            continue;
        };
        match open_beneath(allowed, &inner, access) {
            Err(Errno::EXDEV) => refusal = Some("it leads out of the allowed directory"),
            result => return finish(result, &allowed.join(inner), name),
        }
    }
    Err(forbidden(
        name,
        refusal.unwrap_or("absolute names need an allowed directory"),
    ))
}

/// As [`resolve`], for whoever gives names as they look from the working directory: where such a
/// file is missing, or not allowed, the one beside the image is taken.
pub(crate) fn resolve_from_here(
    directory: &str,
    (name, access): (&str, Access),
    policy: &NamePolicy,
) -> Result<Found> {
    check_form(name)?;
    let here = Path::new("");
    for allowed in &policy.allowed_dirs {
        let Some(inner) = beneath(allowed, here, name) else {
            continue;
        };
        match open_beneath(allowed, &inner, access) {
            Err(Errno::EXDEV | Errno::ENOENT) => {}
            result => return finish(result, Path::new(name), name),
        }
    }
    match resolve(directory, (name, access), policy) {
        Err(error) if error.errno == Some(Errno::ENOENT) => {
            // Whether it is there is for the user to know, not for the image.
            if Path::new(name).exists() {
                let reason = "elsewhere than beside the image it needs an allowed directory";
                return Err(forbidden(name, reason));
            }
            finish(Err(Errno::ENOENT), Path::new(name), name)
        }
        found => found,
    }
}

fn check_form(name: &str) -> Result<()> {
    if name.is_empty() || name.len() > MAX_NAME || name.contains('\0') {
        return Err(forbidden(name, "it is not a file name"));
    }
    let first = name.split('/').next().unwrap_or(name);
    if first.contains(':') {
        return Err(forbidden(
            name,
            "only plain file names may be named by an image",
        ));
    }
    Ok(())
}

/// `name` as seen from `allowed`, when it lies beneath it by its components.
fn beneath(allowed: &Path, directory: &Path, name: &str) -> Option<PathBuf> {
    let absolute = std::path::absolute(directory.join(name)).ok()?;
    let mut normal = PathBuf::new();
    for component in absolute.components() {
        match component {
            Component::ParentDir => {
                normal.pop();
            }
            component => normal.push(component),
        }
    }
    let inner = normal.strip_prefix(allowed).ok()?;
    (inner != Path::new("")).then(|| inner.to_owned())
}

fn open_beneath(directory: &Path, name: &Path, access: Access) -> nix::Result<OwnedFd> {
    let directory = nix::fcntl::open(
        directory,
        OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
        nix::sys::stat::Mode::empty(),
    )?;
    let mode = match access {
        Access::Read => OFlag::O_RDONLY,
        Access::ReadWrite => OFlag::O_RDWR,
    };
    // Without O_NONBLOCK a FIFO would block here, before its type is known.
    let how = OpenHow::new()
        .flags(mode | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    openat2(directory.as_fd(), name, how)
}

fn finish(opened: nix::Result<OwnedFd>, path: &Path, name: &str) -> Result<Found> {
    let path = path.display().to_string();
    let context = |errno| Error::io(format!("Could not open '{path}'"), errno);
    let descriptor = opened.map_err(context)?;
    let stat = fstat(&descriptor).map_err(context)?;
    if SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT != SFlag::S_IFREG {
        return Err(forbidden(name, "it is not a regular file"));
    }
    // A non-blocking descriptor makes the ring answer EAGAIN instead of waiting for the disk.
    fcntl(&descriptor, FcntlArg::F_SETFL(OFlag::empty())).map_err(context)?;
    Ok(Found {
        path,
        id: FileId {
            device: stat.st_dev,
            inode: stat.st_ino,
        },
        descriptor,
    })
}

pub(crate) fn forbidden(name: &str, reason: &str) -> Error {
    Error::new(
        ErrorKind::Forbidden,
        format!("the image names '{}': {reason}", name.escape_default()),
    )
}
