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
    let mut first = Probe::new(lock.lock(15..25));
    let mut second = Probe::new(lock.lock(18..22));
    assert!(first.poll().is_none() && second.poll().is_none());
    let apart = lock.try_lock(0..10).unwrap();
    let empty = lock.try_lock(12..12).unwrap();
    drop((apart, empty));
    drop(held);
    assert!(first.woken() && !second.woken());
    // It is the first waiter's now.
    assert!(lock.try_lock(24..26).is_none());
    drop(first.poll().unwrap());
    assert!(second.woken());
    drop(second.poll().unwrap());
    assert!(lock.try_lock(0..100).is_some());
}

#[test]
fn a_range_that_only_a_waiter_asked_for_is_free() {
    let lock = RangeLock::new();
    let held = lock.try_lock(10..20).unwrap();
    let mut across = Probe::new(lock.lock(15..25));
    assert!(across.poll().is_none());
    let overtaking = lock.try_lock(22..30).unwrap();
    drop(held);
    assert!(across.poll().is_none());
    drop(overtaking);
    assert!(across.woken() && across.poll().is_some());
}

#[test]
fn a_waiter_is_overtaken_a_limited_number_of_times() {
    let lock = RangeLock::new();
    let mut held = lock.try_lock(0..10).unwrap();
    let mut patient = Probe::new(lock.lock(0..20));
    assert!(patient.poll().is_none());
    let mut overtaken = 0;
    // There is always one that holds a part of what it waits for.
    let mut late = loop {
        let range = match overtaken % 2 {
            0 => 10..20,
            _ => 0..10,
        };
        let mut newcomer = Probe::new(lock.lock_shared(range));
        let Some(next) = newcomer.poll() else {
            break newcomer;
        };
        held = next;
        overtaken += 1;
        assert!(overtaken <= 100 && patient.poll().is_none());
    };
    drop(held);
    assert!(patient.woken() && !late.woken());
    drop(patient.poll().unwrap());
    assert!(late.poll().is_some());
}

#[test]
fn shared_ranges_overlap_and_exclude_exclusive_ones() {
    let lock = RangeLock::new();
    let first = Probe::new(lock.lock_shared(0..10)).poll().unwrap();
    let second = lock.try_lock_shared(5..15).unwrap();
    let mut exclusive = Probe::new(lock.lock(8..9));
    assert!(exclusive.poll().is_none());
    drop(first);
    assert!(!exclusive.woken());
    drop(second);
    assert!(exclusive.woken());
    let mut late = Probe::new(lock.lock_shared(0..10));
    assert!(late.poll().is_none());
    drop(exclusive.poll().unwrap());
    assert!(late.poll().is_some());
}

/// Requests come and go at random: nothing that excludes each other is held at once, nobody is
/// overtaken for ever, and when the holders go all go on.
#[test]
fn ranges_exclude_and_nobody_starves_whatever_the_order() {
    type Held<'a> = (std::ops::Range<u64>, bool, RangeGuard<'a>);
    for seed in 1..=100_u64 {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut random = move |below: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % below
        };
        let lock = RangeLock::new();
        let mut waiting = Vec::new();
        let mut held: Vec<Held<'_>> = Vec::new();
        for _ in 0..400 {
            if random(3) > 0 && waiting.len() < 24 {
                let start = random(40);
                let range = start..start + 1 + random(12);
                let shared = random(3) == 0;
                let probe = match shared {
                    true => Probe::new(lock.wait(range.clone(), range::Access::Shared)),
                    false => Probe::new(lock.wait(range.clone(), range::Access::Exclusive)),
                };
                waiting.push((range, shared, 0_u32, probe));
            } else if !held.is_empty() {
                held.swap_remove(random(held.len() as u64) as usize);
            }
            let mut index = 0;
            while index < waiting.len() {
                let Some(guard) = waiting[index].3.poll() else {
                    index += 1;
                    continue;
                };
                let (range, shared, ..) = waiting.remove(index);
                for earlier in &mut waiting[..index] {
                    let overlaps = earlier.0.start < range.end && range.start < earlier.0.end;
                    earlier.2 += u32::from(overlaps && !(earlier.1 && shared));
                    assert!(earlier.2 <= range::PATIENCE, "seed {seed}");
                }
                for (other, other_shared, _) in &held {
                    let overlaps = other.start < range.end && range.start < other.end;
                    assert!(!overlaps || (shared && *other_shared), "seed {seed}");
                }
                held.push((range, shared, guard));
            }
        }
        while !waiting.is_empty() || !held.is_empty() {
            let before = waiting.len();
            assert!(!held.is_empty(), "seed {seed}: all wait and nobody holds");
            held.clear();
            waiting.retain_mut(|(range, shared, _, probe)| match probe.poll() {
                Some(guard) => {
                    held.push((range.clone(), *shared, guard));
                    false
                }
                None => true,
            });
            assert!(waiting.len() < before || before == 0, "seed {seed}");
        }
    }
}

#[test]
fn a_range_waiter_that_goes_away_lets_those_behind_it_in() {
    for granted in [false, true] {
        let lock = RangeLock::new();
        let held = lock.try_lock(0..5).unwrap();
        let mut waiting = Probe::new(lock.lock(0..10));
        assert!(waiting.poll().is_none());
        let mut behind = Probe::new(lock.lock(4..8));
        assert!(behind.poll().is_none());
        if granted {
            drop(held);
            assert!(!behind.woken());
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
