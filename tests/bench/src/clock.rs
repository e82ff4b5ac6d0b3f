//! The time-stamp counter as a clock: reading it costs less than a system clock, which matters at
//! millions of requests per second.
#![expect(unsafe_code, reason = "the counter is read by an intrinsic")]

use std::time::{Duration, Instant};

/// How long the counter is compared with the system's clock.
const CALIBRATION: Duration = Duration::from_millis(20);

/// The counter now.
#[inline(always)]
pub(crate) fn ticks() -> u64 {
    // SAFETY: every x86-64 processor has the instruction, and Linux lets processes use it.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Ticks per nanosecond.
pub(crate) fn ticks_per_ns() -> f64 {
    let (start, first) = (Instant::now(), ticks());
    while start.elapsed() < CALIBRATION {
        core::hint::spin_loop();
    }
    let (last, elapsed) = (ticks(), start.elapsed());
    (last - first) as f64 / elapsed.as_nanos() as f64
}
