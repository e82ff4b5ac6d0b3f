//! Front-ends and guests that mean harm: refused or dropped, and the next one is served.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use vhost::vhost_user::message::FrontendReq as Req;

use super::device::{BackEnd, Mode};
use crate::session::PROTOCOL_FEATURES;
use crate::testing::front_end::{
    Driver, FrontEnd, GUEST_BASE, Memory, NEXT, PATIENCE_MS, eventfd, wait,
};

const MEMORY: usize = 1 << 20;
const NEEDS_RESET: u64 = 0x40;

/// Whether a new front-end is served from connection to answer.
fn assert_alive(back_end: &BackEnd) {
    let mut front_end = FrontEnd::connect(back_end.path(), PROTOCOL_FEATURES);
    let memory = Memory::new(MEMORY);
    front_end.set_memory(&memory);
    let mut driver = Driver::new(&memory, 0, 64);
    front_end.set_ring(1, &driver);
    front_end.enable(1, true);
    driver.request(0, b"alive");
    driver.publish();
    assert_eq!(driver.complete(), (0, 5));
}

#[test]
fn refused_requests_are_acknowledged_as_failed_and_the_session_goes_on() {
    let back_end = BackEnd::start(Mode::Listen);
    let mut front_end = FrontEnd::connect(back_end.path(), PROTOCOL_FEATURES);
    let memory = Memory::new(MEMORY);
    let short = Memory::new(4096);
    front_end.set_memory(&memory);
    let state = FrontEnd::state;
    let region = [vec![0; 8], FrontEnd::region(&memory)].concat();
    let mut far = region.clone();
    far[32..40].copy_from_slice(&(MEMORY as u64).to_ne_bytes());
    let (pipe, _writer) = nix::unistd::pipe().unwrap();
    let (fd, small, none) = (memory.fd.as_fd(), short.fd.as_fd(), None);
    let cases: [(Req, Vec<u8>, Option<_>); 14] = [
        (Req::SET_FEATURES, u64::MAX.to_ne_bytes().into(), none),
        (Req::SET_VRING_NUM, state(0, 0), none),
        (Req::SET_VRING_NUM, state(0, 100), none),
        (Req::SET_VRING_NUM, state(0, 512), none),
        (Req::SET_VRING_NUM, state(2, 64), none),
        (Req::SET_VRING_NUM, state(u32::MAX, 64), none),
        (Req::SET_VRING_BASE, state(0, 65536), none),
        (Req::SET_VRING_ENABLE, state(0, 2), none),
        (Req::ADD_MEM_REG, region.clone(), Some(fd)),
        (Req::ADD_MEM_REG, far, Some(small)),
        (Req::REM_MEM_REG, vec![7; 40], none),
        (Req::SET_VRING_KICK, vec![0; 8], none),
        (Req::SET_VRING_KICK, vec![0; 8], Some(pipe.as_fd())),
        (Req::SET_INFLIGHT_FD, vec![1; 24], Some(fd)),
    ];
    for (request, payload, fd) in cases {
        let fds: Vec<_> = fd.into_iter().collect();
        let answer = front_end.try_set(request, &payload, &fds);
        assert!(answer.is_some_and(|a| a != 0), "{request:?} {answer:?}");
    }
    assert_eq!(front_end.get(Req::GET_QUEUE_NUM), 2);
    drop(front_end);
    assert_alive(&back_end);
    back_end.stop();
}

#[test]
fn a_running_ring_cannot_be_changed_under_the_device() {
    let back_end = BackEnd::start(Mode::Listen);
    let mut front_end = FrontEnd::connect(back_end.path(), PROTOCOL_FEATURES);
    let memory = Memory::new(MEMORY);
    front_end.set_memory(&memory);
    let mut driver = Driver::new(&memory, 0, 64);
    front_end.set_ring(0, &driver);
    front_end.enable(0, true);
    for request in [Req::SET_VRING_NUM, Req::SET_VRING_BASE] {
        let answer = front_end.try_set(request, &FrontEnd::state(0, 32), &[]);
        assert!(answer.is_some_and(|a| a != 0), "{request:?}");
    }
    driver.request(0, b"still");
    driver.publish();
    assert_eq!(driver.complete(), (0, 5));
    drop(front_end);
    back_end.stop();
}

#[test]
fn garbage_ends_the_session_and_only_that() {
    let seed = StdRng::from_os_rng().random();
    println!("seed {seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let back_end = BackEnd::start(Mode::Listen);
    let memory = Memory::new(MEMORY);
    let event = eventfd();
    for _ in 0..60 {
        let protocol = PROTOCOL_FEATURES & !(u64::from(rng.random_bool(0.2)) << 3);
        let mut front_end = FrontEnd::connect(back_end.path(), protocol);
        if rng.random() {
            front_end.set_memory(&memory);
        }
        for _ in 0..rng.random_range(1..40) {
            let request = match rng.random_range(0..20) {
                0 => rng.random(),
                _ => rng.random_range(0..46),
            };
            let mut payload = vec![0; *pick(&mut rng, &[0, 8, 8, 8, 20, 24, 40, 40, 72, 300])];
            match rng.random_range(0..3) {
                0 => rng.fill(&mut payload[..]),
                1 => payload.fill(rng.random_range(0..3)),
                _ => {
                    let len = payload.len().min(40);
                    payload[..len].copy_from_slice(&plausible(&mut rng)[..len]);
                }
            }
            let fds: Vec<i32> = (0..*pick(&mut rng, &[0, 0, 1, 1, 2, 40]))
                .map(|_| {
                    let fd = if rng.random() {
                        memory.fd.as_fd()
                    } else {
                        event.as_fd()
                    };
                    std::os::fd::AsRawFd::as_raw_fd(&fd)
                })
                .collect();
            // Mostly acknowledged, so that a refusal does not end the session.
            let flags = *pick(&mut rng, &[9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 1, 1, 1, 9, 0, 5]);
            front_end.send_raw(request, flags, &payload, &fds);
        }
    }
    assert_alive(&back_end);
    back_end.stop();
}

fn pick<'a, T>(rng: &mut StdRng, from: &'a [T]) -> &'a T {
    &from[rng.random_range(0..from.len())]
}

/// Five numbers that are often nearly right.
fn plausible(rng: &mut StdRng) -> Vec<u8> {
    let base = [
        0,
        1,
        2,
        64,
        0x1000,
        GUEST_BASE,
        crate::testing::front_end::USER_BASE,
        u64::MAX,
    ];
    (0..5)
        .flat_map(|_| {
            let near = rng.random_range(0..3u64);
            pick(rng, &base).wrapping_add(near * 16).to_ne_bytes()
        })
        .collect()
}

#[test]
fn a_broken_ring_is_reported_and_can_be_reset() {
    let back_end = BackEnd::start(Mode::Listen);
    let mut front_end = FrontEnd::connect(back_end.path(), PROTOCOL_FEATURES);
    let (ours, theirs) = UnixStream::pair().unwrap();
    front_end.set(Req::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]);
    let mut channel = FrontEnd::plain(ours);
    let memory = Memory::new(MEMORY);
    front_end.set_memory(&memory);
    let mut driver = Driver::new(&memory, 0, 64);
    front_end.set_ring(0, &driver);
    front_end.enable(0, true);
    assert_eq!(front_end.get(Req::GET_STATUS), 0);
    driver.descriptor(0, GUEST_BASE, 16, NEXT, 0);
    driver.make_available(0);
    driver.publish();
    assert!(wait(driver.err.as_fd(), PATIENCE_MS), "no error signalled");
    assert_eq!(channel.receive(), Some(vec![]), "no config change");
    assert_eq!(front_end.get(Req::GET_STATUS), NEEDS_RESET);
    assert_eq!(front_end.get_base(0), 0);
    front_end.set(Req::RESET_DEVICE, &[], &[]);
    assert_eq!(front_end.get(Req::GET_STATUS), 0);
    let mut driver = Driver::new(&Memory::new(MEMORY), 0, 64);
    front_end.set_memory(&driver.memory);
    front_end.set_ring(0, &driver);
    front_end.enable(0, true);
    driver.request(0, b"again");
    driver.publish();
    assert_eq!(driver.complete(), (0, 5));
    back_end.stop();
}

#[test]
fn truncated_memory_fails_the_ring_and_not_the_daemon() {
    let back_end = BackEnd::start(Mode::Listen);
    let mut front_end = FrontEnd::connect(back_end.path(), PROTOCOL_FEATURES);
    let memory = Memory::new(MEMORY);
    front_end.set_memory(&memory);
    let mut driver = Driver::new(&memory, 0, 64);
    front_end.set_ring(0, &driver);
    front_end.enable(0, true);
    driver.request(40, b"gone");
    nix::unistd::ftruncate(&memory.fd, driver.buffer(40) as i64).unwrap();
    driver.publish();
    assert!(wait(driver.err.as_fd(), PATIENCE_MS), "no error signalled");
    drop(front_end);
    assert_alive(&back_end);
    back_end.stop();
}

#[test]
fn a_guest_that_scribbles_over_its_rings_harms_only_itself() {
    let seed = StdRng::from_os_rng().random();
    println!("seed {seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let back_end = BackEnd::start(Mode::Listen);
    back_end.control.release();
    for _ in 0..20 {
        let mut front_end = FrontEnd::connect(back_end.path(), PROTOCOL_FEATURES);
        let memory = Memory::new(MEMORY);
        front_end.set_memory(&memory);
        let mut driver = Driver::new(&memory, 0, 64);
        front_end.set_ring(0, &driver);
        front_end.enable(0, true);
        let mut scribbler = StdRng::seed_from_u64(rng.random());
        let (target, rings) = (memory.clone(), driver.buffer(0));
        let scribbling = std::thread::spawn(move || {
            for _ in 0..20_000 {
                let at = scribbler.random_range(0..rings - 8) & !1;
                let mut bytes = plausible(&mut scribbler);
                bytes.truncate(*pick(&mut scribbler, &[2, 4, 8]));
                target.write(at, &bytes);
            }
        });
        for round in 0..200u16 {
            driver.request((round % 31) * 2, b"scribbled over");
            driver.publish();
        }
        scribbling.join().unwrap();
        front_end.get_base(0);
    }
    assert_alive(&back_end);
    back_end.stop();
}
