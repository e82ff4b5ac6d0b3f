//! Tasks of one concrete future type that are spawned without allocating once warm.
//!
//! A future is polled in place in a recycled cell. Most requests finish in that first poll and
//! never enter the run queue; the others keep the cell until they are done.

use crate::runtime::current;
use crate::task::{TaskCell, TaskRef};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

/// A pool of task cells for futures of type `F`; spawning reuses the cells of finished tasks.
pub struct TaskPool<F: Future<Output = ()> + 'static> {
    spare: Rc<Spare<F>>,
    capacity: usize,
}

/// The cells that are free, shared with the cells in use.
pub(crate) struct Spare<F> {
    cells: RefCell<Vec<Arc<TaskCell<F>>>>,
    active: Cell<usize>,
}

impl<F> Spare<F> {
    /// Counts a task whose executor is gone or that panicked; its cell is not used again.
    pub(crate) fn lose(&self) {
        self.active.set(self.active.get() - 1);
    }

    /// Takes back the empty cell of a finished task.
    pub(crate) fn give_back(&self, cell: Arc<TaskCell<F>>) {
        self.active.set(self.active.get() - 1);
        self.cells.borrow_mut().push(cell);
    }
}

impl<F: Future<Output = ()> + 'static> TaskPool<F> {
    /// A pool with room for `capacity` tasks made beforehand; it grows when more run at once.
    pub fn with_capacity(capacity: usize) -> Self {
        let spare = Rc::new(Spare {
            cells: RefCell::new(Vec::with_capacity(capacity)),
            active: Cell::new(0),
        });
        Self { spare, capacity }
    }

    /// Polls `future` once right away; when it is not ready it becomes a task of the current
    /// executor. Returns whether it finished at once.
    pub fn spawn(&self, future: F) -> bool {
        let inner = current();
        let spare = self.spare.cells.borrow_mut().pop();
        let cell = match spare {
            Some(cell) if cell.is_owned_by(&inner.shared) => cell,
            _ => self.grow(&inner.shared),
        };
        self.spare.active.set(self.spare.active.get() + 1);
        cell.fill(future, Some(Rc::clone(&self.spare)));
        if cell.poll() {
            cell.recycle();
            return true;
        }
        cell.set_key(inner.add_task(Arc::clone(&cell) as TaskRef));
        false
    }

    /// Tasks not finished.
    pub fn active(&self) -> usize {
        self.spare.active.get()
    }

    /// Makes one cell to use now, and as many spare ones as the capacity asks for.
    fn grow(&self, owner: &Arc<crate::runtime::Shared>) -> Arc<TaskCell<F>> {
        let mut cells = self.spare.cells.borrow_mut();
        if self.spare.active.get() == 0 {
            cells.clear();
            cells.extend((1..self.capacity).map(|_| TaskCell::new(owner)));
        }
        TaskCell::new(owner)
    }
}
