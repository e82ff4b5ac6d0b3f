//! Copies that the kernel makes: shared extents on file systems that have them.

use super::{Copy, Offload};
use crate::driver::{ByteRange, StoredUse};

impl Copy<'_> {
    /// Whether the kernel is asked to copy data.
    pub(super) fn offloads(&self) -> bool {
        self.options.offload == Offload::WherePossible
            && !self.is_refused.get()
            && !self.target.writes_through()
    }

    /// Has the kernel copy `range`; false when it is to be read and written. When the kernel cannot
    /// do it for one range, it is not asked again.
    pub(super) async fn offload(&self, range: ByteRange) -> bool {
        let Some((source, within)) = self.sources.visit(range).await else {
            return false;
        };
        let target = self.target.visit().await;
        let from = source.node().stored(within, StoredUse::Read);
        let to = target.node().stored(range, StoredUse::Overwrite);
        let (Some(from), Some(to)) = (from, to) else {
            return false;
        };
        let copied = from
            .file
            .copy_range(from.offset, (to.file, to.offset), range.length);
        match copied.await {
            Ok(()) => true,
            Err(errno) => {
                tracing::debug!(%errno, ?range, "the kernel does not copy");
                self.is_refused.set(true);
                false
            }
        }
    }
}
