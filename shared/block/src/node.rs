//! A named node of the graph: a driver plus the options every node has.
//!
//! Every call on a child goes through [`Node`], which checks range and permission, aligns
//! (read-modify-write under a serialising range lock), splits at `max_transfer`, detects zeroes,
//! and falls back from `write_zeroes` to writing zero bytes. An aligned request within limits
//! passes straight to the driver.

use crate::driver::{BoxFuture, ByteRange, Driver, IoFuture, StatusExtent, WriteFlags, ZeroFlags};
use executor::{Buffer, Errno};

/// `discard=`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Discard {
    /// Discards are ignored.
    #[default]
    Ignore,
    /// Discards are passed on.
    Unmap,
}

/// `detect-zeroes=`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DetectZeroes {
    /// Written as they are.
    #[default]
    Off,
    /// Turned into write-zeroes.
    On,
    /// Turned into write-zeroes that may unmap (needs `discard=unmap`).
    Unmap,
}

/// Options common to all nodes (BlockdevOptions of QEMU's QMP reference).
#[derive(Clone, Debug, Default)]
pub struct NodeOptions {
    /// `node-name`, or a generated one (`#block123`).
    pub node_name: String,
    /// `read-only`
    pub read_only: bool,
    /// `auto-read-only`
    pub auto_read_only: bool,
    /// `cache.direct`
    pub cache_direct: bool,
    /// `cache.no-flush`: flushes are not passed to the host.
    pub cache_no_flush: bool,
    /// `discard`
    pub discard: Discard,
    /// `detect-zeroes`
    pub detect_zeroes: DetectZeroes,
    /// `force-share`
    pub force_share: bool,
}

/// A node.
pub struct Node {}

impl Node {
    /// A node outside of any graph (tests, tools) or about to be added to one.
    pub fn new(options: NodeOptions, driver: Box<dyn Driver>) -> std::sync::Arc<Node> {
        todo!()
    }
    /// Its name.
    pub fn name(&self) -> &str {
        todo!()
    }
    /// Its options.
    pub fn options(&self) -> &NodeOptions {
        todo!()
    }
    /// Its driver.
    pub fn driver(&self) -> &dyn Driver {
        todo!()
    }
    /// Length in bytes.
    pub fn length(&self) -> u64 {
        todo!()
    }
    /// Reads; bytes past the end are zeroes.
    pub fn read(&self, offset: u64, buffer: Buffer) -> IoFuture<'_> {
        todo!()
    }
    /// Writes.
    pub fn write(&self, offset: u64, buffer: Buffer, flags: WriteFlags) -> IoFuture<'_> {
        todo!()
    }
    /// Makes a range read as zeroes.
    pub fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> IoFuture<'_> {
        todo!()
    }
    /// Discards a range (a no-op with `discard=ignore`).
    pub fn discard(&self, range: ByteRange) -> IoFuture<'_> {
        todo!()
    }
    /// Flushes; failures are sticky (later flushes fail until the node is reopened or the
    /// unflushed ranges are rewritten).
    pub fn flush(&self) -> IoFuture<'_> {
        todo!()
    }
    /// What is known about the start of a range of this node alone (not its backing).
    pub fn block_status(&self, range: ByteRange) -> BoxFuture<'_, Result<StatusExtent, Errno>> {
        todo!()
    }
}
