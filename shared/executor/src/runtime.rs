//! The executor itself: run queue, ring, timers, pollers, cross-thread spawn.
//!
//! One turn: run ready tasks → poll pollers → submit SQEs in one batch → reap CQEs → fire
//! timers. With nothing ready, pollers are spun for the adaptive window, then armed
//! (notifications on), then the thread sleeps in `io_uring_enter`.

use std::future::Future;
use std::io;
use std::os::fd::BorrowedFd;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

/// How an executor is set up.
#[derive(Clone, Debug)]
pub struct Config {
    /// Submission queue entries (a power of two).
    pub ring_entries: u32,
    /// Longest time to poll before sleeping; zero sleeps at once. The window adapts below it.
    pub poll_max: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            ring_entries: 256,
            poll_max: Duration::from_micros(32),
        }
    }
}

/// Looks for work outside the ring: a virtqueue's available ring.
pub trait Poller {
    /// Looks for work without a syscall and starts it; returns whether there was any.
    fn poll(&self) -> bool;
    /// Asks for notifications before the thread sleeps; returns whether work came in meanwhile.
    fn arm(&self) -> bool;
    /// Stops notifications after waking.
    fn disarm(&self);
}

/// One thread's executor. `!Send`; others reach it through its [`Handle`].
pub struct Executor {}

impl Executor {
    /// A new executor on a ring of its own, for the current thread.
    pub fn new(config: &Config) -> io::Result<Executor> {
        todo!()
    }
    /// An executor whose files and time are those of `world`.
    pub fn simulated(world: &crate::sim::World) -> Executor {
        todo!()
    }
    /// Runs until `future` is done; other tasks run meanwhile.
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        todo!()
    }
    /// Runs tasks until [`Handle::stop`].
    pub fn run(&self) {
        todo!()
    }
    /// Does everything that is ready without blocking; for hosts with a loop of their own.
    pub fn turn(&self) -> io::Result<()> {
        todo!()
    }
    /// Readable when [`Executor::turn`] has work.
    pub fn fd(&self) -> BorrowedFd<'_> {
        todo!()
    }
    /// Until when [`Executor::turn`] has nothing to do but timers.
    pub fn next_deadline(&self) -> Option<Duration> {
        todo!()
    }
    /// A handle for other threads.
    pub fn handle(&self) -> Handle {
        todo!()
    }
}

/// Spawns a task on the current thread's executor; panics outside of one.
pub fn spawn<F: Future + 'static>(future: F) -> JoinHandle<F::Output> {
    todo!()
}

/// Registers a poller with the current executor until the returned registration is dropped.
pub fn register_poller(poller: Rc<dyn Poller>) -> PollerRegistration {
    todo!()
}

/// Keeps a poller registered.
pub struct PollerRegistration {}

/// Resolves to the output of a spawned task. Dropping it detaches the task.
pub struct JoinHandle<T> {
    _t: std::marker::PhantomData<T>,
}

impl<T> JoinHandle<T> {
    /// Drops the task at the next turn; its operations finish in the ring.
    pub fn cancel(self) {
        todo!()
    }
}

impl<T> Future for JoinHandle<T> {
    type Output = T;
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        todo!()
    }
}

/// Reaches an executor from any thread.
#[derive(Clone)]
pub struct Handle {}

impl Handle {
    /// The current thread's executor; panics outside of one.
    pub fn current() -> Handle {
        todo!()
    }
    /// Runs `start` on the executor's thread and spawns the future it returns. False when the
    /// executor is gone.
    pub fn spawn<S, F>(&self, start: S) -> bool
    where
        S: FnOnce() -> F + Send + 'static,
        F: Future<Output = ()> + 'static,
    {
        todo!()
    }
    /// Like [`Handle::spawn`], and waits (on the caller's executor) for the output; `None` when
    /// the executor ended first.
    pub async fn call<S, F, T>(&self, start: S) -> Option<T>
    where
        S: FnOnce() -> F + Send + 'static,
        F: Future<Output = T> + 'static,
        T: Send + 'static,
    {
        todo!()
    }
    /// Ends [`Executor::run`] after the current turn.
    pub fn stop(&self) {
        todo!()
    }
    /// Whether this is the calling thread's executor.
    pub fn is_current(&self) -> bool {
        todo!()
    }
    /// A small number unique among the executors of the process, for per-thread tables.
    pub fn index(&self) -> usize {
        todo!()
    }
}
