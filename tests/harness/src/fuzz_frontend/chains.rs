//! Malformed rings on a connection that was set up properly.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, ensure};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::driver::memory::{Area, Region};
use crate::driver::{FrontEnd, RingParts, device_used_idx};
use crate::net;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Rounds of the attacks that change memory while the daemon reads it.
const RACES: usize = 400;

/// What is wrong with the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingAttack {
    /// A descriptor that is its own successor.
    SelfLoop,
    /// A cycle through the whole table.
    LongLoop,
    /// A successor beyond the table.
    NextOutOfRange,
    /// A head beyond the table.
    HeadOutOfRange,
    /// A buffer outside guest memory.
    AddressOutOfRange,
    /// A buffer that runs over the end of its region.
    AddressAcrossEnd,
    /// A buffer whose end wraps around the address space.
    AddressWraps,
    /// An indirect table inside an indirect table.
    NestedIndirect,
    /// An indirect descriptor with a successor.
    IndirectWithNext,
    /// An indirect table whose size is no multiple of a descriptor's.
    IndirectOddSize,
    /// An empty indirect table.
    IndirectEmpty,
    /// An indirect table larger than any ring.
    IndirectHuge,
    /// An indirect table outside guest memory.
    IndirectOutOfRange,
    /// A cycle inside an indirect table.
    IndirectLoop,
    /// Zero-length header, data and status.
    ZeroLength,
    /// A header of 15 bytes.
    ShortHeader,
    /// No byte for the status.
    NoStatus,
    /// Device-writable before device-readable buffers.
    WritableFirst,
    /// Every descriptor claims 4 GiB.
    HugeLengths,
    /// A sector number whose byte offset overflows.
    HugeSector,
    /// Data that is no multiple of a sector.
    PartialSector,
    /// The available index runs ahead by more than the ring's size.
    IndexJump,
    /// One head made available many times.
    RepeatedHead,
    /// A request that would be right, and descriptors that change while it is read.
    ChangingDescriptors,
    /// Header and indirect table that change while they are read.
    ChangingHeader,
    /// Random bytes in descriptor table and available ring.
    RandomTable,
}

impl RingAttack {
    /// All of them.
    pub const ALL: [Self; 26] = [
        Self::SelfLoop,
        Self::LongLoop,
        Self::NextOutOfRange,
        Self::HeadOutOfRange,
        Self::AddressOutOfRange,
        Self::AddressAcrossEnd,
        Self::AddressWraps,
        Self::NestedIndirect,
        Self::IndirectWithNext,
        Self::IndirectOddSize,
        Self::IndirectEmpty,
        Self::IndirectHuge,
        Self::IndirectOutOfRange,
        Self::IndirectLoop,
        Self::ZeroLength,
        Self::ShortHeader,
        Self::NoStatus,
        Self::WritableFirst,
        Self::HugeLengths,
        Self::HugeSector,
        Self::PartialSector,
        Self::IndexJump,
        Self::RepeatedHead,
        Self::ChangingDescriptors,
        Self::ChangingHeader,
        Self::RandomTable,
    ];
}

/// A front-end whose rings can be attacked.
pub trait Attacked {
    /// Memory and size of ring `index`.
    fn ring(&self, index: usize) -> (RingParts, u16);

    /// A region of buffers, at least 128 KiB, whose content nobody minds.
    fn buffers(&self) -> Option<Arc<Region>>;

    /// Kicks ring `index`.
    ///
    /// # Errors
    /// When the eventfd cannot be written.
    fn kick(&self, index: usize) -> Result<()>;

    /// Stops ring `index`.
    ///
    /// # Errors
    /// When the daemon does not answer.
    fn stop_ring(&mut self, index: usize) -> Result<()>;
}

impl Attacked for FrontEnd {
    fn ring(&self, index: usize) -> (RingParts, u16) {
        self.ring(index)
    }

    fn buffers(&self) -> Option<Arc<Region>> {
        self.pool().regions().first().cloned()
    }

    fn kick(&self, index: usize) -> Result<()> {
        self.kick(index)
    }

    fn stop_ring(&mut self, index: usize) -> Result<()> {
        self.stop_ring(index).map(drop)
    }
}

impl Attacked for net::FrontEnd {
    fn ring(&self, index: usize) -> (RingParts, u16) {
        self.ring(index)
    }

    fn buffers(&self) -> Option<Arc<Region>> {
        self.regions().last().cloned()
    }

    fn kick(&self, index: usize) -> Result<()> {
        self.kick(index)
    }

    fn stop_ring(&mut self, index: usize) -> Result<()> {
        self.stop_ring(index).map(drop)
    }
}

/// Attacks split ring `ring` and waits until the daemon has dealt with it.
///
/// # Errors
/// When the daemon neither answers nor hangs up in time.
pub fn attack_ring(
    front_end: &mut impl Attacked,
    ring: usize,
    attack: RingAttack,
    seed: u64,
) -> Result<()> {
    let mut forge = Forge::new(front_end, ring, seed)?;
    match attack {
        RingAttack::ChangingDescriptors | RingAttack::ChangingHeader => {
            forge.race(front_end, attack)?;
        }
        _ => {
            forge.build(attack);
            front_end.kick(ring)?;
        }
    }
    // Stopping the ring is the barrier: it is answered after the chain was looked at.
    match front_end.stop_ring(ring) {
        Ok(_) => Ok(()),
        Err(error) => {
            let closed = error.downcast_ref::<io::Error>().is_some_and(|error| {
                use io::ErrorKind as K;
                matches!(
                    error.kind(),
                    K::UnexpectedEof | K::BrokenPipe | K::ConnectionReset | K::NotConnected
                )
            });
            ensure!(closed, "neither answered nor closed: {error:#}");
            Ok(())
        }
    }
}

/// One descriptor as written into memory.
#[derive(Clone, Copy)]
struct Forged {
    gpa: u64,
    bytes: u32,
    flags: u16,
    next: u16,
}

/// Writes forged descriptors into a ring.
struct Forge {
    ring: usize,
    parts: RingParts,
    entries: u16,
    header: Area,
    data: Area,
    status: Area,
    table: Area,
    available: u16,
    rng: SmallRng,
}

impl Forge {
    fn new(front_end: &impl Attacked, ring: usize, seed: u64) -> Result<Self> {
        let (parts, entries) = front_end.ring(ring);
        let region = front_end.buffers().context("a region of buffers")?;
        let available = device_used_idx(&parts);
        let mut scratch = Area::from(region);
        Ok(Self {
            ring,
            parts,
            entries,
            header: scratch.carve(16, 16),
            data: scratch.carve(8192, 4096),
            status: scratch.carve(1, 16),
            table: scratch.carve(65536, 16),
            available,
            rng: SmallRng::seed_from_u64(seed),
        })
    }

    fn build(&mut self, attack: RingAttack) {
        let kind = self.rng.random_range(0..2);
        self.write_header(kind, 8);
        match attack {
            RingAttack::HeadOutOfRange => return self.offer(&[self.entries, u16::MAX]),
            RingAttack::IndexJump => return self.jump(),
            RingAttack::RepeatedHead => {
                self.place_chain(&self.read_chain());
                return self.offer(&vec![0; usize::from(self.entries)]);
            }
            RingAttack::RandomTable => return self.randomise(),
            RingAttack::HugeSector => self.write_header(1, u64::MAX / 512 + 1),
            _ => {}
        }
        if !self.build_indirect(attack) {
            let chain = self.chain_for(attack);
            self.place_chain(&chain);
        }
        self.offer(&[0]);
    }

    /// A well-formed read of 16 sectors.
    fn read_chain(&self) -> Vec<Forged> {
        vec![
            Forged {
                gpa: self.header.gpa(0),
                bytes: 16,
                flags: NEXT,
                next: 1,
            },
            Forged {
                gpa: self.data.gpa(0),
                bytes: 8192,
                flags: NEXT | WRITE,
                next: 2,
            },
            Forged {
                gpa: self.status.gpa(0),
                bytes: 1,
                flags: WRITE,
                next: 0,
            },
        ]
    }

    fn chain_for(&self, attack: RingAttack) -> Vec<Forged> {
        let mut chain = self.read_chain();
        match attack {
            RingAttack::SelfLoop => chain[1].next = 1,
            RingAttack::LongLoop => {
                let flags = NEXT | WRITE;
                let filler = Forged {
                    gpa: self.data.gpa(0),
                    bytes: 512,
                    flags,
                    next: 0,
                };
                chain = (0..self.entries)
                    .map(|at| Forged {
                        next: (at + 1) % self.entries,
                        ..filler
                    })
                    .collect();
                chain[0] = Forged {
                    next: 1,
                    ..self.read_chain()[0]
                };
            }
            RingAttack::NextOutOfRange => chain[1].next = self.entries,
            RingAttack::AddressOutOfRange => chain[1].gpa = 0xdead_0000_0000,
            RingAttack::AddressAcrossEnd => {
                let region = &self.data.region;
                chain[1].gpa = region.gpa + region.bytes() as u64 - 512;
            }
            RingAttack::AddressWraps => chain[1].gpa = u64::MAX - 511,
            RingAttack::ZeroLength => chain.iter_mut().for_each(|forged| forged.bytes = 0),
            RingAttack::ShortHeader => chain[0].bytes = 15,
            RingAttack::NoStatus => {
                chain.truncate(1);
                chain[0].flags = 0;
            }
            RingAttack::WritableFirst => chain[0].flags |= WRITE,
            RingAttack::HugeLengths => chain.iter_mut().for_each(|f| f.bytes = u32::MAX),
            RingAttack::PartialSector => chain[1].bytes = 777,
            _ => {}
        }
        chain
    }

    /// Builds the attacks that need an indirect table; false for the others.
    fn build_indirect(&mut self, attack: RingAttack) -> bool {
        let mut inner = self.read_chain();
        let whole = (inner.len() * 16) as u32;
        let mut outer = Forged {
            gpa: self.table.gpa(0),
            bytes: whole,
            flags: INDIRECT,
            next: 0,
        };
        match attack {
            RingAttack::NestedIndirect => {
                inner[1] = Forged {
                    gpa: self.table.gpa(0),
                    bytes: whole,
                    flags: INDIRECT | NEXT,
                    next: 2,
                };
            }
            RingAttack::IndirectWithNext => (outer.flags, outer.next) = (INDIRECT | NEXT, 1),
            RingAttack::IndirectOddSize => outer.bytes = 47,
            RingAttack::IndirectEmpty => outer.bytes = 0,
            RingAttack::IndirectHuge => outer.bytes = !15,
            RingAttack::IndirectOutOfRange => outer.gpa = 0xdead_0000_0000,
            RingAttack::IndirectLoop => inner[1].next = 0,
            _ => return false,
        }
        for (at, forged) in inner.iter().enumerate() {
            self.table.write(at * 16, &forged.encode());
        }
        self.place_chain(&[outer]);
        true
    }

    fn write_header(&self, kind: u32, sector: u64) {
        let mut header = [0; 16];
        header[0..4].copy_from_slice(&kind.to_le_bytes());
        header[8..16].copy_from_slice(&sector.to_le_bytes());
        self.header.write(0, &header);
    }

    fn place_chain(&self, chain: &[Forged]) {
        for (at, forged) in chain.iter().enumerate() {
            self.parts.descriptors.write(at * 16, &forged.encode());
        }
    }

    fn offer(&mut self, heads: &[u16]) {
        for head in heads {
            let slot = usize::from(self.available % self.entries);
            self.parts
                .available
                .write(4 + 2 * slot, &head.to_le_bytes());
            self.available = self.available.wrapping_add(1);
        }
        self.publish(self.available);
    }

    fn jump(&mut self) {
        let far = *[self.entries + 1, 32768, u16::MAX]
            .get(self.rng.random_range(0..3usize))
            .unwrap_or(&self.entries);
        self.place_chain(&self.read_chain());
        self.publish(self.available.wrapping_add(far));
    }

    fn randomise(&mut self) {
        let mut table = vec![0; self.parts.descriptors.bytes];
        self.rng.fill(table.as_mut_slice());
        for forged in table.chunks_mut(16) {
            // Plausible addresses, lengths and successors get further than noise.
            let gpa = self.data.gpa(0) + self.rng.random_range(0..8192u64);
            forged[0..8].copy_from_slice(&gpa.to_le_bytes());
            forged[8..12].copy_from_slice(&self.rng.random_range(0u32..2048).to_le_bytes());
            forged[12] &= 7;
            let next = self.rng.random_range(0..=self.entries);
            forged[14..16].copy_from_slice(&next.to_le_bytes());
        }
        self.parts.descriptors.write(0, &table);
        let heads: Vec<u16> = (0..32)
            .map(|_| self.rng.random_range(0..self.entries))
            .collect();
        self.offer(&heads);
    }

    fn publish(&self, index: u16) {
        let available = &self.parts.available;
        available
            .region
            .store(available.offset + 2, index, Ordering::Release);
    }

    /// Offers good requests while another thread alters what they consist of.
    fn race(&mut self, front_end: &impl Attacked, attack: RingAttack) -> Result<()> {
        let stop = Arc::new(AtomicBool::new(false));
        let flip = match attack {
            RingAttack::ChangingHeader => (self.header.clone(), 0, 16),
            _ => (self.parts.descriptors.clone(), 0, 48),
        };
        let mut rng = SmallRng::seed_from_u64(self.rng.random());
        let flag = stop.clone();
        let table = self.table.clone();
        let mutator = std::thread::spawn(move || {
            let (area, from, to) = flip;
            while !flag.load(Ordering::Relaxed) {
                area.write(rng.random_range(from..to), &[rng.random()]);
                table.write(rng.random_range(0..48), &[rng.random()]);
                std::thread::yield_now();
            }
        });
        for round in 0..RACES {
            self.write_header(0, 8);
            let chain = self.read_chain();
            if round % 2 == 0 {
                self.place_chain(&chain);
            } else {
                chain
                    .iter()
                    .enumerate()
                    .for_each(|(at, f)| self.table.write(at * 16, &f.encode()));
                let bytes = (chain.len() * 16) as u32;
                let gpa = self.table.gpa(0);
                self.place_chain(&[Forged {
                    gpa,
                    bytes,
                    flags: INDIRECT,
                    next: 0,
                }]);
            }
            self.offer(&[0]);
            front_end.kick(self.ring)?;
        }
        stop.store(true, Ordering::Relaxed);
        mutator.join().expect("the mutator does not panic");
        Ok(())
    }
}

impl Forged {
    fn encode(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[0..8].copy_from_slice(&self.gpa.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.bytes.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..16].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}
