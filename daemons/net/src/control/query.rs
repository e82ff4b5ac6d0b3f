//! What ports tell of themselves: `query-ports`, and the numbers for metrics.

use std::rc::Rc;

use qmp::{Arguments, Map, Result, Value, json};
use virtio_bindings::{virtio_config, virtio_net, virtio_ring};

use super::ports::PortEntry;
use super::{Netd, capture};
use crate::counters::Counted;
use crate::link::DropReason;
use crate::options::{RateSetting, SocketAddress};
use crate::port::RingReport;

/// The numbers of a port at one moment.
#[derive(Clone, Debug)]
pub struct PortNumbers {
    /// Its name.
    pub id: String,
    /// The name of its back-end.
    pub netdev: String,
    /// Whether a front-end is there.
    pub connected: bool,
    /// Whether the link is up.
    pub link: bool,
    /// Queue pairs that the guest uses.
    pub pairs_in_use: u16,
    /// Frames that the running capture has written and lost.
    pub capture: Option<(u64, u64)>,
    /// The rings that run.
    pub rings: Vec<RingReport>,
    /// Received by the guest and sent by it, by pair.
    pub pairs: Vec<(Counted, Counted)>,
}

impl Netd {
    /// The numbers of all ports.
    pub fn numbers(&self) -> Vec<PortNumbers> {
        let ports = self.ports.borrow();
        let numbers = ports.iter().map(|entry| {
            let state = entry.state();
            let pairs = entry.hooks().counters.pairs.iter();
            let capture = entry.hooks().capture.state();
            PortNumbers {
                id: entry.id().to_owned(),
                netdev: entry.netdev_id().to_owned(),
                connected: state.as_ref().is_some_and(|state| state.connected),
                link: state.as_ref().is_some_and(|state| state.link),
                pairs_in_use: state.as_ref().map_or(0, |state| state.pairs),
                capture: capture.map(|capture| (capture.written, capture.lost)),
                rings: state.map(|state| state.rings).unwrap_or_default(),
                pairs: pairs.map(|pair| (pair.rx.read(), pair.tx.read())).collect(),
            }
        });
        numbers.collect()
    }
}

/// Virtio features by the names that QEMU's options have for them.
const FEATURES: &[(u32, &str)] = &[
    (virtio_net::VIRTIO_NET_F_CSUM, "csum"),
    (virtio_net::VIRTIO_NET_F_GUEST_CSUM, "guest_csum"),
    (
        virtio_net::VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
        "ctrl_guest_offloads",
    ),
    (virtio_net::VIRTIO_NET_F_MTU, "mtu"),
    (virtio_net::VIRTIO_NET_F_MAC, "mac"),
    (virtio_net::VIRTIO_NET_F_GUEST_TSO4, "guest_tso4"),
    (virtio_net::VIRTIO_NET_F_GUEST_TSO6, "guest_tso6"),
    (virtio_net::VIRTIO_NET_F_GUEST_ECN, "guest_ecn"),
    (virtio_net::VIRTIO_NET_F_GUEST_UFO, "guest_ufo"),
    (virtio_net::VIRTIO_NET_F_HOST_TSO4, "host_tso4"),
    (virtio_net::VIRTIO_NET_F_HOST_TSO6, "host_tso6"),
    (virtio_net::VIRTIO_NET_F_HOST_ECN, "host_ecn"),
    (virtio_net::VIRTIO_NET_F_HOST_UFO, "host_ufo"),
    (virtio_net::VIRTIO_NET_F_MRG_RXBUF, "mrg_rxbuf"),
    (virtio_net::VIRTIO_NET_F_STATUS, "status"),
    (virtio_net::VIRTIO_NET_F_CTRL_VQ, "ctrl_vq"),
    (virtio_net::VIRTIO_NET_F_CTRL_RX, "ctrl_rx"),
    (virtio_net::VIRTIO_NET_F_CTRL_VLAN, "ctrl_vlan"),
    (virtio_net::VIRTIO_NET_F_CTRL_RX_EXTRA, "ctrl_rx_extra"),
    (virtio_net::VIRTIO_NET_F_GUEST_ANNOUNCE, "guest_announce"),
    (virtio_net::VIRTIO_NET_F_MQ, "mq"),
    (virtio_net::VIRTIO_NET_F_CTRL_MAC_ADDR, "ctrl_mac_addr"),
    (virtio_ring::VIRTIO_RING_F_INDIRECT_DESC, "indirect_desc"),
    (virtio_ring::VIRTIO_RING_F_EVENT_IDX, "event_idx"),
    (virtio_config::VIRTIO_F_VERSION_1, "version_1"),
    (virtio_config::VIRTIO_F_RING_PACKED, "packed"),
    (virtio_config::VIRTIO_F_IN_ORDER, "in_order"),
    (virtio_net::VIRTIO_NET_F_GUEST_USO4, "guest_uso4"),
    (virtio_net::VIRTIO_NET_F_GUEST_USO6, "guest_uso6"),
    (virtio_net::VIRTIO_NET_F_HOST_USO, "host_uso"),
];

fn feature_names(features: u64) -> Vec<&'static str> {
    let acked = FEATURES.iter().filter(|(bit, _)| features >> bit & 1 != 0);
    acked.map(|(_, name)| *name).collect()
}

pub(super) async fn ports(netd: &Rc<Netd>, arguments: Arguments) -> Result<Value> {
    arguments.finish()?;
    let ports = netd.ports.borrow();
    Ok(ports.iter().map(|entry| described(entry)).collect())
}

fn described(entry: &PortEntry) -> Value {
    let mut port = json!({
        "id": entry.id(),
        "netdev": entry.netdev_id(),
        "netdev-type": entry.netdev_kind(),
        "socket": match entry.address() {
            SocketAddress::Listen(path) | SocketAddress::Connect(path) => path.display().to_string(),
            SocketAddress::Fd(name) => format!("fd:{name}"),
        },
        "server": !matches!(entry.address(), SocketAddress::Connect(_)),
        "queues": entry.queues(),
    });
    if let Some(state) = entry.state() {
        port["connected"] = json!(state.connected);
        port["link"] = json!(if state.link { "up" } else { "down" });
        port["mac"] = json!(state.mac.to_string());
        if let Some(mtu) = state.mtu {
            port["mtu"] = json!(mtu);
        }
        port["features"] = json!(feature_names(state.features));
        port["queues-in-use"] = json!(state.pairs);
        let rings = state.rings.iter();
        port["rings"] = rings
            .map(|ring| {
                json!({
                    "index": ring.index,
                    "size": ring.size,
                    "enabled": ring.enabled,
                    "broken": ring.broken,
                })
            })
            .collect();
    }
    let (rate_rx, rate_tx) = entry.rates();
    port["rate-rx"] = rate(&rate_rx);
    port["rate-tx"] = rate(&rate_tx);
    if let Some(guard) = entry.guard() {
        port["guard"] = json!(guard);
    }
    if let Some(state) = entry.hooks().capture.state() {
        port["capture"] = capture::described(&state);
    }
    let (rx, tx) = entry.hooks().counters.total();
    port["rx"] = counted(&rx);
    port["tx"] = counted(&tx);
    let pairs = entry.hooks().counters.pairs.iter();
    port["pairs"] = pairs
        .map(|pair| json!({"rx": counted(&pair.rx.read()), "tx": counted(&pair.tx.read())}))
        .collect();
    port
}

fn rate(setting: &RateSetting) -> Value {
    let mut rate = json!(setting.rate);
    if let Some(group) = &setting.group {
        rate["group"] = json!(group);
    }
    rate
}

/// Reasons that never occurred are left out.
fn counted(counted: &Counted) -> Value {
    let mut drops = Map::new();
    for reason in DropReason::ALL {
        match counted.dropped(reason) {
            0 => {}
            count => drop(drops.insert(reason.name().into(), json!(count))),
        }
    }
    json!({
        "frames": counted.frames,
        "bytes": counted.bytes,
        "dropped": counted.dropped_total(),
        "drops": drops,
    })
}
