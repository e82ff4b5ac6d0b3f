//! The generic data mover: turns a [`Format`]'s answers into I/O, once for all formats.
//!
//! ```text
//!   read   lookup ─one extent──────────► data child's / backing's own future, or zeroes at once
//!             └─several, or a miss─────► resolve piece by piece, pieces run side by side
//!   write  lookup ─one extent in place─► data child's own future
//!             └─else──► piece by piece: in place, or prepare → old head and tail → data → commit
//! ```
//!
//! Promises: a request on one plain, cached extent costs no allocation; a request never holds more
//! than [`pieces::MAX_PIECES`] pieces in flight; a guest's buffer that is written as it is, is read
//! once, and merged data is private, as is all data of encrypted images; old content known to be
//! zero is not read. A piece that
//! failed is aborted and the request fails with the first error, after the other pieces have
//! ended. Must not know: how any format finds its data.

mod announced;
mod cipher;
mod encode;
mod pieces;
mod state;
mod write;

use crate::bitmap::BitmapStore;
use crate::check::{CheckOptions, CheckResult, CheckSink};
use crate::debug::Event;
use crate::driver::{
    BackingReference, BlockStatus, BoxFuture, ByteRange, Driver, IoFuture, Limits, Resize,
    StatusExtent, Stored, StoredUse, WriteFlags, ZeroFlags,
};
use crate::edge::Edge;
use crate::error::{Error, Result};
use crate::format::{Extent, Format, Lookup, MAX_ZERO_BYTES, Mapping};
use crate::naming::Layer;
use crate::node::Node;
use crate::redo_log::ImageIdentity;
use crate::snapshot::Snapshots;
use announced::{Announced, NodeId};
use cipher::Place;
use executor::sync::Semaphore;
use executor::{Buffer, Errno};
use pieces::Pieces;
use serde_json::{Map, Value};

/// A format as a driver.
pub struct FormatNode<F: Format> {
    format: F,
    id: NodeId,
    /// A look-up of one byte costs as much as one of so many, a power of two.
    grain: u64,
    /// Bounds the memory that holds old content, however many requests a guest has in flight.
    copies: Semaphore,
}

/// Memory for old content at a time, in bytes, about.
const COPY_BYTES: usize = 32 << 20;

/// What the memory that is read into holds before.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Memory {
    Anything,
    Zeroes,
}

impl<F: Format> FormatNode<F> {
    /// Wraps an opened format.
    pub fn new(format: F) -> Self {
        let cluster = format.limits().optimal_transfer.max(1);
        let copies = (COPY_BYTES / 2 / cluster as usize).clamp(4, 64);
        Self {
            id: NodeId::new(),
            grain: u64::from(cluster.next_power_of_two()),
            format,
            copies: Semaphore::new(copies),
        }
    }
    /// The format.
    pub fn format(&self) -> &F {
        &self.format
    }

    /// The format, no longer a driver.
    pub fn into_format(self) -> F {
        self.format
    }

    fn data(&self) -> &Node {
        self.format.data().node()
    }

    /// Whether the node that holds the metadata listens to events.
    #[inline]
    fn is_debugged(&self) -> bool {
        self.format.file().node().is_debugged()
    }

    async fn extent(&self, range: ByteRange) -> std::result::Result<Extent, Errno> {
        let mut extent = match self.format.lookup(range) {
            Lookup::Hit(extent) => extent,
            Lookup::Miss => self.format.resolve(range).await?,
        };
        if extent.length == 0 {
            tracing::error!(format = self.format.name(), ?range, "empty extent");
            return Err(Errno::EIO);
        }
        extent.length = extent.length.min(range.length);
        Ok(extent)
    }

    /// Where plain data of `range` lies, if the look-up for its announcement still holds.
    #[inline]
    fn announced(&self, range: ByteRange) -> Option<Announced> {
        let kept = announced::find(self.id, range)?;
        (self.format.changes() == Some(kept.changes)).then_some(kept)
    }

    /// Reads an extent that covers the whole buffer.
    #[inline]
    fn read_extent(
        &self,
        mapping: Mapping,
        offset: u64,
        (buffer, memory): (Buffer, Memory),
    ) -> IoFuture<'_> {
        match mapping {
            Mapping::Data(host_offset) => {
                let place = Place {
                    guest_offset: offset,
                    host_offset,
                };
                self.read_data(place, buffer)
            }
            Mapping::Unallocated if self.backing_has(offset) => match self.format.backing() {
                Some(backing) => {
                    let file = self.format.file().node();
                    file.after(Event::ReadBackingAio, move || {
                        backing.node().read(offset, buffer)
                    })
                }
                None => IoFuture::done(),
            },
            Mapping::Unallocated | Mapping::Zero(_) => {
                if memory == Memory::Anything {
                    buffer.fill(0);
                }
                IoFuture::done()
            }
            Mapping::Encoded(descriptor) => {
                IoFuture::boxed(self.format.read_encoded(offset, descriptor, buffer))
            }
        }
    }

    /// Whether there is a backing that reaches beyond `offset`.
    fn backing_has(&self, offset: u64) -> bool {
        self.format
            .backing()
            .is_some_and(|backing| offset < backing.node().length())
    }

    /// Reads any range within the virtual disk, extent by extent.
    async fn read_pieces(
        &self,
        offset: u64,
        (buffer, memory): (Buffer, Memory),
    ) -> std::result::Result<(), Errno> {
        let end = offset + buffer.len() as u64;
        let mut pieces = Pieces::new();
        let mut at = offset;
        while at < end && pieces.ok() {
            let range = ByteRange::new(at, end - at);
            let extent = match pieces.drive(self.extent(range)).await {
                Ok(extent) => extent,
                Err(errno) => {
                    pieces.fail(errno);
                    break;
                }
            };
            let start = (at - offset) as usize;
            let slice = buffer.slice(start..start + extent.length as usize);
            pieces
                .push(self.read_extent(extent.mapping, at, (slice, memory)))
                .await;
            at += extent.length;
        }
        pieces.finish().await
    }

    /// Zeroes a range cluster by cluster: by metadata where the format can, else by zero bytes.
    async fn zero_pieces(
        &self,
        range: ByteRange,
        flags: ZeroFlags,
    ) -> std::result::Result<(), Errno> {
        if range.length == 0 {
            return Ok(());
        }
        let grain = match self.format.limits().zero_alignment {
            // The format knows no zeroes: the node writes them, as much at a time as it likes.
            0 => return Err(Errno::EOPNOTSUPP),
            grain => u64::from(grain),
        };
        let end = range.checked_end().ok_or(Errno::EINVAL)?;
        let mut at = range.offset;
        while at < end {
            let next = (at / grain + 1) * grain;
            let is_partial = !at.is_multiple_of(grain) || next > end;
            let asked = match is_partial {
                true => next.min(end) - at,
                false => (end - at) / grain * grain,
            };
            let done = self
                .format
                .write_zeroes(ByteRange::new(at, asked), flags)
                .await;
            at += match done {
                Ok(0) => return Err(Errno::EIO),
                Ok(done) => done.min(asked),
                // A partial cluster is not what `no_fallback` protects from.
                Err(Errno::EOPNOTSUPP) if is_partial || !flags.no_fallback => {
                    let length = asked.min(MAX_ZERO_BYTES);
                    let zeroes = Buffer::zeroed(length as usize);
                    self.write_pieces(at, zeroes).await?;
                    length
                }
                Err(errno) => return Err(errno),
            };
        }
        Ok(())
    }

    async fn flush_debugged(&self) -> std::result::Result<(), Errno> {
        let file = self.format.file().node();
        file.event(Event::FlushToOs).await;
        let one_file = std::ptr::eq(self.format.file(), self.format.data());
        if one_file && !self.format.metadata_dirty() {
            file.event(Event::FlushToDisk).await;
            return self.data().flush().await;
        }
        self.format.flush().await
    }

    async fn status(&self, range: ByteRange) -> std::result::Result<StatusExtent, Errno> {
        let extent = self.extent(range).await?;
        let mut length = extent.length;
        let mut status = BlockStatus {
            allocated: true,
            ..BlockStatus::default()
        };
        match extent.mapping {
            Mapping::Data(offset) => {
                status.data = true;
                // What is stored there is not what is read.
                status.offset = self.format.cipher().is_none().then_some(offset);
            }
            Mapping::Zero(offset) => {
                status.zero = true;
                status.offset = offset;
            }
            Mapping::Encoded(_) => {
                status.data = true;
                status.compressed = true;
            }
            Mapping::Unallocated => {
                status.allocated = false;
                status.zero = !self.backing_has(range.offset);
                if let (false, Some(backing)) = (status.zero, self.format.backing()) {
                    length = length.min(backing.node().length() - range.offset);
                }
            }
        }
        Ok(StatusExtent { length, status })
    }

    /// Grows or shrinks. New space must show neither what a longer backing holds there nor what was
    /// cut off there before.
    async fn set_length(&self, resize: Resize) -> Result<()> {
        let failed = |errno| Error::io("Failed to zero the new area", errno);
        let old = self.format.virtual_size();
        let limits = self.format.limits();
        let cluster = limits.optimal_transfer.max(limits.zero_alignment).max(1);
        let tail_end = old.next_multiple_of(u64::from(cluster)).min(resize.length);
        if tail_end > old {
            // Before the length changes: a power cut between would show it.
            self.zero_tail(old..tail_end).await.map_err(failed)?;
        }
        self.format.resize(resize).await?;
        let backed = self
            .format
            .backing()
            .map_or(0, |backing| backing.node().length());
        let from = tail_end.max(old);
        let shown = backed.min(resize.length).saturating_sub(from);
        self.zero_pieces(ByteRange::new(from, shown), ZeroFlags::default())
            .await
            .map_err(failed)
    }

    /// Zeroes what the last cluster holds beyond the end of the disk.
    async fn zero_tail(&self, tail: std::ops::Range<u64>) -> std::result::Result<(), Errno> {
        let mut at = tail.start;
        while at < tail.end {
            let range = ByteRange::new(at, tail.end - at);
            let extent = self.status(range).await?;
            let length = extent.length.min(range.length).max(1);
            if !extent.status.zero {
                let zeroes = Buffer::zeroed(length as usize);
                self.write_pieces(at, zeroes).await?;
            }
            at += length;
        }
        Ok(())
    }
}

impl<F: Format> Driver for FormatNode<F> {
    fn driver_name(&self) -> &'static str {
        self.format.name()
    }
    fn length(&self) -> u64 {
        self.format.virtual_size()
    }
    fn limits(&self) -> Limits {
        self.format.limits()
    }
    fn grows(&self) -> bool {
        false
    }
    #[inline]
    fn prefetch(&self, offset: u64) {
        let changes = self.format.changes();
        let cluster_left = self.grain - (offset & (self.grain - 1));
        let Lookup::Hit(Extent {
            length,
            mapping: Mapping::Data(host_offset),
            in_place,
        }) = self.format.lookup(ByteRange::new(offset, cluster_left))
        else {
            return;
        };
        self.data().prefetch(host_offset);
        if let (Some(changes), None) = (changes, self.format.cipher()) {
            announced::keep(Announced {
                node: self.id,
                changes,
                range: ByteRange::new(offset, length),
                host_offset,
                in_place,
            });
        }
    }
    fn can_prefetch(&self) -> bool {
        self.format.data().node().driver().can_prefetch()
    }
    fn read(&self, offset: u64, buffer: Buffer) -> IoFuture<'_> {
        let range = ByteRange::new(offset, buffer.len() as u64);
        if range.length == 0 {
            return IoFuture::done();
        }
        if let Some(kept) = self.announced(range)
            && !self.is_debugged()
        {
            return self.data().read(kept.host_offset, buffer);
        }
        let target = (buffer, Memory::Anything);
        match self.format.lookup(range) {
            Lookup::Hit(extent) if extent.length >= range.length => {
                self.read_extent(extent.mapping, offset, target)
            }
            _ => IoFuture::boxed(self.read_pieces(offset, target)),
        }
    }
    fn takes_backing(&self) -> bool {
        self.format.takes_backing()
    }
    fn compresses(&self) -> bool {
        self.format.can_encode()
    }
    fn reads_zero_when_new(&self) -> bool {
        self.data().driver().reads_zero_when_new()
    }
    fn write(&self, offset: u64, buffer: Buffer, flags: WriteFlags) -> IoFuture<'_> {
        let range = ByteRange::new(offset, buffer.len() as u64);
        if range.length == 0 {
            return IoFuture::done();
        }
        if flags.compressed {
            return IoFuture::boxed(self.write_compressed(offset, buffer));
        }
        if let Some(kept) = self.announced(range)
            && kept.in_place
            && !self.is_debugged()
        {
            let flags = WriteFlags::default();
            return self.data().write(kept.host_offset, buffer, flags);
        }
        match self.format.lookup(range) {
            Lookup::Hit(Extent {
                length,
                mapping: Mapping::Data(host_offset),
                in_place: true,
            }) if length >= range.length => {
                let place = Place {
                    guest_offset: offset,
                    host_offset,
                };
                self.write_data(place, buffer)
            }
            _ => IoFuture::boxed(self.write_pieces(offset, buffer)),
        }
    }
    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> IoFuture<'_> {
        IoFuture::boxed(self.zero_pieces(range, flags))
    }
    fn discard(&self, range: ByteRange) -> IoFuture<'_> {
        IoFuture::boxed(self.format.discard(range))
    }
    fn upkeep(&self) -> IoFuture<'_> {
        IoFuture::boxed(self.format.upkeep())
    }
    fn flush(&self) -> IoFuture<'_> {
        if self.is_debugged() {
            return IoFuture::boxed(self.flush_debugged());
        }
        let one_file = std::ptr::eq(self.format.file(), self.format.data());
        if one_file && !self.format.metadata_dirty() {
            self.data().flush()
        } else {
            IoFuture::boxed(self.format.flush())
        }
    }
    fn block_status(
        &self,
        range: ByteRange,
    ) -> BoxFuture<'_, std::result::Result<StatusExtent, Errno>> {
        Box::pin(async move {
            let mut extent = self.status(range).await?;
            if extent.status.data && extent.status.offset.is_some() {
                extent.status.sparse = self.format.storage_is_sparse().await;
            }
            Ok(extent)
        })
    }
    fn stored(&self, range: ByteRange, purpose: StoredUse) -> Option<Stored<'_>> {
        if self.is_debugged() || self.format.cipher().is_some() {
            return None;
        }
        match self.format.lookup(range) {
            Lookup::Hit(Extent {
                length,
                mapping: Mapping::Data(host_offset),
                in_place,
            }) if length >= range.length && (in_place || purpose == StoredUse::Read) => {
                let range = ByteRange::new(host_offset, range.length);
                self.data().stored(range, purpose)
            }
            _ => None,
        }
    }
    fn resize(&self, resize: Resize) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.set_length(resize))
    }
    fn refer_to_backing(&self, to: BackingReference) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.format.refer_to_backing(to))
    }
    fn make_empty(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.format.make_empty())
    }
    fn close(&self) -> BoxFuture<'_, std::result::Result<(), Errno>> {
        Box::pin(self.format.close())
    }
    fn edges(&self) -> Vec<(&'static str, &Edge)> {
        let (file, data) = (self.format.file(), self.format.data());
        let data = (!std::ptr::eq(file, data)).then_some(data);
        let backing = self.format.backing();
        [Some(file), data, backing]
            .into_iter()
            .flatten()
            .map(|edge| (edge.name(), edge))
            .collect()
    }
    fn check<'a>(
        &'a self,
        options: CheckOptions,
        sink: &'a mut dyn CheckSink,
    ) -> BoxFuture<'a, Result<CheckResult>> {
        Box::pin(self.format.check(options, sink))
    }
    fn amend<'a>(&'a self, changes: &'a mut crate::AmendRequest<'_>) -> BoxFuture<'a, Result<()>> {
        Box::pin(self.format.amend(changes))
    }
    fn describe(&self) -> Map<String, Value> {
        self.format.describe()
    }
    fn layer(&self) -> Layer {
        Layer::Format
    }
    fn identity(&self) -> Option<ImageIdentity> {
        None
    }
    fn machine_state(&self) -> Option<&dyn crate::MachineState> {
        self.format.machine_state().map(|_| self as _)
    }
    fn snapshots(&self) -> Option<&dyn Snapshots> {
        self.format.snapshots()
    }
    fn bitmap_store(&self) -> Option<&dyn BitmapStore> {
        self.format.bitmap_store()
    }
}

#[cfg(test)]
mod tests;
