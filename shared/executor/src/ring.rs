//! The io_uring of one executor: set-up with fallbacks, batched submission, waiting, reaping.
//!
//! Promises: entries reach the kernel in the order of [`Ring::push`], however many there are; a
//! full completion queue loses nothing (the kernel keeps the rest until it is asked again); the
//! ring's eventfd is always being read, so that writing it ends a wait.
//!
//! Must not know: what operations mean. Whoever pushes an entry keeps what it points to.
#![expect(
    unsafe_code,
    reason = "submission entries carry raw pointers to the kernel"
)]

use io_uring::squeue::Entry;
use io_uring::{EnterFlags, IoUring, opcode, types};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::time::Duration;

/// User data of the read of the eventfd.
const WAKE: u64 = u64::MAX;
/// User data of cancel requests, whose own result nobody needs.
pub(crate) const CANCEL: u64 = u64::MAX - 1;
/// Completion entries per submission entry.
const COMPLETION_FACTOR: u32 = 4;

/// Files that a ring can hold open.
const HELD_FILES: u32 = 512;

/// A finished operation: its user data and result.
pub(crate) type Completion = (u32, i32);

/// What a thread waits for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reason {
    /// Operations on files: the kernel counts the processor as waiting for I/O.
    Files,
    /// Peers, timers and other threads: the processor is idle (kernels before 6.15 count this as
    /// waiting for I/O, too).
    Events,
}

/// A ring and what it has not accepted yet.
pub(crate) struct Ring {
    ring: IoUring,
    /// Entries that found the submission queue full.
    backlog: VecDeque<Entry>,
    /// Where the kernel puts the eventfd's counter.
    wake_value: Box<u64>,
    wake_fd: RawFd,
    /// Free places of the file table; `None` before there is one.
    free_places: Option<Vec<u32>>,
}

impl Ring {
    /// A ring of `entries` submission entries that wakes up when `eventfd` is written.
    pub(crate) fn new(entries: u32, eventfd: BorrowedFd<'_>) -> io::Result<Ring> {
        let mut ring = Ring {
            ring: set_up(entries)?,
            backlog: VecDeque::new(),
            wake_value: Box::new(0),
            wake_fd: eventfd.as_raw_fd(),
            free_places: None,
        };
        ring.arm_wake();
        ring.submit()?;
        Ok(ring)
    }

    /// Makes the kernel write `eventfd` when something has finished.
    pub(crate) fn notify(&self, eventfd: BorrowedFd<'_>) -> io::Result<()> {
        self.ring.submitter().register_eventfd(eventfd.as_raw_fd())
    }

    /// Keeps `fd`'s file open until [`Ring::let_go`] of the place returned, or the kernel frees the ring.
    pub(crate) fn hold(&mut self, fd: RawFd) -> io::Result<u32> {
        let submitter = self.ring.submitter();
        let places = match &mut self.free_places {
            Some(places) => places,
            none => {
                submitter.register_files_sparse(HELD_FILES)?;
                none.insert((0..HELD_FILES).rev().collect())
            }
        };
        let full = || io::Error::other("the ring's file table is full");
        let place = *places.last().ok_or_else(full)?;
        submitter.register_files_update(place, &[fd])?;
        places.pop();
        Ok(place)
    }

    /// Ends what [`Ring::hold`] began.
    pub(crate) fn let_go(&mut self, place: u32) {
        let removed = self.ring.submitter().register_files_update(place, &[-1]);
        // A place that cannot be emptied stays taken, and its file open until the ring goes.
        if let (Ok(_), Some(places)) = (removed, &mut self.free_places) {
            places.push(place);
        }
    }

    /// Queues an entry for the next [`Ring::submit`] or [`Ring::wait`].
    ///
    /// # Safety
    /// The memory that the entry points to must stay valid, and unused by others as the operation
    /// requires, until its completion has been reaped.
    pub(crate) unsafe fn push(&mut self, entry: Entry) {
        if !self.backlog.is_empty() || !self.try_push(&entry) {
            self.backlog.push_back(entry);
        }
    }

    /// Gives an entry that came through [`Ring::push`] to the submission queue, if it has room.
    fn try_push(&mut self, entry: &Entry) -> bool {
        // SAFETY: whoever called `push` keeps what the entry points to.
        unsafe { self.ring.submission().push(entry).is_ok() }
    }

    fn refill(&mut self) {
        while let Some(entry) = self.backlog.pop_front() {
            if !self.try_push(&entry) {
                self.backlog.push_front(entry);
                return;
            }
        }
    }

    /// Whether there is something to reap, or something for [`Ring::submit`] to do.
    pub(crate) fn has_work(&mut self) -> bool {
        let queue = self.ring.submission();
        let kernel = queue.taskrun() || queue.cq_overflow();
        drop(queue);
        kernel || !self.ring.completion().is_empty()
    }

    /// Gives everything queued to the kernel and lets it post what has finished; no syscall when
    /// there is nothing of both.
    pub(crate) fn submit(&mut self) -> io::Result<()> {
        loop {
            self.refill();
            let queue = self.ring.submission();
            let (queued, kernel) = (queue.len(), queue.taskrun() || queue.cq_overflow());
            drop(queue);
            if queued == 0 && !kernel {
                return Ok(());
            }
            let flags = EnterFlags::GETEVENTS.bits();
            let submitter = self.ring.submitter();
            // SAFETY: no argument is passed; the entries are valid (see `push`).
            let result =
                unsafe { submitter.enter::<libc::sigset_t>(queued as u32, 0, flags, None) };
            if retry_later(result)? || self.backlog.is_empty() {
                return Ok(());
            }
        }
    }

    /// Submits, then waits until something has finished or `timeout` has passed.
    pub(crate) fn wait(&mut self, timeout: Option<Duration>, reason: Reason) -> io::Result<()> {
        if !self.backlog.is_empty() {
            self.submit()?;
        }
        let queued = self.ring.submission().len() as u32;
        let mut flags = EnterFlags::GETEVENTS | EnterFlags::EXT_ARG;
        if reason == Reason::Events && self.ring.params().is_feature_no_iowait() {
            flags |= EnterFlags::NO_IOWAIT;
        }
        let time = timeout.map(types::Timespec::from);
        let mut arguments = types::SubmitArgs::new();
        if let Some(time) = &time {
            arguments = arguments.timespec(time);
        }
        let submitter = self.ring.submitter();
        // SAFETY: `arguments` is what EXT_ARG announces, and it and the time that it points to
        // live until the call returns; the entries are valid (see `push`).
        let result = unsafe { submitter.enter(queued, 1, flags.bits(), Some(&arguments)) };
        retry_later(result).map(drop)
    }

    /// Moves what has finished to `completions`.
    pub(crate) fn reap(&mut self, completions: &mut Vec<Completion>) {
        let mut woken = false;
        for entry in self.ring.completion() {
            match entry.user_data() {
                WAKE => woken = true,
                CANCEL => {}
                slot => completions.push((slot as u32, entry.result())),
            }
        }
        if woken {
            self.arm_wake();
        }
    }

    fn arm_wake(&mut self) {
        let value: *mut u64 = &raw mut *self.wake_value;
        let fd = types::Fd(self.wake_fd);
        let read = opcode::Read::new(fd, value.cast(), size_of::<u64>() as u32).build();
        // SAFETY: `wake_value` is boxed and nobody looks at it; `close` ends the read before the
        // ring and its box are dropped.
        unsafe { self.push(read.user_data(WAKE)) };
    }

    /// Asks the kernel to give up the operation of `user_data`.
    pub(crate) fn cancel(&mut self, user_data: u64) {
        let entry = opcode::AsyncCancel::new(user_data).build();
        // SAFETY: the entry points to nothing.
        unsafe { self.push(entry.user_data(CANCEL)) };
    }

    /// Ends the read of the eventfd, so that the kernel keeps no pointer into the ring's memory.
    pub(crate) fn close(&mut self) -> io::Result<()> {
        self.cancel(WAKE);
        loop {
            self.wait(None, Reason::Events)?;
            if self
                .ring
                .completion()
                .any(|entry| entry.user_data() == WAKE)
            {
                return Ok(());
            }
        }
    }
}

/// The best ring that the kernel offers. Deferred task work lets completions gather until the
/// executor asks for them, instead of interrupting it (6.1); older kernels still spare the
/// interruption (5.19), or know neither.
fn set_up(entries: u32) -> io::Result<IoUring> {
    let mut last = None;
    for level in 0..3 {
        let mut builder = IoUring::builder();
        builder.dontfork().setup_clamp();
        builder.setup_cqsize(entries.saturating_mul(COMPLETION_FACTOR));
        if level < 2 {
            builder
                .setup_submit_all()
                .setup_coop_taskrun()
                .setup_taskrun_flag();
        }
        if level < 1 {
            builder.setup_single_issuer().setup_defer_taskrun();
        }
        match builder.build(entries) {
            Ok(ring) => return Ok(ring),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => last = Some(error),
            Err(error) => return Err(error),
        }
    }
    Err(last.unwrap_or_else(|| io::ErrorKind::Unsupported.into()))
}

/// Sorts the results of `io_uring_enter`: true when the kernel wants completions reaped first, or
/// the wait ended early.
fn retry_later(result: io::Result<usize>) -> io::Result<bool> {
    match result {
        Ok(_) => Ok(false),
        Err(error) => match error.raw_os_error() {
            Some(libc::EINTR | libc::EAGAIN | libc::EBUSY | libc::ETIME) => Ok(true),
            _ => Err(error),
        },
    }
}
