//! Links, MTUs, announcements, logs, limits.

use std::os::fd::AsFd;
use std::sync::Arc;

use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost::vhost_user::message::FrontendReq as Req;
use vhost_daemon::testing::front_end::GUEST_BASE;

use super::guest::{BackEnd, Guest, LAYOUTS, Layout, MAC, notified, options};
use super::probe::{Control, Event, Events, Probe};
use crate::frame::VnetHeader;
use crate::limit::{Limits, RateOptions};
use crate::link::DropReason;

const MTU: u64 = 1 << 3;
const LOG_ALL: u64 = 1 << 26;

fn start() -> (BackEnd, Arc<Control>, Events) {
    let (control, events) = Control::new();
    let its_control = control.clone();
    let back_end = BackEnd::start(options(1), move || Probe(its_control));
    (back_end, control, events)
}

fn frame(len: usize) -> Vec<u8> {
    let mut frame = [[0xff; 6], MAC.0].concat();
    frame.resize(len, 7);
    frame
}

#[test]
fn while_the_link_is_down_nothing_goes_through_and_the_guest_knows() {
    for layout in LAYOUTS {
        let (back_end, control, events) = start();
        let mut guest = Guest::start(&back_end, layout, 0, 2);
        let channel = guest.channel();
        back_end.with(|port| async move { port.set_link(false).await });
        notified(&channel);
        assert_eq!(guest.config()[6], 0);
        guest.rings[1].send(0, VnetHeader::default(), &frame(60));
        assert_eq!(guest.rings[1].complete(), (0, 0));
        let tx = &back_end.hooks.counters.pairs[0].tx;
        assert_eq!(tx.drops(DropReason::LinkDown), 1);
        guest.rings[0].offer(0, 1024);
        control.give(0, VnetHeader::default(), &frame(61));
        back_end.with(|port| async move { port.set_link(true).await });
        notified(&channel);
        assert_eq!(guest.config()[6], 1);
        guest.rings[1].send(1, VnetHeader::default(), &frame(62));
        assert_eq!(events.sent(), (0, frame(62)));
        back_end.stop();
    }
}

#[test]
fn frames_that_wait_for_the_network_are_dropped_with_their_ring() {
    for layout in LAYOUTS {
        let (back_end, control, events) = start();
        let mut guest = Guest::start(&back_end, layout, 0, 2);
        let tx = &back_end.hooks.counters.pairs[0].tx;
        control.set_full(true);
        for id in 0..3 {
            guest.rings[1].send(id, VnetHeader::default(), &frame(60));
        }
        guest.front_end.enable(1, false);
        for id in 0..3 {
            assert_eq!(guest.rings[1].complete(), (id, 0), "{layout:?}");
        }
        control.set_full(false);
        guest.rings[1].send(3, VnetHeader::default(), &frame(60));
        assert_eq!(guest.rings[1].complete(), (3, 0));
        assert_eq!(tx.drops(DropReason::RingDisabled), 4);
        // It stops where a ring that was never disabled would.
        let base = guest.front_end.get_base(1);
        assert_eq!(
            base as u16 & 0x7fff,
            if layout == Layout::Split { 4 } else { 8 }
        );
        guest.restart(1, base);
        guest.rings[1].send(4, VnetHeader::default(), &frame(64));
        assert_eq!(events.sent(), (0, frame(64)), "{layout:?}");
        back_end.stop();
    }
}

#[test]
fn a_pair_whose_rings_are_both_disabled_leaves_the_network() {
    let (back_end, control, events) = start();
    let mut guest = Guest::start(&back_end, Layout::Split, 0, 2);
    events.all();
    guest.front_end.enable(0, false);
    guest.rings[0].offer(0, 1024);
    guest.front_end.enable(1, false);
    let seen = events.all();
    assert_eq!(seen.last(), Some(&Event::Disconnected(0)), "{seen:?}");
    guest.rings[1].send(0, VnetHeader::default(), &frame(60));
    assert_eq!(guest.rings[1].complete(), (0, 0));
    control.give(0, VnetHeader::default(), &frame(61));
    guest.front_end.enable(0, true);
    assert_eq!(guest.rings[0].receive().1, frame(61));
    guest.front_end.enable(1, true);
    guest.rings[1].send(1, VnetHeader::default(), &frame(62));
    assert_eq!(events.sent(), (0, frame(62)));
    back_end.stop();
}

#[test]
fn the_mtu_reaches_the_guest_from_either_side() {
    let (back_end, _control, _events) = start();
    let mut guest = Guest::start(&back_end, Layout::Split, MTU, 2);
    let channel = guest.channel();
    let mtu = |config: Vec<u8>| u16::from_le_bytes([config[10], config[11]]);
    assert_eq!(guest.config()[..6], MAC.0);
    assert_eq!(mtu(guest.config()), 1500);
    back_end.with(|port| async move { port.set_mtu(9000).unwrap() });
    notified(&channel);
    assert_eq!(mtu(guest.config()), 9000);
    let front_end = &mut guest.front_end;
    front_end.set(Req::NET_SET_MTU, &1400u64.to_ne_bytes(), &[]);
    notified(&channel);
    for wrong in [67u64, 65_536] {
        let answer = guest
            .front_end
            .try_set(Req::NET_SET_MTU, &wrong.to_ne_bytes(), &[]);
        assert_eq!(answer, Some(1), "{wrong}");
    }
    assert_eq!(mtu(guest.config()), 1400);
    let refused = back_end.with(|port| async move { port.set_mtu(67).is_err() });
    assert!(refused);
    back_end.stop();
}

#[test]
fn a_guest_that_has_moved_here_is_announced() {
    let (back_end, _control, events) = start();
    let mut guest = Guest::start(&back_end, Layout::Split, 0, 2);
    let moved = [2u8, 0, 0, 0, 0, 5];
    let payload = [moved.as_slice(), &[0; 2]].concat();
    guest.front_end.set(Req::SEND_RARP, &payload, &[]);
    let (_, frame) = events.sent();
    assert_eq!(frame.len(), 60);
    assert_eq!(frame[..6], [0xff; 6]);
    assert_eq!(frame[6..12], moved);
    assert_eq!(frame[12..22], [0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
    assert_eq!((&frame[22..28], &frame[32..38]), (&moved[..], &moved[..]));
    back_end.stop();
}

#[test]
fn frames_written_while_logging_mark_their_pages() {
    for layout in LAYOUTS {
        let (back_end, control, _events) = start();
        let mut guest = Guest::start(&back_end, layout, 0, 2);
        for id in 0..4 {
            guest.rings[0].offer(id, 1024);
        }
        control.give(0, VnetHeader::default(), &frame(60));
        assert_eq!(guest.rings[0].receive().2, [0]);
        // Buffers are fetched by now; logging begins with those that are not used yet.
        let bytes = 4096;
        let log = memfd_create(c"log", MFdFlags::empty()).unwrap();
        nix::unistd::ftruncate(&log, bytes).unwrap();
        let spec = [bytes as u64, 0].map(u64::to_ne_bytes).concat();
        guest
            .front_end
            .send(Req::SET_LOG_BASE, &spec, &[log.as_fd()]);
        guest.front_end.receive().expect("an answer");
        let features = (guest.features | LOG_ALL).to_ne_bytes();
        guest.front_end.set(Req::SET_FEATURES, &features, &[]);
        control.give(0, VnetHeader::default(), &frame(70));
        assert_eq!(guest.rings[0].receive().2, [1]);
        let is_marked = |id: u16| {
            let page = (GUEST_BASE + guest.rings[0].buffer(id) as u64) / 4096;
            let mut byte = [0];
            nix::sys::uio::pread(&log, &mut byte, (page / 8) as i64).unwrap();
            byte[0] & 1 << (page % 8) != 0
        };
        assert_eq!([0, 1, 2].map(is_marked), [false, true, false], "{layout:?}");
        back_end.stop();
    }
}

#[test]
fn limits_make_frames_wait_in_both_directions_and_lifting_them_lets_all_go() {
    let slow = RateOptions {
        packets: Some(1),
        packets_burst: Some(1),
        ..RateOptions::default()
    };
    for layout in LAYOUTS {
        let (back_end, control, events) = start();
        let limits = [0, 1].map(|_| Arc::new(Limits::new(&slow)));
        back_end.hooks.rx_limits.set(Some(limits[0].clone()));
        back_end.hooks.tx_limits.set(Some(limits[1].clone()));
        let mut guest = Guest::start(&back_end, layout, 0, 2);
        let counters = &back_end.hooks.counters.pairs[0];
        for id in 0..12 {
            guest.rings[0].offer(id, 1024);
            control.give(0, VnetHeader::default(), &frame(100 + usize::from(id)));
        }
        assert_eq!(guest.rings[0].receive().1.len(), 100);
        // One by one, so that no burst takes them all.
        for id in 0..12 {
            guest.rings[1].send(id, VnetHeader::default(), &frame(200 + usize::from(id)));
            back_end.with(|_| async {});
        }
        assert!(
            counters.rx.frames() < 12 && counters.tx.frames() < 12,
            "{layout:?}"
        );
        for limits in &limits {
            limits.set(&RateOptions::default());
        }
        for id in 1..12 {
            assert_eq!(guest.rings[0].receive().1.len(), 100 + id);
        }
        for id in 0..12u16 {
            assert_eq!(events.sent().1.len(), 200 + usize::from(id));
            assert_eq!(guest.rings[1].complete(), (id, 0));
        }
        back_end.stop();
    }
}
