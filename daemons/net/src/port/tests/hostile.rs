//! Guests that break the rules harm themselves.

use std::sync::Arc;

use vhost_daemon::testing::front_end::{GUEST_BASE, INDIRECT, NEXT, WRITE};

use super::guest::{BackEnd, Guest, LAYOUTS, Layout, MAC, is_broken, options};
use super::probe::{Control, Events, Probe};
use crate::frame::VnetHeader;
use crate::link::DropReason;

/// Address, length and flags of a descriptor.
type Piece = (u64, u32, u16);

fn start() -> (BackEnd, Arc<Control>, Events) {
    let (control, events) = Control::new();
    let its_control = control.clone();
    let back_end = BackEnd::start(options(2), move || Probe(its_control));
    (back_end, control, events)
}

fn frame(len: usize) -> Vec<u8> {
    let mut frame = [[0xff; 6], MAC.0].concat();
    frame.resize(len, 7);
    frame
}

#[test]
fn frames_that_are_none_are_dropped_and_counted_and_the_next_goes_on() {
    for layout in LAYOUTS {
        let (back_end, _control, events) = start();
        let mut guest = Guest::start(&back_end, layout, 0, 2);
        let ring = &mut guest.rings[1];
        let at = GUEST_BASE + ring.buffer(0) as u64;
        let cases: [(&[Piece], DropReason); 5] = [
            (&[(at, 1, 0)], DropReason::TooShort),
            (&[(at, 11, 0)], DropReason::TooShort),
            (&[(at, 12 + 13, 0)], DropReason::TooShort),
            (&[(at, 1000, WRITE)], DropReason::TooShort),
            (&[(at, 40_000, 0), (at, 40_000, 0)], DropReason::TooLong),
        ];
        let tx = || &back_end.hooks.counters.pairs[0].tx;
        for (pieces, reason) in cases {
            let before = tx().drops(reason);
            ring.push(0, pieces);
            ring.publish();
            assert_eq!(ring.complete(), (0, 0), "{layout:?} {pieces:?}");
            assert_eq!(tx().drops(reason), before + 1, "{layout:?} {pieces:?}");
        }
        // A checksum that was not negotiated, and one outside of the frame, which never was.
        let unfinished = VnetHeader {
            flags: 1,
            csum_start: 5000,
            ..VnetHeader::default()
        };
        ring.send(1, unfinished, &frame(100));
        assert_eq!(ring.complete(), (1, 0));
        assert_eq!(tx().drops(DropReason::BadHeader), 1);
        ring.send(2, VnetHeader::default(), &frame(100));
        assert_eq!(events.sent(), (0, frame(100)));
        assert_eq!(ring.complete(), (2, 0));
        assert_eq!(tx().frames(), 1);
        back_end.stop();
    }
}

#[test]
fn a_broken_ring_stops_nothing_but_itself() {
    type Pieces = [Piece; 1];
    let table = GUEST_BASE + 0x100;
    let cases: [(usize, Pieces); 5] = [
        (1, [(0x10, 64, 0)]),
        (1, [(table, 24, INDIRECT)]),
        (1, [(table, 0, INDIRECT)]),
        (0, [(GUEST_BASE + (1 << 40), 2048, WRITE)]),
        // A receive buffer without room for a header.
        (0, [(GUEST_BASE + 0x1000, 11, WRITE)]),
    ];
    for layout in LAYOUTS {
        for (broken, pieces) in cases {
            let (back_end, control, events) = start();
            let mut guest = Guest::start(&back_end, layout, 0, 4);
            guest.rings[broken].push(0, &pieces);
            guest.rings[broken].publish();
            if broken == 0 {
                // Receive buffers are looked at when there is something for them.
                control.give(0, VnetHeader::default(), &frame(60));
            }
            assert!(is_broken(&guest.rings[broken]), "{layout:?} {pieces:?}");
            // The other pair goes on.
            guest.rings[3].send(0, VnetHeader::default(), &frame(80));
            assert_eq!(events.sent(), (1, frame(80)));
            guest.rings[2].offer(0, 1024);
            control.give(1, VnetHeader::default(), &frame(90));
            assert_eq!(guest.rings[2].receive().1, frame(90));
            back_end.stop();
        }
    }
}

#[test]
fn a_chain_without_an_end_breaks_its_ring() {
    let (back_end, _control, events) = start();
    let mut guest = Guest::start(&back_end, Layout::Split, 0, 4);
    let at = GUEST_BASE + guest.rings[1].buffer(0) as u64;
    if let super::guest::Ring::Split(driver) = &mut guest.rings[1] {
        driver.descriptor(0, at, 64, NEXT, 1);
        driver.descriptor(1, at, 64, NEXT, 0);
        driver.make_available(0);
        driver.publish();
    }
    assert!(is_broken(&guest.rings[1]));
    guest.rings[3].send(0, VnetHeader::default(), &frame(80));
    assert_eq!(events.sent(), (1, frame(80)));
    let state = back_end.with(|port| async move { port.state() });
    assert_eq!(state.rings.len(), 4);
    back_end.stop();
}
