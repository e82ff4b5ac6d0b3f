//! How long one input may take.

use nix::time::{ClockId, clock_gettime};
use std::time::Duration;

/// Most that one input may cost, with and without optimisation. The processor's time, since on a busy machine
/// the clock on the wall goes on while the target waits; what worker threads derive keys for is not in it.
const MAX_PROCESSOR_TIME: Duration = Duration::from_secs(1);

/// Does the work of one input.
///
/// # Panics
/// When it took too long.
pub(crate) fn bounded(work: impl FnOnce()) {
    let began = used();
    work();
    let took = used() - began;
    assert!(took < MAX_PROCESSOR_TIME, "took {took:?} of processor time");
}

/// What this thread has used of a processor.
fn used() -> Duration {
    let used = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID);
    Duration::from(used.expect("the clock exists"))
}
