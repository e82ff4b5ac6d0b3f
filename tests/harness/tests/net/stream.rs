//! A peer on the other end of a stream socket.

use std::io::{ErrorKind, Read};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use harness::net::frames::{BROADCAST, ethernet, station};
use harness::net::rig::{NetRig, Plan};
use harness::net::{NetDevice, Options};

use crate::echo::LIMIT;

/// An EtherType for experiments.
const KIND: u16 = 0x88b5;
/// How long the peer listens before the guest sends again.
const PATIENCE: Duration = Duration::from_millis(50);

/// Sends the same frame until the peer has heard it once: what is sent before the connection is made is lost.
fn heard(device: &mut NetDevice, peer: &mut TcpStream, payload: &[u8]) -> Result<()> {
    let frame = ethernet(BROADCAST, station(1), KIND, payload);
    let mut expected = u32::try_from(frame.len())?.to_be_bytes().to_vec();
    expected.extend_from_slice(&frame);
    peer.set_read_timeout(Some(PATIENCE))?;
    let (begun, mut got) = (Instant::now(), Vec::new());
    // A frame of the last round may come late.
    while !got.windows(expected.len()).any(|heard| heard == expected) {
        ensure!(begun.elapsed() < LIMIT, "the peer hears nothing");
        device.pairs[0].tx.send(&frame)?;
        let mut bytes = [0; 4096];
        match peer.read(&mut bytes) {
            Ok(0) => bail!("the daemon left"),
            Ok(count) => got.extend_from_slice(&bytes[..count]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[test]
fn a_sandboxed_daemon_connects_to_its_tcp_peer_again() -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    let stream =
        format!("type=stream,reconnect-ms=50,addr.type=inet,addr.host=127.0.0.1,addr.port={port}");
    let rig = NetRig::start(&Plan::one(&stream).with("mac=52:54:00:00:00:01"))?;
    let mut device = rig.connect(0, Options::default())?;
    for round in 0..3_u8 {
        let (mut peer, _) = listener.accept()?;
        heard(&mut device, &mut peer, &[round; 64]).with_context(|| format!("round {round}"))?;
    }
    Ok(())
}
