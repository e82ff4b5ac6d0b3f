//! The pid file: locked while the process lives, removed at the end.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

/// A pid file of this process.
pub(crate) struct PidFile {
    path: PathBuf,
    /// Holds the lock, which ends with it.
    _file: File,
}

impl PidFile {
    /// Writes the file, unless a live process holds it.
    pub(crate) fn create(path: &Path) -> Result<Self> {
        let shown = path.display();
        let mut file = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .with_context(|| format!("cannot create PID file: Could not create '{shown}'"))?;
        lock(&file).map_err(|errno| match errno {
            Errno::EAGAIN | Errno::EACCES => {
                anyhow!("cannot create PID file: '{shown}' is held by another process")
            }
            other => anyhow!("cannot create PID file: Could not lock '{shown}': {other}"),
        })?;
        file.set_len(0)?;
        writeln!(file, "{}", std::process::id())
            .with_context(|| format!("cannot create PID file: Could not write '{shown}'"))?;
        // The working directory changes when the daemon goes into the background.
        let path = path.canonicalize()?;
        Ok(Self { path, _file: file })
    }
}

/// Locks the whole file for this open descriptor.
fn lock(file: &File) -> nix::Result<()> {
    let whole = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_OFD_SETLK(&whole)).map(drop)
}

impl Drop for PidFile {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove the pid file");
        }
    }
}
