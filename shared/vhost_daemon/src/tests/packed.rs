//! Packed rings, well used and abused.

use std::os::fd::AsFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use vhost::vhost_user::message::FrontendReq as Req;

use super::device::{BackEnd, Mode};
use crate::memory::MemoryTable;
use crate::ring::{Chain, PackedRing, Position, RingError, RingFeatures, RingOrigin, RingParts};
use crate::session::PROTOCOL_FEATURES;
use crate::testing::front_end::{
    FrontEnd, GUEST_BASE, INDIRECT, Memory, NEXT, PATIENCE_MS, USER_BASE,
};
use crate::testing::front_end::{WRITE, wait};
use crate::testing::packed_driver::PackedDriver;
use crate::wire::{RegionSpec, RingAddresses};

const MEMORY: usize = 1 << 20;
/// VERSION_1, PROTOCOL_FEATURES, RING_PACKED.
const PACKED: u64 = 1 << 32 | 1 << 30 | 1 << 34;
const EVENT_IDX: u64 = 1 << 29;
const INDIRECT_DESC: u64 = 1 << 28;
const AVAIL: u16 = 1 << 7;

fn ready(back_end: &BackEnd, features: u64) -> (FrontEnd, PackedDriver) {
    let mut front_end = FrontEnd::connect(back_end.path(), PROTOCOL_FEATURES);
    front_end.set(Req::SET_FEATURES, &features.to_ne_bytes(), &[]);
    let memory = Memory::new(MEMORY);
    front_end.set_memory(&memory);
    let mut driver = PackedDriver::new(&memory, 0, 64);
    driver.event_idx = features & EVENT_IDX != 0;
    front_end.set_ring_places(0, &driver.places());
    (front_end, driver)
}

#[test]
fn requests_are_answered_with_and_without_event_idx() {
    for features in [PACKED | EVENT_IDX, PACKED] {
        let back_end = BackEnd::start(Mode::Listen);
        let (mut front_end, mut driver) = ready(&back_end, features);
        front_end.enable(0, true);
        for round in 0..500u16 {
            let ids = [40, 1, 17, 3, 9];
            for id in ids {
                driver.request(id, &[b'e', round as u8, id as u8, 2, 3]);
            }
            driver.publish();
            for _ in ids {
                let (id, written) = driver.complete();
                assert_eq!(written, 5);
                assert_eq!(driver.answer(id, 5), [b'e', round as u8, id as u8, 2, 3]);
            }
        }
        // 5000 descriptors are 78 laps and 8 descriptors: wrap counters are 1 again.
        assert_eq!(front_end.get_base(0), 0x8008_8008);
        back_end.stop();
    }
}

#[test]
fn a_stopped_ring_goes_on_where_it_was() {
    let back_end = BackEnd::start(Mode::Listen);
    let (mut front_end, mut driver) = ready(&back_end, PACKED | EVENT_IDX);
    for round in 0..100u8 {
        front_end.set_ring_places(0, &driver.places());
        front_end.enable(0, true);
        driver.request(7, &[0, round, 0, 0]);
        driver.publish();
        assert_eq!(driver.complete(), (7, 4));
        assert_eq!(front_end.get_base(0), driver.places().base);
    }
    back_end.stop();
}

#[test]
fn completions_overtake_each_other() {
    let back_end = BackEnd::start(Mode::Listen);
    let (mut front_end, mut driver) = ready(&back_end, PACKED | EVENT_IDX);
    front_end.enable(0, true);
    driver.request(5, b"Hold");
    driver.publish();
    for round in 0..200u8 {
        driver.request(6, &[b'f', round]);
        driver.publish();
        assert_eq!(driver.complete(), (6, 2), "round {round}");
    }
    back_end.control.release();
    assert_eq!(driver.complete(), (5, 4));
    assert_eq!(driver.answer(5, 4), b"Hold");
    back_end.stop();
}

#[test]
fn indirect_tables_are_read_in_order() {
    let back_end = BackEnd::start(Mode::Listen);
    let (mut front_end, mut driver) = ready(&back_end, PACKED | EVENT_IDX | INDIRECT_DESC);
    front_end.enable(0, true);
    let at = driver.buffer(9);
    driver.memory.write(at, b"indirect");
    let guest = GUEST_BASE + at as u64;
    let table = PackedDriver::new(&driver.memory, at + 1024, 64);
    let pieces = [(guest, 3, 0), (guest + 3, 5, 0), (guest + 2048, 8, WRITE)];
    let mut place = Position::START;
    for (addr, len, flags) in pieces {
        table.descriptor(place, addr, len, 0, flags);
        place = place.advanced(1, 64);
    }
    driver.push(9, &[(guest + 1024, 48, INDIRECT)]);
    driver.publish();
    assert_eq!(driver.complete(), (9, 8));
    assert_eq!(driver.answer(9, 8), b"indirect");
    back_end.stop();
}

#[test]
fn a_reset_device_forgets_the_positions_of_its_inflight_region() {
    let back_end = BackEnd::start(Mode::Listen);
    let (mut front_end, mut driver) = ready(&back_end, PACKED | EVENT_IDX);
    let mut wanted = [0; 24];
    wanted[16] = 1;
    wanted[18] = 64;
    front_end.send(Req::GET_INFLIGHT_FD, &wanted, &[]);
    let (spec, fd) = front_end.receive_fd();
    front_end.set(Req::SET_INFLIGHT_FD, &spec, &[fd.as_fd()]);
    for round in 0..3u8 {
        front_end.set_ring_places(0, &driver.places());
        front_end.enable(0, true);
        for _ in 0..10 {
            driver.request(3, &[round; 4]);
            driver.publish();
            assert_eq!(driver.complete(), (3, 4));
        }
        front_end.set(Req::RESET_DEVICE, &[], &[]);
        driver = PackedDriver::new(&driver.memory, 0, 64);
        driver.memory.write(0, &[0; 64 * 16 + 8]);
    }
    back_end.stop();
}

/// A ring of 16 in one region, driven by hand.
struct Fixture {
    driver: PackedDriver,
    ring: PackedRing,
    chains: Vec<Chain>,
}

impl Fixture {
    fn new(features: u64) -> Fixture {
        let memory = Memory::new(MEMORY);
        let spec = RegionSpec {
            guest_addr: GUEST_BASE,
            size: MEMORY as u64,
            user_addr: USER_BASE,
            mmap_offset: 0,
        };
        let fd = memory.fd.try_clone().unwrap();
        let table = MemoryTable::default().with(&spec, fd).unwrap();
        let table = Rc::new(Arc::new(table));
        let driver = PackedDriver::new(&memory, 0, 16);
        let user = |offset: usize| USER_BASE + offset as u64;
        let parts = RingParts {
            index: 0,
            size: 16,
            base: driver.places().base,
            origin: RingOrigin::Base,
            features: RingFeatures::of(features | 1 << 34),
            addresses: RingAddresses {
                descriptors: user(0),
                available: user(driver.driver_event()),
                used: user(driver.device_event()),
            },
            inflight: None,
        };
        let ring = PackedRing::new(parts, table.clone()).unwrap().0;
        let chains = (0..8).map(|_| Chain::new(table.clone())).collect();
        Fixture {
            driver,
            ring,
            chains,
        }
    }

    fn fetch(&mut self) -> (usize, Option<RingError>) {
        self.ring.fetch(&mut self.chains)
    }
}

#[test]
fn broken_chains_are_refused_with_their_reason() {
    let base = GUEST_BASE + 0x8000;
    type Pieces = Vec<(u64, u32, u16)>;
    let cases: [(&str, Pieces); 9] = [
        ("not in shared memory", vec![(0, 4, 0)]),
        ("not in shared memory", vec![(u64::MAX - 1, 8, 0)]),
        (
            "not in shared memory",
            vec![(GUEST_BASE + MEMORY as u64 - 4, 8, 0)],
        ),
        (
            "readable buffer after",
            vec![(base, 4, WRITE), (base, 4, 0)],
        ),
        ("indirect table of 0", vec![(base, 0, INDIRECT)]),
        ("indirect table of 24", vec![(base, 24, INDIRECT)]),
        (
            "indirect table of 16",
            vec![(base, 16, INDIRECT), (base, 4, 0)],
        ),
        (
            "indirect table of 4294967280",
            vec![(base, u32::MAX - 15, INDIRECT)],
        ),
        ("not in shared memory", vec![(16, 16, INDIRECT)]),
    ];
    for (reason, pieces) in cases {
        let mut fixture = Fixture::new(INDIRECT_DESC);
        fixture.driver.push(0, &pieces);
        let error = fixture.fetch().1.unwrap().to_string();
        assert!(error.contains(reason), "{error}: expected {reason}");
    }
    let mut fixture = Fixture::new(0);
    fixture.driver.push(0, &[(base, 16, INDIRECT)]);
    assert!(matches!(
        fixture.fetch(),
        (0, Some(RingError::Indirect { .. }))
    ));
}

#[test]
fn indirect_tables_do_not_nest_and_end_at_2048() {
    for (count, flags, accepted) in [(2048u32, 0, true), (2049, 0, false), (2, INDIRECT, false)] {
        let mut fixture = Fixture::new(INDIRECT_DESC);
        let table = PackedDriver::new(&fixture.driver.memory, 0x8000, 4096);
        let mut at = Position::START;
        for _ in 0..count {
            table.descriptor(at, GUEST_BASE, 1, 0, flags);
            at = at.advanced(1, 4096);
        }
        let piece = (GUEST_BASE + 0x8000, 16 * count, INDIRECT);
        fixture.driver.push(0, &[piece]);
        assert_eq!(fixture.fetch().1.is_none(), accepted, "{count}");
    }
}

#[test]
fn a_driver_that_takes_back_what_the_device_owns_is_stopped() {
    let mut fixture = Fixture::new(0);
    for id in 0..16 {
        fixture.driver.push(id, &[(GUEST_BASE, 4, 0)]);
    }
    for _ in 0..2 {
        assert_eq!(fixture.fetch(), (8, None));
    }
    assert_eq!(fixture.fetch(), (0, None));
    // The next lap's flags in a slot whose request is in flight.
    let flags = 1 << 15;
    fixture
        .driver
        .descriptor(Position::START, GUEST_BASE, 4, 0, flags);
    assert_eq!(fixture.fetch(), (0, Some(RingError::Overrun(16))));
    // A chain that never ends runs out of descriptors as well.
    let mut fixture = Fixture::new(0);
    for index in 0..16 {
        let at = Position::START.advanced(index, 16);
        fixture
            .driver
            .descriptor(at, GUEST_BASE, 4, 0, NEXT | AVAIL);
    }
    assert_eq!(fixture.fetch(), (0, Some(RingError::Overrun(16))));
}

#[test]
fn ids_are_the_drivers_own_business() {
    let mut fixture = Fixture::new(0);
    for id in [65535, 3, 3] {
        fixture.driver.chains.clear();
        fixture.driver.push(id, &[(GUEST_BASE, 4, WRITE)]);
    }
    assert_eq!(fixture.fetch(), (3, None));
    for chain in (0..3).rev() {
        let head = fixture.chains[chain].head();
        fixture.ring.push_used(head, 4);
    }
    fixture.ring.publish();
    let mut ids = Vec::new();
    for _ in 0..3 {
        fixture.driver.chains.extend([(3, 1), (65535, 1)]);
        ids.push(fixture.driver.try_complete().unwrap().0);
    }
    assert_eq!(ids, [3, 3, 65535]);
}

#[test]
fn a_batch_is_seen_as_a_whole() {
    let mut fixture = Fixture::new(0);
    for id in 0..6 {
        fixture
            .driver
            .push(id, &[(GUEST_BASE, 4, WRITE), (GUEST_BASE, 4, WRITE)]);
    }
    assert_eq!(fixture.fetch(), (6, None));
    for chain in [4, 2, 0] {
        let head = fixture.chains[chain].head();
        fixture.ring.push_used(head, 8);
        assert_eq!(fixture.driver.try_complete(), None);
    }
    assert!(fixture.ring.publish());
    assert!(!fixture.ring.publish());
    let ids: Vec<_> = std::iter::from_fn(|| fixture.driver.try_complete()).collect();
    assert_eq!(ids, [(4, 8), (2, 8), (0, 8)]);
}

#[test]
fn calls_come_when_the_driver_asked_for_them() {
    let mut fixture = Fixture::new(EVENT_IDX);
    let complete = |fixture: &mut Fixture, id| {
        fixture.driver.push(id, &[(GUEST_BASE, 4, WRITE)]);
        assert_eq!(fixture.fetch(), (1, None));
        let head = fixture.chains[0].head();
        fixture.ring.push_used(head, 4);
        fixture.ring.publish();
        let call = fixture.ring.needs_call();
        fixture.driver.try_complete().unwrap();
        call
    };
    for round in 0..40 {
        fixture.driver.ask_for_calls(2);
        assert!(complete(&mut fixture, round), "at its event, round {round}");
        assert!(!complete(&mut fixture, round), "beyond its event");
        fixture.driver.ask_for_calls(1);
        assert!(!complete(&mut fixture, round), "while disabled");
        fixture.driver.ask_for_calls(0);
        assert!(complete(&mut fixture, round), "while enabled");
    }
}

#[test]
fn a_base_outside_of_the_ring_is_refused() {
    let back_end = BackEnd::start(Mode::Listen);
    let (mut front_end, driver) = ready(&back_end, PACKED);
    let mut places = driver.places();
    places.base = 64;
    front_end.set_ring_places(0, &places);
    let answer = front_end.try_set(Req::SET_VRING_ENABLE, &FrontEnd::state(0, 1), &[]);
    assert!(answer.is_some_and(|code| code != 0));
    back_end.stop();
}

#[test]
fn a_broken_ring_is_reported() {
    let back_end = BackEnd::start(Mode::Listen);
    let (mut front_end, mut driver) = ready(&back_end, PACKED);
    front_end.enable(0, true);
    driver.push(0, &[(1, 4, 0)]);
    driver.publish();
    assert!(wait(driver.err.as_fd(), PATIENCE_MS), "no error signalled");
    assert_eq!(front_end.get(Req::GET_STATUS), 0x40);
    back_end.stop();
}

#[test]
fn memory_changes_while_requests_are_in_flight() {
    let back_end = BackEnd::start(Mode::Listen);
    let (mut front_end, mut driver) = ready(&back_end, PACKED | EVENT_IDX);
    front_end.enable(0, true);
    driver.request(0, b"Hold");
    driver.publish();
    while back_end.control.held.load(Ordering::SeqCst) < 1 {
        std::thread::yield_now();
    }
    let again = Memory::map(driver.memory.fd.try_clone().unwrap(), MEMORY);
    let padded = [vec![0; 8], FrontEnd::region(&again)].concat();
    front_end.set(Req::REM_MEM_REG, &padded, &[]);
    front_end.set(Req::ADD_MEM_REG, &padded, &[again.fd.as_fd()]);
    driver.request(2, b"next");
    driver.publish();
    assert_eq!(driver.complete(), (2, 4));
    back_end.control.release();
    assert_eq!(driver.complete(), (0, 4));
    assert_eq!(driver.answer(0, 4), b"Hold");
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
        let features = PACKED | EVENT_IDX | INDIRECT_DESC;
        let (mut front_end, mut driver) = ready(&back_end, features);
        front_end.enable(0, true);
        let mut scribbler = StdRng::seed_from_u64(rng.random());
        let (target, rings) = (driver.memory.clone(), driver.buffer(0));
        let scribbling = std::thread::spawn(move || {
            for _ in 0..20_000 {
                let at = scribbler.random_range(0..1032) & !1;
                let near = match scribbler.random_range(0..4) {
                    0 => scribbler.random(),
                    1 => GUEST_BASE + scribbler.random_range(0..MEMORY as u64),
                    // Flags of every kind, behind a length and an id.
                    2 => scribbler.random::<u64>() & 0x8087_0007_0000_0fff,
                    _ => 0x8000_0000_0000_0010,
                };
                let len = 2 << scribbler.random_range(0..3);
                let len = len.min(rings - at);
                target.write(at, &near.to_le_bytes()[..len]);
            }
        });
        for round in 0..200u16 {
            driver.chains.clear();
            driver.used = driver.avail;
            driver.request(round % 31, b"scribbled over");
            driver.publish();
        }
        scribbling.join().unwrap();
        front_end.get_base(0);
    }
    let (mut front_end, mut driver) = ready(&back_end, PACKED);
    front_end.enable(0, true);
    driver.request(0, b"alive");
    driver.publish();
    assert_eq!(driver.complete(), (0, 5));
    back_end.stop();
}

#[test]
fn what_was_not_returned_is_fetched_again_after_a_rewind() {
    let mut fixture = Fixture::new(1 << 29);
    let at = GUEST_BASE + 0x8000;
    let two = [(at, 8, WRITE), (at + 64, 8, WRITE)];
    for lap in 0..9 {
        for id in 0..5 {
            fixture.driver.push(id, &two);
        }
        assert_eq!(fixture.fetch(), (5, None), "lap {lap}");
        for number in 0..2 {
            let head = fixture.chains[number].head();
            fixture.ring.push_used(head, 1);
        }
        fixture.ring.publish();
        fixture.ring.rewind();
        let base = fixture.ring.base();
        assert_eq!((fixture.ring.in_flight(), base >> 16), (0, base & 0xffff));
        assert_eq!(fixture.fetch(), (3, None), "lap {lap}");
        for number in 0..3 {
            let head = fixture.chains[number].head();
            fixture.ring.push_used(head, 1);
        }
        fixture.ring.publish();
        for id in 0..5 {
            assert_eq!(fixture.driver.try_complete(), Some((id, 1)), "lap {lap}");
        }
    }
}
