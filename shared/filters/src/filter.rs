//! What filters have in common: everything passes to one child unless the filter says otherwise.
//!
//! ```text
//!   Node ─► FilterNode<F>: Driver ─► F: Filter ── read, write, ... ──► child
//! ```
//!
//! Owns: the seam [`Filter`] and its adapter to the graph. Promises: a request that a filter has no
//! opinion on is the child's own future; permissions, growth, hints and changes of length pass
//! through. Internal snapshots and stored bitmaps belong to the image, whose node has them:
//! they do not pass.

use block::error::Result;
use block::{
    BoxFuture, Buffer, ByteRange, Driver, Edge, Errno, ImageIdentity, IoFuture, Limits, Node,
    Resize, StatusExtent, WriteFlags, ZeroFlags,
};
use serde_json::{Map, Value};

/// A node that passes requests on to one child.
pub trait Filter: Send + Sync {
    /// The driver's name on the command line.
    fn name(&self) -> &'static str;
    /// The child.
    fn edge(&self) -> &Edge;
    /// All children.
    fn edges(&self) -> Vec<(&'static str, &Edge)> {
        vec![("file", self.edge())]
    }
    /// See [`block::Driver::filename`].
    fn filename(&self) -> String {
        String::new()
    }
    /// The child's node.
    fn child(&self) -> &Node {
        self.edge().node()
    }
    /// What one call can take.
    fn limits(&self) -> Limits {
        self.child().driver().limits().passed_on()
    }
    /// Current length in bytes.
    fn length(&self) -> u64 {
        self.child().length()
    }
    /// Whether a write past the end grows the node.
    fn grows(&self) -> bool {
        self.child().grows()
    }
    /// Whether writes may ask to be stored compressed.
    fn compresses(&self) -> bool {
        self.child().driver().compresses()
    }
    /// Fills `buffer` from `offset`.
    fn read(&self, offset: u64, buffer: Buffer) -> IoFuture<'_> {
        self.child().read(offset, buffer)
    }
    /// Writes `buffer` at `offset`.
    fn write(&self, offset: u64, buffer: Buffer, flags: WriteFlags) -> IoFuture<'_> {
        self.child().write(offset, buffer, flags)
    }
    /// Makes a range read as zeroes.
    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> IoFuture<'_> {
        self.child().write_zeroes(range, flags)
    }
    /// Gives storage up.
    fn discard(&self, range: ByteRange) -> IoFuture<'_> {
        self.child().discard(range)
    }
    /// Makes what completed before durable.
    fn flush(&self) -> IoFuture<'_> {
        self.child().flush()
    }
    /// See [`Driver::drain_begin`].
    fn drain_begin(&self) {}
    /// See [`Driver::drain_end`].
    fn drain_end(&self) {}
    /// What is known about the start of a range.
    fn block_status(
        &self,
        range: ByteRange,
    ) -> BoxFuture<'_, std::result::Result<StatusExtent, Errno>> {
        self.child().block_status(range)
    }
    /// Changes the length.
    fn resize(&self, resize: Resize) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.child().resize(resize))
    }
    /// Ends what the filter keeps of its own; no I/O follows.
    fn close(&self) -> BoxFuture<'_, std::result::Result<(), Errno>> {
        Box::pin(async { Ok(()) })
    }
    /// Whether the filter listens to events.
    fn debugger(&self) -> Option<&dyn block::Debugger> {
        None
    }
    /// Driver-specific facts besides those of the child.
    fn describe(&self) -> Map<String, Value> {
        Map::new()
    }
}

/// A filter as a driver.
pub struct FilterNode<F>(pub F);

/// What is told of the child as the filter's own.
const PASSED_FACTS: [&str; 2] = ["actual-size", "cluster-size"];

impl<F: Filter> Driver for FilterNode<F> {
    fn driver_name(&self) -> &'static str {
        self.0.name()
    }
    fn length(&self) -> u64 {
        self.0.length()
    }
    fn limits(&self) -> Limits {
        self.0.limits()
    }
    fn grows(&self) -> bool {
        self.0.grows()
    }
    fn prefetch(&self, offset: u64) {
        self.0.child().prefetch(offset);
    }
    fn can_prefetch(&self) -> bool {
        self.0.child().driver().can_prefetch()
    }
    fn read(&self, offset: u64, buffer: Buffer) -> IoFuture<'_> {
        self.0.read(offset, buffer)
    }
    fn compresses(&self) -> bool {
        self.0.compresses()
    }
    fn reads_zero_when_new(&self) -> bool {
        self.0.child().driver().reads_zero_when_new()
    }
    fn write(&self, offset: u64, buffer: Buffer, flags: WriteFlags) -> IoFuture<'_> {
        self.0.write(offset, buffer, flags)
    }
    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> IoFuture<'_> {
        self.0.write_zeroes(range, flags)
    }
    fn discard(&self, range: ByteRange) -> IoFuture<'_> {
        self.0.discard(range)
    }
    fn flush(&self) -> IoFuture<'_> {
        self.0.flush()
    }
    fn drain_begin(&self) {
        self.0.drain_begin();
    }
    fn drain_end(&self) {
        self.0.drain_end();
    }
    fn block_status(
        &self,
        range: ByteRange,
    ) -> BoxFuture<'_, std::result::Result<StatusExtent, Errno>> {
        self.0.block_status(range)
    }
    fn resize(&self, resize: Resize) -> BoxFuture<'_, Result<()>> {
        self.0.resize(resize)
    }
    fn close(&self) -> BoxFuture<'_, std::result::Result<(), Errno>> {
        self.0.close()
    }
    fn edges(&self) -> Vec<(&'static str, &Edge)> {
        self.0.edges()
    }
    fn filtered(&self) -> Option<&Edge> {
        Some(self.0.edge())
    }
    fn debugger(&self) -> Option<&dyn block::Debugger> {
        self.0.debugger()
    }
    fn describe(&self) -> Map<String, Value> {
        let mut described = self.0.child().driver().describe();
        described.retain(|name, _| PASSED_FACTS.contains(&name.as_str()));
        described.extend(self.0.describe());
        described
    }
    fn filename(&self) -> String {
        self.0.filename()
    }
    fn identity(&self) -> Option<ImageIdentity> {
        self.0.child().identity()
    }
}
