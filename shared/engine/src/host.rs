//! What all daemons and tools of a user agree on.

use std::path::PathBuf;

/// Directories, separated by `:`, that names inside images may open files in.
const ALLOWED_DIRS: &str = "OUTBOARD_ALLOW_DIRS";

/// The directories that the environment allows, as it names them.
pub fn allowed_dirs() -> Vec<PathBuf> {
    let listed = std::env::var_os(ALLOWED_DIRS).unwrap_or_default();
    let listed = std::env::split_paths(&listed);
    listed.filter(|path| !path.as_os_str().is_empty()).collect()
}

/// Where a user's redo logs are, unless a daemon is told another place: in memory, and the same after a restart.
pub fn redo_dir() -> PathBuf {
    service::private_dir::of_user()
}
