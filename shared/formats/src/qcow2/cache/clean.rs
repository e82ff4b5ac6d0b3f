//! Idle metadata is forgotten: the task behind `cache-clean-interval`.
//!
//! It wakes once per interval while the cache holds anything and sleeps without a timer while it
//! does not, so an idle image first gives its memory back and then costs nothing. Ends with the
//! cache.

use super::TableCache;
use executor::sync::Notify;
use executor::time;
use std::sync::{Arc, Weak};
use std::time::Duration;

/// Cleans `cache` every `interval`. What was not looked at for a whole interval goes.
pub(in crate::qcow2) fn clean_regularly(
    cache: &Arc<TableCache>,
    interval: Duration,
) -> impl Future<Output = ()> + 'static {
    let filled = Arc::clone(&cache.filled);
    run(Arc::downgrade(cache), filled, interval)
}

async fn run(cache: Weak<TableCache>, filled: Arc<Notify>, interval: Duration) {
    loop {
        let told = filled.notified();
        let Some(is_empty) = cache.upgrade().map(|cache| cache.is_empty()) else {
            return;
        };
        if is_empty {
            told.await;
        } else if time::timeout(interval, told).await.is_none() {
            let Some(cache) = cache.upgrade() else { return };
            cache.clean();
        }
    }
}
