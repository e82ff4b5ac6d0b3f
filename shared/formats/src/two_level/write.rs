//! Changes of the mapping: clusters get places, entries follow the data.

use super::{Entries, Entry, Place, Tables};
use crate::bytes::write_bytes;
use block::format::{Fill, Mapping, WritePlan};
use block::{ByteRange, EncodedBytes, Errno, Event, WriteFlags, ZeroFlags};
use executor::sync::RangeGuard;
use std::sync::atomic::Ordering::{AcqRel, Acquire};

/// Most clusters of one prepared write, and most bytes unless one cluster has more.
const MAX_PLAN_CLUSTERS: u64 = 256;
const MAX_PLAN_BYTES: u64 = 4 << 20;

/// A write that was prepared.
pub(crate) struct Token<'a> {
    _clusters: RangeGuard<'a>,
    /// Where the data goes, unless its clusters have places.
    change: Option<Change>,
}

struct Change {
    first: u64,
    count: u64,
    place: Place,
    /// The data must be durable before its entries are written.
    settles: bool,
}

/// The clusters that a write gets places for, and what they were before.
struct Allocation {
    first: u64,
    count: u64,
    ends: [Entry; 2],
    /// Some hold what is encoded.
    has_encoded: bool,
}

impl<E: Entries> Tables<E> {
    /// See [`block::Format::prepare_write`].
    pub(crate) async fn prepare(&self, range: ByteRange) -> Result<WritePlan<Token<'_>>, Errno> {
        let most = (MAX_PLAN_BYTES >> self.shape().cluster_bits).clamp(1, MAX_PLAN_CLUSTERS);
        let clusters = self.clusters_of(range, most);
        let guard = self.clusters.lock(clusters.clone()).await;
        self.ensure_table(self.l1_index(clusters.start)).await?;
        let words = self.words(clusters.start).await?.ok_or(Errno::EIO)?;
        let end = self.space.end();
        let entry = |cluster| {
            let index = self.index_in_slice(cluster);
            self.entries.decode(words[index], end)
        };
        let starts_at = clusters.start << self.shape().cluster_bits;
        let cut = |count: u64| {
            let room = starts_at + count * self.cluster_size() - range.offset;
            ByteRange::new(range.offset, range.length.min(room))
        };
        let first = entry(clusters.start);
        if let Entry::Bad(errno) = first {
            return Err(errno);
        }
        if let Entry::Data(offset) = first {
            return Ok(WritePlan {
                range: cut(1),
                host_offset: offset + (range.offset - starts_at),
                head: Fill::Nothing,
                tail: Fill::Nothing,
                token: Token {
                    _clusters: guard,
                    change: None,
                },
            });
        }
        let lacks_place =
            |cluster: &u64| !matches!(entry(*cluster), Entry::Data(_) | Entry::Bad(_));
        let count = clusters.clone().take_while(lacks_place).count() as u64;
        let allocation = Allocation {
            first: clusters.start,
            count,
            ends: [first, entry(clusters.start + count - 1)],
            has_encoded: (0..count)
                .any(|number| matches!(entry(clusters.start + number), Entry::Encoded(_))),
        };
        let place = self.take(count * self.cluster_size()).await?;
        Ok(self.fit(cut(count), (allocation, place), guard))
    }

    /// Takes clusters of the file.
    async fn take(&self, length: u64) -> Result<Place, Errno> {
        self.file().node().event(Event::ClusterAlloc).await;
        let wanted = (length, self.cluster_size());
        let prepare = || self.entries.before_growth(self.file());
        self.space.take(self.file(), wanted, prepare).await
    }

    /// Fits a write to its place: what is filled around it.
    fn fit<'a>(
        &self,
        range: ByteRange,
        (allocation, place): (Allocation, Place),
        guard: RangeGuard<'a>,
    ) -> WritePlan<Token<'a>> {
        let bits = self.shape().cluster_bits;
        let Allocation {
            first,
            count,
            ends,
            has_encoded,
        } = allocation;
        let start = first << bits;
        let last = (first + count - 1) << bits;
        let backed = self.backing().map_or(0, |backing| backing.node().length());
        let fill = |(entry, cluster): (Entry, u64), length: u64| match entry {
            _ if length == 0 => Fill::Nothing,
            Entry::Unallocated if backed > cluster => Fill::Copy(length),
            Entry::Encoded(_) => Fill::Copy(length),
            _ if place.is_fresh && self.entries.zeroes_are_plain() => Fill::Nothing,
            _ => Fill::Zeroes(length),
        };
        let head = range.offset - start;
        let tail = start + place.length - (range.offset + range.length);
        WritePlan {
            range,
            host_offset: place.offset + head,
            head: fill((ends[0], start), head),
            tail: fill((ends[1], last), tail),
            token: Token {
                _clusters: guard,
                change: Some(Change {
                    first,
                    count,
                    place,
                    settles: self.backing().is_some()
                        || !place.is_fresh
                        || !self.entries.zeroes_are_plain()
                        || has_encoded,
                }),
            },
        }
    }

    /// See [`block::Format::commit`].
    pub(crate) async fn commit(&self, plan: WritePlan<Token<'_>>) -> Result<(), Errno> {
        let Some(change) = plan.token.change else {
            return Ok(());
        };
        if change.settles {
            let settled = self.settle().await;
            if settled.is_err() {
                self.space.give_back(change.place);
                return settled;
            }
        }
        let clusters = 0..change.count;
        let words = clusters.map(|number| change.place.offset + number * self.cluster_size());
        // When this fails the file may refer to the place all the same: nothing else gets it.
        self.set_entries(change.first, &words.collect::<Vec<_>>())
            .await
    }

    /// See [`block::Format::abort`].
    pub(crate) fn abort(&self, plan: WritePlan<Token<'_>>) {
        if let Some(change) = plan.token.change {
            self.space.give_back(change.place);
        }
    }

    /// Stores bytes that only the format can decode as the content of a cluster; `entry` makes its entry
    /// of where they are.
    pub(crate) async fn store_encoded(
        &self,
        (cluster, bytes): (u64, EncodedBytes),
        entry: impl Fn(u64) -> Option<u64>,
    ) -> Result<(), Errno> {
        let _guard = self.clusters.lock(cluster..cluster + 1).await;
        self.ensure_table(self.l1_index(cluster)).await?;
        let words = self.words(cluster).await?.ok_or(Errno::EIO)?;
        let old = words[self.index_in_slice(cluster)];
        let old = self.entries.decode(old, self.space.end());
        let prepare = || self.entries.before_growth(self.file());
        let wanted = (bytes.length as u64, 1);
        let place = self.space.take(self.file(), wanted, prepare).await?;
        let stored = self.store_at(place, bytes, old).await;
        let (Ok(()), Some(word)) = (stored, entry(place.offset)) else {
            self.space.give_back(place);
            return stored.and(Err(Errno::EFBIG));
        };
        self.set_entries(cluster, &[word]).await?;
        self.changes.fetch_add(1, AcqRel);
        Ok(())
    }

    async fn store_at(&self, place: Place, bytes: EncodedBytes, old: Entry) -> Result<(), Errno> {
        let node = self.file().node();
        node.event(Event::WriteCompressed).await;
        let packed = bytes.memory.into_buffer().slice(0..bytes.length);
        node.write(place.offset, packed, WriteFlags::default())
            .await?;
        let shows_zeroes = old == Entry::Unallocated && self.backing().is_none();
        match place.is_fresh && shows_zeroes {
            true => Ok(()),
            false => self.settle().await,
        }
    }

    /// Makes what was written before the call durable. Those who come while a flush is under way share
    /// the next one.
    async fn settle(&self) -> Result<(), Errno> {
        let ticket = self.settling.fetch_add(1, AcqRel) + 1;
        let mut settled = self.settled.lock().await;
        if *settled >= ticket {
            return Ok(());
        }
        let tickets = self.settling.load(Acquire);
        self.file().node().flush().await?;
        *settled = tickets;
        Ok(())
    }

    /// Sees to it that an L1 entry has an L2 table.
    async fn ensure_table(&self, l1_index: u64) -> Result<(), Errno> {
        if self.table(l1_index)?.is_some() {
            return Ok(());
        }
        let _adding = self.adding.lock().await;
        if self.table(l1_index)?.is_some() {
            return Ok(());
        }
        let place = self.take((E::WIDTH as u64) << self.shape().l2_bits).await?;
        if !place.is_fresh {
            let node = self.file().node();
            node.event(Event::L2AllocWrite).await;
            let range = ByteRange::new(place.offset, place.length);
            let zeroed = node.write_zeroes(range, ZeroFlags::default()).await;
            let zeroed = match zeroed {
                Ok(()) => self.settle().await,
                failed => failed,
            };
            if zeroed.is_err() {
                self.space.give_back(place);
                return zeroed;
            }
        }
        self.file().node().event(Event::L1Update).await;
        let mut bytes = vec![0; E::WIDTH];
        E::store(place.offset, &mut bytes);
        let offset = self.shape().l1_offset + l1_index * E::WIDTH as u64;
        // When this fails the file may refer to the table all the same: nothing else gets its place.
        write_bytes(self.file(), offset, &bytes).await?;
        self.l1.set(l1_index, place.offset);
        Ok(())
    }

    /// See [`block::Format::write_zeroes`]. Data keeps its place, and is zeroed there.
    pub(crate) async fn zero(
        &self,
        range: ByteRange,
        (disk, flags): (u64, ZeroFlags),
    ) -> Result<u64, Errno> {
        let extent = self.resolve(range).await?;
        match extent.mapping {
            Mapping::Zero(_) => return Ok(extent.length),
            Mapping::Data(offset) => {
                let stored = ByteRange::new(offset, extent.length);
                let node = self.file().node();
                return node
                    .write_zeroes(stored, flags)
                    .await
                    .map(|()| extent.length);
            }
            Mapping::Unallocated | Mapping::Encoded(_) => {}
        }
        let end = range.offset + range.length;
        let is_whole = range.offset.is_multiple_of(self.cluster_size())
            && (end.is_multiple_of(self.cluster_size()) || end == disk);
        let (Some(word), true) = (self.entries.zero(), is_whole) else {
            return Err(Errno::EOPNOTSUPP);
        };
        let clusters = self.clusters_of(range, u64::MAX >> 1);
        let _guard = self.clusters.lock(clusters.clone()).await;
        self.ensure_table(self.l1_index(clusters.start)).await?;
        let words = self.words(clusters.start).await?.ok_or(Errno::EIO)?;
        let file_end = self.space.end();
        let is_free = |cluster: &u64| {
            let entry = words[self.index_in_slice(*cluster)];
            self.entries.decode(entry, file_end) == Entry::Unallocated
        };
        let count = clusters.clone().take_while(is_free).count();
        if count == 0 {
            // Somebody was faster.
            return Err(Errno::EOPNOTSUPP);
        }
        self.set_entries(clusters.start, &vec![word; count]).await?;
        let zeroed = (clusters.start + count as u64) << self.shape().cluster_bits;
        Ok(zeroed.min(end) - range.offset)
    }
}
