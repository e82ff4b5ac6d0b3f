//! The ring engine against memory that a hostile guest filled.

#![expect(unsafe_code, reason = "looks at the pointers that chains were given")]

use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

use executor::Buffer;
use executor::buffer::IoVecs;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::memory::MemoryTable;
use crate::ring::{Chain, RingError, RingFeatures, RingOrigin, RingParts, SharedMemory, SplitRing};
use crate::testing::front_end::{Driver, GUEST_BASE, INDIRECT, Memory, NEXT, USER_BASE, WRITE};
use crate::wire::{RegionSpec, RingAddresses};

const MEMORY: usize = 1 << 18;
const SIZE: u16 = 16;

/// A ring in the first of two regions; the second continues the guest's addresses elsewhere.
struct Fixture {
    driver: Driver,
    table: SharedMemory,
}

fn region(memory: &Memory, at: u64) -> (RegionSpec, OwnedFd) {
    let spec = RegionSpec {
        guest_addr: GUEST_BASE + at,
        size: MEMORY as u64,
        user_addr: USER_BASE + at,
        mmap_offset: 0,
    };
    (spec, memory.fd.try_clone().unwrap())
}

impl Fixture {
    fn new() -> Fixture {
        let (first, second) = (Memory::new(MEMORY), Memory::new(MEMORY));
        let regions = vec![region(&first, 0), region(&second, MEMORY as u64)];
        let table = MemoryTable::default().replaced(regions).unwrap();
        Fixture {
            driver: Driver::new(&first, 0, SIZE),
            table: Rc::new(Arc::new(table)),
        }
    }

    fn ring(&self, features: u64) -> SplitRing {
        self.ring_from(features, RingOrigin::Base)
    }

    fn ring_from(&self, features: u64, origin: RingOrigin) -> SplitRing {
        let user = |offset: usize| USER_BASE + offset as u64;
        let parts = RingParts {
            index: 0,
            size: SIZE,
            base: u32::from(self.driver.avail),
            origin,
            features: RingFeatures::of(features),
            addresses: RingAddresses {
                descriptors: user(0),
                available: user(self.driver.avail_offset()),
                used: user(self.driver.used_offset()),
            },
            inflight: None,
        };
        SplitRing::new(parts, self.table.clone()).unwrap().0
    }

    fn chains(&self) -> Vec<Chain> {
        (0..8).map(|_| Chain::new(self.table.clone())).collect()
    }

    /// What fetching the one request of `head` gives.
    fn fetch(&mut self, head: u16) -> Result<Chain, RingError> {
        let mut ring = self.ring(1 << 28 | 1 << 29);
        self.driver.make_available(head);
        self.driver.publish();
        let mut chains = self.chains();
        match ring.fetch(&mut chains) {
            (1, None) => Ok(chains.swap_remove(0)),
            (0, Some(error)) => Err(error),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn broken_chains_are_refused_with_their_reason() {
    let base = GUEST_BASE + 0x8000;
    type Setup = fn(&Driver, u64);
    let cases: [(&str, Setup); 11] = [
        ("too long or loops", |d, b| d.descriptor(0, b, 4, NEXT, 0)),
        ("does not exist", |d, b| d.descriptor(0, b, 4, NEXT, SIZE)),
        ("not in shared memory", |d, _| d.descriptor(0, 0, 4, 0, 0)),
        ("not in shared memory", |d, _| {
            d.descriptor(0, GUEST_BASE + 2 * MEMORY as u64 - 4, 8, 0, 0);
        }),
        ("not in shared memory", |d, _| {
            d.descriptor(0, u64::MAX - 1, 8, 0, 0)
        }),
        ("readable buffer after", |d, b| {
            d.descriptor(0, b, 4, NEXT | WRITE, 1);
            d.descriptor(1, b, 4, 0, 0);
        }),
        ("indirect table of 0", |d, b| {
            d.descriptor(0, b, 0, INDIRECT, 0)
        }),
        ("indirect table of 24", |d, b| {
            d.descriptor(0, b, 24, INDIRECT, 0)
        }),
        ("indirect table of 16", |d, b| {
            d.descriptor(0, b, 16, INDIRECT | NEXT, 1)
        }),
        ("indirect table of 4294967280", |d, b| {
            d.descriptor(0, b, u32::MAX - 15, INDIRECT, 0);
        }),
        ("not in shared memory", |d, _| {
            d.descriptor(0, 16, 16, INDIRECT, 0)
        }),
    ];
    for (reason, setup) in cases {
        let mut fixture = Fixture::new();
        setup(&fixture.driver, base);
        let error = fixture.fetch(0).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}: expected {reason}");
    }
}

#[test]
fn indirect_tables_neither_nest_nor_loop() {
    for (flags, next) in [(INDIRECT, 0), (NEXT, 0), (NEXT, 2)] {
        let mut fixture = Fixture::new();
        let table = Driver::new(&fixture.driver.memory, 0x8000, 2);
        table.descriptor(0, GUEST_BASE, 16, flags, next);
        table.descriptor(1, GUEST_BASE, 16, 0, 0);
        fixture
            .driver
            .descriptor(0, GUEST_BASE + 0x8000, 32, INDIRECT, 0);
        assert!(fixture.fetch(0).is_err(), "{flags} {next}");
    }
}

#[test]
fn chains_of_more_than_2048_descriptors_are_refused() {
    for (count, accepted) in [(2048u32, true), (2049, false)] {
        let mut fixture = Fixture::new();
        let table = Driver::new(&fixture.driver.memory, 0x8000, 4096);
        for index in 0..count as u16 {
            table.descriptor(index, GUEST_BASE, 1, NEXT, index + 1);
        }
        table.descriptor(count as u16 - 1, GUEST_BASE, 1, WRITE, 0);
        let len = 16 * count;
        fixture
            .driver
            .descriptor(0, GUEST_BASE + 0x8000, len, INDIRECT, 0);
        assert_eq!(fixture.fetch(0).is_ok(), accepted, "{count}");
    }
}

#[test]
fn indirect_needs_its_feature() {
    let mut fixture = Fixture::new();
    fixture.driver.descriptor(0, GUEST_BASE, 16, INDIRECT, 0);
    let mut ring = fixture.ring(0);
    fixture.driver.make_available(0);
    fixture.driver.publish();
    let (count, error) = ring.fetch(&mut fixture.chains());
    assert_eq!(count, 0);
    assert!(matches!(error, Some(RingError::Indirect { .. })));
}

#[test]
fn heads_and_indexes_are_checked() {
    let mut fixture = Fixture::new();
    assert_eq!(
        fixture.fetch(SIZE).unwrap_err(),
        RingError::DescriptorIndex(SIZE)
    );
    let mut fixture = Fixture::new();
    let mut ring = fixture.ring(0);
    fixture.driver.descriptor(3, GUEST_BASE, 4, 0, 0);
    fixture.driver.make_available(3);
    fixture.driver.make_available(3);
    fixture.driver.publish();
    let (count, error) = ring.fetch(&mut fixture.chains());
    assert_eq!((count, error), (1, Some(RingError::Duplicate(3))));
    let mut fixture = Fixture::new();
    let mut ring = fixture.ring(0);
    fixture.driver.avail = SIZE + 1;
    fixture.driver.publish();
    let (count, error) = ring.fetch(&mut fixture.chains());
    assert_eq!(count, 0);
    assert!(matches!(error, Some(RingError::AvailableIndex { .. })));
}

#[test]
fn buffers_may_continue_in_the_next_region() {
    let mut fixture = Fixture::new();
    let start = GUEST_BASE + MEMORY as u64 - 6;
    fixture.driver.descriptor(0, start, 16, NEXT, 1);
    fixture
        .driver
        .descriptor(1, GUEST_BASE + 0x8000, 3, NEXT, 2);
    fixture.driver.descriptor(2, start - 16, 20, WRITE, 0);
    fixture.driver.memory.write(MEMORY - 6, b"abcdef");
    fixture.driver.memory.write(0x8000, b"xyz");
    let chain = fixture.fetch(0).unwrap();
    assert_eq!((chain.readable_len(), chain.writable_len()), (19, 20));
    let head: [u8; 16] = chain.read_head().unwrap();
    assert_eq!(&head, b"abcdef\0\0\0\0\0\0\0\0\0\0");
    let mut rest = [0; 3];
    assert!(chain.copy_readable(16, &mut rest));
    assert_eq!(&rest, b"xyz");
    assert!(!chain.copy_readable(17, &mut rest));
    assert!(chain.copy_writable(14, b"123456"));
    assert_eq!(fixture.driver.memory.read(MEMORY - 8, 4), b"1234");
    let mut iovecs = IoVecs::new();
    assert!(chain.readable_iovecs(16..19, &mut iovecs));
    let mut copied = [0; 3];
    Buffer::from_iovecs(Rc::new(iovecs)).copy_to_slice(&mut copied);
    assert_eq!(&copied, b"xyz");
    assert!(!chain.readable_iovecs(16..20, &mut IoVecs::new()));
    assert!(chain.read_head::<20>().is_none());
    assert!(chain.writable_tail(1).is_some());
    assert!(chain.writable_tail(21).is_none());
}

/// Fills the ring and its indirect tables with values near the edges.
fn scribble(rng: &mut StdRng, driver: &Driver) {
    let interesting = |rng: &mut StdRng| match rng.random_range(0..6) {
        0 => rng.random(),
        1 => GUEST_BASE + 2 * MEMORY as u64 - rng.random_range(0..64),
        2 => GUEST_BASE + MEMORY as u64 - rng.random_range(0..64),
        3 => GUEST_BASE.wrapping_sub(rng.random_range(0..64)),
        _ => GUEST_BASE + rng.random_range(0..2 * MEMORY as u64),
    };
    let table = Driver::new(&driver.memory, 0x8000, SIZE);
    for target in [driver, &table] {
        for index in 0..SIZE {
            let (addr, len) = match rng.random_range(0..4) {
                0 => (interesting(rng), rng.random()),
                1 => (GUEST_BASE + 0x8000, 16 * rng.random_range(0..20)),
                _ => (interesting(rng), rng.random_range(0..5000)),
            };
            let flags = match rng.random_range(0..8) {
                0 => rng.random(),
                1 => INDIRECT,
                other => other & (NEXT | WRITE),
            };
            let next = rng.random_range(0..SIZE + 1);
            target.descriptor(index, addr, len, flags, next);
        }
    }
}

/// Fetches, uses and returns every chain; fails when one leaves the two regions.
fn drain(fixture: &Fixture, ring: &mut SplitRing) -> Option<RingError> {
    let mut chains = fixture.chains();
    loop {
        let (count, error) = ring.fetch(&mut chains);
        for chain in &chains[..count] {
            let mut iovecs = IoVecs::new();
            assert!(chain.readable_iovecs(0..chain.readable_len(), &mut iovecs));
            assert!(chain.writable_iovecs(0..chain.writable_len(), &mut iovecs));
            Buffer::from_iovecs(Rc::new(iovecs)).for_each_piece(|base, len| {
                // SAFETY: a fault here is what the test is looking for.
                unsafe { (base.read_volatile(), base.add(len - 1).read_volatile()) };
            });
            ring.push_used(chain.head(), 0);
        }
        ring.publish();
        ring.needs_call();
        if count == 0 || error.is_some() {
            return error;
        }
    }
}

#[test]
fn random_rings_never_leave_shared_memory() {
    let seed = StdRng::from_os_rng().random();
    println!("seed {seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let (mut served, mut refused) = (0, 0);
    for _ in 0..3000 {
        let mut fixture = Fixture::new();
        let mut ring = fixture.ring(rng.random());
        for _ in 0..4 {
            scribble(&mut rng, &fixture.driver);
            for _ in 0..rng.random_range(1..6) {
                fixture.driver.make_available(rng.random_range(0..SIZE));
            }
            fixture.driver.publish();
            match drain(&fixture, &mut ring) {
                Some(_) => {
                    refused += 1;
                    break;
                }
                None => served += 1,
            }
        }
    }
    assert!(
        served > 100 && refused > 100,
        "{served} served, {refused} refused"
    );
}

#[test]
fn what_was_not_returned_is_fetched_again_after_a_rewind_and_by_a_successor() {
    let mut fixture = Fixture::new();
    let mut chains = fixture.chains();
    let mut ring = fixture.ring(1 << 28 | 1 << 29);
    let heads = |chains: &[Chain]| chains.iter().map(Chain::head).collect::<Vec<_>>();
    for head in 0..6 {
        let at = GUEST_BASE + 0x8000;
        fixture.driver.descriptor(head, at, 64, WRITE, 0);
        fixture.driver.make_available(head);
    }
    fixture.driver.publish();
    assert_eq!(ring.fetch(&mut chains), (6, None));
    ring.push_used(0, 1);
    ring.push_used(1, 2);
    ring.publish();
    ring.rewind();
    assert_eq!((ring.in_flight(), ring.base()), (0, 2));
    assert_eq!(ring.fetch(&mut chains), (4, None));
    assert_eq!(heads(&chains[..4]), [2, 3, 4, 5]);
    ring.push_used(2, 3);
    ring.publish();
    // Killed here; the front-end knows no better than the available index.
    drop(ring);
    let mut successor = fixture.ring_from(1 << 28 | 1 << 29, RingOrigin::Used);
    assert_eq!(successor.base(), 3);
    assert_eq!(successor.fetch(&mut chains), (3, None));
    assert_eq!(heads(&chains[..3]), [3, 4, 5]);
}
