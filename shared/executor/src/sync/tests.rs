use super::*;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};

/// Counts wakes.
#[derive(Default)]
struct Count(AtomicUsize);

impl Wake for Count {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// A future that is polled by hand.
struct Probe<'a, T> {
    future: Pin<Box<dyn Future<Output = T> + 'a>>,
    wakes: Arc<Count>,
}

impl<'a, T> Probe<'a, T> {
    fn new(future: impl Future<Output = T> + 'a) -> Self {
        Probe {
            future: Box::pin(future),
            wakes: Arc::default(),
        }
    }

    fn poll(&mut self) -> Option<T> {
        let waker = Waker::from(Arc::clone(&self.wakes));
        match self.future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(output) => Some(output),
            Poll::Pending => None,
        }
    }

    fn woken(&self) -> bool {
        self.wakes.0.load(Ordering::SeqCst) > 0
    }
}

#[test]
fn a_mutex_is_handed_over_in_order_of_arrival() {
    let mutex = Mutex::new(0);
    let guard = mutex.try_lock().unwrap();
    let mut first = Probe::new(mutex.lock());
    let mut second = Probe::new(mutex.lock());
    assert!(first.poll().is_none() && second.poll().is_none());
    drop(guard);
    assert!(first.woken() && !second.woken());
    // It is the first waiter's now: neither the second nor a newcomer gets it.
    assert!(mutex.try_lock().is_none());
    assert!(second.poll().is_none());
    let mut guard = first.poll().unwrap();
    *guard += 1;
    drop(guard);
    assert_eq!(*second.poll().unwrap(), 1);
    assert!(mutex.try_lock().is_some());
}

#[test]
fn a_waiter_that_goes_away_passes_its_turn_on() {
    let mutex = Mutex::new(());
    for granted in [false, true] {
        let guard = mutex.try_lock().unwrap();
        let mut first = Probe::new(mutex.lock());
        let mut second = Probe::new(mutex.lock());
        assert!(first.poll().is_none() && second.poll().is_none());
        if granted {
            drop(guard);
            assert!(first.woken() && !second.woken());
            drop(first);
        } else {
            drop(first);
            drop(guard);
        }
        assert!(second.woken());
        drop(second.poll().unwrap());
        assert!(mutex.try_lock().is_some());
    }
}

#[test]
fn a_semaphore_never_gives_more_permits_than_it_has() {
    let semaphore = Semaphore::new(2);
    let first = semaphore.try_acquire().unwrap();
    let second = semaphore.try_acquire().unwrap();
    let mut third = Probe::new(semaphore.acquire());
    let mut fourth = Probe::new(semaphore.acquire());
    assert!(third.poll().is_none() && fourth.poll().is_none());
    drop(first);
    let third = third.poll().unwrap();
    assert!(fourth.poll().is_none());
    drop((second, third));
    assert!(fourth.poll().is_some());
}

#[test]
fn overlapping_ranges_wait_in_order_and_others_do_not() {
    let lock = RangeLock::new();
    let held = lock.try_lock(10..20).unwrap();
    let mut across = Probe::new(lock.lock(15..25));
    assert!(across.poll().is_none());
    // Behind the waiter, though nobody holds it yet.
    let mut behind = Probe::new(lock.lock(22..30));
    assert!(behind.poll().is_none());
    assert!(lock.try_lock(24..26).is_none());
    let apart = lock.try_lock(0..10).unwrap();
    let empty = lock.try_lock(12..12).unwrap();
    drop((apart, empty));
    drop(held);
    assert!(across.woken() && !behind.woken());
    let across = across.poll().unwrap();
    drop(across);
    assert!(behind.woken());
    drop(behind.poll().unwrap());
    assert!(lock.try_lock(0..100).is_some());
}

#[test]
fn shared_ranges_overlap_but_do_not_overtake_an_exclusive_one() {
    let lock = RangeLock::new();
    let first = Probe::new(lock.lock_shared(0..10)).poll().unwrap();
    let second = lock.try_lock_shared(5..15).unwrap();
    let mut exclusive = Probe::new(lock.lock(8..9));
    assert!(exclusive.poll().is_none());
    let mut late = Probe::new(lock.lock_shared(0..10));
    assert!(late.poll().is_none());
    drop(first);
    assert!(!exclusive.woken());
    drop(second);
    assert!(exclusive.woken() && !late.woken());
    drop(exclusive.poll().unwrap());
    assert!(late.poll().is_some());
}

#[test]
fn a_range_waiter_that_goes_away_lets_those_behind_it_in() {
    for granted in [false, true] {
        let lock = RangeLock::new();
        let held = lock.try_lock(0..5).unwrap();
        let mut waiting = Probe::new(lock.lock(0..10));
        assert!(waiting.poll().is_none());
        let mut behind = Probe::new(lock.lock(5..10));
        assert!(behind.poll().is_none());
        if granted {
            drop(held);
            drop(waiting);
        } else {
            drop(waiting);
            drop(held);
        }
        assert!(behind.woken());
        drop(behind.poll().unwrap());
        assert!(lock.try_lock(0..10).is_some());
    }
}

#[test]
fn a_notification_after_the_call_is_not_missed() {
    let notify = Notify::new();
    let mut before = Probe::new(notify.notified());
    notify.notify_all();
    assert!(before.poll().is_some());
    let mut after = Probe::new(notify.notified());
    assert!(after.poll().is_none());
    drop(Probe::new(notify.notified()));
    notify.notify_all();
    assert!(after.woken() && after.poll().is_some());
}

#[test]
fn a_latch_stays_set_for_those_who_come_later() {
    let latch = Latch::new();
    let mut early = Probe::new(latch.wait());
    assert!(early.poll().is_none() && !latch.is_set());
    latch.set();
    latch.set();
    assert!(early.woken() && early.poll().is_some());
    assert!(Probe::new(latch.wait()).poll().is_some() && latch.is_set());
}
