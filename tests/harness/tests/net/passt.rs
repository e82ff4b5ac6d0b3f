//! passt, the network of users without root, as QEMU uses it: over a stream socket.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use harness::net::frames::{BROADCAST, Mac, ethernet, station};
use harness::net::namespace::Namespace;
use harness::net::rig::{NetRig, Plan};
use harness::net::{NetDevice, Options};
use harness::process::installed;

use crate::echo::LIMIT;
use crate::or_skip;

const ARP: u16 = 0x0806;
const GUEST: [u8; 4] = [10, 99, 0, 2];
const GATEWAY: [u8; 4] = [10, 99, 0, 1];

/// Asks who has the gateway's address, until it is answered: what passt is not there to hear is lost.
fn gateway(device: &mut NetDevice) -> Result<Mac> {
    let mut question = vec![0, 1, 8, 0, 6, 4, 0, 1];
    question.extend_from_slice(&station(1));
    question.extend_from_slice(&GUEST);
    question.extend_from_slice(&[0; 6]);
    question.extend_from_slice(&GATEWAY);
    let frame = ethernet(BROADCAST, station(1), ARP, &question);
    let begun = std::time::Instant::now();
    loop {
        ensure!(begun.elapsed() < LIMIT, "no answer from passt");
        let pair = &mut device.pairs[0];
        pair.tx.send(&frame)?;
        while let Some(received) = pair.rx.frame_within(Duration::from_millis(100))? {
            let frame = received.frame;
            let is_answer = frame.get(12..14) == Some(&ARP.to_be_bytes()[..])
                && frame.get(20..22) == Some(&[0, 2][..])
                && frame.get(28..32) == Some(&GATEWAY[..]);
            if is_answer {
                ensure!(frame[..6] == station(1), "to {:x?}", &frame[..6]);
                return frame[22..28].try_into().context("an address");
            }
        }
    }
}

#[test]
fn a_guest_behind_passt_finds_its_gateway() -> Result<()> {
    let network = or_skip!(Namespace::or_reason()?);
    installed("passt", "passt")?;
    // passt takes addresses and routes from an interface with a default route.
    network.ip("link add up0 type veth peer name up1")?;
    network.ip("addr add 10.99.0.2/24 dev up0")?;
    network.ip("link set up0 up")?;
    network.ip("link set up1 up")?;
    network.ip("route add default via 10.99.0.1 dev up0")?;
    let directory = tempfile::tempdir()?;
    let socket = directory.path().join("passt.sock");
    let stream = format!(
        "type=stream,addr.type=unix,addr.path={},reconnect-ms=100",
        socket.display()
    );
    let plan = Plan::one(&stream)
        .with("mac=52:54:00:00:00:01")
        .inside(&network);
    let rig = NetRig::start(&plan)?;
    let mut device = rig.connect(0, Options::default())?;
    // Twice: a passt that ended is connected to again.
    for _ in 0..2 {
        let mut passt = network
            .command("passt")
            .args(["--runas", "0", "-f", "-q", "-4", "-i", "up0", "-s"])
            .arg(&socket)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("starting passt")?;
        let answer = gateway(&mut device);
        let _ = passt.kill();
        let _ = passt.wait();
        let _ = std::fs::remove_file(&socket);
        let mac = answer?;
        ensure!(mac != [0; 6] && mac[0] & 1 == 0, "gateway at {mac:x?}");
    }
    Ok(())
}
