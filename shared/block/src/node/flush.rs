//! Flushes of a node without children: one at a time, shared, and final when they fail.
//!
//! The kernel reports a failed write-back to one `fsync` of a descriptor and then forgets it, and
//! does not say what was lost. Two flushes at once could therefore both be needed to see one
//! error. So flushes take turns; one that finds that a whole flush began after it was asked for
//! takes that one's success; and after a failure none succeeds until the node is opened anew.
//! The flush runs as a task of its own, because a caller that goes away must not take the
//! answer with it.

use super::Node;
use crate::driver::IoFuture;
use executor::Errno;
use executor::sync::Mutex;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

pub(super) struct FlushState {
    /// Flushes asked for.
    asked: AtomicU64,
    /// The last flush that a finished one covers.
    covered: Mutex<u64>,
    /// The error number of the failure, 0 before one.
    failed: AtomicI32,
}

impl Default for FlushState {
    fn default() -> Self {
        Self {
            asked: AtomicU64::new(0),
            covered: Mutex::new(0),
            failed: AtomicI32::new(0),
        }
    }
}

impl FlushState {
    fn check(&self) -> Result<(), Errno> {
        match self.failed.load(Ordering::Acquire) {
            0 => Ok(()),
            errno => Err(Errno::from_raw(errno)),
        }
    }
}

impl Node {
    pub(super) fn flush_leaf(&self) -> IoFuture<'_> {
        if self.options.cache_no_flush {
            return IoFuture::done();
        }
        if let Err(errno) = self.flush.check() {
            return IoFuture::error(errno);
        }
        if self.options.read_only {
            return IoFuture::done();
        }
        let ticket = self.flush.asked.fetch_add(1, Ordering::AcqRel) + 1;
        let Some(node) = self.this.upgrade() else {
            return IoFuture::error(Errno::ESHUTDOWN);
        };
        IoFuture::boxed(async move {
            executor::spawn(async move { node.flush_in_turn(ticket).await }).await
        })
    }

    async fn flush_in_turn(&self, ticket: u64) -> Result<(), Errno> {
        let state = &self.flush;
        let mut covered = state.covered.lock().await;
        state.check()?;
        if *covered >= ticket {
            return Ok(());
        }
        let covers = state.asked.load(Ordering::Acquire);
        match self.driver.flush().await {
            Ok(()) => {
                *covered = covers;
                Ok(())
            }
            Err(errno) => {
                tracing::error!(node = self.name(), %errno, "flush failed; the node stays failed");
                state.failed.store(errno as i32, Ordering::Release);
                Err(errno)
            }
        }
    }
}
