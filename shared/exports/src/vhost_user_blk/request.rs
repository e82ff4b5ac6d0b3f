//! virtio-blk requests (virtio 1.2 section 5.2.6): from a chain to the node and back.
//!
//! ```text
//!   Chain ─parse─> Operation ─RootHandle─> errno ─> status byte ─> Queue::complete
//!                  ready at first poll: done in place; else a task of the pool
//! ```
//!
//! Nothing is allocated per request once warm: iovec lists and task cells are reused. The header
//! and the ranges of a discard are copied out of guest memory before they are looked at.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use block::accounting::{Kind, Outcome, Stamp, ThreadAccount};
use block::{Buffer, ByteRange, Errno, RootHandle, WriteFlags, ZeroFlags};
use executor::TaskPool;
use executor::buffer::IoVecs;
use smallvec::SmallVec;
use vhost_daemon::ring::GuestBytes;
use vhost_daemon::{Chain, Queue};
use virtio_bindings::virtio_blk as blk;

use super::config::{MAX_RANGE_SECTORS, MAX_RANGES, SECTOR};
use super::device::Traits;

/// Length of a request header in bytes: type u32, reserved u32, sector u64.
const HEADER_LEN: usize = 16;
/// Length of one range of a discard or write of zeroes: sector u64, sectors u32, flags u32.
const RANGE_LEN: usize = 16;
/// Longest read or write in bytes: QEMU's limit, below 2 GiB by a sector.
const MAX_TRANSFER: usize = (1 << 31) - 512;
/// Bytes that an erasure overwrites at a time.
const ERASE_CHUNK: usize = 1 << 20;
/// What they are overwritten with.
const ERASE_BYTE: u8 = 0xff;
/// Requests in flight that need no allocation.
const POOL: usize = 256;

pub(super) const OK: u8 = blk::VIRTIO_BLK_S_OK as u8;
pub(super) const IOERR: u8 = blk::VIRTIO_BLK_S_IOERR as u8;
pub(super) const UNSUPP: u8 = blk::VIRTIO_BLK_S_UNSUPP as u8;

/// One range of a discard or write of zeroes.
#[derive(Clone, Copy)]
struct Range {
    bytes: ByteRange,
    unmap: bool,
}

/// What a request asks of the node.
enum Operation {
    Read(Transfer),
    Write(Transfer),
    Flush,
    Discard(SmallVec<[Range; 1]>),
    Erase(SmallVec<[Range; 1]>),
    WriteZeroes(SmallVec<[Range; 1]>),
}

/// Data to move.
struct Transfer {
    offset: u64,
    len: u32,
    iovecs: Rc<IoVecs>,
}

impl Operation {
    /// What it counts as, and how many bytes.
    #[inline]
    fn counted(&self) -> (Kind, u64) {
        let bytes = |ranges: &[Range]| ranges.iter().map(|range| range.bytes.length).sum();
        match self {
            Operation::Read(transfer) => (Kind::Read, u64::from(transfer.len)),
            Operation::Write(transfer) => (Kind::Write, u64::from(transfer.len)),
            Operation::Flush => (Kind::Flush, 0),
            Operation::Discard(ranges) => (Kind::Unmap, bytes(ranges)),
            Operation::Erase(ranges) | Operation::WriteZeroes(ranges) => {
                (Kind::Write, bytes(ranges))
            }
        }
    }
}

/// A request whose chain was parsed.
struct Request {
    head: u16,
    status: GuestBytes,
    operation: Operation,
    began: Stamp,
}

/// What parsing a chain comes to.
enum Parsed {
    Start(Operation),
    /// Done already: bytes written besides the status.
    Done(u32),
}

/// The state of a queue's requests.
struct Inner {
    root: RootHandle,
    traits: Arc<Traits>,
    account: ThreadAccount,
    spare: RefCell<Vec<Rc<IoVecs>>>,
}

/// Serves one queue's requests. Stays on its thread.
pub(super) struct BlkHandler {
    inner: Rc<Inner>,
    spawn: Box<dyn Fn(Rc<Queue>, Request)>,
}

impl BlkHandler {
    /// A handler that sends requests to `root` and counts them in `account`.
    pub(super) fn new(root: RootHandle, traits: Arc<Traits>, account: ThreadAccount) -> BlkHandler {
        let inner = Rc::new(Inner {
            root,
            traits,
            account,
            spare: RefCell::new((0..POOL).map(|_| Rc::default()).collect()),
        });
        BlkHandler {
            spawn: spawner(inner.clone()),
            inner,
        }
    }
}

/// Starts requests as pooled tasks. The future's type has no name, hence the closure.
fn spawner(inner: Rc<Inner>) -> Box<dyn Fn(Rc<Queue>, Request)> {
    let pool = TaskPool::with_capacity(POOL);
    Box::new(move |queue, request| {
        pool.spawn(serve(inner.clone(), queue, request));
    })
}

impl vhost_daemon::Handler for BlkHandler {
    #[inline]
    fn prepare(&self, chain: &Chain) {
        if !self.inner.root.can_prefetch() {
            return;
        }
        let header: Option<[u8; HEADER_LEN]> = chain.read_head();
        let Some([t0, t1, t2, t3, _, _, _, _, sector @ ..]) = header else {
            return;
        };
        let kind = u32::from_le_bytes([t0, t1, t2, t3]);
        if let (blk::VIRTIO_BLK_T_IN | blk::VIRTIO_BLK_T_OUT, Some(offset)) =
            (kind, u64::from_le_bytes(sector).checked_mul(SECTOR))
        {
            self.inner.root.prefetch(offset);
        }
    }

    #[inline]
    fn handle(&self, queue: &Rc<Queue>, chain: &Chain) {
        let head = chain.head();
        let Some(status) = chain.writable_tail(1) else {
            return queue.reject(head, "a request without room for its status");
        };
        match self.inner.parse(chain) {
            Ok(Parsed::Start(operation)) => {
                let request = Request {
                    head,
                    status,
                    operation,
                    began: self.inner.account.begin(),
                };
                (self.spawn)(queue.clone(), request);
            }
            Ok(Parsed::Done(written)) => {
                status.write(&[OK]);
                queue.complete(head, written + 1);
            }
            Err(code) => {
                status.write(&[code]);
                queue.complete(head, 1);
            }
        }
    }

    #[inline]
    fn batch_ended(&self) {
        self.inner.account.end_batch();
    }
}

/// Serves one request to its end.
async fn serve(inner: Rc<Inner>, queue: Rc<Queue>, request: Request) {
    let counted = request.operation.counted();
    let (result, written) = match request.operation {
        Operation::Read(transfer) => {
            let len = transfer.len;
            (inner.read(transfer).await, len)
        }
        Operation::Write(transfer) => (inner.write(transfer).await, 0),
        Operation::Flush => (inner.root.flush().await, 0),
        Operation::Discard(ranges) => (inner.discard(&ranges).await, 0),
        Operation::Erase(ranges) => (inner.erase(&ranges).await, 0),
        Operation::WriteZeroes(ranges) => (inner.write_zeroes(&ranges).await, 0),
    };
    let (code, written, outcome) = match result {
        Ok(()) => (OK, written + 1, Outcome::Done),
        Err(errno) => (status_of(errno), 1, Outcome::Failed),
    };
    inner.account.done(request.began, counted, outcome);
    request.status.write(&[code]);
    queue.complete(request.head, written);
}

/// The status byte of a failed request.
fn status_of(errno: Errno) -> u8 {
    match errno {
        Errno::EOPNOTSUPP => UNSUPP,
        _ => IOERR,
    }
}

impl Inner {
    async fn read(&self, transfer: Transfer) -> Result<(), Errno> {
        let buffer = Buffer::from_iovecs(transfer.iovecs.clone());
        let result = self.root.read(transfer.offset, buffer).await;
        self.recycle(transfer.iovecs);
        result
    }

    async fn write(&self, transfer: Transfer) -> Result<(), Errno> {
        let buffer = Buffer::from_iovecs(transfer.iovecs.clone());
        let flags = WriteFlags::default();
        let result = self.root.write(transfer.offset, buffer, flags).await;
        self.recycle(transfer.iovecs);
        result?;
        self.settle().await
    }

    /// With the write cache off, what completes is stable.
    async fn settle(&self) -> Result<(), Errno> {
        if self.traits.completes_stable() {
            return self.root.flush().await;
        }
        Ok(())
    }

    /// Overwrites the ranges as they lie, and only completes when that is stable. Not with zeroes:
    /// a node that detects them would note that the range is zero and leave the old bytes there.
    async fn erase(&self, ranges: &[Range]) -> Result<(), Errno> {
        let pattern = Buffer::zeroed(ERASE_CHUNK);
        pattern.fill(ERASE_BYTE);
        for range in ranges {
            let mut done = 0;
            while done < range.bytes.length {
                let len = (range.bytes.length - done).min(ERASE_CHUNK as u64);
                let part = pattern.slice(0..len as usize);
                let offset = range.bytes.offset + done;
                let flags = WriteFlags::default();
                self.root.write(offset, part, flags).await?;
                done += len;
            }
        }
        self.root.flush().await
    }

    async fn discard(&self, ranges: &[Range]) -> Result<(), Errno> {
        for range in ranges {
            self.root.discard(range.bytes).await?;
        }
        self.settle().await
    }

    async fn write_zeroes(&self, ranges: &[Range]) -> Result<(), Errno> {
        for range in ranges {
            let flags = ZeroFlags {
                may_unmap: range.unmap,
                ..ZeroFlags::default()
            };
            self.root.write_zeroes(range.bytes, flags).await?;
        }
        self.settle().await
    }

    /// Keeps an iovec list for the next request, unless the kernel still uses it.
    fn recycle(&self, mut iovecs: Rc<IoVecs>) {
        if let Some(list) = Rc::get_mut(&mut iovecs) {
            list.clear();
            let mut spare = self.spare.borrow_mut();
            if spare.len() < POOL {
                spare.push(iovecs);
            }
        }
    }

    /// Reads the header and the rest of the chain; a status byte when that cannot be served.
    #[inline]
    fn parse(&self, chain: &Chain) -> Result<Parsed, u8> {
        let header: [u8; HEADER_LEN] = chain.read_head().ok_or(IOERR)?;
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        match u32::from_le_bytes([t0, t1, t2, t3]) {
            blk::VIRTIO_BLK_T_IN => {
                let len = chain.writable_len() - 1;
                let mut transfer = self.transfer(sector, (Kind::Read, len))?;
                self.collect(&mut transfer, |list| chain.writable_iovecs(0..len, list))?;
                Ok(Parsed::Start(Operation::Read(transfer)))
            }
            blk::VIRTIO_BLK_T_OUT => {
                self.expect_writable()?;
                let len = chain.readable_len() - HEADER_LEN;
                let mut transfer = self.transfer(sector, (Kind::Write, len))?;
                self.collect(&mut transfer, |list| {
                    chain.readable_iovecs(HEADER_LEN..chain.readable_len(), list)
                })?;
                Ok(Parsed::Start(Operation::Write(transfer)))
            }
            blk::VIRTIO_BLK_T_FLUSH => Ok(Parsed::Start(Operation::Flush)),
            blk::VIRTIO_BLK_T_GET_ID => self.get_id(chain),
            blk::VIRTIO_BLK_T_DISCARD => {
                let ranges = self.ranges(chain, (Kind::Unmap, 0))?;
                Ok(Parsed::Start(Operation::Discard(ranges)))
            }
            blk::VIRTIO_BLK_T_SECURE_ERASE if self.traits.secure_erase => {
                let ranges = self.ranges(chain, (Kind::Write, 0))?;
                Ok(Parsed::Start(Operation::Erase(ranges)))
            }
            blk::VIRTIO_BLK_T_WRITE_ZEROES => {
                let unmap = blk::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
                let ranges = self.ranges(chain, (Kind::Write, unmap))?;
                Ok(Parsed::Start(Operation::WriteZeroes(ranges)))
            }
            _ => Err(UNSUPP),
        }
    }

    /// Gives `transfer` an iovec list that `fill` puts the data's pieces on.
    #[inline]
    fn collect(
        &self,
        transfer: &mut Transfer,
        fill: impl FnOnce(&mut IoVecs) -> bool,
    ) -> Result<(), u8> {
        let list = Rc::get_mut(&mut transfer.iovecs).expect("a spare list has one owner");
        if fill(list) { Ok(()) } else { Err(IOERR) }
    }

    /// A transfer of `len` bytes at `sector` that lies on the disk, without its pieces yet.
    #[inline]
    fn transfer(&self, sector: u64, (kind, len): (Kind, usize)) -> Result<Transfer, u8> {
        if len > MAX_TRANSFER {
            return Err(IOERR);
        }
        let range = self.on_disk(sector, (kind, len as u64))?;
        Ok(Transfer {
            offset: range.offset,
            len: len as u32,
            iovecs: self.spare.borrow_mut().pop().unwrap_or_default(),
        })
    }

    /// The bytes of `len` from `sector`, when they are whole blocks of the disk; else an invalid request.
    #[inline]
    fn on_disk(&self, sector: u64, (kind, len): (Kind, u64)) -> Result<ByteRange, u8> {
        let range = self.blocks(sector, len);
        if range.is_none() {
            self.account.invalid(kind);
        }
        range.ok_or(IOERR)
    }

    #[inline]
    fn blocks(&self, sector: u64, len: u64) -> Option<ByteRange> {
        let block_size = u64::from(self.traits.block_size);
        let offset = sector.checked_mul(SECTOR)?;
        let end = offset.checked_add(len)?;
        // The disk ends at a whole sector, as its capacity says.
        let capacity = self.root.length() & !(SECTOR - 1);
        let whole = (offset | len) & (block_size - 1) == 0;
        (whole && end <= capacity).then_some(ByteRange::new(offset, len))
    }

    fn expect_writable(&self) -> Result<(), u8> {
        if self.traits.writable {
            Ok(())
        } else {
            Err(IOERR)
        }
    }

    fn get_id(&self, chain: &Chain) -> Result<Parsed, u8> {
        let len = (chain.writable_len() - 1).min(self.traits.serial.len());
        if !chain.copy_writable(0, &self.traits.serial[..len]) {
            return Err(IOERR);
        }
        Ok(Parsed::Done(len as u32))
    }

    /// The ranges of a request of a kind that they may carry flags for.
    fn ranges(&self, chain: &Chain, allowed: (Kind, u32)) -> Result<SmallVec<[Range; 1]>, u8> {
        self.expect_writable()?;
        let len = chain.readable_len() - HEADER_LEN;
        if len == 0 || !len.is_multiple_of(RANGE_LEN) {
            return Err(IOERR);
        }
        if len / RANGE_LEN > MAX_RANGES {
            return Err(UNSUPP);
        }
        (0..len / RANGE_LEN)
            .map(|i| self.range(chain, HEADER_LEN + i * RANGE_LEN, allowed))
            .collect()
    }

    fn range(&self, chain: &Chain, at: usize, (kind, allowed): (Kind, u32)) -> Result<Range, u8> {
        let mut bytes = [0; RANGE_LEN];
        if !chain.copy_readable(at, &mut bytes) {
            return Err(IOERR);
        }
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = bytes;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
        let flags = u32::from_le_bytes(flags);
        if flags & !allowed != 0 {
            return Err(UNSUPP);
        }
        if sectors > MAX_RANGE_SECTORS {
            self.account.invalid(kind);
            return Err(IOERR);
        }
        Ok(Range {
            bytes: self.on_disk(sector, (kind, u64::from(sectors) * SECTOR))?,
            unmap: flags & blk::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0,
        })
    }
}
