//! The seam of formats that are only read: the part of [`Format`] that they have.
//!
//! ```text
//!   ReadFormat ── ReadOnly(..) ──► Format ── FormatNode ──► Driver
//!   says where     refuses changes            moves data
//! ```
//!
//! A node of such a format is read-only: [`open`] sees to that before it opens the file, so that no
//! change gets as far as the format.

use crate::driver::{ByteRange, Driver, Limits, Resize, ZeroFlags};
use crate::edge::Edge;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{Extent, Format, Lookup, WritePlan};
use crate::format_node::FormatNode;
use crate::open::{ChildRole, OpenRequest};
use executor::{Buffer, Errno};
use serde_json::{Map, Value};

/// An image format that is only read. Any thread may call at any time; futures stay on the calling
/// thread.
#[expect(async_fn_in_trait, reason = "futures are not Send by design")]
pub trait ReadFormat: Send + Sync + Sized + 'static {
    /// Opens the image in `file`.
    ///
    /// # Errors
    /// `Corrupt` or `Unsupported` naming what it is, `Io`.
    async fn open(file: Edge) -> Result<Self>;
    /// The driver's name.
    fn name(&self) -> &'static str;
    /// Virtual size in bytes.
    fn virtual_size(&self) -> u64;
    /// The child that data and metadata live in.
    fn file(&self) -> &Edge;
    /// Limits of the node: what one look-up is about, for formats that have such a unit.
    fn limits(&self) -> Limits {
        Limits::default()
    }
    /// See [`Format::lookup`]. Whether an extent is `in_place` does not matter.
    fn lookup(&self, range: ByteRange) -> Lookup;
    /// See [`Format::resolve`].
    async fn resolve(&self, range: ByteRange) -> std::result::Result<Extent, Errno>;
    /// See [`Format::read_encoded`]; for formats that map anything to `Encoded`.
    async fn read_encoded(
        &self,
        offset: u64,
        descriptor: u64,
        buffer: Buffer,
    ) -> std::result::Result<(), Errno> {
        let _ = (offset, descriptor, buffer);
        Err(Errno::EIO)
    }
    /// See [`crate::Driver::describe`].
    fn describe(&self) -> Map<String, Value> {
        Map::new()
    }
}

/// What the table line of such a format calls: a read-only node of the image in the child `file`.
///
/// # Errors
/// `Invalid` for a node that is to be written; those of the child and of [`ReadFormat::open`].
pub async fn open<F: ReadFormat>(request: &mut OpenRequest<'_>) -> Result<Box<dyn Driver>> {
    request.only_reads()?;
    let file = request.required_child("file", ChildRole::Image).await?;
    let image = F::open(file).await?;
    Ok(Box::new(FormatNode::new(ReadOnly(image))))
}

/// A format that refuses changes.
pub struct ReadOnly<F>(pub F);

impl<F: ReadFormat> Format for ReadOnly<F> {
    type Token<'a> = ();

    fn name(&self) -> &'static str {
        self.0.name()
    }
    fn virtual_size(&self) -> u64 {
        self.0.virtual_size()
    }
    fn limits(&self) -> Limits {
        self.0.limits()
    }
    fn file(&self) -> &Edge {
        self.0.file()
    }
    fn data(&self) -> &Edge {
        self.0.file()
    }
    fn backing(&self) -> Option<&Edge> {
        None
    }
    fn lookup(&self, range: ByteRange) -> Lookup {
        self.0.lookup(range)
    }
    async fn resolve(&self, range: ByteRange) -> std::result::Result<Extent, Errno> {
        self.0.resolve(range).await
    }
    async fn prepare_write(&self, _range: ByteRange) -> std::result::Result<WritePlan<()>, Errno> {
        Err(Errno::EROFS)
    }
    async fn commit(&self, _plan: WritePlan<()>) -> std::result::Result<(), Errno> {
        Err(Errno::EROFS)
    }
    async fn abort(&self, _plan: WritePlan<()>) {}
    async fn write_zeroes(
        &self,
        _range: ByteRange,
        _flags: ZeroFlags,
    ) -> std::result::Result<u64, Errno> {
        Err(Errno::EROFS)
    }
    async fn discard(&self, _range: ByteRange) -> std::result::Result<(), Errno> {
        Err(Errno::EROFS)
    }
    async fn read_encoded(
        &self,
        offset: u64,
        descriptor: u64,
        buffer: Buffer,
    ) -> std::result::Result<(), Errno> {
        self.0.read_encoded(offset, descriptor, buffer).await
    }
    async fn flush(&self) -> std::result::Result<(), Errno> {
        Ok(())
    }
    fn metadata_dirty(&self) -> bool {
        false
    }
    async fn resize(&self, _resize: Resize) -> Result<()> {
        Err(Error::new(ErrorKind::Invalid, "Image is read-only"))
    }
    async fn close(&self) -> std::result::Result<(), Errno> {
        Ok(())
    }
    fn describe(&self) -> Map<String, Value> {
        self.0.describe()
    }
}
