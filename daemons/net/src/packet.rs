//! Where the layers of a frame lie: Ethernet with tags, IPv4, IPv6 with extension headers.
//!
//! ```text
//!   destination, source │ tag, tag │ ethertype │ IPv4 or IPv6 │ extension headers │ TCP, UDP, ICMP
//!                                              └ network                           └ transport
//! ```
//!
//! Everything here reads private bytes, takes any bytes for possible, and says when they end before what is looked for does.

/// Bytes of an Ethernet header without tags.
pub(crate) const ETHERNET_LEN: usize = 14;
/// Where the ethertype, or the first tag, is.
pub(crate) const ETHERTYPE_AT: usize = 12;
/// Bytes of a VLAN tag.
pub(crate) const TAG_LEN: usize = 4;

/// IPv4 (IEEE 802 numbers, as all of these).
pub(crate) const ETHERTYPE_IPV4: u16 = 0x0800;
/// ARP (RFC 826).
pub(crate) const ETHERTYPE_ARP: u16 = 0x0806;
/// Reverse ARP (RFC 903).
pub(crate) const ETHERTYPE_RARP: u16 = 0x8035;
/// IPv6.
pub(crate) const ETHERTYPE_IPV6: u16 = 0x86dd;
/// A customer's VLAN tag (IEEE 802.1Q).
pub(crate) const ETHERTYPE_VLAN: u16 = 0x8100;
/// A provider's VLAN tag (IEEE 802.1ad).
pub(crate) const ETHERTYPE_PROVIDER_VLAN: u16 = 0x88a8;
/// What carried a second tag before there was a standard for it.
pub(crate) const ETHERTYPE_OLD_PROVIDER_VLAN: u16 = 0x9100;

/// IP protocol numbers (IANA).
pub(crate) const PROTOCOL_TCP: u8 = 6;
/// UDP.
pub(crate) const PROTOCOL_UDP: u8 = 17;
/// ICMP for IPv6.
pub(crate) const PROTOCOL_ICMPV6: u8 = 58;

const PROTOCOL_HOP_BY_HOP: u8 = 0;
const PROTOCOL_ROUTING: u8 = 43;
const PROTOCOL_FRAGMENT: u8 = 44;
const PROTOCOL_AUTHENTICATION: u8 = 51;
const PROTOCOL_DESTINATION_OPTIONS: u8 = 60;

/// Tags that are looked behind.
const MAX_TAGS: usize = 2;
/// Extension headers that are looked behind (RFC 8200 recommends at most five).
const MAX_EXTENSIONS: usize = 8;

/// Whether `ethertype` says that a tag follows.
#[inline]
pub(crate) fn is_tag(ethertype: u16) -> bool {
    matches!(
        ethertype,
        ETHERTYPE_VLAN | ETHERTYPE_PROVIDER_VLAN | ETHERTYPE_OLD_PROVIDER_VLAN
    )
}

/// The big-endian 16 bits at `at`, when there are so many.
#[inline]
pub(crate) fn word(bytes: &[u8], at: usize) -> Option<u16> {
    let pair = bytes.get(at..at.checked_add(2)?)?;
    Some(u16::from_be_bytes([pair[0], pair[1]]))
}

/// `N` bytes at `at`, when there are so many.
#[inline]
pub(crate) fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

/// What an Ethernet frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Network {
    /// Its ethertype, behind the tags. Below 0x600: a length, and LLC follows.
    pub(crate) ethertype: u16,
    /// Where it begins.
    pub(crate) at: usize,
}

/// Looks behind up to two tags. `None`: the frame ends before, or has more of them.
#[inline]
pub(crate) fn network(bytes: &[u8]) -> Option<Network> {
    let mut at = ETHERTYPE_AT;
    for _ in 0..=MAX_TAGS {
        let ethertype = word(bytes, at)?;
        if !is_tag(ethertype) {
            return Some(Network {
                ethertype,
                at: at + 2,
            });
        }
        at += TAG_LEN;
    }
    None
}

/// What is known of a packet's place in a fragmented one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fragment {
    /// It is whole.
    Whole,
    /// It begins one.
    First,
    /// It does not: it has no transport header.
    Later,
}

/// What an IP packet carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Transport {
    /// Its IP protocol number.
    pub(crate) protocol: u8,
    /// Where it begins.
    pub(crate) at: usize,
    /// Whether all of it is there.
    pub(crate) fragment: Fragment,
}

/// What the IPv4 packet at `at` carries. `None`: no IPv4 header, or the bytes end before it does.
#[inline]
pub(crate) fn ipv4_transport(bytes: &[u8], at: usize) -> Option<Transport> {
    let header: [u8; 20] = array(bytes, at)?;
    let header_len = usize::from(header[0] & 0xf) * 4;
    if header[0] >> 4 != 4 || header_len < header.len() || bytes.len() < at + header_len {
        return None;
    }
    let offset = u16::from_be_bytes([header[6], header[7]]);
    let fragment = match (offset & 0x1fff, offset & 0x2000) {
        (0, 0) => Fragment::Whole,
        (0, _) => Fragment::First,
        _ => Fragment::Later,
    };
    Some(Transport {
        protocol: header[9],
        at: at + header_len,
        fragment,
    })
}

/// What the IPv6 packet at `at` carries behind its extension headers. `None`: no IPv6 header, the bytes end before the chain
/// does, or it is longer than anyone's.
#[inline]
pub(crate) fn ipv6_transport(bytes: &[u8], at: usize) -> Option<Transport> {
    let header: [u8; 40] = array(bytes, at)?;
    if header[0] >> 4 != 6 {
        return None;
    }
    let mut transport = Transport {
        protocol: header[6],
        at: at + header.len(),
        fragment: Fragment::Whole,
    };
    for _ in 0..=MAX_EXTENSIONS {
        let length_unit = match transport.protocol {
            PROTOCOL_HOP_BY_HOP | PROTOCOL_ROUTING | PROTOCOL_DESTINATION_OPTIONS => 8,
            PROTOCOL_AUTHENTICATION => 4,
            PROTOCOL_FRAGMENT => {
                let fragment: [u8; 8] = array(bytes, transport.at)?;
                let offset = u16::from_be_bytes([fragment[2], fragment[3]]);
                // A fragment of a fragment is nothing that a host makes.
                if transport.fragment != Fragment::Whole {
                    return None;
                }
                transport.protocol = fragment[0];
                transport.at += fragment.len();
                match (offset >> 3, offset & 1) {
                    (0, 0) => {}
                    (0, _) => transport.fragment = Fragment::First,
                    _ => {
                        transport.fragment = Fragment::Later;
                        return Some(transport);
                    }
                }
                continue;
            }
            _ => return Some(transport),
        };
        let extension: [u8; 2] = array(bytes, transport.at)?;
        let length = usize::from(extension[1]);
        transport.protocol = extension[0];
        transport.at += match length_unit {
            4 => (length + 2) * 4,
            unit => (length + 1) * unit,
        };
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ethernet(ethertypes: &[u16]) -> Vec<u8> {
        let mut bytes = vec![0; ETHERTYPE_AT];
        for (i, ethertype) in ethertypes.iter().enumerate() {
            if i > 0 {
                bytes.extend([0, 7]);
            }
            bytes.extend(ethertype.to_be_bytes());
        }
        bytes
    }

    #[test]
    fn tags_are_looked_behind_but_not_for_ever() {
        let at = |ethertypes: &[u16]| network(&ethernet(ethertypes)).map(|n| (n.ethertype, n.at));
        assert_eq!(at(&[0x0800]), Some((0x0800, 14)));
        assert_eq!(at(&[0x8100, 0x0800]), Some((0x0800, 18)));
        assert_eq!(at(&[0x88a8, 0x8100, 0x86dd]), Some((0x86dd, 22)));
        assert_eq!(at(&[0x9100, 0x8100, 0x8100, 0x0800]), None);
        assert_eq!(at(&[0x8100]), None);
        assert_eq!(network(&[0; 13]), None);
    }

    #[test]
    fn extension_headers_are_looked_behind_and_loops_end() {
        let packet = |first: u8, rest: &[u8]| {
            let mut bytes = vec![0; 40];
            bytes[0] = 0x60;
            bytes[6] = first;
            bytes.extend_from_slice(rest);
            bytes
        };
        let walk = |first, rest: &[u8]| {
            ipv6_transport(&packet(first, rest), 0).map(|t| (t.protocol, t.at, t.fragment))
        };
        assert_eq!(walk(17, &[]), Some((17, 40, Fragment::Whole)));
        // Hop-by-hop of 16 bytes, then authentication of 12, then UDP.
        let mut chain = vec![51, 1];
        chain.extend([0; 14]);
        chain.extend([17, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(walk(0, &chain), Some((17, 68, Fragment::Whole)));
        let fragment = |offset: u8| [58, 0, 0, offset, 0, 0, 0, 0];
        assert_eq!(walk(44, &fragment(0)), Some((58, 48, Fragment::Whole)));
        assert_eq!(walk(44, &fragment(1)), Some((58, 48, Fragment::First)));
        assert_eq!(walk(44, &fragment(8)), Some((58, 48, Fragment::Later)));
        assert_eq!(
            walk(44, &[44, 0, 0, 1, 0, 0, 0, 0, 58, 0, 0, 0, 0, 0, 0, 0]),
            None
        );
        assert_eq!(walk(44, &fragment(0)[..7]), None);
        assert_eq!(walk(60, &[60; 200]), None);
        let endless: Vec<u8> = [60, 0, 0, 0, 0, 0, 0, 0].repeat(20);
        assert_eq!(walk(60, &endless), None);
    }
}
