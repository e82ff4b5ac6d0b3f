//! Frames on a byte stream: each after its length, four bytes in network order.
//!
//! ```text
//!   task:      Source::next ──> connection ──> lost ──> Source::next ...
//!   receive:   recv into `Input` ── whole frames ──> Sink::deliver     a frame that is refused stays where it is
//!   transmit:  sendmsg(burst) ── cut off in a frame ──> `Output` keeps its rest, a task sends that
//! ```
//!
//! A connection always begins with a length. So what is left of the frame that a lost connection was in the middle of is
//! forgotten, in both directions, and order is kept. While there is no connection, frames for the network are dropped.

#![expect(
    unsafe_code,
    reason = "guest memory goes to system calls as raw pieces"
)]

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use executor::JoinHandle;
use executor::net::{Stream, poll_fd};
use executor::sync::Notify;

use super::super::address::peer_of;
use super::{Source, Status};
use crate::frame::{Frame, MAX_FRAME, VnetHeader};
use crate::link::{BURST, Delivery, DropReason, LocalFuture, NetQueue, Offloads, Received, Sink};
use crate::netdevs::lease::Lease;
use crate::netdevs::vectors;

/// Bytes of a length.
const PREFIX: usize = 4;
/// Received bytes that are kept: several frames, and at least one of any length.
const INPUT_LEN: usize = 256 << 10;
const _: () = assert!(INPUT_LEN >= PREFIX + MAX_FRAME);

/// The queue.
pub(super) struct StreamQueue {
    state: Rc<State>,
    task: Cell<Option<JoinHandle<()>>>,
}

struct State {
    connection: RefCell<Option<Rc<Stream>>>,
    /// The connection came or went, or `output` was sent.
    changed: Notify,
    sink: RefCell<Option<Rc<dyn Sink>>>,
    input: RefCell<Input>,
    output: RefCell<Output>,
    status: Arc<Status>,
}

/// Bytes that came and were not delivered.
struct Input {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

/// What is sent.
#[derive(Default)]
struct Output {
    /// The rest of a frame that the connection was too full for.
    rest: Vec<u8>,
    sent: usize,
    pieces: Vec<libc::iovec>,
    flat: Vec<u8>,
}

/// What is next in the input.
enum Next<'a> {
    Frame(&'a [u8]),
    Incomplete,
    /// A length that no frame has.
    Wrong(u32),
}

impl Input {
    fn next(&self) -> Next<'_> {
        let there = &self.bytes[self.start..self.end];
        let Some((prefix, rest)) = there.split_first_chunk::<PREFIX>() else {
            return Next::Incomplete;
        };
        let len = u32::from_be_bytes(*prefix);
        match usize::try_from(len) {
            Ok(bytes) if bytes <= MAX_FRAME => {
                rest.get(..bytes).map_or(Next::Incomplete, Next::Frame)
            }
            _ => Next::Wrong(len),
        }
    }

    /// Where more bytes go; never empty after [`Next::Incomplete`].
    fn room(&mut self) -> &mut [u8] {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.bytes.len() - self.start < PREFIX + MAX_FRAME {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        &mut self.bytes[self.end..]
    }
}

impl State {
    /// Ends the connection, if there is one.
    fn lose(&self, why: &dyn std::fmt::Display) {
        let Some(connection) = self.connection.borrow_mut().take() else {
            return;
        };
        tracing::info!("the connection has ended: {why}");
        connection.shutdown();
        let mut input = self.input.borrow_mut();
        (input.start, input.end) = (0, 0);
        self.output.borrow_mut().rest.clear();
        self.status.connected.store(false, Ordering::Release);
        self.status.changed.notify_all();
        self.changed.notify_all();
    }

    fn connection(&self) -> Option<Rc<Stream>> {
        self.connection.borrow().clone()
    }

    /// Sends what is left of a frame. Whether nothing is left.
    fn send_rest(&self, connection: &Stream) -> io::Result<bool> {
        let output = &mut *self.output.borrow_mut();
        while output.sent < output.rest.len() {
            let piece = vectors::piece(&output.rest[output.sent..]);
            // SAFETY: a piece of our own.
            match unsafe { vectors::send(connection.as_fd(), &[piece]) } {
                Ok(sent) => output.sent += sent,
                Err(error) if vectors::would_block(&error) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        output.rest.clear();
        output.sent = 0;
        Ok(true)
    }

    /// Sends what is left of a frame as soon as the connection takes it.
    async fn send_rest_later(self: Rc<Self>) {
        while let Some(connection) = self.connection() {
            if self.output.borrow().rest.is_empty() {
                break;
            }
            // An error shows when sending.
            let _ = poll_fd(connection.as_fd(), libc::POLLOUT).await;
            let is_current = |current: &Rc<Stream>| Rc::ptr_eq(current, &connection);
            if !self.connection.borrow().as_ref().is_some_and(is_current) {
                break;
            }
            match self.send_rest(&connection) {
                Ok(true) => break,
                Ok(false) => {}
                Err(error) => self.lose(&error),
            }
        }
        self.changed.notify_all();
    }

    /// Sends a burst in one call. Gives how many frames are dealt with.
    fn send_burst(self: &Rc<Self>, connection: &Stream, frames: &[Frame<'_>]) -> io::Result<usize> {
        let output = &mut *self.output.borrow_mut();
        let mut prefixes = [[0; PREFIX]; BURST];
        output.pieces.clear();
        let mut count = 0;
        for (frame, prefix) in frames.iter().zip(&mut prefixes) {
            // A frame in very many pieces goes alone, put together.
            if count > 0 && output.pieces.len() + 2 + frame.tail().len() > vectors::MAX_PIECES {
                break;
            }
            *prefix = (frame.len() as u32).to_be_bytes();
            output.pieces.push(vectors::piece(prefix));
            vectors::append_frame(frame, &mut output.pieces, &mut output.flat);
            count += 1;
        }
        // SAFETY: the pieces are ours, or those of frames, which are readable while they are there.
        let mut sent = unsafe { vectors::send(connection.as_fd(), &output.pieces)? };
        for (index, frame) in frames[..count].iter().enumerate() {
            let len = PREFIX + frame.len();
            if sent >= len {
                sent -= len;
                continue;
            }
            if sent == 0 {
                return Ok(index);
            }
            output.rest.clear();
            output.rest.extend_from_slice(&prefixes[index]);
            frame.append_to(&mut output.rest, frame.len());
            output.sent = sent;
            executor::spawn(Rc::clone(self).send_rest_later());
            return Ok(index + 1);
        }
        Ok(count)
    }
}

impl StreamQueue {
    /// A queue whose connections `lease` gives. On the thread that it lives on.
    pub(super) fn new(lease: Lease<Source>, status: Arc<Status>) -> StreamQueue {
        let state = Rc::new(State {
            connection: RefCell::default(),
            changed: Notify::new(),
            sink: RefCell::default(),
            input: RefCell::new(Input {
                bytes: vec![0; INPUT_LEN].into(),
                start: 0,
                end: 0,
            }),
            output: RefCell::default(),
            status,
        });
        let task = executor::spawn(keep_connected(lease, Rc::clone(&state)));
        StreamQueue {
            state,
            task: Cell::new(Some(task)),
        }
    }
}

/// Takes one connection after the other.
async fn keep_connected(mut lease: Lease<Source>, state: Rc<State>) {
    let mut again = false;
    loop {
        let connection = match lease.next(again).await {
            Ok(connection) => connection,
            Err(error) => {
                tracing::warn!("no connection: {error}");
                return;
            }
        };
        again = true;
        let peer = peer_of(&connection);
        state.connection.replace(Some(Rc::new(connection)));
        state.status.connect(peer);
        state.changed.notify_all();
        loop {
            let changed = state.changed.notified();
            if state.connection.borrow().is_none() {
                break;
            }
            changed.await;
        }
    }
}

impl Drop for StreamQueue {
    fn drop(&mut self) {
        if let Some(task) = self.task.take() {
            task.cancel();
        }
        self.state.lose(&"its port is gone");
    }
}

impl NetQueue for StreamQueue {
    fn connect(&self, sink: Rc<dyn Sink>) {
        self.state.sink.replace(Some(sink));
    }

    fn disconnect(&self) {
        self.state.sink.replace(None);
    }

    fn transmit(&self, frames: &[Frame<'_>], dropped: &mut dyn FnMut(DropReason)) -> usize {
        let mut done = 0;
        while done < frames.len() {
            let Some(connection) = self.state.connection() else {
                frames[done..]
                    .iter()
                    .for_each(|_| dropped(DropReason::LinkDown));
                return frames.len();
            };
            let rest = &frames[done..];
            let burst = &rest[..rest.len().min(BURST)];
            let sent = match self.state.send_rest(&connection) {
                Ok(true) => self.state.send_burst(&connection, burst),
                Ok(false) => return done,
                Err(error) => Err(error),
            };
            match sent {
                Ok(sent) => done += sent,
                Err(error) if vectors::would_block(&error) => return done,
                Err(error) => self.state.lose(&error),
            }
        }
        done
    }

    fn writable(&self) -> LocalFuture<'_, ()> {
        Box::pin(async {
            loop {
                let changed = self.state.changed.notified();
                let Some(connection) = self.state.connection() else {
                    return;
                };
                if self.state.output.borrow().rest.is_empty() {
                    // An error shows when sending.
                    let _ = poll_fd(connection.as_fd(), libc::POLLOUT).await;
                    return;
                }
                changed.await;
            }
        })
    }

    fn receive(&self, budget: usize) -> io::Result<Received> {
        let state = &*self.state;
        let (Some(sink), Some(connection)) = (state.sink.borrow().clone(), state.connection())
        else {
            return Ok(Received::Drained);
        };
        let mut left = budget;
        let (end, lost) = loop {
            let mut input = state.input.borrow_mut();
            match input.next() {
                Next::Frame(_) if left == 0 => break (Received::More, None),
                Next::Frame(bytes) => {
                    let len = PREFIX + bytes.len();
                    let frame = Frame::new(VnetHeader::default(), bytes);
                    if let Delivery::NotReady(_) = sink.deliver(&frame) {
                        break (Received::NotReady, None);
                    }
                    input.start += len;
                    left -= 1;
                }
                Next::Wrong(len) => {
                    state.status.wrong_lengths.fetch_add(1, Ordering::Relaxed);
                    let what = format!("the peer announced a frame of {len} bytes");
                    break (Received::Drained, Some(io::Error::other(what)));
                }
                Next::Incomplete => match vectors::receive(connection.as_fd(), input.room()) {
                    Ok(0) => break (Received::Drained, Some(io::ErrorKind::UnexpectedEof.into())),
                    Ok(len) => input.end += len,
                    Err(error) if vectors::would_block(&error) => break (Received::Drained, None),
                    Err(error) => break (Received::Drained, Some(error)),
                },
            }
        };
        if let Some(error) = lost {
            state.lose(&error);
        }
        sink.flush();
        Ok(end)
    }

    fn readable(&self) -> LocalFuture<'_, ()> {
        Box::pin(async {
            loop {
                let changed = self.state.changed.notified();
                if let Some(connection) = self.state.connection() {
                    // An error shows when receiving.
                    let _ = poll_fd(connection.as_fd(), libc::POLLIN).await;
                    return;
                }
                changed.await;
            }
        })
    }

    fn set_guest_offloads(&self, _offloads: Offloads) -> io::Result<()> {
        Ok(())
    }
}
