//! Guest memory: one sealed memfd, mapped shared, in at most two regions around the hole below 4 GiB.
//!
//! Promises: the file can neither shrink nor grow (a back-end that maps it cannot be hit by SIGBUS), the same bytes are
//! at the same place in the file for the life of the process. Must not know who reads or writes what is in it.

use std::fs::File;
use std::io;

use anyhow::{Context, Result};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap,
};

use crate::layout;

/// The guest's RAM, cheap to clone.
#[derive(Clone)]
pub(crate) struct Memory {
    map: GuestMemoryMmap,
}

/// One contiguous piece of RAM: the same bytes seen by the guest, by this process and in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Region {
    /// First guest-physical address.
    pub(crate) guest_start: u64,
    /// Bytes.
    pub(crate) size: u64,
    /// Address of the mapping in this process.
    pub(crate) host_start: u64,
    /// Offset in the memory file.
    pub(crate) file_offset: u64,
}

/// What backs the memory file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Backing {
    /// Normal pages.
    Pages,
    /// Huge pages of the host's default size.
    HugePages,
}

impl Memory {
    /// Creates `size` bytes of guest memory.
    ///
    /// # Errors
    /// The memfd cannot be created, sized, sealed or mapped (no huge pages, no memory).
    pub(crate) fn new(size: u64, backing: Backing) -> Result<Self> {
        let file = create_file(size, backing)?;
        let regions = split(size)
            .into_iter()
            .map(|(start, offset, size)| map_region(&file, backing, (start, offset, size)))
            .collect::<Result<Vec<_>>>()?;
        let map = GuestMemoryMmap::from_regions(regions).context("guest memory layout")?;
        Ok(Self { map })
    }

    /// The memory map as vm-memory's type, for crates that load into it.
    pub(crate) fn map(&self) -> &GuestMemoryMmap {
        &self.map
    }

    /// The regions, lowest guest address first.
    pub(crate) fn regions(&self) -> Vec<Region> {
        self.map
            .iter()
            .map(|region| Region {
                guest_start: region.start_addr().0,
                size: region.len(),
                host_start: region.as_ptr() as u64,
                file_offset: region.file_offset().map_or(0, FileOffset::start),
            })
            .collect()
    }

    /// The sealed file behind all regions.
    pub(crate) fn file(&self) -> &File {
        self.map
            .iter()
            .find_map(|region| region.file_offset())
            .expect("every region is made from the memory file")
            .file()
    }

    /// First address above the RAM below 4 GiB.
    pub(crate) fn low_end(&self) -> u64 {
        let low = self
            .map
            .iter()
            .next()
            .expect("there is always a low region");
        low.start_addr().0 + low.len()
    }

    /// Address in this process of `len` guest bytes, or `None` if they are not all in one region.
    pub(crate) fn host_address(&self, guest: u64, len: usize) -> Option<u64> {
        let slice = self.map.get_slice(GuestAddress(guest), len).ok()?;
        Some(slice.ptr_guard().as_ptr() as u64)
    }

    /// Reads a little-endian 16-bit value, for instance a ring index.
    pub(crate) fn read_u16(&self, guest: u64) -> Option<u16> {
        self.map
            .read_obj::<u16>(GuestAddress(guest))
            .ok()
            .map(u16::from_le)
    }

    /// Copies `bytes` to `guest`.
    ///
    /// # Errors
    /// The range is not RAM.
    pub(crate) fn write(&self, guest: u64, bytes: &[u8]) -> Result<()> {
        self.map
            .write_slice(bytes, GuestAddress(guest))
            .with_context(|| format!("{} bytes at guest address {guest:#x}", bytes.len()))
    }
}

/// Pieces of RAM as (guest address, file offset, bytes).
fn split(size: u64) -> Vec<(u64, u64, u64)> {
    let low = size.min(layout::LOW_RAM_END);
    let mut pieces = vec![(0, 0, low)];
    if size > low {
        pieces.push((layout::HIGH_RAM_START, low, size - low));
    }
    pieces
}

fn create_file(size: u64, backing: Backing) -> Result<File> {
    let mut flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    if backing == Backing::HugePages {
        flags |= MFdFlags::MFD_HUGETLB;
    }
    let file = File::from(memfd_create(c"guest-memory", flags).context("guest memory: memfd")?);
    file.set_len(size)
        .with_context(|| format!("guest memory: {size} bytes"))?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).context("guest memory: seals")?;
    Ok(file)
}

fn map_region(
    file: &File,
    backing: Backing,
    (start, offset, size): (u64, u64, u64),
) -> Result<GuestRegionMmap> {
    // Huge pages are reserved here: an access to one that is not there would be fatal later.
    let reserve = if backing == Backing::Pages {
        libc::MAP_NORESERVE
    } else {
        0
    };
    let file = file.try_clone().context("guest memory: file descriptor")?;
    let region = MmapRegionBuilder::new(usize::try_from(size)?)
        .with_file_offset(FileOffset::new(file, offset))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_SHARED | reserve)
        .build()
        .map_err(io::Error::other)
        .with_context(|| match backing {
            Backing::Pages => format!("guest memory: mapping {size} bytes"),
            Backing::HugePages => format!("--hugepages: {size} bytes of huge pages"),
        })?;
    GuestRegionMmap::new(region, GuestAddress(start)).context("guest memory: address range")
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn ram_is_split_around_the_hole_below_4_gib() {
        assert_eq!(split(GIB), [(0, 0, GIB)]);
        assert_eq!(split(3 * GIB), [(0, 0, 3 * GIB)]);
        assert_eq!(
            split(5 * GIB),
            [(0, 0, 3 * GIB), (4 * GIB, 3 * GIB, 2 * GIB)]
        );
    }

    #[test]
    fn the_memory_file_can_neither_shrink_nor_grow() {
        let memory = Memory::new(16 << 20, Backing::Pages).unwrap();
        assert!(memory.file().set_len(4096).is_err());
        assert!(memory.file().set_len(32 << 20).is_err());
    }

    #[test]
    fn host_addresses_exist_only_for_ranges_inside_one_region() {
        let memory = Memory::new(16 << 20, Backing::Pages).unwrap();
        let region = memory.regions()[0];
        assert_eq!(
            memory.host_address(0x1000, 16),
            Some(region.host_start + 0x1000)
        );
        assert_eq!(memory.host_address((16 << 20) - 8, 16), None);
        assert_eq!(memory.host_address(u64::MAX - 4, 16), None);
    }

    #[test]
    fn what_is_written_is_in_the_file() {
        use std::os::unix::fs::FileExt;
        let memory = Memory::new(16 << 20, Backing::Pages).unwrap();
        memory.write(0x2000, &[0x34, 0x12]).unwrap();
        let mut bytes = [0; 2];
        memory.file().read_exact_at(&mut bytes, 0x2000).unwrap();
        assert_eq!(bytes, [0x34, 0x12]);
        assert_eq!(memory.read_u16(0x2000), Some(0x1234));
        assert!(memory.write(16 << 20, &[0]).is_err());
    }
}
