//! Something that happens once.

use std::sync::atomic::{AtomicBool, Ordering};

use super::Notify;

/// Something that happens once; from any thread.
#[derive(Default)]
pub struct Latch {
    set: AtomicBool,
    changed: Notify,
}

impl Latch {
    /// It has not happened.
    pub fn new() -> Self {
        Self::default()
    }

    /// It happens; again is as good as once.
    pub fn set(&self) {
        self.set.store(true, Ordering::SeqCst);
        self.changed.notify_all();
    }

    /// Whether it has happened.
    pub fn is_set(&self) -> bool {
        self.set.load(Ordering::SeqCst)
    }

    /// Resolves once it has happened.
    pub async fn wait(&self) {
        loop {
            let changed = self.changed.notified();
            if self.is_set() {
                return;
            }
            changed.await;
        }
    }
}
