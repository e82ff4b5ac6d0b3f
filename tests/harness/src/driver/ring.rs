//! The driver's side of a split virtqueue (virtio 1.2, section 2.7).
//!
//! Owns descriptor table, available and used ring of one queue and the free descriptors. Promises
//! that a used entry which names no outstanding chain, or more entries than chains are outstanding,
//! is an error and not a wrong answer. Must not know what a chain means.
//!
//! The ring lives in guest memory and outlasts the connection: after the back-end died,
//! [`device_used_idx`] tells where its successor goes on.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{Ordering, fence};

use anyhow::{Context, Result, bail, ensure};

use super::features::bits;
use super::memory::Area;

pub(super) const DESC_BYTES: usize = 16;
pub(super) const F_NEXT: u16 = 1;
pub(super) const F_WRITE: u16 = 2;
pub(super) const F_INDIRECT: u16 = 4;
const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;

/// One buffer of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Guest-physical address.
    pub gpa: u64,
    /// Bytes.
    pub bytes: u32,
    /// The device writes it.
    pub writable: bool,
}

/// Addresses of the three parts, as areas.
#[derive(Clone, Debug)]
pub struct RingParts {
    /// Descriptor table.
    pub descriptors: Area,
    /// Available ring.
    pub available: Area,
    /// Used ring.
    pub used: Area,
}

/// A split ring seen from the driver.
#[derive(Debug)]
pub struct SplitRing {
    parts: RingParts,
    entries: u16,
    event_idx: bool,
    in_order: bool,
    /// Descriptors in no chain. Taken at the front and given back at the end, so that with IN_ORDER they are used in ring order.
    free: VecDeque<u16>,
    chains: HashMap<u16, Vec<u16>>,
    /// With IN_ORDER: heads of outstanding chains, oldest first.
    order: VecDeque<u16>,
    /// With IN_ORDER: chains that the last used entry finished, and that were not popped yet.
    finished: VecDeque<(u16, u32)>,
    available_idx: u16,
    published_idx: u16,
    used_idx: u16,
}

impl SplitRing {
    /// Bytes that a ring with `entries` entries takes.
    pub fn bytes(entries: u16) -> usize {
        let entries = usize::from(entries);
        entries * DESC_BYTES + (6 + 2 * entries) + (6 + 8 * entries) + 64
    }

    /// Lays an empty ring out in `area`, for the negotiated `features`.
    pub fn new(mut area: Area, entries: u16, features: u64) -> Self {
        let count = usize::from(entries);
        let parts = RingParts {
            descriptors: area.carve(count * DESC_BYTES, 16),
            available: area.carve(6 + 2 * count, 2),
            used: area.carve(6 + 8 * count, 4),
        };
        let mut ring = Self {
            parts,
            entries,
            event_idx: features & bits::RING_EVENT_IDX != 0,
            in_order: features & bits::IN_ORDER != 0,
            free: VecDeque::new(),
            chains: HashMap::new(),
            order: VecDeque::new(),
            finished: VecDeque::new(),
            available_idx: 0,
            published_idx: 0,
            used_idx: 0,
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
        self.free = (0..self.entries).collect();
        self.chains.clear();
        self.order.clear();
        self.finished.clear();
        (self.available_idx, self.published_idx, self.used_idx) = (0, 0, 0);
    }

    /// Where the parts lie.
    pub fn parts(&self) -> &RingParts {
        &self.parts
    }

    /// True when a chain of that many buffers fits now.
    pub fn has_room(&self, buffers: usize) -> bool {
        self.free.len() >= buffers && self.chains.len() < usize::from(self.entries)
    }

    /// Queues a chain without showing it to the device; returns its head.
    ///
    /// # Errors
    /// When there is no room, or the indirect table is too small.
    pub fn push(&mut self, buffers: &[Buffer], indirect: Option<&Area>) -> Result<u16> {
        let needed = if indirect.is_some() { 1 } else { buffers.len() };
        ensure!(
            !buffers.is_empty() && self.has_room(needed),
            "no room for {needed} descriptors"
        );
        let taken: Vec<u16> = (0..needed).map_while(|_| self.free.pop_front()).collect();
        let head = taken[0];
        if let Some(table) = indirect {
            ensure!(
                table.bytes >= buffers.len() * DESC_BYTES,
                "indirect table too small"
            );
            for (at, buffer) in buffers.iter().enumerate() {
                let next = (at + 1 < buffers.len()).then_some(at as u16 + 1);
                table.write(at * DESC_BYTES, &descriptor(*buffer, next));
            }
            let mut whole = descriptor(
                Buffer {
                    gpa: table.gpa(0),
                    bytes: (buffers.len() * DESC_BYTES) as u32,
                    writable: false,
                },
                None,
            );
            whole[12..14].copy_from_slice(&F_INDIRECT.to_le_bytes());
            self.parts
                .descriptors
                .write(usize::from(head) * DESC_BYTES, &whole);
        } else {
            for (at, buffer) in buffers.iter().enumerate() {
                let bytes = descriptor(*buffer, taken.get(at + 1).copied());
                self.parts
                    .descriptors
                    .write(usize::from(taken[at]) * DESC_BYTES, &bytes);
            }
        }
        let slot = usize::from(self.available_idx % self.entries);
        self.parts
            .available
            .write(4 + 2 * slot, &head.to_le_bytes());
        self.available_idx = self.available_idx.wrapping_add(1);
        self.chains.insert(head, taken);
        if self.in_order {
            self.order.push_back(head);
        }
        Ok(head)
    }

    /// Shows queued chains to the device; true when it wants to be kicked.
    pub fn publish(&mut self) -> bool {
        let (old, new) = (self.published_idx, self.available_idx);
        if old == new {
            return false;
        }
        let available = &self.parts.available;
        available
            .region
            .store(available.offset + 2, new, Ordering::Release);
        self.published_idx = new;
        fence(Ordering::SeqCst);
        let used = &self.parts.used;
        if self.event_idx {
            let at = used.offset + 4 + 8 * usize::from(self.entries);
            let event: u16 = used.region.load(at, Ordering::Relaxed);
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            used.region.load::<u16>(used.offset, Ordering::Relaxed) & NO_NOTIFY == 0
        }
    }

    /// Next finished chain: its head and the number of bytes the device says it wrote.
    ///
    /// # Errors
    /// When the device's used ring is impossible.
    pub fn pop(&mut self) -> Result<Option<(u16, u32)>> {
        if let Some(done) = self.finished.pop_front() {
            return Ok(Some(done));
        }
        let waiting = self.device_used_idx().wrapping_sub(self.used_idx);
        if waiting == 0 {
            return Ok(None);
        }
        if usize::from(waiting) > self.chains.len() {
            bail!(
                "used index is {waiting} ahead with {} chains outstanding",
                self.chains.len()
            );
        }
        let used = &self.parts.used;
        let at = used.offset + 4 + 8 * usize::from(self.used_idx % self.entries);
        let id: u32 = used.region.load(at, Ordering::Relaxed);
        let written: u32 = used.region.load(at + 4, Ordering::Relaxed);
        let head = u16::try_from(id)?;
        if self.in_order {
            return self.pop_batch((head, written), waiting).map(Some);
        }
        let Some(taken) = self.chains.remove(&head) else {
            bail!("used entry names descriptor {id}, which heads no outstanding chain");
        };
        self.free.extend(taken);
        self.used_idx = self.used_idx.wrapping_add(1);
        Ok(Some((head, written)))
    }

    /// One used entry may stand for all chains up to the one that it names (virtio 1.2, section 2.7.24).
    fn pop_batch(&mut self, (head, written): (u16, u32), waiting: u16) -> Result<(u16, u32)> {
        let place = self.order.iter().position(|&known| known == head);
        let Some(place) = place.filter(|place| *place < usize::from(waiting)) else {
            bail!(
                "used entry names descriptor {head}, which does not head one of the next {waiting} chains"
            );
        };
        for known in self.order.drain(..=place) {
            self.free
                .extend(self.chains.remove(&known).unwrap_or_default());
            let written = if known == head { written } else { 0 };
            self.finished.push_back((known, written));
        }
        self.used_idx = self.used_idx.wrapping_add(place as u16 + 1);
        self.finished.pop_front().context("a batch has a chain")
    }

    /// Asks for no completion interrupts.
    pub fn suppress_interrupts(&self) {
        self.set_interrupts(self.used_idx.wrapping_sub(1), NO_INTERRUPT);
    }

    /// Asks for an interrupt at the next completion; true when one is already there.
    pub fn want_interrupt(&self) -> bool {
        self.set_interrupts(self.used_idx, 0);
        fence(Ordering::SeqCst);
        self.device_used_idx() != self.used_idx
    }

    fn set_interrupts(&self, used_event: u16, flags: u16) {
        let available = &self.parts.available;
        if self.event_idx {
            let at = available.offset + 4 + 2 * usize::from(self.entries);
            available.region.store(at, used_event, Ordering::Relaxed);
        } else {
            available
                .region
                .store(available.offset, flags, Ordering::Relaxed);
        }
    }

    fn device_used_idx(&self) -> u16 {
        device_used_idx(&self.parts)
    }
}

/// The device's used index: what a restarted back-end's `SET_VRING_BASE` is told, because a split
/// ring that was cut off resumes from what the dead back-end had returned.
pub fn device_used_idx(parts: &RingParts) -> u16 {
    parts
        .used
        .region
        .load(parts.used.offset + 2, Ordering::Acquire)
}

fn descriptor(buffer: Buffer, next: Option<u16>) -> [u8; DESC_BYTES] {
    let write = if buffer.writable { F_WRITE } else { 0 };
    let more = if next.is_some() { F_NEXT } else { 0 };
    let mut bytes = [0; DESC_BYTES];
    bytes[0..8].copy_from_slice(&buffer.gpa.to_le_bytes());
    bytes[8..12].copy_from_slice(&buffer.bytes.to_le_bytes());
    bytes[12..14].copy_from_slice(&(write | more).to_le_bytes());
    bytes[14..16].copy_from_slice(&next.unwrap_or(0).to_le_bytes());
    bytes
}
