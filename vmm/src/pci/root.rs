//! The PCI root: bus 0 with up to 31 devices behind the legacy ports 0xcf8/0xcfc and the memory-mapped ECAM.
//!
//! Must not know what a device is beyond [`PciDevice`].

use std::sync::Mutex;

use super::NotReady;
use super::config::{ConfigSpace, Identity};

/// One function on the bus.
pub(crate) trait PciDevice: Send {
    /// A guest's read of configuration space.
    fn read_config(&mut self, at: usize, data: &mut [u8]) -> Result<(), NotReady>;
    /// A guest's write of configuration space.
    fn write_config(&mut self, at: usize, data: &[u8]) -> Result<(), NotReady>;
    /// Where the BAR is decoded now, and its size.
    fn bar(&self) -> Option<(u64, u64)>;
    /// A guest's read inside the BAR.
    fn read_bar(&mut self, at: u64, data: &mut [u8]) -> Result<(), NotReady>;
    /// A guest's write inside the BAR.
    fn write_bar(&mut self, at: u64, data: &[u8]) -> Result<(), NotReady>;
    /// What `query-pci` tells.
    fn describe(&self) -> DeviceInfo;
}

/// What a device is, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DeviceInfo {
    /// Name; empty for a device that has none.
    pub(crate) id: String,
    /// Class in words.
    pub(crate) class_name: &'static str,
    /// Class and subclass.
    pub(crate) class: u16,
    /// Vendor id.
    pub(crate) vendor: u16,
    /// Device id.
    pub(crate) device: u16,
    /// Where the BAR is decoded, and its size.
    pub(crate) bar: Option<(u64, u64)>,
}

/// Largest number of devices beside the host bridge.
pub(crate) const MAX_DEVICES: usize = 31;

/// Bus 0 and its two windows to configuration space.
pub(crate) struct PciRoot {
    slots: Vec<Mutex<Box<dyn PciDevice>>>,
    address: Mutex<u32>,
}

impl PciRoot {
    /// A bus with a host bridge in slot 0 and `devices` in the slots from 1 on.
    pub(crate) fn new(devices: Vec<Box<dyn PciDevice>>) -> Self {
        assert!(devices.len() <= MAX_DEVICES);
        let bridge: Box<dyn PciDevice> = Box::new(HostBridge::new());
        let slots = std::iter::once(bridge)
            .chain(devices)
            .map(Mutex::new)
            .collect();
        Self {
            slots,
            address: Mutex::new(0),
        }
    }

    /// All devices in slot order.
    pub(crate) fn describe(&self) -> Vec<DeviceInfo> {
        self.slots
            .iter()
            .map(|slot| lock(slot).describe())
            .collect()
    }

    /// A read inside the ECAM, `at` bytes from its start.
    pub(crate) fn read_ecam(&self, at: u64, data: &mut [u8]) -> Result<(), NotReady> {
        let (slot, register) = ecam_address(at);
        self.read_config(slot, register, data)
    }

    /// A write inside the ECAM, `at` bytes from its start.
    pub(crate) fn write_ecam(&self, at: u64, data: &[u8]) -> Result<(), NotReady> {
        let (slot, register) = ecam_address(at);
        self.write_config(slot, register, data)
    }

    /// A read of port 0xcf8 + `at`.
    pub(crate) fn read_port(&self, at: u16, data: &mut [u8]) -> Result<(), NotReady> {
        let address = *lock(&self.address);
        if at < 4 {
            let bytes = address.to_le_bytes();
            for (index, byte) in data.iter_mut().enumerate() {
                *byte = bytes.get(usize::from(at) + index).copied().unwrap_or(0xff);
            }
            return Ok(());
        }
        match legacy_address(address, at - 4) {
            Some((slot, register)) => self.read_config(slot, register, data),
            None => {
                data.fill(0xff);
                Ok(())
            }
        }
    }

    /// A write of port 0xcf8 + `at`.
    pub(crate) fn write_port(&self, at: u16, data: &[u8]) -> Result<(), NotReady> {
        let mut address = lock(&self.address);
        if at == 0
            && let Ok(bytes) = data.try_into()
        {
            *address = u32::from_le_bytes(bytes);
        }
        let target = legacy_address(*address, at.wrapping_sub(4)).filter(|_| at >= 4);
        drop(address);
        target.map_or(Ok(()), |(slot, register)| {
            self.write_config(slot, register, data)
        })
    }

    fn read_config(&self, slot: usize, register: usize, data: &mut [u8]) -> Result<(), NotReady> {
        match self.slots.get(slot) {
            Some(device) => lock(device).read_config(register, data),
            None => {
                data.fill(0xff);
                Ok(())
            }
        }
    }

    fn write_config(&self, slot: usize, register: usize, data: &[u8]) -> Result<(), NotReady> {
        match self.slots.get(slot) {
            Some(device) => lock(device).write_config(register, data),
            None => Ok(()),
        }
    }

    /// A read in the memory window; what no device decodes reads as all ones.
    pub(crate) fn read_memory(&self, address: u64, data: &mut [u8]) -> Result<(), NotReady> {
        for slot in &self.slots {
            let mut device = lock(slot);
            if let Some(at) = offset_in_bar(device.as_ref(), address) {
                return device.read_bar(at, data);
            }
        }
        data.fill(0xff);
        Ok(())
    }

    /// A write in the memory window; what no device decodes is lost.
    pub(crate) fn write_memory(&self, address: u64, data: &[u8]) -> Result<(), NotReady> {
        for slot in &self.slots {
            let mut device = lock(slot);
            if let Some(at) = offset_in_bar(device.as_ref(), address) {
                return device.write_bar(at, data);
            }
        }
        Ok(())
    }
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .expect("no thread panics while it holds a PCI lock")
}

fn offset_in_bar(device: &dyn PciDevice, address: u64) -> Option<u64> {
    let (start, size) = device.bar()?;
    address.checked_sub(start).filter(|at| *at < size)
}

/// Slot and register of an ECAM offset. Functions other than 0 do not exist; they map to a slot that is never there.
fn ecam_address(at: u64) -> (usize, usize) {
    const NO_SLOT: usize = usize::MAX;
    let slot = if at >> 12 & 7 == 0 {
        (at >> 15) as usize
    } else {
        NO_SLOT
    };
    (slot, (at & 0xfff) as usize)
}

/// Slot and register that the address register selects; `lane` is the byte inside the data port.
fn legacy_address(address: u32, lane: u16) -> Option<(usize, usize)> {
    let enabled = address >> 31 == 1;
    let (bus, slot, function) = (address >> 16 & 0xff, address >> 11 & 0x1f, address >> 8 & 7);
    let register = (address & 0xfc) as usize + usize::from(lane);
    (enabled && bus == 0 && function == 0).then_some((slot as usize, register))
}

/// The host bridge: an identity and nothing else.
struct HostBridge {
    config: ConfigSpace,
}

impl HostBridge {
    const IDENTITY: Identity = Identity {
        vendor: 0x1b36,
        device: 0x0008,
        class: 0x06_0000,
        revision: 0,
        subsystem: (0x1af4, 0x1100),
    };

    fn new() -> Self {
        Self {
            config: ConfigSpace::new(Self::IDENTITY),
        }
    }
}

impl PciDevice for HostBridge {
    fn read_config(&mut self, at: usize, data: &mut [u8]) -> Result<(), NotReady> {
        self.config.read(at, data);
        Ok(())
    }

    fn write_config(&mut self, at: usize, data: &[u8]) -> Result<(), NotReady> {
        self.config.write(at, data);
        Ok(())
    }

    fn bar(&self) -> Option<(u64, u64)> {
        None
    }

    fn read_bar(&mut self, _: u64, _: &mut [u8]) -> Result<(), NotReady> {
        Ok(())
    }

    fn write_bar(&mut self, _: u64, _: &[u8]) -> Result<(), NotReady> {
        Ok(())
    }

    fn describe(&self) -> DeviceInfo {
        DeviceInfo {
            id: String::new(),
            class_name: "Host bridge",
            class: 0x0600,
            vendor: Self::IDENTITY.vendor,
            device: Self::IDENTITY.device,
            bar: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_u32(root: &PciRoot, address: u32) -> u32 {
        root.write_port(0, &address.to_le_bytes()).unwrap();
        let mut data = [0; 4];
        root.read_port(4, &mut data).unwrap();
        u32::from_le_bytes(data)
    }

    #[test]
    fn both_windows_show_the_host_bridge_and_nothing_elsewhere() {
        let root = PciRoot::new(Vec::new());
        assert_eq!(read_u32(&root, 0x8000_0000), 0x0008_1b36);
        assert_eq!(read_u32(&root, 0x8000_0800), u32::MAX, "slot 1");
        assert_eq!(read_u32(&root, 0x8000_0100), u32::MAX, "function 1");
        assert_eq!(read_u32(&root, 0x8001_0000), u32::MAX, "bus 1");
        assert_eq!(read_u32(&root, 0), u32::MAX, "not enabled");
        let mut data = [0; 2];
        root.read_ecam(2, &mut data).unwrap();
        assert_eq!(u16::from_le_bytes(data), 8);
        root.read_ecam(0x1000, &mut data).unwrap();
        assert_eq!(data, [0xff; 2], "function 1");
    }

    #[test]
    fn byte_lanes_of_the_data_port_select_bytes() {
        let root = PciRoot::new(Vec::new());
        root.write_port(0, &0x8000_0008_u32.to_le_bytes()).unwrap();
        let mut data = [0; 1];
        root.read_port(7, &mut data).unwrap();
        assert_eq!(data, [6], "base class of a bridge");
        let mut address = [0; 4];
        root.read_port(0, &mut address).unwrap();
        assert_eq!(u32::from_le_bytes(address), 0x8000_0008);
    }

    #[test]
    fn memory_that_nobody_decodes_reads_as_ones() {
        let root = PciRoot::new(Vec::new());
        let mut data = [0; 8];
        root.read_memory(0xc000_0000, &mut data).unwrap();
        assert_eq!(data, [0xff; 8]);
        root.write_memory(0xc000_0000, &data).unwrap();
    }
}
