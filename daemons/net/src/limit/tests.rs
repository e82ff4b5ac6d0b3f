//! Buckets under a clock of the tests' own.

use std::sync::atomic::{AtomicU64, Ordering};

use super::*;

fn bytes(bytes: u64, burst: u64) -> RateOptions {
    RateOptions {
        bytes: Some(bytes),
        bytes_burst: Some(burst),
        ..RateOptions::default()
    }
}

/// Takes as much as it gets for `seconds` in frames of `size`, waiting as long as it is told. Gives the bytes taken.
fn run(limits: &Limits, start: Instant, seconds: u64, size: u64) -> u64 {
    let end = start + Duration::from_secs(seconds);
    let (mut now, mut taken) = (start, 0);
    while now < end {
        match limits.take(1, size, now) {
            Ok(()) => taken += size,
            Err(wait) => {
                assert!(wait > Duration::ZERO);
                now += wait;
            }
        }
    }
    taken
}

#[test]
fn the_average_keeps_to_the_rate_whatever_the_size_of_frames() {
    for size in [60, 1_514, 65_535] {
        let limits = Limits::new(&bytes(1_000_000, 100_000));
        let taken = run(&limits, Instant::now(), 100, size);
        let expected = 100 * 1_000_000 + 100_000;
        // One frame of debt, and the rounding of waits to whole nanoseconds.
        let difference = taken.abs_diff(expected);
        assert!(
            difference <= size + 1_000,
            "{size}: {taken} against {expected}"
        );
    }
}

#[test]
fn very_high_and_very_low_rates_are_kept() {
    let limits = Limits::new(&bytes(12_500_000_000, 1_000_000));
    let start = Instant::now();
    let mut now = start;
    for _ in 0..200_000 {
        while let Err(wait) = limits.take(1, 64, now) {
            now += wait;
        }
    }
    let rate = (12_800_000.0 - 1e6) / (now - start).as_secs_f64();
    assert!((rate / 12.5e9 - 1.0).abs() < 0.02, "{rate}");

    let limits = Limits::new(&bytes(1, 1));
    let now = Instant::now();
    limits.take(32, 32 * 65_535, now).unwrap();
    let wait = limits.take(1, 1, now).unwrap_err();
    assert_eq!(wait.as_secs(), 32 * 65_535 - 1);
}

#[test]
fn packets_are_limited_beside_bytes() {
    let limits = Limits::new(&RateOptions {
        bytes: Some(1 << 40),
        packets: Some(1_000),
        packets_burst: Some(10),
        ..RateOptions::default()
    });
    let now = Instant::now();
    // The eleventh finds the bucket empty, not in debt.
    for _ in 0..11 {
        limits.take(1, 60, now).unwrap();
    }
    assert_eq!(limits.take(1, 60, now), Err(Duration::from_millis(1)));
    assert!(limits.take(1, 60, now + Duration::from_millis(1)).is_ok());
}

#[test]
fn what_is_refused_takes_nothing() {
    let limits = Limits::new(&RateOptions {
        packets: Some(1),
        packets_burst: Some(1),
        ..bytes(1_000, 1_000)
    });
    let now = Instant::now();
    limits.take(10, 10, now).unwrap();
    for _ in 0..1_000 {
        assert_eq!(limits.take(1, 1_000, now), Err(Duration::from_secs(9)));
    }
    // Bytes were left all the time: only the packets' debt is waited for.
    assert!(limits.take(1, 1, now + Duration::from_secs(9)).is_ok());
}

#[test]
fn no_rate_is_no_limit() {
    for rate in [
        RateOptions::default(),
        RateOptions {
            bytes: Some(0),
            ..RateOptions::default()
        },
    ] {
        let limits = Limits::new(&rate);
        let now = Instant::now();
        for _ in 0..1_000 {
            limits.take(32, u64::MAX / 2, now).unwrap();
        }
        assert_eq!(limits.rate(), RateOptions::default());
    }
}

#[test]
fn a_pause_fills_the_bucket_and_no_more() {
    let limits = Limits::new(&bytes(1_000, 500));
    let later = Instant::now() + Duration::from_secs(3_600);
    limits.take(1, 500, later).unwrap();
    limits.take(1, 1, later).unwrap();
    assert_eq!(limits.take(1, 1, later), Err(Duration::from_millis(1)));
}

#[test]
fn a_debt_outlives_a_change_and_is_paid_at_the_new_rate() {
    let limits = Limits::new(&bytes(1_000, 1_000));
    let now = limits.own.epoch;
    limits.take(1, 5_000, now).unwrap();
    assert_eq!(limits.take(1, 1, now), Err(Duration::from_secs(4)));
    limits.own.set_at(&bytes(4_000, 1_000), now);
    assert_eq!(limits.take(1, 1, now), Err(Duration::from_secs(1)));
    limits.own.set_at(&bytes(2_000, 500), now);
    assert_eq!(limits.take(1, 1, now), Err(Duration::from_secs(2)));
    limits.own.set_at(&RateOptions::default(), now);
    assert!(limits.take(1, 1_000_000, now).is_ok());
    assert_eq!(limits.rate(), RateOptions::default());
}

#[test]
fn setting_the_same_rate_again_gives_no_new_burst() {
    let limits = Limits::new(&bytes(1_000, 1_000));
    let now = limits.own.epoch;
    limits.take(1, 1_000, now).unwrap();
    for _ in 0..10 {
        limits.own.set_at(&bytes(1_000, 1_000), now);
    }
    limits.take(1, 1, now).unwrap();
    assert_eq!(limits.take(1, 1, now), Err(Duration::from_millis(1)));
}

#[test]
fn ports_of_a_group_share_one_rate_and_keep_their_own() {
    let group = Arc::new(Group::new(&bytes(1_000_000, 10_000)));
    let slow = Limits::in_group(&bytes(100_000, 1_000), Arc::clone(&group));
    let fast = Limits::in_group(&RateOptions::default(), group);
    let start = Instant::now();
    let end = start + Duration::from_secs(10);
    let mut taken = [0, 0];
    let mut now = start;
    while now < end {
        for (limits, taken) in [&slow, &fast].into_iter().zip(&mut taken) {
            while limits.take(1, 100, now).is_ok() {
                *taken += 100_u64;
            }
        }
        now += Duration::from_millis(1);
    }
    let [slow, fast] = taken;
    assert!(slow <= 1_001_200, "{slow}");
    assert!((slow + fast).abs_diff(10_010_000) < 10_000, "{slow} {fast}");
}

#[test]
fn threads_of_a_group_together_keep_to_its_rate() {
    const THREADS: u64 = 4;
    const SIZE: u64 = 1_000;
    let group = Arc::new(Group::new(&bytes(1_000_000, 10_000)));
    let start = group.epoch;
    // The clock is what all threads have waited for together.
    let clock = AtomicU64::new(0);
    let taken = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            let limits = Limits::in_group(&RateOptions::default(), Arc::clone(&group));
            let (clock, taken) = (&clock, &taken);
            scope.spawn(move || {
                loop {
                    let at = clock.load(Ordering::SeqCst);
                    if at >= 10_000_000_000 {
                        return;
                    }
                    match limits.take(1, SIZE, start + Duration::from_nanos(at)) {
                        Ok(()) => taken.fetch_add(SIZE, Ordering::SeqCst),
                        Err(wait) => {
                            let next = at + u64::try_from(wait.as_nanos()).unwrap();
                            clock.fetch_max(next, Ordering::SeqCst)
                        }
                    };
                }
            });
        }
    });
    let taken = taken.into_inner();
    let expected = 10 * 1_000_000 + 10_000;
    let difference = taken.abs_diff(expected);
    assert!(difference <= (THREADS + 1) * SIZE, "{taken}");
}

#[test]
fn a_change_wakes_whoever_waits() {
    let executor = executor::Executor::new(&executor::Config::default()).unwrap();
    executor.block_on(async {
        let group = Arc::new(Group::new(&RateOptions::default()));
        let limits = Arc::new(Limits::in_group(&bytes(1, 1), Arc::clone(&group)));
        for change in [0, 1] {
            let waiting = Arc::clone(&limits);
            let waiter = executor::spawn(async move {
                waiting.until(Duration::from_secs(3_600)).await;
            });
            executor::time::yield_now().await;
            match change {
                0 => limits.set(&RateOptions::default()),
                _ => group.set(&bytes(10, 10)),
            }
            waiter.await;
        }
    });
}

#[test]
fn bursts_that_make_no_sense_are_refused() {
    let lone = RateOptions {
        packets_burst: Some(1),
        ..RateOptions::default()
    };
    assert_eq!(lone.check(), Err(RateError::BurstWithoutRate("packets")));
    assert_eq!(bytes(1, 0).check(), Err(RateError::EmptyBurst("bytes")));
    assert_eq!(
        bytes(u64::MAX, 1).check(),
        Err(RateError::TooLarge("bytes"))
    );
    assert_eq!(bytes(1, 1).check(), Ok(()));
    assert_eq!(RateOptions::default().check(), Ok(()));
}
