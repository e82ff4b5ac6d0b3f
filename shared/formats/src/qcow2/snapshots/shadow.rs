//! The refcounts of a new state, in blocks of their own beside the present ones.
//!
//! Every present refcount block has a place reserved for its successor; blocks that change are
//! copied there. Memory is bounded: blocks are written to their places when there are too many.

use super::super::alloc::Reserved;
use super::super::tables::{ClusterRun, HostCluster, HostOffset};
use super::super::{Qcow2, read_bytes, refcount};
use super::quiet::Quiet;
use block::error::reason;
use block::{Error, ErrorKind};
use executor::Errno;
use std::collections::{BTreeMap, HashMap};

/// Memory for blocks in bytes.
const BUDGET: u64 = 32 << 20;

/// Clusters reserved for the new state.
#[derive(Default)]
pub(super) struct Reservations<'q>(Vec<Reserved<'q>>);

impl<'q> Reservations<'q> {
    pub(super) fn add(&mut self, image: &'q Qcow2, run: ClusterRun) {
        self.0.push(Reserved::new(image, run));
    }
    pub(super) fn extend(&mut self, more: impl Iterator<Item = Reserved<'q>>) {
        self.0.extend(more);
    }
    /// The new state refers to them.
    pub(super) fn keep(self) {
        self.0.into_iter().for_each(Reserved::keep);
    }
    /// Nothing will.
    pub(super) fn give_back(self) {
        self.0.into_iter().for_each(Reserved::give_back);
    }
}

/// See the module.
pub(super) struct Shadow<'q> {
    image: &'q Qcow2,
    /// Where the successor of each present block goes, by index in the refcount table.
    places: BTreeMap<u64, HostOffset>,
    /// Blocks that have one, and whether it was written to its place.
    changed: BTreeMap<u64, bool>,
    loaded: HashMap<u64, Vec<u8>>,
}

/// Failures that change nothing.
#[derive(Debug)]
pub(super) enum Failure {
    Io(Errno),
    /// A refcount would pass what its width can hold.
    Overflow,
    Corrupt(String),
}

impl From<Errno> for Failure {
    fn from(errno: Errno) -> Self {
        Self::Io(errno)
    }
}

impl Failure {
    pub(super) fn into_error(self) -> Error {
        match self {
            Self::Io(errno) => Error {
                errno: Some(errno),
                ..Error::new(ErrorKind::Io, reason(errno))
            },
            Self::Overflow => Error {
                errno: Some(Errno::EINVAL),
                ..Error::new(ErrorKind::Invalid, "Invalid argument (refcount overflow)")
            },
            Self::Corrupt(what) => Error {
                errno: Some(Errno::EIO),
                ..Error::new(ErrorKind::Corrupt, what)
            },
        }
    }
}

impl<'q> Shadow<'q> {
    /// Reserves a place for the successor of every refcount block.
    pub(super) async fn new(
        image: &'q Qcow2,
        quiet: &Quiet<'_>,
        reserved: &mut Reservations<'q>,
    ) -> Result<Self, Failure> {
        let mut places = BTreeMap::new();
        loop {
            // Reserving may add blocks.
            let present: Vec<u64> = {
                let state = image.state();
                let count = state.refcount_table.entries.len() as u64;
                (0..count)
                    .filter(|index| state.refcount_table.block(*index) != 0)
                    .filter(|index| !places.contains_key(index))
                    .collect()
            };
            if present.is_empty() {
                break;
            }
            let mut missing = present.iter();
            while missing.len() != 0 {
                let (run, _) = image
                    .allocate_in(&quiet.structure, missing.len() as u64)
                    .await?;
                reserved.add(image, run);
                for (cluster, index) in (run.first.0..run.end()).zip(missing.by_ref()) {
                    places.insert(*index, image.geometry.host_offset(HostCluster(cluster)));
                }
            }
        }
        image.settle().await?;
        Ok(Self {
            image,
            places,
            changed: BTreeMap::new(),
            loaded: HashMap::new(),
        })
    }

    /// The block at `index` as it is to become; `None` when it was added after the start.
    async fn block(&mut self, index: u64) -> Result<Option<&mut Vec<u8>>, Failure> {
        let Some(&place) = self.places.get(&index) else {
            return Ok(None);
        };
        if !self.loaded.contains_key(&index) {
            self.make_room().await?;
            let source = match self.changed.get(&index) {
                Some(true) => place.0,
                _ => self.image.refcount_block_place(index).await?.0,
            };
            let length = self.image.geometry.cluster_size() as usize;
            let bytes = read_bytes(&self.image.file, source, length).await?;
            self.loaded.insert(index, bytes);
        }
        Ok(self.loaded.get_mut(&index))
    }

    async fn make_room(&mut self) -> Result<(), Failure> {
        let most = (BUDGET >> self.image.geometry.cluster_bits).max(4) as usize;
        if self.loaded.len() < most {
            return Ok(());
        }
        self.write().await
    }

    /// Writes every loaded block that changed to its place, and forgets all.
    pub(super) async fn write(&mut self) -> Result<(), Failure> {
        for (index, bytes) in std::mem::take(&mut self.loaded) {
            let (Some(written), Some(place)) =
                (self.changed.get_mut(&index), self.places.get(&index))
            else {
                continue;
            };
            self.image.write_bytes(place.0, &bytes).await?;
            *written = true;
        }
        Ok(())
    }

    /// The refcount of a cluster in the new state.
    pub(super) async fn get(&mut self, cluster: HostCluster) -> Result<u64, Failure> {
        let geometry = self.image.geometry;
        let position = cluster.0 & ((1 << geometry.refcount_block_bits()) - 1);
        let block = self.block(geometry.refcount_table_index(cluster)).await?;
        Ok(block.map_or(0, |block| {
            refcount::get_in_bytes(block, geometry.refcount_order, position)
        }))
    }

    /// Changes each refcount of a run, where `None` is below zero or above all; calls `each` with the
    /// cluster and its new refcount.
    pub(super) async fn change(
        &mut self,
        run: ClusterRun,
        change: impl Fn(u64) -> Option<u64>,
        mut each: impl FnMut(HostCluster, u64),
    ) -> Result<(), Failure> {
        let geometry = self.image.geometry;
        let bits = geometry.refcount_block_bits();
        let mut at = run.first.0;
        while at < run.end() {
            let index = at >> bits;
            let end = run.end().min((index + 1) << bits);
            let Some(block) = self.block(index).await? else {
                let what = format!(
                    "cluster at {:#x} is used but not counted",
                    at << geometry.cluster_bits
                );
                return Err(Failure::Corrupt(what));
            };
            for cluster in at..end {
                let position = cluster & ((1 << bits) - 1);
                let old = refcount::get_in_bytes(block, geometry.refcount_order, position);
                let new = match change(old) {
                    Some(new) if new <= geometry.refcount_max() => new,
                    None if old != u64::MAX => {
                        let what = format!(
                            "cluster at {:#x} is used more often than it is counted",
                            cluster << geometry.cluster_bits
                        );
                        return Err(Failure::Corrupt(what));
                    }
                    Some(_) | None => return Err(Failure::Overflow),
                };
                refcount::set_in_bytes(block, geometry.refcount_order, position, new);
                each(HostCluster(cluster), new);
            }
            self.changed.insert(index, false);
            at = end;
        }
        Ok(())
    }

    /// One reference more to each cluster of a run.
    pub(super) async fn increment(&mut self, run: ClusterRun) -> Result<(), Failure> {
        self.change(run, |old| old.checked_add(1), |_, _| {}).await
    }

    /// Clusters reserved since the start have one reference; they are counted so in blocks added
    /// since as well.
    pub(super) async fn set_one(&mut self, run: ClusterRun) -> Result<(), Failure> {
        for cluster in run.first.0..run.end() {
            let first = HostCluster(cluster);
            let index = self.image.geometry.refcount_table_index(first);
            if self.places.contains_key(&index) {
                let one = ClusterRun { first, count: 1 };
                self.change(one, |_| Some(1), |_, _| {}).await?;
            }
        }
        Ok(())
    }

    /// The refcount table of the new state, and the blocks that it no longer refers to.
    pub(super) fn table(&self) -> (Vec<u64>, Vec<HostCluster>) {
        let mut entries = self.image.state().refcount_table.entries.clone();
        let mut old = Vec::new();
        for index in self.changed.keys() {
            let Some(place) = self.places.get(index) else {
                continue;
            };
            let entry = &mut entries[*index as usize];
            old.push(HostCluster(*entry >> self.image.geometry.cluster_bits));
            *entry = place.0;
        }
        (entries, old)
    }

    /// Places that are not needed.
    pub(super) fn unused(&self) -> Vec<HostCluster> {
        let unused = self
            .places
            .iter()
            .filter(|(index, _)| !self.changed.contains_key(index));
        unused
            .map(|(_, place)| self.image.geometry.host_cluster(*place))
            .collect()
    }
}
