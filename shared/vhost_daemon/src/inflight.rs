//! The inflight region: which descriptors were in flight when a back-end died.
//!
//! The front-end keeps this shared memory over the back-end's death and gives it to the successor,
//! which resubmits what was in flight. Layout and order of updates are those of "Inflight I/O
//! tracking" in QEMU's `docs/interop/vhost-user.rst`, for split rings. One queue's part, aligned
//! to 64 bytes:
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
//!
//! A death between any two of these steps loses no request and repeats none that the guest has
//! seen completed. Stores only have to stay in program order, since a killed process loses none
//! that it made; release ordering sees to that.
//!
//! The region is as untrusted as any guest memory: what is read from it is checked, and nothing
//! read back is relied on while the queue runs.

#![expect(unsafe_code, reason = "shared memory is reached through raw pointers")]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::memory::{MemoryError, SharedMapping};
use crate::wire::{InflightSpec, RegionSpec};

/// Layout version written and understood.
const VERSION: u16 = 1;
/// Alignment of each queue's part, in bytes.
const QUEUE_ALIGN: u64 = 64;
const HEADER_LEN: u64 = 16;
const DESC_LEN: u64 = 16;

/// Why an inflight region cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum InflightError {
    /// Its size, offset or counts do not fit together.
    #[error("inflight region does not fit its queues: {0:?}")]
    Geometry(InflightSpec),
    /// Its descriptor cannot be mapped.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The host refused to make one.
    #[error("cannot make an inflight region: {0}")]
    Create(std::io::Error),
    /// The ring is larger than the region has room for, or the region has no such queue.
    #[error("queue {index} with {size} descriptors is not covered by the inflight region")]
    NotCovered {
        /// Queue index.
        index: u16,
        /// Ring size in descriptors.
        size: u16,
    },
    /// What the region says cannot have been written by a back-end for this ring.
    #[error("inflight region of queue {index} is corrupt: {reason}")]
    Corrupt {
        /// Queue index.
        index: u16,
        /// What is wrong.
        reason: &'static str,
    },
}

/// A mapped inflight region for all queues of a device.
#[derive(Debug)]
pub struct InflightRegion {
    mapping: SharedMapping,
    spec: InflightSpec,
}

// SAFETY: the bytes are only reached through atomics, each queue's by its own thread.
unsafe impl Send for InflightRegion {}
// SAFETY: as above.
unsafe impl Sync for InflightRegion {}

fn queue_len(queue_size: u16) -> u64 {
    (HEADER_LEN + DESC_LEN * u64::from(queue_size)).next_multiple_of(QUEUE_ALIGN)
}

impl InflightRegion {
    /// Makes an empty region for `num_queues` queues of `queue_size` descriptors and gives its
    /// description and the descriptor for the front-end. The front-end hands both back with
    /// SET_INFLIGHT_FD before they are used.
    ///
    /// # Errors
    /// [`InflightError::Create`]
    pub fn create(
        num_queues: u16,
        queue_size: u16,
    ) -> Result<(InflightSpec, OwnedFd), InflightError> {
        let failed = |e: nix::errno::Errno| InflightError::Create(e.into());
        let mmap_size = u64::from(num_queues) * queue_len(queue_size);
        let fd = memfd_create(
            c"vhost-inflight",
            MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING,
        )
        .map_err(failed)?;
        nix::unistd::ftruncate(&fd, mmap_size as i64).map_err(failed)?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(fd.as_fd(), FcntlArg::F_ADD_SEALS(seals)).map_err(failed)?;
        let spec = InflightSpec {
            mmap_size,
            mmap_offset: 0,
            num_queues,
            queue_size,
        };
        Ok((spec, fd))
    }

    /// Maps the region that the front-end hands over.
    ///
    /// # Errors
    /// [`InflightError::Geometry`] when the queues do not fit in, [`InflightError::Memory`] when
    /// the descriptor is too short.
    pub fn adopt(spec: &InflightSpec, fd: OwnedFd) -> Result<InflightRegion, InflightError> {
        let needed = u64::from(spec.num_queues) * queue_len(spec.queue_size);
        let aligned = spec.mmap_offset.is_multiple_of(QUEUE_ALIGN);
        if spec.mmap_size < needed
            || !aligned
            || spec.mmap_offset.checked_add(spec.mmap_size).is_none()
        {
            return Err(InflightError::Geometry(*spec));
        }
        let region = RegionSpec {
            guest_addr: 0,
            size: spec.mmap_size,
            user_addr: 0,
            mmap_offset: spec.mmap_offset,
        };
        Ok(InflightRegion {
            mapping: SharedMapping::new(&region, fd)?,
            spec: *spec,
        })
    }

    /// Checks that queue `index` with `size` descriptors has its place here.
    ///
    /// # Errors
    /// [`InflightError::NotCovered`]
    pub fn check_queue(&self, index: u16, size: u16) -> Result<(), InflightError> {
        if index < self.spec.num_queues && size <= self.spec.queue_size {
            Ok(())
        } else {
            Err(InflightError::NotCovered { index, size })
        }
    }

    /// Whether the front-end truncated the region and the loss was noticed.
    pub(crate) fn poisoned(&self) -> bool {
        self.mapping.poisoned()
    }
}

/// What a queue has to do before it serves new requests.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Recovery {
    /// Heads to serve again, oldest first.
    pub resubmit: Vec<u16>,
    /// Next index of the available ring; `None` when the region is new and the front-end's base
    /// holds.
    pub avail: Option<u16>,
}

/// One queue's part of an inflight region, on the queue's thread.
#[derive(Debug)]
pub struct InflightRing {
    region: Arc<InflightRegion>,
    base: *mut u8,
    index: u16,
    /// Ring size: heads are below it.
    size: u16,
    /// The next request's place in the order.
    counter: u64,
    /// Mirror of the field in the region, which nobody else may change.
    last_batch_head: u16,
    /// Heads completed since the last publication.
    batch: Vec<u16>,
}

impl InflightRing {
    /// The part of queue `index`, whose ring has `size` descriptors.
    ///
    /// # Errors
    /// [`InflightError::NotCovered`]
    pub fn new(
        region: Arc<InflightRegion>,
        index: u16,
        size: u16,
    ) -> Result<InflightRing, InflightError> {
        region.check_queue(index, size)?;
        let offset = usize::from(index) * queue_len(region.spec.queue_size) as usize;
        debug_assert!(offset < region.mapping.len());
        // SAFETY: `adopt` checked that every queue's part lies inside the mapping.
        let base = unsafe { region.mapping.base().add(offset) };
        Ok(InflightRing {
            region,
            base,
            index,
            size,
            counter: 0,
            last_batch_head: 0,
            batch: Vec::with_capacity(usize::from(size)),
        })
    }

    fn u16_at(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: callers pass offsets of fields inside this queue's part (or of a descriptor
        // below `size`), which is aligned to 64; all accesses are atomic.
        unsafe { &*self.base.add(offset).cast::<AtomicU16>() }
    }

    fn desc(&self, head: u16) -> *mut u8 {
        debug_assert!(head < self.size);
        // SAFETY: `head` is below the ring size, which the region has room for.
        unsafe {
            self.base
                .add(HEADER_LEN as usize + DESC_LEN as usize * usize::from(head))
        }
    }

    fn in_flight(&self, head: u16) -> &AtomicU8 {
        // SAFETY: the first byte of a descriptor state inside the part.
        unsafe { &*self.desc(head).cast::<AtomicU8>() }
    }

    fn next(&self, head: u16) -> &AtomicU16 {
        // SAFETY: bytes 6 and 7 of a descriptor state inside the part, aligned to 2.
        unsafe { &*self.desc(head).add(6).cast::<AtomicU16>() }
    }

    fn order(&self, head: u16) -> &AtomicU64 {
        // SAFETY: bytes 8 to 15 of a descriptor state inside the part, aligned to 8.
        unsafe { &*self.desc(head).add(8).cast::<AtomicU64>() }
    }

    fn version(&self) -> &AtomicU16 {
        self.u16_at(8)
    }

    fn desc_num(&self) -> &AtomicU16 {
        self.u16_at(10)
    }

    fn head_of_batch(&self) -> &AtomicU16 {
        self.u16_at(12)
    }

    fn used_idx(&self) -> &AtomicU16 {
        self.u16_at(14)
    }

    /// Whether the front-end truncated the region and the loss was noticed.
    pub fn poisoned(&self) -> bool {
        self.region.poisoned()
    }

    /// Brings the region in step with the used ring, whose index is `used`, and lists what was in
    /// flight.
    ///
    /// # Errors
    /// [`InflightError::Corrupt`]
    pub fn recover(&mut self, used: u16) -> Result<Recovery, InflightError> {
        if self.version().load(Ordering::Acquire) == 0 {
            self.start_new(used);
            return Ok(Recovery::default());
        }
        let corrupt = |reason| InflightError::Corrupt {
            index: self.index,
            reason,
        };
        if self.version().load(Ordering::Relaxed) != VERSION {
            return Err(corrupt("unknown version"));
        }
        if self.desc_num().load(Ordering::Relaxed) != self.region.spec.queue_size {
            return Err(corrupt("descriptor count"));
        }
        self.finish_last_batch(used);
        let mut resubmit: Vec<u16> = (0..self.size)
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
        for head in 0..self.size {
            self.in_flight(head).store(0, Ordering::Relaxed);
        }
        self.head_of_batch().store(0, Ordering::Relaxed);
        self.used_idx().store(used, Ordering::Relaxed);
        self.desc_num()
            .store(self.region.spec.queue_size, Ordering::Relaxed);
        self.version().store(VERSION, Ordering::Release);
    }

    /// The last-batch rule: requests that the guest has seen as used may still be marked.
    fn finish_last_batch(&self, used: u16) {
        let batch = used.wrapping_sub(self.used_idx().load(Ordering::Acquire));
        // A longer distance means that the ring was set up anew since; then there is no batch.
        if batch <= self.size {
            let mut head = self.head_of_batch().load(Ordering::Relaxed);
            for _ in 0..batch {
                if head >= self.size {
                    break;
                }
                self.in_flight(head).store(0, Ordering::Relaxed);
                head = self.next(head).load(Ordering::Relaxed);
            }
        }
        self.used_idx().store(used, Ordering::Release);
    }

    /// `head` was fetched and is about to be served.
    #[inline]
    pub fn mark(&mut self, head: u16) {
        self.order(head).store(self.counter, Ordering::Relaxed);
        self.counter = self.counter.wrapping_add(1);
        self.in_flight(head).store(1, Ordering::Release);
    }

    /// `head` is done and its used element written, not yet published.
    #[inline]
    pub fn complete(&mut self, head: u16) {
        self.next(head)
            .store(self.last_batch_head, Ordering::Relaxed);
        self.last_batch_head = head;
        self.head_of_batch().store(head, Ordering::Release);
        self.batch.push(head);
    }

    /// The used ring's index is now `used`: everything completed before is visible to the guest.
    #[inline]
    pub fn publish(&mut self, used: u16) {
        for head in &self.batch {
            self.in_flight(*head).store(0, Ordering::Release);
        }
        self.batch.clear();
        self.used_idx().store(used, Ordering::Release);
    }

    /// The descriptor's region, for tests.
    #[cfg(test)]
    fn poke(&self, head: u16, counter: u64) {
        self.in_flight(head).store(1, Ordering::Relaxed);
        self.order(head).store(counter, Ordering::Relaxed);
    }
}

/// Whether `fd` cannot shrink any more.
pub fn is_sealed(fd: BorrowedFd<'_>) -> bool {
    fcntl(fd, FcntlArg::F_GET_SEALS)
        .is_ok_and(|seals| SealFlag::from_bits_truncate(seals).contains(SealFlag::F_SEAL_SHRINK))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(queues: u16, size: u16) -> Arc<InflightRegion> {
        let (spec, fd) = InflightRegion::create(queues, size).unwrap();
        Arc::new(InflightRegion::adopt(&spec, fd).unwrap())
    }

    fn successor(region: &Arc<InflightRegion>) -> InflightRing {
        InflightRing::new(region.clone(), 0, 8).unwrap()
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
        ring.desc_num().store(9, Ordering::Relaxed);
        assert!(successor(&shared).recover(0).is_err());
        ring.desc_num().store(8, Ordering::Relaxed);
        ring.version().store(2, Ordering::Relaxed);
        assert!(successor(&shared).recover(0).is_err());
    }

    #[test]
    fn sizes_are_checked_against_the_region() {
        let (spec, fd) = InflightRegion::create(2, 128).unwrap();
        assert!(is_sealed(fd.as_fd()));
        for bad in [
            InflightSpec {
                num_queues: 3,
                ..spec
            },
            InflightSpec {
                queue_size: 256,
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
        assert!(region.check_queue(1, 128).is_ok());
        assert!(region.check_queue(1, 256).is_err());
        assert!(region.check_queue(2, 128).is_err());
    }
}
