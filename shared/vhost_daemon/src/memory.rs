//! The guest's memory as the front-end shares it: mapped regions and address lookup.
//!
//! A [`MemoryTable`] is immutable; a change makes a new one that shares the regions that stayed.
//! Whoever still works in the old table (requests in flight) keeps it, and with it the mappings,
//! alive by its `Arc`.
//!
//! Promises: regions never overlap, neither in guest addresses nor in the front-end's; a region's
//! descriptor was at least as long as the region when it was mapped; a later truncation poisons
//! the region instead of ending the process. Nothing here hands out a slice or reference to guest
//! memory: the guest changes it at any time.

#![expect(unsafe_code, reason = "guest memory is reached through raw pointers")]

use std::cell::Cell;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use executor::sigbus::Registration;

use crate::wire::RegionSpec;

/// Most regions that one front-end may share; what GET_MAX_MEM_SLOTS answers.
pub const MAX_REGIONS: usize = 512;
/// Largest page size accepted, in bytes (x86's biggest huge page).
const MAX_PAGE_SIZE: u64 = 1 << 30;

/// Why a region cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The region shares addresses with one that is there.
    #[error("region {0:#x?} overlaps another one")]
    Overlap(RegionSpec),
    /// Too many regions.
    #[error("more than {MAX_REGIONS} memory regions")]
    TooMany,
    /// No such region.
    #[error("region {0:#x?} is not mapped")]
    NotFound(RegionSpec),
    /// The descriptor is no file, or shorter than the region.
    #[error("a descriptor of {file_len} bytes (mode {mode:o}) cannot back region {spec:#x?}")]
    File {
        /// The region.
        spec: RegionSpec,
        /// The descriptor's length in bytes.
        file_len: u64,
        /// `st_mode`.
        mode: u32,
    },
    /// The host refused to map it.
    #[error("cannot map region {spec:#x?}: {source}")]
    Map {
        /// The region.
        spec: RegionSpec,
        /// Why.
        source: io::Error,
    },
}

/// What identifies the bytes behind a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Backing {
    device: u64,
    inode: u64,
}

/// A shared mapping, unmapped on drop.
#[derive(Debug)]
struct Mapping {
    base: *mut u8,
    len: usize,
}

impl Mapping {
    fn new(fd: impl AsFd, offset: u64, len: usize) -> io::Result<Mapping> {
        let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing else.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                fd.as_fd().as_raw_fd(),
                offset,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Mapping {
            base: base.cast(),
            len,
        })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`; whoever uses it keeps its owner alive.
        unsafe { libc::munmap(self.base.cast(), self.len) };
    }
}

/// A descriptor mapped shared and watched for truncation. The descriptor itself is not kept, so
/// that a front-end's regions do not use the process' descriptors up.
#[derive(Debug)]
pub(crate) struct SharedMapping {
    // Dropped in this order: the handler forgets the range before it is unmapped.
    registration: Registration,
    map: Mapping,
    /// Distance from the mapping's start to the bytes asked for.
    skew: usize,
    len: usize,
    backing: Backing,
}

impl SharedMapping {
    /// Maps the bytes that `spec` names of `fd`, which must be a file that long.
    pub(crate) fn new(spec: &RegionSpec, fd: OwnedFd) -> Result<SharedMapping, MemoryError> {
        let failed = |source| MemoryError::Map {
            spec: *spec,
            source,
        };
        let stat = nix::sys::stat::fstat(&fd).map_err(|e| failed(e.into()))?;
        let end = end_in_file(spec, &stat)?;
        // Mappings of huge pages begin and end on huge-page boundaries; a file on hugetlbfs gives
        // its page size as its block size. On other files a larger unit does no harm.
        let page_size = u64::try_from(stat.st_blksize).unwrap_or(0).max(4096);
        if !page_size.is_power_of_two() || page_size > MAX_PAGE_SIZE {
            return Err(failed(io::ErrorKind::InvalidInput.into()));
        }
        let start = spec.mmap_offset & !(page_size - 1);
        let map_len = usize::try_from((end - start).next_multiple_of(page_size))
            .map_err(|_| failed(io::ErrorKind::InvalidInput.into()))?;
        let map = Mapping::new(fd, start, map_len).map_err(failed)?;
        let registration =
            Registration::new(map.base, map_len, page_size as usize).map_err(failed)?;
        Ok(SharedMapping {
            registration,
            map,
            skew: (spec.mmap_offset - start) as usize,
            len: spec.size as usize,
            backing: Backing {
                device: stat.st_dev,
                inode: stat.st_ino,
            },
        })
    }

    /// The first byte asked for.
    pub(crate) fn base(&self) -> *mut u8 {
        // SAFETY: the mapping is at least `skew + len` bytes long.
        unsafe { self.map.base.add(self.skew) }
    }

    /// Bytes from [`SharedMapping::base`].
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Whether the file was truncated under the mapping and the loss was noticed.
    pub(crate) fn poisoned(&self) -> bool {
        self.registration.poisoned()
    }
}

/// Where `spec` ends in the file of `stat`, which has to be a regular one that long.
fn end_in_file(spec: &RegionSpec, stat: &libc::stat) -> Result<u64, MemoryError> {
    let file_len = u64::try_from(stat.st_size).unwrap_or(0);
    let end = spec.mmap_offset.checked_add(spec.size);
    let is_file = stat.st_mode & libc::S_IFMT == libc::S_IFREG;
    end.filter(|end| is_file && *end <= file_len)
        .ok_or(MemoryError::File {
            spec: *spec,
            file_len,
            mode: stat.st_mode,
        })
}

/// One mapped region of guest memory.
#[derive(Debug)]
pub struct Region {
    spec: RegionSpec,
    mapping: SharedMapping,
    base: *mut u8,
}

// SAFETY: the mapping lives as long as the region and its bytes are only reached through raw
// pointers with volatile or atomic accesses, or handed to the kernel.
unsafe impl Send for Region {}
// SAFETY: as above; nothing in a region changes after it was made.
unsafe impl Sync for Region {}

impl Region {
    fn new(spec: &RegionSpec, fd: OwnedFd) -> Result<Region, MemoryError> {
        let mapping = SharedMapping::new(spec, fd)?;
        Ok(Region {
            spec: *spec,
            base: mapping.base(),
            mapping,
        })
    }

    /// The region as the front-end described it.
    pub fn spec(&self) -> &RegionSpec {
        &self.spec
    }

    /// Whether the front-end truncated the memory and the loss was noticed.
    pub fn poisoned(&self) -> bool {
        self.mapping.poisoned()
    }

    /// Pointer to the byte at `guest_addr` and the bytes from there to the region's end; `None`
    /// outside of the region.
    #[inline]
    fn locate(&self, guest_addr: u64) -> Option<(*mut u8, u64)> {
        let offset = guest_addr.wrapping_sub(self.spec.guest_addr);
        if offset >= self.spec.size {
            return None;
        }
        // SAFETY: `offset` is less than the mapped length.
        Some((
            unsafe { self.base.add(offset as usize) },
            self.spec.size - offset,
        ))
    }

    fn overlaps(&self, other: &RegionSpec) -> bool {
        // The parser checked that no sum overflows.
        let meet = |a: u64, b: u64| a < b + other.size && b < a + self.spec.size;
        meet(self.spec.guest_addr, other.guest_addr) || meet(self.spec.user_addr, other.user_addr)
    }
}

/// A contiguous piece of guest memory that keeps its region mapped.
#[derive(Clone, Debug)]
pub struct Mapped {
    /// First byte.
    pub(crate) base: *mut u8,
    /// Keeps `base` mapped.
    pub(crate) region: Arc<Region>,
}

impl Mapped {
    /// Guest address of the first byte.
    pub(crate) fn guest_address(&self) -> u64 {
        let offset = self.base.addr() - self.region.base.addr();
        self.region.spec.guest_addr + offset as u64
    }
}

/// All memory a front-end shares, sorted by guest address.
#[derive(Clone, Debug, Default)]
pub struct MemoryTable {
    regions: Vec<Arc<Region>>,
}

impl MemoryTable {
    /// The regions, by ascending guest address.
    pub fn regions(&self) -> &[Arc<Region>] {
        &self.regions
    }

    /// A table of exactly these regions (SET_MEM_TABLE). Mappings of `self` that stay the same are
    /// taken over.
    ///
    /// # Errors
    /// [`MemoryError`]; the regions added by then are unmapped again.
    pub fn replaced(
        &self,
        regions: Vec<(RegionSpec, OwnedFd)>,
    ) -> Result<MemoryTable, MemoryError> {
        let mut table = MemoryTable::default();
        for (spec, fd) in regions {
            match self.same_region(&spec, &fd) {
                Some(region) => table.insert(&spec, || Ok(region))?,
                None => table.insert(&spec, || Region::new(&spec, fd).map(Arc::new))?,
            }
        }
        Ok(table)
    }

    /// This table and one more region (ADD_MEM_REG).
    ///
    /// # Errors
    /// [`MemoryError`]
    pub fn with(&self, spec: &RegionSpec, fd: OwnedFd) -> Result<MemoryTable, MemoryError> {
        let mut table = self.clone();
        table.insert(spec, || Region::new(spec, fd).map(Arc::new))?;
        Ok(table)
    }

    /// This table less one region (REM_MEM_REG), which is named by its addresses and size.
    ///
    /// # Errors
    /// [`MemoryError::NotFound`]
    pub fn without(&self, spec: &RegionSpec) -> Result<MemoryTable, MemoryError> {
        let same = |region: &Arc<Region>| {
            let other = &region.spec;
            other.guest_addr == spec.guest_addr
                && other.user_addr == spec.user_addr
                && other.size == spec.size
        };
        let mut table = self.clone();
        let position = self
            .regions
            .iter()
            .position(same)
            .ok_or(MemoryError::NotFound(*spec))?;
        table.regions.remove(position);
        Ok(table)
    }

    fn insert(
        &mut self,
        spec: &RegionSpec,
        make: impl FnOnce() -> Result<Arc<Region>, MemoryError>,
    ) -> Result<(), MemoryError> {
        if self.regions.len() >= MAX_REGIONS {
            return Err(MemoryError::TooMany);
        }
        if self.regions.iter().any(|region| region.overlaps(spec)) {
            return Err(MemoryError::Overlap(*spec));
        }
        let at = self
            .regions
            .partition_point(|region| region.spec.guest_addr < spec.guest_addr);
        self.regions.insert(at, make()?);
        Ok(())
    }

    fn same_region(&self, spec: &RegionSpec, fd: &OwnedFd) -> Option<Arc<Region>> {
        let stat = nix::sys::stat::fstat(fd).ok()?;
        let backing = Backing {
            device: stat.st_dev,
            inode: stat.st_ino,
        };
        self.regions
            .iter()
            .find(|region| {
                region.spec == *spec && region.mapping.backing == backing && !region.poisoned()
            })
            .cloned()
    }

    /// Pointer to guest memory at `guest_addr` and how many bytes follow it in its region. `hint`
    /// remembers the region found last.
    #[inline]
    pub fn locate(&self, guest_addr: u64, hint: &Cell<usize>) -> Option<(*mut u8, u64)> {
        if let Some(found) = self
            .regions
            .get(hint.get())
            .and_then(|region| region.locate(guest_addr))
        {
            return Some(found);
        }
        let index = self
            .regions
            .partition_point(|region| region.spec.guest_addr <= guest_addr)
            .checked_sub(1)?;
        hint.set(index);
        self.regions[index].locate(guest_addr)
    }

    /// The guest address of a byte that [`MemoryTable::locate`] gave a pointer to.
    pub(crate) fn guest_address(&self, pointer: *const u8) -> Option<u64> {
        self.regions.iter().find_map(|region| {
            let offset = (pointer.addr() as u64).checked_sub(region.base.addr() as u64)?;
            (offset < region.spec.size).then(|| region.spec.guest_addr + offset)
        })
    }

    /// The last byte of guest memory; `None` without any.
    pub(crate) fn last_address(&self) -> Option<u64> {
        let last = &self.regions.last()?.spec;
        Some(last.guest_addr + (last.size - 1))
    }

    /// Device and inode of the file that an address of the front-end's lies in.
    pub fn file_of_user(&self, user_addr: u64) -> Option<[u64; 2]> {
        let mapped = self.map_user(user_addr, 1)?;
        let Backing { device, inode } = mapped.region.mapping.backing;
        Some([device, inode])
    }

    /// `len` bytes at an address of the front-end's, within one region.
    pub fn map_user(&self, user_addr: u64, len: u64) -> Option<Mapped> {
        self.regions.iter().find_map(|region| {
            let offset = user_addr.checked_sub(region.spec.user_addr)?;
            if offset.checked_add(len)? > region.spec.size {
                return None;
            }
            let (base, _) = region.locate(region.spec.guest_addr + offset)?;
            Some(Mapped {
                base,
                region: region.clone(),
            })
        })
    }
}

// SAFETY: `base` points into `region`, which is Send and Sync itself.
unsafe impl Send for Mapped {}

#[cfg(test)]
mod tests {
    use super::*;

    fn memfd(len: u64) -> OwnedFd {
        let fd = nix::sys::memfd::memfd_create(c"guest", nix::sys::memfd::MFdFlags::empty());
        let fd = fd.unwrap();
        nix::unistd::ftruncate(&fd, len as i64).unwrap();
        fd
    }

    fn spec(guest_addr: u64, size: u64) -> RegionSpec {
        RegionSpec {
            guest_addr,
            size,
            user_addr: guest_addr + 0x7000_0000,
            mmap_offset: 0,
        }
    }

    #[test]
    fn overlapping_regions_are_refused() {
        let table = MemoryTable::default()
            .with(&spec(0x1000, 0x2000), memfd(0x2000))
            .unwrap();
        for other in [
            spec(0x0, 0x1001),
            spec(0x2fff, 0x1000),
            spec(0x1800, 0x100),
            spec(0, 0x10000),
        ] {
            let error = table.with(&other, memfd(0x10000)).unwrap_err();
            assert!(matches!(error, MemoryError::Overlap(_)), "{error}");
        }
        table.with(&spec(0x3000, 0x1000), memfd(0x1000)).unwrap();
        let mut same_user = spec(0x10000, 0x1000);
        same_user.user_addr = spec(0x1000, 0).user_addr;
        assert!(table.with(&same_user, memfd(0x1000)).is_err());
    }

    #[test]
    fn descriptors_that_are_too_short_or_no_files_are_refused() {
        let table = MemoryTable::default();
        assert!(table.with(&spec(0, 0x2000), memfd(0x1fff)).is_err());
        let mut beyond = spec(0, 0x1000);
        beyond.mmap_offset = 0x1000;
        assert!(table.with(&beyond, memfd(0x1fff)).is_err());
        let (reader, _writer) = nix::unistd::pipe().unwrap();
        assert!(table.with(&spec(0, 0x1000), reader).is_err());
    }

    #[test]
    fn lookups_stay_inside_regions() {
        let table = MemoryTable::default()
            .with(&spec(0x10000, 0x1000), memfd(0x1000))
            .unwrap()
            .with(&spec(0x40000, 0x2000), memfd(0x2000))
            .unwrap();
        let hint = Cell::new(7);
        assert!(table.locate(0xffff, &hint).is_none());
        assert_eq!(table.locate(0x10ff0, &hint).unwrap().1, 0x10);
        assert!(table.locate(0x11000, &hint).is_none());
        assert_eq!(table.locate(0x40000, &hint).unwrap().1, 0x2000);
        assert!(table.locate(u64::MAX, &hint).is_none());
        let user = |addr: u64, len| table.map_user(addr + 0x7000_0000, len);
        assert!(user(0x10000, 0x1000).is_some());
        assert!(user(0x10001, 0x1000).is_none());
        assert!(user(0x10001, u64::MAX).is_none());
    }

    #[test]
    fn unchanged_regions_keep_their_mapping() {
        let fd = memfd(0x3000);
        let again = || fd.try_clone().unwrap();
        let first = MemoryTable::default()
            .replaced(vec![(spec(0x1000, 0x1000), again())])
            .unwrap();
        let second = first
            .replaced(vec![
                (spec(0x1000, 0x1000), again()),
                (spec(0x8000, 0x1000), memfd(0x1000)),
            ])
            .unwrap();
        assert!(Arc::ptr_eq(&first.regions()[0], &second.regions()[0]));
        let third = second.without(&spec(0x1000, 0x1000)).unwrap();
        assert_eq!(third.regions().len(), 1);
        assert!(third.without(&spec(0x1000, 0x1000)).is_err());
    }

    #[test]
    fn regions_need_not_begin_on_a_page() {
        let fd = memfd(0x3000);
        nix::sys::uio::pwrite(&fd, b"x", 0x1234).unwrap();
        let mut odd = spec(0x5000, 0x100);
        odd.mmap_offset = 0x1234;
        let table = MemoryTable::default().with(&odd, fd).unwrap();
        let (base, left) = table.locate(0x5000, &Cell::new(0)).unwrap();
        assert_eq!(left, 0x100);
        // SAFETY: the lookup said that the byte is mapped.
        assert_eq!(unsafe { base.read_volatile() }, b'x');
    }
}
