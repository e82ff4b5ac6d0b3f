//! The inflight part of a split ring.
//!
//! ```text
//!   0 features u64 │ 8 version u16 │ 10 desc_num u16 │ 12 last_batch_head u16 │ 14 used_idx u16
//!  16 desc[desc_num], 16 bytes each: 0 inflight u8 │ 6 next u16 │ 8 counter u64
//! ```
//!
//! ```text
//!   fetch head     counter, then inflight = 1          (mark)
//!   complete head  next = last_batch_head, last_batch_head = head   (complete)
//!   publish        used ring idx, then inflight = 0 for the batch, then used_idx  (publish)
//! ```

#![expect(unsafe_code, reason = "shared memory is reached through raw pointers")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use super::{InflightError, InflightRegion, Part};
use crate::ring::RingLayout;
use crate::store::Store;

pub(super) const HEADER_LEN: usize = 16;
pub(super) const DESC_LEN: usize = 16;
const LAST_BATCH_HEAD_AT: usize = 12;
const USED_IDX_AT: usize = 14;

/// What a queue has to do before it serves new requests.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Recovery {
    /// Heads to serve again, oldest first.
    pub resubmit: Vec<u16>,
    /// Next index of the available ring; `None` when the region is new and the front-end's base
    /// holds.
    pub avail: Option<u16>,
}

/// One split ring's part of an inflight region, on the queue's thread.
#[derive(Debug)]
pub struct SplitInflight {
    part: Part,
    /// The next request's place in the order.
    counter: u64,
    /// Mirror of the field in the region, which nobody else may change.
    last_batch_head: u16,
    /// Heads completed since the last publication.
    batch: Vec<u16>,
}

impl SplitInflight {
    /// The part of queue `index`, whose ring has `size` descriptors.
    ///
    /// # Errors
    /// [`InflightError::NotCovered`]
    pub fn new(
        region: &Arc<InflightRegion>,
        index: u16,
        size: u16,
    ) -> Result<SplitInflight, InflightError> {
        Ok(SplitInflight {
            part: Part::new(region, index, size, RingLayout::Split)?,
            counter: 0,
            last_batch_head: 0,
            batch: Vec::with_capacity(usize::from(size)),
        })
    }

    fn desc(&self, head: u16) -> usize {
        debug_assert!(head < self.part.size);
        HEADER_LEN + DESC_LEN * usize::from(head)
    }

    fn in_flight(&self, head: u16) -> &AtomicU8 {
        // SAFETY: the first byte of a descriptor state inside the part.
        unsafe { &*self.part.at::<AtomicU8>(self.desc(head)) }
    }

    fn next(&self, head: u16) -> &AtomicU16 {
        self.part.u16_at(self.desc(head) + 6)
    }

    fn order(&self, head: u16) -> &AtomicU64 {
        // SAFETY: bytes 8 to 15 of a descriptor state inside the part.
        unsafe { &*self.part.at::<AtomicU64>(self.desc(head) + 8) }
    }

    fn head_of_batch(&self) -> &AtomicU16 {
        self.part.u16_at(LAST_BATCH_HEAD_AT)
    }

    fn used_idx(&self) -> &AtomicU16 {
        self.part.u16_at(USED_IDX_AT)
    }

    /// Whether the front-end truncated the region and the loss was noticed.
    pub fn poisoned(&self) -> bool {
        self.part.region.poisoned()
    }

    /// Brings the region in step with the used ring, whose index is `used`, and lists what was in
    /// flight.
    ///
    /// # Errors
    /// [`InflightError::Corrupt`]
    pub fn recover(&mut self, used: u16) -> Result<Recovery, InflightError> {
        if !self.part.is_in_use()? {
            self.start_new(used);
            return Ok(Recovery::default());
        }
        self.finish_last_batch(used);
        let mut resubmit: Vec<u16> = (0..self.part.size)
            .filter(|head| self.in_flight(*head).load(Ordering::Relaxed) == 1)
            .collect();
        resubmit.sort_by_key(|head| self.order(*head).load(Ordering::Relaxed));
        let newest = resubmit.last();
        self.counter = newest.map_or(0, |head| {
            self.order(*head).load(Ordering::Relaxed).wrapping_add(1)
        });
        self.last_batch_head = self.head_of_batch().load(Ordering::Relaxed);
        let avail = Some(used.wrapping_add(resubmit.len() as u16));
        Ok(Recovery { resubmit, avail })
    }

    fn start_new(&mut self, used: u16) {
        for head in 0..self.part.size {
            self.in_flight(head).put(0);
        }
        self.head_of_batch().put(0);
        self.used_idx().put(used);
        self.part.begin_use();
    }

    /// The last-batch rule: requests that the guest has seen as used may still be marked.
    fn finish_last_batch(&self, used: u16) {
        let batch = used.wrapping_sub(self.used_idx().load(Ordering::Acquire));
        // A longer distance means that the ring was set up anew since; then there is no batch.
        if batch <= self.part.size {
            let mut head = self.head_of_batch().load(Ordering::Relaxed);
            for _ in 0..batch {
                if head >= self.part.size {
                    break;
                }
                self.in_flight(head).put(0);
                head = self.next(head).load(Ordering::Relaxed);
            }
        }
        self.used_idx().put(used);
    }

    /// `head` was fetched and is about to be served.
    #[inline]
    pub fn mark(&mut self, head: u16) {
        self.order(head).put(self.counter);
        self.counter = self.counter.wrapping_add(1);
        self.in_flight(head).put(1);
    }

    /// `head` is done and its used element written, not yet published.
    #[inline]
    pub fn complete(&mut self, head: u16) {
        self.next(head).put(self.last_batch_head);
        self.last_batch_head = head;
        self.head_of_batch().put(head);
        self.batch.push(head);
    }

    /// The used ring's index is now `used`: everything completed before is visible to the guest.
    #[inline]
    pub fn publish(&mut self, used: u16) {
        for head in &self.batch {
            self.in_flight(*head).put(0);
        }
        self.batch.clear();
        self.used_idx().put(used);
    }

    /// The descriptor's region, for tests.
    #[cfg(test)]
    fn poke(&self, head: u16, counter: u64) {
        self.in_flight(head).put(1);
        self.order(head).put(counter);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::inflight::{DESC_NUM_AT, VERSION_AT, is_sealed};
    use crate::wire::InflightSpec;

    fn region(queues: u16, size: u16) -> Arc<InflightRegion> {
        let (spec, fd) = InflightRegion::create(queues, size).unwrap();
        Arc::new(InflightRegion::adopt(&spec, fd).unwrap())
    }

    fn successor(region: &Arc<InflightRegion>) -> SplitInflight {
        SplitInflight::new(region, 0, 8).unwrap()
    }

    fn resubmitted(region: &Arc<InflightRegion>, used: u16) -> (Vec<u16>, Option<u16>) {
        let recovery = successor(region).recover(used).unwrap();
        (recovery.resubmit, recovery.avail)
    }

    /// Runs the steps of two requests completed as one batch and stops before step `stop`. Gives
    /// the used index that the guest sees.
    fn run_until(region: &Arc<InflightRegion>, stop: usize) -> u16 {
        let mut ring = successor(region);
        ring.recover(0).unwrap();
        let mut used = 0;
        for step in 0..stop {
            match step {
                0 => ring.mark(5),
                1 => ring.mark(2),
                2 => ring.mark(7),
                3 => ring.complete(2),
                4 => ring.complete(5),
                5 => used = 2,
                // The clearing is cut after its first descriptor, then finished.
                6 => ring.in_flight(2).store(0, Ordering::Relaxed),
                7 => ring.in_flight(5).store(0, Ordering::Relaxed),
                _ => ring.publish(2),
            }
        }
        used
    }

    #[test]
    fn death_at_any_step_resubmits_exactly_what_the_guest_waits_for() {
        let expected: [&[u16]; 10] = [
            &[],
            &[5],
            &[5, 2],
            &[5, 2, 7],
            &[5, 2, 7],
            &[5, 2, 7],
            &[7],
            &[7],
            &[7],
            &[7],
        ];
        for (stop, expected) in expected.iter().enumerate() {
            let region = region(1, 8);
            let used = run_until(&region, stop);
            let (heads, avail) = resubmitted(&region, used);
            assert_eq!(heads, *expected, "death before step {stop}");
            assert_eq!(avail, Some(used + expected.len() as u16));
            assert_eq!(resubmitted(&region, used).0, *expected, "a second death");
        }
    }

    #[test]
    fn resubmission_follows_the_counter_and_goes_on_from_it() {
        let region = region(2, 8);
        let mut ring = successor(&region);
        ring.recover(0).unwrap();
        ring.poke(1, 30);
        ring.poke(6, 10);
        ring.poke(3, 20);
        let mut next = successor(&region);
        assert_eq!(next.recover(0).unwrap().resubmit, [6, 3, 1]);
        next.mark(0);
        assert_eq!(next.order(0).load(Ordering::Relaxed), 31);
    }

    #[test]
    fn a_new_region_leaves_the_base_to_the_front_end() {
        let region = region(1, 8);
        assert_eq!(resubmitted(&region, 700), (vec![], None));
        assert_eq!(resubmitted(&region, 700), (vec![], Some(700)));
        // The guest was reset and set up its ring again.
        assert_eq!(resubmitted(&region, 0), (vec![], Some(0)));
    }

    #[test]
    fn garbage_in_the_region_is_refused_or_harmless() {
        let shared = region(1, 8);
        let mut ring = successor(&shared);
        ring.recover(0).unwrap();
        ring.head_of_batch().store(0xffff, Ordering::Relaxed);
        ring.poke(4, u64::MAX);
        assert_eq!(resubmitted(&shared, 3).0, [4]);
        ring.head_of_batch().store(4, Ordering::Relaxed);
        ring.next(4).store(4, Ordering::Relaxed);
        assert_eq!(resubmitted(&shared, 10).0, [0u16; 0]);
        ring.part.u16_at(DESC_NUM_AT).store(9, Ordering::Relaxed);
        assert!(successor(&shared).recover(0).is_err());
        ring.part.u16_at(DESC_NUM_AT).store(8, Ordering::Relaxed);
        ring.part.u16_at(VERSION_AT).store(2, Ordering::Relaxed);
        assert!(successor(&shared).recover(0).is_err());
    }

    #[test]
    fn sizes_are_checked_against_the_region() {
        let (spec, fd) = InflightRegion::create(2, 128).unwrap();
        assert!(is_sealed(fd.as_fd()));
        for bad in [
            InflightSpec {
                num_queues: 4,
                ..spec
            },
            InflightSpec {
                queue_size: 512,
                ..spec
            },
            InflightSpec {
                mmap_offset: 32,
                ..spec
            },
            InflightSpec {
                mmap_offset: u64::MAX - 63,
                ..spec
            },
            InflightSpec {
                mmap_offset: 64,
                ..spec
            },
        ] {
            assert!(InflightRegion::adopt(&bad, fd.try_clone().unwrap()).is_err());
        }
        let region = InflightRegion::adopt(&spec, fd).unwrap();
        assert!(region.check_queue(1, 128, RingLayout::Packed).is_ok());
        assert!(region.check_queue(1, 256, RingLayout::Split).is_err());
        assert!(region.check_queue(2, 128, RingLayout::Split).is_err());
    }
}
