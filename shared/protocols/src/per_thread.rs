//! What each thread keeps for itself of a node: connections, which belong to the thread that made them.

use executor::Handle;
use std::any::Any;
use std::cell::RefCell;
use std::marker::PhantomData;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

static NEXT: AtomicU64 = AtomicU64::new(1);

thread_local! {
    /// The values of this thread, by their owner.
    static VALUES: RefCell<Vec<(u64, Rc<dyn Any>)>> = const { RefCell::new(Vec::new()) };
}

/// A `T` for each thread that made one.
pub(crate) struct PerThread<T> {
    id: u64,
    /// The threads with a value.
    threads: Mutex<Vec<Handle>>,
    kind: PhantomData<fn() -> T>,
}

impl<T: 'static> PerThread<T> {
    /// None yet.
    pub(crate) fn new() -> Self {
        Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            threads: Mutex::default(),
            kind: PhantomData,
        }
    }

    /// This thread's.
    pub(crate) fn get(&self) -> Option<Rc<T>> {
        VALUES.with_borrow(|values| find(values, self.id))
    }

    /// Gives this thread, which has none, its value.
    pub(crate) fn put(&self, value: Rc<T>) {
        VALUES.with_borrow_mut(|values| values.push((self.id, value)));
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        threads.push(Handle::current());
    }

    /// Takes the values of all threads away, and lets each thread end its own. Threads that are gone took theirs
    /// along.
    pub(crate) async fn end(&self, end: fn(&T)) {
        let threads = {
            let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut *threads)
        };
        let id = self.id;
        for thread in threads {
            let taken = move || async move {
                if let Some(value) = take::<T>(id) {
                    end(&value);
                }
            };
            match thread.is_current() {
                true => taken().await,
                false => drop(thread.call(taken).await),
            }
        }
    }
}

fn find<T: 'static>(values: &[(u64, Rc<dyn Any>)], id: u64) -> Option<Rc<T>> {
    let (_, value) = values.iter().find(|(known, _)| *known == id)?;
    Rc::clone(value).downcast().ok()
}

fn take<T: 'static>(id: u64) -> Option<Rc<T>> {
    VALUES.with_borrow_mut(|values| {
        let value = find(values, id);
        values.retain(|(known, _)| *known != id);
        value
    })
}
