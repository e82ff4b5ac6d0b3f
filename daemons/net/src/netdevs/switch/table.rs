//! Which station is behind which member, learnt from the source addresses of frames.
//!
//! ```text
//!   key: VLAN and address ──hash, seeded──> bucket of four entries, one cache line
//! ```
//!
//! Everything is bounded when the table is made: its memory, the entries of all and of one member, and the work per frame, four
//! entries looked at. What finds no room is not learnt, and its frames are flooded; no station can push another one's entry out.
//! Entries that nothing was heard of for the ageing time count as absent, and go when their place is wanted.

use std::hash::{BuildHasher, RandomState};

use crate::frame::MacAddress;

/// A member of the switch.
pub(super) type MemberId = u16;

/// Entries of a bucket.
const WAYS: usize = 4;
/// No entry; a real key has its top bit set.
const EMPTY: u64 = 0;

/// A VLAN and an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Key(u64);

impl Key {
    #[inline]
    pub(super) fn new(vlan: u16, MacAddress(mac): MacAddress) -> Key {
        let [a, b, c, d, e, f] = mac;
        let address = u64::from_be_bytes([0, 0, a, b, c, d, e, f]);
        Key(1 << 63 | u64::from(vlan) << 48 | address)
    }

    pub(super) fn vlan(self) -> u16 {
        (self.0 >> 48) as u16 & 0xfff
    }

    pub(super) fn mac(self) -> MacAddress {
        let [_, _, a, b, c, d, e, f] = self.0.to_be_bytes();
        MacAddress([a, b, c, d, e, f])
    }
}

/// What is known of a station.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Place {
    /// When it was heard of last, in seconds.
    pub(super) seen: u32,
    pub(super) member: MemberId,
    /// Configured, not learnt: it neither ages nor moves.
    pub(super) is_fixed: bool,
}

#[derive(Clone, Copy, Debug, Default)]
#[repr(align(64))]
struct Bucket {
    keys: [u64; WAYS],
    places: [Place; WAYS],
}

/// What came of a source address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Learned {
    /// It was known there.
    Known,
    /// It is known now.
    New,
    /// It was known behind another member and is behind this one now.
    Moved,
    /// It is configured for another member, or the caller did not let it move.
    Stays,
    /// There was no room.
    Full,
}

/// How large a table may become.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// Entries of all members.
    pub(super) entries: usize,
    /// Seconds after which an entry counts as absent.
    pub(super) ageing: u32,
}

/// The table.
#[derive(Debug)]
pub(super) struct Table {
    buckets: Box<[Bucket]>,
    seed: u64,
    bounds: Bounds,
    len: usize,
    /// Entries of each member.
    counts: Vec<u32>,
    /// When entries that are too old were looked for last, in seconds.
    swept: u32,
}

impl Table {
    pub(super) fn new(bounds: Bounds) -> Table {
        // Half of it stays free, so that a bucket is rarely full before the table is.
        let buckets = (bounds.entries * 2).div_ceil(WAYS).next_power_of_two();
        Table {
            buckets: vec![Bucket::default(); buckets].into_boxed_slice(),
            seed: RandomState::new().hash_one(0) | 1,
            bounds,
            len: 0,
            counts: Vec::new(),
            swept: 0,
        }
    }

    /// Entries, those that are too old included.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    #[inline]
    fn bucket(&self, Key(key): Key) -> usize {
        let product = u128::from(key) * u128::from(self.seed);
        let mixed = (product >> 64) as u64 ^ product as u64;
        mixed as usize & (self.buckets.len() - 1)
    }

    #[inline]
    fn is_alive(&self, place: &Place, now: u32) -> bool {
        place.is_fixed || now.saturating_sub(place.seen) <= self.bounds.ageing
    }

    /// Whom a station is behind.
    #[inline]
    pub(super) fn find(&self, key: Key, now: u32) -> Option<MemberId> {
        let bucket = &self.buckets[self.bucket(key)];
        let way = bucket.keys.iter().position(|other| *other == key.0)?;
        let place = &bucket.places[way];
        self.is_alive(place, now).then_some(place.member)
    }

    /// Notes that a frame of the station came in at `member`, which may have `limit` entries. `may_move` is asked when it was
    /// behind another one.
    #[inline]
    pub(super) fn learn(
        &mut self,
        key: Key,
        place: Place,
        limit: u32,
        may_move: impl FnOnce() -> bool,
    ) -> Learned {
        let at = self.bucket(key);
        let bucket = &mut self.buckets[at];
        let Some(way) = bucket.keys.iter().position(|other| *other == key.0) else {
            return self.insert(key, place, limit);
        };
        let known = &mut bucket.places[way];
        if known.member == place.member {
            known.seen = place.seen;
            return Learned::Known;
        }
        let from = *known;
        if from.is_fixed || (self.is_alive(&from, place.seen) && !may_move()) {
            return Learned::Stays;
        }
        if self.count(place.member) >= limit {
            return Learned::Full;
        }
        self.buckets[at].places[way] = place;
        self.uncount(from.member);
        *self.count_mut(place.member) += 1;
        Learned::Moved
    }

    #[cold]
    fn insert(&mut self, key: Key, place: Place, limit: u32) -> Learned {
        let is_full =
            |table: &Table| table.len >= table.bounds.entries || table.count(place.member) >= limit;
        // At most once a second, so that a storm of addresses does not make work.
        if is_full(self) && self.swept != place.seen {
            self.swept = place.seen;
            self.sweep(place.seen);
        }
        if is_full(self) && !place.is_fixed {
            return Learned::Full;
        }
        let at = self.bucket(key);
        let Some(way) = self.free_way(at, place) else {
            return Learned::Full;
        };
        if self.buckets[at].keys[way] == EMPTY {
            self.len += 1;
        } else {
            self.uncount(self.buckets[at].places[way].member);
        }
        self.buckets[at].keys[way] = key.0;
        self.buckets[at].places[way] = place;
        *self.count_mut(place.member) += 1;
        Learned::New
    }

    /// An entry of the bucket that is empty or too old; a configured place takes a learnt one if it must.
    fn free_way(&self, at: usize, place: Place) -> Option<usize> {
        let Bucket { keys, places } = &self.buckets[at];
        let is_free =
            |way: &usize| keys[*way] == EMPTY || !self.is_alive(&places[*way], place.seen);
        (0..WAYS)
            .find(is_free)
            .or_else(|| (0..WAYS).find(|way| place.is_fixed && !places[*way].is_fixed))
    }

    /// Makes a station's place behind `place.member` fixed. False when it is fixed behind another one, or its bucket is full of
    /// fixed ones.
    pub(super) fn fix(&mut self, key: Key, place: Place) -> bool {
        let place = Place {
            is_fixed: true,
            ..place
        };
        let at = self.bucket(key);
        let Some(way) = self.buckets[at]
            .keys
            .iter()
            .position(|other| *other == key.0)
        else {
            return self.insert(key, place, u32::MAX) == Learned::New;
        };
        let from = self.buckets[at].places[way];
        if from.is_fixed && from.member != place.member {
            return false;
        }
        self.buckets[at].places[way] = place;
        self.uncount(from.member);
        *self.count_mut(place.member) += 1;
        true
    }

    /// Makes a fixed place behind `member` one that was learnt just now.
    pub(super) fn unfix(&mut self, key: Key, member: MemberId, now: u32) {
        let at = self.bucket(key);
        let bucket = &mut self.buckets[at];
        for (other, place) in bucket.keys.iter().zip(&mut bucket.places) {
            if *other == key.0 && place.member == member {
                (place.is_fixed, place.seen) = (false, now);
            }
        }
    }

    /// Forgets all stations behind `member`.
    pub(super) fn forget(&mut self, member: MemberId) {
        self.remove(|place| place.member == member);
    }

    fn sweep(&mut self, now: u32) {
        let ageing = self.bounds.ageing;
        self.remove(|place| !place.is_fixed && now.saturating_sub(place.seen) > ageing);
    }

    fn remove(&mut self, is_gone: impl Fn(&Place) -> bool) {
        for bucket in &mut self.buckets {
            for (key, place) in bucket.keys.iter_mut().zip(&bucket.places) {
                if *key != EMPTY && is_gone(place) {
                    *key = EMPTY;
                    self.len -= 1;
                    if let Some(count) = self.counts.get_mut(usize::from(place.member)) {
                        *count -= 1;
                    }
                }
            }
        }
    }

    /// All entries that are not too old.
    pub(super) fn entries(&self, now: u32) -> impl Iterator<Item = (Key, Place)> {
        let all = self
            .buckets
            .iter()
            .flat_map(|bucket| bucket.keys.iter().zip(&bucket.places));
        all.filter(move |(key, place)| **key != EMPTY && self.is_alive(place, now))
            .map(|(key, place)| (Key(*key), *place))
    }

    fn count(&self, member: MemberId) -> u32 {
        self.counts.get(usize::from(member)).copied().unwrap_or(0)
    }

    fn count_mut(&mut self, member: MemberId) -> &mut u32 {
        let at = usize::from(member);
        if self.counts.len() <= at {
            self.counts.resize(at + 1, 0);
        }
        &mut self.counts[at]
    }

    fn uncount(&mut self, member: MemberId) {
        *self.count_mut(member) -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};
    use std::collections::HashMap;

    fn key(vlan: u16, station: u32) -> Key {
        let [a, b, c, d] = station.to_be_bytes();
        Key::new(vlan, MacAddress([2, 0, a, b, c, d]))
    }

    fn place(member: MemberId, seen: u32) -> Place {
        Place {
            seen,
            member,
            is_fixed: false,
        }
    }

    fn table(entries: usize) -> Table {
        Table::new(Bounds {
            entries,
            ageing: 300,
        })
    }

    #[test]
    fn a_station_is_found_where_it_was_heard() {
        let mut table = table(64);
        let learn = |table: &mut Table, key, member, seen| {
            table.learn(key, place(member, seen), 64, || true)
        };
        assert_eq!(learn(&mut table, key(7, 1), 3, 10), Learned::New);
        assert_eq!(learn(&mut table, key(7, 1), 3, 11), Learned::Known);
        assert_eq!(table.find(key(7, 1), 11), Some(3));
        assert_eq!(table.find(key(8, 1), 11), None, "another VLAN");
        assert_eq!(learn(&mut table, key(7, 1), 4, 12), Learned::Moved);
        assert_eq!(table.find(key(7, 1), 12), Some(4));
        assert_eq!(
            table.learn(key(7, 1), place(5, 13), 64, || false),
            Learned::Stays
        );
        assert_eq!(table.find(key(7, 1), 13), Some(4));
        assert_eq!(
            (key(7, 1).vlan(), key(7, 1).mac()),
            (7, MacAddress([2, 0, 0, 0, 0, 1]))
        );
    }

    #[test]
    fn entries_age() {
        let mut table = table(64);
        table.learn(key(0, 1), place(1, 100), 64, || true);
        assert_eq!(table.find(key(0, 1), 400), Some(1));
        assert_eq!(table.find(key(0, 1), 401), None);
        assert_eq!(table.entries(401).count(), 0);
        // One that is too old moves without being asked.
        assert_eq!(
            table.learn(key(0, 1), place(2, 401), 64, || false),
            Learned::Moved
        );
        assert_eq!(table.find(key(0, 1), 500), Some(2));
    }

    #[test]
    fn a_storm_of_addresses_takes_no_ones_place() {
        let mut table = table(100);
        for station in 0..10 {
            table.learn(key(0, station), place(1, 0), 100, || true);
        }
        for station in 1000..100_000 {
            table.learn(key(0, station), place(2, 0), 50, || true);
        }
        assert!(table.len() <= 60 && table.count(2) <= 50);
        for station in 0..10 {
            assert_eq!(table.find(key(0, station), 0), Some(1));
        }
        for station in 1000..100_000 {
            table.learn(key(0, station), place(3, 0), 1000, || true);
        }
        assert!(table.len() <= 100);
        // What has aged makes room.
        assert_eq!(
            table.learn(key(0, 5), place(9, 400), 50, || true),
            Learned::Moved
        );
        for station in 200_000..200_020 {
            assert_eq!(
                table.learn(key(0, station), place(9, 400), 50, || true),
                Learned::New
            );
        }
        assert_eq!(table.len(), 21);
    }

    #[test]
    fn a_fixed_place_neither_ages_nor_moves() {
        let mut table = table(16);
        table.learn(key(0, 1), place(2, 0), 16, || true);
        assert!(table.fix(key(0, 1), place(1, 0)));
        assert!(table.fix(key(0, 1), place(1, 0)));
        assert!(!table.fix(key(0, 1), place(3, 0)));
        assert_eq!(
            table.learn(key(0, 1), place(2, 1), 16, || true),
            Learned::Stays
        );
        assert_eq!(table.find(key(0, 1), 100_000), Some(1));
        table.unfix(key(0, 1), 1, 100_000);
        assert_eq!(table.find(key(0, 1), 100_300), Some(1));
        assert_eq!(table.find(key(0, 1), 100_301), None);
        // A full table has room for it.
        for station in 10..200 {
            table.learn(key(0, station), place(5, 100_301), 200, || true);
        }
        assert!(table.fix(key(0, 9), place(6, 100_301)));
        assert_eq!(table.find(key(0, 9), 100_301), Some(6));
        table.forget(5);
        assert!(table.len() <= 2 && table.count(5) == 0);
    }

    #[test]
    fn counts_stay_true_under_random_work() {
        let seed: u64 = SmallRng::from_os_rng().random();
        println!("seed {seed}");
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut table = Table::new(Bounds {
            entries: 64,
            ageing: 5,
        });
        let mut now = 0;
        for _ in 0..10_000 {
            let (station, member) = (key(0, rng.random_range(0..200)), rng.random_range(0..6));
            match rng.random_range(0..100) {
                0 => table.forget(member),
                1 => drop(table.fix(station, place(member, now))),
                2 => table.unfix(station, member, now),
                3..6 => now += 1,
                _ => drop(table.learn(station, place(member, now), 20, || true)),
            }
            let mut counts: HashMap<MemberId, u32> = HashMap::new();
            let keys = table
                .buckets
                .iter()
                .flat_map(|b| b.keys.iter().zip(&b.places));
            for (_, place) in keys.filter(|(key, _)| **key != EMPTY) {
                *counts.entry(place.member).or_default() += 1;
            }
            for member in 0..6 {
                assert_eq!(
                    table.count(member),
                    counts.get(&member).copied().unwrap_or(0)
                );
            }
            assert_eq!(table.len(), counts.values().sum::<u32>() as usize);
        }
    }
}
