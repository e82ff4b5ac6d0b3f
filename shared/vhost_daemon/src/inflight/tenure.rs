//! Whose an inflight region is: one back-end's, until the kernel has ended all that it had in flight.
//!
//! ```text
//!   back-end      lock on the region ── in the table of each queue's ring ── kill -9 ── last operation ends ── unlocked
//!   successor                                                         SET_INFLIGHT_FD waits ────────────────── locks, serves
//! ```
//!
//! A read that a killed back-end had in flight still writes to guest memory when the process is long gone. Served again and
//! completed by a successor meanwhile, it would write into a buffer that the guest uses for something else by then.
//!
//! The lock is on the region's file, through a description of this process' own: the front-end and both back-ends share the
//! one that was handed over. Nothing announces that a lock is gone, so it is looked at again and again.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use executor::time::{self, Backoff};
use executor::{Errno, Hold};
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sys::stat::Mode;

use crate::wire::InflightSpec;

/// First and longest time between two looks.
const LOOK_AGAIN: (Duration, Duration) = (Duration::from_micros(200), Duration::from_millis(5));
/// How long a predecessor may take before it is worth telling.
const PATIENCE: Duration = Duration::from_secs(1);

/// A lock on a region, held or about to be.
#[derive(Debug)]
pub(super) struct Tenure {
    file: OwnedFd,
    lock: libc::flock,
}

impl Tenure {
    /// That of the region which `spec` describes in `fd`.
    pub(super) fn of(fd: BorrowedFd<'_>, spec: &InflightSpec) -> Result<Tenure, Errno> {
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let file = open(
            path.as_str(),
            OFlag::O_RDWR | OFlag::O_CLOEXEC,
            Mode::empty(),
        )?;
        let number = |bytes: u64| i64::try_from(bytes).map_err(|_| Errno::EINVAL);
        let lock = libc::flock {
            l_type: libc::F_WRLCK as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: number(spec.mmap_offset)?,
            l_len: number(spec.mmap_size)?,
            l_pid: 0,
        };
        fcntl(&file, FcntlArg::F_OFD_GETLK(&mut lock.clone()))?;
        Ok(Tenure { file, lock })
    }

    /// Locks, after whoever holds the lock.
    pub(super) async fn begin(&self, device: &str) {
        let mut backoff = Backoff::new(LOOK_AGAIN);
        let began = time::now();
        let mut patience = PATIENCE;
        while let Err(errno) = fcntl(&self.file, FcntlArg::F_OFD_SETLK(&self.lock)) {
            let waited = time::now().saturating_sub(began);
            if waited >= patience {
                tracing::warn!(device, ?waited, %errno, "waiting for what the killed predecessor has in flight");
                patience *= 2;
            }
            backoff.pause().await;
        }
    }

    /// Keeps the lock until the current thread's ring has nothing in flight.
    pub(super) fn hold(&self) -> Option<Hold> {
        let held = executor::hold_open(self.file.as_fd());
        held.inspect_err(|error| {
            tracing::warn!(%error, "a successor may not wait for what is in flight when this process is killed");
        })
        .ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inflight::InflightRegion;
    use executor::{Config, Executor};
    use std::cell::Cell;
    use std::rc::Rc;

    fn region() -> (InflightSpec, OwnedFd) {
        InflightRegion::create(2, 64).unwrap()
    }

    async fn take(spec: &InflightSpec, fd: &OwnedFd) -> InflightRegion {
        let fd = fd.try_clone().unwrap();
        InflightRegion::take_over("disk", spec, fd).await.unwrap()
    }

    #[test]
    fn a_successor_waits_for_its_predecessor_and_the_predecessors_ring() {
        let executor = Executor::new(&Config::default()).unwrap();
        executor.block_on(async {
            let (spec, fd) = region();
            let first = take(&spec, &fd).await;
            let hold = first.hold().unwrap();
            let taken = Rc::new(Cell::new(false));
            let second = executor::spawn({
                let (taken, fd) = (Rc::clone(&taken), fd.try_clone().unwrap());
                async move {
                    let region = take(&spec, &fd).await;
                    taken.set(true);
                    region
                }
            });
            time::sleep(2 * LOOK_AGAIN.1).await;
            assert!(!taken.get(), "taken beside its owner");
            drop(first);
            time::sleep(2 * LOOK_AGAIN.1).await;
            assert!(!taken.get(), "taken from the ring");
            drop(hold);
            second.await;
            assert!(taken.get());
        });
    }

    #[test]
    fn regions_of_one_file_are_taken_apart() {
        let executor = Executor::new(&Config::default()).unwrap();
        executor.block_on(async {
            let (whole, fd) = region();
            let half = whole.mmap_size / 2;
            let part = |mmap_offset| InflightSpec {
                mmap_size: half,
                mmap_offset,
                num_queues: 1,
                queue_size: 64,
            };
            let _first = take(&part(0), &fd).await;
            let _second = take(&part(half), &fd).await;
        });
    }
}
