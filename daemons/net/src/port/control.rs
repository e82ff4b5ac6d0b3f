//! The control queue (virtio 1.2 section 5.1.6.5).
//!
//! ```text
//!   readable: class u8 │ command u8 │ data        writable: ack u8
//! ```
//!
//! Commands are executed one after the other on the control thread, and acknowledged when every pair goes by them and a
//! successor would.

use std::rc::Rc;

use vhost_daemon::{Chain, Handler, Queue};
use virtio_bindings::virtio_net as net;

use super::core::Core;
use super::features::{guest_offload_bits, has};
use super::filter::{Filter, TABLE_MAX, Table, Vlans};
use super::shared::Used;
use crate::frame::MacAddress;

/// Longest command accepted, in bytes; two full tables of addresses are shorter.
const MAX_COMMAND: usize = 16 << 10;

/// A well-formed command.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Command {
    /// A command of class `VIRTIO_NET_CTRL_RX`, on or off.
    Mode(u8, bool),
    MacTable(Table, Table),
    MacAddress(MacAddress),
    Vlan(u16, bool),
    AnnounceAck,
    Pairs(u16),
    GuestOffloads(u64),
}

/// The entries of a table of addresses (`struct virtio_net_ctrl_mac`), and what follows it.
fn table(data: &[u8]) -> Option<(Table, &[u8])> {
    let (count, rest) = data.split_first_chunk()?;
    let count = u32::from_le_bytes(*count) as usize;
    let (entries, rest) = rest.split_at_checked(count.checked_mul(6)?)?;
    if count > TABLE_MAX {
        return Some((Table::Everything, rest));
    }
    let (addresses, _) = entries.as_chunks();
    let addresses = addresses.iter().map(|bytes| MacAddress(*bytes)).collect();
    Some((Table::new(addresses), rest))
}

impl Command {
    fn parse(bytes: &[u8]) -> Option<Command> {
        let (&[class, command], data) = bytes.split_first_chunk()?;
        let word = || <[u8; 2]>::try_from(data).ok().map(u16::from_le_bytes);
        match (u32::from(class), u32::from(command)) {
            (
                net::VIRTIO_NET_CTRL_RX,
                net::VIRTIO_NET_CTRL_RX_PROMISC..=net::VIRTIO_NET_CTRL_RX_NOBCAST,
            ) => match data {
                [value] => Some(Command::Mode(command, *value != 0)),
                _ => None,
            },
            (net::VIRTIO_NET_CTRL_MAC, net::VIRTIO_NET_CTRL_MAC_TABLE_SET) => {
                let (unicast, rest) = table(data)?;
                let (multicast, _) = table(rest)?;
                Some(Command::MacTable(unicast, multicast))
            }
            (net::VIRTIO_NET_CTRL_MAC, net::VIRTIO_NET_CTRL_MAC_ADDR_SET) => {
                let address = MacAddress(data.try_into().ok()?);
                (!address.is_multicast()).then_some(Command::MacAddress(address))
            }
            (net::VIRTIO_NET_CTRL_VLAN, net::VIRTIO_NET_CTRL_VLAN_ADD) => {
                word().map(|id| Command::Vlan(id, true))
            }
            (net::VIRTIO_NET_CTRL_VLAN, net::VIRTIO_NET_CTRL_VLAN_DEL) => {
                word().map(|id| Command::Vlan(id, false))
            }
            (net::VIRTIO_NET_CTRL_ANNOUNCE, net::VIRTIO_NET_CTRL_ANNOUNCE_ACK) => {
                Some(Command::AnnounceAck)
            }
            (net::VIRTIO_NET_CTRL_MQ, net::VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) => {
                word().map(Command::Pairs)
            }
            (net::VIRTIO_NET_CTRL_GUEST_OFFLOADS, net::VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET) => {
                let bits = u64::from_le_bytes(data.try_into().ok()?);
                Some(Command::GuestOffloads(bits))
            }
            _ => None,
        }
    }

    /// The feature without which there is no such command.
    fn feature(&self) -> u32 {
        match self {
            Command::Mode(mode, _) if u32::from(*mode) > net::VIRTIO_NET_CTRL_RX_ALLMULTI => {
                net::VIRTIO_NET_F_CTRL_RX_EXTRA
            }
            Command::Mode(..) | Command::MacTable(..) => net::VIRTIO_NET_F_CTRL_RX,
            Command::MacAddress(_) => net::VIRTIO_NET_F_CTRL_MAC_ADDR,
            Command::Vlan(..) => net::VIRTIO_NET_F_CTRL_VLAN,
            Command::AnnounceAck => net::VIRTIO_NET_F_GUEST_ANNOUNCE,
            Command::Pairs(_) => net::VIRTIO_NET_F_MQ,
            Command::GuestOffloads(_) => net::VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
        }
    }
}

impl Core {
    /// Executes a command; false when it makes no sense.
    async fn execute(&self, command: Command) -> bool {
        if !has(self.features(), command.feature()) {
            return false;
        }
        match command {
            Command::AnnounceAck => self.announcing.set(false),
            Command::Pairs(pairs) => {
                if pairs == 0 || pairs > self.pair_count() {
                    return false;
                }
                self.shared.set_used(Used::First(pairs));
                self.refresh_pairs().await;
            }
            Command::GuestOffloads(bits) => {
                if bits & !guest_offload_bits(self.features()) != 0 {
                    return false;
                }
                self.shared.set_guest_offloads(bits);
                self.refresh_pairs().await;
            }
            command => {
                let mut filter = self.shared.filter.get();
                if !change_filter(&mut filter, command) {
                    return false;
                }
                self.shared.filter.set(filter);
            }
        }
        self.tell_change();
        true
    }
}

fn change_filter(filter: &mut Filter, command: Command) -> bool {
    let modes = &mut filter.modes;
    match command {
        Command::Mode(mode, on) => {
            let mode = match u32::from(mode) {
                net::VIRTIO_NET_CTRL_RX_PROMISC => &mut modes.promiscuous,
                net::VIRTIO_NET_CTRL_RX_ALLMULTI => &mut modes.all_multicast,
                net::VIRTIO_NET_CTRL_RX_ALLUNI => &mut modes.all_unicast,
                net::VIRTIO_NET_CTRL_RX_NOMULTI => &mut modes.no_multicast,
                net::VIRTIO_NET_CTRL_RX_NOUNI => &mut modes.no_unicast,
                net::VIRTIO_NET_CTRL_RX_NOBCAST => &mut modes.no_broadcast,
                _ => return false,
            };
            *mode = on;
        }
        Command::MacTable(unicast, multicast) => {
            (filter.unicast, filter.multicast) = (unicast, multicast);
        }
        Command::MacAddress(address) => filter.mac = address,
        Command::Vlan(id, passes) => {
            if let Some(vlans) = &mut filter.vlans {
                return vlans.set(id, passes);
            }
            // Whatever a predecessor was told passes, too.
            return Vlans::none().set(id, passes);
        }
        _ => return false,
    }
    true
}

/// Serves the control queue.
pub(super) struct Control {
    core: Rc<Core>,
}

impl Control {
    pub(super) fn new(core: Rc<Core>) -> Control {
        Control { core }
    }
}

impl Handler for Control {
    fn handle(&self, queue: &Rc<Queue>, chain: &Chain) {
        let Some(ack) = chain.writable_tail(1) else {
            return queue.reject(
                chain.head(),
                "a control command without room for its answer",
            );
        };
        let mut bytes = vec![0; chain.readable_len().min(MAX_COMMAND)];
        chain.copy_readable(0, &mut bytes);
        let whole = bytes.len() == chain.readable_len();
        let command = Command::parse(&bytes).filter(|_| whole);
        let (core, queue, head) = (self.core.clone(), queue.clone(), chain.head());
        executor::spawn(async move {
            let _turn = core.commands.lock().await;
            let done = match command {
                Some(command) => core.execute(command).await,
                None => false,
            };
            let answer = if done {
                net::VIRTIO_NET_OK
            } else {
                net::VIRTIO_NET_ERR
            };
            core.keep();
            ack.write(&[answer as u8]);
            queue.complete(head, 1);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed(addresses: &[[u8; 6]]) -> Table {
        Table::new(addresses.iter().copied().map(MacAddress).collect())
    }

    #[test]
    fn tables_are_read_and_their_lengths_checked() {
        let mut bytes = vec![1, 0, 1, 0, 0, 0, 2, 2, 2, 2, 2, 2, 0, 0, 0, 0];
        let both = Command::MacTable(listed(&[[2; 6]]), listed(&[]));
        assert_eq!(Command::parse(&bytes), Some(both));
        for len in 0..bytes.len() {
            assert_eq!(Command::parse(&bytes[..len]), None, "{len}");
        }
        bytes[2..6].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(Command::parse(&bytes), None);
        let many = TABLE_MAX + 1;
        let mut bytes = vec![1, 0, many as u8, 0, 0, 0];
        bytes.extend(vec![2; 6 * many]);
        bytes.extend([0; 4]);
        let everything = Command::MacTable(Table::Everything, listed(&[]));
        assert_eq!(Command::parse(&bytes), Some(everything));
    }

    #[test]
    fn commands_of_another_shape_are_none() {
        let good: [(&[u8], Command); 5] = [
            (&[0, 1, 1], Command::Mode(1, true)),
            (&[2, 0, 7, 0], Command::Vlan(7, true)),
            (&[3, 0], Command::AnnounceAck),
            (&[4, 0, 2, 0], Command::Pairs(2)),
            (&[5, 0, 2, 0, 0, 0, 0, 0, 0, 0], Command::GuestOffloads(2)),
        ];
        for (bytes, command) in good {
            assert_eq!(Command::parse(bytes), Some(command));
        }
        let bad: [&[u8]; 7] = [
            &[],
            &[0],
            &[0, 6, 1],
            &[0, 0],
            &[1, 1, 1, 0, 0, 0, 0, 0],
            &[4, 0, 2],
            &[9, 0],
        ];
        for bytes in bad {
            assert_eq!(Command::parse(bytes), None, "{bytes:?}");
        }
    }
}
