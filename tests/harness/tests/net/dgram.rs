//! Peers on datagram sockets: a frame is a datagram.

use std::os::unix::net::UnixDatagram;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use harness::net::Options;
use harness::net::frames::{BROADCAST, numbered, station};
use harness::net::rig::{NetRig, Plan};

use crate::echo::LIMIT;
use crate::traffic::Traffic;

/// The words of `--netdev` for frames between two sockets in `directory`.
fn between(directory: &Path, local: &str, remote: &str) -> String {
    let [local, remote] = [local, remote].map(|name| directory.join(name).display().to_string());
    format!("type=dgram,local.type=unix,local.path={local},remote.type=unix,remote.path={remote}")
}

#[test]
fn every_frame_crosses_unix_datagram_sockets_both_ways_in_order() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let plan = Plan::one(&between(directory.path(), "a", "b"))
        .netdev(&between(directory.path(), "b", "a"))
        .port("netdev=n1");
    let rig = NetRig::start(&plan)?;
    let mut here = rig.connect(0, Options::default())?;
    let mut there = rig.connect(1, Options::default())?;
    // Far more than such a socket queues: the sender waits.
    let traffic = Traffic::new(1000, &[60, 1514, 9014, 300]);
    let (one, other) = (&mut here.pairs[0], &mut there.pairs[0]);
    traffic.carried(&mut one.tx, &mut other.rx, LIMIT)?;
    traffic.carried(&mut other.tx, &mut one.rx, LIMIT)
}

#[test]
fn a_datagram_peer_is_heard_alone_and_may_be_replaced() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let [ours, theirs] = ["peer", "netd"].map(|name| directory.path().join(name));
    let bind = || -> Result<UnixDatagram> {
        let peer = UnixDatagram::bind(&ours)?;
        peer.set_read_timeout(Some(LIMIT))?;
        Ok(peer)
    };
    let mut peer = bind()?;
    let rig = NetRig::start(&Plan::one(&between(directory.path(), "netd", "peer")))?;
    let mut device = rig.connect(0, Options::default())?;
    let pair = &mut device.pairs[0];
    for round in 0..3 {
        let frame = numbered((BROADCAST, station(1)), round, 1514);
        pair.tx.send(&frame)?;
        let mut bytes = [0; 2048];
        let count = peer
            .recv(&mut bytes)
            .with_context(|| format!("round {round}"))?;
        ensure!(bytes[..count] == frame, "round {round}: another frame");
        let answer = numbered((station(1), BROADCAST), round, 60);
        peer.send_to(&answer, &theirs)?;
        ensure!(
            pair.rx.frame()?.frame == answer,
            "round {round}: another answer"
        );
        let stranger = UnixDatagram::unbound()?;
        ensure!(
            stranger.send_to(&answer, &theirs).is_err(),
            "a stranger is heard"
        );
        drop(peer);
        std::fs::remove_file(&ours)?;
        peer = bind()?;
    }
    Ok(())
}
