//! Rate limits: token buckets for bytes and packets, of a port's direction and of groups of ports.
//!
//! ```text
//!   Limits (one direction of a port) ── bytes ──┐
//!                                    ── packets ┼── all must be out of debt ──> the whole burst goes, and is owed
//!   Group (shared by ports, optional) ── bytes ─┤
//!                                     ── packets┘
//! ```
//!
//! Nothing is split: what goes while a bucket is out of debt may put it into debt, by at most one burst of frames for each
//! thread that takes from it, and the next one waits until that is paid. So the average keeps to the rate whatever the size of
//! frames. All of it is atomics: threads that share a group take no lock, and a change takes effect with the next burst.

mod bucket;
mod options;

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use executor::sync::Notify;

use bucket::Bucket;
pub use options::{RateError, RateOptions};

/// The limits of one direction of a port. Used by the threads of its queue pairs, changed by the control thread.
pub struct Limits {
    own: Group,
    group: Option<Arc<Group>>,
}

impl Limits {
    /// Limits of the port's own.
    pub fn new(rate: &RateOptions) -> Limits {
        Limits {
            own: Group::new(rate),
            group: None,
        }
    }

    /// Limits of the port's own, and of a group that it shares with others.
    pub fn in_group(rate: &RateOptions, group: Arc<Group>) -> Limits {
        Limits {
            own: Group::new(rate),
            group: Some(group),
        }
    }

    /// Takes tokens for `frames` frames of `bytes` bytes together, all or nothing.
    ///
    /// # Errors
    /// How long to wait before trying again: [`Limits::until`].
    #[inline]
    pub fn take(&self, frames: u64, bytes: u64, now: Instant) -> Result<(), Duration> {
        let group = self.group.as_deref();
        let wait = self.own.debt(now).max(group.map_or(0, |g| g.debt(now)));
        if wait > 0 {
            return Err(bucket::duration(wait));
        }
        self.own.charge(frames, bytes, now);
        if let Some(group) = group {
            group.charge(frames, bytes, now);
        }
        Ok(())
    }

    /// Resolves when `wait` has passed, or earlier when a rate changes.
    pub async fn until(&self, wait: Duration) {
        let mut own = pin!(self.own.changed.notified());
        let group = self.group.as_deref().map(|group| group.changed.notified());
        let mut group = pin!(group);
        let changed = poll_fn(|context| {
            let ready = match group.as_mut().as_pin_mut() {
                Some(group) => group.poll(context).is_ready(),
                None => false,
            };
            if ready || own.as_mut().poll(context).is_ready() {
                return Poll::Ready(());
            }
            Poll::Pending
        });
        // Either is a reason to look again.
        let _ = executor::time::timeout(wait, changed).await;
    }

    /// Changes the port's own rate. A debt stays, and is paid at the new rate.
    pub fn set(&self, rate: &RateOptions) {
        self.own.set(rate);
    }

    /// The port's own rate.
    pub fn rate(&self) -> RateOptions {
        self.own.rate()
    }
}

impl std::fmt::Debug for Limits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Limits({:?})", self.rate())
    }
}

/// Buckets that several ports and directions may share.
#[repr(align(128))]
pub struct Group {
    epoch: Instant,
    bytes: Bucket,
    packets: Bucket,
    changed: Notify,
}

impl Group {
    /// Full buckets.
    pub fn new(rate: &RateOptions) -> Group {
        let group = Group {
            epoch: Instant::now(),
            bytes: Bucket::default(),
            packets: Bucket::default(),
            changed: Notify::new(),
        };
        group.set(rate);
        group
    }

    /// Changes the rate. A debt stays, and is paid at the new rate.
    pub fn set(&self, rate: &RateOptions) {
        self.set_at(rate, Instant::now());
    }

    /// The rate.
    pub fn rate(&self) -> RateOptions {
        let given = |value: u64| (value > 0).then_some(value);
        let (bytes, bytes_burst) = self.bytes.rate();
        let (packets, packets_burst) = self.packets.rate();
        RateOptions {
            bytes: given(bytes),
            bytes_burst: given(bytes_burst),
            packets: given(packets),
            packets_burst: given(packets_burst),
        }
    }

    fn set_at(&self, rate: &RateOptions, now: Instant) {
        let now = self.ticks(now);
        let (bytes, packets) = (rate.bytes_bucket(), rate.packets_bucket());
        self.bytes.set(bytes, now);
        self.packets.set(packets, now);
        self.changed.notify_all();
    }

    /// Ticks until neither bucket is in debt.
    #[inline]
    fn debt(&self, now: Instant) -> u64 {
        if !self.bytes.is_limited() && !self.packets.is_limited() {
            return 0;
        }
        let now = self.ticks(now);
        self.bytes.debt(now).max(self.packets.debt(now))
    }

    #[inline]
    fn charge(&self, frames: u64, bytes: u64, now: Instant) {
        if !self.bytes.is_limited() && !self.packets.is_limited() {
            return;
        }
        let now = self.ticks(now);
        self.bytes.charge(bytes, now);
        self.packets.charge(frames, now);
    }

    #[inline]
    fn ticks(&self, now: Instant) -> u64 {
        bucket::ticks(now.saturating_duration_since(self.epoch))
    }
}

#[cfg(test)]
mod tests;
