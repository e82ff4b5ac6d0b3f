//! ACPI tables: how the guest finds its CPUs, interrupts, PCI root, serial port, power button, power-off and reset.
//!
//! Hardware-reduced ACPI (6.5, 4.1): no PM1 block, PM timer, PIC, PIT or RTC need exist. Power-off is a write to the sleep control
//! register, reset one to the reset register, and the power button arrives over a generic event device whose
//! interrupt makes the guest read (and so clear) one status byte.

use acpi_tables::Aml;
use acpi_tables::aml::{
    self, AddressSpace, AddressSpaceCacheable, And, Device, EISAName, Field, FieldAccessType,
    FieldEntry, FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local, Memory32Fixed, Method,
    Name, Notify, OpRegion, OpRegionSpace, Package, Path, ResourceTemplate, Scope, Store,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace as Space, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use anyhow::{Result, ensure};

use crate::layout;
use crate::memory::Memory;

const OEM_ID: [u8; 6] = *b"OUTBRD";
const OEM_TABLE_ID: [u8; 8] = *b"OUTBOARD";
const OEM_REVISION: u32 = 1;
/// Status bit of [`layout::EVENT_PORT`]: the power button was pressed.
pub(crate) const POWER_BUTTON_EVENT: u8 = 1;

/// Writes all tables for a machine with `cpus` CPUs and returns the guest address of the root pointer.
///
/// # Errors
/// The tables do not fit below 1 MiB.
pub(crate) fn write_tables(memory: &Memory, cpus: u8) -> Result<u64> {
    let mut tables = Tables {
        memory,
        next: layout::ACPI_START + 64,
    };
    let dsdt = tables.place(&dsdt(cpus))?;
    let fadt = tables.place(&bytes(&fadt(dsdt)))?;
    let madt = tables.place(&bytes(&madt(cpus)))?;
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(layout::ECAM_START, 0, 0, 0);
    let mcfg = tables.place(&bytes(&mcfg))?;
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for table in [fadt, madt, mcfg] {
        xsdt.add_entry(table);
    }
    let xsdt = tables.place(&bytes(&xsdt))?;
    memory.write(layout::ACPI_START, &bytes(&Rsdp::new(OEM_ID, xsdt)))?;
    Ok(layout::ACPI_START)
}

struct Tables<'a> {
    memory: &'a Memory,
    next: u64,
}

impl Tables<'_> {
    fn place(&mut self, table: &[u8]) -> Result<u64> {
        let at = self.next;
        let end = at + table.len() as u64;
        ensure!(
            end <= layout::RESET_VECTOR,
            "the ACPI tables do not fit below 1 MiB"
        );
        self.memory.write(at, table)?;
        self.next = end.next_multiple_of(16);
        Ok(at)
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    const NO_VGA: u16 = 1 << 2;
    const NO_RTC: u16 = 1 << 5;
    let port = |address: u16| {
        GAS::new(
            Space::SystemIo,
            8,
            0,
            AccessSize::ByteAccess,
            u64::from(address),
        )
    };
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Headless);
    fadt.iapc_boot_arch = (NO_VGA | NO_RTC).into();
    fadt.reset_reg = port(layout::RESET_PORT);
    fadt.reset_value = layout::RESET_VALUE;
    fadt.sleep_control_reg = port(layout::SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(layout::SLEEP_CONTROL_PORT + 1);
    fadt.finalize()
}

fn madt(cpus: u8) -> MADT {
    let lapic = LocalInterruptController::Address(layout::LAPIC_START);
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, lapic);
    for cpu in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IOAPIC_START, 0));
    madt
}

fn dsdt(cpus: u8) -> Vec<u8> {
    let mut sdt = Sdt::new(*b"DSDT", 36, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    let mut devices = vec![
        pci_root(),
        reserved_memory(),
        serial_port(),
        device("PWRB", &EISAName::new("PNP0C0C"), 0, &[]),
        event_device(),
    ];
    devices.extend((0..cpus).map(|cpu| device(&format!("C{cpu:03X}"), &"ACPI0007", cpu, &[])));
    for device in devices {
        sdt.append_slice(&device);
    }
    let power_off = Package::new(vec![&layout::SLEEP_TYPE_S5]);
    sdt.append_slice(&bytes(&Name::new("_S5_".into(), &power_off)));
    sdt.as_slice().to_vec()
}

/// A device on the system bus: its name, hardware id, number and what else it has.
fn device(name: &str, id: &dyn Aml, uid: u8, more: &[&dyn Aml]) -> Vec<u8> {
    let id = Name::new("_HID".into(), id);
    let uid = Name::new("_UID".into(), &uid);
    let children = [&id, &uid as &dyn Aml]
        .into_iter()
        .chain(more.iter().copied())
        .collect();
    let device = Device::new(name.into(), children);
    bytes(&Scope::new("_SB_".into(), vec![&device]))
}

fn pci_root() -> Vec<u8> {
    let window = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        layout::PCI_WINDOW_START as u32,
        (layout::PCI_WINDOW_END - 1) as u32,
        None,
    );
    let bus = AddressSpace::new_bus_number(0_u16, 0_u16);
    let ports = IO::new(0xcf8, 0xcf8, 1, 8);
    let resources = ResourceTemplate::new(vec![&bus, &ports, &window]);
    let more: [&dyn Aml; 4] = [
        &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
        &Name::new("_SEG".into(), &aml::ZERO),
        &Name::new("_BBN".into(), &aml::ZERO),
        &Name::new("_CRS".into(), &resources),
    ];
    device("PCI0", &EISAName::new("PNP0A08"), 0, &more)
}

/// Keeps the configuration space out of the address space that the guest gives to devices.
fn reserved_memory() -> Vec<u8> {
    let ecam = Memory32Fixed::new(true, layout::ECAM_START as u32, layout::ECAM_SIZE as u32);
    let resources = ResourceTemplate::new(vec![&ecam]);
    device(
        "MBRD",
        &EISAName::new("PNP0C02"),
        0,
        &[&Name::new("_CRS".into(), &resources)],
    )
}

fn serial_port() -> Vec<u8> {
    let interrupt = Interrupt::new(true, true, false, false, layout::SERIAL_GSI);
    let ports = IO::new(layout::SERIAL_PORT, layout::SERIAL_PORT, 0, 8);
    let resources = ResourceTemplate::new(vec![&interrupt, &ports]);
    device(
        "COM1",
        &EISAName::new("PNP0501"),
        0,
        &[&Name::new("_CRS".into(), &resources)],
    )
}

/// Generic event device (ACPI 6.5, 5.6.9): its interrupt runs `_EVT`, which passes on what the status byte says.
fn event_device() -> Vec<u8> {
    const BUTTON_PRESSED: u8 = 0x80;
    let interrupt = Interrupt::new(true, true, false, false, layout::EVENT_GSI);
    let resources = ResourceTemplate::new(vec![&interrupt]);
    let register = OpRegion::new(
        "EVTR".into(),
        OpRegionSpace::SystemIO,
        &layout::EVENT_PORT,
        &aml::ONE,
    );
    let field = Field::new(
        "EVTR".into(),
        FieldAccessType::Byte,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![FieldEntry::Named(*b"ESTA", 8)],
    );
    let status = Path::new("ESTA");
    let read_status = Store::new(&Local(0), &status);
    let pressed = And::new(&aml::ZERO, &Local(0), &POWER_BUTTON_EVENT);
    let button = Path::new("\\_SB_.PWRB");
    let notify = Notify::new(&button, &BUTTON_PRESSED);
    let if_pressed = If::new(&pressed, vec![&notify]);
    let more: [&dyn Aml; 4] = [
        &Name::new("_CRS".into(), &resources),
        &register,
        &field,
        &Method::new("_EVT".into(), 1, true, vec![&read_status, &if_pressed]),
    ];
    device("GED0", &"ACPI0013", 0, &more)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Backing;
    use vm_memory::{Bytes, GuestAddress};

    fn read(memory: &Memory, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        memory
            .map()
            .read_slice(&mut bytes, GuestAddress(at))
            .unwrap();
        bytes
    }

    fn table(memory: &Memory, at: u64) -> Vec<u8> {
        let header = read(memory, at, 8);
        let len = u32::from_le_bytes(header[4..8].try_into().unwrap());
        read(memory, at, len as usize)
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn every_table_is_reachable_from_the_root_pointer_and_has_a_valid_checksum() {
        let memory = Memory::new(16 << 20, Backing::Pages).unwrap();
        let rsdp = write_tables(&memory, 254).unwrap();
        let rsdp = read(&memory, rsdp, 36);
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        assert_eq!((sum(&rsdp[..20]), sum(&rsdp)), (0, 0));
        let xsdt = table(
            &memory,
            u64::from_le_bytes(rsdp[24..32].try_into().unwrap()),
        );
        assert_eq!((&xsdt[..4], sum(&xsdt)), (&b"XSDT"[..], 0));
        let mut seen = Vec::new();
        for entry in xsdt[36..].chunks(8) {
            let table = table(&memory, u64::from_le_bytes(entry.try_into().unwrap()));
            assert_eq!(sum(&table), 0);
            seen.push(table[..4].to_vec());
        }
        assert_eq!(seen, [b"FACP", b"APIC", b"MCFG"]);
    }

    #[test]
    fn the_fixed_table_points_to_the_dsdt_and_the_registers() {
        let memory = Memory::new(16 << 20, Backing::Pages).unwrap();
        let dsdt = dsdt(2);
        let at = layout::ACPI_START + 64;
        memory.write(at, &dsdt).unwrap();
        let fadt = bytes(&fadt(at));
        assert_eq!(u64::from_le_bytes(fadt[140..148].try_into().unwrap()), at);
        assert_eq!(fadt[128], layout::RESET_VALUE);
        assert_eq!(
            u64::from_le_bytes(fadt[120..128].try_into().unwrap()),
            0x602
        );
        assert_eq!(
            u64::from_le_bytes(fadt[248..256].try_into().unwrap()),
            0x600
        );
        assert_eq!((&dsdt[..4], sum(&dsdt)), (&b"DSDT"[..], 0));
    }
}
