//! What servers send, and what a host may send that has no address yet.

use crate::packet::{self, Fragment, Transport};

use super::address::{NEIGHBOUR_SOLICITATION, ROUTER_SOLICITATION};

/// The UDP ports of a service.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ports {
    pub(super) client: u16,
    pub(super) server: u16,
}

/// DHCP (RFC 2131 section 4.1).
pub(super) const DHCP: Ports = Ports {
    client: 68,
    server: 67,
};
/// DHCPv6 (RFC 8415 section 7.2).
pub(super) const DHCPV6: Ports = Ports {
    client: 546,
    server: 547,
};

/// ICMPv6 types of multicast listeners (RFC 2710, RFC 3810).
const LISTENER_REPORT: u8 = 131;
const LISTENER_DONE: u8 = 132;
const LISTENER_REPORT_2: u8 = 143;

/// Whether an IPv4 packet is what a DHCP client without an address sends.
pub(super) fn is_dhcp_request(packet: &[u8], transport: Transport) -> bool {
    transport.protocol == packet::PROTOCOL_UDP
        && transport.fragment == Fragment::Whole
        && packet::word(packet, transport.at) == Some(DHCP.client)
        && packet::word(packet, transport.at + 2) == Some(DHCP.server)
}

/// Whether an IPv6 packet is what a host without an address sends: multicast listener reports (RFC 3590), a router solicitation,
/// or the search for another user of its address.
pub(super) fn is_from_unconfigured(packet: &[u8], transport: Transport) -> bool {
    transport.protocol == packet::PROTOCOL_ICMPV6
        && matches!(
            packet.get(transport.at),
            Some(
                &(LISTENER_REPORT
                    | LISTENER_DONE
                    | LISTENER_REPORT_2
                    | ROUTER_SOLICITATION
                    | NEIGHBOUR_SOLICITATION)
            )
        )
}
