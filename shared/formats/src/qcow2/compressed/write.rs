//! Writing a compressed cluster: deflate, find a place, write, map.
//!
//! ```text
//!   host clusters  | A A A A A|A B B B C|C C . . . |
//!   refcounts          1          3         1    └ next: the cursor
//! ```
//!
//! Bytes go behind the last ones while these are in a host cluster that is still referred to;
//! otherwise, and whenever a host cluster is full, into a fresh one. A reference is counted in
//! memory when the place is taken and logged with the mapping; [`Packing::pending`] holds the
//! difference, so that a kill in between gives the place back. Places are taken one after another
//! (`place`), because a place that spans two host clusters needs them to be neighbours.

use super::Packed;
use crate::qcow2::alloc::{Need, Pins, Reserved, Use, Want};
use crate::qcow2::cache::Pinned;
use crate::qcow2::cluster::EntryWords;
use crate::qcow2::lazy::Scope;
use crate::qcow2::reclaim::DiscardKind;
use crate::qcow2::reclaim::Requests;
use crate::qcow2::redo::{L2Run, RedoRecord};
use crate::qcow2::tables::{COMPRESSED, ClusterRun, GuestCluster, HostCluster, L2Entry};
use crate::qcow2::write::MAX_LOG_ATTEMPTS;
use crate::qcow2::{Qcow2, State};
use block::{Buffer, ByteRange, EncodedBytes, Event, WriteFlags};
use executor::Errno;
use executor::workers::offload;
use smallvec::SmallVec;
use std::collections::BTreeMap;

/// Where compressed clusters go.
#[derive(Default)]
pub(in super::super) struct Packing {
    /// The next free byte of a host cluster that holds compressed clusters and has room.
    cursor: Option<u64>,
    /// References counted in memory by writes that are not committed.
    pending: BTreeMap<HostCluster, u64>,
}

impl Packing {
    /// Nothing more goes to `cluster`: it is about to be given back.
    pub(in super::super) fn leave(&mut self, cluster: HostCluster, cluster_bits: u32) {
        if self
            .cursor
            .is_some_and(|at| at >> cluster_bits == cluster.0)
        {
            self.cursor = None;
        }
    }

    /// The part of a refcount in memory that the metadata refers to.
    pub(in super::super) fn settled(&self, cluster: HostCluster, refcount: u64) -> u64 {
        refcount - self.pending.get(&cluster).copied().unwrap_or(0)
    }

    fn add(&mut self, run: ClusterRun) {
        for cluster in (run.first.0..run.end()).map(HostCluster) {
            *self.pending.entry(cluster).or_default() += 1;
        }
    }

    fn remove(&mut self, run: ClusterRun) {
        for cluster in (run.first.0..run.end()).map(HostCluster) {
            let left = self.pending.get_mut(&cluster);
            if let Some(left) = left.filter(|left| **left > 1) {
                *left -= 1;
            } else {
                self.pending.remove(&cluster);
            }
        }
    }
}

/// A place that is counted and not yet mapped. Dropped with its future, what writes to it may
/// still be under way: it stays counted until the image is closed.
struct Place<'q> {
    image: &'q Qcow2,
    packed: Packed,
    run: ClusterRun,
    held: bool,
}

impl Place<'_> {
    /// Nothing will refer to it, and nothing writes to it.
    fn give_back(mut self) {
        self.held = false;
        let mut state = self.image.state();
        state.packing.remove(self.run);
        state.give_back(self.run);
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if self.held {
            let mut state = self.image.state();
            state.packing.remove(self.run);
            state.abandoned.push(self.run);
        }
    }
}

impl Qcow2 {
    /// A cluster's bytes, compressed; `None` when they do not get smaller.
    pub(in super::super) async fn deflate(&self, buffer: &Buffer) -> Option<EncodedBytes> {
        let mut plain = self.inflated.memory();
        let (filled, rest) = plain.split_at_mut_checked(buffer.len())?;
        buffer.copy_to_slice(filled);
        rest.fill(0);
        let (codec, mut packed) = (self.header.codec, self.inflated.memory());
        let is_short = plain.len() <= codec.encoded_inline();
        let work = move || {
            let most = packed.len() - 1;
            let length = codec.encode(&plain, &mut packed[..most]);
            (plain, packed, length)
        };
        let (plain, packed, length) = match is_short {
            true => work(),
            false => offload(work).await,
        };
        self.inflated.give_back(plain);
        match length {
            Some(length) => Some(EncodedBytes {
                memory: packed,
                length,
            }),
            None => {
                self.inflated.give_back(packed);
                None
            }
        }
    }

    /// See [`block::Format::store_encoded`].
    pub(in super::super) async fn store_packed(
        &self,
        range: ByteRange,
        EncodedBytes { memory, length }: EncodedBytes,
    ) -> Result<(), Errno> {
        self.check_writable()?;
        let geometry = &self.geometry;
        if !geometry.is_aligned(range.offset) {
            return Err(Errno::EINVAL);
        }
        let cluster = geometry.guest_cluster(range.offset);
        let lock = range.offset..geometry.guest_offset(GuestCluster(cluster.0 + 1));
        let _locked = self.guest_locks.lock(lock).await;
        self.make_room().await?;
        self.ensure_l2_table(geometry.l1_index(cluster)).await?;
        let slice = self.load_l2(cluster).await?.ok_or(Errno::EIO)?;
        self.decode_entry(self.entry_words(&slice, cluster), cluster)
            .await?;
        self.reclaim(Requests::MayRun, 1).await;
        self.event(Event::ClusterAllocBytes).await;
        let place = self.place_packed(length as u64).await?;
        let whole = memory.into_buffer();
        let data = whole.slice(0..length);
        let node = self.file.node();
        self.event(Event::WriteCompressed).await;
        let write = node.write(place.packed.offset, data, WriteFlags::default());
        let written = write.await;
        if let Ok(memory) = whole.try_into_heap() {
            self.inflated.give_back(memory);
        }
        match written {
            Ok(()) => {
                self.event(Event::L2UpdateCompressed).await;
                self.map_packed(place, cluster, &slice).await
            }
            Err(errno) => {
                place.give_back();
                Err(errno)
            }
        }
    }

    /// Takes a place for `length` bytes, less than a cluster.
    async fn place_packed(&self, length: u64) -> Result<Place<'_>, Errno> {
        let _one_at_a_time = self.placing.lock().await;
        let mut pins = Pins::default();
        loop {
            let attempt = self.place_behind(&mut self.state(), length);
            match attempt {
                Ok(Some(place)) => return Ok(place),
                Ok(None) => break,
                Err(need) => self.provide_unlocked(need, &mut pins).await?,
            }
        }
        let (fresh, _) = self.allocate(Want::one(Use::CompressedCluster)).await?;
        let reserved = Reserved::new(self, fresh);
        // Other compressed data may have had this place: nothing read before is true of it.
        self.inflated.forget();
        loop {
            let attempt = self.place_in_fresh(&mut self.state(), fresh, length);
            let need = match attempt {
                Ok(place) => {
                    reserved.keep();
                    return Ok(place);
                }
                Err(need) => need,
            };
            if let Err(errno) = self.provide_unlocked(need, &mut pins).await {
                reserved.give_back();
                return Err(errno);
            }
        }
    }

    async fn provide_unlocked<'q>(&'q self, need: Need, pins: &mut Pins<'q>) -> Result<(), Errno> {
        let structure = self.structure.lock().await;
        self.provide(&structure, need, pins).await
    }

    /// A place in the host cluster of the cursor, when it has the room.
    fn place_behind(&self, state: &mut State, length: u64) -> Result<Option<Place<'_>>, Need> {
        let Some(cursor) = state.packing.cursor else {
            return Ok(None);
        };
        let cluster_size = self.geometry.cluster_size();
        if cursor % cluster_size + length > cluster_size {
            return Ok(None);
        }
        let packed = Packed {
            offset: cursor,
            length,
        };
        if !self.count_one_more(state, HostCluster(cursor >> self.geometry.cluster_bits))? {
            state.packing.cursor = None;
            return Ok(None);
        }
        Ok(Some(self.take(state, packed)))
    }

    /// A place that ends in the host cluster `fresh`, which is counted already, and begins at the
    /// cursor if that is right before.
    fn place_in_fresh(
        &self,
        state: &mut State,
        fresh: ClusterRun,
        length: u64,
    ) -> Result<Place<'_>, Need> {
        let bits = self.geometry.cluster_bits;
        let mut packed = Packed {
            offset: self.geometry.host_offset(fresh.first).0,
            length,
        };
        if packed.descriptor(&self.geometry).is_none() {
            return Err(Need::Fail(Errno::EFBIG));
        }
        if let Some(cursor) = state.packing.cursor
            && (cursor >> bits) + 1 == fresh.first.0
            && self.count_one_more(state, HostCluster(cursor >> bits))?
        {
            packed.offset = cursor;
        }
        Ok(self.take(state, packed))
    }

    /// Adds a reference to a host cluster in use; false when its refcount is at the limit.
    fn count_one_more(&self, state: &State, first: HostCluster) -> Result<bool, Need> {
        let refcount = self.refcount(state, first)?;
        if refcount == 0 || refcount >= self.geometry.refcount_max() {
            return Ok(false);
        }
        let one = ClusterRun { first, count: 1 };
        self.set_refcounts(one, refcount + 1)?;
        Ok(true)
    }

    fn take(&self, state: &mut State, packed: Packed) -> Place<'_> {
        let run = packed.clusters(&self.geometry);
        let end = packed.offset + packed.length;
        state.packing.add(run);
        state.packing.cursor = (!self.geometry.is_aligned(end)).then_some(end);
        Place {
            image: self,
            packed,
            run,
            held: true,
        }
    }

    /// Maps a cluster to its written bytes.
    async fn map_packed(
        &self,
        mut place: Place<'_>,
        cluster: GuestCluster,
        slice: &Pinned<'_>,
    ) -> Result<(), Errno> {
        let mut pins = Pins::default();
        let mut result = Err(Errno::ENOSPC);
        for _ in 0..MAX_LOG_ATTEMPTS {
            let attempt = self.try_map_packed(&place, cluster, slice);
            result = match attempt {
                Ok(true) => {
                    place.held = false;
                    return Ok(());
                }
                Ok(false) => self.flush_scope(Scope::Mapping).await,
                Err(need) => self.provide_unlocked(need, &mut pins).await,
            };
            if result.is_err() {
                break;
            }
        }
        place.give_back();
        result.and(Err(Errno::ENOSPC))
    }

    /// One redo unit: the refcounts without what other writes have pending, the entry, and the
    /// release of what it referred to. False when the log is full.
    fn try_map_packed(
        &self,
        place: &Place<'_>,
        cluster: GuestCluster,
        slice: &Pinned<'_>,
    ) -> Result<bool, Need> {
        let descriptor = place.packed.descriptor(&self.geometry);
        let descriptor = descriptor.ok_or(Need::Fail(Errno::EFBIG))?;
        let new = EntryWords {
            descriptor: L2Entry(COMPRESSED | descriptor),
            bitmap: 0,
        };
        let old = self.entry_words(slice, cluster).descriptor;
        let freed = old.references(&self.geometry);
        let mut state = self.state();
        let state = &mut *state;
        let mut records: SmallVec<[RedoRecord; 4]> = SmallVec::new();
        for first in (place.run.first.0..place.run.end()).map(HostCluster) {
            let refcount = self.refcount(state, first)?;
            let run = ClusterRun { first, count: 1 };
            let value = state.packing.settled(first, refcount) + 1;
            records.push(RedoRecord::Refcount { run, value });
        }
        records.push(RedoRecord::L2(L2Run {
            first: cluster,
            count: 1,
            value: new,
            contiguous: false,
        }));
        let pass = DiscardKind::Never;
        records.extend(freed.map(|run| RedoRecord::Free { run, pass }));
        let encoded: SmallVec<[_; 4]> = records.iter().map(|record| record.encode()).collect();
        if !self.log.append(&encoded) {
            return Ok(false);
        }
        self.set_entry(state, slice, (cluster, new));
        if let Some(run) = freed {
            state.free(run, pass);
        }
        state.packing.remove(place.run);
        Ok(true)
    }
}
