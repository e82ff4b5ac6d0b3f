//! The feature bits of an open image, and the one that says that it has to be checked.
//!
//! ```text
//!   clean ──(before the file is made longer: the bit; the flush that follows makes it durable)──► marked
//!   marked ──(close: everything durable, then the bit goes)──► clean
//!   marked ──(kill or power cut)──► opened for writing: check and repair ──► clean
//! ```

use super::header::{FEATURES_AT, NEED_CHECK};
use crate::bytes::write_bytes;
use block::{Edge, Errno};
use executor::sync::{Mutex as AsyncMutex, MutexGuard};
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Release};

/// See the module.
pub(super) struct Marks {
    /// The features in the file; held while they are written.
    features: AsyncMutex<()>,
    now: AtomicU64,
}

impl Marks {
    pub(super) fn new(features: u64) -> Self {
        Self {
            features: AsyncMutex::new(()),
            now: AtomicU64::new(features),
        }
    }

    /// The features as the file has them.
    pub(super) fn features(&self) -> u64 {
        self.now.load(Acquire)
    }

    /// Keeps others from changing the features; the header may be written.
    pub(super) async fn hold(&self) -> MutexGuard<'_, ()> {
        self.features.lock().await
    }

    /// The header was written with these features, while they were held.
    pub(super) fn written(&self, features: u64) {
        self.now.store(features, Release);
    }

    async fn write(&self, file: &Edge, features: u64) -> Result<(), Errno> {
        write_bytes(file, FEATURES_AT, &features.to_le_bytes()).await?;
        self.written(features);
        Ok(())
    }

    /// Says in the file that it has to be checked. Not durable before a flush.
    pub(super) async fn mark(&self, file: &Edge) -> Result<(), Errno> {
        let _held = self.hold().await;
        match self.features() {
            marked if marked & NEED_CHECK != 0 => Ok(()),
            clean => self.write(file, clean | NEED_CHECK).await,
        }
    }

    /// Says that the file needs no check any more: everything else is durable.
    pub(super) async fn unmark(&self, file: &Edge) -> Result<(), Errno> {
        let _held = self.hold().await;
        match self.features() {
            clean if clean & NEED_CHECK == 0 => Ok(()),
            marked => {
                self.write(file, marked & !NEED_CHECK).await?;
                file.node().flush().await
            }
        }
    }
}
