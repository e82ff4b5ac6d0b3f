//! Bounds that no client may cross. What clients see is tested with real ones, beside `outboard-nbd`.

use super::budget::Budget;
use executor::{Config, Executor, spawn, time};
use std::rc::Rc;

fn on_executor<F: Future>(future: F) -> F::Output {
    let executor = Executor::new(&Config::default()).expect("an executor");
    executor.block_on(future)
}

#[test]
fn requests_wait_until_their_bytes_fit() {
    on_executor(async {
        let budget = Rc::<Budget>::default();
        let first = budget.reserve(32 << 20).await;
        let _second = budget.reserve(32 << 20).await;
        let third = spawn({
            let budget = Rc::clone(&budget);
            async move { drop(budget.reserve(1).await) }
        });
        time::yield_now().await;
        let zero = budget.reserve(0).await;
        drop((first, zero));
        third.await;
    });
}

#[test]
fn no_more_than_64_requests_are_in_flight() {
    on_executor(async {
        let budget = Rc::<Budget>::default();
        let mut held = Vec::new();
        for _ in 0..64 {
            held.push(budget.reserve(0).await);
        }
        let more = time::timeout(std::time::Duration::from_millis(1), budget.reserve(0)).await;
        assert!(more.is_none());
        held.clear();
        budget.settled().await;
    });
}
