//! Task cells: one allocation that holds a future, its place in the run queue and its waker.
//!
//! ```text
//!   Waker (any thread) ──> Arc<TaskCell<F>> ──> owner's run queue, or its remote queue
//!                            header: owner, queued?      (atomics, any thread)
//!                            future: polled and dropped  (owner's thread only)
//! ```
//!
//! Invariants: `future`, `pool` and `polling` are touched on the owner's thread only. The owner
//! keeps every unfinished cell in its task table and empties the cells before it goes, so that
//! the last waker, wherever it is dropped, frees memory but never a future.
#![expect(
    unsafe_code,
    reason = "wakers are Send, the futures that they wake are not"
)]

use crate::pool::Spare;
use crate::runtime::{Inner, Shared, with_current};
use std::cell::{Cell, UnsafeCell};
use std::mem::ManuallyDrop;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::Pin;
use std::ptr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Wake, Waker};

/// A task of any future type.
pub(crate) type TaskRef = Arc<dyn Task>;

/// What the run queue needs of a cell. All but `owner` are for the owner's thread.
pub(crate) trait Task: Send + Sync {
    /// The executor that runs the task; for any thread.
    fn owner(&self) -> &Arc<Shared>;
    /// Polls the future; a finished task leaves the owner's table.
    fn run(self: Arc<Self>, owner: &Inner);
    /// Makes the next [`Task::run`] drop the future instead of polling it.
    fn cancel(self: Arc<Self>);
    /// Drops the future now.
    fn clear(&self);
}

/// A future and what is needed to run it.
pub(crate) struct TaskCell<F> {
    owner: Arc<Shared>,
    queued: AtomicBool,
    cancelled: AtomicBool,
    polling: Cell<bool>,
    /// Index in the owner's task table while the task is unfinished.
    key: Cell<usize>,
    future: UnsafeCell<Option<F>>,
    /// The pool that takes the cell back when the task has finished.
    pool: Cell<Option<Rc<Spare<F>>>>,
}

// SAFETY: other threads reach `owner`, `queued` and `cancelled` only, which are `Sync`; `polling`,
// `key`, `future` and `pool` are used on the owner's thread only (`Task` methods are called by the
// owner alone) and are empty when the last reference goes (module docs).
unsafe impl<F> Send for TaskCell<F> {}
// SAFETY: as above.
unsafe impl<F> Sync for TaskCell<F> {}

impl<F: Future<Output = ()> + 'static> TaskCell<F> {
    /// An empty cell of `owner`.
    pub(crate) fn new(owner: &Arc<Shared>) -> Arc<Self> {
        Arc::new(TaskCell {
            owner: Arc::clone(owner),
            queued: AtomicBool::new(false),
            cancelled: AtomicBool::new(false),
            polling: Cell::new(false),
            key: Cell::new(usize::MAX),
            future: UnsafeCell::new(None),
            pool: Cell::new(None),
        })
    }

    /// Whether `owner` runs this cell's tasks.
    pub(crate) fn is_owned_by(&self, owner: &Shared) -> bool {
        ptr::eq(&*self.owner, owner)
    }

    /// Puts `future` into the empty cell; `pool` gets the cell back in the end. The caller is on
    /// the owner's thread.
    pub(crate) fn fill(&self, future: F, pool: Option<Rc<Spare<F>>>) {
        assert!(!self.polling.get(), "a task cell is filled while it runs");
        // SAFETY: owner's thread, and nothing is being polled, so no other reference exists.
        unsafe { *self.future.get() = Some(future) };
        self.pool.set(pool);
        self.cancelled.store(false, Ordering::Relaxed);
    }

    /// Notes where the owner keeps the task.
    pub(crate) fn set_key(&self, key: usize) {
        self.key.set(key);
    }

    /// Polls once on the owner's thread; true when the future is done and dropped.
    pub(crate) fn poll(self: &Arc<Self>) -> bool {
        assert!(!self.polling.replace(true), "a task runs itself");
        // SAFETY: `polling` was false, so this is the only reference; the cell never moves (it is
        // in an `Arc`) and the future is dropped in place, so it is pinned.
        let slot = unsafe { &mut *self.future.get() };
        let mut done = true;
        if let Some(future) = slot
            && !self.cancelled.load(Ordering::Relaxed)
        {
            // SAFETY: a second `Arc` without a count; `ManuallyDrop` never gives it back, and
            // `self` outlives it.
            let same = unsafe { ptr::read(self) };
            let waker = ManuallyDrop::new(Waker::from(same));
            let mut context = Context::from_waker(&waker);
            // SAFETY: pinned as said above.
            let future = unsafe { Pin::new_unchecked(future) };
            let poll = AssertUnwindSafe(|| future.poll(&mut context).is_ready());
            done = catch_unwind(poll).unwrap_or_else(|panic| {
                // The task is over; its panic goes on through the executor.
                self.polling.set(false);
                self.clear();
                resume_unwind(panic)
            });
        }
        if done {
            *slot = None;
        }
        self.polling.set(false);
        done
    }

    /// Gives an empty cell back to its pool.
    pub(crate) fn recycle(self: Arc<Self>) {
        if let Some(pool) = self.pool.take() {
            pool.give_back(self);
        }
    }
}

impl<F: Future<Output = ()> + 'static> Task for TaskCell<F> {
    fn owner(&self) -> &Arc<Shared> {
        &self.owner
    }

    fn run(self: Arc<Self>, owner: &Inner) {
        // Before the poll: a wake during it queues the task again. `Acquire` sees what the waker
        // did before waking.
        self.queued.swap(false, Ordering::AcqRel);
        let key = self.key.get();
        if key != usize::MAX && self.poll() {
            owner.forget_task(self.key.replace(usize::MAX));
            self.recycle();
        }
    }

    fn cancel(self: Arc<Self>) {
        self.cancelled.store(true, Ordering::Relaxed);
        self.wake();
    }

    fn clear(&self) {
        if self.polling.get() {
            return;
        }
        self.key.set(usize::MAX);
        // SAFETY: owner's thread and not being polled, so this is the only reference. The future
        // is moved nowhere: it is dropped in place.
        unsafe { *self.future.get() = None };
        if let Some(pool) = self.pool.take() {
            pool.lose();
        }
    }
}

impl<F: Future<Output = ()> + 'static> Wake for TaskCell<F> {
    fn wake(self: Arc<Self>) {
        if self.queued.swap(true, Ordering::AcqRel) {
            return;
        }
        schedule(self);
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.queued.swap(true, Ordering::AcqRel) {
            schedule(Arc::clone(self) as TaskRef);
        }
    }
}

/// Queues `task` with its owner: directly on the owner's thread, else through the remote queue.
fn schedule(task: TaskRef) {
    let remote = with_current(|inner| match inner {
        Some(inner) if Arc::ptr_eq(&inner.shared, task.owner()) => {
            inner.queue.borrow_mut().push_back(task);
            None
        }
        _ => Some(task),
    });
    if let Some(task) = remote {
        let owner = Arc::clone(task.owner());
        owner.push_task(task);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::remote::RemoteItem;
    use std::cell::RefCell;
    use std::future::poll_fn;
    use std::task::Poll;

    /// Keeps the last waker that its task was polled with, and ends at the second poll.
    fn pausing(
        wakers: &Rc<RefCell<Vec<Waker>>>,
        ended: &Rc<Cell<bool>>,
    ) -> impl Future<Output = ()> + 'static {
        let (wakers, ended) = (Rc::clone(wakers), Rc::clone(ended));
        poll_fn(move |context| {
            wakers.borrow_mut().push(context.waker().clone());
            match wakers.borrow().len() {
                1 => Poll::Pending,
                _ => {
                    ended.set(true);
                    Poll::Ready(())
                }
            }
        })
    }

    /// How often the task was queued with its owner since the last time.
    fn queued(owner: &Shared) -> usize {
        let items = owner.take().unwrap_or_default();
        items
            .iter()
            .filter(|item| matches!(item, RemoteItem::Task(_)))
            .count()
    }

    #[test]
    fn a_wake_from_another_thread_queues_a_task_once_and_frees_no_future() {
        let owner = Shared::new().unwrap();
        let (wakers, ended) = (Rc::default(), Rc::default());
        let cell = TaskCell::new(&owner);
        cell.fill(pausing(&wakers, &ended), None);
        assert!(!cell.poll());
        let waker = wakers.borrow()[0].clone();
        let other = std::thread::spawn(move || {
            waker.wake_by_ref();
            waker.wake_by_ref();
            waker
        });
        let kept = other.join().unwrap();
        assert_eq!(queued(&owner), 1);
        assert!(cell.poll() && ended.get());
        // The future is gone; what is left of the task goes with its last waker, on any thread.
        drop(cell);
        wakers.borrow_mut().clear();
        std::thread::spawn(move || drop(kept)).join().unwrap();
        assert_eq!(Arc::strong_count(&owner), 1);
    }

    #[test]
    fn a_cell_is_used_again_with_wakers_of_its_first_task_about() {
        let owner = Shared::new().unwrap();
        let (wakers, ended) = (Rc::default(), Rc::default());
        let cell = TaskCell::new(&owner);
        cell.fill(pausing(&wakers, &ended), None);
        assert!(!cell.poll());
        cell.clear();
        assert_eq!(Rc::strong_count(&ended), 1, "the future was dropped");
        let old = wakers.borrow_mut().remove(0);
        cell.fill(pausing(&wakers, &ended), None);
        assert!(!cell.poll());
        std::thread::spawn(move || old.wake()).join().unwrap();
        // Woken for nothing, which futures expect.
        assert_eq!(queued(&owner), 1);
        assert!(cell.poll() && ended.get());
    }

    #[test]
    fn a_task_that_panics_is_over() {
        let owner = Shared::new().unwrap();
        let cell = TaskCell::new(&owner);
        let held = Rc::new(());
        let inside = Rc::clone(&held);
        let panicking = async move {
            let _inside = inside;
            panic!("as asked");
        };
        cell.fill(panicking, None);
        let polled = catch_unwind(AssertUnwindSafe(|| cell.poll()));
        assert!(polled.is_err());
        drop(cell);
        assert_eq!(Rc::strong_count(&held), 1);
    }
}
