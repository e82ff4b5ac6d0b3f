//! Guests on a switch, from rings to rings.

use std::cell::RefCell;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

use executor::{Config, Executor, Handle};
use vhost_daemon::Address;

use super::guest::{Guest, Layout};
use crate::frame::{MacAddress, VnetHeader};
use crate::guard::{Guard, GuardOptions};
use crate::link::DropReason;
use crate::netdev::{Netdev, VlanMode};
use crate::netdevs::Context;
use crate::netdevs::switch::{Switch, SwitchOptions};
use crate::offload::{GSO_TCPV4, NEEDS_CSUM};
use crate::port::{Port, PortHooks, PortOptions};

const CSUM: u64 = 1 << 0;
const GUEST_CSUM: u64 = 1 << 1;
const GUEST_TSO4: u64 = 1 << 7;
const HOST_TSO4: u64 = 1 << 11;

thread_local! {
    static PORTS: RefCell<Vec<Port>> = const { RefCell::new(Vec::new()) };
}

/// A switch and its ports on a thread.
struct Network {
    dir: tempfile::TempDir,
    hooks: Vec<PortHooks>,
    handle: Handle,
    thread: Option<JoinHandle<()>>,
}

fn mac(port: usize) -> MacAddress {
    MacAddress([0x52, 0x54, 0, 0, 0, port as u8])
}

impl Network {
    fn start(modes: &[VlanMode]) -> Network {
        let dir = tempfile::tempdir().unwrap();
        let hooks: Vec<PortHooks> = modes.iter().map(|_| PortHooks::new(1)).collect();
        let parts: Vec<_> = modes
            .iter()
            .enumerate()
            .map(|(number, vlan)| {
                let options = PortOptions {
                    vlan: vlan.clone(),
                    ..PortOptions::new(&format!("p{number}"), mac(number))
                };
                (options, hooks[number].clone(), socket(&dir, number))
            })
            .collect();
        let (sender, started) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let executor = Executor::new(&Config::default()).unwrap();
            executor.block_on(async {
                let switch: Rc<dyn Netdev> = Rc::new(switch());
                for (options, hooks, path) in parts {
                    let address = Address::Listen(path);
                    let port = Port::start(options, Rc::clone(&switch), address, vec![], hooks);
                    let port = port.await.unwrap();
                    PORTS.with_borrow_mut(|ports| ports.push(port));
                }
            });
            sender.send(executor.handle()).unwrap();
            executor.run();
            drop(executor);
            PORTS.take();
        });
        Network {
            dir,
            hooks,
            handle: started.recv().unwrap(),
            thread: Some(thread),
        }
    }

    fn guest(&self, number: usize, layout: Layout, features: u64) -> Guest {
        Guest::start_at(&socket(&self.dir, number), layout, features, 2)
    }

    /// Frames of this port's guest that were dropped for `reason`.
    fn dropped(&self, number: usize, reason: DropReason) -> u64 {
        let (_, sent) = self.hooks[number].counters.total();
        sent.dropped(reason)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.handle.stop();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            assert!(std::thread::panicking(), "the switch's thread panicked");
        }
    }
}

fn socket(dir: &tempfile::TempDir, number: usize) -> PathBuf {
    dir.path().join(format!("port{number}"))
}

fn switch() -> Switch {
    let context = Context {
        id: "s0",
        descriptor: &|name| anyhow::bail!("no descriptor '{name}'"),
        thread: &|_| Ok(Handle::current()),
        netdev: &|id| anyhow::bail!("no netdev '{id}'"),
        notice: Rc::new(|_| ()),
    };
    Switch::open(&SwitchOptions::default(), &context).unwrap()
}

fn frame((from, to): (MacAddress, MacAddress), number: u8, len: usize) -> Vec<u8> {
    let mut bytes = [to.0, from.0].concat();
    bytes.extend([0x88, 0xb5, number]);
    bytes.extend((bytes.len()..len).map(|at| (at as u8).wrapping_mul(number | 1)));
    bytes
}

/// Sends a frame and waits until the device has it.
fn send(guest: &mut Guest, header: VnetHeader, bytes: &[u8]) {
    guest.rings[1].send(0, header, bytes);
    assert_eq!(guest.rings[1].complete(), (0, 0));
}

#[test]
fn frames_cross_between_guests_of_any_layout_whole_and_in_order() {
    let network = Network::start(&[VlanMode::Transparent, VlanMode::Transparent]);
    let mut a = network.guest(0, Layout::Split, 0);
    let mut b = network.guest(1, Layout::Packed, 0);
    for round in 0..60_u8 {
        let len = 60 + usize::from(round) * 24;
        let id = u16::from(round % 8);
        for (source, target) in [(0, 1), (1, 0)] {
            let (from, to) = match source {
                0 => (&mut a, &mut b),
                _ => (&mut b, &mut a),
            };
            to.rings[0].offer(id, 2048);
            let sent = frame((mac(source), mac(target)), round, len);
            from.rings[1].send(id, VnetHeader::default(), &sent);
            assert_eq!(to.rings[0].receive().1, sent, "{round}");
            assert_eq!(from.rings[1].complete(), (id, 0));
        }
    }
    let received = network
        .hooks
        .iter()
        .map(|hooks| hooks.counters.total().0.frames);
    assert_eq!(received.collect::<Vec<_>>(), [60, 60]);
}

#[test]
fn frames_wait_for_a_guest_without_buffers_and_no_one_waits_for_it() {
    let network = Network::start(&[VlanMode::Transparent, VlanMode::Transparent]);
    let mut a = network.guest(0, Layout::Split, 0);
    let mut b = network.guest(1, Layout::Split, 0);
    let frames: Vec<_> = (0..20).map(|i| frame((mac(0), mac(1)), i, 300)).collect();
    // Each is taken at once, whatever the receiver does.
    frames
        .iter()
        .for_each(|bytes| send(&mut a, VnetHeader::default(), bytes));
    for (id, sent) in (0..4).cycle().zip(&frames) {
        b.rings[0].offer(id, 512);
        assert_eq!(b.rings[0].receive().1, *sent);
    }
}

#[test]
fn a_guest_that_segments_meets_one_that_does_not() {
    let network = Network::start(&[
        VlanMode::Transparent,
        VlanMode::Transparent,
        VlanMode::Transparent,
    ]);
    let mut a = network.guest(0, Layout::Packed, CSUM | HOST_TSO4);
    let mut able = network.guest(1, Layout::Split, GUEST_CSUM | GUEST_TSO4);
    let mut unable = network.guest(2, Layout::Split, 0);
    let mut bytes = [[0xff; 6], mac(0).0].concat();
    bytes.extend([
        8, 0, 0x45, 0, 0x0b, 0xe0, 0, 1, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
    ]);
    bytes.extend([
        0, 1, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x18, 1, 1, 0, 0, 0, 0,
    ]);
    bytes.extend((0..3000).map(|at| at as u8));
    let header = VnetHeader {
        flags: NEEDS_CSUM,
        gso_type: GSO_TCPV4,
        hdr_len: 54,
        gso_size: 1000,
        csum_start: 34,
        csum_offset: 16,
        num_buffers: 0,
    };
    able.rings[0].offer(0, 4096);
    (0..3).for_each(|id| unable.rings[0].offer(id, 2048));
    send(&mut a, header, &bytes);
    let (whole, received, _) = able.rings[0].receive();
    assert_eq!(
        (whole.gso_type, whole.gso_size, received),
        (GSO_TCPV4, 1000, bytes.clone())
    );
    let mut payload = Vec::new();
    for index in 0..3_u8 {
        let (header, segment, _) = unable.rings[0].receive();
        assert_eq!(
            VnetHeader {
                num_buffers: 0,
                ..header
            },
            VnetHeader::default()
        );
        assert_eq!((segment.len(), segment[19]), (1054, 1 + index));
        payload.extend_from_slice(&segment[54..]);
    }
    assert_eq!(payload, bytes[54..]);
    // A guest that did not negotiate it is not let.
    send(&mut unable, header, &bytes);
    assert_eq!(network.dropped(2, DropReason::BadHeader), 1);
}

#[test]
fn a_guest_that_goes_and_comes_back_is_reached_again() {
    let network = Network::start(&[VlanMode::Transparent, VlanMode::Transparent]);
    let mut a = network.guest(0, Layout::Split, 0);
    let mut b = network.guest(1, Layout::Split, 0);
    for index in 0..2 {
        b.front_end.get_base(index);
    }
    send(
        &mut a,
        VnetHeader::default(),
        &frame((mac(0), mac(1)), 1, 100),
    );
    assert_eq!(network.dropped(0, DropReason::LinkDown), 1);
    drop(b);
    let mut b = network.guest(1, Layout::Packed, 0);
    b.rings[0].offer(0, 2048);
    let hello = frame((mac(0), mac(1)), 2, 100);
    send(&mut a, VnetHeader::default(), &hello);
    assert_eq!(b.rings[0].receive().1, hello);
}

#[test]
fn a_guard_can_come_while_frames_flow() {
    let network = Network::start(&[
        VlanMode::Access(10),
        VlanMode::Access(10),
        VlanMode::Access(20),
    ]);
    let mut a = network.guest(0, Layout::Split, 0);
    let mut b = network.guest(1, Layout::Split, 0);
    let mut other = network.guest(2, Layout::Split, 0);
    let spoofed = frame((mac(9), mac(1)), 1, 100);
    b.rings[0].offer(0, 2048);
    send(&mut a, VnetHeader::default(), &spoofed);
    assert_eq!(b.rings[0].receive().1, spoofed);
    let guard = GuardOptions {
        mac: Some(vec![mac(0)]),
        ..GuardOptions::default()
    };
    network.hooks[0]
        .guard
        .set(Some(Arc::new(Guard::new(guard).unwrap())));
    send(&mut a, VnetHeader::default(), &spoofed);
    assert_eq!(network.dropped(0, DropReason::SpoofedMac), 1);
    let honest = frame((mac(0), MacAddress::BROADCAST), 2, 100);
    b.rings[0].offer(1, 2048);
    other.rings[0].offer(0, 2048);
    send(&mut a, VnetHeader::default(), &honest);
    assert_eq!(b.rings[0].receive().1, honest);
    assert!(other.rings[0].try_complete().is_none(), "another VLAN");
}
