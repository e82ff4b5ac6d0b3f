//! What other threads see of an executor: a queue of wakes and starts, and an eventfd.
//!
//! The eventfd is written only when the executor said that it sleeps; `inbox.rs` has the handshake.

mod inbox;
#[cfg(all(test, loom))]
mod models;

/// The atomics and locks of the inbox; models have loom's.
mod atomics {
    pub(super) use crate::sync::short_lock as locked;
    pub(super) use std::sync::Mutex;
    pub(super) use std::sync::atomic::{AtomicBool, fence};
}

use crate::runtime::{Inner, current, with_current};
use crate::sync::short_lock;
use crate::task::TaskRef;
use inbox::{Inbox, Reader};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::future::poll_fn;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Poll, Waker};

/// Numbers of the executors alive; the lowest free one is given out.
static INDICES: Mutex<Vec<bool>> = Mutex::new(Vec::new());

/// What another thread asks for.
pub(crate) enum RemoteItem {
    /// Queue a task that was woken.
    Task(TaskRef),
    /// Call this on the executor's thread.
    Start(Box<dyn FnOnce() + Send>),
}

/// The thread-safe part of an executor.
pub(crate) struct Shared {
    inbox: Inbox<RemoteItem>,
    stop: AtomicBool,
    eventfd: EventFd,
    index: usize,
}

impl Shared {
    pub(crate) fn new() -> io::Result<Arc<Shared>> {
        // Blocking: the ring waits for it. Writing never blocks, the counter does not get full.
        let eventfd = EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?;
        let mut indices = short_lock(&INDICES);
        let index = indices.iter().position(|used| !used);
        let index = index.unwrap_or(indices.len());
        if index == indices.len() {
            indices.push(true);
        } else {
            indices[index] = true;
        }
        Ok(Arc::new(Shared {
            inbox: Inbox::new(),
            stop: AtomicBool::new(false),
            eventfd,
            index,
        }))
    }

    pub(crate) fn eventfd(&self) -> BorrowedFd<'_> {
        self.eventfd.as_fd()
    }

    /// Queues a woken task; dropped when the executor is gone.
    pub(crate) fn push_task(&self, task: TaskRef) {
        self.push(RemoteItem::Task(task));
    }

    fn push(&self, item: RemoteItem) -> bool {
        let Ok(reader) = self.inbox.push(item) else {
            return false;
        };
        self.wake(reader);
        true
    }

    /// Wakes the executor's thread when it sleeps. What it shall find is stored before.
    pub(crate) fn rouse(&self) {
        self.wake(self.inbox.rouse());
    }

    fn wake(&self, reader: Reader) {
        if reader == Reader::Sleeps {
            self.signal();
        }
    }

    /// Makes the eventfd readable.
    pub(crate) fn signal(&self) {
        // Cannot fail: the descriptor is open and the value is not the one that is refused.
        let _ = self.eventfd.write(1);
    }

    /// Takes what others have queued.
    pub(crate) fn take(&self) -> Option<Vec<RemoteItem>> {
        self.inbox.take()
    }

    /// Announces sleep; false when something came in meanwhile.
    pub(crate) fn try_sleep(&self) -> bool {
        self.inbox.try_sleep()
    }

    /// Ends what [`Shared::try_sleep`] announced.
    pub(crate) fn awake(&self) {
        self.inbox.awake();
    }

    /// Whether others have queued something.
    pub(crate) fn has_pending(&self) -> bool {
        self.inbox.has_pending()
    }

    /// Set by [`Handle::stop`].
    pub(crate) fn stop_flag(&self) -> &AtomicBool {
        &self.stop
    }

    /// Whether to stop; asked once.
    pub(crate) fn take_stop(&self) -> bool {
        self.stop.load(Ordering::Relaxed) && self.stop.swap(false, Ordering::AcqRel)
    }

    /// Refuses further items and gives those that are left.
    pub(crate) fn close(&self) -> Vec<RemoteItem> {
        self.inbox.close()
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        short_lock(&INDICES)[self.index] = false;
    }
}

/// Reaches an executor from any thread.
#[derive(Clone)]
pub struct Handle {
    shared: Arc<Shared>,
}

impl Handle {
    pub(crate) fn new(shared: &Arc<Shared>) -> Handle {
        Handle {
            shared: Arc::clone(shared),
        }
    }

    /// The current thread's executor; panics outside of one.
    pub fn current() -> Handle {
        Handle::new(&current().shared)
    }

    /// Whether both are handles of one executor.
    pub fn is_same(&self, other: &Handle) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared)
    }

    /// Runs `start` on the executor's thread and spawns the future it returns. False when the
    /// executor is gone.
    pub fn spawn<S, F>(&self, start: S) -> bool
    where
        S: FnOnce() -> F + Send + 'static,
        F: Future<Output = ()> + 'static,
    {
        self.shared.push(RemoteItem::Start(Box::new(move || {
            current().spawn(start());
        })))
    }

    /// Like [`Handle::spawn`], and waits (on the caller's executor) for the output; `None` when
    /// the executor ended first.
    pub async fn call<S, F, T>(&self, start: S) -> Option<T>
    where
        S: FnOnce() -> F + Send + 'static,
        F: Future<Output = T> + 'static,
        T: Send + 'static,
    {
        let (caller, answer) = Caller::new();
        self.spawn(move || {
            // `caller` is made part of the future here, so that it is dropped, and answers, even
            // when neither `start` nor the future is run to its end.
            let future = start();
            async move {
                let output = future.await;
                caller.answer(Answer::Given(output));
            }
        });
        answered(&answer).await
    }

    /// Ends [`crate::Executor::run`] after the current turn.
    pub fn stop(&self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.rouse();
    }

    /// Whether this is the calling thread's executor.
    pub fn is_current(&self) -> bool {
        let here = |inner: &std::rc::Rc<Inner>| ptr::eq(&*inner.shared, &*self.shared);
        with_current(|inner| inner.is_some_and(here))
    }

    /// A small number unique among the executors of the process, for per-thread tables.
    pub fn index(&self) -> usize {
        self.shared.index
    }
}

/// Waits for what another thread answers; `None` when it went away without.
pub(crate) async fn answered<T>(answer: &Mutex<Answer<T>>) -> Option<T> {
    poll_fn(|context| {
        let mut answer = short_lock(answer);
        match std::mem::replace(&mut *answer, Answer::Never) {
            Answer::Given(output) => Poll::Ready(Some(output)),
            Answer::Never => Poll::Ready(None),
            Answer::Awaited(_) => {
                *answer = Answer::Awaited(Some(context.waker().clone()));
                Poll::Pending
            }
        }
    })
    .await
}

/// What a [`Handle::call`] waits for.
pub(crate) enum Answer<T> {
    Awaited(Option<Waker>),
    Given(T),
    Never,
}

/// Answers once, with [`Answer::Never`] when dropped.
pub(crate) struct Caller<T>(Arc<Mutex<Answer<T>>>);

impl<T> Caller<T> {
    pub(crate) fn new() -> (Self, Arc<Mutex<Answer<T>>>) {
        let answer = Arc::new(Mutex::new(Answer::Awaited(None)));
        (Self(Arc::clone(&answer)), answer)
    }

    pub(crate) fn answer(&self, given: Answer<T>) {
        let mut answer = short_lock(&self.0);
        if let Answer::Awaited(waker) = &mut *answer {
            let waker = waker.take();
            *answer = given;
            drop(answer);
            if let Some(waker) = waker {
                waker.wake();
            }
        }
    }
}

impl<T> Drop for Caller<T> {
    fn drop(&mut self) {
        self.answer(Answer::Never);
    }
}
