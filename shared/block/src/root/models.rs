//! Models of draining for loom: every order of events of two or three threads. Each thread has an executor that does no more than
//! run its messages and one future.

mod platform;

#[path = "drain.rs"]
#[expect(
    clippy::duplicate_mod,
    dead_code,
    unreachable_pub,
    reason = "the same text over loom's types, for this module only"
)]
mod drain;

use drain::{Thread, Threads, drain};
use loom::cell::UnsafeCell;
use loom::model::Builder;
use loom::thread;
use platform::run;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;

/// Drivers here hold nothing back.
struct Hurried;

struct Shared {
    threads: Threads,
    /// Read by requests, written by who drained: loom tells when both may happen at once.
    edge: UnsafeCell<()>,
}

impl Shared {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            threads: Threads::default(),
            edge: UnsafeCell::new(()),
        })
    }

    fn hurry(&self) -> Hurried {
        Hurried
    }

    /// A request that takes some turns.
    async fn request(&self, thread: &Thread) {
        poll_fn(|cx| {
            if thread.is_paused() {
                thread.wait_for_resume(cx.waker());
                return Poll::Pending;
            }
            thread.begin();
            Poll::Ready(())
        })
        .await;
        self.edge.with(|_| ());
        let mut turns = 3;
        poll_fn(|cx| {
            turns -= 1;
            if turns == 0 {
                return Poll::Ready(());
            }
            cx.waker().wake_by_ref();
            Poll::Pending
        })
        .await;
        self.edge.with(|_| ());
        thread.end();
    }

    /// A thread's whole life at the root.
    async fn serve(self: Arc<Self>, requests: u32) {
        let thread = self.threads.attach();
        for _ in 0..requests {
            self.request(&thread).await;
        }
        self.threads.detach(&thread);
    }

    async fn change(self: &Arc<Self>) {
        let drained = drain(self).await;
        self.edge.with_mut(|_| ());
        drop(drained);
    }
}

fn check(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(model);
}

/// A drain that nobody ends, and a request that nobody resumes, are deadlocks.
#[test]
fn nothing_is_in_flight_while_edges_change() {
    check(|| {
        let root = Shared::new();
        let serving = Arc::clone(&root);
        let serving = thread::spawn(move || run(serving.serve(2)));
        run(async { root.change().await });
        serving.join().expect("no panic");
    });
}

#[test]
fn a_thread_that_drains_waits_for_its_own_requests_too() {
    check(|| {
        let root = Shared::new();
        let serving = Arc::clone(&root);
        let serving = thread::spawn(move || run(serving.serve(1)));
        run(async {
            let thread = root.threads.attach();
            root.request(&thread).await;
            root.change().await;
            root.request(&thread).await;
            root.threads.detach(&thread);
        });
        serving.join().expect("no panic");
    });
}

#[test]
fn drains_of_two_threads_nest() {
    check(|| {
        let root = Shared::new();
        let other = Arc::clone(&root);
        let other = thread::spawn(move || run(async move { two_drains(&other).await }));
        run(Arc::clone(&root).serve(1));
        other.join().expect("no panic");
    });
}

/// The edge may change until the last of both ends.
async fn two_drains(root: &Arc<Shared>) {
    let first = drain(root).await;
    let second = drain(root).await;
    root.edge.with_mut(|_| ());
    drop(first);
    root.edge.with_mut(|_| ());
    drop(second);
}
