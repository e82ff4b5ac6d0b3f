//! What a guest may claim to be: source addresses, and what it may answer to others as.
//!
//! ```text
//!   frame from the guest ── source MAC ── tags ──┬─ ARP, RARP ── sender's MAC and IPv4 address
//!                           (two at most)        ├─ IPv4 ── source ── UDP: no DHCP server
//!                                                ├─ IPv6 ── source ── extension headers ──┬─ UDP: no DHCPv6 server
//!                                                │                                        └─ ICMPv6: ND addresses, no router
//!                                                └─ anything else: not where IP addresses are checked
//! ```
//!
//! Decides on [`Frame::head`] alone, which the guest cannot change any more. What the head does not show is dropped, not
//! believed: more than two tags, headers that run out of the packet or of the head, a first fragment without its transport
//! header (RFC 7112), neighbour discovery in fragments (RFC 6980). Later fragments carry nothing that could be checked but their
//! source; they are worth nothing without a first one.
//!
//! A [`Guard`] does not change. To change a port's rules it gets another one.

mod address;
mod prefix;
mod server;
#[cfg(test)]
mod tests;

use std::net::{Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

use crate::frame::{Frame, MacAddress};
use crate::link::DropReason;
use crate::packet::{self, Fragment, Transport};

pub use prefix::{Ipv4Prefix, Ipv6Prefix, PrefixError};

/// Most entries of each list: they are searched for every frame.
pub const MAX_ENTRIES: usize = 256;

/// The rules of a port. By default only servers are kept from it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct GuardOptions {
    /// Addresses that frames may come from, and that ARP and neighbour discovery may tell; `None`: any of one station.
    pub mac: Option<Vec<MacAddress>>,
    /// IPv4 networks that packets and ARP senders may come from; `None`: any. DHCP may always ask from 0.0.0.0, and ARP probe.
    pub ipv4: Option<Vec<Ipv4Prefix>>,
    /// IPv6 networks that packets may come from and neighbour discovery may answer for; `None`: any. The link-local address
    /// that follows from a MAC address is always allowed (fe80::/64 in the list: all of them), and what an unconfigured host
    /// has to send from `::`.
    pub ipv6: Option<Vec<Ipv6Prefix>>,
    /// Whether it may answer as a DHCP or DHCPv6 server or relay.
    pub dhcp_server: bool,
    /// Whether it may send router advertisements and redirects.
    pub router: bool,
    /// Whether protocols other than IP and ARP may pass where IP addresses are checked.
    pub other_protocols: bool,
}

/// Why rules cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GuardError {
    /// A list is longer than [`MAX_ENTRIES`].
    #[error("{0} has {1} entries; at most {MAX_ENTRIES} are allowed")]
    TooMany(&'static str, usize),
    /// No station has this address.
    #[error("mac has {0}, which is not the address of one station")]
    NoStation(MacAddress),
}

/// Checks the frames of one guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guard {
    options: GuardOptions,
    /// Link-local addresses that follow from the allowed MAC addresses.
    link_local: Vec<Ipv6Addr>,
}

impl Guard {
    /// A guard with these rules.
    ///
    /// # Errors
    /// Names a list that is too long, or an address that no frame may come from.
    pub fn new(options: GuardOptions) -> Result<Guard, GuardError> {
        let macs = options.mac.as_deref().unwrap_or_default();
        let lengths = [
            ("mac", macs.len()),
            ("ipv4", options.ipv4.as_ref().map_or(0, Vec::len)),
            ("ipv6", options.ipv6.as_ref().map_or(0, Vec::len)),
        ];
        for (name, len) in lengths {
            if len > MAX_ENTRIES {
                return Err(GuardError::TooMany(name, len));
            }
        }
        let no_station = |mac: &&MacAddress| mac.is_multicast() || **mac == MacAddress::default();
        if let Some(mac) = macs.iter().find(no_station) {
            return Err(GuardError::NoStation(*mac));
        }
        let link_local = macs.iter().map(|mac| address::link_local(*mac)).collect();
        Ok(Guard {
            options,
            link_local,
        })
    }

    /// Its rules.
    pub fn options(&self) -> &GuardOptions {
        &self.options
    }

    /// Whether the guest may send `frame`.
    ///
    /// # Errors
    /// Why not.
    pub fn check(&self, frame: &Frame<'_>) -> Result<(), DropReason> {
        let head = frame.head();
        if head.len() < packet::ETHERNET_LEN {
            return Err(DropReason::TooShort);
        }
        let source = frame.source();
        if source.is_multicast() || !self.allows_mac(source) {
            return Err(DropReason::SpoofedMac);
        }
        if !self.looks_inside() {
            return Ok(());
        }
        let network = packet::network(head).ok_or_else(|| self.unclear())?;
        match network.ethertype {
            packet::ETHERTYPE_IPV4 => self.check_ipv4(head, network.at),
            packet::ETHERTYPE_IPV6 => self.check_ipv6(head, network.at, source),
            packet::ETHERTYPE_ARP | packet::ETHERTYPE_RARP => self.check_arp(head, network.at),
            // LLC can carry IP and ARP too, and some hosts take that.
            ..0x600 => Err(self.unclear()),
            _ if self.checks_ip() && !self.options.other_protocols => Err(DropReason::SpoofedIp),
            _ => Ok(()),
        }
    }

    fn looks_inside(&self) -> bool {
        let GuardOptions {
            dhcp_server,
            router,
            ..
        } = self.options;
        self.options.mac.is_some() || self.checks_ip() || !dhcp_server || !router
    }

    fn checks_ip(&self) -> bool {
        self.options.ipv4.is_some() || self.options.ipv6.is_some()
    }

    /// What a frame is dropped for that does not show what has to be seen.
    fn unclear(&self) -> DropReason {
        match (self.checks_ip(), &self.options.mac) {
            (false, Some(_)) => DropReason::SpoofedMac,
            (false, None) => DropReason::RogueServer,
            (true, _) => DropReason::SpoofedIp,
        }
    }

    fn check_ipv4(&self, head: &[u8], at: usize) -> Result<(), DropReason> {
        let unclear = || self.unclear();
        // What lies behind the packet's end is padding, and no one's header.
        let total = packet::word(head, at + 2).ok_or_else(unclear)?;
        let packet = &head[..head.len().min(at + usize::from(total))];
        let transport = packet::ipv4_transport(packet, at).ok_or_else(unclear)?;
        let addresses: [u8; 8] = packet::array(packet, at + 12).ok_or_else(unclear)?;
        let [a, b, c, d, destination @ ..] = addresses;
        let source = Ipv4Addr::new(a, b, c, d);
        if !self.allows_ipv4(source) {
            let asks = source.is_unspecified() && destination == [0xff; 4];
            if !asks || !server::is_dhcp_request(packet, transport) {
                return Err(DropReason::SpoofedIp);
            }
        }
        if transport.protocol == packet::PROTOCOL_UDP {
            self.check_udp(packet, transport, server::DHCP)?;
        }
        Ok(())
    }

    fn check_ipv6(&self, head: &[u8], at: usize, mac: MacAddress) -> Result<(), DropReason> {
        let unclear = || self.unclear();
        let len = packet::word(head, at + 4).ok_or_else(unclear)?;
        let end = at + 40 + usize::from(len);
        let packet = &head[..head.len().min(end)];
        let transport = packet::ipv6_transport(packet, at).ok_or_else(unclear)?;
        let source = packet::array::<16>(packet, at + 8).ok_or_else(unclear)?;
        let source = Ipv6Addr::from(source);
        let is_unconfigured = source.is_unspecified();
        if !is_unconfigured && !self.allows_ipv6(source, mac) {
            return Err(DropReason::SpoofedIp);
        }
        if is_unconfigured && self.options.ipv6.is_some() {
            let whole = transport.fragment == Fragment::Whole;
            if !whole || !server::is_from_unconfigured(packet, transport) {
                return Err(DropReason::SpoofedIp);
            }
        }
        match transport.protocol {
            packet::PROTOCOL_UDP => self.check_udp(packet, transport, server::DHCPV6),
            packet::PROTOCOL_ICMPV6 if transport.fragment != Fragment::Later => {
                // An option out of sight could say anything.
                if end > head.len() && address::is_discovery(packet, transport) {
                    return Err(self.unclear());
                }
                self.check_discovery(packet, transport, source, mac)
            }
            _ => Ok(()),
        }
    }

    /// Keeps a guest from answering as a server of `ports`.
    fn check_udp(
        &self,
        packet: &[u8],
        transport: Transport,
        ports: server::Ports,
    ) -> Result<(), DropReason> {
        if self.options.dhcp_server || transport.fragment == Fragment::Later {
            return Ok(());
        }
        let header: [u8; 8] = packet::array(packet, transport.at).ok_or_else(|| self.unclear())?;
        let source = u16::from_be_bytes([header[0], header[1]]);
        let destination = u16::from_be_bytes([header[2], header[3]]);
        // A client looks at the port that it listens on, and not at where it comes from.
        if source == ports.server || destination == ports.client {
            return Err(DropReason::RogueServer);
        }
        Ok(())
    }
}
