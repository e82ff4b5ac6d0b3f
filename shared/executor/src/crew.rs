//! A crew: threads with executors of their own that share a queue of work, beside the thread that
//! gives it to them.
//!
//! ```text
//!   call(work) ──► queue ──► a thread's task ──► work(its context) ──► answer, wakes the caller
//! ```
//!
//! Each thread makes a context of its own, on its own executor: what cannot leave a thread (a handle
//! of a root) lives there. A thread carries out a few pieces at a time, so that it goes on while one
//! waits for I/O. Promises: work that was taken is done to its end or dropped with the crew, and the
//! caller is answered; dropping the crew ends the threads. A caller may go away meanwhile. Unlike
//! [`crate::workers`], whose threads only compute, these do I/O: they are for tools that have the
//! processors for themselves.

use crate::remote::{Answer, Caller, answered};
use crate::sync::{Notify, short_lock};
use crate::{IoThread, IoThreadOptions, spawn};
use std::cell::Cell;
use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, Mutex};

/// Pieces of work that one thread has in hand at a time.
const IN_HAND: usize = 4;

type Work<C> = Box<dyn FnOnce(Rc<C>) -> Pin<Box<dyn Future<Output = ()>>> + Send>;

struct Queue<C> {
    work: Mutex<VecDeque<Work<C>>>,
    arrived: Notify,
}

/// Threads that work with a `C` each.
pub struct Crew<C: 'static> {
    queue: Arc<Queue<C>>,
    /// Ended when dropped.
    threads: Vec<IoThread>,
    /// Pieces that were given and not answered.
    given: Cell<usize>,
}

impl<C: 'static> Crew<C> {
    /// Starts `count` threads, each with what `make` makes there.
    ///
    /// # Errors
    /// The host's, of a thread or its ring.
    pub fn start(
        name: &str,
        count: usize,
        make: impl Fn() -> C + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let queue = Arc::new(Queue {
            work: Mutex::default(),
            arrived: Notify::new(),
        });
        let make = Arc::new(make);
        let mut threads = Vec::new();
        for _ in 0..count {
            let thread = IoThread::start(name, IoThreadOptions::default())?;
            let (queue, make) = (Arc::clone(&queue), Arc::clone(&make));
            thread.handle().spawn(move || async move {
                let context = Rc::new(make());
                for _ in 0..IN_HAND {
                    drop(spawn(serve(Arc::clone(&queue), Rc::clone(&context))));
                }
            });
            threads.push(thread);
        }
        Ok(Self {
            queue,
            threads,
            given: Cell::new(0),
        })
    }

    /// Whether a thread would take more work at once.
    pub fn has_room(&self) -> bool {
        self.given.get() < self.threads.len() * IN_HAND
    }

    /// The output of `work`, done by one of the threads; `None` when the thread has ended.
    pub async fn call<T, W, F>(&self, work: W) -> Option<T>
    where
        W: FnOnce(Rc<C>) -> F + Send + 'static,
        F: Future<Output = T> + 'static,
        T: Send + 'static,
    {
        let (caller, answer) = Caller::new();
        let work: Work<C> = Box::new(move |context| {
            // `caller` is part of the future, so that it answers when that is dropped, too.
            let future = work(context);
            Box::pin(async move {
                let output = future.await;
                caller.answer(Answer::Given(output));
            })
        });
        let _counted = Counted::new(&self.given);
        short_lock(&self.queue.work).push_back(work);
        self.queue.arrived.notify_all();
        answered(&answer).await
    }
}

impl<C: 'static> Drop for Crew<C> {
    fn drop(&mut self) {
        // Whoever gave it is gone.
        short_lock(&self.queue.work).clear();
    }
}

/// Counts a piece of work as long as its caller waits.
struct Counted<'c>(&'c Cell<usize>);

impl<'c> Counted<'c> {
    fn new(count: &'c Cell<usize>) -> Self {
        count.set(count.get() + 1);
        Self(count)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

/// One piece of work after the other, as long as the executor lives.
async fn serve<C: 'static>(queue: Arc<Queue<C>>, context: Rc<C>) {
    loop {
        let arrived = queue.arrived.notified();
        let work = short_lock(&queue.work).pop_front();
        match work {
            Some(work) => work(Rc::clone(&context)).await,
            None => arrived.await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::Latch;
    use crate::{Config, Executor};
    use std::future::poll_fn;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Poll;
    use std::thread;

    #[test]
    fn work_is_done_with_the_context_of_another_thread() {
        let executor = Executor::new(&Config::default()).unwrap();
        executor.block_on(async {
            let here = thread::current().id();
            let crew =
                Crew::start("crew", 2, || (thread::current().id(), Cell::new(0_u32))).unwrap();
            let mut most = 0;
            for number in 0..200 {
                let work = move |context: Rc<(thread::ThreadId, Cell<u32>)>| async move {
                    assert_eq!(context.0, thread::current().id());
                    context.1.set(context.1.get() + 1);
                    (number, context.0, context.1.get())
                };
                let (answer, there, count) = crew.call(work).await.unwrap();
                assert_eq!(answer, number);
                assert_ne!(there, here);
                most = most.max(count);
            }
            assert!(most >= 100, "one of two threads did at least half: {most}");
        });
    }

    #[test]
    fn a_crew_says_when_it_has_enough_to_do() {
        let executor = Executor::new(&Config::default()).unwrap();
        executor.block_on(async {
            let crew = Crew::start("crew", 1, || ()).unwrap();
            let held = Arc::new(Latch::new());
            let mut calls: Vec<_> = (0..IN_HAND)
                .map(|_| {
                    let held = Arc::clone(&held);
                    Box::pin(crew.call(move |_| async move { held.wait().await }))
                })
                .collect();
            for call in &mut calls {
                assert!(crew.has_room());
                let begun = poll_fn(|context| Poll::Ready(call.as_mut().poll(context).is_ready()));
                assert!(!begun.await);
            }
            assert!(!crew.has_room());
            held.set();
            for call in calls {
                assert_eq!(call.await, Some(()));
            }
            assert!(crew.has_room());
        });
    }

    #[test]
    fn a_crew_that_is_dropped_ends_its_threads_and_drops_their_contexts() {
        static ALIVE: AtomicUsize = AtomicUsize::new(0);
        struct Alive;
        impl Drop for Alive {
            fn drop(&mut self) {
                ALIVE.fetch_sub(1, Ordering::SeqCst);
            }
        }
        let executor = Executor::new(&Config::default()).unwrap();
        executor.block_on(async {
            let make = || {
                ALIVE.fetch_add(1, Ordering::SeqCst);
                Alive
            };
            let crew = Crew::start("crew", 3, make).unwrap();
            assert_eq!(crew.call(|_| async { 1 }).await, Some(1));
            drop(crew);
            assert_eq!(ALIVE.load(Ordering::SeqCst), 0);
        });
    }
}
