//! Frames through `echo` and into `null`: contents, order, lengths, headers, ring layouts.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use harness::net::features::{self, GSO_TCPV4, NEEDS_CSUM, bits, ring_bits};
use harness::net::frames::{Flow, TCP_AT, number_of, station, tcp};
use harness::net::rig::{NetRig, Plan};
use harness::net::{DirtyLog, Header, Options};

use crate::traffic::Traffic;

pub(crate) const LIMIT: Duration = Duration::from_secs(30);

/// From the shortest Ethernet frame to more than one mergeable buffer.
const LENGTHS: [usize; 12] = [
    22, 60, 64, 191, 192, 193, 1514, 2035, 2036, 2037, 4096, 9014,
];

/// Every ring layout and way to offer buffers.
fn shapes() -> Vec<(&'static str, Options)> {
    let all = Options::default();
    let apart = Options {
        rx_cuts: vec![12],
        ..all.clone()
    };
    let small = Options {
        rx_buffer_bytes: 200,
        rx_cuts: vec![5, 9, 40],
        ..all.clone()
    };
    let short_ring = Options {
        queue_size: 8,
        ..all.clone()
    };
    let no_events = ring_bits::RING_EVENT_IDX;
    let no_tables = ring_bits::RING_INDIRECT_DESC;
    vec![
        ("split", all.clone()),
        ("packed", all.clone().packed()),
        ("out of order", all.clone().without(ring_bits::IN_ORDER)),
        (
            "packed out of order",
            all.clone().packed().without(ring_bits::IN_ORDER),
        ),
        ("flags", all.clone().without(no_events)),
        ("packed flags", all.clone().packed().without(no_events)),
        ("no tables", all.clone().without(no_tables)),
        ("packed, no tables", all.clone().packed().without(no_tables)),
        ("whole buffers", all.clone().without(bits::MRG_RXBUF)),
        (
            "packed whole buffers",
            all.packed().without(bits::MRG_RXBUF),
        ),
        ("header apart", apart),
        ("many small buffers", small.clone()),
        ("packed, many small buffers", small.packed()),
        ("short ring", short_ring.clone()),
        ("packed short ring", short_ring.packed()),
    ]
}

#[test]
fn frames_come_back_whole_and_in_order() -> Result<()> {
    let rig = NetRig::start(&Plan::one("type=echo"))?;
    for (name, options) in shapes() {
        let mut device = rig.connect(0, options.clone()).context(name)?;
        let mut traffic = Traffic::new(400, &LENGTHS);
        if options.queue_size < 256 {
            // As many frames as buffers hold.
            traffic.window = 1;
        }
        traffic.cuts = vec![
            vec![],
            vec![12],
            vec![12, 10],
            vec![1, 1, 1, 1],
            vec![4, 8, 14, 100],
            vec![12, 191, 1, 1],
        ];
        if options.queue_size < 256 {
            traffic.cuts.truncate(3);
        }
        traffic.echoed(&mut device.pairs[0], LIMIT).context(name)?;
        for ring in 0..2 {
            device.front_end.stop_ring(ring).context(name)?;
        }
    }
    Ok(())
}

#[test]
fn the_longest_frames_come_back() -> Result<()> {
    let rig = NetRig::start(&Plan::one("type=echo"))?;
    let offloads = Options::default().with(features::OFFLOADS);
    for (name, options) in [
        ("split", offloads.clone()),
        ("packed", offloads.clone().packed()),
        ("whole", offloads.without(bits::MRG_RXBUF)),
    ] {
        let mut device = rig.connect(0, options).context(name)?;
        let mut traffic = Traffic::new(60, &[65_535, 65_549, 16_384, 40_000]);
        traffic.window = 2;
        traffic.cuts = vec![vec![], vec![12], vec![12, 14, 40_00], vec![4096; 3]];
        traffic.echoed(&mut device.pairs[0], LIMIT).context(name)?;
    }
    Ok(())
}

/// A TCP packet of several segments, between two stations.
pub(crate) fn large_segment(payload: usize) -> (Flow, Header, Vec<u8>) {
    let flow = Flow {
        macs: (station(1), station(2)),
        addresses: ([10, 77, 0, 1], [10, 77, 0, 2]),
        ports: (1000, 2000),
    };
    let bytes: Vec<u8> = (0..payload).map(|at| (at % 251) as u8).collect();
    let header = Header {
        flags: NEEDS_CSUM,
        gso_type: GSO_TCPV4,
        hdr_len: (TCP_AT + 20) as u16,
        gso_size: 1448,
        csum_start: TCP_AT as u16,
        csum_offset: 16,
        num_buffers: 0,
    };
    (flow, header, tcp(&flow, 1, &bytes))
}

#[test]
fn a_frame_of_one_buffer_says_so_without_mergeable_buffers() -> Result<()> {
    let rig = NetRig::start(&Plan::one("type=echo"))?;
    let mut device = rig.connect(0, Options::default().without(bits::MRG_RXBUF))?;
    let pair = &mut device.pairs[0];
    pair.tx.send(&Traffic::new(1, &[100]).frame(0))?;
    // Virtio 1.2, section 5.1.6.4.1: "the device MUST set num_buffers to 1".
    ensure!(pair.rx.frame()?.header.num_buffers == 1, "num_buffers");
    Ok(())
}

#[test]
fn null_takes_every_frame() -> Result<()> {
    let rig = NetRig::start(&Plan::one("type=null"))?;
    for options in [Options::default(), Options::default().packed()] {
        let mut device = rig.connect(0, options)?;
        let traffic = Traffic::new(3000, &LENGTHS);
        let tx = &mut device.pairs[0].tx;
        for number in 0..traffic.frames {
            if !tx.has_room(1) {
                tx.drain()?;
            }
            tx.queue(Header::default(), &traffic.frame(number))?;
        }
        tx.drain()?;
        let nothing = device.pairs[0].rx.frame_within(Duration::from_millis(50))?;
        ensure!(nothing.is_none(), "a frame out of nothing");
    }
    Ok(())
}

#[test]
fn each_pair_echoes_its_own_frames() -> Result<()> {
    let rig = NetRig::start(&Plan::one("type=echo").with("queues=4"))?;
    let mut device = rig.connect(0, Options::default().pairs(4))?;
    if let Some(control) = &mut device.control {
        control.set(harness::net::command::MQ_VQ_PAIRS_SET, &4_u16.to_le_bytes())?;
    }
    for (number, pair) in device.pairs.iter_mut().enumerate() {
        let traffic = Traffic::new(300, &[64, 1514]);
        traffic
            .echoed(pair, LIMIT)
            .with_context(|| format!("pair {number}"))?;
    }
    Ok(())
}

#[test]
fn frames_that_find_no_buffer_do_not_hurt_those_that_do() -> Result<()> {
    let rig = NetRig::start(&Plan::one("type=echo"))?;
    let mut device = rig.negotiate(0, Options::default())?;
    // No receive buffer for a while.
    device.front_end.start()?;
    let pair = &mut device.pairs[0];
    let traffic = Traffic::new(100, &[200]);
    for number in 0..100 {
        pair.tx.queue(Header::default(), &traffic.frame(number))?;
    }
    pair.tx.kick()?;
    // Whether they wait or are dropped is the back-end's choice; what arrives is in order, and the last one does.
    let mut last = None;
    pair.rx.fill()?;
    for number in 100.. {
        while let Some(received) = pair.rx.frame_within(Duration::from_millis(20))? {
            let got = number_of(&received.frame)?;
            ensure!(last < Some(got), "{got} after {last:?}");
            last = Some(got);
        }
        if last >= Some(100) {
            break;
        }
        ensure!(number < 1000, "nothing arrives: {last:?}");
        pair.tx.reap()?;
        if pair.tx.has_room(1) {
            pair.tx.queue(Header::default(), &traffic.frame(number))?;
            pair.tx.kick()?;
        }
    }
    Ok(())
}

#[test]
fn the_dirty_log_has_every_page_that_was_written() -> Result<()> {
    let rig = NetRig::start(&Plan::one("type=echo"))?;
    for options in [Options::default(), Options::default().packed()] {
        let mut device = rig.connect(0, options)?;
        let traffic = Traffic::new(40, &[64, 1514, 9014]);
        traffic.echoed(&mut device.pairs[0], LIMIT)?;
        let log = device.front_end.start_log()?;
        // Rings may be written at any time: what they want to hear of is in them.
        let buffers = device.front_end.regions()[1].gpa / 4096;
        let of_frames = |log: &DirtyLog| -> Result<BTreeSet<u64>> {
            Ok(log
                .pages()?
                .into_iter()
                .filter(|page| *page >= buffers)
                .collect())
        };
        ensure!(of_frames(&log)?.is_empty(), "dirty before a frame came");
        device.pairs[0].rx.take_written_pages();
        traffic.echoed(&mut device.pairs[0], LIMIT)?;
        let written = device.pairs[0].rx.take_written_pages();
        let logged = of_frames(&log)?;
        let missing: Vec<_> = written.difference(&logged).collect();
        ensure!(
            missing.is_empty(),
            "written, not logged: pages {missing:x?}"
        );
        device.front_end.stop_log()?;
        log.clear()?;
        traffic.echoed(&mut device.pairs[0], LIMIT)?;
        ensure!(of_frames(&log)?.is_empty(), "logged after logging ended");
    }
    Ok(())
}
