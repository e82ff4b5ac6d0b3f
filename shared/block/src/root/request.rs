//! Requests of one thread.

use super::Shared;
use super::drain::Thread;
use crate::driver::{ByteRange, IoFuture, Limits, WriteFlags, ZeroFlags};
use crate::epoch::ThreadEpoch;
use crate::node::Node;
use crate::upkeep;
use executor::{Buffer, Errno};
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};

/// A root on one thread; `!Send`.
pub struct RootHandle {
    root: Arc<Shared>,
    thread: Rc<Thread>,
    epoch: ThreadEpoch,
    writes: bool,
    /// Each write is durable when it completes.
    through: bool,
    /// Requests gain by being announced: so it was when this handle was made.
    prefetches: bool,
}

impl Drop for RootHandle {
    fn drop(&mut self) {
        let (root, thread) = (Arc::clone(&self.root), Rc::clone(&self.thread));
        // A drain has to wait for what dropped requests left with the kernel.
        executor::after_abandoned(move || root.threads.detach(&thread));
    }
}

/// What a request asks for, kept while it waits for the end of a drain.
enum Request {
    Read(u64, Buffer),
    Write(u64, Buffer, WriteFlags),
    WriteZeroes(ByteRange, ZeroFlags),
    Discard(ByteRange),
    Flush,
    Upkeep,
}

impl RootHandle {
    pub(super) fn new(root: Arc<Shared>) -> Self {
        let permissions = root.permissions;
        let thread = root.threads.attach();
        Self {
            epoch: ThreadEpoch::current(),
            writes: permissions.write || permissions.write_unchanged,
            through: root.write_through.load(Ordering::Relaxed),
            // While paused, edges may change under us.
            prefetches: !thread.is_paused() && root.edge.node().driver().can_prefetch(),
            thread,
            root,
        }
    }

    /// Length of the node in bytes.
    pub fn length(&self) -> u64 {
        self.node().length()
    }
    /// What one request can take.
    pub fn limits(&self) -> Limits {
        self.node().driver().limits()
    }
    /// Whether each write is durable when it completes.
    pub fn writes_through(&self) -> bool {
        self.through
    }
    /// Comes in, as a request does, to ask the nodes below what no request tells.
    pub async fn visit(&self) -> Visit<'_> {
        poll_fn(|cx| match self.thread.is_paused() {
            true => {
                self.thread.wait_for_resume(cx.waker());
                Poll::Pending
            }
            false => Poll::Ready(()),
        })
        .await;
        self.thread.begin();
        Visit {
            parity: self.epoch.enter(),
            handle: self,
        }
    }
    /// Whether to call [`RootHandle::prefetch`].
    #[inline]
    pub fn can_prefetch(&self) -> bool {
        self.prefetches
    }
    /// Announces a read or write at `offset` that comes soon.
    #[inline]
    pub fn prefetch(&self, offset: u64) {
        // Paused means that edges may change; without an epoch, that cached tables may go.
        if !self.thread.is_paused() {
            let parity = self.epoch.enter();
            self.node().prefetch(offset);
            self.epoch.unpin(parity);
        }
    }
    /// Fills `buffer` from `offset`. `EINVAL` beyond the end.
    #[inline]
    pub fn read(&self, offset: u64, buffer: Buffer) -> RootFuture<'_> {
        if self.thread.is_paused() {
            return self.wait(Request::Read(offset, buffer));
        }
        self.start(|| self.issue_read(offset, buffer))
    }
    /// Writes `buffer` at `offset`. `EPERM` without write permission.
    #[inline]
    pub fn write(&self, offset: u64, buffer: Buffer, mut flags: WriteFlags) -> RootFuture<'_> {
        flags.fua |= self.through;
        if self.thread.is_paused() {
            return self.wait(Request::Write(offset, buffer, flags));
        }
        self.start(|| self.issue_write(offset, buffer, flags))
    }
    /// Makes `range` read as zeroes.
    pub fn write_zeroes(&self, range: ByteRange, mut flags: ZeroFlags) -> RootFuture<'_> {
        flags.fua |= self.through;
        self.start_or_wait(Request::WriteZeroes(range, flags))
    }
    /// Discards `range`.
    pub fn discard(&self, range: ByteRange) -> RootFuture<'_> {
        self.start_or_wait(Request::Discard(range))
    }
    /// Every request completed before this call is durable when it resolves.
    pub fn flush(&self) -> RootFuture<'_> {
        self.start_or_wait(Request::Flush)
    }
    /// Requests in flight on this thread.
    pub fn in_flight(&self) -> usize {
        self.thread.in_flight()
    }

    #[inline]
    fn node(&self) -> &Node {
        self.root.edge.node()
    }

    fn start_or_wait(&self, request: Request) -> RootFuture<'_> {
        if self.thread.is_paused() {
            return self.wait(request);
        }
        self.start(|| self.issue(request))
    }

    #[cold]
    fn wait(&self, request: Request) -> RootFuture<'_> {
        RootFuture {
            state: State::Waiting(Box::new(request)),
            handle: self,
        }
    }

    /// Begins a request under a pinned epoch; one that is not done at once is counted.
    #[inline]
    fn start<'a>(&'a self, issue: impl FnOnce() -> IoFuture<'a>) -> RootFuture<'a> {
        let parity = self.epoch.enter();
        let state = match issue() {
            IoFuture::Ready(result) => {
                self.epoch.unpin(parity);
                State::Ready(result)
            }
            future => {
                self.thread.begin();
                State::InFlight { future, parity }
            }
        };
        RootFuture {
            state,
            handle: self,
        }
    }

    /// Begins upkeep as a request of its own, beside those of this thread.
    #[cold]
    fn begin_upkeep(&self) {
        let root = Arc::clone(&self.root);
        drop(executor::spawn(async move {
            let handle = RootHandle::new(root);
            let done = handle.start_or_wait(Request::Upkeep).await;
            debug_assert_eq!(done, Ok(()), "failures stay with the drivers");
        }));
    }

    fn issue(&self, request: Request) -> IoFuture<'_> {
        match request {
            Request::Read(offset, buffer) => self.issue_read(offset, buffer),
            Request::Write(offset, buffer, flags) => self.issue_write(offset, buffer, flags),
            Request::WriteZeroes(range, flags) => match self.check_write(range) {
                Ok(()) => self.node().write_zeroes(range, flags),
                Err(errno) => IoFuture::error(errno),
            },
            Request::Discard(range) => match self.check_write(range) {
                Ok(()) => self.node().discard(range),
                Err(errno) => IoFuture::error(errno),
            },
            Request::Flush => self.node().flush(),
            Request::Upkeep => IoFuture::boxed(async {
                self.node().upkeep().await;
                Ok(())
            }),
        }
    }

    #[inline]
    fn issue_read(&self, offset: u64, buffer: Buffer) -> IoFuture<'_> {
        match self.check(ByteRange::new(offset, buffer.len() as u64)) {
            Ok(()) => self.node().read_within(offset, buffer),
            Err(errno) => IoFuture::error(errno),
        }
    }

    #[inline]
    fn issue_write(&self, offset: u64, buffer: Buffer, flags: WriteFlags) -> IoFuture<'_> {
        match self.check_write(ByteRange::new(offset, buffer.len() as u64)) {
            Ok(()) => self.node().write(offset, buffer, flags),
            Err(errno) => IoFuture::error(errno),
        }
    }

    #[inline]
    fn check(&self, range: ByteRange) -> Result<(), Errno> {
        match range.checked_end() {
            Some(end) if end <= self.length() => Ok(()),
            _ => Err(Errno::EINVAL),
        }
    }

    #[inline]
    fn check_write(&self, range: ByteRange) -> Result<(), Errno> {
        if !self.writes {
            return Err(Errno::EPERM);
        }
        self.check(range)
    }
}

/// A stay in the graph, counted as a request: no edge below the root changes, and no drain ends.
pub struct Visit<'a> {
    handle: &'a RootHandle,
    parity: usize,
}

impl Visit<'_> {
    /// The root's node.
    pub fn node(&self) -> &Node {
        self.handle.node()
    }
}

impl Drop for Visit<'_> {
    fn drop(&mut self) {
        let (thread, epoch) = (Rc::clone(&self.handle.thread), self.handle.epoch.clone());
        let parity = self.parity;
        executor::after_abandoned(move || finish(&thread, &epoch, parity));
    }
}

/// Ends a request that was counted.
fn finish(thread: &Thread, epoch: &ThreadEpoch, parity: usize) {
    epoch.unpin(parity);
    thread.end();
}

/// A request in flight: its node future plus the counts it holds until it ends.
#[must_use = "a request runs only while it is polled"]
pub struct RootFuture<'a> {
    state: State<'a>,
    handle: &'a RootHandle,
}

enum State<'a> {
    Ready(Result<(), Errno>),
    InFlight { future: IoFuture<'a>, parity: usize },
    Waiting(Box<Request>),
}

impl RootFuture<'_> {
    /// The result, when the request is done already (a caller may save itself a task).
    pub fn ready(&self) -> Option<Result<(), Errno>> {
        match &self.state {
            State::Ready(result) => Some(*result),
            _ => None,
        }
    }
}

impl Future for RootFuture<'_> {
    type Output = Result<(), Errno>;
    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        loop {
            match &mut this.state {
                State::Ready(result) => return Poll::Ready(*result),
                State::InFlight { future, parity } => {
                    let polled = Pin::new(future).poll(cx);
                    if upkeep::take_wanted() {
                        this.handle.begin_upkeep();
                    }
                    let Poll::Ready(result) = polled else {
                        return Poll::Pending;
                    };
                    let parity = *parity;
                    this.state = State::Ready(result);
                    finish(&this.handle.thread, &this.handle.epoch, parity);
                    return Poll::Ready(result);
                }
                State::Waiting(request) => {
                    if this.handle.thread.is_paused() {
                        this.handle.thread.wait_for_resume(cx.waker());
                        return Poll::Pending;
                    }
                    let request = std::mem::replace(&mut **request, Request::Flush);
                    this.state = this
                        .handle
                        .start(|| this.handle.issue(request))
                        .into_state();
                }
            }
        }
    }
}

impl<'a> RootFuture<'a> {
    fn into_state(mut self) -> State<'a> {
        std::mem::replace(&mut self.state, State::Ready(Ok(())))
    }
}

impl Drop for RootFuture<'_> {
    fn drop(&mut self) {
        if let State::InFlight { parity, .. } = self.state {
            // The kernel may still be at work on operations of the dropped future. Until it is
            // done the request counts, and keeps freed clusters from being used again.
            self.state = State::Ready(Err(Errno::ECANCELED));
            let (thread, epoch) = (Rc::clone(&self.handle.thread), self.handle.epoch.clone());
            executor::after_abandoned(move || finish(&thread, &epoch, parity));
        }
    }
}
