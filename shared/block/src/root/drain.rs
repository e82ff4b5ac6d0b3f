//! Draining a root across threads.
//!
//! Each attached thread has a [`Thread`]: counts that only it touches. Others reach it by a
//! message through its executor; messages of one sender arrive in order, so a resume never
//! overtakes its pause. Drivers below that hold requests back hear of it first.

use super::platform::{AtomicUsize, Handle, Mutex, MutexGuard, Notify, thread_local};
use super::{Hurried, Shared};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::task::{Poll, Waker};

/// The threads attached to a root.
#[derive(Default)]
pub(super) struct Threads {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Drains begun and not ended.
    drains: u32,
    attached: Vec<Attached>,
}

#[derive(Clone)]
struct Attached {
    id: u64,
    executor: Handle,
}

impl Threads {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Attaches the current thread, paused when a drain is on.
    pub(super) fn attach(&self) -> Rc<Thread> {
        static NEXT_ID: AtomicU64 = AtomicU64::new(1);
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
        let mut state = self.state();
        let thread = Rc::new(Thread {
            id,
            in_flight: Cell::new(0),
            paused: Cell::new(state.drains),
            resumed: RefCell::default(),
            drained: RefCell::default(),
        });
        ATTACHED.with(|threads| threads.borrow_mut().insert(id, Rc::clone(&thread)));
        state.attached.push(Attached {
            id,
            executor: Handle::current(),
        });
        thread
    }

    pub(super) fn detach(&self, thread: &Thread) {
        self.state().attached.retain(|other| other.id != thread.id);
        // The thread is ending when the table is gone.
        let _ = ATTACHED.try_with(|threads| threads.borrow_mut().remove(&thread.id));
    }
}

thread_local! {
    /// This thread's attachments, for messages from other threads.
    static ATTACHED: RefCell<HashMap<u64, Rc<Thread>>> = RefCell::default();
}

fn attached(id: u64) -> Option<Rc<Thread>> {
    ATTACHED.with(|threads| threads.borrow().get(&id).cloned())
}

/// A root on one thread.
pub(super) struct Thread {
    id: u64,
    in_flight: Cell<usize>,
    paused: Cell<u32>,
    resumed: RefCell<Vec<Waker>>,
    drained: RefCell<Vec<Waker>>,
}

impl Thread {
    #[inline]
    pub(super) fn is_paused(&self) -> bool {
        self.paused.get() != 0
    }

    pub(super) fn in_flight(&self) -> usize {
        self.in_flight.get()
    }

    #[inline]
    pub(super) fn begin(&self) {
        self.in_flight.set(self.in_flight.get() + 1);
    }

    #[inline]
    pub(super) fn end(&self) {
        let in_flight = self.in_flight.get() - 1;
        self.in_flight.set(in_flight);
        if in_flight == 0 && self.is_paused() {
            wake_all(&self.drained);
        }
    }

    /// Wakes `waker` after the last resume.
    pub(super) fn wait_for_resume(&self, waker: &Waker) {
        register(&self.resumed, waker);
    }

    fn pause(&self) {
        self.paused.set(self.paused.get() + 1);
    }

    fn resume(&self) {
        let paused = self.paused.get();
        debug_assert!(paused > 0, "every resume follows its pause");
        self.paused.set(paused.saturating_sub(1));
        if paused == 1 {
            wake_all(&self.resumed);
        }
    }

    async fn until_drained(&self) {
        poll_fn(|cx| {
            if self.in_flight.get() == 0 {
                return Poll::Ready(());
            }
            register(&self.drained, cx.waker());
            Poll::Pending
        })
        .await;
    }
}

fn register(wakers: &RefCell<Vec<Waker>>, waker: &Waker) {
    let mut wakers = wakers.borrow_mut();
    if !wakers.iter().any(|other| other.will_wake(waker)) {
        wakers.push(waker.clone());
    }
}

fn wake_all(wakers: &RefCell<Vec<Waker>>) {
    for waker in wakers.take() {
        waker.wake();
    }
}

/// Requests wait until this is dropped.
#[must_use = "requests go on as soon as this is dropped"]
pub struct Drained {
    root: Arc<Shared>,
    _hurried: Hurried,
}

impl Drop for Drained {
    fn drop(&mut self) {
        let mut state = self.root.threads.state();
        state.drains -= 1;
        // Every thread attached now was paused by this drain: by its message, or on attaching.
        for Attached { id, executor } in &state.attached {
            if executor.is_current() {
                if let Some(thread) = attached(*id) {
                    thread.resume();
                }
                continue;
            }
            let id = *id;
            // An executor that is gone has nothing left to resume.
            executor.spawn(move || {
                if let Some(thread) = attached(id) {
                    thread.resume();
                }
                async {}
            });
        }
    }
}

/// Counts threads that are not drained yet.
struct Waiting {
    threads: AtomicUsize,
    changed: Notify,
}

/// Counts down when dropped: also when an executor ends without running the message.
struct Countdown(Arc<Waiting>);

impl Drop for Countdown {
    fn drop(&mut self) {
        self.0.threads.fetch_sub(1, Ordering::AcqRel);
        self.0.changed.notify_all();
    }
}

pub(super) async fn drain(root: &Arc<Shared>) -> Drained {
    let waiting = Arc::new(Waiting {
        threads: AtomicUsize::new(0),
        changed: Notify::new(),
    });
    let (drained, here) = begin(root, &waiting);
    for thread in here {
        thread.until_drained().await;
    }
    loop {
        let changed = waiting.changed.notified();
        if waiting.threads.load(Ordering::Acquire) == 0 {
            return drained;
        }
        changed.await;
    }
}

/// Pauses every thread; returns those that are the current one.
fn begin(root: &Arc<Shared>, waiting: &Arc<Waiting>) -> (Drained, Vec<Rc<Thread>>) {
    let mut here = Vec::new();
    let mut state = root.threads.state();
    state.drains += 1;
    for Attached { id, executor } in &state.attached {
        if executor.is_current() {
            if let Some(thread) = attached(*id) {
                thread.pause();
                here.push(thread);
            }
            continue;
        }
        waiting.threads.fetch_add(1, Ordering::AcqRel);
        let (id, countdown) = (*id, Countdown(Arc::clone(waiting)));
        executor.spawn(move || {
            let thread = attached(id);
            if let Some(thread) = &thread {
                thread.pause();
            }
            async move {
                let _countdown = countdown;
                if let Some(thread) = thread {
                    thread.until_drained().await;
                }
            }
        });
    }
    drop(state);
    let drained = Drained {
        root: Arc::clone(root),
        _hurried: root.hurry(),
    };
    (drained, here)
}
