//! Threads that help a command with its data: as many as the process has further processors.

use executor::Crew;
use std::thread::available_parallelism;

/// Most threads: the one that they help has to keep up with them.
const MOST: usize = 3;

/// Bytes from which on help is worth its start.
const WORTHWHILE: u64 = 8 << 20;

/// A crew for a command that reads about `bytes`, each thread with what `make` makes there. `None`
/// when it is not worth it, or when there are no processors or no threads to be had.
pub fn start<C: 'static>(
    bytes: u64,
    make: impl Fn() -> C + Send + Sync + 'static,
) -> Option<Crew<C>> {
    let further = available_parallelism().map_or(0, |processors| processors.get() - 1);
    if further == 0 || bytes < WORTHWHILE {
        return None;
    }
    let crew = Crew::start("helper", further.min(MOST), make);
    crew.inspect_err(|error| tracing::debug!(%error, "no threads help"))
        .ok()
}
