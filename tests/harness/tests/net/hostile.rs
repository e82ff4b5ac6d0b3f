//! A hostile guest or VMM harms nobody but itself: the daemon lives on, and a port beside it carries its frames.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, ensure};
use harness::driver::Endpoint;
use harness::fuzz_frontend::{RingAttack, attack_messages, attack_ring, truncated_messages};
use harness::net::features::{self, GSO_TCPV4, GSO_UDP_L4, NEEDS_CSUM, bits, ring_bits};
use harness::net::rig::{NetRig, Plan};
use harness::net::{Header, NetDevice, Options};
use harness::process::PATIENCE;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::echo::{LIMIT, large_segment};
use crate::traffic::Traffic;

/// A daemon with a port that is attacked, and a neighbour that is in use all the time.
struct Street {
    rig: NetRig,
    neighbour: NetDevice,
}

impl Street {
    fn new() -> Result<Self> {
        Self::with("type=echo")
    }

    fn with(netdev: &str) -> Result<Self> {
        let plan = Plan::default()
            .netdev(netdev)
            .netdev("type=echo")
            .port("netdev=n0")
            .port("netdev=n1");
        let rig = NetRig::start(&plan)?;
        let neighbour = rig.connect(1, Options::default())?;
        Ok(Self { rig, neighbour })
    }

    fn is_unharmed(&mut self) -> Result<()> {
        ensure!(
            self.rig.daemon.is_running(),
            "the daemon ended:\n{}",
            self.rig.daemon.stderr()
        );
        let traffic = Traffic::new(20, &[64, 1514]);
        traffic
            .echoed(&mut self.neighbour.pairs[0], LIMIT)
            .context("the neighbour")
    }

    /// The attacked port serves the next guest.
    fn serves_again(&self) -> Result<()> {
        let mut device = self.rig.connect(0, Options::default())?;
        let traffic = Traffic::new(20, &[64, 1514]);
        traffic.echoed(&mut device.pairs[0], LIMIT)
    }
}

#[test]
fn malformed_rings_harm_nobody() -> Result<()> {
    let mut street = Street::new()?;
    for seed in 0..1 {
        for attack in RingAttack::ALL {
            for ring in 0..3 {
                let what = || format!("{attack:?} on ring {ring} with seed {seed}");
                let mut device = street.rig.connect(0, Options::default())?;
                attack_ring(&mut device.front_end, ring, attack, seed).with_context(what)?;
                drop(device);
                street.is_unharmed().with_context(what)?;
            }
        }
    }
    street.serves_again()
}

#[test]
fn malformed_packed_rings_harm_nobody() -> Result<()> {
    let mut street = Street::new()?;
    for seed in 0..25 {
        let mut rng = SmallRng::seed_from_u64(seed);
        let device = street.rig.connect(0, Options::default().packed())?;
        let front_end = &device.front_end;
        let gpa = front_end.regions()[1].gpa;
        for ring in 0..3 {
            let (parts, entries) = front_end.ring(ring);
            let at = parts.descriptors.offset;
            let region = &parts.descriptors.region;
            for index in 0..usize::from(entries) {
                let place = at + index * 16;
                // Mostly plausible addresses and lengths, available in this lap, chained and indirect at random.
                let address = match rng.random_range(0..8) {
                    0 => rng.random(),
                    1 => region.gpa + at as u64,
                    _ => gpa + rng.random_range(0..100_000),
                };
                region.store(place, address, Ordering::Relaxed);
                let bytes = match rng.random_range(0..6) {
                    0 => rng.random(),
                    _ => rng.random_range(0..20_000_u32),
                };
                region.store(place + 8, bytes, Ordering::Relaxed);
                region.store(place + 12, rng.random::<u16>(), Ordering::Relaxed);
                let flags = 0x80 | rng.random_range(0..8_u16);
                region.store(place + 14, flags, Ordering::Release);
            }
            front_end.kick(ring)?;
        }
        drop(device);
        street
            .is_unharmed()
            .with_context(|| format!("seed {seed}"))?;
    }
    street.serves_again()
}

#[test]
fn malformed_messages_harm_nobody() -> Result<()> {
    use std::io::Write;
    let mut street = Street::new()?;
    for seed in 0..60 {
        let mut rng = SmallRng::seed_from_u64(seed);
        let socket = Endpoint::Connect(street.rig.socket(0)).open(PATIENCE)?;
        attack_messages(&socket, &mut rng, 60)?;
        drop(socket);
        street
            .is_unharmed()
            .with_context(|| format!("seed {seed}"))?;
    }
    for bytes in truncated_messages() {
        let mut socket = Endpoint::Connect(street.rig.socket(0)).open(PATIENCE)?;
        // The daemon may hang up in the middle of it.
        let _ = socket.write_all(&bytes);
        drop(socket);
        street.is_unharmed()?;
    }
    street.serves_again()
}

#[test]
fn frames_that_are_none_are_dropped_and_others_pass() -> Result<()> {
    let mut street = Street::new()?;
    for options in [Options::default(), Options::default().packed()] {
        let options = options.with(features::OFFLOADS);
        let mut device = street.rig.connect(0, options)?;
        let (_, header, large) = large_segment(5000);
        let good = Traffic::new(1, &[100]).frame(0);
        let with = |header: Header, frame: &[u8]| [&header.encode()[..], frame].concat();
        let beyond = Header {
            csum_start: 60_000,
            ..header
        };
        let no_size = Header {
            gso_size: 0,
            ..header
        };
        let no_sum = Header { flags: 0, ..header };
        let unknown = Header {
            gso_type: 77,
            ..header
        };
        let on_nothing = Header {
            flags: NEEDS_CSUM,
            gso_type: GSO_UDP_L4,
            gso_size: 1,
            ..Header::default()
        };
        let tiny = Header {
            gso_type: GSO_TCPV4,
            gso_size: 1,
            ..header
        };
        let cases: [(&str, Vec<u8>); 11] = [
            ("one byte", vec![0]),
            ("half a header", vec![0; 7]),
            ("a header", vec![0; 12]),
            ("a header and a byte", vec![0; 13]),
            ("a runt", with(Header::default(), &good[..13])),
            (
                "longer than any frame",
                with(Header::default(), &vec![2; 68_000]),
            ),
            ("a checksum beyond the frame", with(beyond, &large)),
            ("segments of nothing", with(no_size, &large)),
            ("segments without a checksum", with(no_sum, &large)),
            ("an unknown segmentation", with(unknown, &large)),
            ("segmentation of what is no IP", with(on_nothing, &good)),
        ];
        let pair = &mut device.pairs[0];
        for (what, bytes) in cases {
            pair.tx.queue_raw(&bytes, &[]).context(what)?;
            pair.tx.drain().context(what)?;
            pair.tx.queue(Header::default(), &good)?;
            pair.tx.drain().context(what)?;
            // What is no frame does not come back, and does not keep the next one. Segmentation of what is no IP is for whoever
            // segments; a device that only hands frames on may return it.
            let mut back = pair.rx.frame().context(what)?;
            if what == "segmentation of what is no IP" && back.header.gso_type == GSO_UDP_L4 {
                back = pair.rx.frame().context(what)?;
            }
            ensure!(back.frame == good, "{what} came back");
        }
        // Work for 5000 segments of a byte each.
        pair.tx.queue(tiny, &large)?;
        pair.tx.drain()?;
        drop(device);
        street.is_unharmed()?;
    }
    Ok(())
}

#[test]
fn receive_buffers_that_are_too_small_harm_nobody() -> Result<()> {
    let mut street = Street::new()?;
    for (bytes, mergeable) in [
        (1, true),
        (11, true),
        (12, true),
        (13, true),
        (12, false),
        (100, false),
    ] {
        let mut options = Options::default();
        if !mergeable {
            options = options.without(bits::MRG_RXBUF);
        }
        options.rx_buffer_bytes = bytes;
        let mut device = street.rig.connect(0, options)?;
        let traffic = Traffic::new(40, &[64, 1514]);
        for number in 0..traffic.frames {
            device.pairs[0]
                .tx
                .queue(Header::default(), &traffic.frame(number))?;
        }
        device.pairs[0].tx.kick()?;
        street
            .is_unharmed()
            .with_context(|| format!("{bytes} bytes"))?;
        drop(device);
        street
            .serves_again()
            .with_context(|| format!("{bytes} bytes"))?;
    }
    Ok(())
}

#[test]
fn frames_that_change_while_they_are_read_harm_nobody() -> Result<()> {
    for netdev in ["type=echo", "type=null"] {
        let mut street = Street::with(netdev)?;
        let options = Options::default().with(features::OFFLOADS);
        let mut device = street.rig.connect(0, options)?;
        let buffers = device.front_end.regions()[1].clone();
        let stop = Arc::new(AtomicBool::new(false));
        let seen = stop.clone();
        let mutator = std::thread::spawn(move || {
            let mut rng = SmallRng::seed_from_u64(7);
            while !seen.load(Ordering::Relaxed) {
                for _ in 0..64 {
                    let at = rng.random_range(0..buffers.bytes() - 1);
                    // Headers of frames most of all.
                    let at = if rng.random() { at } else { at & !0xfff };
                    buffers.write(at, &[rng.random()]);
                }
                std::thread::yield_now();
            }
        });
        let (_, header, large) = large_segment(3000);
        for _ in 0..3000 {
            let pair = &mut device.pairs[0];
            if pair.tx.has_room(2) {
                pair.tx.queue_cut(header, &large, &[12])?;
            }
            pair.tx.kick()?;
            // Buffers are given back unread: what is in them means nothing.
            if pair.tx.reap().is_err() || pair.rx.discard().is_err() {
                break;
            }
        }
        stop.store(true, Ordering::Relaxed);
        mutator.join().expect("the mutator does not panic");
        drop(device);
        street.is_unharmed()?;
    }
    Ok(())
}

#[test]
fn features_that_were_not_offered_are_refused() -> Result<()> {
    let mut street = Street::new()?;
    for features in [u64::MAX, 1 << 60, ring_bits::VERSION_1 | 1 << 27] {
        let mut device = street.rig.negotiate(0, Options::default())?;
        let refused = device.front_end.start_with(features).is_err();
        ensure!(refused, "features {features:#x} were accepted");
        drop(device);
        street.is_unharmed()?;
    }
    street.serves_again()
}
