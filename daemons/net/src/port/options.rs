//! What a port is told when it starts, and what it tells of itself.

use std::path::PathBuf;

use crate::frame::MacAddress;
use crate::netdev::VlanMode;

/// Most queue pairs of a port: vhost-user names 256 rings, and one of them is the control queue.
pub const MAX_PAIRS: u16 = 127;
/// Smallest MTU of a guest (virtio 1.2 section 5.1.4.1).
pub const MIN_MTU: u16 = 68;

/// How a port starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortOptions {
    /// Names the port, in log lines too.
    pub id: String,
    /// The guest's address.
    pub mac: MacAddress,
    /// The MTU that the guest is told; `None`: none.
    pub mtu: Option<u16>,
    /// Queue pairs, 1 to [`MAX_PAIRS`].
    pub queues: u16,
    /// Largest ring size in descriptors: a power of two up to 32768.
    pub queue_size_max: u16,
    /// How a switch treats it.
    pub vlan: VlanMode,
    /// Whether other isolated ports of a switch neither hear it nor are heard by it.
    pub isolated: bool,
    /// What the guest may use.
    pub offer: Offer,
    /// The file in which a successor of a killed daemon finds what the driver said on the control queue; `None`: it finds nothing.
    pub kept: Option<PathBuf>,
}

impl PortOptions {
    /// A port of one queue pair with everything offered.
    pub fn new(id: &str, mac: MacAddress) -> PortOptions {
        PortOptions {
            id: id.to_owned(),
            mac,
            mtu: None,
            queues: 1,
            queue_size_max: 1024,
            vlan: VlanMode::default(),
            isolated: false,
            offer: Offer::default(),
            kept: None,
        }
    }

    /// Checks every value.
    ///
    /// # Errors
    /// Names the first that is out of range.
    pub fn check(&self) -> anyhow::Result<()> {
        let id = &self.id;
        anyhow::ensure!(
            (1..=MAX_PAIRS).contains(&self.queues),
            "port '{id}': queues={} is not between 1 and {MAX_PAIRS}",
            self.queues
        );
        anyhow::ensure!(
            self.queue_size_max.is_power_of_two() && (2..=32768).contains(&self.queue_size_max),
            "port '{id}': queue-size {} is not a power of 2 between 2 and 32768",
            self.queue_size_max
        );
        anyhow::ensure!(
            !self.mac.is_multicast() && self.mac != MacAddress::default(),
            "port '{id}': {} is not the address of one station",
            self.mac
        );
        check_mtu(id, self.mtu)
    }
}

/// Checks an MTU.
pub(super) fn check_mtu(id: &str, mtu: Option<u16>) -> anyhow::Result<()> {
    match mtu {
        Some(mtu) if mtu < MIN_MTU => {
            anyhow::bail!("port '{id}': an MTU of {mtu} is below {MIN_MTU}")
        }
        _ => Ok(()),
    }
}

/// What a guest may use, as far as the back-end has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Leaving checksums to the other side.
    pub csum: bool,
    /// Leaving segmentation to the other side.
    pub gso: bool,
    /// Receive buffers that are merged.
    pub mrg_rxbuf: bool,
    /// Packed rings.
    pub packed: bool,
    /// `VIRTIO_F_IN_ORDER`.
    pub in_order: bool,
    /// The control queue.
    pub ctrl_vq: bool,
}

impl Default for Offer {
    fn default() -> Self {
        Offer {
            csum: true,
            gso: true,
            mrg_rxbuf: true,
            packed: true,
            in_order: true,
            ctrl_vq: true,
        }
    }
}

/// A port as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortState {
    /// Whether a front-end is there.
    pub connected: bool,
    /// Virtio features that the guest acknowledged.
    pub features: u64,
    /// Queue pairs that the guest uses.
    pub pairs: u16,
    /// Whether the link is up.
    pub link: bool,
    /// The guest's address: the port's, or what the guest changed it to.
    pub mac: MacAddress,
    /// The MTU that the guest is told.
    pub mtu: Option<u16>,
    /// The rings that run, by index.
    pub rings: Vec<RingReport>,
}

/// A ring that runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingReport {
    /// Its index: 2i receives for pair i, 2i+1 transmits, the last one controls.
    pub index: u16,
    /// Its size in descriptors.
    pub size: u16,
    /// Whether the front-end has it enabled: if not, what the guest sends there is dropped, and it receives nothing.
    pub enabled: bool,
    /// Whether the guest broke it.
    pub broken: bool,
}
