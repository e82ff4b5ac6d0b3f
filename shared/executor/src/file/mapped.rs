//! Files that live in memory, read and written through a shared mapping: a copy without a syscall.
//!
//! ```text
//!   file      │ window 0 (1 GiB) │ window 1 │ ...      mapped when first used, at most 32 of them
//!   window    │ granule (64 KiB) │ granule  │ ...      admitted or not
//!
//!   transfer ── all its granules admitted? ── yes ──> copy ──> poisoned meanwhile? ── no ──> done
//!                       │ no                                        │ yes
//!                       └──────────> pread, pwrite <────────────────┘
//! ```
//!
//! A granule is admitted when the file has every page of it, so that touching the mapping cannot
//! fail and allocates nothing: reading a hole through a mapping would fill it, writing one on a
//! full file system would raise SIGBUS, and a write past the end would be lost. A granule that was
//! written as a whole is admitted at once; others that keep being used are looked at
//! ([`Mappings::consider`]) by `mincore`, which tells the truth to the file's owner only: files of
//! others are not mapped. What takes pages away (truncation, punched
//! holes) runs in [`Mappings::shrink`], which dismisses the granules first.
//!
//! What another process takes away is noticed by its damage: a page that is missing is filled by
//! the kernel (a hole) or raises SIGBUS (the file's end), which poisons the window for good; the
//! transfer, and all later ones there, go by syscall. A page table costs a 512th of what is mapped,
//! 64 MiB at most for one file.
#![expect(
    unsafe_code,
    reason = "mapped files are reached through raw pointers, like a guest's memory"
)]

use super::{Direction, streaming};
use crate::sigbus::Registration;
use crate::{Buffer, Errno};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::sys::stat::fstat;
use nix::sys::time::TimeSpec;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, TryLockError};

/// Log2 of the bytes in a window.
const WINDOW_SHIFT: u32 = 30;
const WINDOW: usize = 1 << WINDOW_SHIFT;
/// Windows of one file: number `n` goes to place `n % WINDOWS` when that is free.
const WINDOWS: u64 = 32;
/// Log2 of the bytes in a granule: what the kernel maps around a fault.
const GRANULE_SHIFT: u32 = 16;
const GRANULE: usize = 1 << GRANULE_SHIFT;
/// Bytes of a page, the unit in which `mincore` answers.
const PAGE: usize = 4096;
/// Bytes of a cache line.
pub(super) const LINE: usize = 64;
/// Writes of this many bytes and more go past the caches: they would push out much of what is there.
const STREAMED_BYTES: usize = 128 << 10;
/// Granules looked at for one transfer.
const LOOKS: usize = 64;

/// A granule that may be reached through the mapping. Smaller values count its transfers that went
/// by syscall, so that it is looked at more and more rarely.
const ADMITTED: u8 = u8::MAX;
/// Writes of parts of a granule before it is looked at.
const WRITES_BEFORE_LOOK: u8 = 4;
/// Where that count goes on once it is full.
const COUNT_AGAIN: u8 = 64;

/// The mappings of one file.
pub(super) struct Mappings {
    windows: Box<[OnceLock<Option<Window>>]>,
    protection: ProtFlags,
    /// Held while granules are admitted, and while pages go away.
    changing: Mutex<()>,
    /// How often pages have gone away.
    shrinks: AtomicU64,
    /// Written through a mapping since the time of modification was set.
    written: AtomicBool,
}

/// A transfer that went by syscall.
pub(super) struct Done {
    pub(super) offset: u64,
    pub(super) len: usize,
    pub(super) direction: Direction,
    /// [`Mappings::shrinks`] before it.
    pub(super) shrinks: u64,
}

struct Window {
    number: u64,
    granules: Box<[AtomicU8]>,
    // Dropped in this order: the handler forgets the range before it is unmapped.
    registration: Registration,
    map: Map,
}

/// A mapped range of the file, unmapped on drop.
struct Map(NonNull<u8>);

// SAFETY: the mapping is plain memory that belongs to no thread; it is only copied from and to.
unsafe impl Send for Map {}
// SAFETY: as above; concurrent copies are as harmless as concurrent reads and writes of a file.
unsafe impl Sync for Map {}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `Window::new`; copies from and to it borrow its window.
        let _ = unsafe { munmap(self.0.cast(), WINDOW) };
    }
}

impl Window {
    fn new(fd: BorrowedFd<'_>, number: u64, protection: ProtFlags) -> Option<Window> {
        let offset = i64::try_from(number.checked_mul(WINDOW as u64)?).ok()?;
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE;
        let len = NonZeroUsize::new(WINDOW)?;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing else.
        let base = unsafe { mmap(None, len, protection, flags, fd, offset) }.ok()?;
        let map = Map(base.cast());
        let registration = Registration::new(map.0.as_ptr(), WINDOW, PAGE).ok()?;
        Some(Window {
            number,
            granules: (0..WINDOW / GRANULE).map(|_| AtomicU8::new(0)).collect(),
            registration,
            map,
        })
    }

    /// The granules that `len` bytes at `at` touch.
    #[inline]
    fn granules(&self, at: usize, len: usize) -> &[AtomicU8] {
        &self.granules[at >> GRANULE_SHIFT..=(at + len - 1) >> GRANULE_SHIFT]
    }

    #[inline]
    fn admits(&self, at: usize, len: usize) -> bool {
        let admitted = |granule: &AtomicU8| granule.load(Ordering::Relaxed) == ADMITTED;
        self.granules(at, len).iter().all(admitted) && !self.registration.poisoned()
    }

    #[inline]
    fn copy(&self, buffer: &Buffer, at: usize, direction: Direction) {
        // SAFETY: `at` is within the window, and so is `at` plus the buffer's length.
        let mut mapped = unsafe { self.map.0.as_ptr().add(at) };
        let streams = direction == Direction::Write && buffer.len() >= STREAMED_BYTES;
        buffer.for_each_piece(|memory, len| {
            // SAFETY: both ranges are mapped, and by different mappings, so they do not overlap.
            // Others may write either meanwhile: no reference to them is made, and whoever lets
            // that happen gets some mixture of bytes, as from `pread`.
            unsafe {
                match direction {
                    Direction::Read => ptr::copy_nonoverlapping(mapped, memory, len),
                    Direction::Write if streams => streaming::copy(memory, mapped, len),
                    Direction::Write => ptr::copy_nonoverlapping(memory, mapped, len),
                }
                mapped = mapped.add(len);
            }
        });
        if streams {
            streaming::finish();
        }
    }

    /// Admits those of `count` granules from `first` whose pages the file all has.
    fn admit(&self, first: usize, count: usize, file_len: u64) {
        let mut resident = [0_u8; LOOKS * GRANULE / PAGE];
        // SAFETY: the range is within the mapping, and the answer has a byte for each page.
        let result = unsafe {
            let start = self.map.0.as_ptr().add(first * GRANULE);
            libc::mincore(start.cast(), count * GRANULE, resident.as_mut_ptr())
        };
        if result != 0 {
            return;
        }
        let pages = resident.chunks_exact(GRANULE / PAGE);
        for (granule, pages) in (first..first + count).zip(pages) {
            let end = self.number * WINDOW as u64 + ((granule + 1) * GRANULE) as u64;
            if end <= file_len && pages.iter().all(|page| page & 1 == 1) {
                self.granules[granule].store(ADMITTED, Ordering::Relaxed);
            }
        }
    }
}

impl Mappings {
    /// For a file of `stat`; `None` when it is somebody else's.
    pub(super) fn new(stat: &libc::stat, protection: ProtFlags) -> Option<Mappings> {
        let own = nix::unistd::geteuid().as_raw() == stat.st_uid;
        own.then(|| Mappings {
            windows: (0..WINDOWS).map(|_| OnceLock::new()).collect(),
            protection,
            changing: Mutex::default(),
            shrinks: AtomicU64::new(0),
            written: AtomicBool::new(false),
        })
    }

    /// The window that `len` bytes at `offset` are in, when that is one, and where in it.
    #[inline]
    fn place(offset: u64, len: usize) -> Option<(u64, usize)> {
        let at = (offset & (WINDOW as u64 - 1)) as usize;
        (len != 0 && len <= WINDOW - at).then_some((offset >> WINDOW_SHIFT, at))
    }

    #[inline]
    fn window(&self, number: u64) -> Option<&Window> {
        let window = self.windows[(number % WINDOWS) as usize].get()?.as_ref()?;
        (window.number == number).then_some(window)
    }

    /// Fetches the first lines at `offset` into the cache, so that a copy that comes soon finds the
    /// page's translation and the hardware already reading ahead.
    #[inline]
    pub(super) fn prefetch(&self, offset: u64) {
        if let Some((number, at)) = Self::place(offset, 1)
            && let Some(window) = self.window(number)
        {
            // SAFETY: `at` is within the window.
            let first = unsafe { window.map.0.as_ptr().add(at) };
            prefetch_line(first);
            prefetch_line(first.wrapping_add(LINE));
        }
    }

    /// Transfers `buffer` when it can be done through the mapping; whether it was.
    #[inline]
    pub(super) fn transfer(&self, buffer: &Buffer, offset: u64, direction: Direction) -> bool {
        let Some((number, at)) = Self::place(offset, buffer.len()) else {
            return false;
        };
        let Some(window) = self.window(number) else {
            return false;
        };
        if direction == Direction::Write && !self.protection.contains(ProtFlags::PROT_WRITE) {
            return false;
        }
        if !window.admits(at, buffer.len()) {
            return false;
        }
        window.copy(buffer, at, direction);
        if direction == Direction::Write && !self.written.load(Ordering::Relaxed) {
            self.written.store(true, Ordering::Relaxed);
        }
        !window.registration.poisoned()
    }

    /// A number that changes when pages go away.
    pub(super) fn shrinks(&self) -> u64 {
        self.shrinks.load(Ordering::Acquire)
    }

    /// Takes note of a transfer that went by syscall, and perhaps admits its granules, so that the
    /// next one need not.
    pub(super) fn consider(&self, fd: BorrowedFd<'_>, done: &Done) {
        let Some((number, at)) = Self::place(done.offset, done.len) else {
            return;
        };
        let place = &self.windows[(number % WINDOWS) as usize];
        let window = match place.get() {
            Some(Some(window)) if window.number == number => window,
            Some(_) => return,
            None => match place.get_or_init(|| Window::new(fd, number, self.protection)) {
                Some(window) if window.number == number => window,
                _ => return,
            },
        };
        if window.registration.poisoned() {
            return;
        }
        let mut look = false;
        for granule in window.granules(at, done.len) {
            look |= count(granule, done.direction);
        }
        // What was just written is there: no need to look.
        let written = match done.direction {
            Direction::Write => at.div_ceil(GRANULE)..(at + done.len) / GRANULE,
            Direction::Read => 0..0,
        };
        if written.is_empty() && !look {
            return;
        }
        let _changing = match self.changing.try_lock() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            // Next time.
            Err(TryLockError::WouldBlock) => return,
        };
        if !written.is_empty() && self.shrinks() == done.shrinks {
            for granule in &window.granules[written] {
                granule.store(ADMITTED, Ordering::Relaxed);
            }
        }
        // Those at the ends, too, which a write covers in part.
        if look && let Ok(stat) = fstat(fd) {
            let count = window.granules(at, done.len).len().min(LOOKS);
            let file_len = u64::try_from(stat.st_size).unwrap_or(0);
            window.admit(at >> GRANULE_SHIFT, count, file_len);
        }
    }

    /// Runs `take`, which takes pages from `len` bytes at `offset` away.
    pub(super) fn shrink<T>(&self, offset: u64, len: u64, take: impl FnOnce() -> T) -> T {
        let _changing = crate::sync::short_lock(&self.changing);
        self.shrinks.fetch_add(1, Ordering::AcqRel);
        let end = offset.saturating_add(len);
        for window in self
            .windows
            .iter()
            .filter_map(|place| place.get()?.as_ref())
        {
            let start = window.number << WINDOW_SHIFT;
            let from = offset.clamp(start, start + WINDOW as u64) - start;
            let to = end.clamp(start, start + WINDOW as u64) - start;
            if from < to {
                for granule in window.granules(from as usize, (to - from) as usize) {
                    granule.store(0, Ordering::Relaxed);
                }
            }
        }
        take()
    }

    /// Sets the file's time of modification when it is due: the kernel does that for writes by
    /// syscall only.
    pub(super) fn stamp(&self, fd: BorrowedFd<'_>) -> Result<(), Errno> {
        if !self.written.load(Ordering::Relaxed) || !self.written.swap(false, Ordering::Relaxed) {
            return Ok(());
        }
        let (accessed, modified) = (TimeSpec::UTIME_OMIT, TimeSpec::UTIME_NOW);
        nix::sys::stat::futimens(fd, &accessed, &modified)
    }
}

/// Fetches the line at `address` into the cache; never faults.
#[inline]
fn prefetch_line(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch is a hint and has no effect on memory.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(address.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// Counts a transfer by syscall; whether it is time to look at the granule.
fn count(granule: &AtomicU8, direction: Direction) -> bool {
    let before = granule.load(Ordering::Relaxed);
    if before == ADMITTED {
        return false;
    }
    let now = if before >= ADMITTED - 1 {
        COUNT_AGAIN
    } else {
        before + 1
    };
    // Not when it was admitted meanwhile.
    let counted = granule.compare_exchange(before, now, Ordering::Relaxed, Ordering::Relaxed);
    // A granule that is being filled is not worth a look yet.
    let worthwhile = direction == Direction::Read || now >= WRITES_BEFORE_LOOK;
    counted.is_ok() && now.is_power_of_two() && worthwhile
}

/// How a file with these open flags may be mapped.
pub(super) fn protection(access: nix::fcntl::OFlag) -> io::Result<ProtFlags> {
    use nix::fcntl::OFlag;
    match access & OFlag::O_ACCMODE {
        OFlag::O_RDWR => Ok(ProtFlags::PROT_READ | ProtFlags::PROT_WRITE),
        OFlag::O_RDONLY => Ok(ProtFlags::PROT_READ),
        _ => Err(io::ErrorKind::PermissionDenied.into()),
    }
}

#[cfg(test)]
mod tests;
