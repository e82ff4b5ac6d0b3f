//! The way to the guest: a pair's receive ring as a [`Sink`].

#![expect(
    unsafe_code,
    reason = "a frame that was read into guest memory is looked at there"
)]

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use executor::sync::Notify;
use vhost_daemon::queue::QueueChange;
use vhost_daemon::{QueueSetup, ServedRing, Stopped};

use super::fifo::{Fifo, Room};
use super::filter::{DECIDING, Filter};
use super::hooks::PairHooks;
use super::shared::Shared;
use crate::capture::{Capture, Direction};
use crate::frame::{Frame, VnetHeader};
use crate::link::{Delivery, DropReason, LocalFuture, Offloads, Sink};
use crate::live::LiveReader;

/// The receiving half of a pair.
pub(super) struct Rx {
    shared: Arc<Shared>,
    hooks: Rc<PairHooks>,
    filter: LiveReader<Filter>,
    offloads: Cell<Offloads>,
    fifo: RefCell<Option<Fifo>>,
    /// Whether the front-end has the ring enabled.
    enabled: Cell<bool>,
    /// The next frame needs more than what is fetched and what was in the ring.
    starved: Cell<bool>,
    /// How many wait for [`Sink::ready`].
    waiting: Cell<u32>,
    /// Kicks were asked for.
    armed: Cell<bool>,
    /// What makes a difference to those that wait.
    changed: Notify,
}

impl Rx {
    pub(super) fn new(shared: Arc<Shared>, hooks: Rc<PairHooks>) -> Rx {
        Rx {
            filter: LiveReader::new(shared.filter.clone()),
            shared,
            hooks,
            offloads: Cell::new(Offloads::NONE),
            fifo: RefCell::new(None),
            enabled: Cell::new(false),
            starved: Cell::new(false),
            waiting: Cell::new(0),
            armed: Cell::new(false),
            changed: Notify::new(),
        }
    }

    /// The ring runs from now on.
    pub(super) fn start(&self, served: Rc<ServedRing>, setup: &QueueSetup) {
        self.fifo.replace(Some(Fifo::new(served, setup)));
        self.enabled.set(setup.enabled);
        self.wake();
    }

    /// Whether the ring runs.
    pub(super) fn runs(&self) -> bool {
        self.fifo.borrow().is_some()
    }

    /// Whether it runs and frames are given to it.
    pub(super) fn is_enabled(&self) -> bool {
        self.enabled.get()
    }

    /// Whether the guest has given any buffers that are to be used.
    pub(super) fn is_filled(&self) -> bool {
        self.is_enabled() && self.fifo.borrow().as_ref().is_some_and(Fifo::has_chain)
    }

    /// Whether the guest broke the ring.
    pub(super) fn is_broken(&self) -> bool {
        let fifo = self.fifo.borrow();
        fifo.as_ref().is_some_and(|fifo| fifo.served.is_broken())
    }

    /// Makes a change with nothing fetched.
    pub(super) fn change(&self, change: QueueChange) {
        if let Some(fifo) = &mut *self.fifo.borrow_mut() {
            let renew = match change {
                QueueChange::Memory(_) | QueueChange::Log(_) => {
                    fifo.rewind();
                    true
                }
                QueueChange::Enabled => {
                    self.enabled.set(true);
                    false
                }
                QueueChange::Disabled => {
                    self.enabled.set(false);
                    fifo.rewind();
                    false
                }
                _ => false,
            };
            fifo.served.change(change);
            if renew {
                fifo.renew();
            }
        }
    }

    /// Stops the ring and gives back what was not used.
    pub(super) fn stop(&self) -> Option<Stopped> {
        let mut fifo = self.fifo.take()?;
        self.enabled.set(false);
        fifo.rewind();
        Some(fifo.served.close())
    }

    /// What the guest can do by itself, as it is now.
    pub(super) fn set_offloads(&self, offloads: Offloads) {
        self.offloads.set(offloads);
    }

    /// Lets those that wait look again.
    pub(super) fn wake(&self) {
        self.starved.set(false);
        if self.waiting.get() > 0 {
            self.changed.notify_all();
        }
    }

    /// Wakes those that wait for buffers when there are some; whether there were.
    #[inline]
    pub(super) fn poll(&self) -> bool {
        if self.waiting.get() == 0 {
            return false;
        }
        let ready = self.ready();
        if ready {
            self.wake();
        }
        ready
    }

    /// Whether the next frame has buffers, as far as is known.
    fn has_room(&self) -> bool {
        let fifo = self.fifo.borrow();
        let enough = fifo.as_ref().map(|fifo| match self.starved.get() {
            true => fifo.has_more(),
            false => fifo.has_chain(),
        });
        self.is_enabled() && enough == Some(true)
    }

    /// Asks for kicks when somebody waits for buffers; whether it need not wait. Who waits for a limit or the link is told of
    /// these.
    pub(super) fn arm_if_awaited(&self) -> bool {
        match self.waiting.get() {
            0 => false,
            _ if self.has_room() => self.ready(),
            _ => self.arm(),
        }
    }

    /// Asks for kicks; whether there is something already.
    pub(super) fn arm(&self) -> bool {
        let fifo = self.fifo.borrow();
        match &*fifo {
            Some(fifo) if self.is_enabled() && !fifo.served.is_broken() => {
                self.armed.set(true);
                fifo.served.arm()
            }
            _ => false,
        }
    }

    pub(super) fn disarm(&self) {
        if self.armed.replace(false)
            && let Some(fifo) = &*self.fifo.borrow()
            && !fifo.served.is_broken()
        {
            fifo.served.disarm();
        }
    }

    fn drop_frame(&self, reason: DropReason) -> Delivery {
        self.hooks.counters().rx.count_drop(reason);
        Delivery::Dropped(reason)
    }

    /// Takes a frame's tokens; how long to wait when there are none.
    #[inline]
    fn take_tokens(&self, frames: u64, bytes: usize) -> Result<(), Duration> {
        match &*self.hooks.rx_limits() {
            None => Ok(()),
            Some(limits) => limits.take(frames, bytes as u64, Instant::now()),
        }
    }

    /// Resolves when a limit may allow more, or something else made a difference.
    async fn wait(&self, limited: Option<Duration>) {
        let changed = self.changed.notified();
        if self.ready() {
            return;
        }
        let limits = self.hooks.rx_limits().clone();
        let (time, limits) = match (limited, limits) {
            (None, _) => return changed.await,
            // They have just been lifted.
            (Some(_), None) => return,
            (Some(time), Some(limits)) => (time, limits),
        };
        // Either is a reason to look again.
        let (mut changed, mut allowed) = (pin!(changed), pin!(limits.until(time)));
        poll_fn(|context| {
            if allowed.as_mut().poll(context).is_ready() {
                return Poll::Ready(());
            }
            changed.as_mut().poll(context)
        })
        .await;
    }

    /// What the guest is told of a frame: nothing that it does not understand.
    #[inline]
    fn header(&self, header: VnetHeader) -> VnetHeader {
        if self.offloads.get().csum {
            header
        } else {
            VnetHeader::default()
        }
    }
}

/// Counts somebody that waits for as long as it does.
struct Waiting<'a>(&'a Cell<u32>);

impl<'a> Waiting<'a> {
    fn new(count: &'a Cell<u32>) -> Waiting<'a> {
        count.set(count.get() + 1);
        Waiting(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

impl Sink for Rx {
    fn offloads(&self) -> Offloads {
        self.offloads.get()
    }

    fn ready(&self) -> bool {
        self.has_room() && self.shared.link() && self.take_tokens(0, 0).is_ok()
    }

    fn until_ready(&self) -> LocalFuture<'_, ()> {
        Box::pin(async move {
            let _waiting = Waiting::new(&self.waiting);
            while !self.ready() {
                self.wait(self.take_tokens(0, 0).err()).await;
            }
        })
    }

    fn deliver(&self, frame: &Frame<'_>) -> Delivery {
        if !self.shared.link() {
            return self.drop_frame(DropReason::LinkDown);
        }
        let mut fifo = self.fifo.borrow_mut();
        let Some(fifo) = fifo.as_mut().filter(|_| self.is_enabled()) else {
            return Delivery::NotReady(DropReason::NoBuffers);
        };
        if !self.filter.get().passes(frame.head()) {
            return self.drop_frame(DropReason::Filtered);
        }
        let chains = match fifo.room(VnetHeader::LEN + frame.len()) {
            Room::Chains(chains) => chains,
            Room::Never => return self.drop_frame(DropReason::TooLong),
            Room::Later => {
                self.starved.set(true);
                return Delivery::NotReady(DropReason::NoBuffers);
            }
        };
        if self.take_tokens(1, frame.len()).is_err() {
            return Delivery::NotReady(DropReason::RateLimited);
        }
        if let Some(capture) = self.hooks.capture() {
            capture.frame(Direction::Rx, frame);
        }
        self.starved.set(false);
        fifo.put(chains, self.header(frame.header), frame);
        self.hooks.counters().rx.count(1, frame.len() as u64);
        Delivery::Taken
    }

    fn reserve(&self, len: usize, buffers: &mut Vec<libc::iovec>) -> usize {
        if !self.is_enabled() || !self.shared.link() || self.take_tokens(0, 0).is_err() {
            return 0;
        }
        let mut fifo = self.fifo.borrow_mut();
        let Some(fifo) = &mut *fifo else {
            return 0;
        };
        let bytes = fifo.pieces(VnetHeader::LEN + len, buffers);
        self.starved.set(bytes == 0);
        bytes
    }

    fn commit(&self, written: usize) -> Delivery {
        let mut fifo = self.fifo.borrow_mut();
        let Some(fifo) = &mut *fifo else {
            return Delivery::NotReady(DropReason::NoBuffers);
        };
        if written < VnetHeader::LEN {
            return self.drop_frame(DropReason::TooShort);
        }
        let filter = self.filter.get();
        if !filter.is_open() && !filter.passes(&deciding_bytes(fifo, written)) {
            return self.drop_frame(DropReason::Filtered);
        }
        if !self.offloads.get().csum
            && let Some(first) = fifo.chains_of(written).first()
        {
            first.copy_writable(0, &[0]);
        }
        let len = written - VnetHeader::LEN;
        if let Some(capture) = self.hooks.capture() {
            capture_written(capture, fifo, written);
        }
        fifo.written(written);
        // What was reserved was allowed; what it was is known only now.
        let _ = self.take_tokens(1, len);
        self.hooks.counters().rx.count(1, len as u64);
        Delivery::Taken
    }

    fn flush(&self) {
        if let Some(fifo) = &mut *self.fifo.borrow_mut() {
            fifo.publish();
        }
    }
}

/// Records a frame that lies in the next chains, behind its header.
#[cold]
fn capture_written(capture: &Capture, fifo: &Fifo, written: usize) {
    let (mut skip, mut left) = (VnetHeader::LEN, written);
    let mut pieces: Vec<libc::iovec> = Vec::new();
    for chain in fifo.chains_of(written) {
        let part = left.min(chain.writable_len());
        chain.writable_pieces(skip.min(part)..part, |base, len| {
            pieces.push(libc::iovec {
                iov_base: base.cast(),
                iov_len: len,
            });
        });
        skip = skip.saturating_sub(part);
        left -= part;
    }
    // SAFETY: the pieces are those of chains that stay as they are, and mapped, until this returns.
    let frame = unsafe { Frame::with_tail(VnetHeader::default(), &[], &pieces) };
    capture.frame(Direction::Rx, &frame);
}

/// The first bytes of a frame that lies in the next chains, behind its header.
fn deciding_bytes(fifo: &Fifo, written: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = Vec::with_capacity(VnetHeader::LEN + DECIDING);
    for chain in fifo.chains_of(written) {
        let part = written.min(bytes.capacity()) - bytes.len();
        chain.writable_pieces(0..part.min(chain.writable_len()), |base, len| {
            // SAFETY: `len` bytes of a mapped piece of guest memory into the vector's room: all pieces together are no
            // more than its capacity.
            unsafe {
                let at = bytes.len();
                std::ptr::copy_nonoverlapping(base, bytes.as_mut_ptr().add(at), len);
                bytes.set_len(at + len);
            }
        });
    }
    bytes.drain(..VnetHeader::LEN.min(bytes.len()));
    bytes
}
