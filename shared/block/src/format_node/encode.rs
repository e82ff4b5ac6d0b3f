//! Compressed writes: whole clusters, each encoded by the format, or written plainly when it does
//! not get smaller. Clusters are encoded side by side and stored one after the other, so that the
//! image is laid out like the disk.

use super::FormatNode;
use super::pieces::Pieces;
use crate::driver::{ByteRange, IoFuture};
use crate::format::Format;
use crate::turns::Turns;
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
        let turns = Turns::default();
        let mut pieces = Pieces::new();
        let (mut at, mut turn) = (offset, 0);
        while at < end && pieces.ok() {
            let range = ByteRange::new(at, cluster.min(end - at));
            let start = (at - offset) as usize;
            let data = buffer.slice(start..start + range.length as usize);
            let place = (&turns, turn);
            let piece = IoFuture::boxed(self.write_cluster_compressed(range, data, place));
            pieces.push(piece).await;
            at += range.length;
            turn += 1;
        }
        pieces.finish().await
    }

    /// Writes one cluster, when it is its turn.
    async fn write_cluster_compressed(
        &self,
        range: ByteRange,
        data: Buffer,
        (turns, turn): (&Turns, u64),
    ) -> Result<(), Errno> {
        // Looked at by the compressor and, when that fails, written: the guest must not change it
        // in between.
        let data = data.to_heap().into_buffer();
        let encoded = self.format.encode(range, data.clone()).await;
        turns.wait(turn).await;
        let written = match encoded {
            Ok(Some(bytes)) => self.format.store_encoded(range, bytes).await,
            Ok(None) => Box::pin(self.write_pieces(range.offset, data)).await,
            Err(errno) => Err(errno),
        };
        turns.pass(turn);
        written
    }
}
