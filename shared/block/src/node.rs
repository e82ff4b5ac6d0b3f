//! A named node of the graph: a driver plus the options every node has.
//!
//! ```text
//!   request ─► in range, aligned, within limits? ──yes──► driver's own future, untouched
//!                     │no
//!                     ▼
//!   split · bounce · read-modify-write · detect zeroes · zero bytes for write_zeroes · flush for FUA
//! ```
//!
//! Owns: the checks and the general paths (in `node/`), the node's users and their permissions, the
//! cached length. Promises: a driver sees only ranges and buffers that fit its
//! [`crate::Limits`], never a FUA flag (the node flushes after the write), and never a request
//! that its options forbid. A request that fits passes to the driver without an allocation or a
//! lock; on nodes whose driver needs alignment a write also counts itself in its thread's slot.
//! Must not know: what kind of driver it is.

mod bitmaps;
mod flush;
mod general;
mod tracker;
mod users;
mod watermark;

pub use tracker::{Serialised, TrackedWrite, WriteGuard, WriteTracker};
pub(crate) use users::{Parent, ResizeListener, User, Users};

use crate::bitmap::BitmapSet;
use crate::debug::Event;
use crate::driver::{
    BackingReference, BlockStatus, BoxFuture, ByteRange, Driver, IoFuture, Limits, Resize,
    StatusExtent, Stored, StoredUse, WriteFlags, ZeroFlags,
};
use crate::edge::{Edge, Permissions};
use crate::error::{Error, ErrorKind};
use crate::events::Reporter;
use crate::naming::Origin;
use crate::open::ChildRole;
use crate::redo_log::ImageIdentity;
use executor::{Buffer, Errno};
use flush::FlushState;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use watermark::Watermark;

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
///
/// The buffer may belong to a guest that changes it while the request runs. That is harmless and
/// needs no private copy: bytes seen as zero were in the buffer during the request, so zeroes are
/// a legal outcome of the race; otherwise the buffer is written as it is, like any other.
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
    /// What its name is made from.
    pub origin: Origin,
}

impl NodeOptions {
    /// Whether a node with the one behaves as one with the other.
    pub(crate) fn same_as(&self, other: &Self) -> bool {
        let all = |options: &Self| {
            (
                options.read_only,
                options.auto_read_only,
                options.cache_direct,
                options.cache_no_flush,
                options.discard,
                options.detect_zeroes,
                options.force_share,
            )
        };
        all(self) == all(other)
    }
}

/// A node. What a request that fits reads comes first and is in one cache line.
#[repr(C, align(64))]
pub struct Node {
    driver: Box<dyn Driver>,
    length: AtomicU64,
    bitmaps: Arc<BitmapSet>,
    limits: Limits,
    /// A write that fits the limits needs nothing from the general path.
    plain_writes: bool,
    grows: bool,
    /// The driver listens to events.
    debugged: bool,
    /// No children: what it flushes is the host's own storage.
    leaf: bool,
    watermark: Box<Watermark>,
    /// Present when the driver needs an alignment.
    tracker: Option<Box<WriteTracker>>,
    flush: FlushState,
    options: NodeOptions,
    users: Users,
    /// Another node has taken its place: it claims nothing any more.
    retired: AtomicBool,
    this: Weak<Node>,
}

impl Node {
    /// A node outside of any graph (tests, tools) or about to be added to one.
    pub fn new(options: NodeOptions, driver: Box<dyn Driver>) -> Arc<Node> {
        let limits = driver.limits();
        assert!(
            limits.request_alignment.is_power_of_two()
                && (1..=limits.request_alignment).contains(&limits.memory_alignment),
            "{}: impossible {limits:?}",
            driver.driver_name()
        );
        let aligned = limits.request_alignment > 1;
        let debugged = driver.debugger().is_some();
        let node = Arc::new_cyclic(|this| Node {
            plain_writes: !options.read_only
                && options.detect_zeroes == DetectZeroes::Off
                && !aligned
                && !debugged,
            grows: driver.grows(),
            debugged,
            leaf: driver.edges().is_empty(),
            length: AtomicU64::new(driver.length()),
            tracker: aligned.then(Box::default),
            watermark: Box::default(),
            flush: FlushState::default(),
            bitmaps: bitmaps::of_driver(&*driver),
            users: Users::default(),
            retired: AtomicBool::new(false),
            this: this.clone(),
            options,
            driver,
            limits,
        });
        for (_, edge) in node.driver.edges() {
            edge.listen(node.this.clone());
        }
        node
    }
    /// Its name.
    pub fn name(&self) -> &str {
        &self.options.node_name
    }
    /// Its options.
    pub fn options(&self) -> &NodeOptions {
        &self.options
    }
    /// Its driver.
    pub fn driver(&self) -> &dyn Driver {
        &*self.driver
    }
    /// Length in bytes. A node that grows counts a write past its end when it is submitted.
    pub fn length(&self) -> u64 {
        self.length.load(Ordering::Relaxed)
    }
    /// Whether it grows when written past its end; see [`Driver::grows`].
    pub fn grows(&self) -> bool {
        self.grows
    }
    /// See [`Driver::prefetch`].
    #[inline]
    pub fn prefetch(&self, offset: u64) {
        self.driver.prefetch(offset);
    }
    /// Whether the driver listens to events.
    #[inline]
    pub fn is_debugged(&self) -> bool {
        self.debugged
    }
    /// Tells the driver, if it listens, that a request has reached `event`; the request goes on when
    /// this resolves.
    #[inline]
    pub async fn event(&self, event: Event) {
        if self.debugged
            && let Some(debugger) = self.driver.debugger()
        {
            debugger.event(event).await;
        }
    }
    /// Begins a request when the driver, if it listens, lets it go on from `event`.
    #[inline]
    pub fn after<'a>(
        &'a self,
        event: Event,
        begin: impl FnOnce() -> IoFuture<'a> + 'a,
    ) -> IoFuture<'a> {
        if !self.debugged {
            return begin();
        }
        IoFuture::boxed(async move {
            self.event(event).await;
            begin().await
        })
    }
    /// Reads; bytes past the end are zeroes.
    #[inline]
    pub fn read(&self, offset: u64, buffer: Buffer) -> IoFuture<'_> {
        let end = offset.checked_add(buffer.len() as u64);
        if self.grows || end.is_some_and(|end| end <= self.length()) {
            return self.read_within(offset, buffer);
        }
        IoFuture::boxed(self.read_general(offset, buffer))
    }
    /// Reads a range that the caller knows to be within the length (or the node grows).
    #[inline]
    pub(crate) fn read_within(&self, offset: u64, buffer: Buffer) -> IoFuture<'_> {
        if self.fits(offset, &buffer) {
            self.driver.read(offset, buffer)
        } else {
            IoFuture::boxed(self.read_general(offset, buffer))
        }
    }
    /// Writes. `EPERM` on a read-only node, `EINVAL` past the end of one that does not grow,
    /// `EOPNOTSUPP` for a compressed write that its driver cannot do.
    #[inline]
    pub fn write(&self, offset: u64, buffer: Buffer, flags: WriteFlags) -> IoFuture<'_> {
        if self.bitmaps.is_empty() {
            self.write_unrecorded(offset, buffer, flags)
        } else {
            let range = ByteRange::new(offset, buffer.len() as u64);
            self.recorded(range, || self.write_unrecorded(offset, buffer, flags))
        }
    }

    #[inline]
    fn write_unrecorded(&self, offset: u64, buffer: Buffer, flags: WriteFlags) -> IoFuture<'_> {
        if self.plain_writes && flags == WriteFlags::default() && self.fits(offset, &buffer) {
            return match self.reserve(ByteRange::new(offset, buffer.len() as u64)) {
                Ok(()) => self.driver.write(offset, buffer, WriteFlags::default()),
                Err(errno) => IoFuture::error(errno),
            };
        }
        self.write_uncommon(offset, buffer, flags)
    }

    fn write_uncommon(&self, offset: u64, buffer: Buffer, flags: WriteFlags) -> IoFuture<'_> {
        if let Err(errno) = self.check_write(ByteRange::new(offset, buffer.len() as u64)) {
            return IoFuture::error(errno);
        }
        if flags.compressed && !self.driver.compresses() {
            return IoFuture::error(Errno::EOPNOTSUPP);
        }
        let general =
            self.options.detect_zeroes != DetectZeroes::Off || flags.compressed || self.debugged;
        if let (Some(tracker), false, false) = (&self.tracker, general, flags.fua)
            && self.fits(offset, &buffer)
            && let Some(guard) = tracker.try_begin()
        {
            return guard.hold(self.driver.write(offset, buffer, WriteFlags::default()));
        }
        IoFuture::boxed(self.write_general(offset, buffer, flags))
    }

    /// Makes a range read as zeroes. Falls back to writing zero bytes when the driver cannot.
    pub fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> IoFuture<'_> {
        match self.check_write(range) {
            Ok(()) if range.length == 0 && !flags.fua => IoFuture::done(),
            Ok(()) => self.recorded(range, || IoFuture::boxed(self.zero_general(range, flags))),
            Err(errno) => IoFuture::error(errno),
        }
    }
    /// Discards a range (a no-op with `discard=ignore`). What is not aligned to the driver's
    /// requests is left alone.
    pub fn discard(&self, range: ByteRange) -> IoFuture<'_> {
        if self.options.read_only {
            return IoFuture::error(Errno::EPERM);
        }
        if self.options.discard == Discard::Ignore {
            return IoFuture::done();
        }
        self.watermark
            .pass(range.offset.saturating_add(range.length));
        self.recorded(range, || IoFuture::boxed(self.discard_general(range)))
    }
    /// The end in bytes of the furthest write since it was opened; 0 before the first.
    pub fn highest_write(&self) -> u64 {
        self.watermark.highest()
    }
    /// Reports once, through `reporter`, a write that ends beyond `threshold` bytes; with 0, none.
    pub fn set_write_threshold(&self, threshold: u64, reporter: Reporter) {
        self.watermark.set_threshold(threshold, reporter);
    }
    /// See [`Node::set_write_threshold`]; 0 without one.
    pub fn write_threshold(&self) -> u64 {
        self.watermark.threshold()
    }
    /// Goes on where `old`, whose place it takes, was.
    pub(crate) fn follow_watermark(&self, old: &Node) {
        self.watermark.follow(&old.watermark);
    }
    /// Every write completed before this call is durable when it resolves.
    ///
    /// On a node without children a failure is final: the kernel reports a lost write once, and
    /// what was lost is not known, so later flushes fail until the node is opened anew. Such
    /// flushes run one at a time, and those that come meanwhile share the next one.
    pub fn flush(&self) -> IoFuture<'_> {
        if self.leaf {
            self.flush_leaf()
        } else {
            self.driver.flush()
        }
    }
    /// What is known about the start of a range of this node alone (not its backing). Past the
    /// end there are zeroes.
    pub fn block_status(&self, range: ByteRange) -> BoxFuture<'_, Result<StatusExtent, Errno>> {
        let length = self.length();
        if range.offset >= length || range.length == 0 {
            let status = BlockStatus {
                zero: true,
                ..BlockStatus::default()
            };
            let length = range.length.max(1);
            return Box::pin(async move { Ok(StatusExtent { length, status }) });
        }
        let within = range.length.min(length - range.offset);
        self.driver
            .block_status(ByteRange::new(range.offset, within))
    }
    /// See [`Driver::stored`]. `None`, too, where the node does something about requests itself.
    pub fn stored(&self, range: ByteRange, purpose: StoredUse) -> Option<Stored<'_>> {
        let options = &self.options;
        let is_watched = options.read_only
            || !self.bitmaps.is_empty()
            || options.detect_zeroes != DetectZeroes::Off;
        let is_within = range.checked_end()? <= self.length();
        if self.debugged || !is_within || purpose == StoredUse::Overwrite && is_watched {
            return None;
        }
        if purpose == StoredUse::Overwrite {
            self.reserve(range).ok()?;
        }
        self.driver.stored(range, purpose)
    }
    /// Changes the length and tells the users of the node. The caller holds the `resize`
    /// permission through a root.
    pub async fn resize(&self, resize: Resize) -> crate::error::Result<()> {
        self.check_changeable()?;
        let old = self.length();
        if resize.length > old {
            self.bitmaps.resize(resize.length)?;
        }
        if let Err(error) = self.driver.resize(resize).await {
            self.bitmaps.resize(old)?;
            return Err(error);
        }
        self.child_resized();
        Ok(())
    }
    /// See [`Driver::refer_to_backing`].
    pub async fn refer_to_backing(&self, to: BackingReference) -> crate::error::Result<()> {
        self.check_changeable()?;
        self.driver.refer_to_backing(to).await
    }
    /// See [`Driver::make_empty`].
    pub async fn make_empty(&self) -> crate::error::Result<()> {
        self.check_changeable()?;
        self.driver.make_empty().await
    }
    /// Which host file its bytes are in; see [`Driver::identity`].
    pub fn identity(&self) -> Option<ImageIdentity> {
        self.driver.identity()
    }
    /// Whether anybody (a parent or a root) uses the node.
    pub fn in_use(&self) -> bool {
        !self.users.is_empty()
    }

    /// Whether another node uses the node.
    pub fn has_parent_node(&self) -> bool {
        self.users.has_node()
    }

    pub(crate) fn weak(&self) -> Weak<Node> {
        self.this.clone()
    }

    /// The node that it is the backing of.
    pub fn backing_of(&self) -> Option<String> {
        let parents = self.users.parents().into_iter();
        let mut above = parents.filter_map(|(id, parent)| match parent? {
            Parent::Node(node) => {
                let edges = node.driver().edges();
                let is_backing = |edge: &Edge| edge.id() == id && edge.role() == ChildRole::Backing;
                let found = edges.iter().any(|(_, edge)| is_backing(edge));
                found.then(|| node.name().to_owned())
            }
            Parent::Root(_) => None,
        });
        above.next()
    }

    /// Gives back all that it claims of others, children and locks, and claims no more.
    pub(crate) fn retire(&self) {
        self.retired.store(true, Ordering::Relaxed);
        for (_, edge) in self.driver.edges() {
            edge.park();
        }
        let none = self
            .driver
            .set_permissions(Permissions::NONE, Permissions::ALL);
        if let Err(error) = none {
            tracing::warn!(node = self.name(), %error, "could not give permissions back");
        }
    }

    /// Takes up again what [`Node::retire`] gave back.
    pub(crate) fn come_back(&self) -> crate::error::Result<()> {
        self.retired.store(false, Ordering::Relaxed);
        users::claim_again(self)
    }

    pub(crate) fn is_retired(&self) -> bool {
        self.retired.load(Ordering::Relaxed)
    }

    pub(crate) fn users(&self) -> &Users {
        &self.users
    }

    /// Whether the driver takes a transfer as it is.
    #[inline]
    fn fits(&self, offset: u64, buffer: &Buffer) -> bool {
        let limits = &self.limits;
        let mask = u64::from(limits.request_alignment) - 1;
        let length = buffer.len() as u64;
        (offset | length) & mask == 0
            && (limits.max_transfer == 0 || length <= u64::from(limits.max_transfer))
            && (limits.memory_alignment == 1 || buffer.is_aligned(limits.memory_alignment as usize))
    }

    /// Checks that a write ends within the node, which it makes longer if it grows, and notes how far it goes.
    #[inline]
    fn reserve(&self, range: ByteRange) -> Result<(), Errno> {
        let end = range.checked_end().ok_or(Errno::EINVAL)?;
        if end > self.length() {
            if !self.grows {
                return Err(Errno::EINVAL);
            }
            self.length.fetch_max(end, Ordering::Relaxed);
        }
        if range.length > 0 {
            self.watermark.write(end);
        }
        Ok(())
    }

    fn check_changeable(&self) -> crate::error::Result<()> {
        match self.options.read_only {
            true => Err(Error::new(ErrorKind::Invalid, "Image is read-only")),
            false => Ok(()),
        }
    }

    fn check_write(&self, range: ByteRange) -> Result<(), Errno> {
        if self.options.read_only {
            return Err(Errno::EPERM);
        }
        self.reserve(range)
    }
}

impl ResizeListener for Node {
    fn as_parent(&self) -> Option<Parent> {
        self.this.upgrade().map(Parent::Node)
    }
    fn child_resized(&self) {
        let length = self.driver.length();
        if self.length.swap(length, Ordering::Relaxed) != length {
            self.follow_length(length);
            self.users.notify_resize();
        }
    }
}

#[cfg(test)]
mod tests;
