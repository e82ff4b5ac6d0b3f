//! What is copied: one or more disks, end to end.

use super::SECTOR;
use super::status::{Above, above, backing_of};
use super::walk::Backed;
use crate::driver::ByteRange;
use crate::node::Node;
use crate::root::{Root, RootHandle};
use executor::{Buffer, Errno};
use std::sync::Arc;

/// Disks that are read one after the other, on the thread that made this.
pub struct Sources {
    parts: Vec<Part>,
    length: u64,
}

/// One of them.
pub(super) struct Part {
    handle: RootHandle,
    /// What is read of it.
    within: ByteRange,
    /// Where it begins, in bytes.
    pub(super) start: u64,
    /// Its bytes, whole sectors.
    pub(super) length: u64,
    /// Its node takes requests of this alignment, counted from the start, without reading more.
    pub(super) alignment: u64,
    /// The image of its chain that it ends above.
    base: Option<Arc<Node>>,
}

impl Sources {
    /// The disks below `roots`, at their present lengths. `None` when offsets cannot express their
    /// sum.
    pub fn new<'r>(roots: impl IntoIterator<Item = &'r Root>) -> Option<Self> {
        let (mut parts, mut length) = (Vec::new(), 0_u64);
        for root in roots {
            let handle = root.attach();
            let own = handle.length().checked_next_multiple_of(SECTOR)?;
            parts.push(Part {
                within: ByteRange::new(0, handle.length()),
                handle,
                start: length,
                length: own,
                alignment: u64::from(root.node().driver().limits().request_alignment),
                base: None,
            });
            length = length.checked_add(own)?;
        }
        Some(Self { parts, length })
    }

    /// The disk below `root`, told apart from what `base` shows, an image of its chain: with
    /// [`Backed::Alike`], what only `base` and the images behind it hold is left alone.
    pub fn above(root: &Root, base: &Arc<Node>) -> Option<Self> {
        let mut sources = Self::new([root])?;
        for part in &mut sources.parts {
            part.base = Some(Arc::clone(base));
        }
        Some(sources)
    }

    /// A range of one disk, below its length; filled up with zeroes to a whole sector.
    pub fn of_range(root: &Root, within: ByteRange) -> Option<Self> {
        let length = within.length.checked_next_multiple_of(SECTOR)?;
        let part = Part {
            handle: root.attach(),
            within,
            start: 0,
            length,
            alignment: 1,
            base: None,
        };
        Some(Self {
            parts: vec![part],
            length,
        })
    }

    /// All bytes.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// The part that `offset`, below the length, is in.
    pub(super) fn part_at(&self, offset: u64) -> &Part {
        let after = self.parts.partition_point(|part| part.start <= offset);
        // Of several that begin here all but the last are empty.
        &self.parts[after - 1]
    }

    /// Fills `buffer`, which may reach over several parts, from `offset`.
    ///
    /// # Errors
    /// The first; `EINVAL` beyond the end.
    pub async fn read(&self, offset: u64, buffer: Buffer) -> Result<(), Errno> {
        let mut done = 0;
        while done < buffer.len() {
            let at = offset + done as u64;
            if at >= self.length {
                return Err(Errno::EINVAL);
            }
            let part = self.part_at(at);
            let left = (part.start + part.length - at).min((buffer.len() - done) as u64);
            let slice = buffer.slice(done..done + left as usize);
            part.read(at - part.start, slice).await?;
            done += left as usize;
        }
        Ok(())
    }
}

impl Part {
    /// Reads within the part; the last sector is filled up with zeroes.
    async fn read(&self, offset: u64, buffer: Buffer) -> Result<(), Errno> {
        let there = self.within.length.saturating_sub(offset);
        let within = there.min(buffer.len() as u64) as usize;
        if within < buffer.len() {
            buffer.slice(within..buffer.len()).fill(0);
        }
        let start = self.within.offset + offset;
        self.handle.read(start, buffer.slice(0..within)).await
    }

    /// What is known of `range` of this part: what its own image says, or its whole chain.
    pub(super) async fn status(&self, range: ByteRange, backed: Backed) -> Result<Known, Errno> {
        let visit = self.handle.visit().await;
        let node = visit.node();
        let base = match (backed, &self.base) {
            (Backed::No, _) => None,
            (Backed::Alike { .. }, Some(base)) => Some(&**base),
            (Backed::Alike { .. }, None) => backing_of(node),
        };
        let range = ByteRange::new(self.within.offset + range.offset, range.length);
        let Above { length, status, .. } = above(node, base, range).await?;
        Ok(Known {
            length,
            data: status.data,
            zero: status.zero,
        })
    }
}

/// What is known of the start of a range.
pub(super) struct Known {
    pub(super) length: u64,
    pub(super) data: bool,
    pub(super) zero: bool,
}
