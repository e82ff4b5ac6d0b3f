//! Network back-ends as the control thread sees them.

use std::io;
use std::ops::RangeInclusive;
use std::rc::Rc;

use executor::Handle;
use serde::Serialize;

use crate::frame::MacAddress;
use crate::link::{NetQueue, Offloads};
use crate::netdevs::switch::Switch;

/// Makes a queue on the thread that it is to live on.
pub type QueueMaker = Box<dyn FnOnce() -> io::Result<Rc<dyn NetQueue>> + Send>;

/// What a back-end has to know of a port that attaches to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// The port's id.
    pub port: String,
    /// The guest's address.
    pub mac: MacAddress,
    /// Queue pairs of the port.
    pub queues: u16,
    /// How a switch treats it.
    pub vlan: VlanMode,
    /// Whether other isolated ports of a switch neither hear it nor are heard by it.
    pub isolated: bool,
}

/// Which VLANs a member of a switch is in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum VlanMode {
    /// All of them, and frames go in and out with the tags that they have.
    #[default]
    Transparent,
    /// Untagged at the port, this VLAN (1 to 4094) inside of the switch.
    Access(u16),
    /// Tagged with one of these; untagged frames belong to `native`, or are dropped when it is `None`.
    Trunk {
        /// Members, sorted; empty: all.
        vlans: Vec<u16>,
        /// VLAN of untagged frames.
        native: Option<u16>,
    },
}

/// What happened to a back-end, for the events of QMP. Repeating one tells nothing new.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// A peer is there.
    Connected(PeerAddress),
    /// The peer has gone.
    Disconnected,
}

/// Where a connection leads, in the words of QMP's `SocketAddress`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum PeerAddress {
    /// A unix socket.
    Unix {
        /// Of the one side that has a name; empty without one.
        path: String,
    },
    /// A TCP connection.
    Inet {
        /// The peer's address.
        host: String,
        /// Its port.
        port: String,
        /// Present and true for IPv4.
        #[serde(skip_serializing_if = "Option::is_none")]
        ipv4: Option<bool>,
        /// Present and true for IPv6.
        #[serde(skip_serializing_if = "Option::is_none")]
        ipv6: Option<bool>,
    },
}

/// VLANs that frames can be in: 0 and 4095 are not for that (IEEE 802.1Q table 9-2).
const VLANS: RangeInclusive<u16> = 1..=4094;

/// Why a member of a switch cannot be in these VLANs.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VlanError {
    /// No VLAN has this number.
    #[error("'{0}' is not a VLAN: a number from 1 to 4094")]
    NoVlan(String),
    /// Access port and trunk.
    #[error("a port has either 'vlan' or 'trunk'")]
    Both,
    /// A native VLAN without a trunk.
    #[error("'native' needs 'trunk'")]
    NativeAlone,
}

impl VlanMode {
    /// From options: `vlan=10` is an access port, `trunk=10:20:30-39` or `trunk=all` with perhaps `native=10` a trunk; without
    /// any of them a port is transparent.
    ///
    /// # Errors
    /// What is no VLAN, or no combination.
    pub fn from_options(
        vlan: Option<u16>,
        trunk: Option<&str>,
        native: Option<u16>,
    ) -> Result<VlanMode, VlanError> {
        let check = |vlan: u16| match VLANS.contains(&vlan) {
            true => Ok(vlan),
            false => Err(VlanError::NoVlan(vlan.to_string())),
        };
        match (vlan, trunk) {
            (Some(_), Some(_)) => Err(VlanError::Both),
            (_, None) if native.is_some() => Err(VlanError::NativeAlone),
            (Some(vlan), None) => Ok(VlanMode::Access(check(vlan)?)),
            (None, None) => Ok(VlanMode::Transparent),
            (None, Some(text)) => Ok(VlanMode::Trunk {
                vlans: parse_vlans(text)?,
                native: native.map(check).transpose()?,
            }),
        }
    }
}

/// A list of VLANs and ranges of them with colons between, sorted; empty for `all`.
fn parse_vlans(text: &str) -> Result<Vec<u16>, VlanError> {
    if text == "all" {
        return Ok(Vec::new());
    }
    let mut vlans = Vec::new();
    for part in text.split(':') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let number = |text: &str| text.parse().ok().filter(|vlan| VLANS.contains(vlan));
        match (number(first), number(last)) {
            (Some(first), Some(last)) if first <= last => vlans.extend(first..=last),
            _ => return Err(VlanError::NoVlan(part.to_owned())),
        }
        // Ranges can name each VLAN many times.
        vlans.sort_unstable();
        vlans.dedup();
    }
    Ok(vlans)
}

/// A network back-end. Lives on the control thread.
pub trait Netdev {
    /// `type=` on the command line.
    fn kind(&self) -> &'static str;

    /// Most queue pairs that a port can have; `None`: any number.
    fn max_queues(&self) -> Option<u16>;

    /// What the network can do by itself with frames from a guest (the `HOST_*` features).
    fn host_offloads(&self) -> Offloads;

    /// What it may leave for the guest to do (the `GUEST_*` features).
    fn guest_offloads(&self) -> Offloads;

    /// The thread on which all queues have to be; `None`: any, each its own.
    fn thread(&self) -> Option<Handle> {
        None
    }

    /// Opens queue pair `index` of a port. The queue detaches when it is dropped.
    ///
    /// # Errors
    /// Names what could not be opened.
    fn attach(&self, port: &Attachment, index: u16) -> io::Result<QueueMaker>;

    /// What it can tell of itself in `query-netdevs`, beyond what every back-end has.
    fn details(&self) -> serde_json::Map<String, serde_json::Value> {
        serde_json::Map::new()
    }

    /// The switch, if it is one.
    fn switch(&self) -> Option<&Switch> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vlan_options_say_how_a_port_is_a_member() {
        let mode = VlanMode::from_options;
        assert_eq!(mode(None, None, None), Ok(VlanMode::Transparent));
        assert_eq!(mode(Some(10), None, None), Ok(VlanMode::Access(10)));
        let trunk = |vlans: &[u16], native| {
            let vlans = vlans.to_vec();
            Ok(VlanMode::Trunk { vlans, native })
        };
        assert_eq!(
            mode(None, Some("20:10:30-32:31"), Some(1)),
            trunk(&[10, 20, 30, 31, 32], Some(1))
        );
        assert_eq!(mode(None, Some("all"), None), trunk(&[], None));
        assert_eq!(mode(Some(1), Some("all"), None), Err(VlanError::Both));
        assert_eq!(mode(Some(1), None, Some(2)), Err(VlanError::NativeAlone));
        for wrong in [
            mode(Some(0), None, None),
            mode(Some(4095), None, None),
            mode(None, Some("1"), Some(0)),
        ] {
            assert!(matches!(wrong, Err(VlanError::NoVlan(_))), "{wrong:?}");
        }
        for wrong in ["", "0", "4095", "5-4", "1:", "-3", "a"] {
            assert!(mode(None, Some(wrong), None).is_err(), "{wrong}");
        }
    }
}
