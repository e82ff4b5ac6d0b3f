//! A packed ring as its driver sees it.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use super::front_end::{GUEST_BASE, Memory, NEXT, PATIENCE_MS, RingPlaces, WRITE, eventfd, wait};
use crate::ring::Position;

const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

/// One descriptor without id: address, length, flags besides available and used.
pub type Piece = (u64, u32, u16);

/// Layout: descriptors, driver event, device event, then buffers of 4096 bytes.
pub struct PackedDriver {
    pub memory: Arc<Memory>,
    pub offset: usize,
    pub size: u16,
    pub avail: Position,
    pub used: Position,
    /// Where the driver stood when it last decided whether to kick.
    considered: Position,
    /// Descriptors of each request, by buffer id.
    pub chains: HashMap<u16, u16>,
    pub kick: OwnedFd,
    pub call: OwnedFd,
    pub err: OwnedFd,
    pub event_idx: bool,
}

impl PackedDriver {
    pub fn new(memory: &Arc<Memory>, offset: usize, size: u16) -> PackedDriver {
        PackedDriver {
            memory: memory.clone(),
            offset,
            size,
            avail: Position::START,
            used: Position::START,
            considered: Position::START,
            chains: HashMap::new(),
            kick: eventfd(),
            call: eventfd(),
            err: eventfd(),
            event_idx: true,
        }
    }

    pub fn driver_event(&self) -> usize {
        self.offset + 16 * usize::from(self.size)
    }

    pub fn device_event(&self) -> usize {
        self.driver_event() + 4
    }

    pub fn places(&self) -> RingPlaces<'_> {
        let half = |position: Position| u32::from(position.to_wire(self.size));
        RingPlaces {
            size: self.size,
            base: half(self.avail) | half(self.used) << 16,
            parts: [self.offset, self.device_event(), self.driver_event()],
            log: None,
            fds: [&self.kick, &self.call, &self.err],
        }
    }

    /// Offset in memory of a request's 4096 bytes.
    pub fn buffer(&self, id: u16) -> usize {
        (self.device_event() + 4).next_multiple_of(4096) + 4096 * usize::from(id)
    }

    /// Descriptors that the device does not own.
    pub fn room(&self) -> u16 {
        self.size - self.avail.distance_from(self.used, self.size)
    }

    fn slot(&self, at: Position) -> usize {
        self.offset + 16 * usize::from(at.index(self.size))
    }

    /// Writes a descriptor; `flags` are complete.
    #[expect(clippy::too_many_arguments, reason = "the fields of a descriptor")]
    pub fn descriptor(&self, at: Position, addr: u64, len: u32, id: u16, flags: u16) {
        let slot = self.slot(at);
        self.memory.write(slot, &addr.to_le_bytes());
        self.memory.write(slot + 8, &len.to_le_bytes());
        self.memory.write(slot + 12, &id.to_le_bytes());
        self.memory.u16(slot + 14).store(flags, Ordering::Release);
    }

    /// Makes a chain available under `id`: its first descriptor's flags are stored last.
    pub fn push(&mut self, id: u16, pieces: &[Piece]) {
        let count = pieces.len() as u16;
        assert!(count <= self.room() && self.chains.insert(id, count).is_none());
        for (number, (addr, len, flags)) in pieces.iter().enumerate().rev() {
            let at = self.avail.advanced(number as u16, self.size);
            let owner = if at.wrap(self.size) { AVAIL } else { USED };
            let next = if number + 1 < pieces.len() { NEXT } else { 0 };
            self.descriptor(at, *addr, *len, id, flags | next | owner);
        }
        self.avail = self.avail.advanced(count, self.size);
    }

    /// A request of `data` with as much room for the answer.
    pub fn request(&mut self, id: u16, data: &[u8]) {
        let at = self.buffer(id);
        self.memory.write(at, data);
        self.memory.write(at + 2048, &vec![0xaa; data.len()]);
        let (guest, len) = (GUEST_BASE + at as u64, data.len() as u32);
        self.push(id, &[(guest, len, 0), (guest + 2048, len, WRITE)]);
    }

    /// The answer to the request of `id`.
    pub fn answer(&self, id: u16, len: usize) -> Vec<u8> {
        self.memory.read(self.buffer(id) + 2048, len)
    }

    /// Kicks when the device wants that. Whether it did.
    pub fn publish(&mut self) -> bool {
        fence(Ordering::SeqCst);
        let event = self.memory.read(self.device_event(), 4);
        let off_wrap = u16::from_le_bytes([event[0], event[1]]);
        let old = std::mem::replace(&mut self.considered, self.avail);
        let kick = match event[2] {
            0 => true,
            2 if self.event_idx => {
                let (size, new) = (self.size, self.avail);
                Position::from_wire(off_wrap, size)
                    .is_none_or(|at| at.distance_from(old, size) < new.distance_from(old, size))
            }
            _ => false,
        };
        if kick {
            nix::unistd::write(&self.kick, &1u64.to_ne_bytes()).unwrap();
        }
        kick
    }

    /// The next used descriptor that is there: buffer id and written length.
    pub fn try_complete(&mut self) -> Option<(u16, u32)> {
        let slot = self.slot(self.used);
        let flags = self.memory.u16(slot + 14).load(Ordering::Acquire);
        let wrap = self.used.wrap(self.size);
        if (flags & AVAIL != 0) != wrap || (flags & USED != 0) != wrap {
            return None;
        }
        let fields = self.memory.read(slot + 8, 6);
        let id = u16::from_le_bytes([fields[4], fields[5]]);
        let count = self.chains.remove(&id).expect("an id that is outstanding");
        self.used = self.used.advanced(count, self.size);
        Some((id, u32::from_le_bytes(fields[..4].try_into().unwrap())))
    }

    /// Says when to call.
    pub fn ask_for_calls(&self, flags: u16) {
        let off_wrap = self.used.to_wire(self.size).to_le_bytes();
        let [low, high] = flags.to_le_bytes();
        let event = [off_wrap[0], off_wrap[1], low, high];
        self.memory.write(self.driver_event(), &event);
        fence(Ordering::SeqCst);
    }

    /// The next used descriptor, waiting for calls.
    pub fn complete(&mut self) -> (u16, u32) {
        loop {
            if let Some(done) = self.try_complete() {
                return done;
            }
            self.ask_for_calls(if self.event_idx { 2 } else { 0 });
            if let Some(done) = self.try_complete() {
                return done;
            }
            assert!(
                wait(self.call.as_fd(), PATIENCE_MS),
                "no call: available {:?}, used {:?}",
                self.avail,
                self.used
            );
        }
    }
}
