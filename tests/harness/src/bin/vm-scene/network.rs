//! Scenes with a network card.

use std::net::Ipv4Addr;
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use harness::scene::{BackEnd, Guest, Network, PORT};
use harness::transfer::Server;
use serde_json::{Value, json};

use crate::Options;
use crate::scenes::{expect_no_complaints, pause_of, power_off};
use crate::story::{Story, milliseconds};

/// Where the host's end of a transfer listens.
const TRANSFER_PORT: u16 = 7000;
/// Connections of a transfer, one per queue pair of the scenes.
const CONNECTIONS: u32 = 2;
/// The guest's largest packet.
const JUMBO_MTU: u16 = 9000;
/// What leaves room for the headers of IPv4 and ICMP.
const JUMBO_PING: u16 = JUMBO_MTU - 28;
/// A VLAN, and its addresses.
const VLAN: u16 = 7;
const VLAN_HOST: Ipv4Addr = Ipv4Addr::new(10, 77, 7, 1);
const VLAN_GUEST: Ipv4Addr = Ipv4Addr::new(10, 77, 7, 2);

/// The host's end of the network with the daemon that serves it.
pub(crate) struct HostEnd {
    network: Network,
    daemon: BackEnd,
    server: Server,
}

impl HostEnd {
    /// Makes the network and starts the daemon.
    pub(crate) fn start(options: &Options, directory: &Path, story: &mut Story) -> Result<Self> {
        let network = Network::create(options.queues, JUMBO_MTU)?;
        let server = Server::start(Network::address(TRANSFER_PORT))?;
        let mut daemon = BackEnd::network(directory, &network)?;
        let took = daemon.start()?;
        story.tell("network_ready", &[("took_ms", milliseconds(took).into())]);
        Ok(Self {
            network,
            daemon,
            server,
        })
    }

    /// What `Boot` needs.
    pub(crate) fn card(&self, options: &Options) -> (std::path::PathBuf, u32) {
        (self.daemon.socket(), options.queues)
    }

    /// Ends the daemon in an orderly way.
    pub(crate) fn end(mut self) -> Result<()> {
        self.daemon.terminate()
    }

    /// Kills the daemon again and again while blocks go to and fro over several connections.
    pub(crate) fn survive_kills(
        &mut self,
        guest: &mut Guest,
        options: &Options,
        story: &mut Story,
    ) -> Result<()> {
        let address = self.server.address();
        let started = guest.ask(&format!("transfer {CONNECTIONS} {address}"), "started")?;
        story.tell(
            "transfer_started",
            &[("connections", started["writers"].clone())],
        );
        for number in 1..=options.kills {
            let calm = progress(guest, options, story)?;
            self.daemon.kill()?;
            let fields = [
                ("number", number.into()),
                ("pause_before_ms", pause_of(&calm)),
            ];
            story.tell("network_killed", &fields);
            let took = self.daemon.start()?;
            let after = progress(guest, options, story)?;
            let fields = [
                ("number", number.into()),
                ("restart_ms", milliseconds(took).into()),
                ("pause_ms", pause_of(&after)),
            ];
            story.tell("network_resumed", &fields);
        }
        progress(guest, options, story)?;
        Ok(())
    }

    /// Ends the transfer; both ends must agree on what was sent.
    pub(crate) fn finish_transfer(&self, guest: &mut Guest, story: &mut Story) -> Result<()> {
        let stopped = guest.ask("stop", "stopped")?;
        let verified = guest.ask("verify", "verified")?;
        let received = self.server.received();
        let bytes: u64 = received.iter().map(|totals| totals.bytes).sum();
        ensure!(
            received.len() == CONNECTIONS as usize && verified["bytes"] == bytes,
            "the guest says {verified}, the host {received:?}"
        );
        let checksums: Vec<_> = received
            .iter()
            .map(|totals| format!("{:016x}", totals.checksum))
            .collect();
        let fields = [
            ("blocks", stopped["syncs"].clone()),
            ("bytes", stopped["bytes"].clone()),
            ("received_bytes", bytes.into()),
            ("checksums", json!(checksums)),
        ];
        story.tell("transfer_verified", &fields);
        Ok(())
    }
}

/// Waits for more blocks of the transfer, and tells how far it is.
fn progress(guest: &mut Guest, options: &Options, story: &mut Story) -> Result<Value> {
    let mark = guest.ask(&format!("progress {}", options.blocks), "mark")?;
    story.tell("transfer_progress", &[("bytes", mark["bytes"].clone())]);
    Ok(mark)
}

/// Gives the guest's card its address, and sees whether the host answers.
pub(crate) fn connect(guest: &mut Guest, story: &mut Story) -> Result<()> {
    run(guest, "ip link set eth0 up")?;
    run(
        guest,
        &format!("ip addr add {}/24 dev eth0", Network::GUEST),
    )?;
    ping(guest, Network::HOST, 56, story)
}

/// All that a network card does, in one boot: sizes, queue pairs, VLANs, the daemon's death, the link.
pub(crate) fn network(options: &Options, directory: &Path, story: &mut Story) -> Result<()> {
    let mut host = HostEnd::start(options, directory, story)?;
    let iperf = host.network.iperf_server()?;
    let mut boot = options.boot(None);
    boot.card = Some(host.card(options));
    let mut guest = Guest::start(&boot, directory)?;
    story.pass_on(&guest.expect("ready")?);
    connect(&mut guest, story)?;
    jumbo(&mut guest, story)?;
    for direction in ["up", "down"] {
        let command = format!("iperf {} 2 {direction}", Network::HOST);
        story.pass_on(&guest.ask(&command, "iperf")?);
    }
    drop(iperf);
    pairs(&mut guest, options, story)?;
    vlan(&mut guest, &host, story)?;
    host.survive_kills(&mut guest, options, story)?;
    all_pairs_work(&mut guest, options, story)?;
    ping(&mut guest, VLAN_HOST, 56, story)?;
    link(&mut guest, &host, story)?;
    host.finish_transfer(&mut guest, story)?;
    expect_no_complaints(&mut guest, story)?;
    power_off(guest, story)?;
    host.end()
}

/// A packet as large as the MTU goes to and fro in one piece.
fn jumbo(guest: &mut Guest, story: &mut Story) -> Result<()> {
    let mtu = run(guest, "cat /sys/class/net/eth0/mtu")?;
    ensure!(
        mtu == JUMBO_MTU.to_string(),
        "the guest's MTU is {mtu}, not {JUMBO_MTU}"
    );
    ping(guest, Network::HOST, JUMBO_PING, story)?;
    // Taken apart for an MTU of 1500 they would be 21. Address resolution and multicast reports send a few beside them.
    let sent = counters(guest)?;
    ping(guest, Network::HOST, JUMBO_PING, story)?;
    let frames = total(&counters(guest)?, "tx") - total(&sent, "tx");
    ensure!(
        (3..=11).contains(&frames),
        "three packets of {JUMBO_MTU} bytes went as {frames} frames"
    );
    Ok(())
}

/// The guest goes down to one queue pair and back to all.
fn pairs(guest: &mut Guest, options: &Options, story: &mut Story) -> Result<()> {
    for count in [1, options.queues] {
        run(guest, &format!("ethtool -L eth0 combined {count}"))?;
        let channels = run(guest, "ethtool -l eth0")?;
        let current = channels.rsplit("Combined:").next().unwrap_or_default();
        ensure!(
            current.trim() == count.to_string(),
            "ethtool -l eth0 after {count}: {channels}"
        );
        ping(guest, Network::HOST, 56, story)?;
    }
    story.tell("guest_pairs", &[("pairs", options.queues.into())]);
    Ok(())
}

fn vlan(guest: &mut Guest, host: &HostEnd, story: &mut Story) -> Result<()> {
    host.network.add_vlan(VLAN, VLAN_HOST)?;
    let name = format!("eth0.{VLAN}");
    run(
        guest,
        &format!("ip link add link eth0 name {name} type vlan id {VLAN}"),
    )?;
    run(guest, &format!("ip addr add {VLAN_GUEST}/24 dev {name}"))?;
    run(guest, &format!("ip link set {name} up"))?;
    ping(guest, VLAN_HOST, 56, story)
}

/// Every queue of the guest moves while a transfer runs on all of them.
fn all_pairs_work(guest: &mut Guest, options: &Options, story: &mut Story) -> Result<()> {
    let before = counters(guest)?;
    progress(guest, options, story)?;
    let after = counters(guest)?;
    for pair in 0..options.queues {
        for direction in ["rx", "tx"] {
            let moved = |counters: &[(String, u64)]| {
                let name = format!("{direction}_queue_{pair}_packets");
                counters
                    .iter()
                    .find(|(other, _)| *other == name)
                    .map(|(_, count)| *count)
                    .with_context(|| format!("ethtool -S eth0 has no {name}"))
            };
            let frames = moved(&after)? - moved(&before)?;
            ensure!(frames > 0, "nothing moves in {direction} queue {pair}");
            let fields = [
                ("queue", format!("{direction} {pair}").into()),
                ("frames", frames.into()),
            ];
            story.tell("queue_works", &fields);
        }
    }
    Ok(())
}

/// The cable is pulled and plugged in again by the daemon's monitor.
fn link(guest: &mut Guest, host: &HostEnd, story: &mut Story) -> Result<()> {
    let mut monitor = host.daemon.monitor()?;
    for up in [false, true] {
        guest.tell(&format!("carrier {}", u8::from(up)))?;
        monitor.execute("set_link", json!({"name": PORT, "up": up}))?;
        story.pass_on(&guest.expect("carrier")?);
    }
    ping(guest, Network::HOST, 56, story)
}

/// Three packets of that many bytes, none of which may be lost.
fn ping(guest: &mut Guest, host: Ipv4Addr, bytes: u16, story: &mut Story) -> Result<()> {
    let said = run(guest, &format!("ping -c 3 -i 0.2 -W 10 -s {bytes} {host}"))?;
    ensure!(said.contains(" 0% packet loss"), "ping {host}: {said}");
    let times = said.rsplit(" = ").next().unwrap_or_default();
    let fields = [
        ("host", host.to_string().into()),
        ("bytes", bytes.into()),
        ("round_trip", times.into()),
    ];
    story.tell("guest_pinged", &fields);
    Ok(())
}

/// Runs a program in the guest; what it said.
fn run(guest: &mut Guest, command: &str) -> Result<String> {
    let ran = guest.ask(&format!("run {command}"), "ran")?;
    let said = ran["output"].as_str().unwrap_or_default();
    if ran["status"] != 0 {
        bail!("'{command}' in the guest: status {}: {said}", ran["status"]);
    }
    Ok(said.to_owned())
}

/// The counters of the guest's card by name.
fn counters(guest: &mut Guest) -> Result<Vec<(String, u64)>> {
    let text = run(guest, "ethtool -S eth0")?;
    let lines = text.lines().filter_map(|line| line.split_once(": "));
    let counters = lines
        .filter_map(|(name, count)| Some((name.trim().to_owned(), count.trim().parse().ok()?)));
    Ok(counters.collect())
}

/// The packets of all queues in a direction.
fn total(counters: &[(String, u64)], direction: &str) -> u64 {
    counters
        .iter()
        .filter(|(name, _)| {
            name.starts_with(&format!("{direction}_queue_")) && name.ends_with("_packets")
        })
        .filter(|(name, _)| !name.contains("_xdp_"))
        .map(|(_, count)| count)
        .sum()
}
