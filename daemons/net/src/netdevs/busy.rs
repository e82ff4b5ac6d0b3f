//! What a killed predecessor still has.
//!
//! The ring of a killed process keeps its files open for a moment after the process is gone, and nothing tells when they are closed.

use std::io;
use std::time::{Duration, Instant};

/// How long a killed process may keep its files open.
const LIMIT: Duration = Duration::from_secs(1);
/// Time between two tries.
const PAUSE: Duration = Duration::from_millis(5);

/// Opens what may be busy for a moment: tries again for that long.
///
/// # Errors
/// Those of `open`; that it is busy, when it stays so.
pub(super) fn while_busy<T>(
    is_busy: impl Fn(&io::Error) -> bool,
    mut open: impl FnMut() -> io::Result<T>,
) -> io::Result<T> {
    let start = Instant::now();
    loop {
        match open() {
            Err(error) if is_busy(&error) && start.elapsed() < LIMIT => std::thread::sleep(PAUSE),
            opened => return opened,
        }
    }
}
