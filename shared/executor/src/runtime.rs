//! The executor itself: run queue, ring, timers, pollers, cross-thread spawn.
//!
//! One turn: run ready tasks → poll pollers → submit SQEs in one batch → reap CQEs → fire
//! timers. With nothing ready, pollers are spun for the adaptive window, then armed
//! (notifications on), then the thread sleeps in `io_uring_enter`.
//!
//! A thread has one current executor: the one made last, or, within `block_on`, `run` and `turn`,
//! the one that runs. Operations, timers and `spawn` use the current one.
#![expect(
    unsafe_code,
    reason = "the running executor is a thread-local pointer into the stack of its thread"
)]

use crate::op::OpTable;
use crate::poller::Pollers;
pub use crate::poller::{Poller, PollerRegistration, register_poller};
pub use crate::remote::Handle;
pub(crate) use crate::remote::Shared;
use crate::ring::{Completion, Ring};
use crate::sim;
use crate::task::{TaskCell, TaskRef};
use crate::time::Timers;
use nix::sys::eventfd::{EfdFlags, EventFd};
use slab::Slab;
use std::cell::{Cell, OnceCell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, BorrowedFd};
use std::pin::{Pin, pin};
use std::ptr;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

/// Rounds that one [`Executor::turn`] runs before it lets its host's loop have the thread.
const ROUNDS_PER_TURN: u32 = 64;

/// Who waits when a write to a buffered file has to (for memory, for the file's lock).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BufferedWrites {
    /// A thread of the kernel: this one goes on.
    #[default]
    ByRing,
    /// This thread. Saves waking others and is for programs with nothing else to do meanwhile.
    InPlace,
}

/// How an executor is set up.
#[derive(Clone, Debug)]
pub struct Config {
    /// Submission queue entries (a power of two).
    pub ring_entries: u32,
    /// Longest time to poll before sleeping; zero sleeps at once. The window adapts below it.
    pub poll_max: Duration,
    /// How buffered files are written.
    pub buffered_writes: BufferedWrites,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            ring_entries: 256,
            poll_max: Duration::from_micros(32),
            buffered_writes: BufferedWrites::default(),
        }
    }
}

/// One thread's executor. `!Send`; others reach it through its [`Handle`].
///
/// Dropping it drops its tasks, then waits for the operations that the kernel still works on.
pub struct Executor {
    inner: Rc<Inner>,
}

/// Where operations go.
#[expect(
    clippy::large_enum_variant,
    reason = "one per thread, and the large one is the fast one"
)]
pub(crate) enum Backend {
    Ring(RefCell<Ring>),
    Sim(sim::Disk),
}

/// The state of an executor; operations in flight keep it alive.
pub(crate) struct Inner {
    pub(crate) shared: Arc<Shared>,
    pub(crate) backend: Backend,
    /// Ready tasks.
    pub(crate) queue: RefCell<VecDeque<TaskRef>>,
    /// Every unfinished task, so that none outlives the executor.
    pub(crate) tasks: RefCell<Slab<TaskRef>>,
    pub(crate) ops: RefCell<OpTable>,
    pub(crate) timers: RefCell<Timers>,
    pub(crate) pollers: Pollers,
    /// Room for what one reaping finds.
    pub(crate) completions: Cell<Vec<Completion>>,
    /// Notified of completions, for [`Executor::fd`].
    turn_fd: OnceCell<EventFd>,
    /// Counts rounds of work.
    pub(crate) rounds: Cell<u32>,
    running: Cell<bool>,
    pub(crate) buffered_writes: Cell<BufferedWrites>,
}

thread_local! {
    /// The executor that runs on this thread, kept alive by the innermost [`Enter`].
    static RUNNING: Cell<*const Inner> = const { Cell::new(ptr::null()) };
    /// The executor made last on this thread.
    static DEFAULT: RefCell<Weak<Inner>> = const { RefCell::new(Weak::new()) };
}

/// Calls `f` with the current executor, if there is one.
pub(crate) fn with_current<R>(f: impl FnOnce(Option<&Rc<Inner>>) -> R) -> R {
    let running = RUNNING.get();
    if running.is_null() {
        let default = DEFAULT.try_with(|default| default.borrow().upgrade());
        return f(default.ok().flatten().as_ref());
    }
    // SAFETY: `running` came from `Rc::as_ptr` of the `Rc` in an `Enter` further up this thread's
    // stack, which outlives this call; `ManuallyDrop` leaves its count alone.
    let inner = ManuallyDrop::new(unsafe { Rc::from_raw(running) });
    f(Some(&inner))
}

/// The current executor; panics outside of one.
pub(crate) fn current() -> Rc<Inner> {
    with_current(|inner| inner.cloned()).expect("there is no executor on this thread")
}

/// Makes an executor the running one until dropped. Never leaked: it lives on the stack.
struct Enter {
    inner: Rc<Inner>,
    previous: *const Inner,
}

impl Enter {
    fn new(inner: &Rc<Inner>) -> Enter {
        assert!(
            !inner.running.replace(true),
            "an executor is run from one of its own tasks"
        );
        Enter {
            inner: Rc::clone(inner),
            previous: RUNNING.replace(Rc::as_ptr(inner)),
        }
    }
}

impl Drop for Enter {
    fn drop(&mut self) {
        RUNNING.set(self.previous);
        self.inner.running.set(false);
    }
}

impl Executor {
    /// A new executor on a ring of its own, for the current thread. A process that forks makes
    /// its executors afterwards: the child does not have the ring.
    pub fn new(config: &Config) -> io::Result<Executor> {
        let shared = Shared::new()?;
        let ring = Ring::new(config.ring_entries, shared.eventfd())?;
        let pollers = Pollers::new(config.poll_max);
        let executor = Self::make(shared, Backend::Ring(RefCell::new(ring)), pollers);
        executor.inner.buffered_writes.set(config.buffered_writes);
        Ok(executor)
    }

    /// An executor whose files and time are those of `world`.
    ///
    /// A world runs on one executor at a time. [`Executor::block_on`] panics with `deadlock: ...`
    /// when no task is ready and no operation or timer is left to wait for.
    pub fn simulated(world: &sim::World) -> Executor {
        let shared = Shared::new().expect("an eventfd can be made");
        let pollers = Pollers::new(Duration::ZERO);
        Self::make(shared, Backend::Sim(world.disk()), pollers)
    }

    fn make(shared: Arc<Shared>, backend: Backend, pollers: Pollers) -> Executor {
        let inner = Rc::new(Inner {
            shared,
            backend,
            queue: RefCell::default(),
            tasks: RefCell::default(),
            ops: RefCell::default(),
            timers: RefCell::default(),
            pollers,
            completions: Cell::default(),
            turn_fd: OnceCell::new(),
            rounds: Cell::new(0),
            running: Cell::new(false),
            buffered_writes: Cell::default(),
        });
        DEFAULT.set(Rc::downgrade(&inner));
        Executor { inner }
    }

    /// Runs until `future` is done; other tasks run meanwhile.
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        let inner = &*self.inner;
        let _enter = Enter::new(&self.inner);
        let main = Arc::new(MainWaker {
            woken: AtomicBool::new(true),
            owner: Arc::clone(&inner.shared),
        });
        let waker = Waker::from(Arc::clone(&main));
        let mut context = Context::from_waker(&waker);
        let mut future = pin!(future);
        loop {
            if main.woken.swap(false, Ordering::AcqRel)
                && let Poll::Ready(output) = future.as_mut().poll(&mut context)
            {
                return output;
            }
            inner.round(&main.woken);
        }
    }

    /// Runs tasks until [`Handle::stop`].
    pub fn run(&self) {
        let inner = &*self.inner;
        let _enter = Enter::new(&self.inner);
        while !inner.shared.take_stop() {
            inner.round(inner.shared.stop_flag());
        }
    }

    /// Does everything that is ready without blocking; for hosts with a loop of their own.
    pub fn turn(&self) -> io::Result<()> {
        let inner = &*self.inner;
        let _enter = Enter::new(&self.inner);
        inner.shared.awake();
        inner.pollers.disarm();
        if let Some(fd) = inner.turn_fd.get() {
            // EAGAIN: the host came for a timer.
            let _ = fd.read();
        }
        for _ in 0..ROUNDS_PER_TURN {
            let mut worked = inner.work();
            worked |= inner.exchange();
            if !worked && !inner.fire_timers() && !inner.pollers.arm() && inner.shared.try_sleep() {
                return Ok(());
            }
        }
        inner.shared.signal();
        Ok(())
    }

    /// Readable when [`Executor::turn`] has work.
    pub fn fd(&self) -> BorrowedFd<'_> {
        match &self.inner.backend {
            Backend::Ring(ring) => {
                let fd = self.inner.turn_fd.get_or_init(|| {
                    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
                    let fd = EventFd::from_flags(flags).expect("an eventfd can be made");
                    let registered = ring.borrow().notify(fd.as_fd());
                    registered.expect("an eventfd can be registered with an open ring");
                    // What has finished until now was not notified.
                    let _ = fd.write(1);
                    fd
                });
                fd.as_fd()
            }
            Backend::Sim(_) => self.inner.shared.eventfd(),
        }
    }

    /// Until when [`Executor::turn`] has nothing to do but timers, on the clock of
    /// [`crate::time::now`]; `None` without timers.
    pub fn next_deadline(&self) -> Option<Duration> {
        self.inner.timers.borrow().next_deadline()
    }

    /// A handle for other threads.
    pub fn handle(&self) -> Handle {
        Handle::new(&self.inner.shared)
    }
}

impl Drop for Executor {
    fn drop(&mut self) {
        let inner = &*self.inner;
        let _enter = Enter::new(&self.inner);
        // Dropping one future may spawn, wake or drop others.
        loop {
            let remote = inner.shared.close();
            let ready = inner.queue.take();
            let tasks = inner.tasks.take();
            if remote.is_empty() && ready.is_empty() && tasks.is_empty() {
                break;
            }
            for (_, task) in &tasks {
                task.clear();
            }
        }
        inner.timers.take();
        inner.pollers.clear();
        inner.settle();
    }
}

impl Inner {
    /// Adds an unfinished task; its key.
    pub(crate) fn add_task(&self, task: TaskRef) -> usize {
        self.tasks.borrow_mut().insert(task)
    }

    /// Removes a finished task.
    pub(crate) fn forget_task(&self, key: usize) {
        let _task = self.tasks.borrow_mut().try_remove(key);
    }

    /// Spawns a task.
    pub(crate) fn spawn<F: Future<Output = ()> + 'static>(&self, future: F) -> TaskRef {
        let cell = TaskCell::new(&self.shared);
        cell.fill(future, None);
        let task: TaskRef = Arc::clone(&cell) as TaskRef;
        cell.set_key(self.add_task(Arc::clone(&task)));
        cell.wake();
        task
    }
}

/// Wakes the future of a `block_on`.
struct MainWaker {
    woken: AtomicBool,
    owner: Arc<Shared>,
}

impl Wake for MainWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.woken.store(true, Ordering::SeqCst);
        self.owner.rouse();
    }
}

/// Spawns a task on the current thread's executor; panics outside of one.
pub fn spawn<F: Future + 'static>(future: F) -> JoinHandle<F::Output> {
    let state = Rc::new(JoinState {
        output: Cell::new(None),
        waker: Cell::new(None),
    });
    let done = Rc::clone(&state);
    let task = current().spawn(async move {
        done.output.set(Some(future.await));
        if let Some(waker) = done.waker.take() {
            waker.wake();
        }
    });
    JoinHandle { state, task }
}

struct JoinState<T> {
    output: Cell<Option<T>>,
    waker: Cell<Option<Waker>>,
}

/// Resolves to the output of a spawned task. Dropping it detaches the task.
///
/// When the executor goes first the handle never resolves. A panic of the task is not caught: it
/// leaves through the `block_on`, `run` or `turn` that polled it.
pub struct JoinHandle<T> {
    state: Rc<JoinState<T>>,
    task: TaskRef,
}

impl<T> JoinHandle<T> {
    /// Drops the task at the next turn; its operations finish in the ring.
    pub fn cancel(self) {
        self.task.cancel();
    }
}

impl<T> Future for JoinHandle<T> {
    type Output = T;
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        if let Some(output) = self.state.output.take() {
            return Poll::Ready(output);
        }
        self.state.waker.set(Some(cx.waker().clone()));
        Poll::Pending
    }
}
