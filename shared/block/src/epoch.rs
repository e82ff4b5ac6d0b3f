//! Request epochs: when has every request begun before a point in time ended, on every thread?
//!
//! A request pins the current epoch when it enters at a root. Clusters freed in epoch `e` may be
//! reused once no request pinned in `e` or before is left. Counting is per thread: no shared
//! counter is written on the request path.

/// The process-wide epoch clock.
pub struct Epochs {}

/// A point in time that [`Epochs::passed`] can be asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Epoch(pub u64);

/// The current epoch; a free that happened before this call belongs to it.
pub fn current() -> Epoch {
    todo!()
}

/// Whether every request that began up to and including `epoch` has ended. Tries to advance the
/// epoch, so that asking again and again makes progress.
pub fn passed(epoch: Epoch) -> bool {
    todo!()
}

/// Pins the current epoch on this thread until dropped (what a root does for each request).
pub fn pin() -> Pin {
    todo!()
}

/// A pinned epoch.
pub struct Pin {}
