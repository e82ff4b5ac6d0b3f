//! A node's dirty bitmaps, and its snapshots as far as they concern the node.

use super::{Node, ResizeListener};
use crate::bitmap::BitmapSet;
use crate::driver::{ByteRange, Driver, IoFuture};
use crate::error::{Error, ErrorKind, Result};
use crate::snapshot;
use std::sync::Arc;

/// The set that the driver stores, or one of the node's own.
pub(super) fn of_driver(driver: &dyn Driver) -> Arc<BitmapSet> {
    match driver.bitmap_store() {
        Some(store) => Arc::clone(store.set()),
        None => Arc::default(),
    }
}

impl Node {
    /// The dirty bitmaps of the node.
    pub fn bitmaps(&self) -> &Arc<BitmapSet> {
        &self.bitmaps
    }

    /// Makes the disk what it was when the snapshot `id` was taken, and tells the node's users of
    /// its length.
    ///
    /// # Errors
    /// `Busy` when the node has dirty bitmaps: they would not tell what changed.
    pub async fn apply_snapshot(&self, id: &str) -> Result<()> {
        let driver = self.driver();
        let Some(snapshots) = driver.snapshots() else {
            return Err(snapshot::not_supported(driver.driver_name()));
        };
        if !self.bitmaps.list().is_empty() {
            let message = "Device has active dirty bitmaps";
            return Err(Error::new(ErrorKind::Busy, message));
        }
        snapshots.apply(id).await?;
        self.child_resized();
        Ok(())
    }

    /// Starts a request that changes `range`, and marks it before and after.
    pub(super) fn recorded<'a>(
        &'a self,
        range: ByteRange,
        start: impl FnOnce() -> IoFuture<'a>,
    ) -> IoFuture<'a> {
        if self.bitmaps.is_empty() {
            return start();
        }
        if self.grows && range.checked_end().is_some_and(|end| end > self.length()) {
            let end = range.checked_end().unwrap_or(u64::MAX);
            self.void_unless(self.bitmaps.grow(end));
        }
        let recording = self.bitmaps.record(range);
        match start() {
            IoFuture::Ready(result) => IoFuture::Ready(result),
            future => IoFuture::boxed(async move {
                let result = future.await;
                drop(recording);
                result
            }),
        }
    }

    /// The node's length has become `length`.
    pub(super) fn follow_length(&self, length: u64) {
        self.void_unless(self.bitmaps.resize(length));
    }

    /// A node too long to be recorded: nobody may rely on what its bitmaps say.
    fn void_unless(&self, followed: Result<()>) {
        if let Err(error) = followed {
            tracing::error!(node = self.name(), %error, "dirty bitmaps of this node are void");
            for bitmap in self.bitmaps.list().iter() {
                bitmap.set_inconsistent();
            }
        }
    }
}
