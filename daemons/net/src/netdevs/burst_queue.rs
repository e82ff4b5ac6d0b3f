//! A queue on a socket where each message is a frame: what packet sockets and datagram sockets have in common.
//!
//! ```text
//!   receive:   recvmmsg ──> Inbox ── needs work? ── no ───────────────────────> Sink::deliver
//!                                       └─ yes ──> offload::finish ──> `late` ──> Sink::deliver
//!   transmit:  sendmmsg(burst) ── an error is the first frame's: wait, drop it, or try again ──> next burst
//! ```

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::rc::Rc;

use executor::net::poll_fd;

use super::datagrams::{Inbox, Outbox, Shape};
use super::vectors;
use crate::frame::{Frame, VnetHeader};
use crate::link::{BURST, Delivery, DropReason, LocalFuture, NetQueue, Offloads, Received, Sink};
use crate::offload;

/// What an error of sending means for the first frame.
pub(super) enum SendError {
    /// There is no room now.
    Wait,
    /// It goes nowhere.
    Drop(DropReason),
    /// What was wrong is right now.
    Again,
}

/// A socket.
pub(super) trait Endpoint {
    /// The socket.
    fn fd(&self) -> BorrowedFd<'_>;

    /// What is before a frame.
    fn shape(&self) -> Shape;

    /// A guest has come, or gone.
    ///
    /// # Errors
    /// The host's: the queue cannot be used.
    fn set_in_use(&self, in_use: bool) -> io::Result<()>;

    /// What to do about an error of receiving: `Ok` to go on.
    ///
    /// # Errors
    /// The queue receives nothing more.
    fn receive_error(&self, error: io::Error) -> io::Result<()>;

    /// What to do about an error of sending.
    fn send_error(&self, error: &io::Error) -> SendError;
}

/// The queue.
pub(super) struct BurstQueue<E> {
    endpoint: E,
    sink: RefCell<Option<Rc<dyn Sink>>>,
    input: RefCell<Input>,
    output: RefCell<Outbox>,
    failure: RefCell<Option<io::Error>>,
}

struct Input {
    inbox: Inbox,
    scratch: offload::Scratch,
    /// Frames that were made of one that needed work, and not delivered.
    late: VecDeque<(VnetHeader, Vec<u8>)>,
}

impl<E: Endpoint> BurstQueue<E> {
    pub(super) fn new(endpoint: E) -> BurstQueue<E> {
        let shape = endpoint.shape();
        BurstQueue {
            endpoint,
            sink: RefCell::default(),
            input: RefCell::new(Input {
                inbox: Inbox::new(shape),
                scratch: offload::Scratch::default(),
                late: VecDeque::new(),
            }),
            output: RefCell::default(),
            failure: RefCell::default(),
        }
    }

    /// Receives into the inbox. Whether there is anything to wait for.
    fn fill(&self, inbox: &mut Inbox) -> io::Result<bool> {
        match inbox.fill(self.endpoint.fd()) {
            Ok(()) => Ok(false),
            Err(error) if vectors::would_block(&error) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(false),
            Err(error) => self.endpoint.receive_error(error).map(|()| false),
        }
    }
}

impl Input {
    /// Gives the sink the oldest frame. Whether it was taken or dropped.
    fn deliver(&mut self, sink: &dyn Sink) -> bool {
        let taken = |frame: &Frame<'_>| !matches!(sink.deliver(frame), Delivery::NotReady(_));
        if let Some((header, bytes)) = self.late.front() {
            let taken = taken(&Frame::new(*header, bytes));
            if taken {
                self.late.pop_front();
            }
            return taken;
        }
        let Some(frame) = self.inbox.front() else {
            return true;
        };
        let offloads = sink.offloads();
        if !offload::has_work(frame.header) {
            // What the host found of the checksum is for guests that ask.
            let header = if offloads.csum {
                frame.header
            } else {
                VnetHeader::default()
            };
            let taken = taken(&frame.with_header(header));
            if taken {
                self.inbox.pop();
            }
            return taken;
        }
        if !sink.ready() {
            return false;
        }
        // From here on the frame is ours: what the sink does not take now is kept.
        let late = &mut self.late;
        let finished = offload::finish(&frame, offloads, &mut self.scratch, &mut |frame| {
            if !late.is_empty() || !taken(frame) {
                let mut bytes = Vec::new();
                frame.append_to(&mut bytes, frame.len());
                late.push_back((frame.header, bytes));
            }
        });
        if let Err(reason) = finished {
            tracing::debug!(
                ?reason,
                "the network sent a frame that is not what its header says"
            );
        }
        self.inbox.pop();
        self.late.is_empty()
    }

    fn is_empty(&self) -> bool {
        self.late.is_empty() && self.inbox.front().is_none()
    }
}

impl<E: Endpoint> NetQueue for BurstQueue<E> {
    fn connect(&self, sink: Rc<dyn Sink>) {
        self.failure.replace(self.endpoint.set_in_use(true).err());
        self.sink.replace(Some(sink));
    }

    fn disconnect(&self) {
        self.sink.replace(None);
        let mut input = self.input.borrow_mut();
        input.inbox.clear();
        input.late.clear();
        if let Err(error) = self.endpoint.set_in_use(false) {
            tracing::debug!(%error, "cannot put a queue to rest");
        }
    }

    fn transmit(&self, frames: &[Frame<'_>], dropped: &mut dyn FnMut(DropReason)) -> usize {
        let mut output = self.output.borrow_mut();
        let mut done = 0;
        while done < frames.len() {
            let rest = &frames[done..];
            let burst = &rest[..rest.len().min(BURST)];
            match output.send(self.endpoint.fd(), self.endpoint.shape(), burst) {
                Ok(sent) => done += sent,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => match self.endpoint.send_error(&error) {
                    SendError::Wait => return done,
                    SendError::Again => {}
                    SendError::Drop(reason) => {
                        dropped(reason);
                        done += 1;
                    }
                },
            }
        }
        done
    }

    fn writable(&self) -> LocalFuture<'_, ()> {
        Box::pin(async {
            // An error shows when sending.
            let _ = poll_fd(self.endpoint.fd(), libc::POLLOUT).await;
        })
    }

    fn receive(&self, budget: usize) -> io::Result<Received> {
        if let Some(error) = self.failure.take() {
            return Err(error);
        }
        let Some(sink) = self.sink.borrow().clone() else {
            return Ok(Received::Drained);
        };
        let input = &mut *self.input.borrow_mut();
        let mut end = Ok(Received::More);
        for _ in 0..budget {
            if input.is_empty() {
                match self.fill(&mut input.inbox) {
                    Ok(false) => {}
                    Ok(true) => {
                        end = Ok(Received::Drained);
                        break;
                    }
                    Err(error) => {
                        end = Err(error);
                        break;
                    }
                }
            }
            if !input.deliver(&*sink) {
                end = Ok(Received::NotReady);
                break;
            }
        }
        sink.flush();
        end
    }

    fn readable(&self) -> LocalFuture<'_, ()> {
        Box::pin(async {
            // An error shows when receiving.
            let _ = poll_fd(self.endpoint.fd(), libc::POLLIN).await;
        })
    }

    fn set_guest_offloads(&self, _offloads: Offloads) -> io::Result<()> {
        Ok(())
    }
}
