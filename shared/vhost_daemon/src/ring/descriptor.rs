//! Descriptors of both layouts: 16 bytes in guest memory, read once.
//!
//! ```text
//!   split:   addr u64 │ len u32 │ flags u16 │ next u16
//!   packed:  addr u64 │ len u32 │ id u16    │ flags u16
//! ```

#![expect(unsafe_code, reason = "guest memory is reached through raw pointers")]

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};

use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

use super::RingError;
use super::chain::{Buffer, MAX_CHAIN};
use crate::memory::MemoryTable;

/// Length of a descriptor in bytes.
pub(super) const DESC_LEN: usize = 16;

/// A descriptor after its one read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest address of the buffer or indirect table.
    pub addr: u64,
    /// Its length in bytes.
    pub len: u32,
    /// `VRING_DESC_F_*`, and the available and used bits of a packed ring.
    pub flags: u16,
    /// `next` of a split ring's descriptor, `id` of a packed ring's.
    pub tag: u16,
}

impl Descriptor {
    /// A split ring's descriptor from its two words.
    #[inline]
    pub(super) fn split((addr, rest): (u64, u64)) -> Descriptor {
        Descriptor {
            addr,
            len: rest as u32,
            flags: (rest >> 32) as u16,
            tag: (rest >> 48) as u16,
        }
    }

    /// A packed ring's descriptor from its two words.
    #[inline]
    pub(super) fn packed((addr, rest): (u64, u64)) -> Descriptor {
        Descriptor {
            addr,
            len: rest as u32,
            flags: (rest >> 48) as u16,
            tag: (rest >> 32) as u16,
        }
    }

    #[inline]
    fn has(self, flag: u32) -> bool {
        u32::from(self.flags) & flag != 0
    }

    /// Another descriptor follows.
    #[inline]
    pub(super) fn has_next(self) -> bool {
        self.has(VRING_DESC_F_NEXT)
    }

    /// It names a table of descriptors.
    #[inline]
    pub(super) fn is_indirect(self) -> bool {
        self.has(VRING_DESC_F_INDIRECT)
    }

    #[inline]
    pub(super) fn buffer(self) -> Buffer {
        Buffer {
            addr: self.addr,
            len: self.len,
            writable: self.has(VRING_DESC_F_WRITE),
        }
    }

    /// Entries of the indirect table that it names in the chain of `head`, when there may be one.
    ///
    /// # Errors
    /// [`RingError::Indirect`]
    pub(super) fn table_entries(self, head: u16, indirect: Indirect) -> Result<u32, RingError> {
        let count = self.len / DESC_LEN as u32;
        let whole = self.len.is_multiple_of(DESC_LEN as u32);
        let allowed = indirect == Indirect::Negotiated && !self.has_next();
        if !allowed || !whole || count == 0 || count > u32::from(MAX_CHAIN) {
            return Err(RingError::Indirect {
                head,
                len: self.len,
            });
        }
        Ok(count)
    }

    /// The words of entry `index` of the indirect table that it names.
    ///
    /// # Errors
    /// [`RingError::Buffer`] when the entry is not in shared memory.
    #[inline]
    pub(super) fn table_entry(
        self,
        index: u32,
        memory: &MemoryTable,
        hint: &Cell<usize>,
    ) -> Result<(u64, u64), RingError> {
        let outside = RingError::Buffer {
            addr: self.addr,
            len: self.len,
        };
        let offset = u64::from(index) * DESC_LEN as u64;
        let addr = self.addr.checked_add(offset).ok_or(outside)?;
        match memory.locate(addr, hint) {
            // SAFETY: 16 bytes follow the entry's first in its region.
            Some((base, left)) if left >= DESC_LEN as u64 => Ok(unsafe { read_words(base) }),
            _ => Err(outside),
        }
    }
}

/// Whether the driver may use indirect tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Indirect {
    Negotiated,
    Forbidden,
}

/// Reads a descriptor in two loads; the guest may change it meanwhile, never afterwards.
///
/// # Safety
/// 16 bytes at `at` are mapped.
#[inline]
pub(super) unsafe fn read_words(at: *const u8) -> (u64, u64) {
    let word = |offset: usize| -> u64 {
        // SAFETY: the caller says that the bytes are mapped.
        let pointer = unsafe { at.add(offset) };
        if (pointer as usize).is_multiple_of(8) {
            // SAFETY: mapped and aligned to 8.
            u64::from_le(unsafe { (*pointer.cast::<AtomicU64>()).load(Ordering::Relaxed) })
        } else {
            // SAFETY: mapped; alignment 1.
            u64::from_le_bytes(unsafe { pointer.cast::<[u8; 8]>().read_volatile() })
        }
    };
    (word(0), word(8))
}

/// Fetches the line at `address` into the cache; never faults.
#[inline]
pub(super) fn prefetch(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch is a hint and has no effect on memory.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(address.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// Fetches the line at `address` into the cache to be written to, so that another processor's copy goes away already; never
/// faults.
#[inline]
pub(super) fn prefetch_to_write(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch is a hint and has no effect on memory; processors without it take it for no operation.
    unsafe {
        std::arch::asm!("prefetchw [{}]", in(reg) address, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(target_arch = "x86_64"))]
    prefetch(address);
}
