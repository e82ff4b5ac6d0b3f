//! What guests and operators change while frames flow: control queue, link, MTU, limits, guard, capture.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use harness::net::features::{STATUS_LINK_UP, bits};
use harness::net::frames::{EXPERIMENT, ethernet, number_of, numbered, station, tagged};
use harness::net::rig::{NetRig, Plan};
use harness::net::{Header, NetDevice, Options, command, mac_table};
use serde_json::json;

use crate::echo::LIMIT;
use crate::traffic::Traffic;

const MAC: &str = "52:54:00:00:00:01";
/// How long nothing has to arrive to have been dropped; what does arrive takes microseconds.
const SILENCE: Duration = Duration::from_millis(100);

fn rig() -> Result<NetRig> {
    NetRig::start(&Plan::one("type=echo").with(&format!("mac={MAC},mtu=9000")))
}

/// Sends a frame into `echo` and tells whether it comes back.
fn returns(device: &mut NetDevice, frame: &[u8]) -> Result<bool> {
    let pair = &mut device.pairs[0];
    pair.tx.send(frame)?;
    let Some(back) = pair.rx.frame_within(SILENCE)? else {
        return Ok(false);
    };
    ensure!(back.frame == frame, "another frame came back");
    Ok(true)
}

#[test]
fn the_device_says_what_it_was_told() -> Result<()> {
    let rig = rig()?;
    let device = rig.connect(0, Options::default())?;
    let config = device.front_end.config();
    ensure!(config.mac == station(1), "{config:x?}");
    ensure!(config.mtu == 9000, "{config:?}");
    ensure!(config.status & STATUS_LINK_UP != 0, "{config:?}");
    ensure!(config.max_pairs == 1, "{config:?}");
    Ok(())
}

#[test]
fn receive_filters_do_what_the_guest_asked() -> Result<()> {
    let rig = rig()?;
    let mut device = rig.connect(0, Options::default())?;
    let multicast = [1, 0, 0x5e, 0, 0, 1];
    let to = |mac| numbered((mac, station(9)), 5, 80);
    ensure!(device.control.is_some(), "no control queue");
    let set = |device: &mut NetDevice, command, data: &[u8]| {
        device
            .control
            .as_mut()
            .context("control queue")?
            .set(command, data)
    };
    set(&mut device, command::RX_PROMISC, &[0])?;
    set(&mut device, command::RX_ALLMULTI, &[0])?;
    ensure!(returns(&mut device, &to(station(1)))?, "its own address");
    ensure!(returns(&mut device, &to([0xff; 6]))?, "broadcast");
    ensure!(!returns(&mut device, &to(station(7)))?, "another's address");
    ensure!(!returns(&mut device, &to(multicast))?, "a strange group");
    set(
        &mut device,
        command::MAC_TABLE_SET,
        &mac_table(&[station(7)], &[multicast]),
    )?;
    ensure!(returns(&mut device, &to(station(7)))?, "a second address");
    ensure!(returns(&mut device, &to(multicast))?, "its group");
    set(&mut device, command::MAC_TABLE_SET, &mac_table(&[], &[]))?;
    ensure!(
        !returns(&mut device, &to(multicast))?,
        "a group that it left"
    );
    set(&mut device, command::RX_ALLMULTI, &[1])?;
    ensure!(returns(&mut device, &to(multicast))?, "all groups");
    set(&mut device, command::MAC_ADDR_SET, &station(8))?;
    ensure!(returns(&mut device, &to(station(8)))?, "its new address");
    ensure!(!returns(&mut device, &to(station(1)))?, "its old address");
    set(&mut device, command::RX_PROMISC, &[1])?;
    ensure!(returns(&mut device, &to(station(77)))?, "everything");
    Ok(())
}

#[test]
fn receive_filters_outlive_the_daemon_and_not_the_driver() -> Result<()> {
    for options in [Options::default(), Options::default().packed()] {
        let mut rig = rig()?;
        let mut device = rig.connect(0, options)?;
        let to = |mac| numbered((mac, station(9)), 5, 80);
        let control = device.control.as_mut().context("control queue")?;
        control.set(command::RX_PROMISC, &[0])?;
        control.set(command::MAC_TABLE_SET, &mac_table(&[station(7)], &[]))?;
        control.set(command::VLAN_ADD, &7_u16.to_le_bytes())?;
        for kills in [true, true, false] {
            match kills {
                true => rig.kill_and_restart()?,
                false => rig.restart()?,
            }
            device.reconnect()?;
            for (what, frame, expected) in [
                ("another's address", to(station(6)), false),
                ("a second address", to(station(7)), true),
                ("VLAN 8", tagged(&to(station(1)), 8), false),
                ("VLAN 7", tagged(&to(station(1)), 7), true),
            ] {
                ensure!(returns(&mut device, &frame)? == expected, "{what}");
            }
            // The queue goes on where it was.
            let control = device.control.as_mut().context("control queue")?;
            control.set(command::VLAN_ADD, &9_u16.to_le_bytes())?;
        }
        rig.kill_and_restart()?;
        device.reconnect()?;
        device.reset()?;
        ensure!(
            returns(&mut device, &to(station(6)))?,
            "a new driver hears all"
        );
        drop(device);
        rig.kill_and_restart()?;
        let mut device = rig.connect(0, Options::default())?;
        ensure!(
            returns(&mut device, &to(station(6)))?,
            "a new guest hears all"
        );
    }
    Ok(())
}

#[test]
fn only_vlans_that_the_guest_asked_for_arrive() -> Result<()> {
    let rig = rig()?;
    let mut device = rig.connect(0, Options::default())?;
    ensure!(
        device.front_end.features() & bits::CTRL_VLAN != 0,
        "no CTRL_VLAN"
    );
    let plain = numbered((station(1), station(9)), 5, 80);
    let set = |device: &mut NetDevice, command, id: u16| {
        let control = device.control.as_mut().context("control queue")?;
        control.set(command, &id.to_le_bytes())
    };
    // Who hears everything hears every VLAN.
    let control = device.control.as_mut().context("control queue")?;
    control.set(command::RX_PROMISC, &[0])?;
    ensure!(returns(&mut device, &plain)?, "untagged");
    set(&mut device, command::VLAN_ADD, 7)?;
    ensure!(returns(&mut device, &tagged(&plain, 7))?, "VLAN 7");
    ensure!(!returns(&mut device, &tagged(&plain, 8))?, "VLAN 8");
    set(&mut device, command::VLAN_DEL, 7)?;
    ensure!(!returns(&mut device, &tagged(&plain, 7))?, "VLAN 7, left");
    ensure!(returns(&mut device, &plain)?, "untagged, still");
    Ok(())
}

#[test]
fn wrong_commands_are_refused_and_change_nothing() -> Result<()> {
    let rig = rig()?;
    let mut device = rig.connect(0, Options::default())?;
    let control = device.control.as_mut().context("control queue")?;
    let mut long_table = 5_u32.to_le_bytes().to_vec();
    long_table.extend_from_slice(&station(3));
    for (what, body) in [
        ("unknown class", &[99, 0, 0][..]),
        ("unknown command", &[0, 99, 0]),
        ("no command", &[0]),
        ("no data", &[0, 0]),
        ("no pairs", &[4, 0, 0, 0]),
        ("too many pairs", &[4, 0, 2, 0]),
        ("a VLAN beyond 4094", &[2, 0, 0xff, 0xff]),
        ("half an address", &[1, 1, 1, 2, 3]),
        ("a group as its address", &[1, 1, 1, 0, 0x5e, 0, 0, 1]),
        (
            "offloads that were not negotiated",
            &[5, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0],
        ),
    ] {
        ensure!(!control.run_raw(body, &[2])?, "{what} was accepted");
    }
    let body = [&[1, 0][..], &long_table].concat();
    ensure!(!control.run_raw(&body, &[])?, "a table longer than itself");
    let huge = [&[1, 0][..], &1000_u32.to_le_bytes(), &[2; 6000], &[0; 4]].concat();
    ensure!(
        control.run_raw(&huge, &[2, 4, 1000]).is_ok(),
        "a huge table"
    );
    Traffic::new(50, &[64]).echoed(&mut device.pairs[0], LIMIT)
}

#[test]
fn a_cable_that_is_pulled_carries_nothing_and_the_guest_is_told() -> Result<()> {
    let rig = rig()?;
    let mut device = rig.connect(0, Options::default())?;
    let mut monitor = rig.monitor()?;
    let frame = numbered((station(1), station(9)), 5, 80);
    ensure!(returns(&mut device, &frame)?, "before");
    for (up, status) in [(false, 0), (true, STATUS_LINK_UP)] {
        monitor.execute("set_link", json!({"name": "p0", "up": up}))?;
        device.front_end.config_change(LIMIT)?;
        let config = device.front_end.refresh_config()?;
        ensure!(config.status & STATUS_LINK_UP == status, "{config:?}");
        ensure!(returns(&mut device, &frame)? == up, "link up: {up}");
    }
    Ok(())
}

#[test]
fn a_rate_limit_is_kept_and_changed_live() -> Result<()> {
    let rig = rig()?;
    let mut device = rig.connect(0, Options::default())?;
    let mut monitor = rig.monitor()?;
    // 200 frames of 1000 bytes in a second, and 20 at once.
    let rate = json!({"bytes": 200_000, "bytes-burst": 20_000});
    monitor.execute("set-port-rate", json!({"id": "p0", "rate-tx": rate}))?;
    let traffic = Traffic::new(120, &[1000]);
    let begun = Instant::now();
    traffic.echoed(&mut device.pairs[0], LIMIT)?;
    let took = begun.elapsed();
    println!("120 frames of 1000 bytes at 200 kB/s: {took:?}");
    ensure!(took > Duration::from_millis(350), "not limited: {took:?}");
    ensure!(took < Duration::from_secs(3), "limited to less: {took:?}");
    monitor.execute("set-port-rate", json!({"id": "p0", "rate-tx": 0}))?;
    let begun = Instant::now();
    traffic.echoed(&mut device.pairs[0], LIMIT)?;
    ensure!(
        begun.elapsed() < Duration::from_millis(350),
        "still limited"
    );
    Ok(())
}

#[test]
fn a_guard_keeps_strange_sources_in() -> Result<()> {
    let rig = rig()?;
    let mut device = rig.connect(0, Options::default())?;
    let mut monitor = rig.monitor()?;
    let own = numbered((station(1), station(1)), 5, 80);
    let strange = numbered((station(1), station(9)), 5, 80);
    ensure!(returns(&mut device, &strange)?, "before");
    let guard = json!({"mac": [MAC], "other-protocols": true});
    monitor.execute("set-port-guard", json!({"id": "p0", "guard": guard}))?;
    ensure!(returns(&mut device, &own)?, "its own address");
    ensure!(!returns(&mut device, &strange)?, "another's address");
    let ports = monitor.execute("query-ports", json!({}))?.to_string();
    ensure!(ports.contains("spoofed-mac"), "{ports}");
    Ok(())
}

#[test]
fn a_capture_is_read_by_tcpdump() -> Result<()> {
    let rig = rig()?;
    let mut device = rig.connect(0, Options::default())?;
    let mut monitor = rig.monitor()?;
    let path = rig.directory().join("frames.pcapng");
    monitor.execute("capture-start", json!({"id": "p0", "file": path}))?;
    let traffic = Traffic::new(20, &[100, 1000]);
    traffic.echoed(&mut device.pairs[0], LIMIT)?;
    monitor.execute("capture-stop", json!({"id": "p0"}))?;
    let files = std::fs::read_dir(rig.directory())?
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|kind| kind == "pcapng"));
    let mut lines = 0;
    for file in files {
        let output = Command::new("tcpdump")
            .args(["-n", "-e", "-r"])
            .arg(&file)
            .output()?;
        ensure!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let text = String::from_utf8(output.stdout)?;
        ensure!(text.contains("0x88b5"), "{text}");
        lines += text.lines().filter(|line| line.contains("0x88b5")).count();
    }
    // Each frame on its way out and on its way back.
    ensure!(lines == 40, "{lines} frames");
    Ok(())
}

#[test]
fn frames_longer_than_the_mtu_do_not_arrive() -> Result<()> {
    let plan = Plan::one("type=echo").with(&format!("mac={MAC},mtu=1500"));
    let rig = NetRig::start(&plan)?;
    let mut device = rig.connect(0, Options::default())?;
    ensure!(device.front_end.config().mtu == 1500, "MTU");
    let pair = &mut device.pairs[0];
    pair.tx.queue(
        Header::default(),
        &ethernet(station(1), station(2), EXPERIMENT, &[0; 1500]),
    )?;
    pair.tx.drain()?;
    ensure!(pair.rx.frame()?.frame.len() == 1514, "a frame of the MTU");
    let frame = numbered((station(1), station(2)), 1, 60);
    pair.tx.send(&frame)?;
    ensure!(number_of(&pair.rx.frame()?.frame)? == 1, "and one after it");
    Ok(())
}
