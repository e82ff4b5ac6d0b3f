//! Rings that the front-end disables while the guest uses them (SET_VRING_ENABLE with 0).

use std::time::Duration;

use anyhow::{Result, ensure};
use harness::net::frames::{number_of, numbered};
use harness::net::rig::{NetRig, Plan};
use harness::net::{Header, Options};

use crate::echo::LIMIT;
use crate::traffic::{ENDS, Traffic};

/// How long nothing has to happen; what does happen takes microseconds.
const SILENCE: Duration = Duration::from_millis(100);
/// Where the rings of the first pair are.
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

#[test]
fn frames_of_a_disabled_ring_wait_until_it_is_enabled() -> Result<()> {
    let rig = NetRig::start(&Plan::one("echo"))?;
    for options in [Options::default(), Options::default().packed()] {
        let mut device = rig.connect(0, options)?;
        let traffic = Traffic::new(100, &[60, 1514]);
        traffic.echoed(&mut device.pairs[0], LIMIT)?;
        for ring in [TRANSMIT, RECEIVE] {
            device.front_end.enable_ring(ring, false)?;
            let pair = &mut device.pairs[0];
            for number in 0..40 {
                let frame = numbered(ENDS, number, 300);
                pair.tx.queue(Header::default(), &frame)?;
            }
            pair.tx.kick()?;
            let early = pair.rx.frame_within(SILENCE)?;
            ensure!(early.is_none(), "ring {ring} carries a frame");
            device.front_end.enable_ring(ring, true)?;
            let pair = &mut device.pairs[0];
            for expected in 0..40 {
                let number = number_of(&pair.rx.frame()?.frame)?;
                ensure!(number == expected, "ring {ring}: {number}, not {expected}");
            }
            pair.tx.drain()?;
        }
        traffic.echoed(&mut device.pairs[0], LIMIT)?;
    }
    Ok(())
}
