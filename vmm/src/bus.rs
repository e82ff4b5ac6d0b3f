//! Where a CPU's access goes: I/O ports and memory-mapped addresses of one machine.
//!
//! What nobody answers reads as all ones and is lost when written, as on a PC.

use std::ops::Range;

use crate::layout;
use crate::pci::NotReady;
use crate::pci::root::PciRoot;
use crate::power::Power;
use crate::serial::SerialPort;

/// The devices of one machine, from power-on to the next reset.
pub(crate) struct Bus {
    /// Serial port.
    pub(crate) serial: SerialPort,
    /// Power management.
    pub(crate) power: Power,
    /// PCI root.
    pub(crate) pci: PciRoot,
}

const SERIAL: Range<u16> = layout::SERIAL_PORT..layout::SERIAL_PORT + 8;
const POWER: Range<u16> = layout::SLEEP_CONTROL_PORT..layout::EVENT_PORT + 1;
const PCI: Range<u16> = 0xcf8..0xd00;
const ECAM: Range<u64> = layout::ECAM_START..layout::ECAM_START + layout::ECAM_SIZE;
const PCI_WINDOW: Range<u64> = layout::PCI_WINDOW_START..layout::PCI_WINDOW_END;

impl Bus {
    /// A read of an I/O port.
    pub(crate) fn port_read(&self, port: u16, data: &mut [u8]) -> Result<(), NotReady> {
        data.fill(0xff);
        match (port, &mut *data) {
            (port, [byte]) if SERIAL.contains(&port) => {
                *byte = self.serial.read((port - SERIAL.start) as u8);
            }
            (port, [byte]) if POWER.contains(&port) => *byte = self.power.read(port),
            (port, _) if PCI.contains(&port) => {
                return self.pci.read_port(port - PCI.start, data);
            }
            _ => {}
        }
        Ok(())
    }

    /// A write of an I/O port.
    pub(crate) fn port_write(&self, port: u16, data: &[u8]) -> Result<(), NotReady> {
        match (port, data) {
            (port, [byte]) if SERIAL.contains(&port) => {
                self.serial.write((port - SERIAL.start) as u8, *byte);
            }
            (port, [byte]) if POWER.contains(&port) => self.power.write(port, *byte),
            (port, _) if PCI.contains(&port) => {
                return self.pci.write_port(port - PCI.start, data);
            }
            _ => {}
        }
        Ok(())
    }

    /// A read of memory that is not RAM.
    pub(crate) fn mmio_read(&self, address: u64, data: &mut [u8]) -> Result<(), NotReady> {
        if ECAM.contains(&address) {
            self.pci.read_ecam(address - ECAM.start, data)
        } else if PCI_WINDOW.contains(&address) {
            self.pci.read_memory(address, data)
        } else {
            data.fill(0xff);
            Ok(())
        }
    }

    /// A write of memory that is not RAM.
    pub(crate) fn mmio_write(&self, address: u64, data: &[u8]) -> Result<(), NotReady> {
        if ECAM.contains(&address) {
            self.pci.write_ecam(address - ECAM.start, data)
        } else if PCI_WINDOW.contains(&address) {
            self.pci.write_memory(address, data)
        } else {
            Ok(())
        }
    }
}
