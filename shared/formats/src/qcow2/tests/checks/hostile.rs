//! Images made to harm, checked and repaired: what CVE-2014-0142 to -0148 were about (sizes and
//! offsets taken from the image and trusted), tables that refer to each other in circles, and
//! tables shared so often that reading each reference takes for ever.

use super::check_as_tool;
use crate::qcow2::tests::hostile::sample;
use crate::qcow2::tests::processor_time;
use block::Repair;
use executor::Executor;
use executor::sim::{Config, World};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::path::Path;
use std::time::Duration;

const IMAGE: &str = "a.qcow2";
/// Most processor time; tests are built without optimisation, which makes them ten times slower.
const LONGEST: Duration = Duration::from_secs(15);
/// Most memory of the test's process, in KiB.
const MAX_MEMORY_KIB: u64 = 256 << 10;

/// An image of zeroes with a header.
struct Image {
    bytes: Vec<u8>,
    cluster: usize,
}

impl Image {
    /// Version 3, header in cluster 0, refcount table in 1, one block in 2, L1 table from 3 on.
    fn new(cluster_bits: u32, clusters: usize, l1_entries: u32) -> Self {
        let cluster = 1 << cluster_bits;
        let mut image = Self {
            bytes: vec![0; cluster * clusters],
            cluster,
        };
        let per_l1_entry = (cluster * cluster / 8) as u64;
        image
            .put32(0, 0x5146_49fb)
            .put32(4, 3)
            .put32(20, cluster_bits)
            .put64(24, (per_l1_entry * u64::from(l1_entries)).min(1 << 40))
            .put32(36, l1_entries)
            .put64(40, 3 * cluster as u64)
            .put64(48, cluster as u64)
            .put32(56, 1)
            .put32(96, 4)
            .put32(100, 104)
            .put64(cluster, 2 * cluster as u64);
        image
    }
    fn put32(&mut self, at: usize, value: u32) -> &mut Self {
        self.bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
        self
    }
    fn put64(&mut self, at: usize, value: u64) -> &mut Self {
        self.bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
        self
    }
    /// Fills words from `at` on.
    fn fill(&mut self, at: usize, words: usize, value: impl Fn(u64) -> u64) -> &mut Self {
        for index in 0..words {
            self.put64(at + index * 8, value(index as u64));
        }
        self
    }
}

/// Checks and repairs it every way; what is found does not matter.
fn survives(what: &str, bytes: &[u8]) {
    for repair in [Repair::None, Repair::Leaks, Repair::All] {
        let begun = processor_time();
        let files = [(IMAGE.into(), bytes.to_vec())].into();
        let world = World::with_files(Config::default(), files);
        let (outcome, messages) = Executor::simulated(&world).block_on(async {
            let file = super::edge(Path::new(IMAGE));
            check_as_tool(&file, repair).await
        });
        let took = processor_time() - begun;
        println!("{what}, {repair:?}: {took:?}, {} messages", messages.len());
        assert!(took < LONGEST, "{what}: {took:?}, {outcome:?}");
        let length = world.files()[Path::new(IMAGE)].len();
        let most = bytes.len() * 4 + (128 << 20);
        assert!(length <= most, "{what}: the file grew to {length}");
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find(|line| line.starts_with("VmHWM:"));
    let peak = peak.and_then(|line| line.split_whitespace().nth(1));
    let peak: u64 = peak.unwrap().parse().unwrap();
    println!("{what}: {peak} KiB at most");
    if bytes.len() < 1 << 20 {
        assert!(peak < MAX_MEMORY_KIB, "{what}: {peak} KiB");
    }
}

#[test]
fn sizes_and_offsets_of_the_header_are_not_trusted() {
    let plain = || Image::new(12, 8, 4);
    let fields = [
        ("L1 entries", 36, 4),
        ("L1 offset", 40, 8),
        ("refcount table offset", 48, 8),
        ("refcount table clusters", 56, 4),
        ("snapshots", 60, 4),
        ("snapshots offset", 64, 8),
        ("virtual size", 24, 8),
        ("header length", 100, 4),
    ];
    let values = [
        0,
        1,
        0xfff,
        0x1000,
        0x7fff_f000,
        0xffff_ffff,
        0x00ff_ffff_ffff_f000,
        0x7fff_ffff_ffff_f000,
        u64::MAX,
    ];
    for (what, at, width) in fields {
        for value in values {
            let mut image = plain();
            match width {
                4 => image.put32(at, value as u32),
                _ => image.put64(at, value),
            };
            survives(&format!("{what} {value:#x}"), &image.bytes);
        }
    }
}

#[test]
fn tables_that_refer_to_each_other_in_circles_end() {
    let mut image = Image::new(12, 8, 4);
    let cluster = image.cluster as u64;
    image.put64(3 * 4096, (3 * cluster) | (1 << 63));
    survives("the L1 table is its own L2 table", &image.bytes);
    image.put64(3 * 4096, (4 * cluster) | (1 << 63));
    image.fill(4 * 4096, 512, |_| (4 * cluster) | (1 << 63));
    survives("an L2 table maps itself", &image.bytes);
    image.fill(4 * 4096, 512, |index| (index % 8 * cluster) | (1 << 63));
    survives("an L2 table maps all metadata", &image.bytes);
    let mut image = Image::new(12, 8, 4);
    image.fill(4096, 512, |_| cluster);
    survives("the refcount table is its own blocks", &image.bytes);
    image.put64(48, 0);
    survives("the refcount table is the header", &image.bytes);
    image.put64(48, 3 * cluster);
    survives("the refcount table is the L1 table", &image.bytes);
}

#[test]
fn tables_shared_a_million_times_are_read_once() {
    // An L1 table of 4 MiB, each entry for the same L2 table, in which each entry has one cluster.
    let entries = 1 << 19;
    let mut image = Image::new(16, 3 + 64 + 2, entries);
    let l2 = (3 + 64) * 65536_u64;
    let l1 = 3 * image.cluster;
    image.fill(l1, entries as usize, |_| l2);
    image.fill(l2 as usize, 8192, |_| l2 + 65536);
    survives("one L2 table for all", &image.bytes);
    // The same with each entry at another 512 bytes.
    image.fill(l1, entries as usize, |index| l2 - index % 8192 * 512);
    survives("an L2 table at every sector", &image.bytes);
    let mut image = Image::new(16, 3 + 16 + 2, 1);
    image.put32(56, 16).put64(48, 3 * 65536).put64(40, 65536);
    image.fill(3 * 65536, 1 << 17, |_| 2 * 65536);
    survives("one refcount block for all", &image.bytes);
}

#[test]
fn snapshots_without_end_end() {
    let mut image = Image::new(12, 3 + 64 + 300, 32 << 10);
    let table = (3 + 64) * 4096;
    image.put32(60, 20000).put64(64, table as u64);
    for number in 0..20000 {
        let entry = table + number * 56;
        let offset = 3 * 4096 + (number % 64) as u64 * 4096;
        image.put64(entry, offset).put32(entry + 8, 4 << 20);
        image.put32(entry + 36, 16);
    }
    survives("20000 snapshots with L1 tables on each other", &image.bytes);
    let mut image = Image::new(12, 16, 1);
    image.put32(60, 3).put64(64, 5 * 4096);
    for (at, value) in [(36, u32::MAX), (12, u32::MAX), (8, u32::MAX)] {
        image.bytes[5 * 4096..].fill(0);
        image.put32(5 * 4096 + at, value);
        survives(&format!("a snapshot with {value:#x} at {at}"), &image.bytes);
    }
    image.put32(60, 65537);
    survives("one snapshot too many", &image.bytes);
    image.put32(60, u32::MAX);
    survives("four billion snapshots", &image.bytes);
}

#[test]
fn extensions_that_lie_about_their_places_are_not_trusted() {
    for (what, kind, words) in [
        ("LUKS header", 0x0537_be77, &[4096_u64, u64::MAX][..]),
        ("LUKS header", 0x0537_be77, &[1 << 55, 1 << 62]),
        ("bitmaps", 0x2385_2875, &[65535 << 32, 1 << 26, 4096]),
        ("bitmaps", 0x2385_2875, &[1 << 32, 24, 5 * 4096]),
    ] {
        let mut image = Image::new(12, 8, 4);
        image.put64(88, 1).put32(104, kind);
        image.put32(108, words.len() as u32 * 8);
        for (index, word) in words.iter().enumerate() {
            image.put64(112 + index * 8, *word);
        }
        survives(&format!("{what} {words:x?}"), &image.bytes);
        // A bitmap with a table of half a gigabyte.
        image
            .put64(5 * 4096, 6 * 4096)
            .put32(5 * 4096 + 8, 0x2_0000);
        image.put32(5 * 4096 + 16, 0x0110_0001);
        survives(&format!("{what} with a table"), &image.bytes);
    }
}

#[test]
fn random_damage_is_checked_and_repaired_without_harm() {
    let mut random = SmallRng::seed_from_u64(0x142);
    let samples = [sample(512), sample(4096)];
    for round in 0..300 {
        let mut bytes = samples[round % 2].clone();
        for _ in 0..random.random_range(1..6) {
            let most = if random.random() {
                112
            } else {
                bytes.len() - 8
            };
            let at = random.random_range(8..most);
            match random.random_range(0..3) {
                0 => bytes[at] = random.random(),
                1 => bytes[at] ^= 1 << random.random_range(0..8),
                _ => bytes[at / 8 * 8..][..8].copy_from_slice(&[0xff; 8]),
            }
        }
        survives(&format!("round {round}"), &bytes);
    }
}
