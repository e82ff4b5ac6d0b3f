//! Where the frames for one member leave: a guest's queue pair, or the queue of an uplink.
//!
//! ```text
//!   forwarded ── takes? ── yes ──> deliver, transmit
//!                  └ no ──> backlog (private copies, bounded) ── a task, when it takes again ──> in the order they came
//! ```
//!
//! A switch makes no one wait for somebody else: what the receiver does not take now is copied, up to a limit in bytes, and lost
//! beyond. As long as the backlog holds something, all frames go through it.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;

use crate::frame::{Frame, VnetHeader};
use crate::link::{BURST, Delivery, DropReason, NetQueue, Offloads, Sink};

/// What a stored frame counts for beyond its bytes: it takes memory itself.
const STORED_COST: usize = 128;

/// Who takes the frames.
#[derive(Clone)]
pub(super) enum Target {
    /// A guest's queue pair.
    Sink(Rc<dyn Sink>),
    /// An uplink, and what it does by itself.
    Queue(Rc<dyn NetQueue>, Offloads),
}

struct Stored {
    header: VnetHeader,
    bytes: Vec<u8>,
}

/// The place where frames leave.
pub(super) struct Outlet {
    target: Target,
    /// Bytes that may wait.
    limit: usize,
    is_open: Cell<bool>,
    is_touched: Cell<bool>,
    is_draining: Cell<bool>,
    waiting: RefCell<VecDeque<Stored>>,
    waiting_cost: Cell<usize>,
    task: RefCell<Option<executor::JoinHandle<()>>>,
}

impl Outlet {
    pub(super) fn new(target: Target, limit: usize) -> Rc<Outlet> {
        Rc::new(Outlet {
            target,
            limit,
            is_open: Cell::new(true),
            is_touched: Cell::new(false),
            is_draining: Cell::new(false),
            waiting: RefCell::default(),
            waiting_cost: Cell::new(0),
            task: RefCell::default(),
        })
    }

    /// What it does by itself.
    #[inline]
    pub(super) fn offloads(&self) -> Offloads {
        match &self.target {
            Target::Sink(sink) => sink.offloads(),
            Target::Queue(_, offloads) => *offloads,
        }
    }

    /// Marks it for a flush; true when it was not marked.
    #[inline]
    pub(super) fn touch(&self) -> bool {
        !self.is_touched.replace(true)
    }

    /// Shows what it was given.
    pub(super) fn flush(&self) {
        self.is_touched.set(false);
        if self.is_open.get() {
            match &self.target {
                Target::Sink(sink) => sink.flush(),
                Target::Queue(queue, _) => queue.flush(),
            }
        }
    }

    /// Gives it a frame.
    ///
    /// # Errors
    /// Why the frame is lost, unless the receiver has counted that.
    #[inline]
    pub(super) fn send(self: &Rc<Self>, frame: &Frame<'_>) -> Result<(), DropReason> {
        if !self.is_draining.get()
            && let Target::Sink(sink) = &self.target
            && self.is_open.get()
        {
            return match sink.deliver(frame) {
                Delivery::Taken | Delivery::Dropped(_) => Ok(()),
                Delivery::NotReady(reason) => self.store(frame, reason),
            };
        }
        let mut lost = None;
        self.send_all(std::slice::from_ref(frame), &mut |reason| {
            lost = Some(reason)
        });
        lost.map_or(Ok(()), Err)
    }

    /// Gives it frames in their order; tells of each that is lost.
    pub(super) fn send_all(
        self: &Rc<Self>,
        frames: &[Frame<'_>],
        lost: &mut dyn FnMut(DropReason),
    ) {
        if !self.is_open.get() {
            frames.iter().for_each(|_| lost(DropReason::LinkDown));
            return;
        }
        let mut rest = frames;
        if !self.is_draining.get() {
            let taken = self.offer(rest, lost);
            rest = rest.get(taken..).unwrap_or_default();
        }
        for frame in rest {
            if let Err(reason) = self.store(frame, DropReason::Busy) {
                lost(reason);
            }
        }
    }

    /// Gives how many were dealt with.
    fn offer(&self, frames: &[Frame<'_>], lost: &mut dyn FnMut(DropReason)) -> usize {
        match &self.target {
            Target::Queue(queue, _) => queue.transmit(frames, lost),
            Target::Sink(sink) => {
                let refuses =
                    |frame: &Frame<'_>| matches!(sink.deliver(frame), Delivery::NotReady(_));
                frames.iter().position(refuses).unwrap_or(frames.len())
            }
        }
    }

    /// Copies a frame that has to wait.
    #[cold]
    fn store(self: &Rc<Self>, frame: &Frame<'_>, reason: DropReason) -> Result<(), DropReason> {
        let cost = self.waiting_cost.get() + frame.len() + STORED_COST;
        if cost > self.limit {
            return Err(reason);
        }
        self.waiting_cost.set(cost);
        let mut bytes = Vec::new();
        frame.append_to(&mut bytes, frame.len());
        let header = frame.header;
        self.waiting
            .borrow_mut()
            .push_back(Stored { header, bytes });
        if !self.is_draining.replace(true) {
            let task = executor::spawn(drain(Rc::clone(self)));
            self.task.replace(Some(task));
        }
        Ok(())
    }

    /// Gives what waits, a burst at most; false when the receiver takes no more now.
    fn give(&self) -> bool {
        for _ in 0..BURST {
            // Not held while the receiver works, which may close this outlet.
            let Some(stored) = self.waiting.borrow_mut().pop_front() else {
                break;
            };
            let frame = Frame::new(stored.header, &stored.bytes);
            if self.offer(&[frame], &mut |_| {}) == 0 {
                self.waiting.borrow_mut().push_front(stored);
                return false;
            }
            let cost = stored.bytes.len() + STORED_COST;
            self.waiting_cost
                .set(self.waiting_cost.get().saturating_sub(cost));
        }
        true
    }

    /// Takes no more; what waits is gone.
    pub(super) fn close(&self) {
        self.is_open.set(false);
        self.waiting.take();
        self.waiting_cost.set(0);
        if let Some(task) = self.task.take() {
            task.cancel();
        }
    }
}

/// Gives the receiver what waits until nothing does.
async fn drain(outlet: Rc<Outlet>) {
    while outlet.is_open.get() {
        let takes = outlet.give();
        outlet.flush();
        if outlet.waiting.borrow().is_empty() {
            break;
        }
        if takes {
            executor::time::yield_now().await;
            continue;
        }
        match &outlet.target {
            Target::Sink(sink) => sink.until_ready().await,
            Target::Queue(queue, _) => queue.writable().await,
        }
    }
    outlet.is_draining.set(false);
    outlet.task.take();
}
