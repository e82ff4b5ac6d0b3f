//! The control queue: what the driver says takes effect before it is answered.

use std::sync::Arc;

use super::guest::{BackEnd, Guest, LAYOUTS, Layout, MAC, notified, options};
use super::probe::{Control, Event, Events, Probe};
use crate::frame::VnetHeader;
use crate::link::{Delivery, DropReason, Offloads};
use crate::port::PortOptions;

/// CTRL_VQ, CTRL_RX, CTRL_VLAN, CTRL_RX_EXTRA, GUEST_ANNOUNCE, CTRL_MAC_ADDR, CTRL_GUEST_OFFLOADS.
const CONTROL: u64 = 1 << 17 | 1 << 18 | 1 << 19 | 1 << 20 | 1 << 21 | 1 << 23 | 1 << 2;
const MQ: u64 = 1 << 22;
const GUEST_CSUM: u64 = 1 << 1;
const GUEST_TSO4: u64 = 1 << 7;
const OK: u8 = 0;
const ERR: u8 = 1;

fn start(pairs: u16) -> (BackEnd, Arc<Control>, Events) {
    let (control, events) = Control::new();
    let its_control = control.clone();
    let back_end = BackEnd::start(options(pairs), move || Probe(its_control));
    (back_end, control, events)
}

/// Which queues are connected, after everything that happened.
fn connected(events: &Events, before: &mut [bool]) {
    for event in events.all() {
        match event {
            Event::Connected(pair) => before[usize::from(pair)] = true,
            Event::Disconnected(pair) => before[usize::from(pair)] = false,
            _ => {}
        }
    }
}

#[test]
fn only_the_pairs_that_the_driver_uses_are_connected() {
    for layout in LAYOUTS {
        let (back_end, _control, events) = start(3);
        let mut guest = Guest::start(&back_end, layout, CONTROL | MQ, 7);
        let mut pairs = [false; 3];
        connected(&events, &mut pairs);
        assert_eq!(pairs, [true, false, false]);
        assert_eq!(guest.command(&[4, 0, 3, 0]), OK);
        connected(&events, &mut pairs);
        assert_eq!(pairs, [true; 3]);
        assert_eq!(guest.command(&[4, 0, 2, 0]), OK);
        connected(&events, &mut pairs);
        assert_eq!(pairs, [true, true, false]);
        let state = back_end.with(|port| async move { port.state() });
        assert_eq!(state.pairs, 2);
        for wrong in [0, 4] {
            assert_eq!(guest.command(&[4, 0, wrong, 0]), ERR);
        }
        back_end.stop();
    }
}

#[test]
fn a_successor_serves_the_pairs_whose_rings_are_filled() {
    for layout in LAYOUTS {
        let (mut back_end, _control, _events) = start(3);
        let mut guest = Guest::start(&back_end, layout, CONTROL | MQ, 7);
        assert_eq!(guest.command(&[4, 0, 2, 0]), OK);
        for ring in [0, 2] {
            guest.rings[ring].offer(0, 1024);
        }
        back_end.kill();
        let (control, events) = Control::new();
        let its_control = control.clone();
        let successor = back_end.succeeded(options(3), move || Probe(its_control));
        guest.reconnect(&successor);
        // The control queue runs: one command more, which changes nothing.
        assert_eq!(guest.command(&[0, 0, 1]), OK);
        let mut pairs = [false; 3];
        connected(&events, &mut pairs);
        assert_eq!(pairs, [true, true, false], "{layout:?}");
        // The driver begins to use the third.
        guest.rings[4].offer(0, 1024);
        control.give(2, VnetHeader::default(), &[7; 60]);
        assert_eq!(guest.rings[4].receive().1, [7; 60]);
        successor.stop();
    }
}

/// What becomes of a frame to `to`, with a VLAN tag or none.
fn given(control: &Control, events: &Events, to: [u8; 6], tag: &[u8]) -> Delivery {
    let frame = [&to, [2; 6].as_slice(), tag, &[0x88, 0xb5], &[0; 50]].concat();
    control.give(0, VnetHeader::default(), &frame);
    events.given()
}

/// A driver that wants little of what it could have.
fn modest(guest: &mut Guest) {
    let offloads = [&[5, 0], GUEST_CSUM.to_le_bytes().as_slice()].concat();
    let table = [&[1, 0, 1, 0, 0, 0], OTHER.as_slice(), &[0; 4]].concat();
    let commands: [&[u8]; 6] = [
        &[4, 0, 2, 0],
        &[0, 0, 0],
        &table,
        &[2, 0, 7, 0],
        &offloads,
        // Changes nothing, and is answered.
        &[4, 0, 9, 0],
    ];
    let answers = commands.map(|command| guest.command(command));
    assert_eq!(answers, [OK, OK, OK, OK, OK, ERR]);
}

const OTHER: [u8; 6] = [0x52, 0x54, 0, 0, 0, 9];
const FILTERED: Delivery = Delivery::Dropped(DropReason::Filtered);
const VLAN_7: &[u8] = &[0x81, 0, 0, 7];
const VLAN_8: &[u8] = &[0x81, 0, 0, 8];

#[test]
fn a_successor_goes_by_what_the_driver_said_to_the_one_that_was_killed() {
    let dir = tempfile::tempdir().unwrap();
    for layout in LAYOUTS {
        let options = PortOptions {
            kept: Some(dir.path().join(format!("{layout:?}"))),
            ..options(3)
        };
        let (control, _events) = Control::new();
        let mut back_end = BackEnd::start(options.clone(), move || Probe(control));
        let features = CONTROL | MQ | GUEST_CSUM | GUEST_TSO4;
        let mut guest = Guest::start(&back_end, layout, features, 7);
        modest(&mut guest);
        for id in 0..16 {
            guest.rings[0].offer(id, 1024);
        }
        for _ in 0..2 {
            back_end.kill();
            let (control, events) = Control::new();
            let its_control = control.clone();
            back_end = back_end.succeeded(options.clone(), move || Probe(its_control));
            guest.reconnect(&back_end);
            let seen = events.all();
            let csum = Offloads {
                csum: true,
                ..Offloads::NONE
            };
            let told = seen.iter().filter_map(|event| match event {
                Event::Offloads(_, offloads) => Some(*offloads),
                _ => None,
            });
            let told: Vec<Offloads> = told.collect();
            assert!(
                !told.is_empty() && told.iter().all(|one| *one == csum),
                "{seen:?}"
            );
            let state = back_end.with(|port| async move { port.state() });
            assert_eq!(state.pairs, 2);
            let given = |to, tag: &[u8]| given(&control, &events, to, tag);
            assert_eq!(given([0x52, 0, 0, 0, 0, 1], &[]), FILTERED);
            assert_eq!(given(OTHER, &[]), Delivery::Taken);
            assert_eq!(given(OTHER, VLAN_8), FILTERED);
            assert_eq!(given(OTHER, VLAN_7), Delivery::Taken);
            // A packed ring goes on where the driver saw it used.
            for _ in 0..2 {
                guest.rings[0].receive();
            }
        }
        back_end.stop();
    }
}

#[test]
fn a_driver_that_starts_anew_has_said_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let options = PortOptions {
        kept: Some(dir.path().join("port")),
        ..options(3)
    };
    let (control, _events) = Control::new();
    let mut back_end = BackEnd::start(options.clone(), move || Probe(control));
    let features = CONTROL | MQ | GUEST_CSUM | GUEST_TSO4;
    let mut guest = Guest::start(&back_end, Layout::Split, features, 7);
    modest(&mut guest);
    drop(guest);
    // While the daemon is away another guest starts.
    back_end.kill();
    let (control, events) = Control::new();
    let its_control = control.clone();
    let mut back_end = back_end.succeeded(options.clone(), move || Probe(its_control));
    let mut guest = Guest::start(&back_end, Layout::Split, features, 7);
    let both = Offloads {
        csum: true,
        tso4: true,
        ..Offloads::NONE
    };
    assert_eq!(
        events
            .all()
            .iter()
            .rfind(|event| matches!(event, Event::Offloads(0, _))),
        Some(&Event::Offloads(0, both))
    );
    for id in 0..4 {
        guest.rings[0].offer(id, 1024);
    }
    assert_eq!(
        given(&control, &events, [0x52, 0, 0, 0, 0, 1], VLAN_8),
        Delivery::Taken
    );
    // It has not spoken either when the next daemon comes.
    back_end.kill();
    let (control, events) = Control::new();
    let its_control = control.clone();
    let back_end = back_end.succeeded(options, move || Probe(its_control));
    guest.reconnect(&back_end);
    assert_eq!(
        given(&control, &events, [0x52, 0, 0, 0, 0, 1], VLAN_8),
        Delivery::Taken
    );
    back_end.stop();
}

#[test]
fn the_guests_offloads_follow_its_commands() {
    let (back_end, _control, events) = start(1);
    let features = CONTROL | GUEST_CSUM | GUEST_TSO4;
    let mut guest = Guest::start(&back_end, Layout::Split, features, 3);
    let offloads = |bits: u64| [&[5, 0], bits.to_le_bytes().as_slice()].concat();
    events.all();
    let csum = Offloads {
        csum: true,
        ..Offloads::NONE
    };
    for (bits, expected) in [
        (GUEST_CSUM, csum),
        (0, Offloads::NONE),
        (GUEST_CSUM | GUEST_TSO4, Offloads { tso4: true, ..csum }),
    ] {
        assert_eq!(guest.command(&offloads(bits)), OK);
        assert_eq!(events.all(), [Event::Offloads(0, expected)]);
    }
    // What was not negotiated cannot be switched on.
    assert_eq!(guest.command(&offloads(1 << 8)), ERR);
    assert_eq!(events.all(), []);
    back_end.stop();
}

#[test]
fn the_receive_filter_keeps_what_the_driver_does_not_want() {
    let (back_end, control, events) = start(1);
    let mut guest = Guest::start(&back_end, Layout::Split, CONTROL, 3);
    for id in 0..8 {
        guest.rings[0].offer(id, 1024);
    }
    let given = |to: [u8; 6], tag: &[u8]| given(&control, &events, to, tag);
    let (filtered, other) = (FILTERED, OTHER);
    let group = [0x33, 0x33, 0, 0, 0, 1];
    assert_eq!(given(other, &[]), Delivery::Taken);
    // Not promiscuous; one more address, no group.
    assert_eq!(guest.command(&[0, 0, 0]), OK);
    let table = [&[1, 0, 1, 0, 0, 0], other.as_slice(), &[0; 4]].concat();
    assert_eq!(given(other, &[]), filtered);
    assert_eq!(guest.command(&table), OK);
    assert_eq!(given(other, &[]), Delivery::Taken);
    assert_eq!(given(MAC.0, &[]), Delivery::Taken);
    assert_eq!(given([0xff; 6], &[]), Delivery::Taken);
    assert_eq!(given(group, &[]), filtered);
    assert_eq!(guest.command(&[0, 1, 1]), OK);
    assert_eq!(given(group, &[]), Delivery::Taken);
    assert_eq!(given(MAC.0, &[0x81, 0, 0, 7]), filtered);
    assert_eq!(guest.command(&[2, 0, 7, 0]), OK);
    assert_eq!(given(MAC.0, &[0x81, 0, 0, 7]), Delivery::Taken);
    assert_eq!(guest.command(&[2, 1, 7, 0]), OK);
    assert_eq!(given(MAC.0, &[0x81, 0, 0, 7]), filtered);
    let new = [0x52, 0x54, 0, 0, 0, 0x77];
    assert_eq!(guest.command(&[&[1, 1], new.as_slice()].concat()), OK);
    assert_eq!(given(MAC.0, &[]), filtered);
    assert_eq!(given(new, &[]), Delivery::Taken);
    let (rx, _) = back_end.hooks.counters.total();
    assert_eq!(rx.frames, 7);
    back_end.stop();
}

#[test]
fn commands_that_make_no_sense_are_refused_and_the_queue_goes_on() {
    let (back_end, _control, _events) = start(1);
    let mut guest = Guest::start(&back_end, Layout::Split, CONTROL & !(1 << 19), 3);
    for wrong in [
        &[0u8][..],
        &[9, 9, 9],
        &[0, 0],
        &[1, 0, 255, 255, 255, 255],
        &[2, 0, 7, 0],
        &[4, 0, 1, 0],
    ] {
        assert_eq!(guest.command(wrong), ERR, "{wrong:?}");
    }
    assert_eq!(guest.command(&vec![0; 3000]), ERR);
    assert_eq!(guest.command(&[0, 0, 1]), OK);
    back_end.stop();
}

#[test]
fn a_guest_announces_itself_when_it_is_asked() {
    let (back_end, _control, events) = start(1);
    let mut guest = Guest::start(&back_end, Layout::Split, CONTROL, 3);
    let channel = guest.channel();
    assert_eq!(guest.config()[6], 1);
    back_end.with(|port| async move { port.announce() });
    notified(&channel);
    assert_eq!(guest.config()[6], 3);
    assert_eq!(guest.command(&[3, 0]), OK);
    assert_eq!(guest.config()[6], 1);
    drop(guest);
    // One that cannot is spoken for.
    let _guest = Guest::start(&back_end, Layout::Split, 0, 2);
    back_end.with(|port| async move { port.announce() });
    let (_, frame) = events.sent();
    assert_eq!(
        frame[..14],
        [[0xff; 6].as_slice(), &MAC.0, &[0x80, 0x35]].concat()
    );
    back_end.stop();
}
