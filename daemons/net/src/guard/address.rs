//! Which addresses are the guest's, and what ARP and neighbour discovery tell of them.

use std::net::{Ipv4Addr, Ipv6Addr};

use crate::frame::MacAddress;
use crate::link::DropReason;
use crate::packet::{self, Fragment, Transport};

use super::Guard;

/// Bytes of an ARP message for Ethernet and IPv4 (RFC 826).
const ARP_LEN: usize = 28;
/// Hardware type Ethernet, protocol IPv4, and the lengths of their addresses.
const ARP_ETHERNET_IPV4: [u8; 6] = [0, 1, 8, 0, 6, 4];

/// ICMPv6 types (RFC 4861).
pub(super) const ROUTER_SOLICITATION: u8 = 133;
const ROUTER_ADVERTISEMENT: u8 = 134;
/// Asks for a neighbour's MAC address, or whether an address is free.
pub(super) const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const REDIRECT: u8 = 137;

const OPTION_SOURCE_ADDRESS: u8 = 1;
const OPTION_TARGET_ADDRESS: u8 = 2;

/// The link-local address that follows from a MAC address (RFC 4291, appendix A).
pub(super) fn link_local(MacAddress(mac): MacAddress) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac;
    Ipv6Addr::from([
        0xfe,
        0x80,
        0,
        0,
        0,
        0,
        0,
        0,
        a ^ 2,
        b,
        c,
        0xff,
        0xfe,
        d,
        e,
        f,
    ])
}

/// Whether an ICMPv6 message is one of neighbour discovery.
pub(super) fn is_discovery(packet: &[u8], transport: Transport) -> bool {
    matches!(
        packet.get(transport.at),
        Some(ROUTER_SOLICITATION..=REDIRECT)
    )
}

impl Guard {
    #[inline]
    pub(super) fn allows_mac(&self, mac: MacAddress) -> bool {
        match &self.options.mac {
            Some(macs) => macs.contains(&mac),
            None => true,
        }
    }

    #[inline]
    pub(super) fn allows_ipv4(&self, address: Ipv4Addr) -> bool {
        match &self.options.ipv4 {
            Some(networks) => networks.iter().any(|network| network.contains(address)),
            None => true,
        }
    }

    /// `mac` is the frame's source, which counts where any may be one.
    #[inline]
    pub(super) fn allows_ipv6(&self, address: Ipv6Addr, mac: MacAddress) -> bool {
        let Some(networks) = &self.options.ipv6 else {
            return true;
        };
        networks.iter().any(|network| network.contains(address))
            || match self.options.mac {
                Some(_) => self.link_local.contains(&address),
                None => address == link_local(mac),
            }
    }

    /// Checks the sender that an ARP or RARP message tells.
    pub(super) fn check_arp(&self, head: &[u8], at: usize) -> Result<(), DropReason> {
        if self.options.mac.is_none() && self.options.ipv4.is_none() {
            return Ok(());
        }
        let unclear = self.unclear();
        let message: [u8; ARP_LEN] = packet::array(head, at).ok_or(unclear)?;
        if message[..6] != ARP_ETHERNET_IPV4 {
            return Err(unclear);
        }
        let [a, b, c, d, e, f] = [8, 9, 10, 11, 12, 13].map(|i| message[i]);
        if !self.allows_mac(MacAddress([a, b, c, d, e, f])) {
            return Err(DropReason::SpoofedMac);
        }
        let sender = Ipv4Addr::new(message[14], message[15], message[16], message[17]);
        // A probe asks whether an address is free and tells none (RFC 5227 section 1.1); so does RARP.
        if !sender.is_unspecified() && !self.allows_ipv4(sender) {
            return Err(DropReason::SpoofedIp);
        }
        Ok(())
    }

    /// Checks the ICMPv6 message at `transport`, if it is one of neighbour discovery.
    pub(super) fn check_discovery(
        &self,
        packet: &[u8],
        transport: Transport,
        source: Ipv6Addr,
        mac: MacAddress,
    ) -> Result<(), DropReason> {
        let message = packet.get(transport.at..).unwrap_or_default();
        let kind = *message.first().ok_or_else(|| self.unclear())?;
        if !is_discovery(packet, transport) {
            return Ok(());
        }
        if matches!(kind, ROUTER_ADVERTISEMENT | REDIRECT) && !self.options.router {
            return Err(DropReason::RogueServer);
        }
        if transport.fragment != Fragment::Whole {
            return Err(self.unclear());
        }
        let tells_target = kind == NEIGHBOUR_ADVERTISEMENT
            || (kind == NEIGHBOUR_SOLICITATION && source.is_unspecified());
        if tells_target && self.options.ipv6.is_some() {
            let target: [u8; 16] = packet::array(message, 8).ok_or_else(|| self.unclear())?;
            if !self.allows_ipv6(target.into(), mac) {
                return Err(DropReason::SpoofedIp);
            }
        }
        let options_at = match kind {
            ROUTER_SOLICITATION => 8,
            ROUTER_ADVERTISEMENT => 16,
            REDIRECT => 40,
            _ => 24,
        };
        if self.options.mac.is_none() {
            return Ok(());
        }
        let options = message.get(options_at..).ok_or_else(|| self.unclear())?;
        self.check_options(kind, options)
    }

    /// Checks the MAC addresses that a neighbour discovery message tells.
    fn check_options(&self, kind: u8, mut options: &[u8]) -> Result<(), DropReason> {
        while !options.is_empty() {
            let (option, rest) = match options {
                [_, units, ..] if *units > 0 => options
                    .split_at_checked(usize::from(*units) * 8)
                    .ok_or_else(|| self.unclear())?,
                _ => return Err(self.unclear()),
            };
            let tells = match option[0] {
                OPTION_SOURCE_ADDRESS => true,
                // A redirect tells another router's.
                OPTION_TARGET_ADDRESS => kind != REDIRECT,
                _ => false,
            };
            let address = packet::array(option, 2).map(MacAddress);
            let allowed = option.len() == 8 && address.is_some_and(|mac| self.allows_mac(mac));
            if tells && !allowed {
                return Err(DropReason::SpoofedMac);
            }
            options = rest;
        }
        Ok(())
    }
}
