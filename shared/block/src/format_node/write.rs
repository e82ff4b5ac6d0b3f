//! Writes that are not one extent in place.
//!
//! Pieces are planned in ascending order and carried out side by side. A piece that waits for a
//! cluster which an earlier piece of the same request holds is no deadlock: the earlier ones go
//! on while it waits.

use super::cipher::Place;
use super::pieces::Pieces;
use super::{FormatNode, Memory};
use crate::driver::{ByteRange, IoFuture};
use crate::format::{Format, Mapping, WritePlan};
use executor::{Buffer, Errno};

/// Data up to this many bytes is copied together with the old content around it, to be written at
/// once; more is written from where it is.
const MERGE_BYTES: usize = 128 << 10;

impl<F: Format> FormatNode<F> {
    pub(super) async fn write_pieces(&self, offset: u64, buffer: Buffer) -> Result<(), Errno> {
        let end = offset + buffer.len() as u64;
        let mut pieces = Pieces::new();
        let mut at = offset;
        while at < end && pieces.ok() {
            let rest = buffer.slice((at - offset) as usize..buffer.len());
            match pieces.drive(self.plan(at, &rest)).await {
                Ok((length, piece)) => {
                    pieces.push(piece).await;
                    at += length;
                }
                Err(errno) => pieces.fail(errno),
            }
        }
        pieces.finish().await
    }

    /// Finds out how the start of `rest` is written; resolves to its length and the piece.
    async fn plan(&self, at: u64, rest: &Buffer) -> Result<(u64, IoFuture<'_>), Errno> {
        let range = ByteRange::new(at, rest.len() as u64);
        let extent = self.extent(range).await?;
        if let (Mapping::Data(host_offset), true) = (extent.mapping, extent.in_place) {
            let data = rest.slice(0..extent.length as usize);
            let place = Place {
                guest_offset: at,
                host_offset,
            };
            let piece = self.write_data(place, data);
            return Ok((extent.length, piece));
        }
        let plan = self.format.prepare_write(range).await?;
        let length = plan.range.length;
        if plan.range.offset != at || length == 0 || length > range.length {
            tracing::error!(
                format = self.format.name(),
                ?range,
                "a plan for another range"
            );
            self.format.abort(plan).await;
            return Err(Errno::EIO);
        }
        let data = rest.slice(0..length as usize);
        Ok((length, IoFuture::boxed(self.carry_out(plan, data))))
    }

    async fn carry_out<'a>(
        &'a self,
        plan: WritePlan<F::Token<'a>>,
        data: Buffer,
    ) -> Result<(), Errno> {
        match self.write_planned(&plan, data).await {
            Ok(()) => self.format.commit(plan).await,
            Err(errno) => {
                self.format.abort(plan).await;
                Err(errno)
            }
        }
    }

    async fn write_planned(
        &self,
        plan: &WritePlan<F::Token<'_>>,
        data: Buffer,
    ) -> Result<(), Errno> {
        let place = |guest_offset, host_offset| Place {
            guest_offset,
            host_offset,
        };
        if plan.head == 0 && plan.tail == 0 {
            let place = place(plan.range.offset, plan.host_offset);
            return self.write_data(place, data).await;
        }
        // Held for I/O that needs no permit of this node: whoever waits here gets one.
        let _copy = self.copies.acquire().await;
        let start = plan.range.offset.checked_sub(plan.head).ok_or(Errno::EIO)?;
        let host_start = plan.host_offset.checked_sub(plan.head).ok_or(Errno::EIO)?;
        let (head, tail) = (plan.head as usize, plan.tail as usize);
        let end = plan.range.offset + plan.range.length;
        if data.len() <= MERGE_BYTES {
            let whole = Buffer::zeroed(head + data.len() + tail);
            let after = head + data.len();
            self.read_old(start, whole.slice(0..head)).await?;
            self.read_old(end, whole.slice(after..after + tail)).await?;
            whole.slice(head..after).copy_from(&data);
            return self.write_data(place(start, host_start), whole).await;
        }
        let (before, after) = (Buffer::zeroed(head), Buffer::zeroed(tail));
        self.read_old(start, before.clone()).await?;
        self.read_old(end, after.clone()).await?;
        let mut pieces = Pieces::new();
        let host_end = plan.host_offset + plan.range.length;
        for (at, part) in [
            (place(start, host_start), before),
            (place(plan.range.offset, plan.host_offset), data),
            (place(end, host_end), after),
        ] {
            if !part.is_empty() {
                pieces.push(self.write_data(at, part)).await;
            }
        }
        pieces.finish().await
    }

    /// Reads what the virtual disk holds before the plan is committed, into zeroed memory.
    async fn read_old(&self, offset: u64, buffer: Buffer) -> Result<(), Errno> {
        let within = self.format.virtual_size().saturating_sub(offset);
        let length = within.min(buffer.len() as u64) as usize;
        let target = (buffer.slice(0..length), Memory::Zeroes);
        self.read_pieces(offset, target).await
    }
}
