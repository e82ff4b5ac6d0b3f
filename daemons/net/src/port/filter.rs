//! The guest's receive filter: which frames its driver wants (virtio 1.2 section 5.1.6.5.1 to 5.1.6.5.3).
//!
//! Changed by the control queue, read by every pair. Until the driver says otherwise everything passes, and so it does for a
//! successor that cannot know what the driver said to its predecessor ([`super::kept`]): to receive too much is harmless.

use crate::frame::MacAddress;

/// Entries of each address table; a driver that has more gets all frames of that kind.
pub(super) const TABLE_MAX: usize = 64;
/// Words of the VLAN table.
pub(super) const VLAN_WORDS: usize = 4096 / 64;
/// EtherType of a VLAN tag.
const TAGGED: [u8; 2] = [0x81, 0x00];
/// Bytes of a frame that decide: addresses and tag.
pub(super) const DECIDING: usize = 16;

/// What the driver switched on or off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Modes {
    /// Everything passes.
    pub(super) promiscuous: bool,
    /// Every multicast frame passes.
    pub(super) all_multicast: bool,
    /// Every unicast frame passes.
    pub(super) all_unicast: bool,
    /// No multicast frame passes.
    pub(super) no_multicast: bool,
    /// No unicast frame passes.
    pub(super) no_unicast: bool,
    /// No broadcast passes.
    pub(super) no_broadcast: bool,
}

impl Modes {
    /// The switches, one after the other from the lowest bit.
    pub(super) fn bits(self) -> u8 {
        let switches = [
            self.promiscuous,
            self.all_multicast,
            self.all_unicast,
            self.no_multicast,
            self.no_unicast,
            self.no_broadcast,
        ];
        let bits = (0..).zip(switches).map(|(at, on)| u8::from(on) << at);
        bits.sum()
    }

    /// What [`Modes::bits`] gave.
    pub(super) fn from_bits(bits: u8) -> Modes {
        let on = |at: u8| bits >> at & 1 != 0;
        Modes {
            promiscuous: on(0),
            all_multicast: on(1),
            all_unicast: on(2),
            no_multicast: on(3),
            no_unicast: on(4),
            no_broadcast: on(5),
        }
    }
}

/// A table of addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Table {
    /// Nothing passes but what is in it; sorted.
    Listed(Vec<MacAddress>),
    /// It was longer than [`TABLE_MAX`].
    #[default]
    Everything,
}

impl Table {
    /// Of `addresses`.
    pub(super) fn new(mut addresses: Vec<MacAddress>) -> Table {
        addresses.sort_unstable();
        Table::Listed(addresses)
    }

    fn has(&self, address: MacAddress) -> bool {
        match self {
            Table::Listed(addresses) => addresses.binary_search(&address).is_ok(),
            Table::Everything => true,
        }
    }
}

/// VLANs whose tagged frames pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Vlans([u64; VLAN_WORDS]);

impl Vlans {
    /// None of them.
    pub(super) fn none() -> Box<Vlans> {
        Box::new(Vlans([0; VLAN_WORDS]))
    }

    /// Those whose bits are set, 64 in a word.
    pub(super) fn from_words(words: [u64; VLAN_WORDS]) -> Box<Vlans> {
        Box::new(Vlans(words))
    }

    /// What [`Vlans::from_words`] takes.
    pub(super) fn words(&self) -> [u64; VLAN_WORDS] {
        self.0
    }

    /// Adds or removes VLAN `id`; false when there is no such VLAN.
    pub(super) fn set(&mut self, id: u16, passes: bool) -> bool {
        let Some(word) = self.0.get_mut(usize::from(id / 64)) else {
            return false;
        };
        let bit = 1 << (id % 64);
        *word = if passes { *word | bit } else { *word & !bit };
        true
    }

    fn has(&self, id: u16) -> bool {
        self.0[usize::from(id / 64) % VLAN_WORDS] & 1 << (id % 64) != 0
    }
}

/// A receive filter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Filter {
    /// Switches.
    pub(super) modes: Modes,
    /// The guest's own address.
    pub(super) mac: MacAddress,
    /// More addresses of its own.
    pub(super) unicast: Table,
    /// Its groups.
    pub(super) multicast: Table,
    /// Its VLANs; `None`: all.
    pub(super) vlans: Option<Box<Vlans>>,
}

impl Filter {
    /// Lets everything pass.
    pub(super) fn open(mac: MacAddress) -> Filter {
        Filter {
            modes: Modes {
                promiscuous: true,
                ..Modes::default()
            },
            mac,
            unicast: Table::new(Vec::new()),
            multicast: Table::new(Vec::new()),
            vlans: None,
        }
    }

    /// Whether everything passes, whatever it is.
    #[inline]
    pub(super) fn is_open(&self) -> bool {
        self.modes.promiscuous
    }

    /// Whether a frame that begins with `head` passes.
    pub(super) fn passes(&self, head: &[u8]) -> bool {
        if self.is_open() {
            return true;
        }
        let Some(Ok(destination)) = head.get(..6).map(<[u8; 6]>::try_from) else {
            return false;
        };
        self.vlan_passes(head) && self.address_passes(MacAddress(destination))
    }

    fn vlan_passes(&self, head: &[u8]) -> bool {
        match (&self.vlans, head.get(12..DECIDING)) {
            (Some(vlans), Some(tag)) if tag[..2] == TAGGED => {
                vlans.has(u16::from_be_bytes([tag[2], tag[3]]) & 0xfff)
            }
            _ => true,
        }
    }

    fn address_passes(&self, address: MacAddress) -> bool {
        let modes = &self.modes;
        if address == MacAddress::BROADCAST {
            !modes.no_broadcast
        } else if address.is_multicast() {
            !modes.no_multicast && (modes.all_multicast || self.multicast.has(address))
        } else {
            let own = address == self.mac || self.unicast.has(address);
            !modes.no_unicast && (modes.all_unicast || own)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(destination: MacAddress, vlan: Option<u16>) -> Vec<u8> {
        let mut bytes = destination.0.to_vec();
        bytes.extend([2; 6]);
        if let Some(vlan) = vlan {
            bytes.extend(TAGGED);
            bytes.extend((vlan | 0x6000).to_be_bytes());
        }
        bytes.extend([8, 0, 0x45, 0]);
        bytes
    }

    #[test]
    fn what_the_driver_lists_passes_and_nothing_else() {
        let address = |last| MacAddress([0x52, 0, 0, 0, 0, last]);
        let group = |last| MacAddress([0x33, 0x33, 0, 0, 0, last]);
        let mut filter = Filter::open(address(1));
        assert!(filter.passes(&frame(address(9), None)));
        filter.modes = Modes::default();
        filter.unicast = Table::new(vec![address(3), address(2)]);
        filter.multicast = Table::new(vec![group(1)]);
        let passes = |filter: &Filter, to| filter.passes(&frame(to, None));
        for own in [address(1), address(2), address(3), group(1)] {
            assert!(passes(&filter, own), "{own}");
        }
        assert!(passes(&filter, MacAddress::BROADCAST));
        for other in [address(4), group(2)] {
            assert!(!passes(&filter, other), "{other}");
        }
        filter.multicast = Table::Everything;
        assert!(passes(&filter, group(2)));
        filter.modes.no_multicast = true;
        filter.modes.no_broadcast = true;
        filter.modes.all_unicast = true;
        assert!(!passes(&filter, group(1)) && !passes(&filter, MacAddress::BROADCAST));
        assert!(passes(&filter, address(4)) && !filter.passes(&[0x52; 5]));
    }

    #[test]
    fn tagged_frames_need_their_vlan() {
        let mac = MacAddress([2; 6]);
        let mut vlans = Vlans::none();
        assert!(vlans.set(7, true) && vlans.set(4095, true) && !vlans.set(4096, true));
        let mut filter = Filter::open(mac);
        filter.vlans = Some(vlans.clone());
        filter.modes = Modes::default();
        for (vlan, passes) in [(None, true), (Some(7), true), (Some(8), false)] {
            assert_eq!(filter.passes(&frame(mac, vlan)), passes, "{vlan:?}");
        }
        vlans.set(7, false);
        filter.vlans = Some(vlans);
        assert!(!filter.passes(&frame(mac, Some(7))));
    }
}
