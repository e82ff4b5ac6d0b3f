//! Frames get through, whole, in order, in both layouts.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::guest::{BackEnd, Guest, LAYOUTS, Layout, MAC, options};
use super::probe::{Control, Event, Events, Probe};
use crate::frame::VnetHeader;
use crate::link::{Delivery, DropReason, Offloads};
use crate::netdevs::echo::{Echo, EchoOptions};

const MRG_RXBUF: u64 = 1 << 15;
const GUEST_CSUM: u64 = 1 << 1;

fn echo() -> BackEnd {
    BackEnd::start(options(1), || Echo::new(&EchoOptions {}))
}

fn probe(pairs: u16) -> (BackEnd, Arc<Control>, Events) {
    let (control, events) = Control::new();
    let its_control = control.clone();
    let back_end = BackEnd::start(options(pairs), move || Probe(its_control));
    (back_end, control, events)
}

/// A frame of `len` bytes that differs from others.
fn frame(number: u8, len: usize) -> Vec<u8> {
    let mut bytes = [[0xff; 6], MAC.0].concat();
    bytes.extend([0x88, 0xb5, number]);
    bytes.extend((bytes.len()..len).map(|at| (at as u8).wrapping_mul(number)));
    bytes
}

#[test]
fn frames_come_back_as_they_went() {
    for layout in LAYOUTS {
        for features in [0, MRG_RXBUF] {
            let back_end = echo();
            let mut guest = Guest::start(&back_end, layout, features, 2);
            for round in 0..40u8 {
                let len = 60 + usize::from(round) * 37;
                let sent = frame(round, len);
                let id = u16::from(round % 8);
                guest.rings[0].offer(id, 2048);
                guest.rings[1].send(id, VnetHeader::default(), &sent);
                let (header, received, ids) = guest.rings[0].receive();
                assert_eq!((received, ids), (sent, vec![id]), "{layout:?} {round}");
                assert_eq!(header.num_buffers, 1);
                assert_eq!(guest.rings[1].complete(), (id, 0));
            }
            let (rx, tx) = back_end.hooks.counters.total();
            assert_eq!((rx.frames, tx.frames), (40, 40));
            back_end.stop();
        }
    }
}

#[test]
fn a_long_frame_lies_in_several_merged_buffers_and_is_dropped_where_they_are_not_merged() {
    for layout in LAYOUTS {
        let (back_end, control, events) = probe(1);
        let mut guest = Guest::start(&back_end, layout, MRG_RXBUF, 2);
        let sent = frame(3, 1000);
        for in_place in [false, true] {
            control.in_place.store(in_place, Ordering::SeqCst);
            for id in 0..5 {
                guest.rings[0].offer(id, 256);
            }
            control.give(0, VnetHeader::default(), &sent);
            assert_eq!(events.given(), Delivery::Taken);
            let (header, received, ids) = guest.rings[0].receive();
            assert_eq!(header.num_buffers, 4);
            assert_eq!((received, ids), (sent.clone(), vec![0, 1, 2, 3]));
            // The last buffer takes the next frame, so that the round begins as it began.
            control.give(0, VnetHeader::default(), &sent[..60]);
            assert_eq!(guest.rings[0].receive().2, [4]);
            assert_eq!(events.given(), Delivery::Taken);
        }
        drop(guest);
        let mut guest = Guest::start(&back_end, layout, 0, 2);
        control.in_place.store(false, Ordering::SeqCst);
        guest.rings[0].offer(0, 256);
        control.give(0, VnetHeader::default(), &sent);
        assert_eq!(events.given(), Delivery::Dropped(DropReason::TooLong));
        control.give(0, VnetHeader::default(), &sent[..200]);
        assert_eq!(guest.rings[0].receive().1, sent[..200]);
        back_end.stop();
    }
}

#[test]
fn a_frame_waits_until_its_buffers_are_all_there() {
    for layout in LAYOUTS {
        let (back_end, control, events) = probe(1);
        let mut guest = Guest::start(&back_end, layout, MRG_RXBUF, 2);
        let sent = frame(5, 700);
        control.give(0, VnetHeader::default(), &sent);
        for id in 0..3 {
            guest.rings[0].offer(id, 256);
        }
        let (_, received, ids) = guest.rings[0].receive();
        assert_eq!((received, ids), (sent, vec![0, 1, 2]), "{layout:?}");
        assert_eq!(events.given(), Delivery::Taken);
        back_end.stop();
    }
}

#[test]
fn what_the_network_does_not_take_waits_in_order() {
    for layout in LAYOUTS {
        let (back_end, control, events) = probe(1);
        let mut guest = Guest::start(&back_end, layout, 0, 2);
        control.set_full(true);
        for number in 0..10 {
            let frame = frame(number, 300);
            guest.rings[1].send(u16::from(number), VnetHeader::default(), &frame);
        }
        // Nothing is returned: what a port has looked at is still the ring's.
        assert_eq!(guest.front_end.get_base(1) & 0x7fff, 0);
        assert_eq!(guest.rings[1].try_complete(), None);
        let start = match layout {
            Layout::Split => 0,
            Layout::Packed => 0x8000_8000,
        };
        guest.restart(1, start);
        control.set_full(false);
        for number in 0..10 {
            assert_eq!(events.sent(), (0, frame(number, 300)), "{layout:?}");
            assert_eq!(guest.rings[1].complete(), (u16::from(number), 0));
        }
        back_end.stop();
    }
}

#[test]
fn receive_buffers_that_were_not_used_are_still_there_after_a_stop() {
    for layout in LAYOUTS {
        let (back_end, control, _events) = probe(1);
        let mut guest = Guest::start(&back_end, layout, 0, 2);
        for id in 0..6 {
            guest.rings[0].offer(id, 1024);
        }
        control.give(0, VnetHeader::default(), &frame(1, 60));
        assert_eq!(guest.rings[0].receive().2, [0]);
        let base = guest.front_end.get_base(0);
        let used = match layout {
            Layout::Split => 1,
            Layout::Packed => 0x8002_8002,
        };
        assert_eq!(base, used, "{layout:?}");
        guest.restart(0, base);
        for id in 1..6 {
            control.give(0, VnetHeader::default(), &frame(id as u8, 80));
            assert_eq!(guest.rings[0].receive().2, [id]);
        }
        back_end.stop();
    }
}

#[test]
fn a_guest_that_does_no_checksums_is_told_of_none() {
    let unfinished = VnetHeader {
        flags: 1,
        csum_start: 34,
        csum_offset: 6,
        ..VnetHeader::default()
    };
    for in_place in [false, true] {
        for (features, flags) in [(0, 0), (GUEST_CSUM, 1)] {
            let (back_end, control, _events) = probe(1);
            control.in_place.store(in_place, Ordering::SeqCst);
            let mut guest = Guest::start(&back_end, Layout::Split, features, 2);
            guest.rings[0].offer(0, 1024);
            control.give(0, unfinished, &frame(1, 90));
            assert_eq!(guest.rings[0].receive().0.flags, flags, "{in_place}");
            back_end.stop();
        }
    }
}

#[test]
fn a_queue_is_connected_while_its_rings_run_and_told_the_guests_offloads() {
    let (back_end, _control, events) = probe(2);
    let guest = Guest::start(&back_end, Layout::Split, GUEST_CSUM, 2);
    let csum = Offloads {
        csum: true,
        ..Offloads::NONE
    };
    assert_eq!(events.next(), Event::Connected(0));
    assert_eq!(events.next(), Event::Offloads(0, csum));
    let state = back_end.with(|port| async move { port.state() });
    assert_eq!((state.connected, state.pairs), (true, 1));
    assert_eq!(state.rings.len(), 2);
    drop(guest);
    while events.next() != Event::Disconnected(0) {}
    back_end.stop();
    let untouched = |event: &Event| !matches!(event, Event::Connected(1) | Event::Disconnected(1));
    assert!(events.all().iter().all(untouched));
}

#[test]
fn a_daemon_that_is_killed_loses_no_buffer_and_its_successor_goes_on() {
    for layout in LAYOUTS {
        for features in [0, MRG_RXBUF] {
            survive(layout, features);
        }
    }
}

fn survive(layout: Layout, features: u64) {
    let (mut back_end, mut number) = (echo(), 0);
    let mut guest = Guest::start(&back_end, layout, features, 2);
    for id in 0..8 {
        guest.rings[0].offer(id, 1024);
    }
    // Each frame takes the oldest buffer, which is offered again: any that was lost would be missed, any used twice seen.
    let carry = |guest: &mut Guest, number: u8| {
        let id = u16::from(number % 8);
        let (_, received, ids) = guest.rings[0].receive();
        assert_eq!((received, ids), (frame(number, 200), vec![id]));
        assert_eq!(guest.rings[1].complete(), (id, 0));
        guest.rings[0].offer(id, 1024);
    };
    for _ in 0..6 {
        for _ in 0..5 {
            let sent = frame(number, 200);
            guest.rings[1].send(u16::from(number % 8), VnetHeader::default(), &sent);
            carry(&mut guest, number);
            number += 1;
        }
        back_end.kill();
        let sent = frame(number, 200);
        guest.rings[1].send(u16::from(number % 8), VnetHeader::default(), &sent);
        back_end = back_end.succeeded(options(1), || Echo::new(&EchoOptions {}));
        guest.reconnect(&back_end);
        carry(&mut guest, number);
        number += 1;
    }
    back_end.stop();
}
