//! The seam of image formats: a format says where data is and moves none of it.
//!
//! A read asks [`Format::lookup`] (synchronous, cached metadata only) and on a miss
//! [`Format::resolve`]. A write that cannot go in place runs
//! `prepare_write → data written by FormatNode → commit`, or `abort`.
//!
//! ```text
//!   lookup ──Hit──────────────► I/O on the data child, in place
//!     │Miss                        ▲ extent.in_place
//!     ▼                            │
//!   resolve ─────────────── not in place, not mapped
//!                                  ▼
//!   prepare_write (allocates, takes the cluster lock) → WritePlan{host_offset, head, tail}
//!                                  ▼
//!   FormatNode fills head and tail as the plan says, writes data
//!                                  ▼
//!   commit (mapping changes, lock released)       or abort (allocation given back)
//! ```

use crate::bitmap::BitmapStore;
use crate::cipher::SectorCipher;
use crate::driver::{BackingReference, ByteRange, Limits, Resize, ZeroFlags};
use crate::edge::Edge;
use crate::snapshot::Snapshots;
use executor::{Buffer, Errno, HeapBuffer};

/// Most zero bytes that are written at a time in place of a change of the mapping.
pub const MAX_ZERO_BYTES: u64 = 2 << 20;

/// Where a piece of the virtual disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapping {
    /// Plain bytes at this offset of the data child.
    Data(u64),
    /// Zeroes, whatever the backing holds; `Some` when host storage is reserved at that offset.
    Zero(Option<u64>),
    /// Not here: the backing's content, or zeroes without one (or beyond its end).
    Unallocated,
    /// Bytes that only the format can decode (compressed, encrypted): use
    /// [`Format::read_encoded`]. The value is the format's own descriptor.
    Encoded(u64),
}

/// The mapping of the start of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Bytes it holds for, `1..=` the length asked for; `Data` is contiguous over it.
    pub length: u64,
    /// The mapping.
    pub mapping: Mapping,
    /// A write of this extent may go straight to a `Data` mapping: nothing else refers to it.
    pub in_place: bool,
}

/// The answer of the synchronous lookup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lookup {
    /// Known.
    Hit(Extent),
    /// The metadata is not cached: call [`Format::resolve`].
    Miss,
}

/// What the storage next to a planned write needs before the plan may be committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    /// Nothing: the write ends at a boundary of allocation, or the bytes around it keep their
    /// mapping, or they are to read as zeroes and the storage is known to do so already (never where
    /// data is encrypted).
    Nothing,
    /// This many zero bytes: that is the old content, and what the storage holds is not known.
    Zeroes(u64),
    /// This many bytes of old content, whatever it is.
    Copy(u64),
}

impl Fill {
    /// Bytes to be written.
    pub const fn length(self) -> u64 {
        match self {
            Self::Nothing => 0,
            Self::Zeroes(length) | Self::Copy(length) => length,
        }
    }
}

/// Where a write that changes the mapping has to go. Ends in [`Format::commit`] or
/// [`Format::abort`]; dropping it gives the allocation back as an abort would (leaking clusters
/// at worst, never corrupting).
pub struct WritePlan<T> {
    /// The part of the asked-for range that the plan covers: starts at its start.
    pub range: ByteRange,
    /// Where `range.offset` goes in the data child.
    pub host_offset: u64,
    /// What goes before `range`, at `host_offset - head.length()`.
    pub head: Fill,
    /// What goes after `range`.
    pub tail: Fill,
    /// The format's own state: locks held, clusters allocated.
    pub token: T,
}

/// A cluster as a format encoded it.
pub struct EncodedBytes {
    /// Memory that begins with the bytes.
    pub memory: HeapBuffer,
    /// How many there are.
    pub length: usize,
}

/// An image format. Any thread may call at any time; futures stay on the calling thread.
#[expect(async_fn_in_trait, reason = "futures are not Send by design")]
pub trait Format: Send + Sync + 'static {
    /// State of a prepared write.
    type Token<'a>
    where
        Self: 'a;

    /// The driver's name.
    fn name(&self) -> &'static str;
    /// Virtual size in bytes.
    fn virtual_size(&self) -> u64;
    /// Limits of the node; `request_alignment` 1 unless the format cannot do less (the data
    /// child's own alignment is seen to below).
    fn limits(&self) -> Limits;
    /// The child that metadata lives in.
    fn file(&self) -> &Edge;
    /// The child that `Mapping::Data` refers to (mostly [`Format::file`]).
    fn data(&self) -> &Edge {
        self.file()
    }
    /// Whether it shows a backing where it has nothing, if it is given one.
    fn takes_backing(&self) -> bool {
        false
    }
    /// The backing child.
    fn backing(&self) -> Option<&Edge> {
        None
    }
    /// Maps the start of `range` from cached metadata; never blocks, never allocates.
    fn lookup(&self, range: ByteRange) -> Lookup;
    /// A number that is another one after every change that takes a `Data` extent of an earlier
    /// [`Format::lookup`] back, or its `in_place`: it changes after the mapping, and before the
    /// request behind the change completes and what was mapped is freed. `None`: look-ups are not
    /// to be kept.
    fn changes(&self) -> Option<u64> {
        None
    }
    /// Like `lookup`, reading metadata when needed.
    async fn resolve(&self, range: ByteRange) -> Result<Extent, Errno>;
    /// Allocates for a write to the start of `range` and locks its clusters against other
    /// prepared writes, zeroing and discards until the plan ends. When the range is found to be
    /// in place meanwhile, the plan has no head and tail and commit is a no-op.
    async fn prepare_write(&self, range: ByteRange) -> Result<WritePlan<Self::Token<'_>>, Errno>;
    /// The data of `plan` is written: make the mapping visible. Survives a kill of the process
    /// when it resolves; survives power loss after the next `flush`.
    async fn commit<'a>(&'a self, plan: WritePlan<Self::Token<'a>>) -> Result<(), Errno>;
    /// The data could not be written: give the allocation back.
    async fn abort<'a>(&'a self, plan: WritePlan<Self::Token<'a>>);
    /// Makes the start of `range` read as zeroes by metadata alone; resolves to the bytes done.
    /// `EOPNOTSUPP`: the caller writes zero bytes to its first [`MAX_ZERO_BYTES`] (partial clusters).
    async fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<u64, Errno>;
    /// Unmaps whole clusters in `range`, leaving partial ones alone; all of them, unless the format
    /// says otherwise.
    async fn discard(&self, range: ByteRange) -> Result<(), Errno> {
        let _ = range;
        Ok(())
    }
    /// Reads an [`Mapping::Encoded`] extent starting at `offset` into `buffer`; formats that have none
    /// are never asked.
    async fn read_encoded(
        &self,
        offset: u64,
        descriptor: u64,
        buffer: Buffer,
    ) -> Result<(), Errno> {
        let _ = (offset, descriptor, buffer);
        Err(Errno::EIO)
    }
    /// Whether [`Format::encode`] works on this image.
    fn can_encode(&self) -> bool {
        false
    }
    /// Compresses one whole cluster (or the disk's last, shorter one); `None` when it does not get
    /// smaller. `buffer` is private memory of the request, of the range's length.
    async fn encode(
        &self,
        range: ByteRange,
        buffer: Buffer,
    ) -> Result<Option<EncodedBytes>, Errno> {
        let _ = (range, buffer);
        Err(Errno::EOPNOTSUPP)
    }
    /// Stores what `encode` made of the cluster of `range`, in place of whatever it held.
    async fn store_encoded(&self, range: ByteRange, bytes: EncodedBytes) -> Result<(), Errno> {
        let _ = (range, bytes);
        Err(Errno::EOPNOTSUPP)
    }
    /// What plain data (`Mapping::Data`) is encrypted with. A format that has one gives a
    /// `request_alignment` of at least 512.
    fn cipher(&self) -> Option<&dyn SectorCipher> {
        None
    }
    /// Everything completed before the call is durable: data and metadata, in order.
    async fn flush(&self) -> Result<(), Errno>;
    /// Does what the format put off when it called [`crate::upkeep::want`].
    async fn upkeep(&self) -> Result<(), Errno> {
        Ok(())
    }
    /// Whether `flush` has metadata to write; when false, flushing the data child is enough.
    fn metadata_dirty(&self) -> bool;
    /// Changes the virtual size.
    async fn resize(&self, resize: Resize) -> Result<(), crate::Error> {
        let _ = resize;
        Err(crate::Error::resize_unsupported())
    }
    /// See [`crate::Driver::refer_to_backing`].
    async fn refer_to_backing(&self, _to: BackingReference) -> Result<(), crate::Error> {
        Err(crate::Error::operation_unsupported())
    }
    /// See [`crate::Driver::make_empty`].
    async fn make_empty(&self) -> Result<(), crate::Error> {
        Err(crate::Error::operation_unsupported())
    }
    /// Flushes and marks the image cleanly closed.
    async fn close(&self) -> Result<(), Errno>;
    /// See [`crate::Driver::check`].
    async fn check(
        &self,
        _options: crate::CheckOptions,
        _sink: &mut dyn crate::CheckSink,
    ) -> Result<crate::CheckResult, crate::Error> {
        Err(crate::Error::check_unsupported())
    }
    /// See [`crate::Driver::amend`].
    async fn amend(&self, _changes: &mut crate::AmendRequest<'_>) -> Result<(), crate::Error> {
        Err(crate::amend::unsupported_online())
    }
    /// Whether data mappings may refer to holes of the data child (preallocated metadata), so that
    /// whoever wants to know what reads as zeroes has to ask the child too.
    async fn storage_is_sparse(&self) -> bool {
        false
    }
    /// Where saved machine state begins, counted as the disk is; `None` when the format keeps none.
    fn machine_state(&self) -> Option<u64> {
        None
    }
    /// Lets machine state up to `end` be mapped, counted as the disk is.
    async fn reserve_machine_state(&self, end: u64) -> Result<(), Errno> {
        let _ = end;
        Err(Errno::EOPNOTSUPP)
    }
    /// See [`crate::Driver::describe`].
    fn describe(&self) -> serde_json::Map<String, serde_json::Value>;
    /// See [`crate::Driver::snapshots`].
    fn snapshots(&self) -> Option<&dyn Snapshots> {
        None
    }
    /// See [`crate::Driver::bitmap_store`].
    fn bitmap_store(&self) -> Option<&dyn BitmapStore> {
        None
    }
}
