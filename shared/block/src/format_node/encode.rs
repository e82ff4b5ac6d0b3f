//! Compressed writes: whole clusters, each handed to the format, or written plainly when it does
//! not get smaller.

use super::FormatNode;
use super::pieces::Pieces;
use crate::driver::{ByteRange, IoFuture};
use crate::format::{Encoded, Format};
use executor::{Buffer, Errno};

impl<F: Format> FormatNode<F> {
    /// Writes clusters compressed, side by side. The range starts at a cluster and ends at one or
    /// at the end of the disk.
    pub(super) async fn write_compressed(&self, offset: u64, buffer: Buffer) -> Result<(), Errno> {
        let cluster = u64::from(self.format.limits().optimal_transfer).max(1);
        let end = offset
            .checked_add(buffer.len() as u64)
            .ok_or(Errno::EINVAL)?;
        let ends_well = end.is_multiple_of(cluster) || end == self.format.virtual_size();
        if !offset.is_multiple_of(cluster) || !ends_well {
            return Err(Errno::EINVAL);
        }
        let mut pieces = Pieces::new();
        let mut at = offset;
        while at < end && pieces.ok() {
            let range = ByteRange::new(at, cluster.min(end - at));
            let start = (at - offset) as usize;
            let data = buffer.slice(start..start + range.length as usize);
            let piece = IoFuture::boxed(self.write_cluster_compressed(range, data));
            pieces.push(piece).await;
            at += range.length;
        }
        pieces.finish().await
    }

    async fn write_cluster_compressed(&self, range: ByteRange, data: Buffer) -> Result<(), Errno> {
        // Looked at by the compressor and, when that fails, written: the guest must not change it
        // in between.
        let data = data.to_heap().into_buffer();
        match self.format.write_encoded(range, data.clone()).await? {
            Encoded::Stored => Ok(()),
            Encoded::Incompressible => Box::pin(self.write_pieces(range.offset, data)).await,
        }
    }
}
