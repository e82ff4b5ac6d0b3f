//! Models of the inbox for loom: every order of events of two or three threads.

mod atomics {
    pub(super) use loom::sync::atomic::{AtomicBool, fence};
    pub(super) use loom::sync::{Mutex, MutexGuard};

    pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
        mutex.lock().expect("no panic")
    }
}
#[path = "inbox.rs"]
#[expect(clippy::duplicate_mod, reason = "the same text over loom's atomics")]
mod inbox;

use inbox::{Inbox, Reader};
use loom::model::Builder;
use loom::sync::Arc;
use loom::sync::atomic::AtomicBool;
use loom::sync::{Condvar, Mutex};
use loom::thread;
use std::sync::atomic::Ordering::Relaxed;

/// What the eventfd is: signals are kept until they are read.
#[derive(Default)]
struct Bell {
    rung: Mutex<bool>,
    changed: Condvar,
}

impl Bell {
    fn ring(&self) {
        *self.rung.lock().expect("no panic") = true;
        self.changed.notify_one();
    }
    fn wait(&self) {
        let mut rung = self.rung.lock().expect("no panic");
        while !*rung {
            rung = self.changed.wait(rung).expect("no panic");
        }
        *rung = false;
    }
}

struct Executor {
    inbox: Inbox<usize>,
    bell: Bell,
    stop: AtomicBool,
}

impl Executor {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            inbox: Inbox::new(),
            bell: Bell::default(),
            stop: AtomicBool::new(false),
        })
    }

    fn push(&self, item: usize) {
        match self.inbox.push(item) {
            Ok(Reader::Sleeps) => self.bell.ring(),
            Ok(Reader::IsAwake) => {}
            Err(_) => panic!("it is open"),
        }
    }

    fn stop(&self) {
        self.stop.store(true, Relaxed);
        if self.inbox.rouse() == Reader::Sleeps {
            self.bell.ring();
        }
    }

    /// One round of the executor: what it was given.
    fn round(&self) -> Vec<usize> {
        if let Some(items) = self.inbox.take() {
            return items;
        }
        if self.inbox.try_sleep() && !self.stop.load(Relaxed) {
            self.bell.wait();
        }
        self.inbox.awake();
        Vec::new()
    }
}

fn check(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(model);
}

/// A lost wake is a deadlock.
#[test]
fn a_sleeper_gets_what_is_pushed_in_order() {
    check(|| {
        let executor = Executor::new();
        let other = Arc::clone(&executor);
        let pusher = thread::spawn(move || (1..3).for_each(|item| other.push(item)));
        let mut got = Vec::new();
        while got.len() < 2 {
            got.extend(executor.round());
        }
        assert_eq!(got, [1, 2]);
        pusher.join().expect("no panic");
    });
}

#[test]
fn items_of_two_threads_arrive_once() {
    check(|| {
        let executor = Executor::new();
        let pushers: Vec<_> = [[1], [2]]
            .into_iter()
            .map(|items| {
                let other = Arc::clone(&executor);
                thread::spawn(move || items.into_iter().for_each(|item| other.push(item)))
            })
            .collect();
        let mut got = Vec::new();
        while got.len() < 2 {
            got.extend(executor.round());
        }
        got.sort_unstable();
        assert_eq!(got, [1, 2]);
        for pusher in pushers {
            pusher.join().expect("no panic");
        }
    });
}

#[test]
fn a_sleeper_sees_what_is_stored_before_it_is_roused() {
    check(|| {
        let executor = Executor::new();
        let other = Arc::clone(&executor);
        let stopper = thread::spawn(move || other.stop());
        while !executor.stop.load(Relaxed) {
            assert!(executor.round().is_empty());
        }
        stopper.join().expect("no panic");
    });
}

#[test]
fn an_item_is_refused_or_left_when_the_inbox_closes() {
    check(|| {
        let executor = Executor::new();
        let other = Arc::clone(&executor);
        let pusher = thread::spawn(move || other.inbox.push(1).is_ok());
        let left = executor.inbox.close();
        let accepted = pusher.join().expect("no panic");
        assert_eq!(left, vec![1; usize::from(accepted)]);
        assert!(executor.inbox.push(2).is_err());
    });
}
