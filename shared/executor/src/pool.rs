//! Tasks of one concrete future type that are spawned without allocating once warm.

use std::future::Future;

/// A pool of task cells for futures of type `F`; spawning reuses the cells of finished tasks.
pub struct TaskPool<F: Future<Output = ()> + 'static> {
    _f: std::marker::PhantomData<F>,
}

impl<F: Future<Output = ()> + 'static> TaskPool<F> {
    /// A pool with room for `capacity` tasks made beforehand; it grows when more run at once.
    pub fn with_capacity(capacity: usize) -> Self {
        todo!()
    }
    /// Polls `future` once right away; when it is not ready it becomes a task of the current
    /// executor. Returns whether it finished at once.
    pub fn spawn(&self, future: F) -> bool {
        todo!()
    }
    /// Tasks not finished.
    pub fn active(&self) -> usize {
        todo!()
    }
}
