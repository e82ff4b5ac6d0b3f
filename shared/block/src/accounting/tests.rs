//! Accounts on the simulated clock.

use super::*;
use executor::Executor;
use executor::sim::{Config, World};
use std::time::Duration;

fn simulated(test: impl Future<Output = ()>) {
    Executor::simulated(&World::new(Config::default())).block_on(test);
}

async fn micros(count: u64) {
    time::sleep(Duration::from_micros(count)).await;
}

#[test]
fn a_request_that_outlasts_its_batch_is_measured_by_itself() {
    simulated(async {
        let accounting = Accounting::new();
        let account = accounting.attach();
        let stamp = account.begin();
        account.end_batch();
        micros(70).await;
        account.done(stamp, (Kind::Read, 4096), Outcome::Done);
        let totals = accounting.totals();
        let read = totals.of(Kind::Read);
        assert_eq!((read.operations, read.bytes, read.time), (1, 4096, 70_000));
        assert_eq!(totals.last_access(), Some(time::now()));
        assert_eq!(totals.of(Kind::Write), &KindTotals::default());
    });
}

#[test]
fn requests_that_end_within_their_batch_share_its_time() {
    simulated(async {
        let accounting = Accounting::new();
        let account = accounting.attach();
        let stamps = [account.begin(), account.begin(), account.begin()];
        micros(30).await;
        account.done(stamps[0], (Kind::Read, 1), Outcome::Done);
        account.done(stamps[1], (Kind::Write, 2), Outcome::Failed);
        account.end_batch();
        // The third is still under way.
        let totals = accounting.totals();
        assert_eq!(totals.of(Kind::Read).time, 15_000);
        let write = totals.of(Kind::Write);
        assert_eq!((write.operations, write.bytes, write.failed), (0, 0, 1));
        assert_eq!(write.time, 15_000);
        micros(10).await;
        // A later batch is none of its business.
        account.begin();
        account.done(stamps[2], (Kind::Read, 1), Outcome::Done);
        assert_eq!(accounting.totals().of(Kind::Read).time, 55_000);
    });
}

#[test]
fn what_an_account_has_counted_stays_when_it_goes() {
    simulated(async {
        let accounting = Accounting::new();
        accounting.set_histogram(Kind::Flush, Boundaries::new(vec![10]));
        for _ in 0..2 {
            let account = accounting.attach();
            let stamp = account.begin();
            account.end_batch();
            micros(1).await;
            account.done(stamp, (Kind::Flush, 0), Outcome::Done);
            account.invalid(Kind::Write);
        }
        let totals = accounting.totals();
        assert_eq!(totals.of(Kind::Flush).operations, 2);
        assert_eq!(totals.of(Kind::Write).invalid, 2);
        let histogram = totals.of(Kind::Flush).histogram.clone();
        assert_eq!(histogram, Some((vec![10], vec![0, 2])));
    });
}

#[test]
fn a_bin_begins_with_its_boundary_and_new_boundaries_begin_empty() {
    simulated(async {
        let accounting = Accounting::new();
        let account = accounting.attach();
        let run = async |length| {
            let stamp = account.begin();
            account.end_batch();
            micros(length).await;
            account.done(stamp, (Kind::Read, 1), Outcome::Done);
        };
        let bins = || accounting.totals().of(Kind::Read).histogram.clone();
        run(1).await;
        assert_eq!(bins(), None);
        let set =
            |list: &[u64]| accounting.set_histogram(Kind::Read, Boundaries::new(list.to_vec()));
        set(&[10_000, 50_000]);
        assert_eq!(bins(), Some((vec![10_000, 50_000], vec![0, 0, 0])));
        for length in [9, 10, 49, 50, 400] {
            run(length).await;
        }
        assert_eq!(bins().unwrap().1, [1, 2, 2]);
        set(&[10_000, 50_000]);
        assert_eq!(bins().unwrap().1, [0, 0, 0]);
        run(10).await;
        assert_eq!(bins().unwrap().1, [0, 1, 0]);
        accounting.set_histogram(Kind::Read, None);
        run(10).await;
        assert_eq!(bins(), None);
    });
}

#[test]
fn boundaries_ascend_from_more_than_nothing() {
    for bad in [vec![], vec![0], vec![5, 5], vec![5, 4], vec![1; 2]] {
        assert_eq!(Boundaries::new(bad), None);
    }
    assert!(Boundaries::new((1..=4096).collect()).is_some());
    assert!(Boundaries::new((1..=4097).collect()).is_none());
}
