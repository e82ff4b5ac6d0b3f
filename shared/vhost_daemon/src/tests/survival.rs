//! Devices that die before any one of their stores to shared memory, and their successors.
//!
//! A model driver and a model device play random games over a ring and an inflight region. The
//! device dies at a random store, a successor takes over, and so on. Whatever happens, each request
//! is served until the driver sees it completed, is never completed while a device still holds
//! it, and is served again in the order in which it was fetched.

use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;

use rand::rngs::StdRng;
use rand::seq::IteratorRandom;
use rand::{Rng, SeedableRng};

use crate::inflight::InflightRegion;
use crate::memory::MemoryTable;
use crate::ring::{Chain, Ring, RingFeatures, RingLayout, RingOrigin, RingParts, SharedMemory};
use crate::store::death;
use crate::testing::front_end::{Driver, GUEST_BASE, INDIRECT, Memory, NEXT, USER_BASE, WRITE};
use crate::testing::packed_driver::PackedDriver;
use crate::wire::{RegionSpec, RingAddresses};

const MEMORY: usize = 1 << 18;
const SIZE: u16 = 8;
/// Buffers of requests: request `n` has `64 * n` for its address.
const BUFFERS: u64 = GUEST_BASE + 0x20000;
/// Where indirect tables are, 64 bytes for each id.
const TABLES: usize = 0x10000;

/// The driver's side of either layout.
enum Guest {
    Split {
        driver: Driver,
        /// Descriptors of each request, its head first.
        chains: BTreeMap<u16, Vec<u16>>,
        free: Vec<u16>,
    },
    Packed {
        driver: PackedDriver,
        ids: VecDeque<u16>,
    },
}

impl Guest {
    fn new(layout: RingLayout, memory: &Arc<Memory>) -> Guest {
        match layout {
            RingLayout::Split => Guest::Split {
                driver: Driver::new(memory, 0, SIZE),
                chains: BTreeMap::new(),
                free: (0..SIZE).collect(),
            },
            RingLayout::Packed => Guest::Packed {
                driver: PackedDriver::new(memory, 0, SIZE),
                ids: (100..100 + SIZE).collect(),
            },
        }
    }

    fn addresses(&self) -> RingAddresses {
        let user = |offset: usize| USER_BASE + offset as u64;
        match self {
            Guest::Split { driver, .. } => RingAddresses {
                descriptors: user(0),
                available: user(driver.avail_offset()),
                used: user(driver.used_offset()),
            },
            Guest::Packed { driver, .. } => RingAddresses {
                descriptors: user(0),
                available: user(driver.driver_event()),
                used: user(driver.device_event()),
            },
        }
    }

    /// What a front-end that knows nothing tells a successor.
    fn base(&self) -> u32 {
        match self {
            Guest::Split { driver, .. } => u32::from(driver.used_idx()),
            Guest::Packed { .. } => 0x8000_8000,
        }
    }

    /// Makes request `number` available in `count` descriptors; the name that it completes by.
    fn push(&mut self, number: u64, count: u16, indirect: bool) -> Option<u16> {
        let addr = BUFFERS + 64 * number;
        match self {
            Guest::Split {
                driver,
                chains,
                free,
            } => {
                if free.len() < usize::from(count) {
                    return None;
                }
                let taken: Vec<u16> = free.drain(..usize::from(count)).collect();
                for (at, index) in taken.iter().enumerate() {
                    let next = taken.get(at + 1).copied();
                    let flags = if next.is_some() { NEXT } else { 0 };
                    driver.descriptor(*index, addr, 16, WRITE | flags, next.unwrap_or(0));
                }
                let head = taken[0];
                driver.make_available(head);
                driver.publish();
                chains.insert(head, taken);
                Some(head)
            }
            Guest::Packed { driver, ids } => {
                if driver.room() < count {
                    return None;
                }
                let id = ids.pop_front().unwrap();
                if indirect {
                    let at = TABLES + 64 * usize::from(id - 100);
                    let entry = [&addr.to_le_bytes()[..], &[16, 0, 0, 0, 0, 0, 2, 0]].concat();
                    driver.memory.write(at, &entry);
                    driver.push(id, &[(GUEST_BASE + at as u64, 16, INDIRECT)]);
                } else {
                    driver.push(id, &vec![(addr, 16, WRITE); usize::from(count)]);
                }
                Some(id)
            }
        }
    }

    /// The next request that the driver sees completed.
    fn pop(&mut self) -> Option<u16> {
        match self {
            Guest::Split {
                driver,
                chains,
                free,
            } => {
                let head = driver.try_complete()?.0 as u16;
                free.extend(chains.remove(&head).expect("a head that is outstanding"));
                Some(head)
            }
            Guest::Packed { driver, ids } => {
                let id = driver.try_complete()?.0;
                ids.push_back(id);
                Some(id)
            }
        }
    }
}

/// A game: what the driver has made available, and what the device of now holds.
struct Game {
    rng: StdRng,
    guest: Guest,
    layout: RingLayout,
    table: SharedMemory,
    region: Arc<InflightRegion>,
    next_number: u64,
    /// Requests that the driver waits for, by the name that they complete by: their number.
    outstanding: BTreeMap<u16, u64>,
    completed: u64,
}

/// A device's life: the ring and the requests it has fetched, by head.
struct Life {
    ring: Ring,
    held: BTreeMap<u16, u64>,
    /// Returned, not published yet.
    returned: Vec<u64>,
}

impl Game {
    fn new(layout: RingLayout, seed: u64) -> Game {
        let memory = Memory::new(MEMORY);
        let spec = RegionSpec {
            guest_addr: GUEST_BASE,
            size: MEMORY as u64,
            user_addr: USER_BASE,
            mmap_offset: 0,
        };
        let fd = memory.fd.try_clone().unwrap();
        let table = MemoryTable::default().with(&spec, fd).unwrap();
        let (spec, fd) = InflightRegion::create(1, SIZE).unwrap();
        Game {
            rng: StdRng::seed_from_u64(seed),
            guest: Guest::new(layout, &memory),
            layout,
            table: Rc::new(Arc::new(table)),
            region: Arc::new(InflightRegion::adopt(&spec, fd).unwrap()),
            next_number: 0,
            outstanding: BTreeMap::new(),
            completed: 0,
        }
    }

    fn number_of(chain: &Chain) -> u64 {
        let mut address = None;
        chain.for_each_writable(|at, _| {
            address.get_or_insert(at);
        });
        (address.expect("a request has a buffer") - BUFFERS) / 64
    }

    /// A device that takes over, and dies at the latest with the end of this call. `holding` tells
    /// what it holds to the outside, death or not.
    fn live(&mut self, holding: &mut Option<Life>) {
        let parts = RingParts {
            index: 0,
            size: SIZE,
            base: self.guest.base(),
            origin: RingOrigin::Base,
            features: RingFeatures::of(match self.layout {
                RingLayout::Split => 1 << 28 | 1 << 29,
                RingLayout::Packed => 1 << 28 | 1 << 29 | 1 << 34,
            }),
            addresses: self.guest.addresses(),
            inflight: Some(self.region.clone()),
        };
        let (ring, resubmit) = Ring::new(parts, self.table.clone()).unwrap();
        let life = holding.insert(Life {
            ring,
            held: BTreeMap::new(),
            returned: Vec::new(),
        });
        let mut chain = Chain::new(self.table.clone());
        let mut newest = None;
        for head in resubmit {
            life.ring.refetch(head, &mut chain).unwrap();
            let number = Self::number_of(&chain);
            assert!(newest < Some(number), "{number} after {newest:?}");
            assert!(
                self.outstanding.values().any(|n| *n == number),
                "{number} again"
            );
            newest = Some(number);
            assert_eq!(life.held.insert(head, number), None);
        }
        for _ in 0..60 {
            self.play(life);
        }
        // The end in peace, so that the next life has something new to do.
        while !life.held.is_empty() {
            self.complete_one(life);
        }
        life.publish();
    }

    fn play(&mut self, life: &mut Life) {
        match self.rng.random_range(0..8) {
            0..3 => {
                let (count, indirect) = (self.rng.random_range(1..4), self.rng.random_bool(0.3));
                if let Some(name) = self.guest.push(self.next_number, count, indirect) {
                    self.outstanding.insert(name, self.next_number);
                    self.next_number = (self.next_number + 1) % 1024;
                }
            }
            3 => {
                life.publish();
                let count = self.rng.random_range(1..4);
                let mut chains: Vec<_> =
                    (0..count).map(|_| Chain::new(self.table.clone())).collect();
                let (count, error) = life.ring.fetch(&mut chains);
                assert_eq!(error, None);
                for chain in &chains[..count] {
                    life.held.insert(chain.head(), Self::number_of(chain));
                }
            }
            4..6 => self.complete_one(life),
            6 => life.publish(),
            _ => self.look(&life.held, &life.returned),
        }
    }

    fn complete_one(&mut self, life: &mut Life) {
        if let Some(head) = life.held.keys().copied().choose(&mut self.rng) {
            // Returned first: a death in between leaves it with the device.
            life.returned.push(life.held[&head]);
            life.ring.push_used(head, 16);
            life.held.remove(&head);
        }
    }

    /// The driver looks for what has completed.
    fn look(&mut self, held: &BTreeMap<u16, u64>, unpublished: &[u64]) {
        while let Some(name) = self.guest.pop() {
            let number = self.outstanding.remove(&name).expect("it was outstanding");
            self.completed += 1;
            let busy = held.values().any(|n| *n == number) || unpublished.contains(&number);
            assert!(!busy, "{number} completed while the device held it");
        }
    }
}

impl Life {
    fn publish(&mut self) {
        self.ring.publish();
        self.ring.needs_call();
        self.returned.clear();
    }
}

/// Plays games in which every device dies at a random store.
fn games(layout: RingLayout, seeds: std::ops::Range<u64>) {
    let mut deaths = 0;
    for seed in seeds {
        let mut game = Game::new(layout, seed);
        for _ in 0..20 {
            let stores = game.rng.random_range(0..300);
            let mut life = None;
            let lived = death::after(stores, || game.live(&mut life));
            deaths += u32::from(lived.is_none());
            // What the dead device held is its successor's: until then the driver sees no more
            // than what was published.
            if let Some(life) = life {
                let held = if lived.is_some() {
                    life.held
                } else {
                    BTreeMap::new()
                };
                game.look(&held, &[]);
            }
        }
        let mut life = None;
        game.live(&mut life);
        let mut life = life.unwrap();
        while !game.outstanding.is_empty() {
            let mut chains = [Chain::new(game.table.clone())];
            if let (1, None) = life.ring.fetch(&mut chains) {
                life.ring.push_used(chains[0].head(), 16);
                life.publish();
            }
            let before = game.completed;
            game.look(&BTreeMap::new(), &[]);
            assert!(
                game.completed > before,
                "seed {seed}: {:?} lost",
                game.outstanding
            );
        }
        assert_eq!(life.ring.in_flight(), 0);
    }
    assert!(deaths > 100, "{deaths} deaths");
}

fn seeds() -> std::ops::Range<u64> {
    let first: u64 = StdRng::from_os_rng().random_range(0..1 << 40);
    println!("seeds from {first}");
    first..first + 150
}

#[test]
fn split_rings_survive_death_at_any_store() {
    games(RingLayout::Split, seeds());
}

#[test]
fn packed_rings_survive_death_at_any_store() {
    games(RingLayout::Packed, seeds());
}
