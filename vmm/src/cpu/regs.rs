//! Registers of the boot CPU at kernel entry. The other CPUs wait for their start-up IPI as KVM made them.

use anyhow::{Context, Result};
use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;

use crate::boot::Entry;
use crate::layout;
use crate::memory::Memory;

const CR0_PROTECTED: u64 = 1;
const CR0_EXTENSION_TYPE: u64 = 1 << 4;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LONG_MODE: u64 = 1 << 8 | 1 << 10;

/// Sets the boot CPU so that it enters the kernel as `entry` says.
///
/// # Errors
/// KVM refuses a register.
pub(crate) fn set_boot_cpu(vcpu: &VcpuFd, memory: &Memory, entry: Entry) -> Result<()> {
    let mut sregs = vcpu
        .get_sregs()
        .context("boot CPU: reading system registers")?;
    let regs = match entry {
        Entry::Linux64 { entry, zero_page } => {
            write_page_tables(memory)?;
            long_mode(&mut sregs);
            kvm_regs {
                rip: entry,
                rsi: zero_page,
                rsp: layout::BOOT_STACK,
                rflags: 2,
                ..Default::default()
            }
        }
        Entry::Pvh { entry, start_info } => {
            protected_mode(&mut sregs);
            kvm_regs {
                rip: entry,
                rbx: start_info,
                rflags: 2,
                ..Default::default()
            }
        }
    };
    write_descriptors(memory, &mut sregs)?;
    vcpu.set_sregs(&sregs)
        .context("boot CPU: system registers")?;
    vcpu.set_regs(&regs).context("boot CPU: registers")
}

/// Sets what every CPU needs before its first instruction: memory is write-back unless a page table says otherwise.
///
/// # Errors
/// KVM refuses a register.
pub(crate) fn set_msrs(vcpu: &VcpuFd) -> Result<()> {
    const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
    const MTRR_ENABLE_WRITE_BACK: u64 = 1 << 11 | 6;
    let entry = kvm_msr_entry {
        index: IA32_MTRR_DEF_TYPE,
        data: MTRR_ENABLE_WRITE_BACK,
        ..Default::default()
    };
    let msrs = Msrs::from_entries(&[entry]).context("MSR list")?;
    vcpu.set_msrs(&msrs).context("memory type registers")?;
    Ok(())
}

fn segment(type_: u8, selector: u16) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        s: 1,
        g: 1,
        db: 1,
        ..Default::default()
    }
}

const CODE: u8 = 0xb;
const DATA: u8 = 0x3;
/// Selectors of the Linux boot protocol: __BOOT_CS and __BOOT_DS.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TASK_SELECTOR: u16 = 0x20;

fn protected_mode(sregs: &mut kvm_sregs) {
    let data = segment(DATA, DATA_SELECTOR);
    sregs.cs = segment(CODE, CODE_SELECTOR);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment {
        s: 0,
        g: 0,
        db: 0,
        limit: 0x67,
        ..segment(CODE, TASK_SELECTOR)
    };
    sregs.cr0 = CR0_PROTECTED | CR0_EXTENSION_TYPE;
    sregs.cr4 = 0;
}

fn long_mode(sregs: &mut kvm_sregs) {
    protected_mode(sregs);
    sregs.cs = kvm_segment {
        l: 1,
        db: 0,
        ..segment(CODE, CODE_SELECTOR)
    };
    sregs.cr3 = layout::PAGE_TABLES_START;
    sregs.cr4 = CR4_PAE;
    sregs.cr0 |= CR0_PAGING;
    sregs.efer |= EFER_LONG_MODE;
}

/// Writes a GDT that holds the segments in `sregs`, and an empty IDT.
fn write_descriptors(memory: &Memory, sregs: &mut kvm_sregs) -> Result<()> {
    let table = [
        0,
        0,
        descriptor(&sregs.cs),
        descriptor(&sregs.ds),
        descriptor(&sregs.tr),
    ];
    let bytes: Vec<u8> = table
        .iter()
        .flat_map(|entry: &u64| entry.to_le_bytes())
        .collect();
    memory.write(layout::GDT_START, &bytes)?;
    sregs.gdt.base = layout::GDT_START;
    sregs.gdt.limit = (bytes.len() - 1) as u16;
    (sregs.idt.base, sregs.idt.limit) = (0, 0);
    Ok(())
}

/// The 8 bytes of a descriptor in a GDT (Intel SDM volume 3, 3.4.5).
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 {
        segment.limit >> 12
    } else {
        segment.limit
    });
    let access = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7;
    let flags = u64::from(segment.l) << 1 | u64::from(segment.db) << 2 | u64::from(segment.g) << 3;
    limit & 0xffff | access << 40 | (limit >> 16 & 0xf) << 48 | flags << 52
}

/// Identity-maps the first 4 GiB with 2 MiB pages.
fn write_page_tables(memory: &Memory) -> Result<()> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE_PAGE: u64 = 1 << 7;
    const TABLE_SIZE: u64 = 4096;
    let upper = layout::PAGE_TABLES_START + TABLE_SIZE;
    let directories = upper + TABLE_SIZE;
    memory.write(layout::PAGE_TABLES_START, &vec![0; 2 * TABLE_SIZE as usize])?;
    memory.write(
        layout::PAGE_TABLES_START,
        &(upper | PRESENT_WRITABLE).to_le_bytes(),
    )?;
    for gib in 0..4 {
        let entry = (directories + gib * TABLE_SIZE) | PRESENT_WRITABLE;
        memory.write(upper + gib * 8, &entry.to_le_bytes())?;
    }
    let pages: Vec<u8> = (0..4 * 512_u64)
        .flat_map(|page| (page << 21 | PRESENT_WRITABLE | LARGE_PAGE).to_le_bytes())
        .collect();
    memory.write(directories, &pages)
}

const _: () = {
    let page_tables_end = layout::PAGE_TABLES_START + 6 * 4096;
    assert!(layout::BOOT_STACK < layout::PAGE_TABLES_START);
    assert!(layout::ZERO_PAGE_START + 4096 <= layout::BOOT_STACK);
    assert!(page_tables_end <= layout::CMDLINE_START);
    assert!(layout::CMDLINE_START + layout::CMDLINE_MAX as u64 <= layout::CONVENTIONAL_END);
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Backing;

    #[test]
    fn flat_segments_have_the_well_known_descriptors() {
        assert_eq!(descriptor(&segment(CODE, 0)), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(&segment(DATA, 0)), 0x00cf_9300_0000_ffff);
        let long = kvm_segment {
            l: 1,
            db: 0,
            ..segment(CODE, 0)
        };
        assert_eq!(descriptor(&long), 0x00af_9b00_0000_ffff);
    }

    #[test]
    fn page_tables_map_each_address_to_itself() {
        let memory = Memory::new(16 << 20, Backing::Pages).unwrap();
        write_page_tables(&memory).unwrap();
        let read = |at: u64| {
            let low = u64::from(memory.read_u16(at).unwrap());
            low | u64::from(memory.read_u16(at + 2).unwrap()) << 16
        };
        let upper = read(layout::PAGE_TABLES_START) & !0xfff;
        let third = read(upper + 3 * 8) & !0xfff;
        assert_eq!(read(third + 8) & !0xfff, 3 << 30 | 1 << 21);
    }
}
