//! A few threads for work that computes for too long to be done between requests: compression,
//! key derivation.
//!
//! ```text
//!   offload(work) ──► queue ──► worker thread ──► answer, wakes the caller's executor
//! ```
//!
//! The threads belong to the process and are made when they are first needed, at most
//! [`MAX_THREADS`] of them, by whoever needs one: under a sandbox that is inherited they are
//! restricted as their maker is. [`retire`] ends those that were made before. Work owns what it
//! works on, so a caller may go away meanwhile. In a simulated world there are no other threads
//! and the work is done at once, to keep the order of events the seed's.

use crate::remote::{Caller, answered};
use crate::sim;
use crate::sync::short_lock;
use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};

/// Most worker threads of a process.
pub const MAX_THREADS: usize = 4;

type Job = Box<dyn FnOnce() + Send>;

struct Pool {
    state: Mutex<State>,
    work: Condvar,
}

struct State {
    jobs: VecDeque<Job>,
    threads: Vec<JoinHandle<()>>,
    /// Threads that wait for work.
    idle: usize,
    /// Threads end when there is nothing to do.
    retiring: bool,
}

static POOL: Pool = Pool {
    state: Mutex::new(State {
        jobs: VecDeque::new(),
        threads: Vec::new(),
        idle: 0,
        retiring: false,
    }),
    work: Condvar::new(),
};

/// The output of `work`, done on a worker thread.
///
/// # Panics
/// When `work` panics.
pub async fn offload<T, W>(work: W) -> T
where
    W: FnOnce() -> T + Send + 'static,
    T: Send + 'static,
{
    if sim::is_current() {
        return work();
    }
    let (caller, answer) = Caller::new();
    POOL.push(Box::new(move || {
        let output = work();
        caller.answer(crate::remote::Answer::Given(output));
    }));
    answered(&answer).await.expect("the work does not panic")
}

/// Ends the worker threads, after what is queued. Later work makes new ones.
pub fn retire() {
    let threads = {
        let mut state = short_lock(&POOL.state);
        state.retiring = true;
        std::mem::take(&mut state.threads)
    };
    POOL.work.notify_all();
    for thread in threads {
        // A panic was reported when it happened.
        let _ = thread.join();
    }
    short_lock(&POOL.state).retiring = false;
}

impl Pool {
    fn push(&'static self, job: Job) {
        let mut state = short_lock(&self.state);
        state.jobs.push_back(job);
        let lacking = state.jobs.len() > state.idle && state.threads.len() < MAX_THREADS;
        if lacking {
            match Builder::new().name("worker".into()).spawn(|| self.serve()) {
                Ok(thread) => state.threads.push(thread),
                Err(_) if state.threads.is_empty() => {
                    // No thread to be had: the caller does it itself.
                    let job = state.jobs.pop_back();
                    drop(state);
                    if let Some(job) = job {
                        job();
                    }
                    return;
                }
                Err(_) => {}
            }
        }
        drop(state);
        self.work.notify_one();
    }

    fn serve(&self) {
        let mut state = short_lock(&self.state);
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                job();
                state = short_lock(&self.state);
            } else if state.retiring {
                return;
            } else {
                state.idle += 1;
                state = self
                    .work
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
                state.idle -= 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::World;
    use crate::{Config, Executor, spawn};
    use std::thread;

    #[test]
    fn work_is_done_elsewhere_and_its_output_comes_back() {
        let executor = Executor::new(&Config::default()).unwrap();
        executor.block_on(async {
            let here = thread::current().id();
            let tasks: Vec<_> = (0..100)
                .map(|number| spawn(offload(move || (number, thread::current().id()))))
                .collect();
            for (number, task) in tasks.into_iter().enumerate() {
                let (output, there) = task.await;
                assert_eq!(output, number);
                assert_ne!(there, here);
            }
            assert!(short_lock(&POOL.state).threads.len() <= MAX_THREADS);
            retire();
            assert!(short_lock(&POOL.state).threads.is_empty());
            assert_eq!(offload(|| 7).await, 7);
        });
    }

    #[test]
    fn a_simulated_world_has_no_other_threads() {
        let executor = Executor::simulated(&World::new(sim::Config::default()));
        executor.block_on(async {
            let here = thread::current().id();
            assert_eq!(offload(|| thread::current().id()).await, here);
        });
    }

    #[test]
    fn a_caller_that_goes_away_leaves_the_work_to_its_end() {
        let executor = Executor::new(&Config::default()).unwrap();
        executor.block_on(async {
            let (sender, receiver) = std::sync::mpsc::channel();
            let mut left = Box::pin(offload(move || sender.send(1).unwrap()));
            let polled = std::future::poll_fn(|context| {
                std::task::Poll::Ready(left.as_mut().poll(context).is_ready())
            });
            polled.await;
            drop(left);
            assert_eq!(receiver.recv(), Ok(1));
        });
    }
}
