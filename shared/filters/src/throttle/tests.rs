//! Requests of several members on the simulated clock.

use super::group::{Member, ThrottleGroup};
use super::limits::{Direction, ThrottleLimits};
use executor::sim::{Config, World};
use executor::{Executor, IoThread, IoThreadOptions, time};
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

fn limits(members: &[(&str, i64)]) -> ThrottleLimits {
    let mut limits = ThrottleLimits::default();
    for (name, value) in members {
        limits.set(name, *value).unwrap();
    }
    limits.check().unwrap();
    limits
}

fn group(members: &[(&str, i64)]) -> Arc<ThrottleGroup> {
    Arc::new(ThrottleGroup::new(limits(members)))
}

async fn pass(member: &Member, direction: Direction, bytes: u64) {
    if !member.try_admit(direction, bytes) {
        member.admit(direction, bytes).await;
    }
}

fn simulated<T>(test: impl Future<Output = T>) -> T {
    Executor::simulated(&World::new(Config::default())).block_on(test)
}

/// What went ahead: the member's number, and when.
type Log = Rc<RefCell<Vec<(usize, Duration)>>>;

/// Starts `count` reads of 512 bytes of a member at once.
fn start(log: &Log, (number, member): (usize, &Rc<Member>), count: usize) {
    for _ in 0..count {
        let (log, member) = (Rc::clone(log), Rc::clone(member));
        drop(executor::spawn(async move {
            pass(&member, Direction::Read, 512).await;
            log.borrow_mut().push((number, time::now()));
        }));
    }
}

async fn logged(log: &Log, count: usize) {
    while log.borrow().len() < count {
        time::sleep(Duration::from_millis(10)).await;
    }
}

#[test]
fn members_take_turns_however_many_requests_they_have() {
    simulated(async {
        let group = group(&[("iops-total", 10)]);
        let members = [(); 3].map(|()| Rc::new(Member::new(Arc::clone(&group))));
        let log = Log::default();
        for (member, count) in members.iter().enumerate().zip([40, 10, 10]) {
            start(&log, member, count);
        }
        logged(&log, 60).await;
        let log = log.borrow();
        // While all have requests each gets its share; the first ones went ahead unlimited.
        let shared = &log[2..29];
        for number in 0..3 {
            let share = shared.iter().filter(|(other, _)| *other == number).count();
            assert_eq!(share, 9, "of member {number} in {shared:?}");
        }
        let taken = log[59].1 - log[0].1;
        let expected = Duration::from_millis(5800);
        assert!(
            taken.abs_diff(expected) < Duration::from_millis(20),
            "{taken:?}"
        );
    });
}

#[test]
fn without_limits_nothing_waits() {
    simulated(async {
        let group = group(&[("bps-write", 1)]);
        let member = Member::new(group);
        assert!((0..1000).all(|_| member.try_admit(Direction::Read, 1 << 20)));
    });
}

#[test]
fn new_limits_are_obeyed_by_requests_that_wait_already() {
    simulated(async {
        let group = group(&[("bps-total", 1)]);
        let member = Rc::new(Member::new(Arc::clone(&group)));
        let log = Log::default();
        start(&log, (0, &member), 5);
        logged(&log, 1).await;
        let before = time::now();
        group.set_limits(limits(&[("bps-total", 0)]));
        logged(&log, 5).await;
        assert!(time::now() - before < Duration::from_millis(100));
    });
}

#[test]
fn a_dropped_request_gives_its_turn_away() {
    simulated(async {
        let group = group(&[("iops-total", 10)]);
        let member = Rc::new(Member::new(group));
        let log = Log::default();
        start(&log, (0, &member), 2);
        logged(&log, 2).await;
        let begun = time::now();
        let impatient = Rc::clone(&member);
        // Its turn is next when it goes away.
        let dropped = executor::spawn(async move {
            let wait = impatient.admit(Direction::Read, 512);
            time::timeout(Duration::from_millis(20), wait).await
        });
        start(&log, (1, &member), 1);
        assert_eq!(dropped.await, None);
        logged(&log, 3).await;
        assert!(time::now() - begun < Duration::from_millis(150));
    });
}

#[test]
fn a_drain_lets_its_member_alone_go_ahead() {
    simulated(async {
        let group = group(&[("iops-total", 1)]);
        let members = [(); 2].map(|()| Rc::new(Member::new(Arc::clone(&group))));
        let log = Log::default();
        for member in members.iter().enumerate() {
            start(&log, member, 5);
        }
        logged(&log, 1).await;
        let before = time::now();
        members[0].hurry();
        logged(&log, 5).await;
        assert!(time::now() - before < Duration::from_millis(100));
        assert!(members[0].try_admit(Direction::Read, 512));
        members[0].relax();
        assert!(!members[0].try_admit(Direction::Read, 512));
        let others = log
            .borrow()
            .iter()
            .filter(|(number, _)| *number == 1)
            .count();
        assert!(others <= 1, "{others}");
    });
}

#[test]
fn threads_share_the_limits_of_their_group() {
    let group = group(&[("iops-total", 1000)]);
    let threads: Vec<_> = (0..3)
        .map(|number| IoThread::start(&format!("t{number}"), IoThreadOptions::default()).unwrap())
        .collect();
    let admitted = Arc::new(AtomicU64::new(0));
    let begun = std::time::Instant::now();
    Executor::new(&executor::Config::default())
        .unwrap()
        .block_on(async {
            let done = Arc::new(executor::sync::Notify::new());
            for thread in &threads {
                let (group, admitted, done) =
                    (Arc::clone(&group), Arc::clone(&admitted), Arc::clone(&done));
                thread.handle().spawn(move || async move {
                    let member = Member::new(group);
                    for _ in 0..100 {
                        pass(&member, Direction::Write, 512).await;
                        admitted.fetch_add(1, Ordering::AcqRel);
                    }
                    done.notify_all();
                });
            }
            loop {
                let more = done.notified();
                if admitted.load(Ordering::Acquire) == 300 {
                    break;
                }
                more.await;
            }
        });
    // 300 operations at 1000 a second, less what a tenth of a second takes.
    assert!(begun.elapsed() >= Duration::from_millis(190));
}
