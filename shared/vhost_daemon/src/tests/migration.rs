//! What a migrating front-end relies on: a page that differs from its copy has its bit set.

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::sync::Arc;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use vhost::vhost_user::message::FrontendReq as Req;

use super::device::{BackEnd, Mode};
use crate::session::PROTOCOL_FEATURES;
use crate::testing::front_end::{
    Driver, FrontEnd, GUEST_BASE, Memory, PATIENCE_MS, RingPlaces, wait,
};
use crate::testing::packed_driver::PackedDriver;

const MEMORY: usize = 1 << 20;
const PAGE: usize = 4096;
/// VERSION_1, PROTOCOL_FEATURES, EVENT_IDX.
const SPLIT: u64 = 1 << 32 | 1 << 30 | 1 << 29;
const PACKED: u64 = SPLIT | 1 << 34;
const LOG_ALL: u64 = 1 << 26;
/// Covers the guest's memory and not a page more.
const LOG_LEN: usize = (GUEST_BASE as usize + MEMORY) / PAGE / 8;

/// The driver's side of either layout.
enum Guest {
    Split(Driver),
    Packed(PackedDriver),
}

impl Guest {
    fn places(&self) -> RingPlaces<'_> {
        match self {
            Guest::Split(driver) => RingPlaces {
                size: driver.size,
                base: u32::from(driver.avail),
                parts: [driver.offset, driver.used_offset(), driver.avail_offset()],
                log: None,
                fds: [&driver.kick, &driver.call, &driver.err],
            },
            Guest::Packed(driver) => driver.places(),
        }
    }

    /// The same with the ring's own pages logged at their guest address.
    fn logged(&self) -> RingPlaces<'_> {
        let mut places = self.places();
        places.log = Some(GUEST_BASE + places.parts[1] as u64);
        places
    }

    fn request(&mut self, number: u16, data: &[u8]) {
        match self {
            Guest::Split(driver) => {
                driver.request(2 * number, data);
                driver.publish();
            }
            Guest::Packed(driver) => {
                driver.request(number, data);
                driver.publish();
            }
        }
    }

    fn complete(&mut self) {
        match self {
            Guest::Split(driver) => drop(driver.complete()),
            Guest::Packed(driver) => drop(driver.complete()),
        }
    }

    /// Pages of memory that only the device has to log: those the driver never writes itself.
    fn answer_page(&self, number: u16) -> usize {
        let buffer = match self {
            Guest::Split(driver) => driver.buffer(2 * number),
            Guest::Packed(driver) => driver.buffer(number),
        };
        buffer / PAGE
    }
}

struct Migration {
    back_end: BackEnd,
    front_end: FrontEnd,
    features: u64,
    memory: Arc<Memory>,
    guest: Guest,
    log: Arc<Memory>,
}

impl Migration {
    fn new(features: u64) -> Migration {
        let back_end = BackEnd::start(Mode::Listen);
        let mut front_end = FrontEnd::connect(back_end.path(), PROTOCOL_FEATURES);
        front_end.set(Req::SET_FEATURES, &features.to_ne_bytes(), &[]);
        let memory = Memory::new(MEMORY);
        front_end.set_memory(&memory);
        let guest = if features == PACKED {
            Guest::Packed(PackedDriver::new(&memory, 0, 64))
        } else {
            Guest::Split(Driver::new(&memory, 0, 64))
        };
        front_end.set_ring_places(0, &guest.places());
        front_end.enable(0, true);
        Migration {
            back_end,
            front_end,
            features,
            memory,
            guest,
            log: Memory::new(LOG_LEN + 2 * PAGE),
        }
    }

    fn set_log_base(&mut self, len: usize) -> Option<u64> {
        let spec = [len as u64, PAGE as u64].map(u64::to_ne_bytes).concat();
        let fds = [self.log.fd.as_fd()];
        self.front_end.try_set(Req::SET_LOG_BASE, &spec, &fds)
    }

    fn set_logging(&mut self, on: bool) -> Option<u64> {
        let bit = if on { LOG_ALL } else { 0 };
        let features = (self.features | bit).to_ne_bytes();
        let answer = self.front_end.try_set(Req::SET_FEATURES, &features, &[]);
        let places = if on {
            self.guest.logged()
        } else {
            self.guest.places()
        };
        let payload = places.addresses(0);
        self.front_end.set(Req::SET_VRING_ADDR, &payload, &[]);
        answer
    }

    /// Pages whose bits were set, which are cleared.
    fn take_bits(&self) -> BTreeSet<usize> {
        let bytes = self.log.read(PAGE, LOG_LEN);
        self.log.write(PAGE, &[0; LOG_LEN]);
        let first = GUEST_BASE as usize / PAGE;
        let set = |page: &usize| bytes[page / 8] & 1 << (page % 8) != 0;
        (0..8 * LOG_LEN)
            .filter(set)
            .map(|page| page - first)
            .collect()
    }

    fn copy(&self) -> Vec<u8> {
        self.memory.read(0, MEMORY)
    }

    fn stop(self) {
        drop(self.front_end);
        self.back_end.stop();
    }
}

fn changed(before: &[u8], after: &[u8]) -> BTreeSet<usize> {
    let pages = before.chunks(PAGE).zip(after.chunks(PAGE)).enumerate();
    pages
        .filter(|(_, (a, b))| a != b)
        .map(|(page, _)| page)
        .collect()
}

#[test]
fn every_page_that_the_device_wrote_is_logged_and_answers_exactly() {
    for features in [SPLIT, PACKED] {
        let seed = StdRng::from_os_rng().random();
        println!("seed {seed}");
        let mut rng = StdRng::seed_from_u64(seed);
        let mut migration = Migration::new(features);
        assert_eq!(migration.set_log_base(LOG_LEN), Some(0));
        assert_eq!(migration.set_logging(true), Some(0));
        migration.take_bits();
        for round in 0..200u8 {
            let before = migration.copy();
            let numbers: BTreeSet<u16> = (0..3).map(|_| rng.random_range(0..24)).collect();
            for number in &numbers {
                migration.guest.request(*number, &[1, round, 7]);
            }
            // What the driver itself changes is the hypervisor's to log.
            for _ in &numbers {
                migration.guest.complete();
            }
            let after = migration.copy();
            let bits = migration.take_bits();
            let answers: BTreeSet<usize> = numbers
                .iter()
                .map(|number| migration.guest.answer_page(*number))
                .collect();
            assert!(bits.is_superset(&answers), "{answers:?} in {bits:?}");
            let written = changed(&before, &after);
            assert!(bits.is_superset(&written), "{written:?} in {bits:?}");
            // Besides the answers only pages of the ring.
            let ring = migration.guest.answer_page(0);
            let others: Vec<_> = bits.difference(&answers).filter(|p| **p >= ring).collect();
            assert!(others.is_empty(), "{others:?} were not written");
        }
        migration.stop();
    }
}

#[test]
fn nothing_is_logged_before_and_after() {
    let mut migration = Migration::new(SPLIT);
    assert_eq!(migration.set_log_base(LOG_LEN), Some(0));
    migration.guest.request(1, b"before");
    migration.guest.complete();
    assert!(migration.take_bits().is_empty());
    assert_eq!(migration.set_logging(true), Some(0));
    migration.guest.request(2, b"during");
    migration.guest.complete();
    assert!(!migration.take_bits().is_empty());
    assert_eq!(migration.set_logging(false), Some(0));
    migration.take_bits();
    migration.guest.request(3, b"after");
    migration.guest.complete();
    assert!(migration.take_bits().is_empty());
    migration.stop();
}

#[test]
fn what_was_in_flight_is_finished_before_logging_begins() {
    for features in [SPLIT, PACKED] {
        let mut migration = Migration::new(features);
        assert_eq!(migration.set_log_base(LOG_LEN), Some(0));
        migration.guest.request(1, b"Hold");
        while migration
            .back_end
            .control
            .held
            .load(std::sync::atomic::Ordering::SeqCst)
            == 0
        {
            std::thread::yield_now();
        }
        let on = (features | LOG_ALL).to_ne_bytes();
        migration.front_end.send_raw(2, 9, &on, &[]);
        let socket = migration.front_end.socket.try_clone().unwrap();
        assert!(!wait(socket.as_fd(), 50), "answered while in flight");
        migration.back_end.control.release();
        assert_eq!(migration.front_end.receive(), Some(vec![0; 8]));
        migration.guest.complete();
        migration.guest.request(2, b"next");
        migration.guest.complete();
        let bits = migration.take_bits();
        assert!(bits.contains(&migration.guest.answer_page(2)));
        assert!(!bits.contains(&migration.guest.answer_page(1)));
        migration.stop();
    }
}

#[test]
fn a_log_that_cannot_hold_everything_is_refused() {
    let mut migration = Migration::new(SPLIT);
    let refused = |answer: Option<u64>| answer.is_some_and(|code| code != 0);
    assert!(refused(migration.set_logging_bit()), "without a log");
    assert!(
        refused(migration.set_log_base(LOG_LEN + 2 * PAGE)),
        "beyond the file"
    );
    assert!(refused(migration.set_log_base(0)));
    assert_eq!(
        migration.set_log_base(LOG_LEN - 1),
        Some(0),
        "logging is off"
    );
    assert!(refused(migration.set_logging_bit()), "a page short");
    assert_eq!(migration.set_log_base(LOG_LEN), Some(0));
    assert_eq!(migration.set_logging_bit(), Some(0));
    assert!(
        refused(migration.set_log_base(LOG_LEN - 1)),
        "logging is on"
    );
    let mut places = migration.guest.places();
    places.log = Some(GUEST_BASE + MEMORY as u64 - 8);
    let payload = places.addresses(0);
    let answer = migration
        .front_end
        .try_set(Req::SET_VRING_ADDR, &payload, &[]);
    assert!(refused(answer), "the ring's log address");
    migration.guest.request(2, b"still");
    migration.guest.complete();
    assert!(!migration.take_bits().is_empty());
    migration.stop();
}

#[test]
fn a_ring_that_is_to_log_waits_for_its_log() {
    let mut migration = Migration::new(SPLIT);
    migration.front_end.get_base(0);
    assert_eq!(migration.set_logging(true), Some(0));
    let places = migration.guest.logged();
    migration.front_end.set_ring_places(0, &places);
    migration.guest.request(5, b"early");
    assert_eq!(migration.set_log_base(LOG_LEN), Some(0));
    migration.guest.complete();
    assert!(
        migration
            .take_bits()
            .contains(&migration.guest.answer_page(5))
    );
    migration.stop();
}

#[test]
fn a_truncated_log_fails_the_ring_and_not_the_daemon() {
    let mut migration = Migration::new(SPLIT);
    assert_eq!(migration.set_log_base(LOG_LEN), Some(0));
    assert_eq!(migration.set_logging(true), Some(0));
    nix::unistd::ftruncate(&migration.log.fd, 0).unwrap();
    migration.guest.request(1, b"gone");
    migration.guest.complete();
    migration.guest.request(1, b"next");
    assert!(wait(migration.guest.places().fds[2].as_fd(), PATIENCE_MS));
    migration.stop();
}

impl Migration {
    /// Only the feature bit.
    fn set_logging_bit(&mut self) -> Option<u64> {
        let features = (self.features | LOG_ALL).to_ne_bytes();
        self.front_end.try_set(Req::SET_FEATURES, &features, &[])
    }
}
