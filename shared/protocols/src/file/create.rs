//! Making a file: locked before it is emptied, so that an image in use is not lost.

use super::FileNode;
use super::locks::Locking;
use block::create::{CreateRequest, Creator, OptionKind, OptionSpec};
use block::edge::Permissions;
use block::error::Result;
use block::{Driver, Errno, Error, ErrorKind, Preallocation, Resize};
use executor::{File, OpenOptions};
use std::path::Path;

/// How `file` makes files.
pub(super) const CREATOR: Creator = Creator {
    options: &[
        OptionSpec::new(("size", "size"), OptionKind::Size, "Virtual disk size"),
        OptionSpec::new(
            ("nocow", "nocow"),
            OptionKind::Switch,
            "Turn off copy-on-write (valid only on btrfs)",
        ),
        OptionSpec::new(
            ("preallocation", "preallocation"),
            OptionKind::Text,
            "Preallocation mode (allowed values: off, falloc, full)",
        ),
        OptionSpec::new(
            ("extent_size_hint", "extent-size-hint"),
            OptionKind::Size,
            "Extent size hint for the image file, 0 to disable",
        ),
    ],
    size_unit: 512,
    create: |request| Box::pin(create(request)),
};

async fn create(request: &mut CreateRequest<'_>) -> Result<()> {
    let length = request.take_size("size")?.unwrap_or(0);
    let preallocation = request.take_preallocation()?;
    let no_cow = request.take_bool("nocow")?.unwrap_or(false);
    // A hint to file systems that preallocate by extents; they all manage without.
    request.take_size("extent-size-hint")?;
    request.finish()?;
    if preallocation == Preallocation::Metadata {
        let message = "Unsupported preallocation mode: metadata";
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
    let path = request.filename()?.to_owned();
    let options = OpenOptions {
        write: true,
        create: true,
        ..OpenOptions::default()
    };
    let file = File::open(Path::new(&path), &options).map_err(|error| {
        let errno = Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
        Error::io(format!("Could not create '{path}'"), errno)
    })?;
    let node = FileNode::new(file, path, Locking::Auto)?;
    let filled = fill(&node, length, preallocation, no_cow).await;
    node.locks.release(&node.file);
    filled
}

async fn fill(
    node: &FileNode,
    length: u64,
    preallocation: Preallocation,
    no_cow: bool,
) -> Result<()> {
    let claimed = Permissions {
        write: true,
        resize: true,
        ..Permissions::NONE
    };
    let shared = Permissions {
        consistent_read: true,
        write_unchanged: true,
        ..Permissions::NONE
    };
    node.set_permissions(claimed, shared)?;
    let empty = Resize::to(0);
    node.set_length(empty).await?;
    if no_cow {
        turn_off_copy_on_write(node);
    }
    node.set_length(Resize {
        length,
        preallocation,
    })
    .await
}

/// Where the file system has no such thing there is nothing to turn off.
fn turn_off_copy_on_write(node: &FileNode) {
    use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};
    let Some(fd) = node.file.as_fd() else { return };
    let set = ioctl_getflags(fd).and_then(|flags| ioctl_setflags(fd, flags | IFlags::NOCOW));
    if let Err(error) = set {
        tracing::debug!(file = node.path, %error, "copy-on-write is not turned off");
    }
}
