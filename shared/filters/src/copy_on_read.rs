//! `copy-on-read`: what is read from a backing is kept in the image above it.
//!
//! Options: `file`; `bottom`, the lowest image of the backing chain that is copied from (all of
//! them when absent).
//!
//! ```text
//!   read ─► allocated in the child? ──yes──► child
//!              │no (within `bottom`)
//!              ▼
//!   writes of these clusters kept away ─► read into private memory ─► written to the child, zeroes as such
//! ```
//!
//! Owns: the copying. Promises: a copy never undoes a write (the two exclude each other per range,
//! and no other user of the child writes); a read that cannot be kept fails. Must not know: formats.

use crate::filter::{Filter, FilterNode};
use block::debug::Event;
use block::error::Result;
use block::node::WriteTracker;
use block::open::{ChildRole, DriverEntry};
use block::{
    Buffer, ByteRange, Driver, Edge, Errno, Error, ErrorKind, HeapBuffer, IoFuture, Node,
    OpenRequest, WriteFlags, ZeroFlags,
};
use std::ops::Range;
use std::sync::{Arc, Weak};

/// The table line of `copy-on-read`.
pub const ENTRY: DriverEntry = DriverEntry::new("copy-on-read", |request| Box::pin(open(request)));

/// Most bytes that are copied at once.
const BOUNCE_BYTES: u64 = 1 << 20;

/// The filter.
struct CopyOnRead {
    file: Edge,
    /// The lowest image that is copied from.
    bottom: Option<Weak<Node>>,
    /// Copies serialise among the writes.
    writes: WriteTracker,
}

async fn open(request: &mut OpenRequest<'_>) -> Result<Box<dyn Driver>> {
    let file = request.required_child("file", ChildRole::Populated).await?;
    let bottom = match request.take_str("bottom")? {
        Some(name) => Some(find_bottom(request, &file, &name)?),
        None => None,
    };
    Ok(Box::new(FilterNode(CopyOnRead {
        file,
        bottom,
        writes: WriteTracker::default(),
    })))
}

fn find_bottom(request: &OpenRequest<'_>, file: &Edge, name: &str) -> Result<Weak<Node>> {
    let invalid = |message| Err(Error::new(ErrorKind::Invalid, message));
    let Some(bottom) = request.find_node(name)? else {
        return invalid(format!("Bottom node '{name}' not found"));
    };
    if bottom.driver().filtered().is_some() {
        return invalid(format!("Bottom node '{name}' is a filter"));
    }
    let mut chain = std::iter::successors(Some(file.node()), |node| next_image(node));
    if !chain.any(|node| std::ptr::eq(node, &*bottom)) {
        return invalid(format!("Bottom node '{name}' is not in the backing chain"));
    }
    Ok(Arc::downgrade(&bottom))
}

/// What provides the content that `node` does not hold: a filter's child, or the backing.
fn next_image(node: &Node) -> Option<&Node> {
    let driver = node.driver();
    let below = driver.filtered().or_else(|| {
        let edges = driver.edges();
        let backing = edges.into_iter().find(|(name, _)| *name == "backing");
        backing.map(|(_, edge)| edge)
    });
    below.map(Edge::node)
}

/// What is to be done with the start of a range.
struct Piece {
    /// Bytes (> 0).
    length: u64,
    action: Action,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    /// The child has it, or it lies below `bottom`.
    Pass,
    /// It comes from an image below.
    Copy,
    /// It reads as zeroes, which no image below needs to be read for.
    CopyZeroes,
}

impl CopyOnRead {
    /// What to do with the start of `range`, which is not empty.
    async fn piece(&self, range: ByteRange) -> std::result::Result<Piece, Errno> {
        let mut node = self.child();
        let mut length = range.length;
        let mut copied = Action::Pass;
        loop {
            let extent = node
                .block_status(ByteRange::new(range.offset, length))
                .await?;
            length = length.min(extent.length);
            let status = extent.status;
            let within = range.offset < node.length();
            // Layers above decide nothing here; past the end of a backing there are zeroes.
            if status.allocated || (!within && copied != Action::Pass) {
                let action = match (copied, status.zero) {
                    (Action::Pass, _) => Action::Pass,
                    (_, true) => Action::CopyZeroes,
                    (_, false) => Action::Copy,
                };
                return Ok(Piece { length, action });
            }
            if self.is_bottom(node) {
                return Ok(Piece {
                    length,
                    action: Action::Pass,
                });
            }
            let is_image = node.driver().filtered().is_none();
            let Some(below) = next_image(node) else {
                let action = match self.bottom {
                    Some(_) => Action::Pass,
                    None => Action::CopyZeroes,
                };
                return Ok(Piece { length, action });
            };
            if is_image {
                copied = Action::Copy;
            }
            node = below;
        }
    }

    fn is_bottom(&self, node: &Node) -> bool {
        let bottom = self.bottom.as_ref();
        bottom.is_some_and(|bottom| std::ptr::eq(bottom.as_ptr(), node))
    }

    async fn read_copying(&self, offset: u64, buffer: Buffer) -> std::result::Result<(), Errno> {
        let end = offset
            .checked_add(buffer.len() as u64)
            .ok_or(Errno::EINVAL)?;
        let known = end.min(self.length()).max(offset);
        let mut at = offset;
        while at < known {
            let piece = self.piece(ByteRange::new(at, known - at)).await?;
            let start = (at - offset) as usize;
            let part = buffer.slice(start..start + piece.length as usize);
            match piece.action {
                Action::Pass => self.child().read(at, part).await?,
                Action::Copy | Action::CopyZeroes => self.populate(at, part).await?,
            }
            at += piece.length;
        }
        buffer
            .slice((known - offset) as usize..buffer.len())
            .fill(0);
        Ok(())
    }

    /// The clusters that `range` touches, within the disk.
    fn clusters(&self, range: Range<u64>) -> Range<u64> {
        let limits = self.child().driver().limits();
        let cluster = u64::from(limits.optimal_transfer.max(1));
        let start = range.start / cluster * cluster;
        let end = range.end.checked_next_multiple_of(cluster);
        start..end.unwrap_or(u64::MAX).min(self.length()).max(range.end)
    }

    /// Fills `buffer` from `offset`, and the clusters around it in the child.
    async fn populate(&self, offset: u64, buffer: Buffer) -> std::result::Result<(), Errno> {
        let wanted = offset..offset + buffer.len() as u64;
        let clusters = self.clusters(wanted.clone());
        let _alone = self.writes.serialise(clusters.clone()).await;
        let mut at = clusters.start;
        while at < clusters.end {
            // Again: a write may have come first.
            let piece = self.piece(ByteRange::new(at, clusters.end - at)).await?;
            let length = match piece.action {
                Action::CopyZeroes => piece.length,
                _ => piece.length.min(BOUNCE_BYTES),
            };
            let step = Step {
                range: at..at + length,
                action: piece.action,
            };
            self.take(step, (&wanted, &buffer)).await?;
            at += length;
        }
        Ok(())
    }

    /// Copies one step and gives the reader its part of it.
    async fn take(
        &self,
        Step { range, action }: Step,
        (wanted, buffer): (&Range<u64>, &Buffer),
    ) -> std::result::Result<(), Errno> {
        let shared = range.start.max(wanted.start)..range.end.min(wanted.end);
        let part = (shared.start < shared.end).then(|| {
            buffer
                .slice((shared.start - wanted.start) as usize..(shared.end - wanted.start) as usize)
        });
        match action {
            Action::Pass => match part {
                Some(part) => self.child().read(shared.start, part).await,
                None => Ok(()),
            },
            Action::CopyZeroes => {
                self.child().event(Event::CorWrite).await;
                self.keep_zeroes(range).await?;
                part.iter().for_each(|part| part.fill(0));
                Ok(())
            }
            Action::Copy => {
                let length = (range.end - range.start) as usize;
                // Private: a guest could change its own buffer before it is written.
                let bounce = HeapBuffer::zeroed(length).into_buffer();
                self.child().read(range.start, bounce.clone()).await?;
                if let Some(part) = part {
                    let start = (shared.start - range.start) as usize;
                    part.copy_from(&bounce.slice(start..start + part.len()));
                }
                self.child().event(Event::CorWrite).await;
                match bounce.is_zero() {
                    true => self.keep_zeroes(range).await,
                    false => {
                        let flags = WriteFlags::default();
                        self.child().write(range.start, bounce, flags).await
                    }
                }
            }
        }
    }

    async fn keep_zeroes(&self, range: Range<u64>) -> std::result::Result<(), Errno> {
        let range = ByteRange::new(range.start, range.end - range.start);
        self.child().write_zeroes(range, ZeroFlags::default()).await
    }

    /// Runs a write of `range` beside others, and apart from copies.
    fn tracked<'a>(
        &'a self,
        range: ByteRange,
        write: impl FnOnce() -> IoFuture<'a> + 'a,
    ) -> IoFuture<'a> {
        match self.writes.try_begin() {
            Some(guard) => guard.hold(write()),
            None => IoFuture::boxed(async move {
                let end = range.checked_end().ok_or(Errno::EINVAL)?;
                let _guard = self.writes.begin(range.offset..end).await;
                write().await
            }),
        }
    }
}

/// A range with one thing to be done.
struct Step {
    range: Range<u64>,
    action: Action,
}

impl Filter for CopyOnRead {
    fn name(&self) -> &'static str {
        "copy-on-read"
    }
    fn edge(&self) -> &Edge {
        &self.file
    }
    fn read(&self, offset: u64, buffer: Buffer) -> IoFuture<'_> {
        IoFuture::boxed(self.read_copying(offset, buffer))
    }
    fn write(&self, offset: u64, buffer: Buffer, flags: WriteFlags) -> IoFuture<'_> {
        let range = ByteRange::new(offset, buffer.len() as u64);
        self.tracked(range, move || self.child().write(offset, buffer, flags))
    }
    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> IoFuture<'_> {
        self.tracked(range, move || self.child().write_zeroes(range, flags))
    }
    fn discard(&self, range: ByteRange) -> IoFuture<'_> {
        self.tracked(range, move || self.child().discard(range))
    }
}
