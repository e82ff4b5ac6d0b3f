//! The 256 bytes of a conventional PCI configuration space (PCI 3.0, chapter 6): values and which bits the guest may write.

/// Offset of the command register.
pub(crate) const COMMAND: usize = 0x04;
/// Bit of the command register that enables memory decoding.
pub(crate) const COMMAND_MEMORY: u16 = 1 << 1;
const STATUS: usize = 0x06;
const BAR0: usize = 0x10;
const CAPABILITIES: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;
const SIZE: usize = 256;

/// What a function is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Identity {
    /// Vendor id.
    pub(crate) vendor: u16,
    /// Device id.
    pub(crate) device: u16,
    /// Class, subclass and programming interface, 24 bits.
    pub(crate) class: u32,
    /// Revision id.
    pub(crate) revision: u8,
    /// Subsystem vendor id and subsystem id.
    pub(crate) subsystem: (u16, u16),
}

/// Configuration space of one function with at most one memory BAR.
pub(crate) struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    next_capability: usize,
    last_link: usize,
}

impl ConfigSpace {
    /// A type 0 header without BAR and capabilities.
    pub(crate) fn new(identity: Identity) -> Self {
        let mut space = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            next_capability: FIRST_CAPABILITY,
            last_link: CAPABILITIES,
        };
        space.set(0x00, &identity.vendor.to_le_bytes());
        space.set(0x02, &identity.device.to_le_bytes());
        space.set(
            0x08,
            &(identity.class << 8 | u32::from(identity.revision)).to_le_bytes(),
        );
        space.set(0x2c, &identity.subsystem.0.to_le_bytes());
        space.set(0x2e, &identity.subsystem.1.to_le_bytes());
        const BUS_MASTER: u16 = 1 << 2;
        const INTERRUPT_DISABLE: u16 = 1 << 10;
        space.allow(
            COMMAND,
            &(COMMAND_MEMORY | BUS_MASTER | INTERRUPT_DISABLE).to_le_bytes(),
        );
        // The interrupt line is scratch space; without a pin it means nothing.
        space.allow(0x3c, &[0xff]);
        space
    }

    /// Adds a 32-bit memory BAR of `size` bytes (a power of two, 16 at least), placed at `address`.
    pub(crate) fn set_bar(&mut self, address: u32, size: u32) {
        assert!(size.is_power_of_two() && size >= 16 && address.is_multiple_of(size));
        self.set(BAR0, &address.to_le_bytes());
        self.allow(BAR0, &(!(size - 1)).to_le_bytes());
    }

    /// Adds a capability: `body` follows the id and the link. Returns the offset of the capability.
    pub(crate) fn add_capability(&mut self, id: u8, body: &[u8]) -> usize {
        const HAS_CAPABILITIES: u8 = 1 << 4;
        let at = self.next_capability;
        self.set(self.last_link, &[at as u8]);
        self.bytes[STATUS] |= HAS_CAPABILITIES;
        self.set(at, &[id, 0]);
        self.set(at + 2, body);
        self.last_link = at + 1;
        self.next_capability = (at + 2 + body.len()).next_multiple_of(4);
        at
    }

    /// Stores bytes, also where the guest may not write.
    pub(crate) fn set(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Lets the guest write the bits in `mask`.
    pub(crate) fn allow(&mut self, at: usize, mask: &[u8]) {
        self.writable[at..at + mask.len()].copy_from_slice(mask);
    }

    /// A guest's read. Beyond the end all bits are zero.
    pub(crate) fn read(&self, at: usize, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = self
                .bytes
                .get(at.saturating_add(index))
                .copied()
                .unwrap_or(0);
        }
    }

    /// A guest's write; read-only bits keep their value.
    pub(crate) fn write(&mut self, at: usize, data: &[u8]) {
        for (index, byte) in data.iter().enumerate() {
            let at = at.saturating_add(index);
            if let (Some(old), Some(mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *old = *old & !mask | byte & mask;
            }
        }
    }

    /// A 16-bit register.
    pub(crate) fn read_u16(&self, at: usize) -> u16 {
        let mut bytes = [0; 2];
        self.read(at, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    /// A 32-bit register.
    pub(crate) fn read_u32(&self, at: usize) -> u32 {
        let mut bytes = [0; 4];
        self.read(at, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Where the BAR is decoded; `None` while memory decoding is off.
    pub(crate) fn bar_address(&self) -> Option<u64> {
        let decodes = self.read_u16(COMMAND) & COMMAND_MEMORY != 0;
        decodes.then(|| u64::from(self.read_u32(BAR0) & !0xf))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        let mut space = ConfigSpace::new(Identity {
            vendor: 0x1af4,
            device: 0x1042,
            class: 0x01_0000,
            revision: 1,
            subsystem: (0x1af4, 0x1100),
        });
        space.set_bar(0xc000_0000, 0x8000);
        space
    }

    #[test]
    fn identity_is_read_only() {
        let mut space = space();
        space.write(0, &[0xff; 4]);
        assert_eq!(space.read_u32(0), 0x1042_1af4);
        assert_eq!(space.read_u32(8), 0x0100_0001);
    }

    #[test]
    fn a_bar_tells_its_size_and_moves() {
        let mut space = space();
        assert_eq!(space.bar_address(), None, "decoding is off after reset");
        space.write(0x10, &[0xff; 4]);
        assert_eq!(space.read_u32(0x10), 0xffff_8000);
        space.write(0x10, &0xc123_4567_u32.to_le_bytes());
        space.write(COMMAND, &[0xff, 0xff]);
        assert_eq!(space.bar_address(), Some(0xc123_0000));
        assert_eq!(space.read_u16(COMMAND), 0x0406);
    }

    #[test]
    fn capabilities_are_linked_in_order() {
        let mut space = space();
        assert_eq!(space.read_u16(STATUS) & 0x10, 0);
        let first = space.add_capability(9, &[1, 2, 3]);
        let second = space.add_capability(0x11, &[0; 10]);
        assert_eq!(space.read_u16(STATUS) & 0x10, 0x10);
        assert_eq!(usize::from(space.read_u16(0x34) as u8), first);
        assert_eq!(space.read_u16(first), (second as u16) << 8 | 9);
        assert_eq!(space.read_u16(second), 0x11);
    }

    #[test]
    fn accesses_beyond_the_end_are_harmless() {
        let mut space = space();
        let mut data = [0xaa; 4];
        space.read(254, &mut data);
        assert_eq!(data, [0; 4]);
        space.write(254, &[1; 4]);
        space.write(usize::MAX, &[1; 4]);
    }
}
