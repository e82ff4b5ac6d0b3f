//! The daemon is killed in the middle of traffic, again and again; its guest notices a pause.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use harness::net::features::ring_bits;
use harness::net::frames::number_of;
use harness::net::rig::{NetRig, Plan};
use harness::net::{Header, Options, wait};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::echo::LIMIT;
use crate::traffic::Traffic;

const KILLS: usize = 50;
/// Most frames between two kills.
const FRAMES: u64 = 400;
/// Frames on their way at most.
const WINDOW: u64 = 64;
/// Frames that the daemon handles together at most. What the guest has received and not yet got back as sent when the daemon dies
/// is sent again by its successor: two rings cannot change in one moment.
const BURST: u64 = 32;

/// What kills did.
#[derive(Debug, Default)]
struct Toll {
    repeated: u64,
    pauses: Vec<Duration>,
}

/// Sends numbered frames into `echo` and kills the daemon at random moments. Every frame comes back, whole and in order; once, but
/// for at most a burst that a kill repeats; and traffic goes on by itself.
fn survives(options: Options, seed: u64) -> Result<()> {
    println!("seed {seed}");
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut rig = NetRig::start(&Plan::one("type=echo"))?;
    let mut device = rig.connect(0, options)?;
    let traffic = Traffic::new(u64::MAX, &[64, 300, 1514, 4000]);
    let mut toll = Toll::default();
    // The next number to send, and the one that should come back next.
    let (mut sent, mut next) = (0_u64, 0_u64);
    for kill in 0..=KILLS {
        let target = next + rng.random_range(1..FRAMES);
        let begun = Instant::now();
        let mut first = kill > 0;
        while next < target {
            let pair = &mut device.pairs[0];
            while sent < next + WINDOW && pair.tx.has_room(1) {
                pair.tx.queue(Header::default(), &traffic.frame(sent))?;
                sent += 1;
            }
            pair.tx.kick()?;
            let mut progress = pair.tx.reap()? > 0;
            while let Some(received) = pair.rx.try_frame()? {
                progress = true;
                let number = number_of(&received.frame).with_context(|| format!("kill {kill}"))?;
                if first {
                    toll.pauses.push(begun.elapsed());
                    ensure!(
                        number + BURST >= next && number <= next,
                        "frame {number} came after kill {kill}, {next} was due"
                    );
                    toll.repeated += next - number;
                    first = false;
                } else {
                    ensure!(number == next, "frame {number} came instead of {next}");
                }
                next = number + 1;
            }
            pair.rx.fill()?;
            ensure!(
                begun.elapsed() < LIMIT,
                "stuck after kill {kill} at {next} of {sent}"
            );
            if !progress {
                wait(&pair.tx, &pair.rx, Duration::from_millis(100))?;
            }
        }
        if kill < KILLS {
            rig.kill_and_restart()?;
            // What was there before the kill is not repeated.
            while let Some(received) = device.pairs[0].rx.try_frame()? {
                let number = number_of(&received.frame)?;
                ensure!(number == next, "frame {number} came instead of {next}");
                next = number + 1;
            }
            device
                .reconnect()
                .with_context(|| format!("after kill {kill}"))?;
        }
    }
    ensure!(rig.daemon.stop()?.success(), "SIGTERM");
    toll.pauses.sort_unstable();
    println!(
        "{KILLS} kills, {sent} frames: {} repeated, longest pause {:?}",
        toll.repeated,
        toll.pauses.last()
    );
    Ok(())
}

#[test]
fn traffic_goes_on_after_kills() -> Result<()> {
    survives(Options::default(), 1)
}

#[test]
fn traffic_goes_on_after_kills_with_packed_rings() -> Result<()> {
    survives(Options::default().packed(), 2)
}

#[test]
fn traffic_goes_on_after_kills_with_small_buffers() -> Result<()> {
    let options = Options {
        rx_buffer_bytes: 512,
        ..Options::default().without(ring_bits::IN_ORDER)
    };
    survives(options, 3)
}

#[test]
fn a_front_end_that_comes_back_finds_its_rings() -> Result<()> {
    let rig = NetRig::start(&Plan::one("type=echo"))?;
    for options in [Options::default(), Options::default().packed()] {
        let mut device = rig.connect(0, options)?;
        let traffic = Traffic::new(100, &[64, 1514]);
        for _ in 0..5 {
            traffic.echoed(&mut device.pairs[0], LIMIT)?;
            device.front_end.disconnect();
            device.reconnect()?;
        }
        traffic.echoed(&mut device.pairs[0], LIMIT)?;
    }
    Ok(())
}

#[test]
fn a_reset_device_starts_afresh() -> Result<()> {
    let rig = NetRig::start(&Plan::one("type=echo"))?;
    for options in [Options::default(), Options::default().packed()] {
        let mut device = rig.connect(0, options)?;
        let traffic = Traffic::new(100, &[64, 1514]);
        for _ in 0..3 {
            traffic.echoed(&mut device.pairs[0], LIMIT)?;
            device.reset()?;
        }
        traffic.echoed(&mut device.pairs[0], LIMIT)?;
    }
    Ok(())
}

#[test]
fn a_stopped_ring_goes_on_where_it_was() -> Result<()> {
    let rig = NetRig::start(&Plan::one("type=echo"))?;
    for options in [Options::default(), Options::default().packed()] {
        let mut device = rig.connect(0, options)?;
        let traffic = Traffic::new(100, &[64, 1514]);
        for _ in 0..5 {
            traffic.echoed(&mut device.pairs[0], LIMIT)?;
            for ring in 0..2 {
                device.front_end.stop_ring(ring)?;
            }
            for ring in 0..2 {
                device.front_end.start_ring(ring)?;
            }
        }
    }
    Ok(())
}
