//! QEMU guests whose cards the daemon carries: what only a real driver and a real network stack show.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use harness::net::guest::{Card, Guest, GuestPlan};
use harness::net::iperf::{IperfServer, received_bits_per_second};
use harness::net::namespace::Namespace;
use harness::net::rig::{NetRig, Plan};

use crate::or_skip;

/// Longest wait for a guest to boot, on a loaded machine.
const BOOT: Duration = Duration::from_secs(90);
/// Longest wait for one step of its script.
const STEP: Duration = Duration::from_secs(60);

/// A card on port `port` of the rig.
fn card(rig: &NetRig, port: usize) -> Card {
    Card::VhostUser {
        socket: rig.socket(port),
        queues: 1,
    }
}

fn plan(card: Card, station: u8, script: &str) -> GuestPlan {
    GuestPlan {
        card,
        station,
        address: format!("10.77.0.{station}/24"),
        mtu: None,
        script: script.to_owned(),
    }
}

/// The lines between `report NAME` and `done`, as one text.
fn report(lines: &[String], name: &str) -> Result<String> {
    let start = format!("report {name}");
    let text: Vec<&str> = lines
        .iter()
        .map(String::as_str)
        .skip_while(|line| *line != start)
        .skip(1)
        .take_while(|line| *line != "done")
        .collect();
    ensure!(
        !text.is_empty(),
        "no report {name} in:\n{}",
        lines.join("\n")
    );
    Ok(text.join("\n"))
}

#[test]
fn a_guest_on_a_tap_reaches_its_network() -> Result<()> {
    let network = or_skip!(Namespace::or_reason()?);
    network.tap("tap0", "10.77.0.1/24", "")?;
    let _server = IperfServer::start(&network)?;
    let tap = Plan::one("type=tap,ifname=tap0").inside(&network);
    let mut rig = NetRig::start(&tap)?;
    let script = "set -e
ping -c 3 -i 0.2 -W 5 10.77.0.1
ping -c 2 -s 1400 -W 5 10.77.0.1
iperf3 -c 10.77.0.1 -t 2 -J > /up
echo report up; cat /up; echo done
iperf3 -c 10.77.0.1 -t 2 -R -J > /down
echo report down; cat /down; echo done
ping -c 3 -W 5 10.77.0.1
";
    let guest = Guest::start(&plan(card(&rig, 0), 2, script), &network)?;
    let lines = guest.finish(BOOT + STEP)?;
    for name in ["up", "down"] {
        let rate = received_bits_per_second(&report(&lines, name)?).context(name)?;
        println!("{name}: {:.2} Gbit/s", rate / 1e9);
        ensure!(rate > 1e6, "{name}: {rate} bit/s");
    }
    ensure!(rig.daemon.stop()?.success(), "SIGTERM");
    Ok(())
}

#[test]
fn two_guests_talk_through_the_switch() -> Result<()> {
    let network = or_skip!(Namespace::or_reason()?);
    let switch = Plan::default()
        .netdev("type=switch")
        .port("netdev=n0")
        .port("netdev=n0")
        .inside(&network);
    let rig = NetRig::start(&switch)?;
    let serve = "iperf3 -s -1 --forceflush &
echo serving
wait $!
";
    let ask = "set -e
i=0; until ping -c 1 -W 1 10.77.0.2 >/dev/null; do i=$((i + 1)); [ $i -lt 30 ]; done
i=0; until iperf3 -c 10.77.0.2 -t 2 -J > /report; do i=$((i + 1)); [ $i -lt 20 ]; sleep 1; done
echo report across; cat /report; echo done
";
    let mut server = Guest::start(&plan(card(&rig, 0), 2, serve), &network)?;
    let client = Guest::start(&plan(card(&rig, 1), 3, ask), &network)?;
    server.line("serving", BOOT)?;
    let lines = client.finish(BOOT + STEP)?;
    let rate = received_bits_per_second(&report(&lines, "across")?)?;
    println!("across: {:.2} Gbit/s", rate / 1e9);
    ensure!(rate > 1e6, "{rate} bit/s");
    server.finish(STEP)?;
    Ok(())
}

/// Waits for an interval of iperf3 in which something came through.
fn moving_interval(guest: &mut Guest) -> Result<()> {
    loop {
        let interval = guest.line("[  5]", STEP)?;
        ensure!(
            !interval.ends_with("sender"),
            "the transfer ended too early"
        );
        if interval.contains("sec") && !interval.contains(" 0.00 bits/sec") {
            return Ok(());
        }
    }
}

#[test]
fn a_guest_of_qemu_goes_on_when_the_daemon_is_killed_in_mid_transfer() -> Result<()> {
    let network = or_skip!(Namespace::or_reason()?);
    network.tap("tap0", "10.77.0.1/24", "")?;
    let _server = IperfServer::start(&network)?;
    let tap = Plan::one("type=tap,ifname=tap0").inside(&network);
    let mut rig = NetRig::start(&tap)?;
    let script = "set -e
ping -c 2 -i 0.2 -W 5 10.77.0.1
iperf3 -c 10.77.0.1 -t 14 -i 0.5 --forceflush
ping -c 3 -W 5 10.77.0.1
echo reached
";
    let mut guest = Guest::start(&plan(card(&rig, 0), 2, script), &network)?;
    guest.line("[  5] local", BOOT)?;
    for _ in 0..3 {
        moving_interval(&mut guest)?;
        rig.kill_and_restart()?;
    }
    moving_interval(&mut guest)?;
    let lines = guest.finish(BOOT + STEP)?;
    ensure!(lines.iter().any(|line| line == "reached"), "no last ping");
    ensure!(rig.daemon.stop()?.success(), "SIGTERM");
    Ok(())
}
