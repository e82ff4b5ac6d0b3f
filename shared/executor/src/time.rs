//! Timers on the executor's clock (virtual in a simulated world).

use std::time::Duration;

/// Resolves after `duration`.
pub async fn sleep(duration: Duration) {
    todo!()
}

/// The output of `future`, or `None` when `duration` passes first (the future is dropped).
pub async fn timeout<F: Future>(duration: Duration, future: F) -> Option<F::Output> {
    todo!()
}

/// Time since an arbitrary start on the executor's clock.
pub fn now() -> Duration {
    todo!()
}
