//! Models of [`super::RangeLock`] for loom: every order of events of two or three threads.

mod locks {
    pub(super) use loom::sync::{Mutex, MutexGuard};

    pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
        mutex.lock().expect("no panic")
    }
}
#[path = "range.rs"]
#[expect(clippy::duplicate_mod, reason = "the same text over loom's locks")]
mod range;

use loom::cell::UnsafeCell;
use loom::model::Builder;
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;
use range::{RangeGuard, RangeLock};
use std::future::Future;
use std::ops::Range;
use std::pin::pin;
use std::task::{Context, Poll, Wake, Waker};

/// An executor that sleeps: wakes are kept until it looks.
#[derive(Default)]
struct Bell {
    rung: Mutex<bool>,
    changed: Condvar,
}

impl Wake for Bell {
    fn wake(self: std::sync::Arc<Self>) {
        *self.rung.lock().expect("no panic") = true;
        self.changed.notify_one();
    }
}

/// Loom finds a lost wake as a deadlock.
fn block_on<T>(future: impl Future<Output = T>) -> T {
    let bell = std::sync::Arc::new(Bell::default());
    let waker = Waker::from(std::sync::Arc::clone(&bell));
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return output;
        }
        let mut rung = bell.rung.lock().expect("no panic");
        while !*rung {
            rung = bell.changed.wait(rung).expect("no panic");
        }
        *rung = false;
    }
}

/// Bytes that the lock is for: loom tells when two threads use one at once, or do not see each other's changes.
struct Bytes {
    lock: RangeLock,
    bytes: [UnsafeCell<()>; 3],
}

impl Bytes {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            lock: RangeLock::new(),
            bytes: std::array::from_fn(|_| UnsafeCell::new(())),
        })
    }

    fn change(&self, range: Range<u64>, guard: RangeGuard<'_>) {
        for byte in range {
            self.bytes[byte as usize].with_mut(|_| ());
        }
        drop(guard);
    }

    /// Waits for the bytes, changes them, lets them go.
    fn write(&self, range: Range<u64>) {
        let guard = block_on(self.lock.lock(range.clone()));
        self.change(range, guard);
    }

    fn read(&self, range: Range<u64>) {
        let guard = block_on(self.lock.lock_shared(range.clone()));
        for byte in range {
            self.bytes[byte as usize].with(|_| ());
        }
        drop(guard);
    }

    /// Asks for the bytes, and gives up when they are not to be had at once.
    fn write_or_give_up(&self, range: Range<u64>) {
        let bell = std::sync::Arc::new(Bell::default());
        let waker = Waker::from(bell);
        let mut waiting = Box::pin(self.lock.lock(range.clone()));
        let polled = waiting.as_mut().poll(&mut Context::from_waker(&waker));
        if let Poll::Ready(guard) = polled {
            self.change(range, guard);
        }
    }
}

fn check(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound = Some(2);
    builder.check(model);
}

/// Runs the two on threads of their own beside `here`; in the end everything is free.
fn beside(
    first: impl Fn(&Bytes) + Copy + Send + Sync + 'static,
    second: impl Fn(&Bytes) + Copy + Send + Sync + 'static,
    here: impl Fn(&Bytes) + Copy + Send + Sync + 'static,
) {
    check(move || {
        let bytes = Bytes::new();
        let threads = [
            thread::spawn({
                let bytes = Arc::clone(&bytes);
                move || first(&bytes)
            }),
            thread::spawn({
                let bytes = Arc::clone(&bytes);
                move || second(&bytes)
            }),
        ];
        here(&bytes);
        for thread in threads {
            thread.join().expect("no panic");
        }
        assert!(bytes.lock.try_lock(0..3).is_some());
    });
}

#[test]
fn ranges_exclude_and_everybody_has_a_turn() {
    beside(
        |bytes| bytes.write(0..2),
        |bytes| bytes.write(1..3),
        |bytes| bytes.write(0..3),
    );
}

#[test]
fn readers_exclude_a_writer_and_not_each_other() {
    beside(
        |bytes| bytes.read(0..2),
        |bytes| bytes.read(1..3),
        |bytes| bytes.write(1..2),
    );
}

#[test]
fn one_that_gives_up_leaves_nobody_waiting() {
    beside(
        |bytes| bytes.write_or_give_up(0..2),
        |bytes| bytes.write(1..3),
        |bytes| bytes.write(0..3),
    );
}

#[test]
fn a_range_that_is_free_now_is_taken_without_waiting() {
    beside(
        |bytes| {
            if let Some(guard) = bytes.lock.try_lock(0..2) {
                bytes.change(0..2, guard);
            }
        },
        |bytes| bytes.write(1..3),
        |bytes| bytes.read(0..3),
    );
}
