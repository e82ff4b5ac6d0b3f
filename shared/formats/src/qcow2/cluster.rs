//! What an L2 entry says of its guest cluster, subcluster by subcluster (QEMU
//! docs/interop/qcow2.txt, "Extended L2 Entries").
//!
//! ```text
//!   extended entry   word 0  the descriptor, as in a standard entry but without the zero flag
//!                    word 1  63..32 subcluster reads as zeroes    31..0 subcluster is allocated
//! ```
//!
//! A standard entry is the same with a single subcluster, whose bits follow from the descriptor. So
//! writes, zeroes and discards are decided once, on [`Subclusters`], for both kinds.
//!
//! Both words of an extended entry change as one. Writers hold the state lock and the lock of the
//! guest cluster; whoever holds either sees no change half-way. Readers without locks check a sequence
//! number ([`PairSequence`]). On disk an entry never straddles a sector. Knows no I/O.

use super::Qcow2;
use super::State;
use super::cache::Pinned;
use super::tables::{
    COMPRESSED, COPIED, Geometry, GuestCluster, HostOffset, L2Entry, L2Kind, OFFSET_MASK, ZERO,
};
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicU64, fence};

/// An L2 entry as it is stored, in host byte order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct EntryWords {
    pub(super) descriptor: L2Entry,
    /// Only of an extended entry, otherwise 0.
    pub(super) bitmap: u64,
}

impl EntryWords {
    /// The offset of the host cluster, when it lies across two.
    pub(super) const fn unaligned_host(&self, geometry: &Geometry) -> Option<u64> {
        let host = self.descriptor.0 & OFFSET_MASK;
        if self.descriptor.0 & COMPRESSED != 0 || geometry.is_aligned(host) {
            return None;
        }
        Some(host)
    }
}

/// What an entry is looked at for; messages differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum EntryUse {
    Read,
    Change,
}

/// What an entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cluster {
    /// Compressed as a whole; the raw descriptor.
    Compressed(u64),
    /// Everything else.
    Standard(Subclusters),
}

/// The subclusters of a cluster that is not compressed. Bit 0 is the first; a standard entry has
/// only that one. No bit is set in both masks, and none in `allocated` without a host cluster.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Subclusters {
    /// The host cluster.
    pub(super) host: Option<HostOffset>,
    /// Nothing else refers to the host cluster.
    pub(super) copied: bool,
    /// Those whose data is in the host cluster.
    pub(super) allocated: u32,
    /// Those that read as zeroes. Those in neither mask read from the backing.
    pub(super) zero: u32,
}

/// What one subcluster reads as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SubclusterKind {
    Unallocated,
    Zero,
    Data,
}

/// The mask of `range` of subclusters, at most 32.
pub(super) const fn mask(range: std::ops::Range<u32>) -> u32 {
    below(range.end) & !below(range.start)
}

const fn below(end: u32) -> u32 {
    if end >= 32 { u32::MAX } else { (1 << end) - 1 }
}

impl Geometry {
    /// Every subcluster of a cluster.
    pub(super) const fn all_subclusters(&self) -> u32 {
        mask(0..self.subclusters())
    }

    /// The subclusters of `cluster` that the guest bytes `range` touch.
    pub(super) const fn touched(&self, cluster: GuestCluster, range: &std::ops::Range<u64>) -> u32 {
        let start = self.guest_offset(cluster);
        let from = range.start.saturating_sub(start) >> self.subcluster_bits();
        let to = range
            .end
            .saturating_sub(start)
            .div_ceil(self.subcluster_size());
        let most = self.subclusters() as u64;
        let (from, to) = (
            if from < most { from } else { most },
            if to < most { to } else { most },
        );
        mask(from as u32..to as u32)
    }
}

impl Cluster {
    /// Decodes the entry of `cluster`; `None` when the specification does not allow it.
    pub(super) fn decode(
        words: EntryWords,
        cluster: GuestCluster,
        geometry: &Geometry,
    ) -> Option<Cluster> {
        let mut descriptor = words.descriptor;
        if geometry.extended_l2 && descriptor.0 & COMPRESSED == 0 {
            // Reserved there.
            descriptor.0 &= !ZERO;
        }
        let (host, zero) = match descriptor.kind(geometry) {
            L2Kind::Invalid => return None,
            L2Kind::Compressed(descriptor) => return Some(Cluster::Compressed(descriptor)),
            L2Kind::Unallocated => (None, 0),
            L2Kind::ZeroPlain => (None, 1),
            L2Kind::ZeroAllocated(host) => (Some(host), 1),
            L2Kind::Data(host) => (Some(host), 0),
        };
        let moved = |host: HostOffset| host.0 != geometry.guest_offset(cluster);
        if geometry.external_data && host.is_some_and(moved) {
            return None;
        }
        let (allocated, zero) = if geometry.extended_l2 {
            (words.bitmap as u32, (words.bitmap >> 32) as u32)
        } else {
            (u32::from(host.is_some() && zero == 0), zero)
        };
        let contradicts = allocated & zero != 0 || (allocated != 0 && host.is_none());
        (!contradicts).then_some(Cluster::Standard(Subclusters {
            host,
            copied: host.is_some() && descriptor.is_copied(),
            allocated,
            zero,
        }))
    }
}

impl Subclusters {
    /// The entry that says so.
    pub(super) fn encode(&self, geometry: &Geometry) -> EntryWords {
        let copied = if self.copied { COPIED } else { 0 };
        let descriptor = self.host.map_or(0, |host| host.0 | copied);
        if geometry.extended_l2 {
            return EntryWords {
                descriptor: L2Entry(descriptor),
                bitmap: u64::from(self.zero) << 32 | u64::from(self.allocated),
            };
        }
        let flag = if self.zero & 1 != 0 { ZERO } else { 0 };
        EntryWords {
            descriptor: L2Entry(descriptor | flag),
            bitmap: 0,
        }
    }

    pub(super) const fn kind(&self, subcluster: u32) -> SubclusterKind {
        match (
            self.allocated >> subcluster & 1,
            self.zero >> subcluster & 1,
        ) {
            (1, _) => SubclusterKind::Data,
            (_, 1) => SubclusterKind::Zero,
            _ => SubclusterKind::Unallocated,
        }
    }

    /// How many subclusters from `first` on, below `end`, are of its kind.
    pub(super) const fn run(&self, first: u32, end: u32) -> u32 {
        let same = match self.kind(first) {
            SubclusterKind::Data => self.allocated,
            SubclusterKind::Zero => self.zero,
            SubclusterKind::Unallocated => !(self.allocated | self.zero),
        };
        let ones = (same >> first).trailing_ones();
        if ones < end - first {
            ones
        } else {
            end - first
        }
    }
}

/// Sequence numbers that tell readers without locks that an extended entry changed meanwhile: odd
/// during a change. Slices share them by number.
pub(super) struct PairSequence([AtomicU64; SEQUENCES]);

const SEQUENCES: usize = 64;

/// A reader's begin.
pub(super) struct PairRead<'s> {
    sequence: &'s AtomicU64,
    seen: u64,
}

impl PairSequence {
    pub(super) fn new() -> Self {
        Self([const { AtomicU64::new(0) }; SEQUENCES])
    }

    fn of(&self, slice: u64) -> &AtomicU64 {
        &self.0[slice as usize % SEQUENCES]
    }

    /// Begins to read entries of a slice; `None` while one changes.
    pub(super) fn read(&self, slice: u64) -> Option<PairRead<'_>> {
        let sequence = self.of(slice);
        let seen = sequence.load(Acquire);
        (seen & 1 == 0).then_some(PairRead { sequence, seen })
    }

    /// Changes an entry of a slice by `change`; writers exclude each other.
    fn write(&self, slice: u64, change: impl FnOnce()) {
        let sequence = self.of(slice);
        let seen = sequence.load(Relaxed);
        sequence.store(seen.wrapping_add(1), Relaxed);
        fence(Release);
        change();
        sequence.store(seen.wrapping_add(2), Release);
    }
}

impl PairRead<'_> {
    /// Whether no entry of the slice has changed since.
    pub(super) fn is_valid(&self) -> bool {
        fence(Acquire);
        self.sequence.load(Relaxed) == self.seen
    }
}

impl Qcow2 {
    /// The entry of `cluster`, which the caller has locked, in the slice that maps it.
    pub(super) fn entry_words(&self, slice: &Pinned<'_>, cluster: GuestCluster) -> EntryWords {
        let geometry = &self.geometry;
        let word = geometry.l2_word(geometry.entry_position(cluster).entry);
        EntryWords {
            descriptor: L2Entry(slice.word(word)),
            bitmap: if geometry.extended_l2 {
                slice.word(word + 1)
            } else {
                0
            },
        }
    }

    /// Changes the entry of `cluster`, which the caller has locked, in the slice that maps it.
    pub(super) fn set_entry(
        &self,
        _state: &mut State,
        slice: &Pinned<'_>,
        (cluster, words): (GuestCluster, EntryWords),
    ) {
        let geometry = &self.geometry;
        let position = geometry.entry_position(cluster);
        let word = geometry.l2_word(position.entry);
        if geometry.extended_l2 {
            self.pairs.write(position.slice, || {
                slice.set_word(word, words.descriptor.0);
                slice.set_word(word + 1, words.bitmap);
            });
        } else {
            slice.set_word(word, words.descriptor.0);
        }
        self.take_lookups_back();
    }

    /// What the entry of `cluster` says.
    pub(super) async fn decode_entry(
        &self,
        words: EntryWords,
        cluster: GuestCluster,
    ) -> Result<Cluster, executor::Errno> {
        match Cluster::decode(words, cluster, &self.geometry) {
            Some(decoded) => Ok(decoded),
            None => Err(self.invalid_entry(cluster, words, EntryUse::Change).await),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GEOMETRY: Geometry = Geometry {
        cluster_bits: 16,
        refcount_order: 4,
        zero_clusters: true,
        extended_l2: true,
        external_data: false,
        l2_slice_bits: 12,
        refcount_slice_bits: 12,
    };
    const CLUSTER: GuestCluster = GuestCluster(3);

    fn decode(descriptor: u64, bitmap: u64) -> Option<Cluster> {
        let descriptor = L2Entry(descriptor);
        Cluster::decode(EntryWords { descriptor, bitmap }, CLUSTER, &GEOMETRY)
    }

    #[test]
    fn bitmaps_that_contradict_themselves_are_refused() {
        let host = 0x5_0000 | COPIED;
        assert!(decode(host, 1 << 32 | 1).is_none(), "zero and allocated");
        assert!(decode(0, 1).is_none(), "allocated nowhere");
        assert!(decode(host, 1 << 32 | 2).is_some());
        assert!(decode(0, u64::from(u32::MAX) << 32).is_some());
        assert!(decode(0x5_0200, 0).is_none(), "unaligned");
        let compressed = decode(COMPRESSED | 0x5_0007, 0);
        assert_eq!(compressed, Some(Cluster::Compressed(0x5_0007)));
    }

    #[test]
    fn entries_survive_decoding_and_encoding() {
        for (descriptor, bitmap) in [
            (0, 0),
            (0x5_0000 | COPIED, 0x0f0f_0000_0000_00ff),
            (0x5_0000, 0),
            (0, 0xffff_ffff_0000_0000),
        ] {
            let Some(Cluster::Standard(subclusters)) = decode(descriptor, bitmap) else {
                panic!("{descriptor:#x} {bitmap:#x}");
            };
            let words = subclusters.encode(&GEOMETRY);
            assert_eq!((words.descriptor.0, words.bitmap), (descriptor, bitmap));
        }
    }

    #[test]
    fn the_subclusters_of_a_range_are_those_it_touches() {
        let start = GEOMETRY.guest_offset(CLUSTER);
        let touched = |range: std::ops::Range<u64>| {
            GEOMETRY.touched(CLUSTER, &(start + range.start..start + range.end))
        };
        assert_eq!(touched(0..1), 1);
        assert_eq!(touched(2047..2049), 0b11);
        assert_eq!(touched(0..65536), u32::MAX);
        assert_eq!(touched(65535..70000), 1 << 31);
        assert_eq!(GEOMETRY.touched(CLUSTER, &(0..start + 1)), 1);
    }

    #[test]
    fn runs_end_where_the_kind_changes() {
        let subclusters = Subclusters {
            host: Some(HostOffset(0x5_0000)),
            copied: true,
            allocated: 0b0000_1100,
            zero: 0b0011_0000,
        };
        assert_eq!(subclusters.run(0, 32), 2);
        assert_eq!(subclusters.run(2, 32), 2);
        assert_eq!(subclusters.run(5, 32), 1);
        assert_eq!(subclusters.run(6, 32), 26);
        assert_eq!(subclusters.run(6, 8), 2);
    }

    #[test]
    fn a_reader_notices_a_change_under_way_and_a_change_since() {
        let pairs = PairSequence::new();
        let before = pairs.read(7).unwrap();
        assert!(before.is_valid());
        pairs.write(7, || assert!(pairs.read(7).is_none()));
        assert!(!before.is_valid());
        assert!(pairs.read(7).unwrap().is_valid());
    }
}
