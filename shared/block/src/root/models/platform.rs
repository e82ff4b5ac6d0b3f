//! What the executor is to draining, over loom's types: messages that arrive in order, and waking.

pub(super) use loom::sync::atomic::AtomicUsize;
pub(super) use loom::sync::{Mutex, MutexGuard};
pub(super) use loom::thread_local;

use loom::sync::Condvar;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};

type Task = Pin<Box<dyn Future<Output = ()>>>;
type Message = Box<dyn FnOnce() -> Task + Send>;

#[derive(Default)]
struct Inbox {
    state: Mutex<InboxState>,
    changed: Condvar,
}

#[derive(Default)]
struct InboxState {
    messages: VecDeque<Message>,
    woken: bool,
    closed: bool,
}

impl Wake for Inbox {
    fn wake(self: Arc<Self>) {
        self.state.lock().expect("no panic").woken = true;
        self.changed.notify_one();
    }
}

thread_local! {
    static CURRENT: RefCell<Option<Arc<Inbox>>> = RefCell::new(None);
}

fn current() -> Arc<Inbox> {
    CURRENT.with(|current| current.borrow().clone().expect("inside of `run`"))
}

/// A thread's executor.
#[derive(Clone)]
pub(super) struct Handle(Arc<Inbox>);

impl Handle {
    pub(super) fn current() -> Self {
        Self(current())
    }

    pub(super) fn is_current(&self) -> bool {
        Arc::ptr_eq(&self.0, &current())
    }

    /// Starts a task there; drops it where nothing runs any more.
    pub(super) fn spawn<F>(&self, start: impl FnOnce() -> F + Send + 'static)
    where
        F: Future<Output = ()> + 'static,
    {
        let message: Message = Box::new(move || Box::pin(start()));
        let mut state = self.0.state.lock().expect("no panic");
        if state.closed {
            drop(state);
            drop(message);
            return;
        }
        state.messages.push_back(message);
        drop(state);
        self.0.changed.notify_one();
    }
}

/// Runs `future` on this thread, and what others send meanwhile.
pub(super) fn run(future: impl Future<Output = ()>) {
    let inbox = Arc::<Inbox>::default();
    CURRENT.with(|current| current.replace(Some(Arc::clone(&inbox))));
    let waker = Waker::from(Arc::clone(&inbox));
    let mut context = Context::from_waker(&waker);
    let mut future = pin!(future);
    let mut tasks: Vec<Task> = Vec::new();
    while future.as_mut().poll(&mut context).is_pending() {
        tasks.retain_mut(|task| task.as_mut().poll(&mut context).is_pending());
        let mut state = inbox.state.lock().expect("no panic");
        while !state.woken && state.messages.is_empty() {
            state = inbox.changed.wait(state).expect("no panic");
        }
        state.woken = false;
        let messages = std::mem::take(&mut state.messages);
        drop(state);
        tasks.extend(messages.into_iter().map(|start| start()));
        tasks.retain_mut(|task| task.as_mut().poll(&mut context).is_pending());
    }
    drop(tasks);
    let mut state = inbox.state.lock().expect("no panic");
    state.closed = true;
    let unread = std::mem::take(&mut state.messages);
    drop(state);
    drop(unread);
}

/// Wakes waiting tasks.
pub(super) struct Notify(Mutex<(u64, Vec<Waker>)>);

impl Notify {
    pub(super) fn new() -> Self {
        Self(Mutex::new((0, Vec::new())))
    }

    pub(super) fn notify_all(&self) {
        let mut state = self.0.lock().expect("no panic");
        state.0 += 1;
        let waiters = std::mem::take(&mut state.1);
        drop(state);
        waiters.into_iter().for_each(Waker::wake);
    }

    /// Waits for a notification after this call.
    pub(super) fn notified(&self) -> impl Future<Output = ()> {
        let generation = self.0.lock().expect("no panic").0;
        std::future::poll_fn(move |cx| {
            let mut state = self.0.lock().expect("no panic");
            if state.0 != generation {
                return Poll::Ready(());
            }
            state.1.push(cx.waker().clone());
            Poll::Pending
        })
    }
}
