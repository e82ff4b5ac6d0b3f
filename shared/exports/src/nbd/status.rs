//! `BLOCK_STATUS`: the extents of each context that was chosen.

use super::export::Context;
use super::session::{Last, Refusal, Session};
use ::nbd::{BaseAllocation, BlockStatus, Chunk, CommandFlags, ReplyStyle, Request, StatusExtent};
use block::copy::status::above;
use block::{ByteRange, DirtyBitmap, Errno};

/// The most extents of one context in a reply.
const MAX_EXTENTS: usize = 64 << 10;
/// Bytes that the extents of one context take, with their form on the wire.
pub(super) const COST: u64 = (MAX_EXTENTS * (size_of::<StatusExtent>() + 16)) as u64;
/// Lengths that a compact reply can hold are rounded down to this, if they have to be.
const LENGTH_ALIGN: u64 = 1 << 16;

/// What is known about the start of a range, the whole backing chain considered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Status {
    /// Bytes that it holds for (> 0).
    pub(super) length: u64,
    /// The image that decides the content, the top one being 1; 0 when none has anything for it.
    depth: u32,
    /// Some image holds bytes for it.
    data: bool,
    /// It reads as zeroes.
    pub(super) zero: bool,
}

/// Extents of one context as they are found.
struct Extents {
    list: Vec<StatusExtent>,
    limit: usize,
    /// The longest extent.
    longest: u64,
    /// Bytes that the list covers.
    covered: u64,
}

impl Extents {
    /// Appends an extent, or makes the last one longer; false when there is no room.
    fn push(&mut self, length: u64, flags: u64) -> bool {
        let mut left = length;
        if let Some(last) = self.list.last_mut()
            && last.flags == flags
        {
            let taken = left.min(self.longest - last.length);
            last.length += taken;
            self.covered += taken;
            left -= taken;
        }
        while left > 0 {
            if self.list.len() == self.limit {
                return false;
            }
            let length = left.min(self.longest);
            self.list.push(StatusExtent { length, flags });
            self.covered += length;
            left -= length;
        }
        true
    }
}

impl Session {
    /// Looks up and answers.
    pub(super) async fn block_status(&self, request: &Request) -> Result<(), Errno> {
        let count = self.terms.contexts.len();
        for (index, (context, id)) in self.terms.contexts.iter().enumerate() {
            let last = match index + 1 == count {
                true => Last::Yes,
                false => Last::No,
            };
            match self.extents(request, *context).await {
                Ok(extents) => {
                    let status = BlockStatus {
                        context: *id,
                        extents,
                    };
                    let chunk = Chunk::BlockStatus(status);
                    self.chunk(request, (chunk, None), last).await?;
                }
                Err(errno) => return self.answer(request, Err(Refusal::from(errno))).await,
            }
        }
        Ok(())
    }

    async fn extents(
        &self,
        request: &Request,
        context: Context,
    ) -> Result<Vec<StatusExtent>, Errno> {
        let mut extents = Extents {
            list: Vec::new(),
            limit: match request.flags.contains(CommandFlags::REQ_ONE) {
                true => 1,
                false => MAX_EXTENTS,
            },
            longest: match self.terms.replies {
                ReplyStyle::Extended => u64::MAX,
                _ => u64::from(u32::MAX) + 1 - LENGTH_ALIGN,
            },
            covered: 0,
        };
        while extents.covered < request.length {
            let offset = request.offset + extents.covered;
            let rest = ByteRange::new(offset, request.length - extents.covered);
            let (length, flags) = match context {
                Context::Allocation => {
                    let status = self.status_at(rest).await?;
                    let flags = BaseAllocation {
                        hole: !status.data,
                        zero: status.zero,
                    };
                    (status.length, flags.to_wire())
                }
                Context::Depth => {
                    let status = self.status_at(rest).await?;
                    (status.length, u64::from(status.depth))
                }
                Context::Bitmap(index) => dirty_at(&self.core.bitmaps[index], rest),
            };
            if !extents.push(length.min(rest.length), flags) {
                break;
            }
        }
        Ok(extents.list)
    }

    /// The status of the start of a range within the export, in whole blocks: a block that is not of one kind holds data.
    pub(super) async fn status_at(&self, range: ByteRange) -> Result<Status, Errno> {
        let block = u64::from(self.core.block_sizes().minimum);
        let mut status = self.status_in_node(range).await?;
        let whole = status.length - status.length % block;
        if whole > 0 {
            status.length = whole;
            return Ok(status);
        }
        let end = block.min(range.length);
        while status.length < end {
            let at = status.length;
            let rest = ByteRange::new(range.offset + at, end - at);
            let next = self.status_in_node(rest).await?;
            status.length += next.length.min(rest.length);
            status.data |= next.data;
            status.zero &= next.zero;
            status.depth = match (status.depth, next.depth) {
                (0, depth) | (depth, 0) => depth,
                (depth, other) => depth.min(other),
            };
        }
        Ok(status)
    }

    /// The status of the start of a range; what the node does not have of the last sector is a hole.
    async fn status_in_node(&self, range: ByteRange) -> Result<Status, Errno> {
        let within = self.within(range);
        if within.length == 0 {
            return Ok(Status {
                length: range.length,
                depth: 1,
                data: false,
                zero: true,
            });
        }
        let visit = self.handle.visit().await;
        let found = above(visit.node(), None, within).await?;
        let allocated = found.status.allocated || found.status.data;
        Ok(Status {
            length: found.length,
            depth: if allocated { found.depth + 1 } else { 0 },
            data: found.status.data,
            zero: found.status.zero,
        })
    }
}

/// Length and flags of the start of a range in a bitmap.
fn dirty_at(bitmap: &DirtyBitmap, range: ByteRange) -> (u64, u64) {
    match bitmap.next_dirty(range) {
        Some(dirty) if dirty.offset == range.offset => (dirty.length, 1),
        Some(dirty) => (dirty.offset - range.offset, 0),
        None => (range.length, 0),
    }
}
