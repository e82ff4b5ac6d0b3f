//! The object-safe seam that every node implements, and the small future it answers with.

use crate::bitmap::BitmapStore;
use crate::debug::Debugger;
use crate::edge::Permissions;
use crate::machine_state::MachineState;
use crate::naming::Layer;
use crate::node::WriteGuard;
use crate::redo_log::ImageIdentity;
use crate::snapshot::Snapshots;
use executor::{Buffer, Errno, File, FileOp};
use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll};

/// A boxed future of the current thread.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// A range of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ByteRange {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub length: u64,
}

impl ByteRange {
    /// `length` bytes from `offset`.
    pub const fn new(offset: u64, length: u64) -> Self {
        Self { offset, length }
    }
    /// One past the last byte; `None` on overflow.
    pub const fn checked_end(self) -> Option<u64> {
        self.offset.checked_add(self.length)
    }
}

/// The answer to an I/O call: done, one operation on the ring, or code.
///
/// Pass-through drivers hand on the child's future as it is.
pub enum IoFuture<'a> {
    /// Done already.
    Ready(Result<(), Errno>),
    /// One file operation.
    Op(FileOp),
    /// One write to a node that keeps count of its writes ([`crate::Node`] makes these).
    Tracked(FileOp, Option<WriteGuard<'a>>),
    /// Anything longer.
    Boxed(BoxFuture<'a, Result<(), Errno>>),
}

impl<'a> IoFuture<'a> {
    /// Boxes `future`.
    pub fn boxed(future: impl Future<Output = Result<(), Errno>> + 'a) -> Self {
        Self::Boxed(Box::pin(future))
    }
    /// A failure that is known at once.
    pub const fn error(errno: Errno) -> Self {
        Self::Ready(Err(errno))
    }
    /// A success that is known at once.
    pub const fn done() -> Self {
        Self::Ready(Ok(()))
    }
}

impl From<FileOp> for IoFuture<'_> {
    fn from(operation: FileOp) -> Self {
        match operation.result() {
            Some(result) => Self::Ready(result),
            None => Self::Op(operation),
        }
    }
}

impl Future for IoFuture<'_> {
    type Output = Result<(), Errno>;
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.get_mut() {
            Self::Ready(result) => Poll::Ready(*result),
            Self::Op(op) => Pin::new(op).poll(cx),
            Self::Tracked(op, guard) => {
                let result = Pin::new(op).poll(cx);
                if result.is_ready() {
                    *guard = None;
                }
                result
            }
            Self::Boxed(future) => future.as_mut().poll(cx),
        }
    }
}

/// Modifiers of a write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WriteFlags {
    /// Durable when it completes (forced unit access).
    pub fua: bool,
    /// Stored compressed: whole clusters ([`Limits::optimal_transfer`]), or up to the node's end.
    /// `EOPNOTSUPP` from a node whose driver does not compress ([`Driver::compresses`]).
    pub compressed: bool,
}

/// Modifiers of a write of zeroes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ZeroFlags {
    /// Durable when it completes.
    pub fua: bool,
    /// The range may be deallocated.
    pub may_unmap: bool,
    /// Fail with `EOPNOTSUPP` rather than write zero bytes.
    pub no_fallback: bool,
}

/// What a driver can take in one call; sizes in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Offsets and lengths of reads and writes are multiples of this (a power of two).
    pub request_alignment: u32,
    /// Addresses and lengths of each piece of a buffer are multiples of this; at most
    /// `request_alignment`.
    pub memory_alignment: u32,
    /// Largest read or write; 0 = no limit.
    pub max_transfer: u32,
    /// Best multiple for allocation-sized requests (cluster size); 0 = none.
    pub optimal_transfer: u32,
    /// Write-zeroes and discard are efficient at this multiple (cluster size); 0 = none.
    pub zero_alignment: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            request_alignment: 1,
            memory_alignment: 1,
            max_transfer: 0,
            optimal_transfer: 0,
            zero_alignment: 0,
        }
    }
}

impl Limits {
    /// Those of a node that passes its requests on to a node with these: what is efficient there is
    /// efficient here; that node aligns and splits by itself.
    pub fn passed_on(self) -> Self {
        Self {
            optimal_transfer: self.optimal_transfer,
            zero_alignment: self.zero_alignment,
            ..Self::default()
        }
    }
}

/// Preallocation of an image or of the new part of a grown one (`preallocation=` of qemu-img).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// Metadata only.
    Metadata,
    /// `fallocate`.
    Falloc,
    /// Written zeroes.
    Full,
}

/// A change of a node's length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resize {
    /// New length in bytes.
    pub length: u64,
    /// How the new part is allocated.
    pub preallocation: Preallocation,
}

impl Resize {
    /// To `length` bytes, without allocating anything.
    pub const fn to(length: u64) -> Self {
        Self {
            length,
            preallocation: Preallocation::Off,
        }
    }
}

/// What an image says about its backing file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BackingReference {
    /// Its name, relative to the image; without one there is no backing file.
    pub name: Option<String>,
    /// Its format.
    pub format: Option<String>,
}

/// What is known about the start of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusExtent {
    /// Bytes that `status` holds for (> 0).
    pub length: u64,
    /// The status.
    pub status: BlockStatus,
}

/// What is to be done with stored bytes behind the drivers' backs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoredUse {
    /// They are read.
    Read,
    /// They are written over: nothing else refers to them.
    Overwrite,
}

/// Where bytes are stored as they are.
#[derive(Clone, Copy, Debug)]
pub struct Stored<'a> {
    /// The file.
    pub file: &'a File,
    /// The offset of the first byte in it.
    pub offset: u64,
}

/// Where the content of an extent comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockStatus {
    /// This node holds bytes for it.
    pub data: bool,
    /// It reads as zeroes.
    pub zero: bool,
    /// This node decides the content (otherwise its backing does).
    pub allocated: bool,
    /// Offset in the data child, when the bytes are stored there plainly.
    pub offset: Option<u64>,
    /// Stored compressed.
    pub compressed: bool,
    /// The storage may be a hole of the data child that reads as zeroes (preallocated metadata):
    /// whoever wants to know has to ask the child.
    pub sparse: bool,
}

/// What is to become of a list of children.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChildrenChange {
    /// One more.
    Add,
    /// One less.
    Remove,
}

/// Why a list of children stays as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChildrenRefusal {
    /// There is none.
    NoList,
    /// For a reason of the driver's.
    Reason(String),
}

/// What a node does. `Send + Sync`: any thread may call at any time; the futures stay on the
/// calling thread.
///
/// The caller ([`crate::Node`]) has checked range, alignment and permissions: ranges lie within
/// `length()` (reads and writes of protocols that grow excepted) and obey `limits()`. Flags never
/// ask for FUA: the node flushes after the request. `limits()`, `grows()` and the set of `edges()`
/// do not change while the driver lives; `length()` changes only by `resize` (its own or a
/// child's), or by writes when it grows.
pub trait Driver: Send + Sync {
    /// The driver's name on the command line.
    fn driver_name(&self) -> &'static str;
    /// TCP ports that it connects to when it has to connect again: a sandbox leaves the way there open.
    fn tcp_peers(&self) -> Vec<u16> {
        Vec::new()
    }
    /// Directories in which it opens files as it needs them: a sandbox leaves them readable.
    fn directories(&self) -> Vec<PathBuf> {
        Vec::new()
    }
    /// Current length in bytes.
    fn length(&self) -> u64;
    /// What one call can take.
    fn limits(&self) -> Limits;
    /// Whether a write past the end grows the node (protocol files). What then lies between the old
    /// end and the write reads as zeroes.
    fn grows(&self) -> bool;
    /// The byte at `offset` is read or written soon: what that takes may be brought near. A hint, for
    /// any offset, which must neither wait nor change anything.
    fn prefetch(&self, _offset: u64) {}
    /// Whether [`Driver::prefetch`] does anything.
    fn can_prefetch(&self) -> bool {
        false
    }
    /// Fills `buffer` from `offset`.
    fn read(&self, offset: u64, buffer: Buffer) -> IoFuture<'_>;
    /// Whether it shows a backing where it has nothing, if it is given one.
    fn takes_backing(&self) -> bool {
        false
    }
    /// Whether writes may ask to be stored compressed.
    fn compresses(&self) -> bool {
        false
    }
    /// Whether it stores nothing but compressed clusters: whoever copies to it has to write them so.
    fn stores_only_compressed(&self) -> bool {
        false
    }
    /// Whether a node of this driver that was just made and never written reads as zeroes (but for
    /// what a backing shows).
    fn reads_zero_when_new(&self) -> bool {
        false
    }
    /// Writes `buffer` at `offset`.
    fn write(&self, offset: u64, buffer: Buffer, flags: WriteFlags) -> IoFuture<'_>;
    /// Makes the range read as zeroes; `EOPNOTSUPP` lets the node write zero bytes instead.
    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> IoFuture<'_>;
    /// Gives the storage of the range up where possible; its content is undefined afterwards
    /// unless the driver says otherwise.
    fn discard(&self, range: ByteRange) -> IoFuture<'_>;
    /// Every write completed before this call is durable when it resolves.
    fn flush(&self) -> IoFuture<'_>;
    /// Does what the driver put off when it called [`crate::upkeep::want`].
    fn upkeep(&self) -> IoFuture<'_> {
        IoFuture::done()
    }
    /// A root above is being drained: requests that the driver holds back for some time go on now.
    /// As many [`Driver::drain_end`] follow.
    fn drain_begin(&self) {}
    /// A drain has ended.
    fn drain_end(&self) {}
    /// What is known about the start of `range` (at least one byte of it).
    fn block_status(&self, range: ByteRange) -> BoxFuture<'_, Result<StatusExtent, Errno>>;
    /// Where all of `range` is stored as it is read, in one piece of a host's file, if that is known
    /// without waiting and requests need not pass this driver: for copies that the kernel makes. It
    /// holds as long as a visit to the graph ([`crate::RootHandle::visit`]) and no request changes
    /// the mapping of the range.
    fn stored(&self, _range: ByteRange, _use: StoredUse) -> Option<Stored<'_>> {
        None
    }
    /// Changes the length.
    fn resize(&self, resize: Resize) -> BoxFuture<'_, Result<(), crate::Error>>;
    /// Changes what the image says about its backing file, and nothing else: the open backing child
    /// stays. Durable when it resolves.
    ///
    /// # Errors
    /// `Unsupported` from formats without backing files.
    fn refer_to_backing(&self, _to: BackingReference) -> BoxFuture<'_, Result<(), crate::Error>> {
        Box::pin(async { Err(crate::Error::operation_unsupported()) })
    }
    /// Drops all content, so that the backing file shows everywhere. The caller has drained the node.
    ///
    /// # Errors
    /// `Unsupported` from formats without backing files.
    fn make_empty(&self) -> BoxFuture<'_, Result<(), crate::Error>> {
        Box::pin(async { Err(crate::Error::operation_unsupported()) })
    }
    /// Whether [`crate::Graph::change_children`] may change the list of children, the option `children`.
    ///
    /// # Errors
    /// There is no such list, which is so for most drivers; why not now.
    fn check_children_change(&self, change: ChildrenChange) -> Result<(), ChildrenRefusal> {
        let _ = change;
        Err(ChildrenRefusal::NoList)
    }
    /// Flushes, marks the image clean and stops background work; no I/O follows.
    fn close(&self) -> BoxFuture<'_, Result<(), Errno>>;
    /// What all users of the node together do and tolerate has changed: file locks follow. On an
    /// error nothing changes. Only drivers that lock something need it.
    fn set_permissions(
        &self,
        _permissions: Permissions,
        _shared: Permissions,
    ) -> Result<(), crate::Error> {
        Ok(())
    }
    /// Deletes the file that the node is (protocols).
    fn delete_file(&self) -> Result<(), crate::Error> {
        let message = format!(
            "Driver '{}' does not support image deletion",
            self.driver_name()
        );
        Err(crate::Error::new(crate::ErrorKind::Unsupported, message))
    }
    /// The edges to the children, with their roles ("file", "backing", "data-file").
    fn edges(&self) -> Vec<(&'static str, &crate::Edge)>;
    /// The child that plain data at `offset` of the disk is stored in ([`BlockStatus::offset`]), for
    /// drivers that spread a disk over several files; `None` from others: "data-file" or "file".
    fn data_child(&self, _offset: u64) -> Option<&crate::Edge> {
        None
    }
    /// The child whose content is the node's own, for filters: questions about images pass on to it.
    fn filtered(&self) -> Option<&crate::Edge> {
        None
    }
    /// Checks the consistency of the image and repairs what `options` say. The caller has drained
    /// the node; on one that was not opened with [`crate::Purpose::Check`], nothing is repaired.
    ///
    /// # Errors
    /// `Unsupported` when the format has no check; whatever ends a check early.
    fn check<'a>(
        &'a self,
        _options: crate::CheckOptions,
        _sink: &'a mut dyn crate::CheckSink,
    ) -> BoxFuture<'a, Result<crate::CheckResult, crate::Error>> {
        Box::pin(async { Err(crate::Error::check_unsupported()) })
    }
    /// Changes what the image was created with while it serves (key slots of encrypted images). The
    /// node is not read-only.
    ///
    /// # Errors
    /// `Unsupported` when the driver changes nothing this way; the driver's.
    fn amend<'a>(
        &'a self,
        _changes: &'a mut crate::AmendRequest<'_>,
    ) -> BoxFuture<'a, Result<(), crate::Error>> {
        Box::pin(async { Err(crate::amend::unsupported_online()) })
    }
    /// Driver-specific facts for `query-named-block-nodes` and `info` (an `ImageInfo`-like
    /// object's members: "cluster-size", "format-specific", "backing-filename", ...).
    fn describe(&self) -> serde_json::Map<String, serde_json::Value>;
    /// What the driver counts by itself (the members of a `BlockStatsSpecific` but its tag); none from most.
    fn statistics(&self) -> serde_json::Map<String, serde_json::Value> {
        serde_json::Map::new()
    }
    /// Where the driver stands in a stack of nodes.
    fn layer(&self) -> Layer {
        match self.edges().is_empty() {
            true => Layer::Protocol,
            false => Layer::Filter,
        }
    }
    /// The name that opens this very node again, from protocols, and from filters with a syntax of
    /// their own; "" when there is none. [`crate::Node::filename`] has the rules for all others.
    fn filename(&self) -> String {
        String::new()
    }
    /// What relative names in an image on this node are put behind, when it is not the directory
    /// part of the primary child's file name.
    fn base_directory(&self) -> Option<crate::error::Result<String>> {
        None
    }
    /// Which host file the node's bytes are in, for drivers that store them plainly; a format's
    /// redo log belongs to that file. `None` without one file of its own.
    fn identity(&self) -> Option<ImageIdentity>;
    /// The image's internal snapshots; `None` for drivers that keep none.
    fn snapshots(&self) -> Option<&dyn Snapshots> {
        None
    }
    /// Where dirty bitmaps are stored; `None` for drivers that store none.
    fn bitmap_store(&self) -> Option<&dyn BitmapStore> {
        None
    }
    /// Whether the driver listens to the events of requests; always the same answer.
    fn debugger(&self) -> Option<&dyn Debugger> {
        None
    }
    /// The saved machine state of the image; `None` for drivers that keep none.
    fn machine_state(&self) -> Option<&dyn MachineState> {
        None
    }
}
