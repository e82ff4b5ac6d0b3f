//! virtio over PCI, modern only (virtio 1.2, 4.1): the registers of one device, its doorbells and its interrupts.
//!
//! ```text
//! BAR 0: 0x0000 common  0x1000 ISR  0x2000 device configuration  0x3000 doorbells  0x4000 MSI-X table  0x7000 MSI-X pending bits
//! ```
//!
//! Each queue has its own doorbell address, an ioeventfd in KVM. There is no legacy interrupt: without MSI-X no interrupt arrives.
//! The transport is made anew at each machine reset; the [`Device`] behind it stays.

use std::sync::Arc;

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};

use crate::events::Notifier;
use crate::irq::InterruptController;
use crate::pci::NotReady;
use crate::pci::config::{ConfigSpace, Identity};
use crate::pci::msix::{ENTRY_SIZE, Msix};
use crate::pci::root::{DeviceInfo, PciDevice};
use crate::vhost_user::model::{Kind, VERSION_1};
use crate::vhost_user::net::MAX_PAIRS;
use crate::vhost_user::{Activation, Device, RingSetup};

/// Size of BAR 0.
pub(crate) const BAR_SIZE: u32 = 0x8000;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const TABLE: u64 = 0x4000;
const PENDING: u64 = 0x7000;
/// Bytes between two queues' doorbells.
const NOTIFY_MULTIPLIER: u32 = 4;
/// Bytes of the common configuration, up to and without the registers of features that are not offered.
const COMMON_SIZE: usize = 0x38;

const VENDOR: u16 = 0x1af4;
/// PCI device id of virtio device 0.
const FIRST_DEVICE: u16 = 0x1040;

const STATUS_DRIVER_OK: u8 = 4;
const STATUS_FEATURES_OK: u8 = 8;
const STATUS_NEEDS_RESET: u8 = 64;

/// Makes guest writes to an address raise a notifier.
pub(crate) trait Doorbells: Send {
    /// Begins.
    fn connect(&self, address: u64, notifier: &Notifier) -> anyhow::Result<()>;
    /// Ends.
    fn disconnect(&self, address: u64, notifier: &Notifier) -> anyhow::Result<()>;
}

impl Doorbells for Arc<VmFd> {
    fn connect(&self, address: u64, notifier: &Notifier) -> anyhow::Result<()> {
        let address = IoEventAddress::Mmio(address);
        Ok(self.register_ioevent(notifier.event_fd(), &address, NoDatamatch)?)
    }

    fn disconnect(&self, address: u64, notifier: &Notifier) -> anyhow::Result<()> {
        let address = IoEventAddress::Mmio(address);
        Ok(self.unregister_ioevent(notifier.event_fd(), &address, NoDatamatch)?)
    }
}

#[derive(Clone, Copy, Default)]
struct Queue {
    setup: RingSetup,
    enabled: bool,
}

/// Registers of the common configuration.
#[derive(Default)]
struct Common {
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    status: u8,
    queue_select: u16,
    queues: Vec<Queue>,
}

/// One device on the bus.
pub(crate) struct VirtioPci {
    device: Arc<Device>,
    config: ConfigSpace,
    msix_capability: usize,
    window_capability: usize,
    msix: Msix,
    doorbells: Box<dyn Doorbells>,
    doorbells_at: Option<u64>,
    common: Common,
}

impl VirtioPci {
    /// Puts `device` on the bus with its BAR at `bar`; the guest may move it.
    pub(crate) fn new(
        device: Arc<Device>,
        bar: u32,
        controller: Arc<dyn InterruptController>,
        doorbells: Box<dyn Doorbells>,
    ) -> Self {
        let kind = device.kind();
        let notifiers = device.notifiers();
        let mut sources = notifiers.calls.clone();
        sources.push(notifiers.config.clone());
        let msix = Msix::new(controller, sources);
        let mut config = ConfigSpace::new(identity(kind));
        config.set_bar(bar, BAR_SIZE);
        let (msix_capability, window_capability) =
            add_capabilities(&mut config, kind, msix.vectors());
        let common = Common::new(&device);
        Self {
            device,
            config,
            msix_capability,
            window_capability,
            msix,
            doorbells,
            doorbells_at: None,
            common,
        }
    }

    fn config_source(&self) -> usize {
        self.common.queues.len()
    }

    /// Moves the doorbells to where the BAR is now.
    fn move_doorbells(&mut self) {
        let wanted = self.config.bar_address().map(|bar| bar + NOTIFY);
        if wanted == self.doorbells_at {
            return;
        }
        if let Some(old) = self.doorbells_at.take() {
            self.for_each_doorbell(old, |bells, at, kick| bells.disconnect(at, kick));
        }
        if let Some(new) = wanted {
            self.for_each_doorbell(new, |bells, at, kick| bells.connect(at, kick));
            self.doorbells_at = wanted;
        }
    }

    fn for_each_doorbell(
        &self,
        start: u64,
        change: impl Fn(&dyn Doorbells, u64, &Notifier) -> anyhow::Result<()>,
    ) {
        for (index, kick) in self.device.notifiers().kicks.iter().enumerate() {
            let address = start + index as u64 * u64::from(NOTIFY_MULTIPLIER);
            if let Err(error) = change(self.doorbells.as_ref(), address, kick) {
                tracing::error!(device = self.device.name(), "doorbell {index}: {error:#}");
            }
        }
    }

    fn read_common(&self, at: u64, data: &mut [u8]) -> Result<(), NotReady> {
        const DEVICE_FEATURE: u64 = 4;
        data.fill(0);
        let reads_features = at < DEVICE_FEATURE + 4 && at + data.len() as u64 > DEVICE_FEATURE;
        let features = match self.device.features() {
            Some(features) => features,
            None if reads_features => return Err(NotReady),
            None => 0,
        };
        let registers = self.common_registers(features);
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = registers.get(at as usize + index).copied().unwrap_or(0);
        }
        Ok(())
    }

    /// The common configuration as it would read now.
    fn common_registers(&self, features: u64) -> Vec<u8> {
        let common = &self.common;
        let half = |value: u64, select: u32| match select {
            0 => value as u32,
            1 => (value >> 32) as u32,
            _ => 0,
        };
        let queue = common.selected().copied().unwrap_or_default();
        let mut bytes = Vec::with_capacity(COMMON_SIZE);
        bytes.extend(common.device_feature_select.to_le_bytes());
        bytes.extend(half(features, common.device_feature_select).to_le_bytes());
        bytes.extend(common.driver_feature_select.to_le_bytes());
        bytes.extend(half(common.driver_features, common.driver_feature_select).to_le_bytes());
        bytes.extend(self.msix.vector(self.config_source()).to_le_bytes());
        bytes.extend((common.queues.len() as u16).to_le_bytes());
        bytes.push(self.status());
        bytes.push(self.device.generation());
        bytes.extend(common.queue_select.to_le_bytes());
        bytes.extend(queue.setup.size.to_le_bytes());
        let vector = self.msix.vector(usize::from(common.queue_select));
        bytes.extend(vector.to_le_bytes());
        bytes.extend(u16::from(queue.enabled).to_le_bytes());
        bytes.extend(common.queue_select.to_le_bytes());
        for address in [
            queue.setup.descriptors,
            queue.setup.available,
            queue.setup.used,
        ] {
            bytes.extend(address.to_le_bytes());
        }
        bytes
    }

    /// The device status; not zero until a reset is complete (virtio 1.2, 4.1.4.3.1).
    fn status(&self) -> u8 {
        if self.common.status == 0 && self.device.is_resetting() {
            return STATUS_NEEDS_RESET;
        }
        let broken = if self.device.is_broken() {
            STATUS_NEEDS_RESET
        } else {
            0
        };
        self.common.status | broken
    }

    fn write_common(&mut self, at: u64, data: &[u8]) {
        let mut bytes = [0; 8];
        let Some(target) = bytes.get_mut(..data.len()) else {
            return;
        };
        target.copy_from_slice(data);
        let value = u64::from_le_bytes(bytes);
        let index = usize::from(self.common.queue_select);
        match (at, data.len()) {
            (0x00, 4) => self.common.device_feature_select = value as u32,
            (0x08, 4) => self.common.driver_feature_select = value as u32,
            (0x0c, 4) => self.common.set_driver_features(value as u32),
            (0x10, 2) => {
                self.msix.set_vector(self.config_source(), value as u16);
            }
            (0x14, 1) => self.write_status(value as u8),
            (0x16, 2) => self.common.queue_select = value as u16,
            (0x1a, 2) if index < self.common.queues.len() => {
                self.msix.set_vector(index, value as u16);
            }
            (0x18 | 0x1c | 0x20..0x38, _) => {
                let max_size = self.device.queue_size();
                self.common.write_queue(at, (value, data.len()), max_size);
            }
            _ => {}
        }
    }

    fn write_status(&mut self, status: u8) {
        // A driver has to wait for the end of a reset (virtio 1.2, 4.1.4.3.2); one that does not cannot pile up orders.
        if self.device.is_resetting() {
            return;
        }
        if status == 0 {
            self.reset();
            return;
        }
        let rises = |bit: u8| status & bit != 0 && self.common.status & bit == 0;
        let (features_ok, driver_ok) = (rises(STATUS_FEATURES_OK), rises(STATUS_DRIVER_OK));
        let mut status = status;
        if features_ok && !self.features_are_acceptable() {
            status &= !STATUS_FEATURES_OK;
        }
        self.common.status = status;
        if driver_ok && status & STATUS_FEATURES_OK != 0 {
            self.device.activate(self.common.activation());
        }
    }

    fn features_are_acceptable(&self) -> bool {
        let offered = self.device.features().unwrap_or(0);
        let chosen = self.common.driver_features;
        chosen & !offered == 0 && chosen & VERSION_1 != 0
    }

    fn reset(&mut self) {
        if self.common.status != 0 {
            self.device.reset();
        }
        self.common = Common::new(&self.device);
        self.msix.clear_vectors();
    }

    fn read_device(&self, at: u64, data: &mut [u8]) -> Result<(), NotReady> {
        let (config, _) = self.device.config().ok_or(NotReady)?;
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = config.get(at as usize + index).copied().unwrap_or(0);
        }
        Ok(())
    }

    /// The window capability (virtio 1.2, 4.1.4.9): an access of its data register is one of the BAR.
    fn window(&self, at: usize, len: usize) -> Option<u64> {
        let data_register = self.window_capability + 16;
        let bar = self.config.read_u32(self.window_capability + 4) as u8;
        let offset = self.config.read_u32(self.window_capability + 8);
        let length = self.config.read_u32(self.window_capability + 12) as usize;
        (at == data_register && len == length && bar == 0 && offset < BAR_SIZE)
            .then_some(u64::from(offset))
    }
}

impl Common {
    fn new(device: &Device) -> Self {
        let setup = RingSetup {
            size: device.queue_size(),
            ..Default::default()
        };
        let queue = Queue {
            setup,
            enabled: false,
        };
        Self {
            queues: vec![queue; usize::from(device.num_queues())],
            ..Default::default()
        }
    }

    fn selected(&self) -> Option<&Queue> {
        self.queues.get(usize::from(self.queue_select))
    }

    fn set_driver_features(&mut self, value: u32) {
        let value = u64::from(value);
        match self.driver_feature_select {
            0 => self.driver_features = self.driver_features & !0xffff_ffff | value,
            1 => self.driver_features = self.driver_features & 0xffff_ffff | value << 32,
            _ => {}
        }
    }

    /// A write of a register of the selected queue. What the driver may not change any more stays.
    fn write_queue(&mut self, at: u64, (value, len): (u64, usize), max_size: u16) {
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else {
            return;
        };
        if queue.enabled {
            return;
        }
        match (at, len) {
            (0x18, 2) => {
                let size = value as u16;
                if size.is_power_of_two() && size <= max_size {
                    queue.setup.size = size;
                }
            }
            (0x1c, 2) => queue.enabled = value == 1,
            (0x20..0x28, 4 | 8) => set_part(&mut queue.setup.descriptors, at - 0x20, value, len),
            (0x28..0x30, 4 | 8) => set_part(&mut queue.setup.available, at - 0x28, value, len),
            (0x30..0x38, 4 | 8) => set_part(&mut queue.setup.used, at - 0x30, value, len),
            _ => {}
        }
    }

    fn activation(&self) -> Activation {
        let rings = self
            .queues
            .iter()
            .map(|queue| queue.enabled.then_some(queue.setup))
            .collect();
        Activation {
            features: self.driver_features,
            rings,
        }
    }
}

fn identity(kind: &Kind) -> Identity {
    Identity {
        vendor: VENDOR,
        device: FIRST_DEVICE + kind.virtio_id,
        class: kind.class,
        revision: 1,
        subsystem: (VENDOR, 0x1100),
    }
}

/// Writes all of an address, or its low or high half.
fn set_part(address: &mut u64, at: u64, value: u64, len: usize) {
    match (at, len) {
        (0, 8) => *address = value,
        (0, 4) => *address = *address & !0xffff_ffff | value,
        (4, 4) => *address = *address & 0xffff_ffff | value << 32,
        _ => {}
    }
}

/// Adds the virtio capabilities and MSI-X; returns where MSI-X and the window are.
fn add_capabilities(config: &mut ConfigSpace, kind: &Kind, vectors: usize) -> (usize, usize) {
    const VENDOR_SPECIFIC: u8 = 0x09;
    const MSIX: u8 = 0x11;
    let [common_type, notify_type, isr_type, device_type, window_type] = [1, 2, 3, 4, 5];
    let mut add = |kind: u8, start: u64, size: u32, extra: &[u8]| {
        let length = 16 + extra.len() as u8;
        let mut body = vec![length, kind, 0, 0, 0, 0];
        body.extend((start as u32).to_le_bytes());
        body.extend(size.to_le_bytes());
        body.extend(extra);
        config.add_capability(VENDOR_SPECIFIC, &body)
    };
    add(common_type, 0, COMMON_SIZE as u32, &[]);
    add(
        notify_type,
        NOTIFY,
        0x1000,
        &NOTIFY_MULTIPLIER.to_le_bytes(),
    );
    add(isr_type, ISR, 4, &[]);
    add(device_type, DEVICE, kind.config_size as u32, &[]);
    let window = add(window_type, 0, 0, &[0; 4]);
    config.allow(window + 4, &[0xff]);
    config.allow(window + 8, &[0xff; 8]);
    let mut body = ((vectors - 1) as u16).to_le_bytes().to_vec();
    body.extend((TABLE as u32).to_le_bytes());
    body.extend((PENDING as u32).to_le_bytes());
    let msix = config.add_capability(MSIX, &body);
    config.allow(msix + 2, &0xc000_u16.to_le_bytes());
    (msix, window)
}

impl PciDevice for VirtioPci {
    fn read_config(&mut self, at: usize, data: &mut [u8]) -> Result<(), NotReady> {
        if let Some(offset) = self.window(at, data.len()) {
            return self.read_bar(offset, data);
        }
        self.config.read(at, data);
        Ok(())
    }

    fn write_config(&mut self, at: usize, data: &[u8]) -> Result<(), NotReady> {
        if let Some(offset) = self.window(at, data.len()) {
            return self.write_bar(offset, data);
        }
        self.config.write(at, data);
        self.move_doorbells();
        self.msix
            .set_control(self.config.read_u16(self.msix_capability + 2));
        Ok(())
    }

    fn bar(&self) -> Option<(u64, u64)> {
        Some((self.config.bar_address()?, u64::from(BAR_SIZE)))
    }

    fn read_bar(&mut self, at: u64, data: &mut [u8]) -> Result<(), NotReady> {
        match at {
            0..ISR => return self.read_common(at, data),
            DEVICE..NOTIFY => return self.read_device(at - DEVICE, data),
            TABLE..PENDING => self.msix.read_table((at - TABLE) as usize, data),
            PENDING.. => self.msix.read_pending((at - PENDING) as usize, data),
            _ => data.fill(0),
        }
        Ok(())
    }

    fn write_bar(&mut self, at: u64, data: &[u8]) -> Result<(), NotReady> {
        match at {
            0..ISR => self.write_common(at, data),
            DEVICE..NOTIFY => {
                self.device.features().ok_or(NotReady)?;
                self.device.write_config((at - DEVICE) as usize, data);
            }
            NOTIFY..TABLE => {
                let queue = (at - NOTIFY) / u64::from(NOTIFY_MULTIPLIER);
                if let Some(kick) = self.device.notifiers().kicks.get(queue as usize) {
                    kick.raise();
                }
            }
            TABLE..PENDING => self.msix.write_table((at - TABLE) as usize, data),
            _ => {}
        }
        Ok(())
    }

    fn describe(&self) -> DeviceInfo {
        let kind = self.device.kind();
        DeviceInfo {
            id: self.device.name().to_owned(),
            class_name: kind.class_name,
            class: (kind.class >> 8) as u16,
            vendor: VENDOR,
            device: identity(kind).device,
            bar: self.bar(),
        }
    }
}

/// The most queues are those of a network card; one vector more is for the configuration.
const _: () = assert!((2 * MAX_PAIRS + 2) as u64 * ENTRY_SIZE as u64 <= PENDING - TABLE);

#[cfg(test)]
mod tests;
