//! Surviving others who truncate the files that this process has mapped.
//!
//! Touching a page of a shared mapping that its file no longer has raises SIGBUS, which kills a
//! process. Every mapping of a file that others may change is registered here: a front-end's
//! memory, a disk image. The handler marks the mapping poisoned and puts a private zero page under
//! the faulting address; the thread goes on, and whoever uses the mapping asks afterwards
//! ([`Registration::poisoned`]) whether what it did counts. A SIGBUS anywhere else has its default
//! effect.
//!
//! Transfers that the kernel does on such pages fail with `EFAULT` by themselves.

#![expect(
    unsafe_code,
    reason = "a signal handler that repairs mappings works on raw addresses"
)]

use std::io;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

/// Most mappings registered at one time, over all uses in the process.
const MAX_MAPPINGS: usize = 4096;

/// A registered range. Written under `taken`, read by the handler without locks.
struct Slot {
    taken: AtomicBool,
    start: AtomicUsize,
    end: AtomicUsize,
    page_size: AtomicUsize,
    poisoned: AtomicBool,
}

static SLOTS: [Slot; MAX_MAPPINGS] = [const {
    Slot {
        taken: AtomicBool::new(false),
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        page_size: AtomicUsize::new(0),
        poisoned: AtomicBool::new(false),
    }
}; MAX_MAPPINGS];

/// Slots ever used lie below this, so the handler looks no further.
static HIGH_WATER: AtomicUsize = AtomicUsize::new(0);
/// Counts poisonings, so that a ring checks its mappings only when there was one.
static POISONINGS: AtomicU64 = AtomicU64::new(0);
static INSTALL: Once = Once::new();

/// Number of poisonings in the process until now.
pub fn poisonings() -> u64 {
    POISONINGS.load(Ordering::Relaxed)
}

/// Keeps a mapping under the handler's care; dropped before the mapping is unmapped.
#[derive(Debug)]
pub struct Registration {
    slot: usize,
}

impl Registration {
    /// Registers `len` bytes of a mapping at `start`, backed by pages of `page_size` bytes.
    ///
    /// # Errors
    /// `ENOMEM` when [`MAX_MAPPINGS`] are registered already.
    pub fn new(start: *mut u8, len: usize, page_size: usize) -> io::Result<Registration> {
        INSTALL.call_once(install);
        for (index, slot) in SLOTS.iter().enumerate() {
            if slot.taken.swap(true, Ordering::AcqRel) {
                continue;
            }
            slot.poisoned.store(false, Ordering::Relaxed);
            slot.page_size.store(page_size, Ordering::Relaxed);
            slot.start.store(start as usize, Ordering::Relaxed);
            HIGH_WATER.fetch_max(index + 1, Ordering::Release);
            slot.end.store(start as usize + len, Ordering::Release);
            return Ok(Registration { slot: index });
        }
        Err(io::Error::from_raw_os_error(libc::ENOMEM))
    }

    /// Whether a page of the mapping had to be replaced. Asked after an access, it covers that
    /// access, whichever thread met the missing page first.
    #[inline]
    pub fn poisoned(&self) -> bool {
        SLOTS[self.slot].poisoned.load(Ordering::Acquire)
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let slot = &SLOTS[self.slot];
        slot.end.store(0, Ordering::Release);
        slot.start.store(0, Ordering::Relaxed);
        slot.taken.store(false, Ordering::Release);
    }
}

fn install() {
    // SAFETY: an all-zero sigaction is a valid value to fill in.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_sigbus as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: `action` is a complete sigaction whose handler only makes async-signal-safe calls.
    let result = unsafe { libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut()) };
    assert_eq!(result, 0, "SIGBUS can always be caught");
}

/// Finds the registered mapping that holds `address`.
fn find(address: usize) -> Option<&'static Slot> {
    let used = HIGH_WATER.load(Ordering::Acquire).min(MAX_MAPPINGS);
    SLOTS[..used].iter().find(|slot| {
        let end = slot.end.load(Ordering::Acquire);
        address < end && address >= slot.start.load(Ordering::Relaxed)
    })
}

extern "C" fn on_sigbus(
    _signal: libc::c_int,
    info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    // SAFETY: the kernel passes a valid siginfo to an SA_SIGINFO handler.
    let address = unsafe { (*info).si_addr() } as usize;
    if let Some(slot) = find(address) {
        let (start, end) = (
            slot.start.load(Ordering::Relaxed),
            slot.end.load(Ordering::Relaxed),
        );
        let page_size = slot.page_size.load(Ordering::Relaxed);
        let page = start + ((address - start) & !(page_size - 1));
        // Before the page is there: a thread that then reaches it without a fault must know.
        slot.poisoned.store(true, Ordering::SeqCst);
        // SAFETY: the page lies in a live registered mapping, whose owner (the faulting thread
        // works through it) keeps it mapped; replacing it changes only what this process sees of
        // that file.
        let mapped = unsafe {
            libc::mmap(
                page as *mut libc::c_void,
                page_size.min(end - page),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
                -1,
                0,
            )
        };
        if mapped as usize == page {
            POISONINGS.fetch_add(1, Ordering::Release);
            return;
        }
    }
    // SAFETY: with the default action restored the faulting access is repeated and ends the
    // process as it would have without a handler.
    unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    #[test]
    fn truncated_memory_is_survived_and_reported() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        // SAFETY: a fresh shared mapping of an open file.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                8192,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        }
        .cast::<u8>();
        let registration = Registration::new(base, 8192, 4096).unwrap();
        let before = poisonings();
        file.set_len(4096).unwrap();
        // SAFETY: both pages are mapped; the second one's fault is what is tested.
        unsafe {
            base.add(5000).write_volatile(7);
            assert_eq!(base.add(5000).read_volatile(), 7);
            base.write_volatile(1);
        }
        assert!(registration.poisoned());
        assert!(poisonings() > before);
        drop(registration);
        // SAFETY: nothing uses the mapping any more.
        unsafe { libc::munmap(base.cast(), 8192) };
    }
}
