//! The dirty log: which pages of guest memory the back-end wrote while the guest migrates.
//!
//! One bit per page of 4096 bytes, from guest address 0 on, in memory that the front-end shares
//! (vhost-user.rst, "Migration"). The front-end takes bits while they are being set, so a bit is
//! set by an atomic OR that is never skipped, after the write that it tells of.
//!
//! ```text
//!   data, status ──> OR their bits ──> used index ──> OR its bit ──> call
//! ```
//!
//! Promises: no bit outside of the shared memory is touched, whatever address is logged; a log that
//! does not reach the end of guest memory is refused where it is set up.

#![expect(unsafe_code, reason = "shared memory is reached through raw pointers")]

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::memory::{MemoryError, SharedMapping};
use crate::wire::{LogSpec, RegionSpec};

/// Bytes of guest memory that one bit stands for.
pub const LOG_PAGE: u64 = 4096;
/// Bytes of guest memory that one byte of the log stands for.
const BYTE_SPAN: u64 = 8 * LOG_PAGE;

/// Why a dirty log cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DirtyLogError {
    /// It is empty, or its end overflows.
    #[error("a dirty log of {} bytes at {}", .0.mmap_size, .0.mmap_offset)]
    Geometry(LogSpec),
    /// Its descriptor cannot be mapped.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Guest memory or a ring's log address lies beyond its end.
    #[error("a dirty log of {len} bytes does not reach guest address {address:#x}")]
    TooShort {
        /// Length of the log in bytes.
        len: usize,
        /// Last byte that has to be covered.
        address: u64,
    },
}

/// A mapped dirty log.
#[derive(Debug)]
pub struct DirtyLog {
    mapping: SharedMapping,
}

// SAFETY: the bytes are only reached through atomic operations.
unsafe impl Send for DirtyLog {}
// SAFETY: as above.
unsafe impl Sync for DirtyLog {}

impl DirtyLog {
    /// Maps the log that the front-end hands over.
    ///
    /// # Errors
    /// [`DirtyLogError::Geometry`], [`DirtyLogError::Memory`] when the descriptor is too short.
    pub fn adopt(spec: &LogSpec, fd: OwnedFd) -> Result<DirtyLog, DirtyLogError> {
        let end = spec.mmap_offset.checked_add(spec.mmap_size);
        if spec.mmap_size == 0 || end.is_none() {
            return Err(DirtyLogError::Geometry(*spec));
        }
        let region = RegionSpec {
            guest_addr: 0,
            size: spec.mmap_size,
            user_addr: 0,
            mmap_offset: spec.mmap_offset,
        };
        Ok(DirtyLog {
            mapping: SharedMapping::new(&region, fd)?,
        })
    }

    /// Checks that it has a bit for the byte at `address`.
    ///
    /// # Errors
    /// [`DirtyLogError::TooShort`]
    pub fn check_covers(&self, address: u64) -> Result<(), DirtyLogError> {
        let len = self.mapping.len();
        if address / BYTE_SPAN < len as u64 {
            Ok(())
        } else {
            Err(DirtyLogError::TooShort { len, address })
        }
    }

    /// Whether the front-end truncated the log and the loss was noticed.
    pub(crate) fn poisoned(&self) -> bool {
        self.mapping.poisoned()
    }

    /// Sets the bits of `len` bytes of guest memory that were written.
    pub fn mark(&self, address: u64, len: u64) {
        let Some(last) = len
            .checked_sub(1)
            .and_then(|more| address.checked_add(more))
        else {
            return;
        };
        for page in address / LOG_PAGE..=last / LOG_PAGE {
            let at = page / 8;
            if at >= self.mapping.len() as u64 {
                return;
            }
            // SAFETY: `at` is below the mapping's length; all accesses are atomic.
            let byte = unsafe { &*self.mapping.base().add(at as usize).cast::<AtomicU8>() };
            // Never left out when the bit is set already: the front-end may be taking it, and then
            // only this operation's fence lets it see the write that the bit stands for.
            byte.fetch_or(1 << (page % 8), Ordering::SeqCst);
        }
    }
}

/// What one ring logs, and where.
#[derive(Clone, Debug)]
pub struct RingLog {
    /// The log.
    pub log: Arc<DirtyLog>,
    /// The guest address that stands for the used ring (for a packed ring, the device's event
    /// suppression structure); `None` when the ring's own pages are not logged.
    pub used_at: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(len: u64) -> (DirtyLog, OwnedFd) {
        let flags = nix::sys::memfd::MFdFlags::empty();
        let fd = nix::sys::memfd::memfd_create(c"log", flags).unwrap();
        nix::unistd::ftruncate(&fd, 4096 + len as i64).unwrap();
        let spec = LogSpec {
            mmap_size: len,
            mmap_offset: 4096,
        };
        (DirtyLog::adopt(&spec, fd.try_clone().unwrap()).unwrap(), fd)
    }

    fn bytes(fd: &OwnedFd, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        assert_eq!(nix::sys::uio::pread(fd, &mut bytes, 4096).unwrap(), len);
        bytes
    }

    #[test]
    fn every_page_touched_gets_its_bit_and_no_other_does() {
        let (log, fd) = log(3);
        log.mark(0, 0);
        log.mark(4095, 2);
        log.mark(9 * 4096, 4096);
        log.mark(23 * 4096 + 4095, 1);
        assert_eq!(bytes(&fd, 3), [0b11, 0b10, 0x80]);
    }

    #[test]
    fn what_lies_beyond_the_log_is_not_touched() {
        let (log, fd) = log(1);
        log.mark(7 * 4096, 4096 * 100);
        log.mark(1 << 63, u64::MAX);
        log.mark(u64::MAX, 1);
        nix::unistd::ftruncate(&fd, 4096 + 2).unwrap();
        assert_eq!(bytes(&fd, 2), [0x80, 0]);
        assert!(log.check_covers(8 * 4096 - 1).is_ok());
        assert!(log.check_covers(8 * 4096).is_err());
    }

    #[test]
    fn a_log_that_its_descriptor_does_not_hold_is_refused() {
        let (_, fd) = log(100);
        for (mmap_size, mmap_offset) in [(0, 0), (101, 4096), (1, u64::MAX), (u64::MAX, 1)] {
            let spec = LogSpec {
                mmap_size,
                mmap_offset,
            };
            assert!(DirtyLog::adopt(&spec, fd.try_clone().unwrap()).is_err());
        }
    }
}
