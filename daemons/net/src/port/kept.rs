//! What the driver said on the control queue, kept where a successor of a killed daemon finds it.
//!
//! ```text
//!   command ─> executed ─> Kept::store ─> acknowledged          successor: control queue starts ─> Kept::load ─> same driver? ─> obeyed
//!
//!   file:  │ slot 0 │ slot 1 │        slot:  sequence │ checksum │ record of RECORD words
//! ```
//!
//! Each store goes to the slot that holds the older record, and the sequence number is stored last. A killed process loses none of its stores and
//! none of their order, so whatever moment it dies at, one slot holds the record before its last command or the one after it.
//!
//! Promises: what a torn or foreign file says is not obeyed; a record is obeyed for the driver that it is about alone: the same ring in the
//! same file of guest memory, with the same features, at the position where the record was made.

use std::cell::Cell;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use executor::shared_memory::SharedMemory;

use super::filter::{Filter, Modes, TABLE_MAX, Table, VLAN_WORDS, Vlans};
use super::shared::Used;
use crate::frame::MacAddress;

/// Begins a record, and changes with what a record is.
const MAGIC: u64 = u64::from_le_bytes(*b"netctl01");
/// Words of a table of addresses: their number, and each one's.
const TABLE_WORDS: usize = 1 + TABLE_MAX;
/// A table that holds everything.
const EVERYTHING: u64 = u64::MAX;
/// Words of a record: magic, driver, what it said, filter.
const RECORD: usize = 1 + 8 + 2 + 2 + 2 * TABLE_WORDS + 1 + VLAN_WORDS;
/// Words of a slot.
const SLOT: usize = 2 + RECORD;

/// The driver that speaks on a control queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Driver {
    /// Features that it acknowledged.
    pub(super) features: u64,
    /// Where its control queue is in the front-end's address space, and the ring's size.
    pub(super) ring: [u64; 4],
    /// Device and inode of the file that the queue lies in.
    pub(super) memory: [u64; 2],
    /// Commands that were returned to it, as a split ring's used index counts them; `None` where the ring does not tell.
    pub(super) returned: Option<u16>,
}

impl Driver {
    /// Whether a record about this one holds for the driver that is there now: it may have been made a moment before its command
    /// was returned.
    fn is(&self, now: &Driver) -> bool {
        let behind = match (self.returned, now.returned) {
            (Some(kept), Some(now)) => kept.wrapping_sub(now),
            (None, None) => 0,
            _ => return false,
        };
        let returned = now.returned;
        Driver { returned, ..*self } == *now && behind <= 1
    }
}

/// What a driver said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Said {
    /// The pairs that it uses.
    pub(super) used: Used,
    /// What it does by itself for what it receives, as feature bits.
    pub(super) guest_offloads: u64,
    /// What it wants to receive.
    pub(super) filter: Filter,
}

/// A file with what the driver said. Lives on the control thread.
pub(super) struct Kept {
    memory: SharedMemory,
    /// Of the last record.
    sequence: Cell<u64>,
}

impl Kept {
    /// Opens the file at `path`, made when absent.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn open(path: &Path) -> io::Result<Kept> {
        SharedMemory::open(path, 2 * SLOT, 2 * SLOT).map(Kept::in_memory)
    }

    fn in_memory(memory: SharedMemory) -> Kept {
        let kept = Kept {
            memory,
            sequence: Cell::new(0),
        };
        let newest = kept.newest().map_or(0, |(sequence, _)| sequence);
        kept.sequence.set(newest);
        kept
    }

    fn slot(&self, sequence: u64) -> &[AtomicU64] {
        let start = (sequence % 2) as usize * SLOT;
        &self.memory[start..start + SLOT]
    }

    /// The last whole record and its number.
    fn newest(&self) -> Option<(u64, (Driver, Said))> {
        let records = [0, 1].map(|number| {
            let words: Vec<u64> = self
                .slot(number)
                .iter()
                .map(|word| word.load(Ordering::Acquire))
                .collect();
            let (sequence, record) = (words[0], &words[2..]);
            let whole =
                sequence != 0 && sequence % 2 == number && words[1] == checksum(sequence, record);
            whole
                .then(|| decode(record))
                .flatten()
                .map(|record| (sequence, record))
        });
        records
            .into_iter()
            .flatten()
            .max_by_key(|(sequence, _)| *sequence)
    }

    /// What the driver of these features said last, whichever it is.
    pub(super) fn of_features(&self, features: u64) -> Option<Said> {
        let (_, (driver, said)) = self.newest()?;
        (driver.features == features).then_some(said)
    }

    /// What the driver that is there `now` said, where that is known.
    pub(super) fn load(&self, now: &Driver) -> Option<Said> {
        let (_, (driver, said)) = self.newest()?;
        driver.is(now).then_some(said)
    }

    /// Keeps what the driver has said by now.
    pub(super) fn store(&self, driver: &Driver, said: &Said) {
        let sequence = self.sequence.get() + 1;
        let record = encode(driver, said);
        let [number, sum, place @ ..] = self.slot(sequence) else {
            unreachable!("a slot is longer than its head");
        };
        put(number, 0);
        for (place, word) in place.iter().zip(&record) {
            put(place, *word);
        }
        put(sum, checksum(sequence, &record));
        put(number, sequence);
        self.sequence.set(sequence);
    }

    /// Another driver is there, which has said nothing.
    pub(super) fn forget(&self) {
        for slot in [0, 1] {
            put(&self.slot(slot)[0], 0);
        }
    }
}

/// Stores a word after everything that was stored before.
fn put(place: &AtomicU64, word: u64) {
    #[cfg(test)]
    tests::step();
    place.store(word, Ordering::Release);
}

/// FNV-1a over words.
fn checksum(sequence: u64, record: &[u64]) -> u64 {
    let words = std::iter::once(&sequence).chain(record);
    words.fold(0xcbf2_9ce4_8422_2325, |sum, word| {
        (sum ^ word).wrapping_mul(0x0100_0000_01b3).rotate_left(23)
    })
}

/// Where a record has no position.
const NOWHERE: u64 = u64::MAX;

fn encode(driver: &Driver, said: &Said) -> Vec<u64> {
    let mut words = vec![MAGIC, driver.features];
    words.extend(driver.ring);
    words.extend(driver.memory);
    words.push(driver.returned.map_or(NOWHERE, u64::from));
    words.extend([u64::from(said.used.encode()), said.guest_offloads]);
    let filter = &said.filter;
    words.extend([u64::from(filter.modes.bits()), filter.mac.to_word()]);
    encode_table(&filter.unicast, &mut words);
    encode_table(&filter.multicast, &mut words);
    words.push(u64::from(filter.vlans.is_some()));
    match &filter.vlans {
        Some(vlans) => words.extend(vlans.words()),
        None => words.extend([0; VLAN_WORDS]),
    }
    debug_assert_eq!(words.len(), RECORD);
    words
}

fn encode_table(table: &Table, words: &mut Vec<u64>) {
    let end = words.len() + TABLE_WORDS;
    match table {
        Table::Everything => words.push(EVERYTHING),
        Table::Listed(addresses) => {
            words.push(addresses.len() as u64);
            words.extend(addresses.iter().map(|address| address.to_word()));
        }
    }
    words.resize(end, 0);
}

/// Takes a record apart; `None` when it is none.
fn decode(record: &[u64]) -> Option<(Driver, Said)> {
    let (
        &[
            magic,
            features,
            descriptors,
            available,
            used,
            size,
            device,
            inode,
        ],
        rest,
    ) = record.split_first_chunk()?;
    let (&[returned, pairs, guest_offloads, modes, mac], rest) = rest.split_first_chunk()?;
    let (unicast, rest) = rest.split_at_checked(TABLE_WORDS)?;
    let (multicast, rest) = rest.split_at_checked(TABLE_WORDS)?;
    let (&[has_vlans], vlans) = rest.split_first_chunk()?;
    let driver = Driver {
        features,
        ring: [descriptors, available, used, size],
        memory: [device, inode],
        returned: match returned {
            NOWHERE => None,
            returned => Some(u16::try_from(returned).ok()?),
        },
    };
    let vlans = Vlans::from_words(vlans.try_into().ok()?);
    let said = Said {
        used: Used::decode(u16::try_from(pairs).ok()?),
        guest_offloads,
        filter: Filter {
            modes: Modes::from_bits(u8::try_from(modes).ok()?),
            mac: MacAddress::from_word(mac)?,
            unicast: decode_table(unicast)?,
            multicast: decode_table(multicast)?,
            vlans: (has_vlans == 1).then_some(vlans),
        },
    };
    (magic == MAGIC).then_some((driver, said))
}

fn decode_table(words: &[u64]) -> Option<Table> {
    let (count, addresses) = words.split_first()?;
    if *count == EVERYTHING {
        return Some(Table::Everything);
    }
    let addresses = addresses.get(..usize::try_from(*count).ok()?)?;
    let addresses: Option<Vec<MacAddress>> = addresses
        .iter()
        .map(|word| MacAddress::from_word(*word))
        .collect();
    Some(Table::new(addresses?))
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

    use super::*;

    thread_local! {
        /// Stores left to live for.
        static LEFT: Cell<usize> = const { Cell::new(usize::MAX) };
    }

    struct Death;

    pub(super) fn step() {
        match LEFT.get() {
            0 => resume_unwind(Box::new(Death)),
            left => LEFT.set(left - 1),
        }
    }

    /// Runs `life` for so many stores; whether it came to its end.
    fn lives(stores: usize, life: impl FnOnce()) -> bool {
        LEFT.set(stores);
        let outcome = catch_unwind(AssertUnwindSafe(life));
        LEFT.set(usize::MAX);
        outcome.is_ok()
    }

    const DRIVER: Driver = Driver {
        features: 0x1234,
        ring: [1 << 40, 2 << 40, 3 << 40, 64],
        memory: [1, 99],
        returned: Some(7),
    };

    fn said(number: u8) -> Said {
        let address = |last| MacAddress([0x52, 0, 0, 0, number, last]);
        let mut vlans = Vlans::none();
        vlans.set(u16::from(number), true);
        Said {
            used: Used::First(2),
            guest_offloads: 1 << 7,
            filter: Filter {
                modes: Modes {
                    all_multicast: true,
                    no_broadcast: true,
                    ..Modes::default()
                },
                mac: address(1),
                unicast: Table::new((0..TABLE_MAX as u8).map(address).collect()),
                multicast: Table::Everything,
                vlans: Some(vlans),
            },
        }
    }

    fn again(kept: &Kept) -> Kept {
        Kept::in_memory(kept.memory.clone())
    }

    #[test]
    fn what_was_stored_last_is_found_by_the_same_driver_alone() {
        let kept = Kept::in_memory(SharedMemory::anonymous(2 * SLOT));
        assert_eq!(kept.load(&DRIVER), None);
        for number in 1..5 {
            kept.store(&DRIVER, &said(number));
            assert_eq!(again(&kept).load(&DRIVER), Some(said(number)));
        }
        let open = Said {
            used: Used::Filled,
            filter: Filter::open(MacAddress([2; 6])),
            ..said(1)
        };
        again(&kept).store(&DRIVER, &open);
        let kept = again(&kept);
        assert_eq!(kept.load(&DRIVER), Some(open));
        // Killed before it returned the command, which will come again.
        let earlier = Driver {
            returned: Some(6),
            ..DRIVER
        };
        assert!(kept.load(&earlier).is_some());
        for other in [
            Driver {
                features: 1,
                ..DRIVER
            },
            Driver {
                ring: [0; 4],
                ..DRIVER
            },
            Driver {
                memory: [1, 98],
                ..DRIVER
            },
            Driver {
                returned: Some(8),
                ..DRIVER
            },
            Driver {
                returned: Some(5),
                ..DRIVER
            },
            Driver {
                returned: None,
                ..DRIVER
            },
        ] {
            assert_eq!(kept.load(&other), None, "{other:?}");
        }
        kept.forget();
        assert_eq!(again(&kept).load(&DRIVER), None);
    }

    #[test]
    fn whenever_the_daemon_dies_the_record_before_or_after_is_whole() {
        for before in 1..3 {
            let mut stores = 0;
            loop {
                let kept = Kept::in_memory(SharedMemory::anonymous(2 * SLOT));
                (1..=before).for_each(|number| kept.store(&DRIVER, &said(number)));
                let lived = lives(stores, || kept.store(&DRIVER, &said(9)));
                let expected = if lived { 9 } else { before };
                assert_eq!(
                    again(&kept).load(&DRIVER),
                    Some(said(expected)),
                    "{stores} stores"
                );
                if lived {
                    break;
                }
                stores += 1;
            }
            assert!(stores > RECORD, "{stores}");
        }
    }

    #[test]
    fn a_torn_or_foreign_record_is_none() {
        let kept = Kept::in_memory(SharedMemory::anonymous(2 * SLOT));
        kept.store(&DRIVER, &said(1));
        for word in kept.slot(1) {
            let old = word.fetch_xor(1 << 17, Ordering::Relaxed);
            assert_eq!(again(&kept).load(&DRIVER), None);
            word.store(old, Ordering::Relaxed);
        }
        assert_eq!(again(&kept).load(&DRIVER), Some(said(1)));
        // Checksums of strangers may be right, too.
        for (at, wrong) in [(0, 0), (8, 1 << 20), (11, 256), (12, 1 << 50), (13, 65)] {
            let mut record = encode(&DRIVER, &said(1));
            record[at] = wrong;
            assert_eq!(decode(&record), None, "word {at}");
        }
        assert_eq!(decode(&[]), None);
    }
}
