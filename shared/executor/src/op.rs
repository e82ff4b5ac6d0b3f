//! Operations in flight: slots that own what the kernel works on until it has answered.
//!
//! ```text
//!   begin ──> Waiting ── completion ──> Done ── polled ──> free
//!               │  └─ short transfer: begun again for the rest
//!               └─ future dropped ──> Dropped ── completion ──> free
//! ```
//!
//! Promises: buffers, iovecs, messages and descriptors stay alive until the completion, whatever
//! happens to the future; waits for sockets are cancelled when their future is dropped, writes
//! never. A slot keeps its iovec list, so that a warm executor allocates nothing per operation.

#![expect(
    unsafe_code,
    reason = "the slots keep the kernel's side of the bargain that submission entries are"
)]

use crate::file::{Allocation, Transfer};
use crate::net::{Gather, Message, Socket, SocketAddress};
use crate::ring::Reason;
use crate::runtime::{Backend, Inner, current, with_current};
use crate::{Errno, File};
use io_uring::squeue::Entry;
use io_uring::{opcode, types};
use std::mem;
use std::os::fd::RawFd;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

/// Times that an operation is begun again after EINTR or EAGAIN without progress in between.
const RETRY_LIMIT: u8 = 100;

/// What the kernel (or the simulated disk) is asked to do, and all that it needs meanwhile.
pub(crate) enum Op {
    /// The slot is free.
    Free,
    Transfer(Transfer),
    Sync(File),
    Allocate(Allocation),
    SetLen(File, u64),
    Poll(RawFd, u32),
    Accept(Socket),
    Connect(Socket, Box<SocketAddress>),
    Recv(Socket, Vec<u8>),
    /// With the number of bytes already sent.
    Send(Socket, Vec<u8>, usize),
    RecvMessage(Box<Message>),
    SendMessage(Box<Message>),
    /// Receives until it is full.
    Fill(Box<Gather>),
    /// Sends all of it.
    SendGather(Box<Gather>),
}

impl Op {
    /// The submission entry; `iovecs` outlives the operation.
    fn entry(&mut self, iovecs: &mut Vec<libc::iovec>) -> Entry {
        match self {
            Op::Free => unreachable!("a free slot is never submitted"),
            Op::Transfer(transfer) => transfer.entry(iovecs),
            Op::Sync(file) => opcode::Fsync::new(types::Fd(file.raw_fd()))
                .flags(types::FsyncFlags::DATASYNC)
                .build(),
            Op::Allocate(allocation) => allocation.entry(),
            Op::SetLen(file, len) => opcode::Ftruncate::new(types::Fd(file.raw_fd()), *len).build(),
            Op::Poll(fd, events) => opcode::PollAdd::new(types::Fd(*fd), *events).build(),
            Op::Accept(socket) => {
                let (no_address, no_len) = (std::ptr::null_mut(), std::ptr::null_mut());
                opcode::Accept::new(socket.fd(), no_address, no_len)
                    .flags(libc::SOCK_CLOEXEC)
                    .build()
            }
            Op::Connect(socket, address) => {
                opcode::Connect::new(socket.fd(), address.as_ptr(), address.len()).build()
            }
            Op::Recv(socket, data) => {
                let room = data.spare_capacity_mut();
                opcode::Recv::new(socket.fd(), room.as_mut_ptr().cast(), room.len() as u32).build()
            }
            Op::Send(socket, data, done) => {
                let rest = &data[*done..];
                let len = u32::try_from(rest.len()).unwrap_or(u32::MAX);
                opcode::Send::new(socket.fd(), rest.as_ptr(), len)
                    .flags(libc::MSG_NOSIGNAL)
                    .build()
            }
            Op::RecvMessage(message) => opcode::RecvMsg::new(message.socket.fd(), message.header())
                .flags(libc::MSG_CMSG_CLOEXEC as u32)
                .build(),
            Op::SendMessage(message) => opcode::SendMsg::new(message.socket.fd(), message.header())
                .flags(libc::MSG_NOSIGNAL as u32)
                .build(),
            Op::Fill(gather) => opcode::RecvMsg::new(gather.socket.fd(), gather.header())
                .flags(libc::MSG_WAITALL as u32)
                .build(),
            Op::SendGather(gather) => opcode::SendMsg::new(gather.socket.fd(), gather.header())
                .flags((libc::MSG_NOSIGNAL | libc::MSG_WAITALL) as u32)
                .build(),
        }
    }

    /// Takes in a result: the final one, or `None` when the operation is to be begun again.
    fn advance(&mut self, result: i32) -> Option<i32> {
        match self {
            Op::Transfer(transfer) => transfer.advance(result),
            Op::Send(_, data, done) if result > 0 => {
                *done += result as usize;
                (*done == data.len()).then_some(0)
            }
            Op::Fill(gather) | Op::SendGather(gather) => gather.advance(result),
            // A kernel before 6.9 does not know the operation.
            Op::SetLen(file, len) if result == -libc::EINVAL => Some(
                file.set_len_now(*len)
                    .map_or_else(|errno| -(errno as i32), |()| 0),
            ),
            _ => Some(result),
        }
    }

    /// Whether a dropped future ends the operation: one that waits for a peer.
    fn waits_for_peer(&self) -> bool {
        matches!(
            self,
            Op::Poll(..)
                | Op::Accept(_)
                | Op::Connect(..)
                | Op::Recv(..)
                | Op::RecvMessage(_)
                | Op::Fill(_)
        )
    }

    /// Whether the operation may wait without end.
    fn is_endless(&self) -> bool {
        self.waits_for_peer()
            || matches!(self, Op::Send(..) | Op::SendMessage(_) | Op::SendGather(_))
    }

    /// Closes descriptors that came with a result which nobody takes.
    fn discard(self, result: i32) {
        match self {
            Op::Accept(_) => drop(Socket::accepted(result)),
            Op::RecvMessage(mut message) => drop(message.take_fds()),
            _ => {}
        }
    }
}

enum State {
    /// Free; the next free slot.
    Free(u32),
    /// In flight; whom to wake.
    Waiting(Option<Waker>),
    /// In flight, and nobody waits.
    Dropped,
    /// Finished with this result.
    Done(i32),
}

struct Slot {
    state: State,
    op: Op,
    iovecs: Vec<libc::iovec>,
    retries: u8,
}

/// The end of the free list.
const NO_SLOT: u32 = u32::MAX;

/// The slots of one executor.
pub(crate) struct OpTable {
    slots: Vec<Slot>,
    free: u32,
    used: usize,
    /// Operations in flight that end by themselves: those on files.
    working: usize,
    /// Those of them whose future was dropped.
    abandoned: usize,
    /// Called when there are none of these any more.
    after_abandoned: Vec<Box<dyn FnOnce()>>,
}

impl Default for OpTable {
    fn default() -> Self {
        OpTable {
            slots: Vec::new(),
            free: NO_SLOT,
            used: 0,
            working: 0,
            abandoned: 0,
            after_abandoned: Vec::new(),
        }
    }
}

impl OpTable {
    fn insert(&mut self, op: Op) -> u32 {
        self.used += 1;
        self.working += usize::from(!op.is_endless());
        let index = self.free;
        let Some(slot) = self.slots.get_mut(index as usize) else {
            let index = u32::try_from(self.slots.len()).expect("operations fit a u32");
            assert!(index < NO_SLOT, "too many operations in flight");
            self.slots.push(Slot {
                state: State::Waiting(None),
                op,
                iovecs: Vec::new(),
                retries: 0,
            });
            return index;
        };
        let State::Free(next) = mem::replace(&mut slot.state, State::Waiting(None)) else {
            unreachable!("the free list holds free slots");
        };
        slot.op = op;
        slot.retries = 0;
        self.free = next;
        index
    }

    /// Operations on files in flight.
    pub(crate) fn working(&self) -> usize {
        self.working
    }

    /// Frees a slot; what it owned.
    fn remove(&mut self, index: u32) -> Op {
        let slot = &mut self.slots[index as usize];
        slot.state = State::Free(self.free);
        self.free = index;
        self.used -= 1;
        mem::replace(&mut slot.op, Op::Free)
    }
}

/// What a completion asks for once the table is no longer borrowed.
enum After {
    Nothing,
    Wake(Waker),
    Again,
    Discard(Op, i32),
}

impl Inner {
    /// Hands the operation in `slot` to the ring or the simulated disk.
    fn submit_slot(&self, index: u32) {
        let mut ops = self.ops.borrow_mut();
        let slot = &mut ops.slots[index as usize];
        match &self.backend {
            Backend::Ring(ring) => {
                let entry = slot.op.entry(&mut slot.iovecs).user_data(u64::from(index));
                // SAFETY: the slot owns the operation's buffer, message, address and iovecs, none
                // of which moves when the table grows, until `complete` takes in the result; an
                // executor that goes away waits for that (`settle`).
                unsafe { ring.borrow_mut().push(entry) };
            }
            Backend::Sim(disk) => disk.submit(index, &slot.op),
        }
    }

    /// Takes in a completion.
    pub(crate) fn complete(&self, index: u32, result: i32) {
        match self.settle_slot(index, result) {
            After::Nothing => {}
            After::Wake(waker) => waker.wake(),
            After::Again => self.submit_slot(index),
            After::Discard(op, result) => {
                op.discard(result);
                self.call_after_abandoned();
            }
        }
    }

    fn call_after_abandoned(&self) {
        let callbacks = {
            let mut ops = self.ops.borrow_mut();
            match ops.abandoned {
                0 => mem::take(&mut ops.after_abandoned),
                _ => return,
            }
        };
        for callback in callbacks {
            callback();
        }
    }

    fn settle_slot(&self, index: u32, result: i32) -> After {
        let mut ops = self.ops.borrow_mut();
        let slot = &mut ops.slots[index as usize];
        if result == -libc::EINTR || result == -libc::EAGAIN {
            slot.retries += 1;
            let wanted = !(matches!(slot.state, State::Dropped) && slot.op.is_endless());
            if wanted && slot.retries < RETRY_LIMIT {
                return After::Again;
            }
        }
        let Some(result) = slot.op.advance(result) else {
            slot.retries = 0;
            return After::Again;
        };
        let working = usize::from(!slot.op.is_endless());
        let before = mem::replace(&mut slot.state, State::Done(result));
        ops.working -= working;
        match before {
            State::Waiting(waker) => waker.map_or(After::Nothing, After::Wake),
            State::Dropped => {
                ops.abandoned -= working;
                After::Discard(ops.remove(index), result)
            }
            State::Free(_) | State::Done(_) => unreachable!("one completion per operation"),
        }
    }

    /// Cancels what may wait without end and waits for the rest, so that the kernel uses nothing
    /// of this executor any more.
    pub(crate) fn settle(&self) {
        let ring = match &self.backend {
            Backend::Ring(ring) => ring,
            Backend::Sim(disk) => {
                while self.has_in_flight() {
                    self.exchange();
                }
                return disk.detach();
            }
        };
        for (index, slot) in self.ops.borrow().slots.iter().enumerate() {
            let in_flight = matches!(slot.state, State::Waiting(_) | State::Dropped);
            if in_flight && slot.op.is_endless() {
                ring.borrow_mut().cancel(index as u64);
            }
        }
        while self.has_in_flight() {
            let wait = ring.borrow_mut().wait(None, Reason::Files);
            wait.expect("waiting on an open ring");
            self.reap();
        }
        let closed = ring.borrow_mut().close();
        closed.expect("closing an open ring");
    }

    fn has_in_flight(&self) -> bool {
        let ops = self.ops.borrow();
        let in_flight = |slot: &Slot| matches!(slot.state, State::Waiting(_) | State::Dropped);
        ops.used > 0 && ops.slots.iter().any(in_flight)
    }
}

/// Calls `callback` on this thread when no operation on a file is in flight whose future was
/// dropped: at once when there is none, or no executor. What such operations still write to must
/// not be used for anything else before.
pub fn after_abandoned(callback: impl FnOnce() + 'static) {
    with_current(|executor| match executor {
        Some(executor) => {
            let mut ops = executor.ops.borrow_mut();
            ops.after_abandoned.push(Box::new(callback));
            drop(ops);
            executor.call_after_abandoned();
        }
        None => callback(),
    });
}

/// Work for a request whose future was dropped, done by others on this thread: it counts among the
/// abandoned operations ([`after_abandoned`]) while this lives.
pub struct Unfinished {
    executor: Rc<Inner>,
}

/// Counts work that goes on though its caller went away; `None` outside of an executor.
pub fn unfinished() -> Option<Unfinished> {
    let executor = with_current(|executor| executor.map(Rc::clone))?;
    executor.ops.borrow_mut().abandoned += 1;
    Some(Unfinished { executor })
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        self.executor.ops.borrow_mut().abandoned -= 1;
        self.executor.call_after_abandoned();
    }
}

/// An operation in flight. Dropping it leaves the slot to the kernel.
pub(crate) struct InFlight {
    executor: Rc<Inner>,
    slot: u32,
}

impl InFlight {
    /// Begins `op` on the current executor.
    pub(crate) fn begin(op: Op) -> InFlight {
        let executor = current();
        let slot = executor.ops.borrow_mut().insert(op);
        executor.submit_slot(slot);
        InFlight { executor, slot }
    }

    /// The result (negative: an errno) and what the operation owned.
    pub(crate) fn poll(&mut self, context: &mut Context<'_>) -> Poll<(i32, Op)> {
        assert_ne!(
            self.slot, NO_SLOT,
            "an operation is polled after it finished"
        );
        let mut ops = self.executor.ops.borrow_mut();
        let state = &mut ops.slots[self.slot as usize].state;
        match state {
            State::Done(result) => {
                let result = *result;
                let op = ops.remove(self.slot);
                self.slot = NO_SLOT;
                Poll::Ready((result, op))
            }
            State::Waiting(waker) => {
                match waker {
                    Some(waker) => waker.clone_from(context.waker()),
                    None => *waker = Some(context.waker().clone()),
                }
                Poll::Pending
            }
            State::Free(_) | State::Dropped => unreachable!("the slot belongs to this future"),
        }
    }

    /// Waits for the result.
    pub(crate) async fn finish(mut self) -> Result<(u32, Op), Errno> {
        let (result, op) = std::future::poll_fn(|context| self.poll(context)).await;
        match u32::try_from(result) {
            Ok(value) => Ok((value, op)),
            Err(_) => Err(Errno::from_raw(-result)),
        }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if self.slot == NO_SLOT {
            return;
        }
        let mut ops = self.executor.ops.borrow_mut();
        let slot = &mut ops.slots[self.slot as usize];
        if let State::Done(result) = slot.state {
            let op = ops.remove(self.slot);
            drop(ops);
            op.discard(result);
            return;
        }
        let waker = mem::replace(&mut slot.state, State::Dropped);
        let cancel = slot.op.waits_for_peer();
        let works = usize::from(!slot.op.is_endless());
        ops.abandoned += works;
        drop(ops);
        drop(waker);
        if let (true, Backend::Ring(ring)) = (cancel, &self.executor.backend) {
            ring.borrow_mut().cancel(u64::from(self.slot));
        }
    }
}
