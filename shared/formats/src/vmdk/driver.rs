//! The node: a disk made of extents.

use super::SECTOR;
use super::descriptor::{Descriptor, ExtentType, NO_PARENT};
use super::image::{Content, Parent};
use super::sparse::Sparse;
use block::driver::{Stored, StoredUse};
use block::format::Format;
use block::naming::Layer;
use block::{
    BlockStatus, BoxFuture, Buffer, ByteRange, CheckOptions, CheckResult, CheckSink, Driver, Edge,
    Errno, Error, ErrorKind, FormatNode, ImageIdentity, IoFuture, Limits, Resize, StatusExtent,
    WriteFlags, ZeroFlags,
};
use serde_json::{Map, Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Where the bytes of an extent are.
pub(super) enum Storage {
    Sparse(Box<FormatNode<Sparse>>),
    /// From this offset of the file on.
    Flat(Arc<Edge>, u64),
    /// Not opened: the image is only described.
    Closed,
}

/// A part of the disk.
pub(super) struct Part {
    /// From here to there on the disk, in bytes.
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) storage: Storage,
    /// How the descriptor calls it; `None` of the only one, in the same file.
    pub(super) kind: Option<ExtentType>,
    pub(super) filename: String,
    /// It was written to since it was opened.
    is_written: AtomicBool,
}

impl Part {
    pub(super) fn new(
        (start, end): (u64, u64),
        storage: Storage,
        (kind, filename): (Option<ExtentType>, String),
    ) -> Self {
        Self {
            start,
            end,
            storage,
            kind,
            filename,
            is_written: AtomicBool::new(false),
        }
    }

    fn sparse(&self) -> Option<&Sparse> {
        match &self.storage {
            Storage::Sparse(node) => Some(node.format()),
            Storage::Flat(..) | Storage::Closed => None,
        }
    }

    fn edge(&self) -> Option<&Edge> {
        match &self.storage {
            Storage::Sparse(node) => Some(&node.format().file),
            Storage::Flat(edge, _) => Some(edge),
            Storage::Closed => None,
        }
    }

    #[inline]
    fn read(&self, offset: u64, buffer: Buffer) -> IoFuture<'_> {
        match &self.storage {
            Storage::Sparse(node) => node.read(offset, buffer),
            Storage::Flat(edge, first) => edge.node().read(first + (offset - self.start), buffer),
            Storage::Closed => IoFuture::error(Errno::EIO),
        }
    }

    #[inline]
    fn write(&self, offset: u64, buffer: Buffer, flags: WriteFlags) -> IoFuture<'_> {
        if !self.is_written.load(Ordering::Relaxed) {
            self.is_written.store(true, Ordering::Relaxed);
        }
        match &self.storage {
            Storage::Sparse(node) => node.write(offset, buffer, flags),
            Storage::Flat(edge, first) => {
                let at = first + (offset - self.start);
                edge.node().write(at, buffer, flags)
            }
            Storage::Closed => IoFuture::error(Errno::EIO),
        }
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> IoFuture<'_> {
        self.is_written.store(true, Ordering::Relaxed);
        match &self.storage {
            Storage::Sparse(node) => node.write_zeroes(range, flags),
            Storage::Flat(edge, first) => {
                let at = first + (range.offset - self.start);
                let range = ByteRange::new(at, range.length);
                edge.node().write_zeroes(range, flags)
            }
            Storage::Closed => IoFuture::error(Errno::EIO),
        }
    }

    /// `ImageInfo` of an extent.
    fn describe(&self) -> Value {
        let mut info = json!({
            "filename": self.filename,
            "format": self.kind.map_or("", ExtentType::name),
            "virtual-size": self.end - self.start,
        });
        if let Some(sparse) = self.sparse() {
            info["cluster-size"] = json!(sparse.grain_bytes());
            if sparse.layout.compressed {
                info["compressed"] = json!(true);
            }
        }
        info
    }

    /// Whether all that is mapped lies within the file; the sector of the extent where it does not.
    async fn check(&self) -> Result<Option<u64>, (u64, Errno)> {
        match &self.storage {
            Storage::Sparse(node) => node.format().first_outside().await,
            Storage::Flat(edge, first) => Ok((*first >= edge.node().length()).then_some(0)),
            Storage::Closed => Ok(None),
        }
    }
}

/// What a node is made of.
pub(super) struct Vmdk {
    /// What holds the descriptor.
    pub(super) file: Arc<Edge>,
    pub(super) descriptor: Descriptor,
    pub(super) create_type: String,
    pub(super) content: Content,
    pub(super) parent: Option<Arc<Parent>>,
    /// In the order of the disk, at least one.
    pub(super) parts: Vec<Part>,
}

impl Vmdk {
    /// The extent that a byte of the disk is in, or the last one.
    #[inline]
    fn part(&self, offset: u64) -> &Part {
        let last = self.parts.len() - 1;
        match last {
            0 => &self.parts[0],
            _ => &self.parts[self.parts.partition_point(|it| it.end <= offset).min(last)],
        }
    }

    /// The pieces of a range that lie in one extent each.
    fn pieces(&self, range: ByteRange) -> impl Iterator<Item = (&Part, ByteRange)> {
        let end = range.offset + range.length;
        let mut at = range.offset;
        std::iter::from_fn(move || {
            let part = (at < end).then(|| self.part(at))?;
            let piece = ByteRange::new(at, part.end.clamp(at + 1, end) - at);
            at += piece.length;
            Some((part, piece))
        })
    }

    async fn read_across(&self, offset: u64, buffer: Buffer) -> Result<(), Errno> {
        for (part, piece) in self.pieces(ByteRange::new(offset, buffer.len() as u64)) {
            let start = (piece.offset - offset) as usize;
            let slice = buffer.slice(start..start + piece.length as usize);
            part.read(piece.offset, slice).await?;
        }
        Ok(())
    }

    async fn write_slowly(
        &self,
        offset: u64,
        buffer: Buffer,
        flags: WriteFlags,
    ) -> Result<(), Errno> {
        self.content.change(&self.file).await?;
        for (part, piece) in self.pieces(ByteRange::new(offset, buffer.len() as u64)) {
            let start = (piece.offset - offset) as usize;
            let slice = buffer.slice(start..start + piece.length as usize);
            part.write(piece.offset, slice, flags).await?;
        }
        Ok(())
    }

    async fn zero_slowly(&self, range: ByteRange, flags: ZeroFlags) -> Result<(), Errno> {
        self.content.change(&self.file).await?;
        for (part, piece) in self.pieces(range) {
            part.write_zeroes(piece, flags).await?;
        }
        Ok(())
    }

    async fn flush_written(&self) -> Result<(), Errno> {
        for part in &self.parts {
            if let (true, Some(edge)) = (part.is_written.load(Ordering::Relaxed), part.edge()) {
                edge.node().flush().await?;
            }
        }
        Ok(())
    }

    /// Bytes of a grain, if all extents are sparse and alike in this.
    fn grain_bytes(&self) -> Option<u64> {
        let first = self.parts[0].sparse()?.grain_bytes();
        let mut grains = self
            .parts
            .iter()
            .map(|part| part.sparse().map(Sparse::grain_bytes));
        grains.all(|grain| grain == Some(first)).then_some(first)
    }

    fn is_compressed(&self) -> bool {
        let sparse = self.parts[0].sparse();
        self.parts.len() == 1 && sparse.is_some_and(Format::can_encode)
    }

    async fn check_parts(&self, sink: &mut dyn CheckSink) -> Result<CheckResult, Error> {
        for part in &self.parts {
            let (sector, what, errno) = match part.check().await {
                Ok(None) => continue,
                Ok(Some(sector)) => (sector, "points after EOF", Errno::EINVAL),
                Err((sector, errno)) => (sector, "", errno),
            };
            let sector = part.start / SECTOR + sector;
            sink.error(&match what {
                "" => format!("ERROR: could not get cluster_offset for sector {sector}"),
                what => format!("ERROR: cluster offset for sector {sector} {what}"),
            });
            return Err(Error::io("Check failed", errno));
        }
        Ok(CheckResult::default())
    }
}

impl Driver for Vmdk {
    fn driver_name(&self) -> &'static str {
        "vmdk"
    }
    fn length(&self) -> u64 {
        self.parts.last().map_or(0, |part| part.end)
    }
    fn limits(&self) -> Limits {
        let grain = self.grain_bytes().unwrap_or(0) as u32;
        Limits {
            optimal_transfer: grain,
            zero_alignment: grain,
            ..Limits::default()
        }
    }
    fn grows(&self) -> bool {
        false
    }
    #[inline]
    fn prefetch(&self, offset: u64) {
        let part = self.part(offset);
        match &part.storage {
            Storage::Sparse(node) => node.prefetch(offset),
            Storage::Flat(edge, first) if offset >= part.start => {
                edge.node()
                    .prefetch(first.saturating_add(offset - part.start));
            }
            Storage::Flat(..) | Storage::Closed => {}
        }
    }
    fn can_prefetch(&self) -> bool {
        let edges = self.parts.iter().map(Part::edge);
        let mut drivers = edges.map(|edge| edge.map(|it| it.node().driver()));
        drivers.any(|driver| driver.is_some_and(Driver::can_prefetch))
    }
    fn read(&self, offset: u64, buffer: Buffer) -> IoFuture<'_> {
        let part = self.part(offset);
        match offset + buffer.len() as u64 <= part.end {
            true => part.read(offset, buffer),
            false => IoFuture::boxed(self.read_across(offset, buffer)),
        }
    }
    fn takes_backing(&self) -> bool {
        true
    }
    fn compresses(&self) -> bool {
        self.is_compressed()
    }
    fn stores_only_compressed(&self) -> bool {
        self.is_compressed()
    }
    fn reads_zero_when_new(&self) -> bool {
        let mut edges = self.parts.iter().map(Part::edge);
        edges.all(|edge| edge.is_some_and(|it| it.node().driver().reads_zero_when_new()))
    }
    fn write(&self, offset: u64, buffer: Buffer, mut flags: WriteFlags) -> IoFuture<'_> {
        flags.compressed |= self.is_compressed();
        let part = self.part(offset);
        let is_within = offset + buffer.len() as u64 <= part.end;
        match is_within && self.content.is_changed() {
            true => part.write(offset, buffer, flags),
            false => IoFuture::boxed(self.write_slowly(offset, buffer, flags)),
        }
    }
    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> IoFuture<'_> {
        IoFuture::boxed(self.zero_slowly(range, flags))
    }
    fn discard(&self, _range: ByteRange) -> IoFuture<'_> {
        IoFuture::done()
    }
    fn flush(&self) -> IoFuture<'_> {
        match (&self.parts[..], self.parts[0].edge()) {
            ([_], Some(edge)) => edge.node().flush(),
            _ => IoFuture::boxed(self.flush_written()),
        }
    }
    fn block_status(&self, range: ByteRange) -> BoxFuture<'_, Result<StatusExtent, Errno>> {
        let part = self.part(range.offset);
        let length = range.length.min(part.end - range.offset);
        match &part.storage {
            Storage::Sparse(node) => node.block_status(ByteRange::new(range.offset, length)),
            Storage::Flat(_, first) => {
                let status = BlockStatus {
                    data: true,
                    allocated: true,
                    offset: Some(first + (range.offset - part.start)),
                    sparse: true,
                    ..BlockStatus::default()
                };
                Box::pin(async move { Ok(StatusExtent { length, status }) })
            }
            Storage::Closed => Box::pin(async { Err(Errno::EIO) }),
        }
    }
    fn stored(&self, range: ByteRange, purpose: StoredUse) -> Option<Stored<'_>> {
        let part = self.part(range.offset);
        let is_within = range.checked_end()? <= part.end;
        let is_allowed = purpose == StoredUse::Read || self.content.is_changed();
        if !is_within || !is_allowed {
            return None;
        }
        if purpose == StoredUse::Overwrite {
            part.is_written.store(true, Ordering::Relaxed);
        }
        match &part.storage {
            Storage::Sparse(node) => node.stored(range, purpose),
            Storage::Flat(edge, first) => {
                let at = first + (range.offset - part.start);
                edge.node()
                    .stored(ByteRange::new(at, range.length), purpose)
            }
            Storage::Closed => None,
        }
    }
    fn resize(&self, _resize: Resize) -> BoxFuture<'_, Result<(), Error>> {
        let message = "Image format driver does not support resize";
        Box::pin(async move { Err(Error::new(ErrorKind::Unsupported, message)) })
    }
    fn close(&self) -> BoxFuture<'_, Result<(), Errno>> {
        Box::pin(async move {
            let mut closed = self.flush_written().await;
            for part in &self.parts {
                if let Storage::Sparse(node) = &part.storage {
                    closed = closed.and(node.close().await);
                }
            }
            closed
        })
    }
    fn edges(&self) -> Vec<(&'static str, &Edge)> {
        let mut edges: Vec<&Edge> = vec![&self.file];
        for edge in self.parts.iter().filter_map(Part::edge) {
            if !edges.iter().any(|known| std::ptr::eq(*known, edge)) {
                edges.push(edge);
            }
        }
        edges.extend(self.parent.as_ref().map(|parent| parent.edge()));
        edges.into_iter().map(|edge| (edge.name(), edge)).collect()
    }
    fn data_child(&self, offset: u64) -> Option<&Edge> {
        self.part(offset).edge()
    }
    fn check<'a>(
        &'a self,
        options: CheckOptions,
        sink: &'a mut dyn CheckSink,
    ) -> BoxFuture<'a, Result<CheckResult, Error>> {
        Box::pin(async move {
            match options.repair.leaks() {
                true => Err(Error::check_unsupported()),
                false => self.check_parts(sink).await,
            }
        })
    }
    fn describe(&self) -> Map<String, Value> {
        let mut members = Map::new();
        if let Some(grain) = self.grain_bytes() {
            members.insert("cluster-size".into(), json!(grain));
        }
        members.insert("dirty-flag".into(), json!(false));
        if let Some(name) = &self.descriptor.parent {
            members.insert("backing-filename".into(), json!(name));
            members.insert("backing-filename-format".into(), json!("vmdk"));
        }
        let extents: Vec<Value> = self.parts.iter().map(Part::describe).collect();
        let specific = json!({"type": "vmdk", "data": {
            "create-type": self.create_type,
            "cid": self.content.cid(),
            "parent-cid": self.descriptor.parent_cid.unwrap_or(NO_PARENT),
            "extents": extents,
        }});
        members.insert("format-specific".into(), specific);
        members
    }
    fn layer(&self) -> Layer {
        Layer::Format
    }
    fn identity(&self) -> Option<ImageIdentity> {
        None
    }
}
