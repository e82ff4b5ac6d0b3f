//! One queue of a tap or macvtap interface.
//!
//! ```text
//!   receive:   reserve ──> readv(guest's buffers, then private room) ── fits ──> commit
//!                                                                    └─ longer ─> put together privately, deliver
//!   transmit:  writev(header, head, tail), frame by frame, or a burst of them in one call of a ring (`batch`)
//! ```
//!
//! How much is reserved follows the frames: large buffers only while there are large frames. A frame that comes when less was
//! reserved, or that the guest has too few buffers for, is kept, so that nothing is cut off or lost for looking.

#![expect(
    unsafe_code,
    reason = "guest memory goes to system calls as raw pieces"
)]

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::rc::Rc;

use executor::net::poll_fd;

use super::batch::{Batch, WORTHWHILE};
use super::device::Device;
use crate::frame::{Frame, MAX_FRAME, VnetHeader};
use crate::link::{BURST, Delivery, DropReason, LocalFuture, NetQueue, Offloads, Received, Sink};
use crate::netdevs::lease::Lease;
use crate::netdevs::vectors;

/// Room for a frame of the usual size with a tag, in bytes.
const USUAL_FRAME: usize = 1518;
/// Frames of the usual size after which no larger ones are expected any more.
const USUAL_FRAMES: u32 = 256;

/// The queue.
pub(super) struct TapQueue {
    lease: Lease<Device>,
    /// What the kernel's interfaces know.
    supported: Offloads,
    sink: RefCell<Option<Rc<dyn Sink>>>,
    room: RefCell<Room>,
    pieces: RefCell<Vec<libc::iovec>>,
    flat: RefCell<Vec<u8>>,
    /// Where a burst is written at once: never where frames may have to wait.
    batch: RefCell<Option<Batch>>,
    /// Why the queue could not be connected.
    failure: Cell<Option<i32>>,
}

/// What receiving needs besides the guest's buffers.
struct Room {
    buffers: Vec<libc::iovec>,
    /// Where the part of a frame goes that the buffers do not hold.
    overflow: Vec<u8>,
    /// A header and a frame that the guest has had no room for.
    kept: Vec<u8>,
    /// Frame bytes to reserve buffers for.
    expected: usize,
    /// Usual frames since the last larger one.
    usual: u32,
}

impl Room {
    fn note(&mut self, frame_len: usize) {
        if frame_len > USUAL_FRAME {
            self.expected = MAX_FRAME;
            self.usual = 0;
        } else if self.expected > USUAL_FRAME {
            self.usual += 1;
            if self.usual == USUAL_FRAMES {
                self.expected = USUAL_FRAME;
            }
        }
    }
}

/// One look at the interface.
enum Read {
    Frame,
    NotReady,
    Drained,
}

impl TapQueue {
    pub(super) fn new(lease: Lease<Device>, supported: Offloads) -> TapQueue {
        let device = &*lease;
        let batch = match device.has_header() && device.never_waits() {
            true => Batch::new().inspect_err(|error| {
                tracing::warn!(%error, "no ring for a tap queue: each frame is a call of its own");
            }),
            false => Err(io::ErrorKind::Unsupported.into()),
        };
        TapQueue {
            batch: RefCell::new(batch.ok()),
            lease,
            supported,
            sink: RefCell::new(None),
            room: RefCell::new(Room {
                buffers: Vec::new(),
                overflow: vec![0; VnetHeader::LEN + MAX_FRAME],
                kept: Vec::new(),
                expected: USUAL_FRAME,
                usual: 0,
            }),
            pieces: RefCell::default(),
            flat: RefCell::default(),
            failure: Cell::new(None),
        }
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.lease.as_fd()
    }

    fn start(&self, offloads: Offloads) -> io::Result<()> {
        let device = &*self.lease;
        if device.is_multi_queue() {
            device.set_attached(true)?;
        }
        self.set_guest_offloads(offloads)
    }

    /// Takes one frame from the interface.
    fn read_one(&self, sink: &dyn Sink, room: &mut Room) -> io::Result<Read> {
        room.buffers.clear();
        let has_header = self.lease.has_header();
        let reserved = match (has_header, sink.ready()) {
            (_, false) => 0,
            (true, true) => sink.reserve(room.expected, &mut room.buffers),
            // Without a header of the kernel's the frame is put together behind an empty one.
            (false, true) => VnetHeader::LEN,
        };
        if reserved < VnetHeader::LEN {
            return Ok(Read::NotReady);
        }
        let mut in_guest = if has_header { reserved } else { 0 };
        if room.buffers.len() >= vectors::MAX_PIECES {
            room.buffers.truncate(vectors::MAX_PIECES - 1);
            in_guest = vectors::total(&room.buffers);
        }
        room.buffers.push(vectors::piece_mut(&mut room.overflow));
        // SAFETY: the reserved buffers may be written until the sink is called again, the last piece is ours.
        let len = match unsafe { vectors::read(self.fd(), &room.buffers) } {
            Ok(len) => len,
            Err(error) if vectors::would_block(&error) => return Ok(Read::Drained),
            Err(error) => return self.frame_lost(error),
        };
        let header = if has_header { VnetHeader::LEN } else { 0 };
        room.note(len.saturating_sub(header));
        if len <= in_guest {
            sink.commit(len);
            return Ok(Read::Frame);
        }
        room.kept.clear();
        if !has_header {
            room.kept
                .extend_from_slice(&VnetHeader::default().to_bytes());
        }
        // SAFETY: the reserved buffers are readable, too; the sink was not called since.
        unsafe { vectors::copy_from(&room.buffers, len, &mut room.kept) };
        Ok(deliver_kept(sink, &mut room.kept))
    }

    /// Sends a burst in one call, where that is possible and worth it. How many frames are dealt with.
    fn write_batch(&self, frames: &[Frame<'_>], dropped: &mut dyn FnMut(DropReason)) -> usize {
        let mut batch = self.batch.borrow_mut();
        let Some(ring) = batch.as_mut().filter(|_| frames.len() >= WORTHWHILE) else {
            return 0;
        };
        let mut results = [0; BURST];
        let burst = &frames[..frames.len().min(BURST)];
        let count = match ring.write(self.fd(), burst, &mut results) {
            Ok(count) => count,
            Err(error) => {
                tracing::warn!(%error, "a tap queue's ring has failed: each frame is a call of its own");
                *batch = None;
                burst.len()
            }
        };
        let refused = results[..count].iter().filter(|result| **result < 0);
        refused.for_each(|result| dropped(refusal(Some(-result))));
        count
    }

    fn write_one(&self, frame: &Frame<'_>) -> io::Result<()> {
        let mut pieces = self.pieces.borrow_mut();
        let header = frame.header.to_bytes();
        pieces.clear();
        if self.lease.has_header() {
            pieces.push(vectors::piece(&header));
        }
        let mut flat = self.flat.borrow_mut();
        vectors::append_frame(frame, &mut pieces, &mut flat);
        // SAFETY: the pieces are ours, or those of a frame, which are readable while it is there.
        unsafe { vectors::write(self.fd(), &pieces) }.map(drop)
    }

    /// What an error of reading means: the interface is gone, or one frame is.
    fn frame_lost(&self, error: io::Error) -> io::Result<Read> {
        match error.raw_os_error() {
            // The guest's memory is not there, or memory is short: the kernel has dropped the frame.
            Some(libc::EFAULT | libc::ENOMEM | libc::ENOBUFS | libc::EINTR) => Ok(Read::Frame),
            Some(libc::EBADFD) => {
                let what = format!("interface '{}' was removed", self.lease.name());
                Err(io::Error::new(io::ErrorKind::NotConnected, what))
            }
            _ => Err(error),
        }
    }
}

/// Why a frame that the interface refused was dropped.
fn refusal(errno: Option<i32>) -> DropReason {
    match errno {
        // The interface is down or gone.
        Some(libc::EIO | libc::EBADFD | libc::ENETDOWN) => DropReason::LinkDown,
        // The kernel likes the header less than we do.
        Some(libc::EINVAL) => DropReason::BadHeader,
        Some(libc::EAGAIN) => DropReason::Busy,
        _ => DropReason::SendFailed,
    }
}

/// Gives the sink what is kept: a header and a frame.
fn deliver_kept(sink: &dyn Sink, kept: &mut Vec<u8>) -> Read {
    let Some((header, bytes)) = kept.split_first_chunk::<{ VnetHeader::LEN }>() else {
        kept.clear();
        return Read::Frame;
    };
    let frame = Frame::new(VnetHeader::from_bytes(header), bytes);
    if let Delivery::NotReady(_) = sink.deliver(&frame) {
        return Read::NotReady;
    }
    kept.clear();
    Read::Frame
}

impl NetQueue for TapQueue {
    fn connect(&self, sink: Rc<dyn Sink>) {
        let started = self.start(sink.offloads());
        let failure = started.err().map(|error| error.raw_os_error());
        self.failure
            .set(failure.map(|errno| errno.unwrap_or(libc::EIO)));
        self.sink.replace(Some(sink));
    }

    fn disconnect(&self) {
        self.sink.replace(None);
        self.room.borrow_mut().kept.clear();
        let device = &*self.lease;
        if device.is_multi_queue()
            && let Err(error) = device.set_attached(false)
        {
            // The interface is gone, or the queue never was attached: nothing comes any more either way.
            tracing::debug!(ifname = device.name(), %error, "cannot detach a queue");
        }
    }

    fn transmit(&self, frames: &[Frame<'_>], dropped: &mut dyn FnMut(DropReason)) -> usize {
        let mut done = 0;
        while done < frames.len() {
            let rest = &frames[done..];
            let written = self.write_batch(rest, dropped);
            if written > 0 {
                done += written;
                continue;
            }
            match self.write_one(&rest[0]) {
                Ok(()) => {}
                Err(error) if vectors::would_block(&error) => return done,
                Err(error) => dropped(refusal(error.raw_os_error())),
            }
            done += 1;
        }
        done
    }

    fn writable(&self) -> LocalFuture<'_, ()> {
        Box::pin(async {
            // An error shows when the next frame is written.
            let _ = poll_fd(self.fd(), libc::POLLOUT).await;
        })
    }

    fn receive(&self, budget: usize) -> io::Result<Received> {
        if let Some(errno) = self.failure.get() {
            return Err(io::Error::from_raw_os_error(errno));
        }
        let Some(sink) = self.sink.borrow().clone() else {
            return Ok(Received::Drained);
        };
        let room = &mut *self.room.borrow_mut();
        let mut end = Ok(Received::More);
        if !room.kept.is_empty() && matches!(deliver_kept(&*sink, &mut room.kept), Read::NotReady) {
            return Ok(Received::NotReady);
        }
        for _ in 0..budget {
            match self.read_one(&*sink, room) {
                Ok(Read::Frame) => continue,
                Ok(Read::NotReady) => end = Ok(Received::NotReady),
                Ok(Read::Drained) => end = Ok(Received::Drained),
                Err(error) => end = Err(error),
            }
            break;
        }
        sink.flush();
        end
    }

    fn readable(&self) -> LocalFuture<'_, ()> {
        Box::pin(async {
            // An error shows when the next frame is read.
            let _ = poll_fd(self.fd(), libc::POLLIN).await;
        })
    }

    fn set_guest_offloads(&self, offloads: Offloads) -> io::Result<()> {
        let device = &*self.lease;
        if !device.has_header() {
            return Ok(());
        }
        device.set_offloads(offloads.and(self.supported))
    }
}
