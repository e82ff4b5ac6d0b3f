//! Tests of the whole driver: on the simulated world (crashes, failures, kills), on real files
//! with QEMU's tools as oracle, and on hostile images.

mod bitmap_resize;
mod bitmaps;
mod cases;
mod change;
mod checker;
mod checks;
mod compressed;
mod crash;
mod discards;
mod encrypted;
mod hostile;
mod long_runs;
mod machine_state;
mod pace;
pub(crate) mod peers;
mod placement;
mod preallocation;
pub(crate) mod rig;
mod snapshots;
mod threads;
mod workload;

use std::time::Duration;

/// Processor time that this thread has used so far.
fn processor_time() -> Duration {
    let statistics = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    let nanoseconds = statistics.split_whitespace().next().unwrap();
    Duration::from_nanos(nanoseconds.parse().unwrap())
}
