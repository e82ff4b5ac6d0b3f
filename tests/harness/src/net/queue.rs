//! The queues of a virtio-net driver: buffers in guest memory, frames in and out of them.
//!
//! Each queue has one slot of buffer memory per ring entry. Receive buffers are filled with a pattern first, so that a device
//! which writes beyond what it says is found out. Every wait is bounded.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;

use super::dirty_log::PAGE_BYTES;
use super::features::{HEADER_BYTES, Header};
use crate::driver::memory::Area;
use crate::driver::{Buffer, Ring};

const POISON: u8 = 0xdb;
/// Bytes after a frame that must still be what they were.
const GUARDED: usize = 64;
/// Most pieces that one chain is cut into.
pub(super) const MAX_PIECES: usize = 32;
/// Bytes of an indirect table.
pub(super) const TABLE_BYTES: usize = MAX_PIECES * 16;

/// Memory of one chain.
#[derive(Clone, Debug)]
pub(super) struct Slot {
    pub(super) buffer: Area,
    pub(super) table: Area,
}

/// A ring whose chains each own a slot.
#[derive(Debug)]
pub(super) struct SlotRing {
    pub(super) ring: Ring,
    pub(super) kick: Arc<EventFd>,
    pub(super) call: Arc<EventFd>,
    pub(super) slots: Vec<Slot>,
    pub(super) free: VecDeque<usize>,
    pub(super) by_name: HashMap<u16, usize>,
    pub(super) indirect: bool,
}

impl SlotRing {
    /// Whether a chain of that many pieces fits now.
    fn has_room(&self, pieces: usize) -> bool {
        let descriptors = if self.uses_table(pieces) { 1 } else { pieces };
        !self.free.is_empty() && self.ring.has_room(descriptors)
    }

    fn uses_table(&self, pieces: usize) -> bool {
        self.indirect && pieces > 1
    }

    /// Queues a chain over the next free slot, `cut` into pieces that `writable` tells apart.
    fn post(&mut self, pieces: &[(usize, usize)], writable: bool) -> Result<()> {
        ensure!(pieces.len() <= MAX_PIECES, "{} pieces", pieces.len());
        ensure!(self.has_room(pieces.len()), "the queue is full");
        let slot = self.free.pop_front().context("a slot is free")?;
        let memory = &self.slots[slot];
        let buffers: Vec<Buffer> = pieces
            .iter()
            .map(|&(at, bytes)| Buffer {
                gpa: memory.buffer.gpa(at),
                bytes: bytes as u32,
                writable,
            })
            .collect();
        let table = self.uses_table(pieces.len()).then_some(&memory.table);
        let name = self.ring.push(&buffers, table)?;
        self.by_name.insert(name, slot);
        Ok(())
    }

    pub(super) fn publish(&mut self) -> Result<()> {
        if self.ring.publish() {
            self.kick.write(1).context("kick")?;
        }
        Ok(())
    }

    fn pop(&mut self) -> Result<Option<(usize, usize)>> {
        let Some((name, written)) = self.ring.pop()? else {
            return Ok(None);
        };
        let slot = self.by_name.remove(&name).context("an unknown chain")?;
        Ok(Some((slot, written as usize)))
    }

    /// Waits for the call eventfd, or for a completion that is there already.
    pub(super) fn wait(&self, limit: Duration) -> Result<bool> {
        wait_for_any(&[self], limit)
    }

    pub(super) fn reset(&mut self) {
        self.ring.reset();
        self.by_name.clear();
        self.free = (0..self.slots.len()).collect();
    }
}

/// Waits until one of the rings has a completion; false when `limit` passes first.
fn wait_for_any(rings: &[&SlotRing], limit: Duration) -> Result<bool> {
    let start = Instant::now();
    loop {
        for ring in rings {
            // Reset, so that the next signal belongs to what happens from here on.
            let _ = ring.call.read();
        }
        if rings.iter().any(|ring| ring.ring.want_interrupt()) {
            return Ok(true);
        }
        let left = limit.saturating_sub(start.elapsed());
        let mut fds: Vec<PollFd<'_>> = rings
            .iter()
            .map(|ring| PollFd::new(ring.call.as_fd(), PollFlags::POLLIN))
            .collect();
        // Rounded up, so that the last wait is not a busy one.
        let left = left + Duration::from_micros(999);
        if poll(&mut fds, PollTimeout::try_from(left)?)? == 0 {
            return Ok(rings.iter().any(|ring| ring.ring.want_interrupt()));
        }
    }
}

/// The queue from the guest to the network.
#[derive(Debug)]
pub struct TransmitQueue {
    pub(super) inner: SlotRing,
    pub(super) timeout: Duration,
}

impl TransmitQueue {
    /// Whether a frame in that many pieces can be queued now.
    pub fn has_room(&self, pieces: usize) -> bool {
        self.inner.has_room(pieces)
    }

    /// Frames that the device has not returned.
    pub fn outstanding(&self) -> usize {
        self.inner.by_name.len()
    }

    /// Queues a frame in one piece with its header.
    ///
    /// # Errors
    /// When the queue is full or the frame too long for a slot.
    pub fn queue(&mut self, header: Header, frame: &[u8]) -> Result<()> {
        self.queue_cut(header, frame, &[])
    }

    /// Queues a frame whose chain is cut: `cuts` are the lengths of the pieces but the last one, header included.
    ///
    /// # Errors
    /// As [`TransmitQueue::queue`], and when the cuts are longer than the frame.
    pub fn queue_cut(&mut self, header: Header, frame: &[u8], cuts: &[usize]) -> Result<()> {
        let bytes = [&header.encode(), frame].concat();
        self.queue_raw(&bytes, cuts)
    }

    /// Queues bytes as they are, without a look at what they mean.
    ///
    /// # Errors
    /// As [`TransmitQueue::queue_cut`].
    pub fn queue_raw(&mut self, bytes: &[u8], cuts: &[usize]) -> Result<()> {
        let slot = *self.inner.free.front().context("the queue is full")?;
        let buffer = &self.inner.slots[slot].buffer;
        ensure!(
            bytes.len() <= buffer.bytes,
            "{} bytes in a slot of {}",
            bytes.len(),
            buffer.bytes
        );
        buffer.write(0, bytes);
        self.inner.post(&cut(bytes.len(), cuts)?, false)
    }

    /// Shows queued frames to the device.
    ///
    /// # Errors
    /// When the eventfd cannot be written.
    pub fn kick(&mut self) -> Result<()> {
        self.inner.publish()
    }

    /// Takes back the frames that the device returned; gives how many.
    ///
    /// # Errors
    /// When the device broke the protocol.
    pub fn reap(&mut self) -> Result<usize> {
        let mut count = 0;
        while let Some((slot, written)) = self.inner.pop().context("transmit queue")? {
            // In a packed ring the length means nothing where nothing is writable.
            ensure!(
                written == 0 || matches!(self.inner.ring, Ring::Packed(_)),
                "a sent frame came back with {written} bytes written"
            );
            self.inner.free.push_back(slot);
            count += 1;
        }
        Ok(count)
    }

    /// Waits until the device has returned every frame.
    ///
    /// # Errors
    /// When it does not within the driver's timeout.
    pub fn drain(&mut self) -> Result<()> {
        self.kick()?;
        let start = Instant::now();
        loop {
            self.reap()?;
            if self.outstanding() == 0 {
                return Ok(());
            }
            let left = self.timeout.saturating_sub(start.elapsed());
            ensure!(
                !left.is_zero(),
                "{} frames were not returned within {:?}",
                self.outstanding(),
                self.timeout
            );
            self.inner.wait(left)?;
        }
    }

    /// Queues a frame, shows it and waits until the device returned all.
    ///
    /// # Errors
    /// As [`TransmitQueue::queue`] and [`TransmitQueue::drain`].
    pub fn send(&mut self, frame: &[u8]) -> Result<()> {
        self.queue(Header::default(), frame)?;
        self.drain()
    }
}

/// A frame that came in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Received {
    /// What is left to do for it.
    pub header: Header,
    /// From the destination address on.
    pub frame: Vec<u8>,
}

/// The queue from the network to the guest.
#[derive(Debug)]
pub struct ReceiveQueue {
    pub(super) inner: SlotRing,
    pub(super) timeout: Duration,
    /// Bytes offered per buffer.
    pub(super) buffer_bytes: usize,
    /// Lengths of the pieces of each buffer but the last one.
    pub(super) cuts: Vec<usize>,
    /// One frame may take several buffers.
    pub(super) mergeable: bool,
    /// Pages of guest memory that the device said it wrote frames to.
    pub(super) written: BTreeSet<u64>,
    /// Slots that an earlier device had when it was cut off: it may have begun to fill them.
    pub(super) begun: BTreeSet<usize>,
}

impl ReceiveQueue {
    /// Offers every free buffer to the device.
    ///
    /// # Errors
    /// When the eventfd cannot be written.
    pub fn fill(&mut self) -> Result<()> {
        self.offer(usize::MAX)
    }

    /// Offers up to `count` buffers.
    ///
    /// # Errors
    /// When the eventfd cannot be written.
    pub fn offer(&mut self, count: usize) -> Result<()> {
        let pieces = cut(self.buffer_bytes, &self.cuts)?;
        let poison = vec![POISON; self.buffer_bytes.min(4096)];
        for _ in 0..count {
            if !self.inner.has_room(pieces.len()) {
                break;
            }
            let slot = *self.inner.free.front().context("a slot is free")?;
            self.inner.slots[slot].buffer.write(0, &poison);
            self.begun.remove(&slot);
            self.inner.post(&pieces, true)?;
        }
        self.inner.publish()
    }

    /// Numbers of the pages that the device wrote frames to since the last call.
    pub fn take_written_pages(&mut self) -> BTreeSet<u64> {
        std::mem::take(&mut self.written)
    }

    /// Buffers that the device has.
    pub fn offered(&self) -> usize {
        self.inner.by_name.len()
    }

    /// A frame that is there already. Its buffers go back to the device at the next [`ReceiveQueue::fill`].
    ///
    /// # Errors
    /// When the device broke the protocol.
    pub fn try_frame(&mut self) -> Result<Option<Received>> {
        let Some((slot, written)) = self.inner.pop().context("receive queue")? else {
            return Ok(None);
        };
        ensure!(
            written >= HEADER_BYTES,
            "a received chain of {written} bytes"
        );
        let mut bytes = self.take(slot, written)?;
        let header = Header::decode(&bytes[..HEADER_BYTES]);
        // DPDK leaves the field alone where it has no meaning; whether ours fills it in is a test's business.
        let buffers = if self.mergeable {
            header.num_buffers
        } else {
            1
        };
        ensure!(buffers >= 1, "a frame of no buffers");
        let mut frame = bytes.split_off(HEADER_BYTES);
        let mut full = written == self.buffer_bytes;
        for at in 1..buffers {
            let next = self.inner.pop().context("receive queue")?;
            let (slot, written) = next
                .with_context(|| format!("only {at} buffers are there of a frame of {buffers}"))?;
            ensure!(full, "a buffer before the last one of a frame is not full");
            full = written == self.buffer_bytes;
            frame.extend_from_slice(&self.take(slot, written)?);
        }
        Ok(Some(Received { header, frame }))
    }

    /// Gives every finished buffer back to the device without a look at it.
    ///
    /// # Errors
    /// When the device names a buffer that it does not have.
    pub fn discard(&mut self) -> Result<()> {
        while let Some((slot, _)) = self.inner.pop().context("receive queue")? {
            self.inner.free.push_back(slot);
        }
        self.fill()
    }

    /// Another device goes on with the buffers that the last one had.
    pub(super) fn change_hands(&mut self) {
        self.begun.extend(self.inner.by_name.values());
    }

    fn take(&mut self, slot: usize, written: usize) -> Result<Vec<u8>> {
        ensure!(
            written <= self.buffer_bytes,
            "{written} bytes in a buffer of {}",
            self.buffer_bytes
        );
        let guarded = (written + GUARDED)
            .min(self.buffer_bytes.min(4096))
            .max(written);
        let mut bytes = vec![0; guarded];
        self.inner.slots[slot].buffer.read(0, &mut bytes);
        // A device may write more than it announces (virtio 1.3, 2.7.8.2); ours does so only across a kill.
        ensure!(
            self.begun.contains(&slot) || bytes[written..].iter().all(|&byte| byte == POISON),
            "bytes after the {written} that were announced are written"
        );
        bytes.truncate(written);
        let first = self.inner.slots[slot].buffer.gpa(0);
        let last = first + written as u64 - 1;
        self.written.extend(first / PAGE_BYTES..=last / PAGE_BYTES);
        self.inner.free.push_back(slot);
        Ok(bytes)
    }

    /// The next frame.
    ///
    /// # Errors
    /// When none comes within the driver's timeout.
    pub fn frame(&mut self) -> Result<Received> {
        self.frame_within(self.timeout)?
            .with_context(|| format!("no frame within {:?}", self.timeout))
    }

    /// The next frame, if one comes within `limit`. Buffers are offered again after it.
    ///
    /// # Errors
    /// When the device broke the protocol.
    pub fn frame_within(&mut self, limit: Duration) -> Result<Option<Received>> {
        self.fill()?;
        let start = Instant::now();
        loop {
            if let Some(received) = self.try_frame()? {
                self.fill()?;
                return Ok(Some(received));
            }
            let left = limit.saturating_sub(start.elapsed());
            if left.is_zero() {
                return Ok(None);
            }
            self.inner.wait(left)?;
        }
    }
}

/// A transmit queue and its receive queue.
#[derive(Debug)]
pub struct Pair {
    /// From the network.
    pub rx: ReceiveQueue,
    /// To the network.
    pub tx: TransmitQueue,
}

/// Waits until either queue has something; false when `limit` passes first.
///
/// # Errors
/// When an eventfd fails.
pub fn wait(tx: &TransmitQueue, rx: &ReceiveQueue, limit: Duration) -> Result<bool> {
    wait_for_any(&[&rx.inner, &tx.inner], limit)
}

/// Offsets and lengths of the pieces of `bytes` bytes.
fn cut(bytes: usize, cuts: &[usize]) -> Result<Vec<(usize, usize)>> {
    let mut at = 0;
    let mut pieces = Vec::with_capacity(cuts.len() + 1);
    for &length in cuts {
        pieces.push((at, length));
        at += length;
    }
    ensure!(
        at < bytes || (at == bytes && !pieces.is_empty()),
        "cuts of {at} in {bytes} bytes"
    );
    if at < bytes {
        pieces.push((at, bytes - at));
    }
    Ok(pieces)
}
