//! Words in memory that outlive the process: a file on tmpfs, mapped shared.
//!
//! Owns the mapping only. What a killed process stored is there for the next one, in program
//! order; a power cut loses it. All access is by atomics, because both a predecessor that is
//! still dying and several threads may look at it.

use std::fs::OpenOptions;
use std::io;
use std::num::NonZeroUsize;
use std::ops::Deref;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

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
    words: usize,
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
        let _ = unsafe { munmap(self.base.cast(), self.words * size_of::<AtomicU64>()) };
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
    /// words so that a store never faults for lack of space.
    ///
    /// # Errors
    /// The host's error; `InvalidInput` for a length of zero or a path that is not a file.
    pub fn open(path: &Path, words: usize) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
            .open(path)?;
        let bytes = words
            .checked_mul(size_of::<AtomicU64>())
            .and_then(NonZeroUsize::new)
            .ok_or(io::ErrorKind::InvalidInput)?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "not a regular file",
            ));
        }
        file.set_len(bytes.get() as u64)?;
        fallocate(&file, FallocateFlags::empty(), 0, bytes.get() as i64)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        #[expect(unsafe_code, reason = "mapping a file that this type then owns")]
        // SAFETY: a fresh mapping at an address that the kernel chooses aliases no Rust object.
        let base = unsafe { mmap(None, bytes, protection, MapFlags::MAP_SHARED, &file, 0)? };
        Ok(Self {
            words: Arc::new(Words::Mapped(Mapping {
                base: base.cast(),
                words,
            })),
        })
    }
}

impl Deref for SharedMemory {
    type Target = [AtomicU64];

    #[expect(unsafe_code, reason = "the mapping is seen as a slice of atomics")]
    fn deref(&self) -> &[AtomicU64] {
        match &*self.words {
            Words::Heap(words) => words,
            // SAFETY: the mapping is page-aligned, `words` long, zero-initialised by the kernel
            // and lives as long as `self`; a file that another process truncates below it would
            // fault, which is why its directory is private to the daemon.
            Words::Mapped(map) => unsafe {
                std::slice::from_raw_parts(map.base.as_ptr(), map.words)
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
        let first = SharedMemory::open(&path, 1000).unwrap();
        first[999].store(7, Ordering::Release);
        drop(first);
        let second = SharedMemory::open(&path, 1000).unwrap();
        assert_eq!(second[999].load(Ordering::Acquire), 7);
        assert_eq!(second.len(), 1000);
        std::fs::remove_file(&path).unwrap();
    }
}
