//! A daemon's directory of what must survive it and need not survive the host: private, in memory, and the same after a restart.

use std::fs::{DirBuilder, Metadata};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use nix::unistd::geteuid;

/// Permission of group and others to write.
const OTHERS_WRITE: u32 = 0o022;

/// The user's own below `/dev/shm`, which daemons use that are told no other.
pub fn of_user() -> PathBuf {
    PathBuf::from(format!("/dev/shm/outboard-{}", geteuid()))
}

/// The directory that `option` gives, or the user's own, made when absent and checked.
///
/// # Errors
/// When it cannot be made, or others may write to it, or it belongs to somebody else.
pub fn prepare(option: &str, given: Option<&Path>) -> Result<PathBuf> {
    let path = match given {
        Some(path) => std::path::absolute(path)?,
        None => of_user(),
    };
    checked(option, &path).with_context(|| format!("{option} {}", path.display()))?;
    Ok(path)
}

fn checked(option: &str, path: &Path) -> Result<()> {
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
        let path = path.display();
        tracing::warn!(%path, "the directory of {option} is not on tmpfs: writes become slow");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_directory_that_others_may_write_to_is_refused() {
        let path = std::env::temp_dir().join(format!("outboard-private-{}", std::process::id()));
        assert_eq!(prepare("--redo-dir", Some(&path)).unwrap(), path);
        let open = std::fs::Permissions::from_mode(0o777);
        std::fs::set_permissions(&path, open).unwrap();
        let refused = format!("{:#}", prepare("--redo-dir", Some(&path)).unwrap_err());
        assert!(
            refused.starts_with("--redo-dir ") && refused.contains("777"),
            "{refused}"
        );
        std::fs::remove_dir(&path).unwrap();
    }
}
