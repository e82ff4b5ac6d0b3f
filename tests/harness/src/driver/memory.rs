//! The guest's memory: memfd regions that the back-end maps too.
//!
//! Owns region layout, the user addresses announced to the back-end (invented, so that a back-end
//! which confuses guest and user addresses fails at once) and bounds-checked access. One control
//! region holds rings and request headers; data regions hold buffers, start at an offset inside
//! their memfd, and can be replaced while others are in use. Must not know requests.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::{AtomicAccess, Bytes, FileOffset, MmapRegion, VolatileMemory};

/// Guest-physical address of the control region.
const CONTROL_GPA: u64 = 0x10_0000;
/// Guest-physical address of the first data region; the others follow at this stride.
const DATA_GPA: u64 = 1 << 32;
/// Added to every guest-physical address to make the announced user address.
const USER_BASE: u64 = 0x7100_0000_0000;
/// Where a data region starts inside its memfd, in bytes.
const DATA_FILE_OFFSET: u64 = 0x3000;

/// Distinguishes the user addresses of regions that replace each other.
static INSTANCE: AtomicU64 = AtomicU64::new(0);

/// One contiguous piece of guest memory.
#[derive(Debug)]
pub struct Region {
    /// Guest-physical address of the first byte.
    pub gpa: u64,
    /// Front-end user address of the first byte, as announced.
    pub user_addr: u64,
    /// Offset of the first byte in the memfd.
    pub file_offset: u64,
    file: Arc<File>,
    map: MmapRegion,
}

impl Region {
    /// The region of rings and request headers.
    ///
    /// # Errors
    /// When the memfd cannot be made or mapped.
    pub fn control(bytes: usize) -> Result<Self> {
        Self::create(CONTROL_GPA, 0, bytes)
    }

    /// Data region number `index`; a later one of the same index takes the same guest address but
    /// another memfd and user address.
    ///
    /// # Errors
    /// When the memfd cannot be made or mapped.
    pub fn data(index: usize, bytes: usize) -> Result<Self> {
        Self::create(DATA_GPA + ((index as u64) << 32), DATA_FILE_OFFSET, bytes)
    }

    fn create(gpa: u64, file_offset: u64, bytes: usize) -> Result<Self> {
        let bytes = bytes.next_multiple_of(4096);
        let fd = memfd_create(
            "guest-memory",
            MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING,
        )
        .context("memfd_create")?;
        let file = Arc::new(File::from(fd));
        file.set_len(file_offset + bytes as u64)
            .context("size of the guest memory")?;
        fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).context("F_ADD_SEALS")?;
        let map = MmapRegion::from_file(FileOffset::from_arc(file.clone(), file_offset), bytes)
            .context("mmap of guest memory")?;
        let user_addr = USER_BASE + gpa + (INSTANCE.fetch_add(1, Ordering::Relaxed) << 38);
        Ok(Self {
            gpa,
            user_addr,
            file_offset,
            file,
            map,
        })
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.map.size()
    }

    /// Where it is mapped, for code that accesses it without checks.
    pub fn as_ptr(&self) -> *mut u8 {
        self.map.as_ptr()
    }

    /// The memfd.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Entry of `SET_MEM_TABLE`: guest address, size, user address, offset in the memfd.
    pub fn table_entry(&self) -> [u8; 32] {
        let mut entry = [0; 32];
        let words = [
            self.gpa,
            self.bytes() as u64,
            self.user_addr,
            self.file_offset,
        ];
        for (at, word) in words.into_iter().enumerate() {
            entry[at * 8..at * 8 + 8].copy_from_slice(&word.to_le_bytes());
        }
        entry
    }

    /// Copies out of guest memory.
    ///
    /// # Panics
    /// When the range leaves the region.
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        self.map
            .as_volatile_slice()
            .read_slice(into, offset)
            .expect("the range is in the region");
    }

    /// Copies into guest memory.
    ///
    /// # Panics
    /// When the range leaves the region.
    pub fn write(&self, offset: usize, from: &[u8]) {
        self.map
            .as_volatile_slice()
            .write_slice(from, offset)
            .expect("the range is in the region");
    }

    /// Atomic load of an aligned integer.
    ///
    /// # Panics
    /// When it is misaligned or outside the region.
    pub fn load<T: AtomicAccess>(&self, offset: usize, order: Ordering) -> T {
        self.map
            .as_volatile_slice()
            .load(offset, order)
            .expect("aligned and in the region")
    }

    /// Atomic store of an aligned integer.
    ///
    /// # Panics
    /// When it is misaligned or outside the region.
    pub fn store<T: AtomicAccess>(&self, offset: usize, value: T, order: Ordering) {
        self.map
            .as_volatile_slice()
            .store(value, offset, order)
            .expect("aligned and in the region");
    }
}

/// A range inside a region that one owner uses.
#[derive(Clone, Debug)]
pub struct Area {
    /// Where it lies.
    pub region: Arc<Region>,
    /// First byte in the region.
    pub offset: usize,
    /// Size in bytes.
    pub bytes: usize,
}

impl Area {
    /// Guest-physical address of byte `at` of the area.
    pub fn gpa(&self, at: usize) -> u64 {
        self.region.gpa + (self.offset + at) as u64
    }

    /// Front-end user address of byte `at` of the area.
    pub fn user_addr(&self, at: usize) -> u64 {
        self.region.user_addr + (self.offset + at) as u64
    }

    /// Copies out, starting at byte `at` of the area.
    ///
    /// # Panics
    /// When the range leaves the area.
    pub fn read(&self, at: usize, into: &mut [u8]) {
        assert!(
            at + into.len() <= self.bytes,
            "read of {} bytes at {at} leaves the area",
            into.len()
        );
        self.region.read(self.offset + at, into);
    }

    /// Copies in, starting at byte `at` of the area.
    ///
    /// # Panics
    /// When the range leaves the area.
    pub fn write(&self, at: usize, from: &[u8]) {
        assert!(
            at + from.len() <= self.bytes,
            "write of {} bytes at {at} leaves the area",
            from.len()
        );
        self.region.write(self.offset + at, from);
    }

    /// Cuts `bytes` off the front, at the next multiple of `align`.
    ///
    /// # Panics
    /// When the area is too small.
    pub fn carve(&mut self, bytes: usize, align: usize) -> Area {
        let start = self.offset.next_multiple_of(align);
        let end = self.offset + self.bytes;
        assert!(
            start + bytes <= end,
            "area too small for {bytes} more bytes"
        );
        self.offset = start + bytes;
        self.bytes = end - self.offset;
        Area {
            region: self.region.clone(),
            offset: start,
            bytes,
        }
    }
}

/// The whole of a region as one area.
impl From<Arc<Region>> for Area {
    fn from(region: Arc<Region>) -> Self {
        let bytes = region.bytes();
        Area {
            region,
            offset: 0,
            bytes,
        }
    }
}
