//! Words in memory that outlive the process: a file on tmpfs, mapped shared. It may grow where it is.
//!
//! Owns the mapping only. What a killed process stored is there for the next one, in program
//! order; a power cut loses it. All access is by atomics, because both a predecessor that is
//! still dying and several threads may look at it.

use std::fs::{File, OpenOptions};
use std::io;
use std::num::NonZeroUsize;
use std::ops::Deref;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::Ordering::{AcqRel, Acquire};
use std::sync::atomic::{AtomicU64, AtomicUsize};

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

const WORD: usize = size_of::<AtomicU64>();

/// A shared array of 64-bit words. Clones refer to the same memory.
#[derive(Clone)]
pub struct SharedMemory {
    words: Arc<Words>,
}

enum Words {
    Heap(Box<[AtomicU64]>),
    Mapped(Mapping),
}

struct Mapping {
    base: NonNull<AtomicU64>,
    /// Words of address space.
    reserved: usize,
    /// Words that the file has room for; only grows.
    words: AtomicUsize,
    file: File,
}

#[expect(
    unsafe_code,
    reason = "a mapping is plain memory that belongs to no thread"
)]
// SAFETY: the memory is only reached through `&[AtomicU64]`, which any thread may share.
unsafe impl Send for Mapping {}
#[expect(
    unsafe_code,
    reason = "a mapping is plain memory that belongs to no thread"
)]
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    #[expect(unsafe_code, reason = "the mapping is owned here")]
    fn drop(&mut self) {
        // SAFETY: `base` and the length are those of a mapping that this value made and alone
        // owns; no reference into it outlives `self`.
        let _ = unsafe { munmap(self.base.cast(), self.reserved * WORD) };
    }
}

impl SharedMemory {
    /// `words` zeroed words on the heap; shared among clones only.
    pub fn anonymous(words: usize) -> Self {
        let heap = (0..words).map(|_| AtomicU64::new(0)).collect();
        Self {
            words: Arc::new(Words::Heap(heap)),
        }
    }

    /// Maps the file at `path` (made with mode 0600 when absent), reserving room for `words`
    /// words so that a store never faults for lack of space. It may grow up to `most` words; one that
    /// had grown keeps its length.
    ///
    /// # Errors
    /// The host's error; `InvalidInput` for a length of zero or a path that is not a file.
    pub fn open(path: &Path, words: usize, most: usize) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
            .open(path)?;
        let most = most.max(words);
        let reserved = most
            .checked_mul(WORD)
            .and_then(NonZeroUsize::new)
            .ok_or(io::ErrorKind::InvalidInput)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() || words == 0 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "not a regular file",
            ));
        }
        let grown = (metadata.len() / WORD as u64).min(most as u64) as usize;
        let words = words.max(grown);
        file.set_len((words * WORD) as u64)?;
        fallocate(&file, FallocateFlags::empty(), 0, (words * WORD) as i64)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        #[expect(unsafe_code, reason = "mapping a file that this type then owns")]
        // SAFETY: a fresh mapping at an address that the kernel chooses aliases no Rust object.
        let base = unsafe { mmap(None, reserved, protection, MapFlags::MAP_SHARED, &file, 0)? };
        Ok(Self {
            words: Arc::new(Words::Mapped(Mapping {
                base: base.cast(),
                reserved: most,
                words: AtomicUsize::new(words),
                file,
            })),
        })
    }

    /// Makes room for at least `words` words, where they are; new ones are zero.
    ///
    /// # Errors
    /// The host's error, with the length as it was; `InvalidInput` beyond what was reserved.
    pub fn grow(&self, words: usize) -> io::Result<()> {
        let (len, reserved) = match &*self.words {
            Words::Heap(heap) => (heap.len(), heap.len()),
            Words::Mapped(map) => (map.words.load(Acquire), map.reserved),
        };
        if words > reserved {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        if words > len
            && let Words::Mapped(map) = &*self.words
        {
            fallocate(&map.file, FallocateFlags::empty(), 0, (words * WORD) as i64)?;
            map.words.fetch_max(words, AcqRel);
        }
        Ok(())
    }
}

impl Deref for SharedMemory {
    type Target = [AtomicU64];

    #[expect(unsafe_code, reason = "the mapping is seen as a slice of atomics")]
    fn deref(&self) -> &[AtomicU64] {
        match &*self.words {
            Words::Heap(words) => words,
            // SAFETY: the mapping is page-aligned, at least `words` long, as is the file, was zeroed
            // by the kernel and lives as long as `self`; a file that another process truncates below it would
            // fault, which is why its directory is private to the daemon.
            Words::Mapped(map) => unsafe {
                std::slice::from_raw_parts(map.base.as_ptr(), map.words.load(Acquire))
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;

    #[test]
    fn a_second_mapping_sees_what_the_first_stored() {
        let path = std::env::temp_dir().join(format!("outboard-shm-{}", std::process::id()));
        let first = SharedMemory::open(&path, 1000, 1000).unwrap();
        first[999].store(7, Ordering::Release);
        drop(first);
        let second = SharedMemory::open(&path, 1000, 1000).unwrap();
        assert_eq!(second[999].load(Acquire), 7);
        assert_eq!(second.len(), 1000);
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_grown_memory_is_found_grown() {
        let path = std::env::temp_dir().join(format!("outboard-grown-{}", std::process::id()));
        let first = SharedMemory::open(&path, 100, 5000).unwrap();
        first[99].store(7, Ordering::Release);
        assert_eq!(first.len(), 100);
        first.grow(3000).unwrap();
        first[2999].store(8, Ordering::Release);
        assert!(first.grow(5001).is_err());
        drop(first);
        let second = SharedMemory::open(&path, 100, 5000).unwrap();
        assert_eq!(second.len(), 3000);
        assert_eq!(second[99].load(Acquire), 7);
        assert_eq!(second[2999].load(Acquire), 8);
        std::fs::remove_file(&path).unwrap();
    }
}
