//! The driver's side of a packed virtqueue (virtio 1.2, section 2.8).
//!
//! Owns the ring of descriptors and the driver's event structure of one queue, and the buffer ids.
//! Promises what [`SplitRing`](super::SplitRing) does: a used descriptor that names no outstanding
//! chain is an error and not a wrong answer.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{Ordering, fence};

use anyhow::{Context, Result, ensure};

use super::features::bits;
use super::memory::Area;
use super::ring::{Buffer, DESC_BYTES, F_INDIRECT, F_NEXT, F_WRITE, RingParts};

const EVENT_BYTES: usize = 4;
/// Flag of a descriptor: equal to the wrap counter of its lap when it is available.
pub const AVAILABLE: u16 = 1 << 7;
/// Flag of a descriptor: equal to the wrap counter of its lap, as is the other, when it is used.
pub const USED: u16 = 1 << 15;
/// Where a descriptor's flags are, in bytes.
pub const FLAGS_AT: usize = 14;
/// Event structure: notify always.
pub const EVENT_ENABLE: u16 = 0;
/// Event structure: do not notify.
pub const EVENT_DISABLE: u16 = 1;
/// Event structure: notify at a descriptor.
pub const EVENT_DESCRIPTOR: u16 = 2;

/// A place in the ring and the wrap counter of its lap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Index of the descriptor.
    pub index: u16,
    /// Wrap counter.
    pub wrap: bool,
}

impl Place {
    /// Where both sides begin.
    pub const START: Self = Self {
        index: 0,
        wrap: true,
    };

    /// `count` descriptors further in a ring of `entries`.
    #[inline]
    #[must_use]
    pub fn advanced(self, count: u16, entries: u16) -> Self {
        let index = u32::from(self.index) + u32::from(count);
        let lap = index / u32::from(entries);
        Self {
            index: (index % u32::from(entries)) as u16,
            wrap: self.wrap ^ (lap % 2 == 1),
        }
    }

    /// The flags that make a descriptor here available.
    #[inline]
    pub fn available(self) -> u16 {
        if self.wrap { AVAILABLE } else { USED }
    }

    /// Whether a descriptor here with these flags is used.
    #[inline]
    pub fn is_used(self, flags: u16) -> bool {
        let bit = |bit: u16| flags & bit != 0;
        bit(AVAILABLE) == self.wrap && bit(USED) == self.wrap
    }

    /// Whether the device, whose event structure is `event`, wants to be notified of the descriptors
    /// from `old` to here.
    #[inline]
    pub fn wants_kick(self, old: Self, (event, event_idx): (u32, bool), entries: u16) -> bool {
        match (event >> 16) as u16 & 3 {
            EVENT_DISABLE => false,
            EVENT_DESCRIPTOR if event_idx => {
                let at = Self::from_wire(event as u16).distance_from(old, entries);
                at < self.distance_from(old, entries)
            }
            _ => true,
        }
    }

    /// Descriptors from `earlier` to here, which is less than two laps later.
    fn distance_from(self, earlier: Self, entries: u16) -> u32 {
        let line = |place: Self| {
            let lap = if place.wrap { 0 } else { u32::from(entries) };
            u32::from(place.index) + lap
        };
        let lap = 2 * u32::from(entries);
        (line(self) + lap - line(earlier)) % lap
    }

    /// As an event structure has it.
    #[inline]
    pub fn to_wire(self) -> u16 {
        self.index | u16::from(self.wrap) << 15
    }

    fn from_wire(word: u16) -> Self {
        Self {
            index: word & 0x7fff,
            wrap: word & 0x8000 != 0,
        }
    }
}

/// A packed ring seen from the driver.
#[derive(Debug)]
pub struct PackedRing {
    parts: RingParts,
    entries: u16,
    event_idx: bool,
    in_order: bool,
    /// With IN_ORDER: ids of outstanding chains, oldest first.
    order: VecDeque<u16>,
    /// With IN_ORDER: chains that the last used descriptor finished, and that were not popped yet.
    finished: VecDeque<(u16, u32)>,
    free_ids: Vec<u16>,
    /// Descriptors of each outstanding chain, by buffer id.
    chains: HashMap<u16, u16>,
    free: u16,
    available: Place,
    published: Place,
    used: Place,
    /// First descriptors written since the last publication, with the flags that show them.
    hidden: Vec<(u16, u16)>,
}

impl PackedRing {
    /// Bytes that a ring with `entries` entries takes.
    pub fn bytes(entries: u16) -> usize {
        usize::from(entries) * DESC_BYTES + 2 * EVENT_BYTES + 64
    }

    /// Lays an empty ring out in `area`, for the negotiated `features`.
    pub fn new(mut area: Area, entries: u16, features: u64) -> Self {
        let parts = RingParts {
            descriptors: area.carve(usize::from(entries) * DESC_BYTES, 16),
            available: area.carve(EVENT_BYTES, 4),
            used: area.carve(EVENT_BYTES, 4),
        };
        let mut ring = Self {
            parts,
            entries,
            event_idx: features & bits::RING_EVENT_IDX != 0,
            in_order: features & bits::IN_ORDER != 0,
            order: VecDeque::new(),
            finished: VecDeque::new(),
            free_ids: Vec::new(),
            chains: HashMap::new(),
            free: 0,
            available: Place::START,
            published: Place::START,
            used: Place::START,
            hidden: Vec::new(),
        };
        ring.reset();
        ring
    }

    /// Forgets every chain and zeroes the ring, as a driver does after a device reset.
    pub fn reset(&mut self) {
        for part in [
            &self.parts.descriptors,
            &self.parts.available,
            &self.parts.used,
        ] {
            part.write(0, &vec![0; part.bytes]);
        }
        // Ids differ from places, so that a device which confuses them fails.
        self.free_ids = (0..self.entries).collect();
        self.chains.clear();
        self.order.clear();
        self.finished.clear();
        self.hidden.clear();
        self.free = self.entries;
        (self.available, self.published, self.used) = (Place::START, Place::START, Place::START);
    }

    /// Where the parts lie: ring, driver's and device's event structure.
    pub fn parts(&self) -> &RingParts {
        &self.parts
    }

    /// True when a chain of that many buffers fits now.
    pub fn has_room(&self, buffers: usize) -> bool {
        usize::from(self.free) >= buffers && !self.free_ids.is_empty()
    }

    /// Queues a chain without showing it to the device; returns its buffer id.
    ///
    /// # Errors
    /// When there is no room, or the indirect table is too small.
    pub fn push(&mut self, buffers: &[Buffer], indirect: Option<&Area>) -> Result<u16> {
        let needed = if indirect.is_some() { 1 } else { buffers.len() };
        ensure!(
            !buffers.is_empty() && self.has_room(needed),
            "no room for {needed} descriptors"
        );
        let id = self.free_ids.pop().context("an id is free")?;
        if let Some(table) = indirect {
            ensure!(
                table.bytes >= buffers.len() * DESC_BYTES,
                "indirect table too small"
            );
            for (at, buffer) in buffers.iter().enumerate() {
                // Entries have neither id nor successor.
                let flags = if buffer.writable { F_WRITE } else { 0 };
                table.write(at * DESC_BYTES, &descriptor(*buffer, 0, flags));
            }
            let whole = Buffer {
                gpa: table.gpa(0),
                bytes: (buffers.len() * DESC_BYTES) as u32,
                writable: false,
            };
            self.write(0, whole, (id, F_INDIRECT));
        } else {
            for (at, buffer) in buffers.iter().enumerate() {
                let next = if at + 1 < buffers.len() { F_NEXT } else { 0 };
                let write = if buffer.writable { F_WRITE } else { 0 };
                self.write(at as u16, *buffer, (id, next | write));
            }
        }
        let count = needed as u16;
        self.available = self.available.advanced(count, self.entries);
        self.free -= count;
        self.chains.insert(id, count);
        if self.in_order {
            self.order.push_back(id);
        }
        Ok(id)
    }

    /// Writes descriptor number `at` of the chain being queued; the first one stays hidden.
    fn write(&mut self, at: u16, buffer: Buffer, (id, flags): (u16, u16)) {
        let place = self.available.advanced(at, self.entries);
        let flags = flags | place.available();
        let offset = usize::from(place.index) * DESC_BYTES;
        let bytes = descriptor(buffer, id, flags);
        if at == 0 {
            let descriptors = &self.parts.descriptors;
            descriptors.write(offset, &bytes[..FLAGS_AT]);
            self.hidden.push((place.index, flags));
        } else {
            self.parts.descriptors.write(offset, &bytes);
        }
    }

    /// Shows queued chains to the device; true when it wants to be kicked.
    pub fn publish(&mut self) -> bool {
        if self.hidden.is_empty() {
            return false;
        }
        let descriptors = &self.parts.descriptors;
        // The last one first: the device sees nothing before the first one is shown.
        for (index, flags) in self.hidden.drain(..).rev() {
            let at = descriptors.offset + usize::from(index) * DESC_BYTES + FLAGS_AT;
            descriptors.region.store(at, flags, Ordering::Release);
        }
        let old = std::mem::replace(&mut self.published, self.available);
        fence(Ordering::SeqCst);
        let device = &self.parts.used;
        let event: u32 = device.region.load(device.offset, Ordering::Relaxed);
        self.available
            .wants_kick(old, (event, self.event_idx), self.entries)
    }

    /// Next finished chain: its buffer id and the number of bytes the device says it wrote.
    ///
    /// # Errors
    /// When the device's used descriptor is impossible.
    pub fn pop(&mut self) -> Result<Option<(u16, u32)>> {
        if let Some(done) = self.finished.pop_front() {
            return Ok(Some(done));
        }
        let Some((id, written)) = self.used_at(self.used) else {
            return Ok(None);
        };
        if self.in_order {
            return self.pop_batch(id, written).map(Some);
        }
        let count = self.chains.remove(&id).with_context(|| {
            format!("used descriptor with buffer id {id}, which is not outstanding")
        })?;
        self.used = self.used.advanced(count, self.entries);
        self.free += count;
        self.free_ids.push(id);
        Ok(Some((id, written)))
    }

    /// One used descriptor may stand for all chains up to the one that it names (virtio 1.2, section 2.8.19).
    fn pop_batch(&mut self, id: u16, written: u32) -> Result<(u16, u32)> {
        let place = self.order.iter().position(|&known| known == id);
        let place = place.with_context(|| {
            format!("used descriptor with buffer id {id}, which is not outstanding")
        })?;
        for known in self.order.drain(..=place) {
            let count = self.chains.remove(&known).unwrap_or_default();
            self.used = self.used.advanced(count, self.entries);
            self.free += count;
            self.free_ids.push(known);
            self.finished
                .push_back((known, if known == id { written } else { 0 }));
        }
        self.finished.pop_front().context("a batch has a chain")
    }

    /// Where the device's next used descriptor goes, as the base of a ring that goes on: found by walking what it has finished.
    pub fn device_base(&self) -> u32 {
        let mut place = self.used;
        let mut order = self.order.iter();
        // At most as many used descriptors as chains: beyond them lies the lap before.
        for _ in 0..self.chains.len() {
            let Some((id, _)) = self.used_at(place) else {
                break;
            };
            let count = if self.in_order {
                let mut sum = 0;
                for known in order.by_ref() {
                    sum += self.chains.get(known).copied().unwrap_or_default();
                    if *known == id {
                        break;
                    }
                }
                sum
            } else {
                self.chains.get(&id).copied().unwrap_or_default()
            };
            place = place.advanced(count, self.entries);
        }
        let word = u32::from(place.to_wire());
        word | word << 16
    }

    /// Buffer id and written bytes, when the descriptor at `place` is used.
    fn used_at(&self, place: Place) -> Option<(u16, u32)> {
        let descriptors = &self.parts.descriptors;
        let at = descriptors.offset + usize::from(place.index) * DESC_BYTES;
        let flags: u16 = descriptors.region.load(at + FLAGS_AT, Ordering::Acquire);
        if !place.is_used(flags) {
            return None;
        }
        let written: u32 = descriptors.region.load(at + 8, Ordering::Relaxed);
        let id: u16 = descriptors.region.load(at + 12, Ordering::Relaxed);
        Some((id, written))
    }

    /// Asks for no completion interrupts.
    pub fn suppress_interrupts(&self) {
        self.set_event(EVENT_DISABLE);
    }

    /// Asks for an interrupt at the next completion; true when one is already there.
    pub fn want_interrupt(&self) -> bool {
        self.set_event(if self.event_idx {
            EVENT_DESCRIPTOR
        } else {
            EVENT_ENABLE
        });
        fence(Ordering::SeqCst);
        self.used_at(self.used).is_some()
    }

    fn set_event(&self, flags: u16) {
        let driver = &self.parts.available;
        let word = u32::from(self.used.to_wire()) | u32::from(flags) << 16;
        driver.region.store(driver.offset, word, Ordering::Relaxed);
    }
}

fn descriptor(buffer: Buffer, id: u16, flags: u16) -> [u8; DESC_BYTES] {
    let mut bytes = [0; DESC_BYTES];
    bytes[0..8].copy_from_slice(&buffer.gpa.to_le_bytes());
    bytes[8..12].copy_from_slice(&buffer.bytes.to_le_bytes());
    bytes[12..14].copy_from_slice(&id.to_le_bytes());
    bytes[14..16].copy_from_slice(&flags.to_le_bytes());
    bytes
}
