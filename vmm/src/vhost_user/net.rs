//! virtio-net (virtio 1.2, 5.1): the guest's address, MTU and number of queue pairs can come from the command line, which wins; the
//! rest is the back-end's.
//!
//! ```text
//! guest's queues     0 rx  1 tx  2 rx  3 tx ...  2N    control        N: queues= on the command line
//! back-end's rings   0 rx  1 tx  2 rx  3 tx ...  2M    control        M: the back-end's max_virtqueue_pairs, N at least
//! ```
//!
//! The control queue belongs to the back-end as all others do: this process sees no command of it, and so repeats none to
//! a successor. What a successor of a dead back-end cannot know is what the guest set by such commands. So a back-end has to start
//! open: with a receive filter that lets everything through (a Linux guest checks addresses and VLANs by itself), and with every
//! queue pair in use whose receive ring has buffers. Then nothing is lost, and the guest's next command makes the filter
//! narrow again. Without the control queue there is one queue pair and no filter.
//!
//! No INFLIGHT region is needed: a back-end completes in order, and a frame that was lost with it is lost as on a wire.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::str::FromStr;
use std::sync::Arc;

use anyhow::{Context, Result};
use vhost::vhost_user::VhostUserProtocolFeatures as Protocol;
use vhost::vhost_user::message::FrontendReq;

use super::Description;
use super::model::{Kind, Model, Offer};
use crate::options::NetOptions;

/// The kind; its configuration is `struct virtio_net_config` up to the MTU (5.1.4).
const KIND: Kind = Kind {
    option: "--vhost-user-net",
    virtio_id: 1,
    class: 0x02_0000,
    class_name: "Ethernet controller",
    config_size: 12,
    needs_inflight: false,
};

/// Most queue pairs: their queues, the control queue and the configuration need a vector each, and the table has room for 192.
pub(crate) const MAX_PAIRS: u16 = 64;

const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
pub(super) const MTU: u64 = 1 << 3;
pub(super) const MAC: u64 = 1 << 5;
pub(super) const STATUS: u64 = 1 << 16;
pub(super) const CTRL_VQ: u64 = 1 << 17;
const CTRL_RX: u64 = 1 << 18;
const CTRL_VLAN: u64 = 1 << 19;
const CTRL_RX_EXTRA: u64 = 1 << 20;
const GUEST_ANNOUNCE: u64 = 1 << 21;
pub(super) const MQ: u64 = 1 << 22;
const CTRL_MAC_ADDR: u64 = 1 << 23;
/// Features that mean nothing without the control queue.
const BY_CONTROL: u64 = CTRL_GUEST_OFFLOADS
    | CTRL_VQ
    | CTRL_RX
    | CTRL_VLAN
    | CTRL_RX_EXTRA
    | GUEST_ANNOUNCE
    | MQ
    | CTRL_MAC_ADDR;
/// CSUM, GUEST_CSUM, GUEST_TSO4, GUEST_TSO6, GUEST_ECN, GUEST_UFO, HOST_TSO4, HOST_TSO6, HOST_ECN, HOST_UFO, MRG_RXBUF,
/// GUEST_USO4, GUEST_USO6, HOST_USO, GUEST_HDRLEN.
const OF_FRAMES: u64 = 1 | 1 << 1 | 0x1ff << 7 | 7 << 54 | 1 << 59;

/// Offset of `mac` in the configuration.
const CONFIG_MAC: usize = 0;
/// Offset of `max_virtqueue_pairs`.
const CONFIG_PAIRS: usize = 8;
/// Offset of `mtu`.
const CONFIG_MTU: usize = 10;

/// An Ethernet address of one station.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MacAddress([u8; 6]);

impl MacAddress {
    /// A random one with the prefix that QEMU uses.
    fn random() -> Result<Self> {
        let mut address = [0x52, 0x54, 0, 0, 0, 0];
        let mut source = File::open("/dev/urandom").context("/dev/urandom")?;
        source
            .read_exact(&mut address[3..])
            .context("/dev/urandom")?;
        Ok(Self(address))
    }
}

impl FromStr for MacAddress {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let digits = |part: &str| {
            let plain = part.len() == 2 && part.bytes().all(|byte| byte.is_ascii_hexdigit());
            plain.then(|| u8::from_str_radix(part, 16).ok()).flatten()
        };
        let bytes: Option<Vec<u8>> = text.split(':').map(digits).collect();
        let bytes: Option<[u8; 6]> = bytes.and_then(|bytes| bytes.try_into().ok());
        bytes
            .filter(|bytes| bytes[0] & 1 == 0 && *bytes != [0; 6])
            .map(Self)
            .ok_or_else(|| {
                format!("mac '{text}' is not the address of a station, as 52:54:00:12:34:56 is")
            })
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// A network card.
#[derive(Clone, Debug)]
pub(crate) struct Card {
    /// The address that the command line gives.
    pub(super) mac: Option<MacAddress>,
    /// The address if neither the command line nor the back-end has one.
    pub(super) own_mac: MacAddress,
    /// The MTU that the command line gives.
    pub(super) mtu: Option<u16>,
    /// Queue pairs.
    pub(super) pairs: u16,
    /// Whether the back-end gets the control queue.
    pub(super) control: bool,
}

impl Card {
    /// The device that option number `index` asks for.
    ///
    /// # Errors
    /// The kernel gives no random numbers.
    pub(crate) fn describe(index: usize, options: &NetOptions) -> Result<Description> {
        let name = options.id.clone().unwrap_or_else(|| format!("net{index}"));
        Ok(Description {
            name,
            socket: options.socket.clone(),
            queue_size: options.queue_size,
            model: Arc::new(Self {
                mac: options.mac,
                own_mac: MacAddress::random()?,
                mtu: options.mtu,
                pairs: options.queues,
                control: options.ctrl_vq,
            }),
        })
    }

    fn has_control(&self, offer: &Offer) -> bool {
        self.control && offer.features & CTRL_VQ != 0
    }
}

impl Model for Card {
    fn kind(&self) -> &'static Kind {
        &KIND
    }

    /// The control queue has its place even if no back-end serves it: how many queues there are must not change later.
    fn num_queues(&self) -> u16 {
        2 * self.pairs + 1
    }

    fn switch(&self) -> Option<usize> {
        None
    }

    fn protocol(&self) -> Protocol {
        Protocol::MTU
    }

    fn check(&self, offer: &Offer) -> std::result::Result<(), String> {
        let pairs = self.pairs;
        // For QEMU and DPDK the answer to GET_QUEUE_NUM is a number of pairs, for others one of rings: a bound in both cases.
        let available = offer.queues.unwrap_or(1);
        if available < u64::from(pairs) {
            return Err(format!(
                "queues is {pairs}, but the back-end has only {available}"
            ));
        }
        if pairs > 1 && !(self.has_control(offer) && offer.features & MQ != 0) {
            return Err(format!(
                "queues is {pairs}, but the back-end lacks VIRTIO_NET_F_MQ or the control queue"
            ));
        }
        Ok(())
    }

    fn own_features(&self) -> u64 {
        if self.mtu.is_some() { MAC | MTU } else { MAC }
    }

    fn features(&self, offer: &Offer) -> u64 {
        let mut known = OF_FRAMES;
        if offer.protocol.contains(Protocol::CONFIG) {
            known |= STATUS | MTU;
        }
        if self.has_control(offer) {
            known |= BY_CONTROL;
        }
        if known & STATUS == 0 {
            known &= !GUEST_ANNOUNCE;
        }
        offer.features & known | self.own_features()
    }

    fn announced_config(&self) -> Option<(usize, Vec<u8>)> {
        Some((CONFIG_MAC, self.mac?.0.to_vec()))
    }

    fn config(&self, offer: &Offer, told: Option<&[u8]>) -> std::result::Result<Vec<u8>, String> {
        let mut config = told.map_or_else(|| vec![0; KIND.config_size], <[u8]>::to_vec);
        if told.is_some() && offer.features & MQ != 0 {
            let theirs = read_u16(&config, CONFIG_PAIRS);
            if theirs < self.pairs {
                return Err(format!(
                    "queues is {}, but the back-end has only {theirs}",
                    self.pairs
                ));
            }
        }
        let mac = match self.mac {
            None if told.is_some() && offer.features & MAC != 0 => None,
            None => Some(self.own_mac),
            own => own,
        };
        if let Some(MacAddress(bytes)) = mac {
            config[CONFIG_MAC..CONFIG_MAC + 6].copy_from_slice(&bytes);
        }
        config[CONFIG_PAIRS..CONFIG_PAIRS + 2].copy_from_slice(&self.pairs.to_le_bytes());
        if let Some(mtu) = self.mtu {
            config[CONFIG_MTU..CONFIG_MTU + 2].copy_from_slice(&mtu.to_le_bytes());
        }
        Ok(config)
    }

    fn order_at_start(&self, offer: &Offer, features: u64) -> Option<(FrontendReq, u64)> {
        let told = features & MTU != 0 && offer.protocol.contains(Protocol::MTU);
        let mtu = self.mtu.filter(|_| told)?;
        Some((FrontendReq::NET_SET_MTU, mtu.into()))
    }

    /// The control queue follows the last pair that there could be: with MQ that is a matter of each side's configuration (5.1.2).
    fn ring_at_back_end(&self, queue: u16, features: u64, told: Option<&[u8]>) -> u16 {
        match told {
            Some(config) if features & MQ != 0 && queue == 2 * self.pairs => {
                read_u16(config, CONFIG_PAIRS).saturating_mul(2)
            }
            _ => queue,
        }
    }
}

fn read_u16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_those_of_stations() {
        let address: MacAddress = "52:54:00:aB:cd:0f".parse().unwrap();
        assert_eq!(address, MacAddress([0x52, 0x54, 0, 0xab, 0xcd, 0x0f]));
        assert_eq!(address.to_string(), "52:54:00:ab:cd:0f");
        for wrong in [
            "",
            "52:54:00:ab:cd",
            "52:54:00:ab:cd:0f:00",
            "2:54:00:ab:cd:0f",
            "+2:54:00:ab:cd:0f",
            "00:00:00:00:00:00",
            "01:00:5e:00:00:01",
            "ff:ff:ff:ff:ff:ff",
        ] {
            assert!(wrong.parse::<MacAddress>().is_err(), "{wrong}");
        }
        let random = MacAddress::random().unwrap();
        assert_eq!(random.to_string().parse(), Ok(random));
    }
}
