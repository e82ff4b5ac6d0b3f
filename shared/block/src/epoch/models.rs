//! Models of the epochs for loom: every order of events of two or three threads. Fences stand in for
//! `membarrier`, which makes them where the other side has none.

mod atomics {
    pub(super) use loom::sync::atomic::{AtomicU64, AtomicUsize, fence};
}
#[path = "clock.rs"]
#[expect(clippy::duplicate_mod, reason = "the same text over loom's atomics")]
mod clock;

use clock::{Clock, Pins};
use loom::cell::UnsafeCell;
use loom::model::Builder;
use loom::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, fence};
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};

/// A cluster that requests find while it is mapped.
struct World {
    clock: Clock,
    threads: [Pins; 2],
    /// Who holds it moves the clock.
    moving: Mutex<()>,
    mapped: AtomicBool,
    /// Read by requests, written by whoever uses it again: loom tells when both may happen at once.
    cluster: UnsafeCell<()>,
    /// A request ended that somebody waits for.
    ended: Mutex<bool>,
    told: Condvar,
}

impl World {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            clock: Clock {
                epoch: AtomicU64::new(1),
                waiting: AtomicUsize::new(0),
            },
            threads: Default::default(),
            moving: Mutex::new(()),
            mapped: AtomicBool::new(true),
            cluster: UnsafeCell::new(()),
            ended: Mutex::new(false),
            told: Condvar::new(),
        })
    }

    fn enter(&self, thread: usize) -> usize {
        self.threads[thread].enter(&self.clock, || fence(SeqCst))
    }

    fn look(&self) {
        if self.mapped.load(Relaxed) {
            self.cluster.with(|_| ());
        }
    }

    fn leave(&self, thread: usize, parity: usize) {
        if self.threads[thread].leave(parity, &self.clock, || fence(SeqCst)) {
            *self.ended.lock().expect("no panic") = true;
            self.told.notify_all();
        }
    }

    fn request(&self, thread: usize) {
        let parity = self.enter(thread);
        self.look();
        self.leave(thread, parity);
    }

    fn unmap(&self) -> u64 {
        self.mapped.store(false, Relaxed);
        self.clock.now()
    }

    fn passed(&self, epoch: u64) -> bool {
        let barrier = || {
            fence(SeqCst);
            true
        };
        self.clock.is_past(epoch) || {
            let _moving = self.moving.lock().expect("no panic");
            self.clock.advance(self.threads.iter(), epoch, barrier)
        }
    }

    fn use_again_if_passed(&self, epoch: u64) {
        if self.passed(epoch) {
            self.cluster.with_mut(|_| ());
        }
    }
}

fn check(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(model);
}

#[test]
fn no_request_sees_a_cluster_that_is_used_again() {
    check(|| {
        let world = World::new();
        let other = Arc::clone(&world);
        let requests = thread::spawn(move || {
            other.request(0);
            other.request(0);
        });
        let freed = world.unmap();
        world.use_again_if_passed(freed);
        requests.join().expect("no panic");
    });
}

#[test]
fn requests_that_overlap_on_a_thread_are_all_waited_for() {
    check(|| {
        let world = World::new();
        let other = Arc::clone(&world);
        let requests = thread::spawn(move || {
            let first = other.enter(0);
            let second = other.enter(0);
            other.leave(0, first);
            other.look();
            other.leave(0, second);
        });
        let freed = world.unmap();
        world.use_again_if_passed(freed);
        requests.join().expect("no panic");
    });
}

#[test]
fn a_clock_that_others_move_is_not_past_too_soon() {
    check(|| {
        let world = World::new();
        let (reader, mover) = (Arc::clone(&world), Arc::clone(&world));
        let reader = thread::spawn(move || reader.request(0));
        let mover = thread::spawn(move || {
            mover.passed(1);
        });
        let freed = world.unmap();
        world.use_again_if_passed(freed);
        reader.join().expect("no panic");
        mover.join().expect("no panic");
    });
}

/// A request whose end nobody tells is a deadlock.
#[test]
fn who_waits_is_told_of_the_last_request() {
    check(|| {
        let world = World::new();
        let other = Arc::clone(&world);
        let requests = thread::spawn(move || other.request(0));
        let freed = world.unmap();
        world.clock.wait();
        while !world.passed(freed) {
            let mut ended = world.ended.lock().expect("no panic");
            while !*ended {
                ended = world.told.wait(ended).expect("no panic");
            }
            *ended = false;
        }
        world.clock.waited();
        world.cluster.with_mut(|_| ());
        requests.join().expect("no panic");
    });
}
