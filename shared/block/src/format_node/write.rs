//! Writes that are not one extent in place.
//!
//! Pieces are planned in ascending order and carried out side by side. A piece that waits for a
//! cluster which an earlier piece of the same request holds is no deadlock: the earlier ones go
//! on while it waits.

use super::cipher::Place;
use super::pieces::Pieces;
use super::{FormatNode, Memory};
use crate::debug::Event;
use crate::driver::{ByteRange, IoFuture, ZeroFlags};
use crate::format::{Fill, Format, Lookup, Mapping, WritePlan};
use executor::{Buffer, Errno};

/// Data up to this many bytes is copied together with the old content around it, to be written at
/// once; more is written from where it is.
const MERGE_BYTES: usize = 128 << 10;

/// What a part of a planned write is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    /// What is to be written, perhaps with old content around it.
    Data,
    /// Old content alone.
    Margin,
}

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
        if let (Mapping::Data(host_offset), true) = (extent.mapping, extent.in_place)
            && !self.is_followed_by_storage(range, host_offset, extent.length)
        {
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

    /// Whether zeroes follow `length` bytes of data in place, here and with their storage at the data
    /// child: one planned write does both, where two would be for neighbours.
    fn is_followed_by_storage(&self, range: ByteRange, host_offset: u64, length: u64) -> bool {
        let rest = ByteRange::new(range.offset + length, range.length - length);
        if rest.length == 0 {
            return false;
        }
        match self.format.lookup(rest) {
            Lookup::Hit(next) => next.mapping == Mapping::Zero(Some(host_offset + length)),
            Lookup::Miss => false,
        }
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
        let start = plan.range.offset;
        let middle = Place {
            guest_offset: start,
            host_offset: plan.host_offset,
        };
        if (plan.head, plan.tail) == (Fill::Nothing, Fill::Nothing) {
            return self.write_data(middle, data).await;
        }
        // Held for I/O that needs no permit of this node: whoever waits here gets one.
        let _copy = self.copies.acquire().await;
        let (head, tail) = (self.in_memory(plan.head), self.in_memory(plan.tail));
        let before = middle.before(head as u64).ok_or(Errno::EIO)?;
        if data.len() <= MERGE_BYTES {
            let after = head + data.len();
            let whole = Buffer::zeroed(after + tail);
            let margins = (whole.slice(0..head), whole.slice(after..after + tail));
            self.read_margins(plan, margins).await?;
            whole.slice(head..after).copy_from(&data);
            return self.write_parts(plan, [(Part::Data, before, whole)]).await;
        }
        let after = middle.after(data.len());
        let (head, tail) = (Buffer::zeroed(head), Buffer::zeroed(tail));
        self.read_margins(plan, (head.clone(), tail.clone()))
            .await?;
        let parts = [
            (Part::Margin, before, head),
            (Part::Data, middle, data),
            (Part::Margin, after, tail),
        ];
        self.write_parts(plan, parts).await
    }

    /// Writes `parts` to the data child, and zeroes to the margins that are not among them.
    async fn write_parts<const COUNT: usize>(
        &self,
        plan: &WritePlan<F::Token<'_>>,
        parts: [(Part, Place, Buffer); COUNT],
    ) -> Result<(), Errno> {
        let head_start = plan.host_offset.checked_sub(plan.head.length());
        let head_start = head_start.ok_or(Errno::EIO)?;
        let host_end = plan.host_offset + plan.range.length;
        let mut pieces = Pieces::new();
        for (at, fill) in [(head_start, plan.head), (host_end, plan.tail)] {
            let length = fill.length() - self.in_memory(fill) as u64;
            if length != 0 {
                let range = ByteRange::new(at, length);
                let file = self.format.file().node();
                file.event(Event::ClusterAllocSpace).await;
                let zeroes = self.data().write_zeroes(range, ZeroFlags::default());
                pieces.push(zeroes).await;
            }
        }
        for (part, place, buffer) in parts {
            if !buffer.is_empty() {
                let write = match part {
                    Part::Data => self.write_data(place, buffer),
                    Part::Margin => self.write_margin(place, buffer),
                };
                pieces.push(write).await;
            }
        }
        pieces.finish().await
    }

    /// How much of a margin is written from memory; the rest is left to the data child's zeroing,
    /// which is of no use where zeroes have to be encrypted.
    fn in_memory(&self, fill: Fill) -> usize {
        match fill {
            Fill::Zeroes(length)
                if length > MERGE_BYTES as u64 && self.format.cipher().is_none() =>
            {
                0
            }
            fill => fill.length() as usize,
        }
    }

    /// Fills the zeroed memory for a plan's head and tail with the old content.
    async fn read_margins(
        &self,
        plan: &WritePlan<F::Token<'_>>,
        (head, tail): (Buffer, Buffer),
    ) -> Result<(), Errno> {
        let file = self.format.file().node();
        if let Fill::Copy(length) = plan.head {
            file.event(Event::CowRead).await;
            let start = plan.range.offset.checked_sub(length).ok_or(Errno::EIO)?;
            self.read_old(start, head).await?;
        }
        if let Fill::Copy(_) = plan.tail {
            file.event(Event::CowRead).await;
            let end = plan.range.offset + plan.range.length;
            self.read_old(end, tail).await?;
        }
        Ok(())
    }

    /// Reads what the virtual disk holds before the plan is committed, into zeroed memory.
    async fn read_old(&self, offset: u64, buffer: Buffer) -> Result<(), Errno> {
        let end = match self.format.machine_state() {
            Some(start) if offset >= start => u64::MAX,
            _ => self.format.virtual_size(),
        };
        let within = end.saturating_sub(offset);
        let length = within.min(buffer.len() as u64) as usize;
        let target = (buffer.slice(0..length), Memory::Zeroes);
        self.read_pieces(offset, target).await
    }
}
