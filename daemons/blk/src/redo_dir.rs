//! The directory of redo logs: private, in memory, and the same after a restart.
//!
//! A successor of a killed daemon finds the metadata changes there that the killed one had not
//! written yet. It must survive the process and need not survive the host, so it is on tmpfs.

use std::fs::{DirBuilder, Metadata};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use nix::unistd::geteuid;

/// Permission of group and others to write.
const OTHERS_WRITE: u32 = 0o022;

/// The directory given, or the user's own below `/dev/shm`, made when absent and checked.
///
/// # Errors
/// When it cannot be made, or others may write to it, or it belongs to somebody else.
pub(crate) fn prepare(given: Option<&Path>) -> Result<PathBuf> {
    let path = match given {
        Some(path) => std::path::absolute(path)?,
        None => engine::host::redo_dir(),
    };
    checked(&path).with_context(|| format!("--redo-dir {}", path.display()))?;
    Ok(path)
}

fn checked(path: &Path) -> Result<()> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error.into()),
        _ => {}
    }
    // Not through a symbolic link that somebody else has put there.
    let metadata: Metadata = std::fs::symlink_metadata(path)?;
    if !metadata.is_dir() {
        bail!("not a directory");
    }
    if metadata.uid() != geteuid().as_raw() {
        bail!("belongs to user {}", metadata.uid());
    }
    if metadata.mode() & OTHERS_WRITE != 0 {
        bail!(
            "others may write to it (mode {:o})",
            metadata.mode() & 0o777
        );
    }
    if statfs(path)?.filesystem_type() != TMPFS_MAGIC {
        tracing::warn!(
            path = %path.display(),
            "the directory of redo logs is not on tmpfs: writes become slow"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_directory_that_others_may_write_to_is_refused() {
        let path = std::env::temp_dir().join(format!("outboard-redo-{}", std::process::id()));
        assert_eq!(prepare(Some(&path)).unwrap(), path);
        let open = std::fs::Permissions::from_mode(0o777);
        std::fs::set_permissions(&path, open).unwrap();
        assert!(prepare(Some(&path)).is_err());
        std::fs::remove_dir(&path).unwrap();
    }
}
