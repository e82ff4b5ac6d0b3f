//! What a well-behaved front-end may rely on.

use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::Ordering;

use vhost::vhost_user::message::FrontendReq as Req;

use super::device::{BackEnd, Mode};
use crate::session::PROTOCOL_FEATURES;
use crate::testing::front_end::{
    Driver, FrontEnd, GUEST_BASE, INDIRECT, Memory, NEXT, PATIENCE_MS, WRITE, wait,
};

const MEMORY: usize = 1 << 20;

fn ready(back_end: &BackEnd) -> (FrontEnd, Driver) {
    let mut front_end = FrontEnd::connect(back_end.path(), PROTOCOL_FEATURES);
    let memory = Memory::new(MEMORY);
    front_end.set_memory(&memory);
    let driver = Driver::new(&memory, 0, 64);
    front_end.set_ring(0, &driver);
    (front_end, driver)
}

fn wait_until_held(back_end: &BackEnd, count: u32) {
    while back_end.control.held.load(Ordering::SeqCst) < count {
        std::thread::yield_now();
    }
}

#[test]
fn requests_are_answered_with_and_without_event_idx() {
    for features in [1u64 << 32 | 1 << 30 | 1 << 29, 1 << 32 | 1 << 30] {
        let back_end = BackEnd::start(Mode::Listen);
        let (mut front_end, mut driver) = ready(&back_end);
        front_end.set(Req::SET_FEATURES, &features.to_ne_bytes(), &[]);
        driver.event_idx = features & 1 << 29 != 0;
        front_end.enable(0, true);
        for round in 0..500u16 {
            let heads = [0, 2, 4, 6, 8];
            for head in heads {
                driver.request(head, &[b'e', round as u8, head as u8, 2, 3]);
            }
            driver.publish();
            for _ in heads {
                let (head, written) = driver.complete();
                assert_eq!(written, 5);
                let answer = driver.answer(head as u16, 5);
                assert_eq!(answer, [b'e', round as u8, head as u8, 2, 3]);
            }
        }
        assert_eq!(front_end.get_base(0), 2500);
        back_end.stop();
    }
}

#[test]
fn a_ring_is_looked_at_when_it_is_enabled_without_a_kick() {
    let back_end = BackEnd::start(Mode::Listen);
    let (mut front_end, mut driver) = ready(&back_end);
    driver.request(3, b"early");
    driver.publish();
    // The kick is lost.
    wait(driver.kick.as_fd(), 1000);
    front_end.enable(0, true);
    assert_eq!(driver.complete(), (3, 5));
    back_end.stop();
}

#[test]
fn a_ring_runs_from_its_kick_when_the_front_end_knows_no_protocol_features() {
    let back_end = BackEnd::start(Mode::Listen);
    let mut front_end = FrontEnd::plain(UnixStream::connect(back_end.path()).unwrap());
    front_end.send(Req::SET_OWNER, &[], &[]);
    front_end.set(Req::SET_FEATURES, &(1u64 << 32).to_ne_bytes(), &[]);
    let memory = Memory::new(MEMORY);
    front_end.set_memory(&memory);
    let mut driver = Driver::new(&memory, 0, 64);
    driver.event_idx = false;
    front_end.set_ring(0, &driver);
    driver.request(3, b"plain");
    driver.publish();
    assert_eq!(driver.complete(), (3, 5));
    back_end.stop();
}

#[test]
fn indirect_chains_are_answered() {
    let back_end = BackEnd::start(Mode::Listen);
    let (mut front_end, mut driver) = ready(&back_end);
    front_end.enable(0, true);
    let at = driver.buffer(9);
    driver.memory.write(at, b"indirect");
    let guest = GUEST_BASE + at as u64;
    // The table lies where descriptors of another ring would: any memory will do.
    let table = Driver::new(&driver.memory, at + 1024, 64);
    table.descriptor(0, guest, 3, NEXT, 2);
    table.descriptor(2, guest + 3, 5, NEXT, 1);
    table.descriptor(1, guest + 2048, 8, WRITE, 0);
    driver.descriptor(9, guest + 1024, 48, INDIRECT, 0);
    driver.make_available(9);
    driver.publish();
    assert_eq!(driver.complete(), (9, 8));
    assert_eq!(driver.answer(9, 8), b"indirect");
    back_end.stop();
}

#[test]
fn get_vring_base_waits_for_requests_in_flight() {
    let back_end = BackEnd::start(Mode::Listen);
    let (mut front_end, mut driver) = ready(&back_end);
    front_end.enable(0, true);
    driver.request(0, b"Hold");
    driver.request(2, b"fast");
    driver.publish();
    wait_until_held(&back_end, 1);
    front_end.send(Req::GET_VRING_BASE, &FrontEnd::state(0, 0), &[]);
    assert!(
        !wait(front_end.socket.as_fd(), 50),
        "answered while in flight"
    );
    back_end.control.release();
    let payload = front_end.receive().unwrap();
    assert_eq!(payload, FrontEnd::state(0, 2));
    let mut heads = [driver.complete().0, driver.complete().0];
    heads.sort_unstable();
    assert_eq!(heads, [0, 2]);
    assert_eq!(driver.answer(0, 4), b"Hold");
    back_end.stop();
}

#[test]
fn memory_changes_while_requests_are_in_flight() {
    let back_end = BackEnd::start(Mode::Listen);
    let (mut front_end, mut driver) = ready(&back_end);
    front_end.enable(0, true);
    driver.request(0, b"Hold");
    driver.publish();
    wait_until_held(&back_end, 1);
    // The same bytes behind another descriptor: a new mapping for the back-end.
    let fd = driver.memory.fd.try_clone().unwrap();
    let again = Memory::map(fd, MEMORY);
    let spec = FrontEnd::region(&again);
    let padded = [vec![0; 8], spec].concat();
    front_end.set(Req::REM_MEM_REG, &padded, &[]);
    front_end.set(Req::ADD_MEM_REG, &padded, &[again.fd.as_fd()]);
    driver.request(2, b"next");
    driver.publish();
    assert_eq!(driver.complete(), (2, 4));
    back_end.control.release();
    assert_eq!(driver.complete(), (0, 4));
    assert_eq!(driver.answer(0, 4), b"Hold");
    assert_eq!(front_end.get_base(0), 2);
    back_end.stop();
}

#[test]
fn memory_may_come_after_the_ring_was_enabled() {
    let back_end = BackEnd::start(Mode::Listen);
    let mut front_end = FrontEnd::connect(back_end.path(), PROTOCOL_FEATURES);
    let memory = Memory::new(MEMORY);
    let mut driver = Driver::new(&memory, 0, 64);
    front_end.set_ring(0, &driver);
    front_end.enable(0, true);
    driver.request(1, b"late");
    driver.publish();
    front_end.set_memory(&memory);
    assert_eq!(driver.complete(), (1, 4));
    back_end.stop();
}

#[test]
fn disabled_rings_are_left_alone_and_go_on_where_they_were() {
    let back_end = BackEnd::start(Mode::Listen);
    let (mut front_end, mut driver) = ready(&back_end);
    for round in 0..3u8 {
        front_end.enable(0, true);
        driver.request(0, &[round; 4]);
        driver.publish();
        assert_eq!(driver.complete(), (0, 4));
        front_end.enable(0, false);
    }
    driver.request(0, b"idle");
    driver.publish();
    assert_eq!(front_end.get_base(0), 3);
    assert_eq!(driver.used_idx(), 3);
    back_end.stop();
}

#[test]
fn a_successor_serves_what_was_in_flight_in_order() {
    let back_end = BackEnd::start(Mode::Listen);
    let mut front_end = FrontEnd::connect(back_end.path(), PROTOCOL_FEATURES);
    let mut wanted = [0; 24];
    wanted[16] = 1;
    wanted[18] = 64;
    front_end.send(Req::GET_INFLIGHT_FD, &wanted, &[]);
    let (spec, fd) = front_end.receive_fd();
    let len = u64::from_ne_bytes(spec[..8].try_into().unwrap()) as usize;
    let region = Memory::map(fd, len);
    // As a predecessor left it that had fetched 4, 6 and 2, and died before 6 was shown as used.
    region.write(8, &1u16.to_ne_bytes());
    region.write(10, &64u16.to_ne_bytes());
    for (head, counter) in [(4u16, 7u64), (6, 8), (2, 9)] {
        let at = 16 + 16 * usize::from(head);
        region.write(at, &[1]);
        region.write(at + 8, &counter.to_ne_bytes());
    }
    let memory = Memory::new(MEMORY);
    front_end.set_memory(&memory);
    let mut driver = Driver::new(&memory, 0, 64);
    for head in [4, 6, 2, 8] {
        driver.request(head, &[head as u8; 4]);
    }
    driver.publish();
    front_end.set(Req::SET_INFLIGHT_FD, &spec, &[region.fd.as_fd()]);
    front_end.set_ring(0, &driver);
    front_end.enable(0, true);
    let heads: Vec<u32> = (0..4).map(|_| driver.complete().0).collect();
    assert_eq!(heads, [4, 6, 2, 8]);
    assert_eq!(front_end.get_base(0), 4);
    assert_eq!(region.read(14, 2), 4u16.to_ne_bytes());
    assert!((0..64).all(|head| region.read(16 + 16 * head, 1) == [0]));
    back_end.stop();
}

#[test]
fn a_guest_that_the_predecessor_did_not_call_is_called() {
    let back_end = BackEnd::start(Mode::Listen);
    let (mut front_end, mut driver) = ready(&back_end);
    // Published by a back-end that died before it signalled.
    driver.memory.write(driver.used_offset() + 2, &[1, 0]);
    driver.avail = 1;
    front_end.set(Req::SET_VRING_BASE, &FrontEnd::state(0, 1), &[]);
    front_end.enable(0, true);
    assert!(wait(driver.call.as_fd(), PATIENCE_MS), "no call");
    assert!(driver.try_complete().is_some());
    back_end.stop();
}

#[test]
fn front_ends_come_and_go() {
    let back_end = BackEnd::start(Mode::Listen);
    for round in 0..20u8 {
        let (mut front_end, mut driver) = ready(&back_end);
        front_end.enable(0, true);
        driver.request(0, &[round; 8]);
        driver.publish();
        assert_eq!(driver.complete(), (0, 8));
        driver.request(2, &[round; 8]);
        driver.publish();
        // It leaves with a request in the ring; the next one is served all the same.
    }
    back_end.stop();
}

#[test]
fn a_client_back_end_comes_back_after_its_front_end_restarts() {
    let back_end = BackEnd::start(Mode::Connect);
    for round in 0..3u8 {
        let listener = UnixListener::bind(back_end.path()).unwrap();
        let (socket, _) = listener.accept().unwrap();
        let mut front_end = FrontEnd::plain(socket);
        front_end.negotiate(PROTOCOL_FEATURES);
        let memory = Memory::new(MEMORY);
        front_end.set_memory(&memory);
        let mut driver = Driver::new(&memory, 0, 64);
        front_end.set_ring(0, &driver);
        front_end.enable(0, true);
        driver.request(0, &[round; 8]);
        driver.publish();
        assert_eq!(driver.complete(), (0, 8));
        drop(listener);
        std::fs::remove_file(back_end.path()).unwrap();
    }
    back_end.stop();
}

#[test]
fn config_changes_reach_the_front_end() {
    let back_end = BackEnd::start(Mode::Listen);
    let mut front_end = FrontEnd::connect(back_end.path(), PROTOCOL_FEATURES);
    let (ours, theirs) = UnixStream::pair().unwrap();
    front_end.set(Req::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]);
    let mut channel = FrontEnd::plain(ours);
    for _ in 0..3 {
        back_end.config_changed.notify_all();
        assert_eq!(channel.receive(), Some(vec![]));
    }
    let request = [0u32.to_ne_bytes(), 16u32.to_ne_bytes(), [0; 4]].concat();
    front_end.send(Req::GET_CONFIG, &[request, vec![0; 16]].concat(), &[]);
    let reply = front_end.receive().unwrap();
    assert_eq!(&reply[12..], b"configuration\0\0\0");
    back_end.stop();
}

#[test]
fn polled_rings_need_no_kick() {
    let back_end = BackEnd::start(Mode::Listen);
    let (mut front_end, mut driver) = ready(&back_end);
    front_end.set(Req::SET_VRING_KICK, &0x100u64.to_ne_bytes(), &[]);
    front_end.enable(0, true);
    for _ in 0..10 {
        driver.request(0, b"poll");
        driver.publish();
        assert_eq!(driver.complete(), (0, 4));
    }
    back_end.stop();
}
