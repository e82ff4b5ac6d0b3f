//! Virtio features of a network card, and the configuration space that belongs to them (virtio 1.2 sections 5.1.3, 5.1.4).

use virtio_bindings::virtio_config::{VIRTIO_F_IN_ORDER, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_net as net;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::options::PortOptions;
use crate::frame::MacAddress;
use crate::link::Offloads;

/// One feature as a mask.
pub(super) const fn bit(number: u32) -> u64 {
    1 << number
}

/// Whether `features` have feature `number`.
#[inline]
pub(super) const fn has(features: u64, number: u32) -> bool {
    features & bit(number) != 0
}

/// A feature and the offload that it stands for.
type Offload = (u32, fn(&mut Offloads) -> &mut bool);

/// The feature of each offload that the guest does for what it receives.
const GUEST: [Offload; 6] = [
    (net::VIRTIO_NET_F_GUEST_CSUM, |o| &mut o.csum),
    (net::VIRTIO_NET_F_GUEST_TSO4, |o| &mut o.tso4),
    (net::VIRTIO_NET_F_GUEST_TSO6, |o| &mut o.tso6),
    (net::VIRTIO_NET_F_GUEST_ECN, |o| &mut o.ecn),
    (net::VIRTIO_NET_F_GUEST_USO4, |o| &mut o.uso4),
    (net::VIRTIO_NET_F_GUEST_USO6, |o| &mut o.uso6),
];

/// The feature of each offload that the device does for what the guest sends. One feature stands for both kinds of USO.
const HOST: [Offload; 6] = [
    (net::VIRTIO_NET_F_CSUM, |o| &mut o.csum),
    (net::VIRTIO_NET_F_HOST_TSO4, |o| &mut o.tso4),
    (net::VIRTIO_NET_F_HOST_TSO6, |o| &mut o.tso6),
    (net::VIRTIO_NET_F_HOST_ECN, |o| &mut o.ecn),
    (net::VIRTIO_NET_F_HOST_USO, |o| &mut o.uso4),
    (net::VIRTIO_NET_F_HOST_USO, |o| &mut o.uso6),
];

fn offloads_of(table: &[Offload], features: u64) -> Offloads {
    let mut offloads = Offloads::NONE;
    for (feature, field) in table {
        *field(&mut offloads) = has(features, *feature);
    }
    offloads
}

fn features_of(table: &[Offload], mut offloads: Offloads) -> u64 {
    let set = table.iter().filter(|(_, field)| *field(&mut offloads));
    set.fold(0, |features, (feature, _)| features | bit(*feature))
}

/// What a guest with these features can do for what it receives. Segments need checksums.
pub(super) fn guest_offloads(features: u64) -> Offloads {
    let offloads = offloads_of(&GUEST, features);
    if offloads.csum {
        offloads
    } else {
        Offloads::NONE
    }
}

/// The bits that `VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET` may have for a guest with these features.
pub(super) fn guest_offload_bits(features: u64) -> u64 {
    features & features_of(&GUEST, Offloads::ALL)
}

/// What a guest with these features may leave undone in what it sends.
pub(super) fn host_offloads(features: u64) -> Offloads {
    let offloads = offloads_of(&HOST, features);
    if offloads.csum {
        offloads
    } else {
        Offloads::NONE
    }
}

/// The features that are offered for a back-end which does `host` for what the guest sends, and may leave `guest` to it.
pub(super) fn offered(options: &PortOptions, mtu: bool, host: Offloads, guest: Offloads) -> u64 {
    let offer = &options.offer;
    let wanted = match (offer.csum, offer.gso) {
        (false, _) => Offloads::NONE,
        (true, true) => Offloads::ALL,
        (true, false) => Offloads {
            csum: true,
            ..Offloads::NONE
        },
    };
    // Both kinds of USO are one feature for the guest that sends.
    let host = Offloads {
        uso4: host.uso4 && host.uso6,
        uso6: host.uso4 && host.uso6,
        ..host
    };
    let mut features = bit(VIRTIO_F_VERSION_1)
        | bit(VIRTIO_RING_F_INDIRECT_DESC)
        | bit(VIRTIO_RING_F_EVENT_IDX)
        | bit(net::VIRTIO_NET_F_MAC)
        | bit(net::VIRTIO_NET_F_STATUS);
    features |= features_of(&HOST, host.and(wanted)) | features_of(&GUEST, guest.and(wanted));
    let optional = [
        (offer.packed, bit(VIRTIO_F_RING_PACKED)),
        (offer.in_order, bit(VIRTIO_F_IN_ORDER)),
        (offer.mrg_rxbuf, bit(net::VIRTIO_NET_F_MRG_RXBUF)),
        (mtu, bit(net::VIRTIO_NET_F_MTU)),
        (options.queues > 1, bit(net::VIRTIO_NET_F_MQ)),
        (offer.ctrl_vq, CONTROL),
    ];
    for (wanted, bits) in optional {
        features |= if wanted { bits } else { 0 };
    }
    features
}

/// The features of the control queue.
const CONTROL: u64 = bit(net::VIRTIO_NET_F_CTRL_VQ)
    | bit(net::VIRTIO_NET_F_CTRL_RX)
    | bit(net::VIRTIO_NET_F_CTRL_RX_EXTRA)
    | bit(net::VIRTIO_NET_F_CTRL_VLAN)
    | bit(net::VIRTIO_NET_F_CTRL_MAC_ADDR)
    | bit(net::VIRTIO_NET_F_CTRL_GUEST_OFFLOADS)
    | bit(net::VIRTIO_NET_F_GUEST_ANNOUNCE);

/// `struct virtio_net_config` up to `mtu`.
pub(super) struct Config {
    /// `mac`
    pub(super) mac: MacAddress,
    /// `status`: `VIRTIO_NET_S_LINK_UP`
    pub(super) link: bool,
    /// `status`: `VIRTIO_NET_S_ANNOUNCE`
    pub(super) announce: bool,
    /// `max_virtqueue_pairs`
    pub(super) pairs: u16,
    /// `mtu`; 0 where the feature is not offered
    pub(super) mtu: u16,
}

impl Config {
    /// As the guest reads it.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut status = 0;
        if self.link {
            status |= net::VIRTIO_NET_S_LINK_UP as u16;
        }
        if self.announce {
            status |= net::VIRTIO_NET_S_ANNOUNCE as u16;
        }
        let mut bytes = self.mac.0.to_vec();
        for word in [status, self.pairs, self.mtu] {
            bytes.extend(word.to_le_bytes());
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::port::Offer;

    fn options(offer: Offer) -> PortOptions {
        PortOptions {
            offer,
            ..PortOptions::new("p0", MacAddress([2; 6]))
        }
    }

    #[test]
    fn offloads_are_offered_where_both_sides_have_them() {
        let all = options(Offer::default());
        let features = offered(&all, false, Offloads::ALL, Offloads::ALL);
        assert_eq!(guest_offloads(features), Offloads::ALL);
        assert_eq!(host_offloads(features), Offloads::ALL);
        let none = offered(&all, false, Offloads::NONE, Offloads::NONE);
        assert_eq!(guest_offload_bits(none), 0);
        assert_eq!(host_offloads(none), Offloads::NONE);
        let uso4 = Offloads {
            csum: true,
            uso4: true,
            ..Offloads::NONE
        };
        let features = offered(&all, false, uso4, uso4);
        assert!(!has(features, net::VIRTIO_NET_F_HOST_USO));
        assert!(has(features, net::VIRTIO_NET_F_GUEST_USO4));
        let no_gso = options(Offer {
            gso: false,
            ..Offer::default()
        });
        let features = offered(&no_gso, false, Offloads::ALL, Offloads::ALL);
        assert!(guest_offloads(features).csum && !guest_offloads(features).tso4);
    }

    #[test]
    fn what_is_switched_off_is_not_offered() {
        let everything = offered(
            &options(Offer::default()),
            true,
            Offloads::ALL,
            Offloads::ALL,
        );
        let off = Offer {
            csum: false,
            gso: false,
            mrg_rxbuf: false,
            packed: false,
            in_order: false,
            ctrl_vq: false,
        };
        let little = offered(&options(off), false, Offloads::ALL, Offloads::ALL);
        assert_eq!(little & !everything, 0);
        for feature in [
            net::VIRTIO_NET_F_MRG_RXBUF,
            net::VIRTIO_NET_F_MTU,
            net::VIRTIO_NET_F_CTRL_VQ,
            net::VIRTIO_NET_F_GUEST_ANNOUNCE,
            net::VIRTIO_NET_F_CSUM,
            VIRTIO_F_IN_ORDER,
            VIRTIO_F_RING_PACKED,
        ] {
            assert!(
                has(everything, feature) && !has(little, feature),
                "{feature}"
            );
        }
    }

    #[test]
    fn the_configuration_is_as_in_the_specification() {
        let config = Config {
            mac: MacAddress([1, 2, 3, 4, 5, 6]),
            link: true,
            announce: true,
            pairs: 0x102,
            mtu: 9000,
        };
        let bytes = [1, 2, 3, 4, 5, 6, 3, 0, 2, 1, 0x28, 0x23];
        assert_eq!(config.encode(), bytes);
    }
}
