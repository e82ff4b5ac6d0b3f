//! The inflight region: which descriptors were in flight when a back-end died.
//!
//! The front-end keeps this shared memory over the back-end's death and gives it to the successor,
//! which resubmits what was in flight. Layouts and order of updates are those of "Inflight I/O
//! tracking" in QEMU's `docs/interop/vhost-user.rst`: [`SplitInflight`] and [`PackedInflight`].
//! Each queue's part is aligned to 64 bytes; a region made here has room for either layout.
//!
//! A death between any two of these steps loses no request and repeats none that the guest has
//! seen completed. Stores only have to stay in program order, since a killed process loses none
//! that it made; release ordering sees to that.
//!
//! The region is as untrusted as any guest memory: what is read from it is checked, and nothing
//! read back is relied on while the queue runs.

#![expect(unsafe_code, reason = "shared memory is reached through raw pointers")]

mod packed;
mod split;
mod tenure;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::memory::{MemoryError, SharedMapping};
use crate::ring::RingLayout;
use crate::store::Store;
use crate::wire::{InflightSpec, RegionSpec};

pub use packed::{PackedInflight, PackedRecovery, Taken};
pub use split::{Recovery, SplitInflight};
use tenure::Tenure;

/// Layout version written and understood.
const VERSION: u16 = 1;
/// Alignment of each queue's part, in bytes.
const QUEUE_ALIGN: u64 = 64;
/// Offset of `version` in a queue's part.
const VERSION_AT: usize = 8;
/// Offset of `desc_num` in a queue's part.
const DESC_NUM_AT: usize = 10;

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
    tenure: Option<Tenure>,
}

// SAFETY: the bytes are only reached through atomics, each queue's by its own thread.
unsafe impl Send for InflightRegion {}
// SAFETY: as above.
unsafe impl Sync for InflightRegion {}

/// Length of one queue's part in bytes.
fn queue_len(layout: RingLayout, queue_size: u16) -> u64 {
    let (header, desc) = match layout {
        RingLayout::Split => (split::HEADER_LEN, split::DESC_LEN),
        RingLayout::Packed => (packed::HEADER_LEN, packed::DESC_LEN),
    };
    (header as u64 + desc as u64 * u64::from(queue_size)).next_multiple_of(QUEUE_ALIGN)
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
        // The front-end may ask before it chooses the layout; untouched pages cost nothing.
        let mmap_size = u64::from(num_queues) * queue_len(RingLayout::Packed, queue_size);
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

    /// Maps the region that the front-end hands over, once the kernel has ended everything that a
    /// predecessor had in flight when it died. `device` is for messages.
    ///
    /// # Errors
    /// As [`InflightRegion::adopt`].
    pub async fn take_over(
        device: &str,
        spec: &InflightSpec,
        fd: OwnedFd,
    ) -> Result<InflightRegion, InflightError> {
        let tenure = match Tenure::of(fd.as_fd(), spec) {
            Ok(tenure) => {
                tenure.begin(device).await;
                Some(tenure)
            }
            Err(errno) => {
                tracing::warn!(device, %errno, "the inflight region cannot be locked: what a killed predecessor has in flight is not waited for");
                None
            }
        };
        let mut region = Self::adopt(spec, fd)?;
        region.tenure = tenure;
        Ok(region)
    }

    /// Makes the lock on the region last until the current thread's ring has nothing in flight, however this process ends.
    pub fn hold(&self) -> Option<executor::Hold> {
        self.tenure.as_ref().and_then(Tenure::hold)
    }

    /// Maps the region that the front-end hands over.
    ///
    /// # Errors
    /// [`InflightError::Geometry`] when the queues do not fit in, [`InflightError::Memory`] when
    /// the descriptor is too short.
    pub fn adopt(spec: &InflightSpec, fd: OwnedFd) -> Result<InflightRegion, InflightError> {
        let needed = u64::from(spec.num_queues) * queue_len(RingLayout::Split, spec.queue_size);
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
            tenure: None,
        })
    }

    /// Checks that queue `index` with `size` descriptors has its place here.
    ///
    /// # Errors
    /// [`InflightError::NotCovered`]
    pub fn check_queue(
        &self,
        index: u16,
        size: u16,
        layout: RingLayout,
    ) -> Result<(), InflightError> {
        let all = u64::from(self.spec.num_queues) * queue_len(layout, self.spec.queue_size);
        let covered = index < self.spec.num_queues && size <= self.spec.queue_size;
        if covered && all <= self.spec.mmap_size {
            Ok(())
        } else {
            Err(InflightError::NotCovered { index, size })
        }
    }

    /// Makes it new again: the device was reset with nothing in flight, so what the region says
    /// about ring positions is void. No queue runs.
    pub fn forget(self: &Arc<Self>, layout: RingLayout) {
        for index in 0..self.spec.num_queues {
            if let Ok(part) = Part::new(self, index, 0, layout) {
                part.u16_at(VERSION_AT).put(0);
            }
        }
    }

    /// Whether the front-end truncated the region and the loss was noticed.
    pub(crate) fn poisoned(&self) -> bool {
        self.mapping.poisoned()
    }
}

/// One queue's part of a region.
#[derive(Debug)]
struct Part {
    region: Arc<InflightRegion>,
    base: *mut u8,
    index: u16,
    /// Ring size: descriptor states below it are used.
    size: u16,
    layout: RingLayout,
}

impl Part {
    fn new(
        region: &Arc<InflightRegion>,
        index: u16,
        size: u16,
        layout: RingLayout,
    ) -> Result<Part, InflightError> {
        region.check_queue(index, size, layout)?;
        let offset = usize::from(index) * queue_len(layout, region.spec.queue_size) as usize;
        debug_assert!(offset < region.mapping.len());
        // SAFETY: `check_queue` says that every queue's part lies inside the mapping.
        let base = unsafe { region.mapping.base().add(offset) };
        Ok(Part {
            region: region.clone(),
            base,
            index,
            size,
            layout,
        })
    }

    /// The field at byte `offset` of the part, a multiple of the field's size.
    fn at<T>(&self, offset: usize) -> *const T {
        debug_assert!(offset.is_multiple_of(size_of::<T>()));
        let len = queue_len(self.layout, self.region.spec.queue_size) as usize;
        debug_assert!(offset + size_of::<T>() <= len);
        // SAFETY: callers pass offsets of fields inside this queue's part (or of the state of a
        // descriptor below `size`), which is aligned to 64.
        unsafe { self.base.add(offset).cast() }
    }

    fn u16_at(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: inside the part and aligned, as `at` says; all accesses are atomic.
        unsafe { &*self.at::<AtomicU16>(offset) }
    }

    fn corrupt(&self, reason: &'static str) -> InflightError {
        InflightError::Corrupt {
            index: self.index,
            reason,
        }
    }

    /// Whether a predecessor has used the part; an error when it is not one like this.
    fn is_in_use(&self) -> Result<bool, InflightError> {
        match self.u16_at(VERSION_AT).load(Ordering::Acquire) {
            0 => return Ok(false),
            VERSION => {}
            _ => return Err(self.corrupt("unknown version")),
        }
        if self.u16_at(DESC_NUM_AT).load(Ordering::Relaxed) != self.region.spec.queue_size {
            return Err(self.corrupt("descriptor count"));
        }
        Ok(true)
    }

    /// Marks the part as used from now on.
    fn begin_use(&self) {
        self.u16_at(DESC_NUM_AT).put(self.region.spec.queue_size);
        self.u16_at(VERSION_AT).put(VERSION);
    }
}

/// Whether `fd` cannot shrink any more.
pub fn is_sealed(fd: BorrowedFd<'_>) -> bool {
    fcntl(fd, FcntlArg::F_GET_SEALS)
        .is_ok_and(|seals| SealFlag::from_bits_truncate(seals).contains(SealFlag::F_SEAL_SHRINK))
}
