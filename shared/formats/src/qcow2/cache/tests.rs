use super::*;
use crate::qcow2::tables::COPIED;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

const SLICE_WORDS: usize = 512;
const BITS: u32 = 16;
const ENTRIES: Content = Content::L2Entries { cluster_bits: BITS };

fn data(cluster: u64) -> u64 {
    COPIED | cluster << BITS
}

/// Slices as on disk.
struct Disk {
    slices: Vec<Vec<u64>>,
}

impl Disk {
    fn bytes(&self, index: u64) -> Vec<u8> {
        let words = self.slices[index as usize].iter();
        words.flat_map(|word| word.to_be_bytes()).collect()
    }
}

/// Reads a slice as a request does: from the cache, else from disk into the cache.
fn read(cache: &TableCache, disk: &Disk, index: u64) -> (Vec<u64>, bool) {
    if let Some(view) = cache.view(index) {
        let words = (0..SLICE_WORDS).map(|entry| view.word(entry)).collect();
        assert!(view.is_valid(), "nobody else changes the cache");
        return (words, true);
    }
    match cache.claim_read(index) {
        ReadClaim::Vacant(loading) => (loading.complete(&disk.bytes(index)), false),
        ReadClaim::Present | ReadClaim::Busy => panic!("not cached and not being loaded"),
    }
}

fn pin<'c>(cache: &'c TableCache, disk: &Disk, index: u64) -> Option<Pinned<'c>> {
    match cache.claim(index) {
        Claim::Present(pinned) => Some(pinned),
        Claim::Vacant(fill) => Some(fill.complete(&disk.bytes(index))),
        // Every slot is dirty or waits for a flush to write it.
        Claim::AllDirty | Claim::Busy => None,
    }
}

fn random_slice(random: &mut SmallRng) -> Vec<u64> {
    let kind = random.random_range(0..4);
    let first = random.random_range(1..1 << 20);
    (0..SLICE_WORDS as u64)
        .map(|index| match kind {
            0 => 0,
            1 => data(first + index),
            2 => data(random.random_range(0..1 << 24)),
            _ => random.random(),
        })
        .collect()
}

/// Writes what a flush took; `before` is what it must write.
fn finish_flush(cache: &TableCache, disk: &mut Disk, taken: &[DirtySlice], before: &[Vec<u64>]) {
    for slice in taken {
        let words: Vec<u64> = words_of(&cache.copy(slice)).collect();
        assert_eq!(words, before[slice.index as usize], "slice {}", slice.index);
        disk.slices[slice.index as usize] = words;
        cache.written(slice, true);
    }
}

/// Any sequence of reads, writes, flushes with writes meanwhile, and cleaning: what the cache
/// shows is what was written, a flush writes what there was when it began, memory is bounded.
#[test]
fn any_sequence_of_uses_agrees_with_a_model() {
    let seed: u64 = SmallRng::from_os_rng().random();
    println!("seed {seed}");
    let mut random = SmallRng::seed_from_u64(seed);
    let (rounds, slices) = if cfg!(miri) { (150, 40) } else { (6000, 300) };
    let budget = 256 << 10;
    let cache = TableCache::new(SLICE_WORDS as u64 * 8, budget, ENTRIES).unwrap();
    let mut truth: Vec<Vec<u64>> = (0..slices).map(|_| random_slice(&mut random)).collect();
    let mut disk = Disk {
        slices: truth.clone(),
    };
    let mut hits = 0;
    let mut flush: Option<(Vec<DirtySlice>, Vec<Vec<u64>>)> = None;
    for round in 0..rounds {
        let index = random.random_range(0..slices as u64);
        match random.random_range(0..100) {
            0..60 => {
                let (words, hit) = read(&cache, &disk, index);
                assert_eq!(
                    words, truth[index as usize],
                    "slice {index} in round {round}"
                );
                hits += u64::from(hit);
            }
            60..90 => {
                let Some(pinned) = pin(&cache, &disk, index) else {
                    let (taken, before) = flush
                        .take()
                        .unwrap_or_else(|| (cache.take_dirty(), truth.clone()));
                    finish_flush(&cache, &mut disk, &taken, &before);
                    continue;
                };
                for _ in 0..random.random_range(1..5) {
                    let entry = random.random_range(0..SLICE_WORDS);
                    let word = data(random.random_range(0..1 << 24));
                    pinned.set_word(entry, word);
                    truth[index as usize][entry] = word;
                }
            }
            90..96 => match flush.take() {
                None => flush = Some((cache.take_dirty(), truth.clone())),
                Some((taken, before)) => finish_flush(&cache, &mut disk, &taken, &before),
            },
            96 => cache.clean(),
            _ => {
                let pinned = cache.pin(index);
                let words = pinned.map(|pinned| {
                    (0..SLICE_WORDS)
                        .map(|entry| pinned.word(entry))
                        .collect::<Vec<_>>()
                });
                assert!(words.is_none_or(|words| words == truth[index as usize]));
            }
        }
        assert!(cache.memory_bytes() <= budget as usize + 16384);
    }
    assert!(hits > 0);
}

#[test]
fn a_sparse_slice_takes_less_than_a_hundred_bytes() {
    let slices = 4096;
    let cache = TableCache::new(4096, 100 * slices, ENTRIES).unwrap();
    let slice = |index: u64| {
        let mut words = vec![0; SLICE_WORDS];
        if index.is_multiple_of(2) {
            words[0] = data(index * 3 + 100);
        }
        words
    };
    let mut disk = Disk {
        slices: vec![vec![]],
    };
    for index in 0..slices {
        disk.slices[0] = slice(index);
        read_new(&cache, &disk, index);
    }
    for index in 0..slices {
        let view = cache
            .view(index)
            .unwrap_or_else(|| panic!("slice {index} was thrown out"));
        assert_eq!(view.word(0), slice(index)[0]);
        assert_eq!(view.run(1, 511, 0), 511);
        assert!(view.is_valid());
    }
}

#[test]
fn clusters_anywhere_in_a_tebibyte_take_three_and_a_bit_bytes() {
    let slices = 32_768 / 64;
    let cache = TableCache::new(4096, 60 << 20 >> 6, ENTRIES).unwrap();
    let mut random = SmallRng::seed_from_u64(1);
    let mut disk = Disk {
        slices: vec![vec![]],
    };
    for index in 0..slices {
        disk.slices[0] = (0..512)
            .map(|_| data(random.random_range(0..1 << 24)))
            .collect();
        read_new(&cache, &disk, index);
    }
    let hits = (0..slices)
        .filter(|&index| cache.view(index).is_some())
        .count();
    assert_eq!(hits as u64, slices);
}

fn read_new(cache: &TableCache, disk: &Disk, index: u64) {
    match cache.claim_read(index) {
        ReadClaim::Vacant(loading) => loading.complete(&disk.bytes(0)),
        _ => panic!("not cached yet"),
    };
}

#[test]
fn an_idle_cache_gives_its_memory_back_and_the_task_ends_with_it() {
    let world = executor::sim::World::new(executor::sim::Config::default());
    executor::Executor::simulated(&world).block_on(async {
        let interval = std::time::Duration::from_secs(600);
        let cache = Arc::new(TableCache::new(4096, 1 << 20, ENTRIES).unwrap());
        let cleaner = executor::spawn(clean_regularly(&cache, interval));
        let mut random = SmallRng::seed_from_u64(1);
        let disk = Disk {
            slices: (0..100).map(|_| random_slice(&mut random)).collect(),
        };
        for index in 0..50 {
            read(&cache, &disk, index);
        }
        for index in 50..100 {
            drop(pin(&cache, &disk, index));
        }
        let full = cache.memory_bytes();
        executor::time::sleep(interval * 5 / 2).await;
        assert!(
            cache.is_empty(),
            "{full} bytes before, {} after",
            cache.memory_bytes()
        );
        assert!(!read(&cache, &disk, 1).1, "it is loaded again");
        drop(cache);
        cleaner.await;
    });
}

#[test]
fn a_dirty_slice_survives_cleaning() {
    let cache = TableCache::new(4096, 1 << 20, ENTRIES).unwrap();
    let disk = Disk {
        slices: vec![vec![0; SLICE_WORDS]],
    };
    pin(&cache, &disk, 0).unwrap().set_word(5, data(7));
    for _ in 0..3 {
        cache.clean();
    }
    assert_eq!(read(&cache, &disk, 0).0[5], data(7));
}
