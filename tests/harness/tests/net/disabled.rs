//! Rings that the front-end disables while the guest uses them (SET_VRING_ENABLE with 0).

use std::time::Duration;

use anyhow::{Result, ensure};
use harness::net::frames::{number_of, numbered};
use harness::net::rig::{NetRig, Plan};
use harness::net::{Header, NetDevice, Options};
use serde_json::{Value, json};

use crate::echo::LIMIT;
use crate::traffic::{ENDS, Traffic};

/// How long nothing has to happen; what does happen takes microseconds.
const SILENCE: Duration = Duration::from_millis(100);
/// Where the rings of the first pair are.
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// Frames sent at a time.
const FRAMES: u64 = 40;

/// Sends numbered frames and tells of them.
fn send(device: &mut NetDevice) -> Result<()> {
    let pair = &mut device.pairs[0];
    for number in 0..FRAMES {
        let frame = numbered(ENDS, number, 300);
        pair.tx.queue(Header::default(), &frame)?;
    }
    pair.tx.kick()
}

/// The port's only description of itself.
fn port(rig: &NetRig) -> Result<Value> {
    let mut ports = rig.monitor()?.execute("query-ports", json!({}))?;
    Ok(ports[0].take())
}

#[test]
fn frames_of_a_disabled_transmit_ring_are_dropped_and_come_back() -> Result<()> {
    let rig = NetRig::start(&Plan::one("echo"))?;
    let mut dropped = 0;
    for options in [Options::default(), Options::default().packed()] {
        let mut device = rig.connect(0, options)?;
        let traffic = Traffic::new(100, &[60, 1514]);
        traffic.echoed(&mut device.pairs[0], LIMIT)?;
        device.front_end.enable_ring(TRANSMIT, false)?;
        for _ in 0..2 {
            send(&mut device)?;
            let pair = &mut device.pairs[0];
            pair.tx.drain()?;
            let carried = pair.rx.frame_within(SILENCE)?;
            ensure!(carried.is_none(), "a disabled ring carries a frame");
            dropped += FRAMES;
            let port = port(&rig)?;
            let drops = &port["tx"]["drops"]["ring-disabled"];
            ensure!(*drops == json!(dropped), "{drops}, not {dropped}");
            let enabled = port["rings"].as_array().into_iter().flatten();
            let enabled: Vec<&Value> = enabled.map(|ring| &ring["enabled"]).take(2).collect();
            ensure!(enabled == [&json!(true), &json!(false)], "{enabled:?}");
        }
        device.front_end.enable_ring(TRANSMIT, true)?;
        traffic.echoed(&mut device.pairs[0], LIMIT)?;
    }
    Ok(())
}

#[test]
fn a_disabled_receive_ring_is_given_nothing_until_it_is_enabled() -> Result<()> {
    let rig = NetRig::start(&Plan::one("echo"))?;
    for options in [Options::default(), Options::default().packed()] {
        let mut device = rig.connect(0, options)?;
        let traffic = Traffic::new(100, &[60, 1514]);
        traffic.echoed(&mut device.pairs[0], LIMIT)?;
        device.front_end.enable_ring(RECEIVE, false)?;
        send(&mut device)?;
        let early = device.pairs[0].rx.frame_within(SILENCE)?;
        ensure!(early.is_none(), "a disabled ring is given a frame");
        device.front_end.enable_ring(RECEIVE, true)?;
        let pair = &mut device.pairs[0];
        for expected in 0..FRAMES {
            let number = number_of(&pair.rx.frame()?.frame)?;
            ensure!(number == expected, "{number}, not {expected}");
        }
        pair.tx.drain()?;
        traffic.echoed(pair, LIMIT)?;
    }
    Ok(())
}

#[test]
fn both_rings_disabled_drop_and_keep_silent_without_using_the_processor() -> Result<()> {
    let rig = NetRig::start(&Plan::one("echo"))?;
    let mut device = rig.connect(0, Options::default())?;
    let traffic = Traffic::new(100, &[60, 1514]);
    traffic.echoed(&mut device.pairs[0], LIMIT)?;
    for ring in [RECEIVE, TRANSMIT] {
        device.front_end.enable_ring(ring, false)?;
    }
    // The driver goes on with what it has: the daemon is woken by its kicks.
    for _ in 0..2 {
        send(&mut device)?;
        device.pairs[0].tx.drain()?;
        idle(&rig)?;
    }
    for ring in [TRANSMIT, RECEIVE] {
        device.front_end.enable_ring(ring, true)?;
    }
    traffic.echoed(&mut device.pairs[0], LIMIT)
}

#[test]
fn a_port_that_has_to_wait_with_a_frame_for_the_guest_uses_no_cpu() -> Result<()> {
    let rig = NetRig::start(&Plan::one("echo"))?;
    let mut device = rig.connect(0, Options::default())?;
    Traffic::new(100, &[60, 1514]).echoed(&mut device.pairs[0], LIMIT)?;
    let mut monitor = rig.monitor()?;
    let mut limit =
        |rate: Value| monitor.execute("set-port-rate", json!({"id": "p0", "rate-rx": rate}));
    limit(json!({"packets": 1, "packets-burst": 1}))?;
    send(&mut device)?;
    idle(&rig)?;
    limit(json!({}))?;
    let pair = &mut device.pairs[0];
    for expected in 0..FRAMES {
        let number = number_of(&pair.rx.frame()?.frame)?;
        ensure!(number == expected, "{number}, not {expected}");
    }
    pair.tx.drain()
}

/// The daemon does nothing.
fn idle(rig: &NetRig) -> Result<()> {
    let window = Duration::from_millis(500);
    let settling = Duration::from_millis(50);
    let used = rig.daemon.cpu_time_within(settling, window)?;
    ensure!(used <= window / 25, "{used:?} of CPU in {window:?}");
    Ok(())
}
