//! Rates that ports share.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use harness::net::frames::numbered;
use harness::net::rig::{NetRig, Plan};
use harness::net::{Header, NetDevice, Options, Pair, wait};
use serde_json::json;

use crate::traffic::ENDS;

/// Bytes of each frame.
const FRAME: usize = 1000;
/// Bytes that a full bucket holds.
const BURST: usize = 10 * FRAME;
/// How long a frame is not taken that has to wait; at the rate of the tests its turn would come after minutes.
const SILENCE: Duration = Duration::from_millis(100);

/// Sends a frame; whether it is taken.
fn taken(pair: &mut Pair) -> Result<bool> {
    pair.tx
        .queue(Header::default(), &numbered(ENDS, 0, FRAME))?;
    pair.tx.kick()?;
    let start = Instant::now();
    loop {
        if pair.tx.reap()? > 0 {
            return Ok(true);
        }
        let left = SILENCE.saturating_sub(start.elapsed());
        if left.is_zero() {
            return Ok(false);
        }
        wait(&pair.tx, &pair.rx, left)?;
    }
}

/// Sends frames from the two in turn until neither's is taken any more; how many were. A frame of each waits then.
fn taken_in_turn(one: &mut NetDevice, other: &mut NetDevice) -> Result<usize> {
    let mut count = 0;
    let devices = [one, other];
    while devices
        .iter()
        .all(|device| device.pairs[0].tx.outstanding() == 0)
    {
        ensure!(count < 10 * BURST / FRAME, "nothing limits them");
        let next = count % devices.len();
        count += usize::from(taken(&mut devices[next].pairs[0])?);
    }
    for device in devices {
        let waits = device.pairs[0].tx.outstanding() > 0 || !taken(&mut device.pairs[0])?;
        ensure!(waits, "one is held up and the other is not");
    }
    Ok(count)
}

#[test]
fn ports_of_a_group_share_its_bytes_and_a_change_frees_both() -> Result<()> {
    let slow = json!({"id": "shared", "bytes": 10, "bytes-burst": BURST});
    let fast = json!({"id": "shared", "bytes": 1_000_000_000, "bytes-burst": BURST});
    let plan = Plan::one("null")
        .with("rate-tx.group=shared")
        .port("netdev=n0")
        .with("rate-tx.group=shared")
        .port("netdev=n0")
        .group(&format!("shared,bytes=10,bytes-burst={BURST}"));
    let rig = NetRig::start(&plan)?;
    let connect = |port| rig.connect(port, Options::default());
    let (mut one, mut other, mut free) = (connect(0)?, connect(1)?, connect(2)?);
    let mut monitor = rig.monitor()?;
    // What the bucket holds, and the frame that puts it into debt.
    let expected = BURST / FRAME + 1;
    for round in 0..2 {
        let count = taken_in_turn(&mut one, &mut other)?;
        ensure!(count == expected, "round {round}: {count} frames");
        for _ in 0..3 * expected {
            ensure!(
                taken(&mut free.pairs[0])?,
                "a port without a limit is held up"
            );
        }
        monitor.execute("set-group-rate", fast.clone())?;
        one.pairs[0].tx.drain()?;
        other.pairs[0].tx.drain()?;
        // A limit that begins, begins with a full bucket.
        monitor.execute("set-group-rate", json!({"id": "shared"}))?;
        monitor.execute("set-group-rate", slow.clone())?;
    }
    ensure!(taken_in_turn(&mut one, &mut other)? == expected);
    monitor.execute("set-port-rate", json!({"id": "p0", "rate-tx": 0}))?;
    one.pairs[0].tx.drain()?;
    ensure!(taken(&mut one.pairs[0])?, "held up by a group that it left");
    ensure!(other.pairs[0].tx.reap()? == 0, "freed by another's leaving");
    Ok(())
}
