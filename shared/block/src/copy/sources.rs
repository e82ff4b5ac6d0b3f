//! What is copied: one or more disks, end to end.

use super::SECTOR;
use super::status::{Above, above, backing_of};
use super::walk::Backed;
use crate::driver::ByteRange;
use crate::node::Node;
use crate::root::{Root, RootHandle, Visit};
use executor::{Buffer, Errno};
use std::sync::Arc;

/// Disks that are read one after the other, on the thread that made this.
pub struct Sources {
    parts: Vec<Part>,
    length: u64,
}

/// The disks of [`Sources`], for any thread.
pub struct Disks {
    disks: Vec<Disk>,
    length: u64,
}

impl Disks {
    /// To be read on this thread.
    pub fn attach(&self) -> Sources {
        Sources {
            parts: self.disks.iter().cloned().map(Part::new).collect(),
            length: self.length,
        }
    }
}

/// One of them.
#[derive(Clone)]
pub(super) struct Disk {
    root: Root,
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

/// A disk on this thread.
pub(super) struct Part {
    handle: RootHandle,
    pub(super) disk: Disk,
}

impl Sources {
    /// The disks below `roots`, at their present lengths. `None` when offsets cannot express their
    /// sum.
    pub fn new<'r>(roots: impl IntoIterator<Item = &'r Root>) -> Option<Self> {
        let (mut disks, mut length) = (Vec::new(), 0_u64);
        for root in roots {
            let node = root.node();
            let own = node.length().checked_next_multiple_of(SECTOR)?;
            disks.push(Disk {
                root: root.clone(),
                within: ByteRange::new(0, node.length()),
                start: length,
                length: own,
                alignment: u64::from(node.driver().limits().request_alignment),
                base: None,
            });
            length = length.checked_add(own)?;
        }
        Some(Disks { disks, length }.attach())
    }

    /// The disk below `root`, told apart from what `base` shows, an image of its chain: with
    /// [`Backed::Alike`], what only `base` and the images behind it hold is left alone.
    pub fn above(root: &Root, base: &Arc<Node>) -> Option<Self> {
        let mut sources = Self::new([root])?;
        for part in &mut sources.parts {
            part.disk.base = Some(Arc::clone(base));
        }
        Some(sources)
    }

    /// A range of one disk, below its length; filled up with zeroes to a whole sector.
    pub fn of_range(root: &Root, within: ByteRange) -> Option<Self> {
        let length = within.length.checked_next_multiple_of(SECTOR)?;
        let disk = Disk {
            root: root.clone(),
            within,
            start: 0,
            length,
            alignment: 1,
            base: None,
        };
        let disks = vec![disk];
        Some(Disks { disks, length }.attach())
    }

    /// The same disks, to be read on another thread.
    pub fn disks(&self) -> Disks {
        Disks {
            disks: self.parts.iter().map(|part| part.disk.clone()).collect(),
            length: self.length,
        }
    }

    /// All bytes.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// The part that `offset`, below the length, is in.
    pub(super) fn part_at(&self, offset: u64) -> &Part {
        let after = self.parts.partition_point(|part| part.disk.start <= offset);
        // Of several that begin here all but the last are empty.
        &self.parts[after - 1]
    }

    /// Comes in to the disk that holds all of `range`, and where it does; `None` when it reaches over
    /// several.
    pub(super) async fn visit(&self, range: ByteRange) -> Option<(Visit<'_>, ByteRange)> {
        let part = self.part_at(range.offset);
        let Disk { start, within, .. } = part.disk;
        let offset = range.offset - start;
        if offset.checked_add(range.length)? > within.length {
            return None;
        }
        let within = ByteRange::new(within.offset + offset, range.length);
        Some((part.handle.visit().await, within))
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
            let Disk { start, length, .. } = part.disk;
            let left = (start + length - at).min((buffer.len() - done) as u64);
            let slice = buffer.slice(done..done + left as usize);
            part.read(at - start, slice).await?;
            done += left as usize;
        }
        Ok(())
    }
}

impl Part {
    fn new(disk: Disk) -> Self {
        Self {
            handle: disk.root.attach(),
            disk,
        }
    }

    /// Reads within the part; the last sector is filled up with zeroes.
    async fn read(&self, offset: u64, buffer: Buffer) -> Result<(), Errno> {
        let there = self.disk.within.length.saturating_sub(offset);
        let within = there.min(buffer.len() as u64) as usize;
        if within < buffer.len() {
            buffer.slice(within..buffer.len()).fill(0);
        }
        let start = self.disk.within.offset + offset;
        self.handle.read(start, buffer.slice(0..within)).await
    }

    /// What is known of `range` of this part: what its own image says, or its whole chain.
    pub(super) async fn status(&self, range: ByteRange, backed: Backed) -> Result<Known, Errno> {
        let visit = self.handle.visit().await;
        let node = visit.node();
        let base = match (backed, &self.disk.base) {
            (Backed::No, _) => None,
            (Backed::Alike { .. }, Some(base)) => Some(&**base),
            (Backed::Alike { .. }, None) => backing_of(node),
        };
        let range = ByteRange::new(self.disk.within.offset + range.offset, range.length);
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
