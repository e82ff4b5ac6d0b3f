//! QEMU's own network back-ends as peers: `-netdev stream` and `-netdev dgram` on unix sockets.
//!
//! QEMU without a machine connects its two back-ends with a hub, so a frame of one port goes through both of them to the other port:
//! port 0 ── stream ── QEMU's hub ── dgram ── port 1.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use harness::net::frames::{BROADCAST, number_of, numbered, station};
use harness::net::rig::{NetRig, Plan};
use harness::net::{NetDevice, Options};
use harness::process::installed;

use crate::echo::LIMIT;
use crate::traffic::Traffic;

/// How long a frame is waited for before it is sent again: what is sent before QEMU is there is lost.
const PATIENCE: Duration = Duration::from_millis(50);

/// Frames on their way: no more than a datagram socket queues (`net.unix.max_dgram_qlen`), for QEMU sends later frames before those
/// that found the socket full.
const WINDOW: u64 = 8;

/// Which side of the stream connection listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Server {
    Daemon,
    Qemu,
}

/// QEMU with its two back-ends; killed when dropped.
struct Hub(Child);

impl Hub {
    fn start(directory: &Path, server: Server) -> Result<Hub> {
        let path = |name: &str| directory.join(name).display().to_string();
        let listens = if server == Server::Qemu { "on" } else { "off" };
        let stream = format!(
            "stream,id=a,server={listens},addr.type=unix,addr.path={}",
            path("stream")
        );
        let dgram = format!(
            "dgram,id=b,local.type=unix,local.path={},remote.type=unix,remote.path={}",
            path("qemu"),
            path("netd")
        );
        let child = Command::new(installed("qemu-system-x86_64", "qemu-system-x86")?)
            .args(["-machine", "none", "-nodefaults", "-no-user-config"])
            .args(["-display", "none", "-netdev", &stream, "-netdev", &dgram])
            .args(["-netdev", "hubport,id=h0,hubid=0,netdev=a"])
            .args(["-netdev", "hubport,id=h1,hubid=0,netdev=b"])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("QEMU")?;
        Ok(Hub(child))
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn plan(directory: &Path, server: Server) -> Plan {
    let path = |name: &str| directory.join(name).display().to_string();
    let how = match server {
        Server::Daemon => "server=on",
        Server::Qemu => "reconnect-ms=20",
    };
    let stream = format!(
        "type=stream,{how},addr.type=unix,addr.path={}",
        path("stream")
    );
    let dgram = format!(
        "type=dgram,local.type=unix,local.path={},remote.type=unix,remote.path={}",
        path("netd"),
        path("qemu")
    );
    Plan::one(&stream).netdev(&dgram).port("netdev=n1")
}

/// Sends from `from` until the frame sent last comes to `to`, so that nothing else is under way.
fn found(from: &mut NetDevice, to: &mut NetDevice) -> Result<()> {
    let begun = Instant::now();
    let (from, to) = (&mut from.pairs[0], &mut to.pairs[0]);
    for number in 1_u64 << 32.. {
        ensure!(begun.elapsed() < LIMIT, "nothing comes through QEMU");
        from.tx
            .send(&numbered((BROADCAST, station(1)), number, 60))?;
        while let Some(received) = to.rx.frame_within(PATIENCE)? {
            if number_of(&received.frame)? == number {
                return Ok(());
            }
        }
    }
    unreachable!("numbers do not end")
}

/// Frames of all sizes cross whole and in order, both ways.
fn crosses(here: &mut NetDevice, there: &mut NetDevice) -> Result<()> {
    // A datagram socket hears a remote that was replaced once something was sent to it.
    found(there, here)?;
    found(here, there)?;
    let traffic = Traffic {
        window: WINDOW,
        ..Traffic::new(300, &[60, 1514, 9014, 61])
    };
    let (one, other) = (&mut here.pairs[0], &mut there.pairs[0]);
    traffic.carried(&mut one.tx, &mut other.rx, LIMIT)?;
    traffic.carried(&mut other.tx, &mut one.rx, LIMIT)
}

#[test]
fn frames_cross_qemus_stream_and_datagram_back_ends() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let mut rig = NetRig::start(&plan(directory.path(), Server::Daemon))?;
    let mut here = rig.connect(0, Options::default())?;
    let mut there = rig.connect(1, Options::default())?;
    for round in 0..3 {
        let hub = Hub::start(directory.path(), Server::Daemon)?;
        crosses(&mut here, &mut there).with_context(|| format!("QEMU number {round}"))?;
        drop(hub);
        // QEMU that is killed leaves its socket, and binds no other in its place.
        std::fs::remove_file(directory.path().join("qemu"))?;
        if round > 0 {
            rig.kill_and_restart()?;
            here.reconnect()?;
            there.reconnect()?;
        }
    }
    Ok(())
}

#[test]
fn a_killed_daemon_is_connected_to_qemu_again() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let hub = Hub::start(directory.path(), Server::Qemu)?;
    let mut rig = NetRig::start(&plan(directory.path(), Server::Qemu))?;
    let mut here = rig.connect(0, Options::default())?;
    let mut there = rig.connect(1, Options::default())?;
    for round in 0..3 {
        crosses(&mut here, &mut there).with_context(|| format!("daemon number {round}"))?;
        rig.kill_and_restart()?;
        here.reconnect()?;
        there.reconnect()?;
    }
    crosses(&mut here, &mut there)?;
    drop(hub);
    Ok(())
}
