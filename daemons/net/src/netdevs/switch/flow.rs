//! Which queue pair of a port a frame goes to: all frames of a connection to the same one, in both directions.

use crate::packet::{self, Fragment, Transport};

/// A number that the frames of one connection share.
pub(super) fn hash(head: &[u8]) -> u32 {
    let mixed = transport_hash(head).unwrap_or_else(|| sum(head.get(..12).unwrap_or(head)));
    // The upper half of the product depends on all bits.
    (mixed.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as u32
}

/// Sums do not tell source and destination apart, so that answers go where questions come from.
fn transport_hash(head: &[u8]) -> Option<u64> {
    let network = packet::network(head)?;
    let (transport, addresses) = match network.ethertype {
        packet::ETHERTYPE_IPV4 => {
            let transport = packet::ipv4_transport(head, network.at)?;
            (transport, head.get(network.at + 12..network.at + 20)?)
        }
        packet::ETHERTYPE_IPV6 => {
            let transport = packet::ipv6_transport(head, network.at)?;
            (transport, head.get(network.at + 8..network.at + 40)?)
        }
        _ => return None,
    };
    let Transport {
        protocol,
        at,
        fragment,
    } = transport;
    let has_ports = matches!(protocol, packet::PROTOCOL_TCP | packet::PROTOCOL_UDP);
    let ports =
        match (has_ports && fragment == Fragment::Whole).then(|| packet::array::<4>(head, at)) {
            Some(Some([a, b, c, d])) => {
                u64::from(u16::from_be_bytes([a, b])) + u64::from(u16::from_be_bytes([c, d]))
            }
            _ => 0,
        };
    Some(
        sum(addresses)
            .wrapping_add(ports << 32)
            .wrapping_add(u64::from(protocol)),
    )
}

fn sum(bytes: &[u8]) -> u64 {
    let words = bytes.chunks_exact(4);
    words
        .map(|word| u64::from(u32::from_be_bytes([word[0], word[1], word[2], word[3]])))
        .sum()
}
