//! A port on an interface that exists: an end of a veth pair.

use std::net::UdpSocket;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use harness::net::features::{self, bits};
use harness::net::frames::{Flow, TCP_PAYLOAD_AT, check_tcp, numbered, station, tagged, udp};
use harness::net::namespace::Namespace;
use harness::net::rig::{NetRig, Plan};
use harness::net::{Header, NetDevice, Options};

use crate::echo::{LIMIT, large_segment};
use crate::or_skip;
use crate::traffic::{ENDS, Traffic};

/// Two interfaces, `v0` and `v1`, with a cable between them.
fn cable(network: &Namespace) -> Result<()> {
    network.ip("link add v0 type veth peer name v1")?;
    network.ip("link set v0 up")?;
    network.ip("link set v1 up")?;
    let start = Instant::now();
    // What is sent before the kernel has noticed the carrier is lost.
    while network.ip("-br link show up")?.matches(" UP ").count() < 2 {
        ensure!(start.elapsed() < LIMIT, "the cable does not come up");
    }
    Ok(())
}

/// A port at either end of the cable.
fn ends(network: &Namespace, options: [Options; 2]) -> Result<(NetRig, [NetDevice; 2])> {
    let plan = Plan::one("type=af-packet,ifname=v0")
        .netdev("type=af-packet,ifname=v1")
        .port("netdev=n1")
        .inside(network);
    let rig = NetRig::start(&plan)?;
    let [here, there] = options;
    let devices = [rig.connect(0, here)?, rig.connect(1, there)?];
    Ok((rig, devices))
}

#[test]
fn every_frame_crosses_a_veth_pair_both_ways_in_order() -> Result<()> {
    let network = or_skip!(Namespace::or_reason()?);
    cable(&network)?;
    let (_rig, [mut here, mut there]) = ends(&network, [Options::default(), Options::default()])?;
    let traffic = Traffic::new(1000, &[60, 64, 300, 1514]);
    let (one, other) = (&mut here.pairs[0], &mut there.pairs[0]);
    traffic.carried(&mut one.tx, &mut other.rx, LIMIT)?;
    traffic.carried(&mut other.tx, &mut one.rx, LIMIT)?;
    // Linux takes the tag out of it.
    let in_vlan = tagged(&numbered(ENDS, 1, 100), 7);
    one.tx.send(&in_vlan)?;
    ensure!(other.rx.frame()?.frame == in_vlan, "the tag is lost");
    Ok(())
}

#[test]
fn a_large_segment_crosses_a_veth_pair_as_the_receiver_can_take_it() -> Result<()> {
    let network = or_skip!(Namespace::or_reason()?);
    cable(&network)?;
    let all = Options::default().with(features::OFFLOADS);
    let (rig, [mut here, mut there]) = ends(&network, [all.clone(), all])?;
    ensure!(
        here.front_end.features() & bits::HOST_TSO4 != 0,
        "no HOST_TSO4"
    );
    let (flow, header, frame) = large_segment(20_000);
    let send = |device: &mut NetDevice| -> Result<()> {
        device.pairs[0].tx.queue(header, &frame)?;
        device.pairs[0].tx.drain()
    };
    send(&mut here)?;
    let whole = there.pairs[0].rx.frame()?;
    ensure!(whole.frame == frame, "another segment");
    let expected = Header {
        num_buffers: whole.header.num_buffers,
        ..header
    };
    ensure!(whole.header == expected, "{:?}", whole.header);
    drop(there);
    let mut there = rig.connect(1, Options::default())?;
    send(&mut here)?;
    let mut payload = Vec::new();
    while payload.len() < 20_000 {
        let part = there.pairs[0].rx.frame().context("a part of the segment")?;
        let finished = part.header.gso_type == 0 && part.header.flags & 1 == 0;
        ensure!(finished, "{:?}", part.header);
        check_tcp(&flow, &part.frame)?;
        payload.extend_from_slice(&part.frame[TCP_PAYLOAD_AT..]);
    }
    ensure!(payload == frame[TCP_PAYLOAD_AT..], "the payload changed");
    Ok(())
}

#[test]
fn a_guest_talks_to_the_kernel_at_the_other_end_of_a_veth_pair() -> Result<()> {
    let network = or_skip!(Namespace::or_reason()?);
    cable(&network)?;
    network.ip("addr add 10.78.0.1/24 dev v1")?;
    network.ip("link set v1 address 52:54:00:00:00:02")?;
    network.ip("neigh add 10.78.0.2 lladdr 52:54:00:00:00:01 dev v1")?;
    let plan = Plan::one("type=af-packet,ifname=v0").with("mac=52:54:00:00:00:01");
    let rig = NetRig::start(&plan.inside(&network))?;
    let mut device = rig.connect(0, Options::default().with(features::OFFLOADS))?;
    let socket = network.enter(|| Ok(UdpSocket::bind("10.78.0.1:7777")?))?;
    socket.set_read_timeout(Some(LIMIT))?;
    let flow = Flow {
        macs: (station(1), station(2)),
        addresses: ([10, 78, 0, 2], [10, 78, 0, 1]),
        ports: (5555, 7777),
    };
    let pair = &mut device.pairs[0];
    pair.tx.send(&udp(&flow, b"hello"))?;
    let mut bytes = [0; 64];
    let (count, from) = socket.recv_from(&mut bytes)?;
    ensure!(&bytes[..count] == b"hello", "{:?}", &bytes[..count]);
    ensure!(from.to_string() == "10.78.0.2:5555", "from {from}");
    socket.send_to(b"welcome", from)?;
    let answer = pair.rx.frame()?;
    ensure!(answer.frame[..6] == station(1), "{:x?}", &answer.frame[..6]);
    ensure!(answer.frame.ends_with(b"welcome"), "{:x?}", answer.frame);
    Ok(())
}
