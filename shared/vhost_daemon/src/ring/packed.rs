//! The packed virtqueue (virtio 1.2 section 2.8).
//!
//! ```text
//!   descriptors[size], 16 bytes each      written by both sides, lap by lap
//!   driver event, device event            off_wrap u16 │ flags u16: when to call, when to kick
//! ```
//!
//! A descriptor's available and used bits say whose it is: available in a lap of wrap counter `w` is
//! `w, !w`, used is `w, w`. Requests are named by a *state*, one of `size` places from a free list that
//! the inflight region mirrors; a chain takes one for each descriptor, so that a driver which makes
//! more available than the ring has is noticed. Buffer ids are the driver's own and only handed
//! back.
//!
//! A batch of used descriptors becomes visible with the store of its first one, which comes last.
//! Used descriptors behind an unpublished first one would become visible with somebody else's, so a
//! successor wipes those that a dead predecessor left ([`PackedRing::wipe_unpublished`]).

#![expect(unsafe_code, reason = "guest memory is reached through raw pointers")]

use std::cell::Cell;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use virtio_bindings::virtio_ring::{
    VRING_DESC_F_WRITE, VRING_PACKED_DESC_F_AVAIL, VRING_PACKED_DESC_F_USED,
    VRING_PACKED_EVENT_FLAG_DESC, VRING_PACKED_EVENT_FLAG_DISABLE, VRING_PACKED_EVENT_FLAG_ENABLE,
};

use super::chain::{Chain, MAX_CHAIN, SharedMemory};
use super::descriptor::{DESC_LEN, Descriptor, Indirect, prefetch, read_words};
use super::dirty::Dirty;
use super::position::Position;
use super::{RingError, RingParts, StartError};
use crate::dirty_log::RingLog;
use crate::inflight::{PackedInflight, PackedRecovery, Taken};
use crate::memory::{Mapped, MemoryTable};
use crate::store::Store;
use crate::wire::RingAddresses;

/// Length of an event suppression structure in bytes.
pub(super) const EVENT_LEN: usize = 4;
/// Offset of a descriptor's flags.
const FLAGS_AT: usize = 14;
const AVAIL_BIT: u16 = 1 << VRING_PACKED_DESC_F_AVAIL;
const USED_BIT: u16 = 1 << VRING_PACKED_DESC_F_USED;
const EVENT_ENABLE: u16 = VRING_PACKED_EVENT_FLAG_ENABLE as u16;
const EVENT_DISABLE: u16 = VRING_PACKED_EVENT_FLAG_DISABLE as u16;
const EVENT_DESC: u16 = VRING_PACKED_EVENT_FLAG_DESC as u16;

/// Descriptors in a line of the processor's cache.
const LINE: u16 = 4;
/// Descriptors looked ahead at, some four requests.
const AHEAD: u16 = 3 * LINE;

/// Whether `flags` are those of an available descriptor in a lap of wrap counter `wrap`.
#[inline]
fn is_available(flags: u16, wrap: bool) -> bool {
    (flags & AVAIL_BIT != 0) == wrap && (flags & USED_BIT != 0) != wrap
}

/// The parts of a ring in this process. Keeps the regions they are in.
#[derive(Debug)]
pub(super) struct Layout {
    descriptors: Mapped,
    driver: Mapped,
    device: Mapped,
}

impl Layout {
    pub(super) fn new(
        table: &MemoryTable,
        at: &RingAddresses,
        size: u16,
    ) -> Result<Layout, RingError> {
        let part = |addr: u64, len: usize, align: usize| {
            table
                .map_user(addr, len as u64)
                .filter(|mapped| (mapped.base as usize).is_multiple_of(align))
                .ok_or(RingError::Unmapped(addr))
        };
        Ok(Layout {
            descriptors: part(at.descriptors, DESC_LEN * usize::from(size), DESC_LEN)?,
            driver: part(at.available, EVENT_LEN, 4)?,
            device: part(at.used, EVENT_LEN, 4)?,
        })
    }
}

/// A place for a descriptor in flight, or a free one.
#[derive(Clone, Copy, Debug, Default)]
struct State {
    /// The next of its chain, or of the free list, which ends beyond the ring.
    next: u16,
    /// Last state of the chain that begins here.
    last: u16,
    /// Descriptors of that chain.
    num: u16,
    /// Its buffer id.
    id: u16,
    /// Whether a request that the device holds begins here.
    held: bool,
}

/// A request that was returned and not published yet.
#[derive(Clone, Copy, Debug)]
struct Returned {
    state: u16,
    at: Position,
    /// The used descriptor's second word.
    word: u64,
}

/// A packed ring from the device's side. Lives on its queue's thread.
#[derive(Debug)]
pub struct PackedRing {
    layout: Layout,
    addresses: RingAddresses,
    size: u16,
    event_idx: bool,
    indirect: Indirect,
    /// Next descriptor to fetch.
    next_avail: Position,
    /// Where the next used descriptor goes.
    next_used: Position,
    /// Used descriptors before this are visible to the guest.
    published: Position,
    /// The published position when the guest was last considered for a call.
    considered: Position,
    states: Box<[State]>,
    free_head: u16,
    batch: Vec<Returned>,
    in_flight: u16,
    /// What a predecessor had in flight and has not been fetched again.
    recovered: Vec<Taken>,
    inflight: Option<PackedInflight>,
    /// Where writes are logged; `None` while they are not.
    dirty: Option<Box<Dirty>>,
    memory: SharedMemory,
    hint: Cell<usize>,
}

impl PackedRing {
    /// A ring of `parts` in `memory`, and the requests that have to be fetched again first.
    ///
    /// Without an inflight region a ring starts with nothing in flight, so that of the two
    /// positions in its base only the available one matters.
    ///
    /// # Errors
    /// [`StartError::Ring`] when a part is not in shared memory, [`StartError::Inflight`] when the
    /// inflight region is corrupt.
    pub fn new(
        parts: RingParts,
        memory: SharedMemory,
    ) -> Result<(PackedRing, Vec<u16>), StartError> {
        let size = parts.check_size()?;
        let layout = Layout::new(&memory, &parts.addresses, size)?;
        let base =
            Position::from_wire(parts.base as u16, size).ok_or(RingError::Base(parts.base))?;
        let inflight = parts
            .inflight
            .map(|region| PackedInflight::new(&region, parts.index, size))
            .transpose()?;
        let mut ring = PackedRing {
            layout,
            addresses: parts.addresses,
            size,
            event_idx: parts.features.event_idx,
            indirect: parts.features.indirect,
            next_avail: base,
            next_used: base,
            published: base,
            considered: base,
            states: vec![State::default(); usize::from(size)].into_boxed_slice(),
            free_head: 0,
            batch: Vec::with_capacity(usize::from(size)),
            in_flight: 0,
            recovered: Vec::new(),
            inflight: None,
            dirty: None,
            memory,
            hint: Cell::new(0),
        };
        let mut free: Vec<u16> = (0..size).collect();
        if let Some(mut inflight) = inflight {
            let was_used = |at: Position| !is_available(ring.flags_at(at), at.wrap(size));
            let recovery = inflight.recover(base, was_used)?;
            free = ring.adopt(recovery);
            ring.inflight = Some(inflight);
        }
        ring.link(&free);
        ring.free_head = free.first().copied().unwrap_or(size);
        ring.wipe_unpublished();
        let resubmit = ring.recovered.iter().map(|taken| taken.states[0]);
        let resubmit = resubmit.collect();
        Ok((ring, resubmit))
    }

    /// Takes over what a predecessor left; the free states.
    fn adopt(&mut self, recovery: PackedRecovery) -> Vec<u16> {
        if let Some(used) = recovery.used {
            let taken: usize = recovery.resubmit.iter().map(|t| t.states.len()).sum();
            // The states of all requests together are at most `size`.
            let avail = used.advanced(taken as u16, self.size);
            (self.next_avail, self.next_used) = (avail, used);
            (self.published, self.considered) = (used, used);
        }
        for taken in &recovery.resubmit {
            self.link(&taken.states);
        }
        self.recovered = recovery.resubmit;
        recovery.free
    }

    /// Links states into a list that ends beyond the ring.
    fn link(&mut self, list: &[u16]) {
        for (at, state) in list.iter().enumerate() {
            let next = list.get(at + 1).copied().unwrap_or(self.size);
            self.states[usize::from(*state)].next = next;
        }
    }

    /// Makes used descriptors that were never published look available again. The guest is not
    /// beyond the first position of those in flight, and does not read available ones back.
    fn wipe_unpublished(&self) {
        let mut at = self.next_used;
        for _ in 0..self.next_avail.distance_from(self.next_used, self.size) {
            let wrap = at.wrap(self.size);
            if !is_available(self.flags_at(at), wrap) {
                let flags = if wrap { AVAIL_BIT } else { USED_BIT };
                self.flags_of(at).put(flags.to_le());
            }
            at = at.advanced(1, self.size);
        }
    }

    /// Where a successor goes on: the available position, and the used one in the upper half.
    pub fn base(&self) -> u32 {
        let half = |position: Position| u32::from(position.to_wire(self.size));
        half(self.next_avail) | half(self.next_used) << 16
    }

    /// Whether the next descriptor to fetch is the first one of the first lap.
    pub fn is_at_start(&self) -> bool {
        self.next_avail == Position::START
    }

    /// Requests fetched and not yet returned.
    #[inline]
    pub fn in_flight(&self) -> u16 {
        self.in_flight
    }

    /// Whether any memory the ring works in was truncated by the front-end.
    pub fn poisoned(&self) -> bool {
        let layout = &self.layout;
        let parts = [&layout.descriptors, &layout.driver, &layout.device];
        parts.iter().any(|part| part.region.poisoned())
            || self.memory.regions().iter().any(|r| r.poisoned())
            || self.inflight.as_ref().is_some_and(PackedInflight::poisoned)
            || self.dirty.as_ref().is_some_and(|dirty| dirty.poisoned())
    }

    /// Works in `memory` from now on. False when the ring itself is not in it: then the ring's
    /// parts stay in the old mapping.
    pub fn relocate(&mut self, memory: SharedMemory) -> bool {
        let layout = Layout::new(&memory, &self.addresses, self.size);
        self.memory = memory;
        self.hint.set(0);
        match layout {
            Ok(layout) => self.layout = layout,
            Err(_) => return false,
        }
        true
    }

    /// Whether writes are logged.
    pub fn is_logging(&self) -> bool {
        self.dirty.is_some()
    }

    /// Logs writes from now on, elsewhere than before, or no more. Nothing may be in flight when
    /// logging begins.
    pub fn set_log(&mut self, log: Option<RingLog>) {
        match (log, &mut self.dirty) {
            (Some(log), Some(dirty)) => dirty.redirect(log),
            (Some(log), None) => {
                assert_eq!(self.in_flight, 0, "writable buffers are noted as they come");
                self.dirty = Some(Box::new(Dirty::new(log, self.size)));
            }
            (None, _) => self.dirty = None,
        }
    }

    fn descriptor(&self, at: Position) -> *const u8 {
        let index = usize::from(at.index(self.size));
        // SAFETY: the ring has `size` entries of 16 bytes and the index is below it.
        unsafe { self.layout.descriptors.base.add(DESC_LEN * index) }
    }

    fn flags_of(&self, at: Position) -> &AtomicU16 {
        // SAFETY: bytes 14 and 15 of an entry that is aligned to 16; all accesses are atomic.
        unsafe { &*self.descriptor(at).add(FLAGS_AT).cast() }
    }

    #[inline]
    fn flags_at(&self, at: Position) -> u16 {
        u16::from_le(self.flags_of(at).load(Ordering::Acquire))
    }

    /// Length, id and flags of a descriptor as one word.
    fn word_of(&self, at: Position) -> &AtomicU64 {
        // SAFETY: bytes 8 to 15 of an entry that is aligned to 16; all accesses are atomic.
        unsafe { &*self.descriptor(at).add(8).cast() }
    }

    /// Whether the driver made something available.
    #[inline]
    pub fn has_work(&self) -> bool {
        is_available(
            self.flags_at(self.next_avail),
            self.next_avail.wrap(self.size),
        )
    }

    /// Brings the line of a descriptor near that is `ahead` of the next one. The driver wrote it on
    /// another processor; a batch's requests follow each other, so its misses overlap.
    #[inline]
    fn prefetch(&self, ahead: u16) {
        prefetch(self.descriptor(self.next_avail.advanced(ahead, self.size)));
    }

    /// Fetches up to `chains.len()` requests. Gives how many, and what broke the ring after them.
    ///
    /// Everything returned was published before: states are taken from the head of the free list
    /// that the inflight region has committed.
    #[inline]
    pub fn fetch(&mut self, chains: &mut [Chain]) -> (usize, Option<RingError>) {
        assert!(
            self.batch.is_empty(),
            "what was returned is published first"
        );
        let mut taken = 0;
        let mut broken = None;
        if !chains.is_empty() && self.has_work() {
            for ahead in (LINE..AHEAD).step_by(LINE.into()) {
                self.prefetch(ahead);
            }
        }
        while taken < chains.len() && self.has_work() {
            self.prefetch(AHEAD);
            broken = self.take(&mut chains[taken]).err();
            if broken.is_some() {
                break;
            }
            taken += 1;
        }
        if let Some(dirty) = &mut self.dirty {
            chains[..taken].iter().for_each(|chain| dirty.note(chain));
        }
        (taken, broken)
    }

    /// Parses the chain at the available position and counts it as in flight.
    #[inline]
    fn take(&mut self, chain: &mut Chain) -> Result<(), RingError> {
        let first = self.free_head;
        chain.begin(first, &self.memory);
        let (mut free, mut num) = (first, 0);
        let mut at = self.next_avail;
        let (last, id) = loop {
            if free >= self.size {
                return Err(RingError::Overrun(self.size));
            }
            // SAFETY: an entry of the ring, aligned to 16.
            let descriptor = Descriptor::packed(unsafe { read_words(self.descriptor(at)) });
            if let Some(inflight) = &self.inflight {
                inflight.copy(free, &descriptor);
            }
            num += 1;
            self.parse(chain, descriptor, num)?;
            at = at.advanced(1, self.size);
            let state = free;
            free = self.states[usize::from(state)].next;
            if !descriptor.has_next() {
                break (state, descriptor.tag);
            }
        };
        chain.warm();
        self.free_head = free;
        self.next_avail = at;
        if let Some(inflight) = &mut self.inflight {
            inflight.take(first, (last, num), free);
        }
        self.hold(
            first,
            State {
                last,
                num,
                id,
                ..State::default()
            },
        );
        Ok(())
    }

    /// The request of `first` is in flight from now on.
    fn hold(&mut self, first: u16, request: State) {
        let state = &mut self.states[usize::from(first)];
        *state = State {
            next: state.next,
            held: true,
            ..request
        };
        self.in_flight += 1;
    }

    /// Appends descriptor number `num` of a chain, or the table that it names.
    #[inline]
    fn parse(&self, chain: &mut Chain, descriptor: Descriptor, num: u16) -> Result<(), RingError> {
        if num > MAX_CHAIN {
            return Err(RingError::ChainLength(chain.head()));
        }
        if !descriptor.is_indirect() {
            return chain.push(descriptor.buffer(), &self.memory, &self.hint);
        }
        let head = chain.head();
        // Entries follow each other; of their flags only the direction has a meaning.
        for index in 0..descriptor.table_entries(head, self.indirect)? {
            let words = descriptor.table_entry(index, &self.memory, &self.hint)?;
            let entry = Descriptor::packed(words);
            if entry.is_indirect() {
                return Err(RingError::Indirect {
                    head,
                    len: descriptor.len,
                });
            }
            chain.push(entry.buffer(), &self.memory, &self.hint)?;
        }
        Ok(())
    }

    /// Fetches a request again that was in flight when a predecessor died.
    ///
    /// # Errors
    /// [`RingError`]: what it left in the inflight region is no chain.
    pub fn refetch(&mut self, head: u16, chain: &mut Chain) -> Result<(), RingError> {
        let same = |taken: &Taken| taken.states.first() == Some(&head);
        let position = self.recovered.iter().position(same);
        let taken = self
            .recovered
            .remove(position.ok_or(RingError::DescriptorIndex(head))?);
        chain.begin(head, &self.memory);
        for (descriptor, num) in taken.descriptors.iter().zip(1..) {
            self.parse(chain, *descriptor, num)?;
        }
        let request = State {
            last: taken.states.last().copied().unwrap_or(head),
            num: taken.states.len() as u16,
            id: taken.descriptors.last().map_or(0, |last| last.tag),
            ..State::default()
        };
        self.hold(head, request);
        if let Some(dirty) = &mut self.dirty {
            dirty.note(chain);
        }
        Ok(())
    }

    /// Returns a request; the guest sees it after [`PackedRing::publish`].
    #[inline]
    pub fn push_used(&mut self, head: u16, written: u32) {
        let state = &mut self.states[usize::from(head)];
        assert!(state.held, "a request is returned once");
        state.held = false;
        let State { last, num, id, .. } = *state;
        self.in_flight -= 1;
        self.states[usize::from(last)].next = self.free_head;
        self.free_head = head;
        let mut flags = if written > 0 {
            VRING_DESC_F_WRITE as u16
        } else {
            0
        };
        if self.next_used.wrap(self.size) {
            flags |= AVAIL_BIT | USED_BIT;
        }
        self.batch.push(Returned {
            state: head,
            at: self.next_used,
            word: u64::from(written) | u64::from(id) << 32 | u64::from(flags) << 48,
        });
        self.next_used = self.next_used.advanced(num, self.size);
        if let Some(inflight) = &mut self.inflight {
            inflight.complete(head, last);
        }
        if let Some(dirty) = &self.dirty {
            dirty.complete(head);
        }
    }

    /// Gives every request that was fetched and not returned back. Those returned were the oldest, and are published.
    pub fn rewind(&mut self) {
        assert!(
            self.inflight.is_none() && self.batch.is_empty(),
            "what is in flight is recorded as such; what was returned is published first"
        );
        self.next_avail = self.next_used;
        let free: Vec<u16> = (0..self.size).collect();
        self.link(&free);
        self.free_head = 0;
        self.states.iter_mut().for_each(|state| state.held = false);
        self.in_flight = 0;
    }

    /// Shows the guest every request returned by now; false when there is none.
    #[inline]
    pub fn publish(&mut self) -> bool {
        let Some((first, rest)) = self.batch.split_first() else {
            return false;
        };
        if let Some(inflight) = &mut self.inflight {
            inflight.advance(self.next_used);
        }
        for returned in rest {
            let word = returned.word.to_le();
            self.word_of(returned.at).put(word);
        }
        self.word_of(first.at).put(first.word.to_le());
        self.published = self.next_used;
        if let Some(dirty) = &self.dirty {
            for returned in &self.batch {
                let offset = DESC_LEN as u64 * u64::from(returned.at.index(self.size));
                let ring = self.layout.descriptors.guest_address();
                dirty.ring(ring + offset, DESC_LEN);
            }
        }
        if let Some(inflight) = &mut self.inflight {
            let states = self.batch.iter().map(|returned| returned.state);
            inflight.commit(self.next_used, states);
        }
        self.batch.clear();
        true
    }

    /// Whether the guest wants a call for what was published since this was last asked.
    #[inline]
    pub fn needs_call(&mut self) -> bool {
        let (old, new) = (self.considered, self.published);
        self.considered = new;
        fence(Ordering::SeqCst);
        // SAFETY: 4 bytes, aligned; all accesses are atomic.
        let event = unsafe { &*self.layout.driver.base.cast::<AtomicU32>() };
        let event = u32::from_le(event.load(Ordering::Relaxed));
        match (event >> 16) as u16 & 3 {
            EVENT_DISABLE => false,
            EVENT_DESC if self.event_idx => {
                // A position outside of the ring can only come from a broken driver: call.
                Position::from_wire(event as u16, self.size).is_none_or(|at| {
                    at.distance_from(old, self.size) < new.distance_from(old, self.size)
                })
            }
            _ => true,
        }
    }

    /// Asks for kicks; true when something came in before the request could be seen.
    pub fn arm(&self) -> bool {
        if self.event_idx {
            self.ask_for_kicks(EVENT_DESC, self.next_avail.to_wire(self.size));
        } else {
            self.ask_for_kicks(EVENT_ENABLE, 0);
        }
        fence(Ordering::SeqCst);
        self.has_work()
    }

    /// Asks for no kicks.
    pub fn disarm(&self) {
        self.ask_for_kicks(EVENT_DISABLE, 0);
    }

    fn ask_for_kicks(&self, flags: u16, off_wrap: u16) {
        let word = u32::from(off_wrap) | u32::from(flags) << 16;
        // SAFETY: 4 bytes, aligned; all accesses are atomic.
        let event = unsafe { &*self.layout.device.base.cast::<AtomicU32>() };
        event.put(word.to_le());
        if let Some(dirty) = &self.dirty {
            dirty.used(0, EVENT_LEN);
        }
    }
}
