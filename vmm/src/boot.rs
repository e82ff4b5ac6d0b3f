//! Loading a kernel: places kernel, initrd, command line and boot parameters in guest memory.
//!
//! Two protocols: the Linux 64-bit boot protocol for a bzImage (Documentation/arch/x86/boot.rst, 2.12 and up) and PVH
//! for an ELF vmlinux. The files stay open, so that a reset loads the same kernel again without opening a path.
//! Must not know about CPUs beyond the [`Entry`] that it returns.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use crate::layout;
use crate::memory::Memory;

/// How the boot CPU enters the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// Linux 64-bit entry: long mode with identity-mapped page tables.
    Linux64 {
        /// First instruction.
        entry: u64,
        /// Guest address of the zero page.
        zero_page: u64,
    },
    /// PVH: 32-bit protected mode without paging.
    Pvh {
        /// First instruction.
        entry: u64,
        /// Guest address of the start info.
        start_info: u64,
    },
}

/// Real-mode code at the reset vector: writes the reset register, then halts for good. Linux on hardware-reduced ACPI asks EFI to
/// restart the machine, and without EFI jumps here; it never tries the reset register itself.
const RESET_CODE: [u8; 9] = {
    let [low, high] = layout::RESET_PORT.to_le_bytes();
    // mov dx, port; mov al, value; out dx, al; hlt; jmp to hlt
    [
        0xba,
        low,
        high,
        0xb0,
        layout::RESET_VALUE,
        0xee,
        0xf4,
        0xeb,
        0xfd,
    ]
};

/// The files that a guest boots from.
pub(crate) struct Kernel {
    image: OpenFile,
    initrd: Option<OpenFile>,
    cmdline: Vec<u8>,
}

struct OpenFile {
    file: File,
    path: PathBuf,
}

impl OpenFile {
    fn open(option: &str, path: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("{option} {}", path.display()))?;
        Ok(Self {
            file,
            path: path.to_owned(),
        })
    }

    fn size(&self) -> Result<u64> {
        let metadata = self
            .file
            .metadata()
            .with_context(|| format!("{}: size", self.path.display()))?;
        Ok(metadata.len())
    }
}

impl Kernel {
    /// Opens the files.
    ///
    /// # Errors
    /// A file cannot be opened, or the command line is too long or has a NUL byte.
    pub(crate) fn open(image: &Path, initrd: Option<&Path>, cmdline: &str) -> Result<Self> {
        ensure!(
            cmdline.len() < layout::CMDLINE_MAX,
            "--cmdline is {} bytes long, at most {} are possible",
            cmdline.len(),
            layout::CMDLINE_MAX - 1
        );
        ensure!(!cmdline.contains('\0'), "--cmdline contains a NUL byte");
        Ok(Self {
            image: OpenFile::open("--kernel", image)?,
            initrd: initrd
                .map(|path| OpenFile::open("--initrd", path))
                .transpose()?,
            cmdline: [cmdline.as_bytes(), b"\0"].concat(),
        })
    }

    /// Writes everything that the kernel expects into `memory`; `rsdp` is the guest address of the ACPI root pointer.
    ///
    /// # Errors
    /// The kernel is of no known kind, or the files do not fit into the memory.
    pub(crate) fn load(&self, memory: &Memory, rsdp: u64) -> Result<Entry> {
        memory.write(layout::CMDLINE_START, &self.cmdline)?;
        memory.write(layout::RESET_VECTOR, &RESET_CODE)?;
        let mut file = &self.image.file;
        let mut start = [0; 0x206];
        file.rewind()
            .and_then(|()| file.read_exact(&mut start))
            .with_context(|| format!("--kernel {}: too short", self.image.path.display()))?;
        if &start[0x202..0x206] == b"HdrS" {
            self.load_bzimage(memory, rsdp)
        } else if &start[..4] == b"\x7fELF" {
            self.load_elf(memory, rsdp)
        } else {
            bail!(
                "--kernel {}: neither a bzImage nor an ELF file",
                self.image.path.display()
            )
        }
        .with_context(|| format!("--kernel {}", self.image.path.display()))
    }

    fn load_bzimage(&self, memory: &Memory, rsdp: u64) -> Result<Entry> {
        const XLF_KERNEL_64: u16 = 1;
        let mut file = self.image.file.try_clone()?;
        let loaded = BzImage::load(
            memory.map(),
            None,
            &mut file,
            Some(GuestAddress(layout::HIGH_MEMORY_START)),
        )
        .context("cannot load the bzImage into the guest memory")?;
        let header = loaded
            .setup_header
            .expect("a loaded bzImage has a setup header");
        let (version, xloadflags) = (header.version, header.xloadflags);
        ensure!(
            version >= 0x20c && xloadflags & XLF_KERNEL_64 != 0,
            "boot protocol {}.{:02} has no 64-bit entry",
            version >> 8,
            version & 0xff
        );
        let kernel_end = loaded.kernel_end.max(
            header
                .pref_address
                .saturating_add(u64::from(header.init_size)),
        );
        let initrd_limit = u64::from(header.initrd_addr_max) + 1;
        let initrd = self.load_initrd(memory, kernel_end, initrd_limit)?;
        let params = zero_page(header, memory, rsdp, initrd);
        memory.write(layout::ZERO_PAGE_START, params.as_slice())?;
        Ok(Entry::Linux64 {
            entry: loaded.kernel_load.0 + 0x200,
            zero_page: layout::ZERO_PAGE_START,
        })
    }

    fn load_elf(&self, memory: &Memory, rsdp: u64) -> Result<Entry> {
        let mut file = self.image.file.try_clone()?;
        let loaded = Elf::load(memory.map(), None, &mut file, None)
            .context("cannot load the ELF file into the guest memory")?;
        let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
            bail!("the ELF file has no PVH note (CONFIG_PVH)");
        };
        let initrd = self.load_initrd(memory, loaded.kernel_end, memory.low_end())?;
        write_start_info(memory, rsdp, initrd)?;
        Ok(Entry::Pvh {
            entry: entry.0,
            start_info: layout::PVH_INFO_START,
        })
    }

    /// Puts the initrd as high as `limit` allows; returns its address and size.
    fn load_initrd(&self, memory: &Memory, kernel_end: u64, limit: u64) -> Result<(u64, u64)> {
        let Some(initrd) = &self.initrd else {
            ensure!(
                kernel_end <= memory.low_end(),
                "--memory is too small for the kernel"
            );
            return Ok((0, 0));
        };
        let size = initrd.size()?;
        let start = memory
            .low_end()
            .min(limit)
            .checked_sub(size)
            .map(|start| start & !0xfff);
        let start = start
            .filter(|start| *start >= kernel_end)
            .with_context(|| {
                format!("--memory is too small for the kernel and an initrd of {size} bytes")
            })?;
        let mut file = &initrd.file;
        file.seek(SeekFrom::Start(0))?;
        memory
            .map()
            .read_exact_volatile_from(GuestAddress(start), &mut file, usize::try_from(size)?)
            .with_context(|| format!("--initrd {}", initrd.path.display()))?;
        Ok((start, size))
    }
}

/// Kinds of address ranges, with the numbers that E820 and PVH share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RangeKind {
    Ram = 1,
    Reserved = 2,
}

/// The memory map as (start, end, kind).
fn address_ranges(memory: &Memory) -> Vec<(u64, u64, RangeKind)> {
    let mut ranges = vec![
        (0, layout::CONVENTIONAL_END, RangeKind::Ram),
        (
            layout::CONVENTIONAL_END,
            layout::HIGH_MEMORY_START,
            RangeKind::Reserved,
        ),
        (layout::HIGH_MEMORY_START, memory.low_end(), RangeKind::Ram),
        (
            layout::ECAM_START,
            layout::ECAM_START + layout::ECAM_SIZE,
            RangeKind::Reserved,
        ),
    ];
    for region in memory.regions().iter().skip(1) {
        ranges.push((
            region.guest_start,
            region.guest_start + region.size,
            RangeKind::Ram,
        ));
    }
    ranges
}

fn zero_page(header: setup_header, memory: &Memory, rsdp: u64, initrd: (u64, u64)) -> boot_params {
    const LOADER_UNDEFINED: u8 = 0xff;
    let mut params = boot_params {
        hdr: header,
        acpi_rsdp_addr: rsdp,
        ..Default::default()
    };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = layout::CMDLINE_START as u32;
    params.hdr.ramdisk_image = initrd.0 as u32;
    params.hdr.ramdisk_size = initrd.1 as u32;
    params.ext_ramdisk_size = (initrd.1 >> 32) as u32;
    let mut table = params.e820_table;
    let ranges = address_ranges(memory);
    for (entry, (start, end, kind)) in table.iter_mut().zip(&ranges) {
        *entry = boot_e820_entry {
            addr: *start,
            size: end - start,
            r#type: *kind as u32,
        };
    }
    params.e820_table = table;
    params.e820_entries = ranges.len() as u8;
    params
}

fn write_start_info(memory: &Memory, rsdp: u64, initrd: (u64, u64)) -> Result<()> {
    const START_MAGIC: u32 = 0x336e_c578;
    let ranges = address_ranges(memory);
    for (index, (start, end, kind)) in ranges.iter().enumerate() {
        let entry = hvm_memmap_table_entry {
            addr: *start,
            size: end - start,
            type_: *kind as u32,
            reserved: 0,
        };
        let at = layout::PVH_MEMMAP_START + (index * entry.as_slice().len()) as u64;
        memory.write(at, entry.as_slice())?;
    }
    let module = hvm_modlist_entry {
        paddr: initrd.0,
        size: initrd.1,
        ..Default::default()
    };
    memory.write(layout::PVH_MODULES_START, module.as_slice())?;
    let info = hvm_start_info {
        magic: START_MAGIC,
        version: 1,
        nr_modules: u32::from(initrd.1 > 0),
        modlist_paddr: layout::PVH_MODULES_START,
        cmdline_paddr: layout::CMDLINE_START,
        rsdp_paddr: rsdp,
        memmap_paddr: layout::PVH_MEMMAP_START,
        memmap_entries: ranges.len() as u32,
        ..Default::default()
    };
    memory.write(layout::PVH_INFO_START, info.as_slice())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Backing;
    use std::io::Write;

    fn kernel(bytes: &[u8], initrd: Option<&[u8]>) -> (tempfile::TempDir, Kernel) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kernel");
        File::create(&path).unwrap().write_all(bytes).unwrap();
        let initrd = initrd.map(|bytes| {
            let path = dir.path().join("initrd");
            File::create(&path).unwrap().write_all(bytes).unwrap();
            path
        });
        let kernel = Kernel::open(&path, initrd.as_deref(), "quiet").unwrap();
        (dir, kernel)
    }

    fn bzimage() -> Vec<u8> {
        let mut image = vec![0; 4096];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
        image[0x211] = 1;
        image[0x214..0x218].copy_from_slice(&0x10_0000_u32.to_le_bytes());
        image[0x22c..0x230].copy_from_slice(&0x7fff_ffff_u32.to_le_bytes());
        image[0x236] = 1;
        image[0x258..0x260].copy_from_slice(&0x10_0000_u64.to_le_bytes());
        image[0x260..0x264].copy_from_slice(&0x10_0000_u32.to_le_bytes());
        image
    }

    #[test]
    fn a_bzimage_is_entered_at_its_64_bit_entry_and_finds_its_parameters() {
        let (_dir, kernel) = kernel(&bzimage(), Some(&[7; 5000]));
        let memory = Memory::new(16 << 20, Backing::Pages).unwrap();
        let entry = kernel.load(&memory, layout::ACPI_START).unwrap();
        assert_eq!(
            entry,
            Entry::Linux64 {
                entry: 0x10_0200,
                zero_page: layout::ZERO_PAGE_START
            }
        );
        let params: boot_params = memory
            .map()
            .read_obj(GuestAddress(layout::ZERO_PAGE_START))
            .unwrap();
        let (address, size) = (params.hdr.ramdisk_image, params.hdr.ramdisk_size);
        assert_eq!((address, size), ((16 << 20) - 8192, 5000));
        assert_eq!({ params.acpi_rsdp_addr }, layout::ACPI_START);
        assert_eq!(params.e820_entries, 4);
    }

    #[test]
    fn what_is_no_kernel_is_refused() {
        let memory = Memory::new(16 << 20, Backing::Pages).unwrap();
        for bytes in [vec![0; 10], vec![0; 4096]] {
            let (_dir, kernel) = kernel(&bytes, None);
            assert!(kernel.load(&memory, 0).is_err());
        }
    }

    #[test]
    fn a_kernel_without_64_bit_entry_and_an_initrd_that_does_not_fit_are_refused() {
        let memory = Memory::new(16 << 20, Backing::Pages).unwrap();
        let mut old = bzimage();
        old[0x236] = 0;
        let error = kernel(&old, None).1.load(&memory, 0).unwrap_err();
        assert!(format!("{error:#}").contains("64-bit entry"), "{error:#}");
        let big = vec![1; 15 << 20];
        let error = kernel(&bzimage(), Some(&big))
            .1
            .load(&memory, 0)
            .unwrap_err();
        assert!(format!("{error:#}").contains("too small"), "{error:#}");
    }

    #[test]
    fn the_memory_map_covers_ram_and_leaves_out_the_hole() {
        let memory = Memory::new(4 << 30, Backing::Pages).unwrap();
        let ram: u64 = address_ranges(&memory)
            .iter()
            .filter(|(_, _, kind)| *kind == RangeKind::Ram)
            .map(|(start, end, _)| end - start)
            .sum();
        assert_eq!(
            ram,
            (4 << 30) - (layout::HIGH_MEMORY_START - layout::CONVENTIONAL_END)
        );
    }
}
