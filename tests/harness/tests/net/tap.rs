//! Taps, the switch and passt between drivers without a VM: what arrives is what was sent, finished as the receiver needs it.

use std::net::UdpSocket;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use harness::net::features::{self, bits};
use harness::net::frames::{
    BROADCAST, Flow, TCP_PAYLOAD_AT, check_tcp, numbered, station, tagged, udp,
};
use harness::net::namespace::Namespace;
use harness::net::rig::{NetRig, Plan};
use harness::net::{Header, NetDevice, Options};

use crate::echo::{LIMIT, large_segment};
use crate::or_skip;
use crate::traffic::Traffic;

/// How long nothing has to arrive to have been dropped.
const SILENCE: Duration = Duration::from_millis(100);

fn switch(ports: &[&str]) -> Result<(NetRig, Vec<NetDevice>)> {
    let mut plan = Plan::default().netdev("type=switch");
    for (number, words) in ports.iter().enumerate() {
        plan = plan
            .port("netdev=n0")
            .with(&format!("mac=52:54:00:00:00:{:02x}", number + 1));
        if !words.is_empty() {
            plan = plan.with(words);
        }
    }
    let rig = NetRig::start(&plan)?;
    let devices = (0..ports.len())
        .map(|port| rig.connect(port, Options::default()))
        .collect::<Result<_>>()?;
    Ok((rig, devices))
}

fn hears(device: &mut NetDevice) -> Result<Option<Vec<u8>>> {
    let received = device.pairs[0].rx.frame_within(SILENCE)?;
    Ok(received.map(|received| received.frame))
}

#[test]
fn the_switch_learns_where_stations_are() -> Result<()> {
    let (_rig, mut devices) = switch(&["", "", ""])?;
    let [a, b, c] = &mut devices[..] else {
        unreachable!("three ports")
    };
    let hello = numbered((BROADCAST, station(1)), 1, 60);
    a.pairs[0].tx.send(&hello)?;
    ensure!(hears(b)?.as_ref() == Some(&hello), "a broadcast at b");
    ensure!(hears(c)?.as_ref() == Some(&hello), "a broadcast at c");
    let answer = numbered((station(1), station(2)), 2, 60);
    b.pairs[0].tx.send(&answer)?;
    ensure!(hears(a)?.as_ref() == Some(&answer), "an answer to a");
    ensure!(hears(c)?.is_none(), "an answer that is not for c");
    ensure!(hears(a)?.is_none(), "more than one answer");
    let (one, other) = (&mut a.pairs[0], &mut b.pairs[0]);
    let traffic = Traffic::new(2000, &[64, 300, 1514]);
    traffic.carried(&mut one.tx, &mut other.rx, LIMIT)?;
    ensure!(hears(c)?.is_none(), "frames between others");
    Ok(())
}

#[test]
fn vlans_are_kept_apart() -> Result<()> {
    let (_rig, mut devices) = switch(&["vlan=5", "vlan=5", "vlan=6", "trunk=5"])?;
    let hello = numbered((BROADCAST, station(1)), 1, 60);
    devices[0].pairs[0].tx.send(&hello)?;
    ensure!(
        hears(&mut devices[1])?.as_ref() == Some(&hello),
        "the same VLAN"
    );
    ensure!(hears(&mut devices[2])?.is_none(), "another VLAN");
    let on_trunk = tagged(&hello, 5);
    ensure!(
        hears(&mut devices[3])?.as_ref() == Some(&on_trunk),
        "the trunk"
    );
    let from_trunk = tagged(&numbered((BROADCAST, station(4)), 2, 60), 5);
    devices[3].pairs[0].tx.send(&from_trunk)?;
    ensure!(hears(&mut devices[1])?.is_some(), "from the trunk");
    ensure!(
        hears(&mut devices[2])?.is_none(),
        "from the trunk, another VLAN"
    );
    Ok(())
}

#[test]
fn isolated_ports_hear_the_others_alone() -> Result<()> {
    let (_rig, mut devices) = switch(&["isolated=on", "isolated=on", ""])?;
    let hello = numbered((BROADCAST, station(1)), 1, 60);
    devices[0].pairs[0].tx.send(&hello)?;
    ensure!(hears(&mut devices[2])?.is_some(), "a port for all");
    ensure!(hears(&mut devices[1])?.is_none(), "another isolated port");
    let answer = numbered((BROADCAST, station(3)), 2, 60);
    devices[2].pairs[0].tx.send(&answer)?;
    ensure!(hears(&mut devices[0])?.is_some(), "from a port for all");
    ensure!(hears(&mut devices[1])?.is_some(), "from a port for all");
    Ok(())
}

#[test]
fn a_large_segment_arrives_in_frames_where_the_receiver_takes_no_more() -> Result<()> {
    let plan = Plan::default()
        .netdev("type=switch")
        .port("netdev=n0")
        .port("netdev=n0");
    let rig = NetRig::start(&plan)?;
    let mut sender = rig.connect(0, Options::default().with(features::OFFLOADS))?;
    let mut receiver = rig.connect(1, Options::default())?;
    ensure!(
        sender.front_end.features() & bits::HOST_TSO4 != 0,
        "no HOST_TSO4"
    );
    let (flow, header, frame) = large_segment(20_000);
    let tx = &mut sender.pairs[0].tx;
    tx.queue(header, &frame)?;
    tx.drain()?;
    let mut payload = Vec::new();
    while payload.len() < 20_000 {
        let part = receiver.pairs[0].rx.frame().context("a segment")?;
        ensure!(
            part.header.gso_type == 0 && part.header.flags & 1 == 0,
            "{:?}",
            part.header
        );
        ensure!(
            part.frame.len() <= TCP_PAYLOAD_AT + 1448,
            "{} bytes",
            part.frame.len()
        );
        check_tcp(&flow, &part.frame)?;
        payload.extend_from_slice(&part.frame[TCP_PAYLOAD_AT..]);
    }
    ensure!(payload == frame[TCP_PAYLOAD_AT..], "the payload changed");
    Ok(())
}

#[test]
fn what_a_guest_left_undone_reaches_one_that_does_it() -> Result<()> {
    let plan = Plan::default()
        .netdev("type=switch")
        .port("netdev=n0")
        .port("netdev=n0");
    let rig = NetRig::start(&plan)?;
    let connect = |port| rig.connect(port, Options::default().with(features::OFFLOADS));
    let (mut sender, mut receiver) = (connect(0)?, connect(1)?);
    let (_, header, frame) = large_segment(20_000);
    let tx = &mut sender.pairs[0].tx;
    tx.queue(header, &frame)?;
    tx.drain()?;
    let there = receiver.pairs[0].rx.frame()?;
    ensure!(there.frame == frame, "another frame arrived");
    let expected = Header {
        num_buffers: there.header.num_buffers,
        ..header
    };
    ensure!(there.header == expected, "{:?}", there.header);
    Ok(())
}

#[test]
fn frames_pass_between_a_driver_and_a_tap() -> Result<()> {
    let network = or_skip!(Namespace::or_reason()?);
    network.tap("tap0", "10.77.0.1/24", "")?;
    // Frames for the driver's address go out of the tap without a question.
    network.ip("neigh add 10.77.0.2 lladdr 52:54:00:00:00:01 dev tap0")?;
    let rig = NetRig::start(
        &Plan::one("type=tap,ifname=tap0")
            .with("mac=52:54:00:00:00:01")
            .inside(&network),
    )?;
    let mut device = rig.connect(0, Options::default().with(features::OFFLOADS))?;
    let text = network.ip("-d link show tap0")?;
    let at = text.find("link/ether ").context("an address")? + 11;
    let mut mac = [0; 6];
    for (byte, word) in mac.iter_mut().zip(text[at..at + 17].split(':')) {
        *byte = u8::from_str_radix(word, 16)?;
    }
    // From the guest: a datagram arrives at a socket.
    let socket = network.enter(|| Ok(UdpSocket::bind("10.77.0.1:7777")?))?;
    socket.set_read_timeout(Some(LIMIT))?;
    let flow = Flow {
        macs: (station(1), mac),
        addresses: ([10, 77, 0, 2], [10, 77, 0, 1]),
        ports: (5555, 7777),
    };
    device.pairs[0].tx.send(&udp(&flow, b"hello"))?;
    let mut bytes = [0; 64];
    let (count, from) = socket.recv_from(&mut bytes)?;
    ensure!(&bytes[..count] == b"hello", "{:?}", &bytes[..count]);
    ensure!(from.to_string() == "10.77.0.2:5555", "from {from}");
    // To the guest: the answer.
    socket.send_to(b"welcome", from)?;
    loop {
        let frame = device.pairs[0].rx.frame()?.frame;
        // UDP over IPv4: the kernel has to say of itself as well.
        let is_udp = frame.get(12..14) == Some(&[8, 0][..]) && frame.get(23) == Some(&17);
        if is_udp && frame.windows(7).any(|part| part == b"welcome") {
            ensure!(frame[..6] == station(1), "{:x?}", &frame[..6]);
            return Ok(());
        }
    }
}

#[test]
fn a_daemon_without_a_guest_or_frames_uses_no_processor() -> Result<()> {
    let rig = NetRig::start(&Plan::one("type=echo"))?;
    let mut device = rig.connect(0, Options::default())?;
    Traffic::new(100, &[64]).echoed(&mut device.pairs[0], LIMIT)?;
    let settling = Duration::from_millis(300);
    let used = rig
        .daemon
        .cpu_time_within(settling, Duration::from_secs(1))?;
    ensure!(used < Duration::from_millis(2), "{used:?} of a second");
    Ok(())
}
