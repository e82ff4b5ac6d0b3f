//! The guest-physical address map and the interrupt numbers: constants only.
//!
//! ```text
//! 0x0000_0000_0000  RAM (first 640 KiB: boot parameters, page tables, command line)
//! 0x0000_000e_0000  ACPI tables (RSDP first), up to the reset vector
//! 0x0000_0010_0000  RAM: kernel, initrd
//! 0x0000_c000_0000  32-bit MMIO window of the PCI root
//! 0x0000_e000_0000  ECAM of bus 0
//! 0x0000_fec0_0000  IOAPIC, 0xfee0_0000 LAPIC, KVM's own pages below 4 GiB
//! 0x0001_0000_0000  the rest of the RAM
//! ```

/// End of conventional memory that the guest may use (start of the EBDA on a PC).
pub(crate) const CONVENTIONAL_END: u64 = 0x9_fc00;
/// Where the ACPI tables start; the RSDP is the first of them.
pub(crate) const ACPI_START: u64 = 0xe_0000;
/// Where a PC's CPU starts; what is here stands in for a BIOS that is asked to restart the machine.
pub(crate) const RESET_VECTOR: u64 = 0xf_fff0;
/// First byte of high memory.
pub(crate) const HIGH_MEMORY_START: u64 = 0x10_0000;

/// Global descriptor table of the boot CPU.
pub(crate) const GDT_START: u64 = 0x500;
/// PVH start info, its memory map and module list.
pub(crate) const PVH_INFO_START: u64 = 0x6000;
/// PVH memory map entries.
pub(crate) const PVH_MEMMAP_START: u64 = 0x6100;
/// PVH module (initrd) list.
pub(crate) const PVH_MODULES_START: u64 = 0x6800;
/// Zero page of the Linux boot protocol.
pub(crate) const ZERO_PAGE_START: u64 = 0x7000;
/// Boot page tables: one PML4, one PDPT, four page directories.
pub(crate) const PAGE_TABLES_START: u64 = 0x9000;
/// Kernel command line.
pub(crate) const CMDLINE_START: u64 = 0x2_0000;
/// Longest kernel command line in bytes, the terminating NUL included.
pub(crate) const CMDLINE_MAX: usize = 0x1_0000;
/// Stack of the boot CPU until the kernel sets its own.
pub(crate) const BOOT_STACK: u64 = 0x8ff0;

/// RAM below 4 GiB ends here at the latest.
pub(crate) const LOW_RAM_END: u64 = 0xc000_0000;
/// 32-bit memory window of the PCI root: start.
pub(crate) const PCI_WINDOW_START: u64 = 0xc000_0000;
/// 32-bit memory window of the PCI root: end, exclusive.
pub(crate) const PCI_WINDOW_END: u64 = 0xe000_0000;
/// Memory-mapped configuration space of bus 0.
pub(crate) const ECAM_START: u64 = 0xe000_0000;
/// Size of the configuration space of one bus.
pub(crate) const ECAM_SIZE: u64 = 0x10_0000;
/// RAM beyond the hole starts here.
pub(crate) const HIGH_RAM_START: u64 = 0x1_0000_0000;

/// Registers of the in-kernel IOAPIC.
pub(crate) const IOAPIC_START: u32 = 0xfec0_0000;
/// Registers of the in-kernel local APICs.
pub(crate) const LAPIC_START: u32 = 0xfee0_0000;
/// KVM's identity map page (one page).
pub(crate) const KVM_IDENTITY_MAP_START: u64 = 0xfeff_c000;
/// KVM's task state segment (three pages).
pub(crate) const KVM_TSS_START: u64 = 0xfeff_d000;

/// First I/O port of the serial port.
pub(crate) const SERIAL_PORT: u16 = 0x3f8;
/// Interrupt of the serial port.
pub(crate) const SERIAL_GSI: u32 = 4;
/// Interrupt of the generic event device (power button).
pub(crate) const EVENT_GSI: u32 = 16;
/// Inputs of the IOAPIC.
pub(crate) const IOAPIC_INPUTS: u32 = 24;

/// ACPI sleep control register (write) and, one higher, sleep status (read).
pub(crate) const SLEEP_CONTROL_PORT: u16 = 0x600;
/// ACPI reset register.
pub(crate) const RESET_PORT: u16 = 0x602;
/// Pending events of the generic event device; reading clears them.
pub(crate) const EVENT_PORT: u16 = 0x603;
/// Value that resets the machine when written to [`RESET_PORT`].
pub(crate) const RESET_VALUE: u8 = 1;
/// Sleep type of S5 in the sleep control register.
pub(crate) const SLEEP_TYPE_S5: u8 = 5;
