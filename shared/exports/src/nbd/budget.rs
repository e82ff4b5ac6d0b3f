//! What the requests of one client may hold at a time.

use executor::sync::Notify;
use std::cell::Cell;
use std::rc::Rc;

/// Requests in flight.
const MAX_REQUESTS: u32 = 64;
/// Bytes of payload in flight: two of the largest requests.
const MAX_BYTES: u64 = 2 * ::nbd::limits::MAX_PAYLOAD as u64;

/// Counts what the requests of a client hold.
#[derive(Default)]
pub(super) struct Budget {
    requests: Cell<u32>,
    bytes: Cell<u64>,
    freed: Notify,
}

/// A request's part; given back when dropped.
pub(super) struct Reservation {
    budget: Rc<Budget>,
    bytes: u64,
}

impl Budget {
    /// Waits until a request that holds `bytes` (at most a largest payload) may begin.
    pub(super) async fn reserve(self: &Rc<Self>, bytes: u64) -> Reservation {
        let bytes = bytes.min(MAX_BYTES);
        loop {
            let freed = self.freed.notified();
            if self.requests.get() < MAX_REQUESTS && self.bytes.get() + bytes <= MAX_BYTES {
                break;
            }
            freed.await;
        }
        self.requests.set(self.requests.get() + 1);
        self.bytes.set(self.bytes.get() + bytes);
        Reservation {
            budget: Rc::clone(self),
            bytes,
        }
    }

    /// Waits until no request is in flight.
    pub(super) async fn settled(&self) {
        loop {
            let freed = self.freed.notified();
            if self.requests.get() == 0 {
                return;
            }
            freed.await;
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let budget = &self.budget;
        budget.requests.set(budget.requests.get() - 1);
        budget.bytes.set(budget.bytes.get() - self.bytes);
        budget.freed.notify_all();
    }
}
