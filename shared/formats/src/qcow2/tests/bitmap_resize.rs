//! Stored bitmaps of a disk whose length changes: QEMU's tools as oracle, both ways, and on the
//! simulated world power cuts, failing I/O and kills anywhere.

use super::bitmaps::{self, State};
use super::change::{cut, each_cut};
use super::checker::Checker;
use super::peers::{Files, has_qemu, on_host, open, qemu};
use super::rig::{self, Disk, Setup};
use crate::qcow2::CreateOptions;
use block::bitmap::ops;
use block::{Errno, RedoLog, Resize};
use executor::Executor;
use executor::sim::{Config, Fault, Subset, World};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::cell::Cell;
use std::path::Path;
use std::process::Command;

const IMAGE: &str = "disk.qcow2";
const CLUSTER: u64 = 512;
const SIZE: u64 = 400 * CLUSTER;
/// The disk's lengths afterwards: one whose bits take more clusters, one whose last granule is cut.
const LENGTHS: [u64; 3] = [SIZE * 11, SIZE / 2 + 512, 3 * CLUSTER];

fn resize(length: u64) -> Resize {
    Resize::to(length)
}

/// A closed image with two bitmaps, one of which does not record, and no data.
fn world() -> World {
    let config = Config::default();
    let world = World::new(config.clone());
    let options = CreateOptions {
        cluster_size: CLUSTER,
        ..CreateOptions::new(SIZE)
    };
    Executor::simulated(&world).block_on(async {
        rig::make(Path::new(IMAGE), &options).await;
        let disk = Disk::open(Path::new(IMAGE), Setup::default()).await;
        let disk = disk.unwrap();
        bitmaps::add(&disk, "b0", 512);
        bitmaps::add(&disk, "idle", 4096);
        ops::disable(&disk.node, "idle").unwrap();
        disk.close().await.unwrap();
    });
    world.restart(&cut(world.log_len(), Subset::All), config)
}

/// Places that are written before the disk has another length, and afterwards.
fn places(length: u64) -> [u64; 3] {
    [CLUSTER, SIZE - CLUSTER, length - CLUSTER]
}

/// Writes, changes the length, writes, flushes; notes how many of these are done.
async fn work(disk: &Disk, length: u64, done: &Cell<usize>) -> Result<(), Errno> {
    let [first, last, new] = places(length);
    let step = || done.set(done.get() + 1);
    disk.write(first, &[1; 512]).await?;
    step();
    disk.write(last, &[2; 512]).await?;
    step();
    let resized = disk.node.resize(resize(length)).await;
    resized.map_err(|error| error.errno.unwrap_or(Errno::EIO))?;
    step();
    disk.write(new, &[3; 512]).await?;
    step();
    disk.root.flush().await
}

/// A process' life, to its orderly end.
async fn live(length: u64) -> Result<(), Errno> {
    let opened = Disk::open(Path::new(IMAGE), Setup::default()).await;
    let disk = opened.map_err(|_| Errno::EIO)?;
    let worked = work(&disk, length, &Cell::default()).await;
    let closed = disk.close().await;
    worked.and(closed)
}

/// The dirty granules of "b0", unless it is in use.
fn dirty(image: &Checker<'_>, length: u64) -> Option<Vec<u64>> {
    let bitmaps = image.bitmaps();
    let bitmap = bitmaps.iter().find(|bitmap| bitmap.name == "b0").unwrap();
    let granules = 0..length.div_ceil(bitmap.granularity);
    let dirty = || granules.filter(|granule| bitmap.is_dirty(*granule));
    (!bitmap.in_use).then(|| dirty().collect())
}

/// What is dirty when everything was done.
fn expected(length: u64) -> Vec<u64> {
    let kept = places(length).into_iter().filter(|at| *at < length);
    let mut granules: Vec<_> = kept.map(|at| at / 512).collect();
    granules.sort_unstable();
    granules.dedup();
    granules
}

/// Asserts that an image is sound, has the old or the new length, and that its bitmaps fit it.
fn assert_sound(bytes: &[u8], length: u64, context: &str) {
    let image = Checker::new(bytes);
    let findings = image.check();
    assert!(findings.corruptions.is_empty(), "{context}: {findings:#x?}");
    let content = image.read_all(&[]);
    let found = content.len() as u64;
    assert!(found == SIZE || found == length, "{context}: {found} bytes");
    let checked = bitmaps::check(&image, &content, State::Crashed);
    checked.unwrap_or_else(|wrong| panic!("{context}: {wrong}"));
}

/// The same of what a crash left, which is then opened, closed, and looked at again.
fn assert_usable(world: &World, length: u64, context: &str) {
    let files = world.files();
    assert_sound(&files[Path::new(IMAGE)], length, context);
    let was_dirty = dirty(&Checker::new(&files[Path::new(IMAGE)]), length.min(SIZE));
    Executor::simulated(world).block_on(async {
        let opened = Disk::open(Path::new(IMAGE), Setup::default()).await;
        let disk = opened.unwrap_or_else(|error| panic!("{context}: {}", error.message));
        let bitmap = ops::find(&disk.node, "b0").unwrap();
        assert_eq!(bitmap.is_inconsistent(), was_dirty.is_none(), "{context}");
        disk.close().await.unwrap();
    });
    let files = world.files();
    let bytes = &files[Path::new(IMAGE)];
    assert_sound(bytes, length, context);
    let is_dirty = dirty(&Checker::new(bytes), length.min(SIZE));
    assert_eq!(is_dirty, was_dirty, "{context}");
}

#[test]
fn a_power_cut_leaves_bitmaps_that_fit_the_disk_and_never_say_too_little() {
    for length in LENGTHS {
        let world = world();
        Executor::simulated(&world).block_on(live(length)).unwrap();
        let files = world.files();
        let image = Checker::new(&files[Path::new(IMAGE)]);
        assert_eq!(image.check(), Default::default(), "to {length}");
        assert_eq!(dirty(&image, length), Some(expected(length)));
        each_cut(&world, |cut| {
            let context = format!("to {length}, {cut:?}");
            match cut.subset {
                Subset::None | Subset::All => {
                    let after = world.restart(cut, Config::default());
                    assert_usable(&after, length, &context);
                }
                Subset::Random(_) => {
                    let files = world.power_cut(cut);
                    assert_sound(&files[Path::new(IMAGE)], length, &context);
                }
            }
        });
    }
}

#[test]
fn a_failing_disk_leaves_bitmaps_that_fit_it() {
    for length in LENGTHS {
        let operations = live_with_fault(length, None);
        for op_index in 0..operations {
            for sticky in [false, true] {
                let errno = Errno::EIO;
                let fault = Fault {
                    op_index,
                    errno,
                    sticky,
                };
                live_with_fault(length, Some(fault));
            }
        }
    }
}

/// A life with a fault, then a power cut; answers with the number of operations.
fn live_with_fault(length: u64, fault: Option<Fault>) -> u64 {
    let world = world();
    if let Some(fault) = fault {
        world.inject(fault);
    }
    let lived = Executor::simulated(&world).block_on(live(length));
    let context = format!("to {length}, {fault:?}");
    for subset in [Subset::None, Subset::All, Subset::Random(1)] {
        let after = world.restart(&cut(world.log_len(), subset), Config::default());
        assert_usable(&after, length, &context);
        if lived.is_ok() {
            let files = after.files();
            let image = Checker::new(&files[Path::new(IMAGE)]);
            assert_eq!(dirty(&image, length), Some(expected(length)), "{context}");
        }
    }
    world.op_count()
}

#[test]
fn a_kill_while_the_length_changes_loses_no_write_that_still_belongs_to_the_disk() {
    for length in LENGTHS {
        let total = kill_at(length, u64::MAX);
        for operations in 0..total {
            kill_at(length, operations);
        }
    }
}

/// Kills the process after so many file operations; its successor has the redo log.
fn kill_at(length: u64, operations: u64) -> u64 {
    // What the killed process had in flight holds the request epochs of its thread.
    let life = std::thread::spawn(move || kill_here(length, operations));
    life.join()
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn kill_here(length: u64, operations: u64) -> u64 {
    let context = format!("to {length}, kill at {operations}");
    let (world, done, log) = (world(), Cell::new(0), RedoLog::in_memory(1024));
    let with_log = || Setup {
        log: log.share(),
        ..Setup::default()
    };
    let before = world.op_count();
    rig::die_after(operations);
    let executor = Executor::simulated(&world);
    executor.block_on(rig::until_death(async {
        let disk = Disk::open(Path::new(IMAGE), with_log()).await.unwrap();
        work(&disk, length, &done).await.unwrap();
    }));
    drop(executor);
    rig::die_after(u64::MAX);
    let total = world.op_count() - before;
    let world = world.restart(&cut(world.log_len(), Subset::All), Config::default());
    let successor = Executor::simulated(&world);
    let disk = successor.block_on(async {
        let disk = Disk::open(Path::new(IMAGE), with_log()).await.unwrap();
        let content = disk.read_all().await.unwrap();
        let found = content.len() as u64;
        assert!(found == SIZE || found == length, "{context}: {found} bytes");
        assert!(done.get() < 3 || found == length, "{context}: {found}");
        // Each of the writes belongs to a step.
        for ((at, step), fill) in places(length).into_iter().zip([1, 2, 4]).zip(1..) {
            if done.get() >= step && at < found {
                assert_eq!(content[at as usize..][..512], [fill; 512], "{context}");
            }
        }
        disk.root.flush().await.unwrap();
        disk
    });
    let files = world.power_cut(&cut(world.log_len(), Subset::None));
    assert_sound(&files[Path::new(IMAGE)], length, &context);
    successor.block_on(disk.close()).unwrap();
    total
}

/// What is done to an image with bitmaps.
#[derive(Clone, Copy, Debug)]
enum Operation {
    Write(u64, u64),
    Resize(u64),
}

impl Operation {
    fn random(random: &mut SmallRng, length: &mut u64) -> Self {
        if random.random_range(0..3) == 0 {
            *length = random.random_range(1..=4096) * 2048;
            return Self::Resize(*length);
        }
        let start = random.random_range(0..*length / 512) * 512;
        let bytes = random.random_range(1..=64) * 512;
        Self::Write(start, bytes.min(*length - start))
    }

    async fn apply(self, disk: &Disk) {
        match self {
            Self::Write(start, bytes) => {
                disk.write(start, &vec![7; bytes as usize]).await.unwrap();
            }
            Self::Resize(length) => disk.node.resize(resize(length)).await.unwrap(),
        }
    }

    fn in_words(self) -> String {
        match self {
            Self::Write(start, bytes) => format!("write -P 7 {start} {bytes}"),
            Self::Resize(length) => format!("truncate {length}"),
        }
    }
}

/// The bitmaps of an image, read by neither side: name, bytes of a granule, dirty ones.
fn stored(files: &Files, name: &str) -> Vec<(String, u64, Vec<u64>)> {
    let bytes = std::fs::read(files.path(name)).unwrap();
    let image = Checker::new(&bytes);
    let length = u64::from_be_bytes(bytes[24..32].try_into().unwrap());
    let bitmaps = image.bitmaps().into_iter().map(|bitmap| {
        assert!(!bitmap.in_use, "{name}: {}", bitmap.name);
        let granules = 0..length.div_ceil(bitmap.granularity);
        let dirty = granules.filter(|granule| bitmap.is_dirty(*granule));
        let dirty = dirty.collect();
        (bitmap.name, bitmap.granularity, dirty)
    });
    let mut bitmaps: Vec<_> = bitmaps.collect();
    bitmaps.sort();
    bitmaps
}

#[test]
fn bitmaps_follow_the_disks_length_as_qemus_do() {
    if !has_qemu() {
        return;
    }
    for (seed, (cluster, granules)) in (0..).zip([("512", ["512", "64k"]), ("64k", ["4k", "1M"])]) {
        println!("seed {seed}");
        let mut random = SmallRng::seed_from_u64(seed);
        let (files, mut length) = (Files::new(), 2 << 20);
        let images = ["a.qcow2", "b.qcow2"];
        for name in images.map(|name| files.text(name)) {
            let options = format!("cluster_size={cluster}");
            let create = ["create", "-q", "-f", "qcow2", "-o", &options, &name, "2M"];
            qemu("qemu-img", &create);
            let [fine, coarse] = granules;
            qemu("qemu-img", &["bitmap", "--add", "-g", fine, &name, "on"]);
            let disabled = ["bitmap", "--add", "--disable", "-g", coarse, &name, "off"];
            qemu("qemu-img", &disabled);
        }
        for round in 0..4 {
            // Each side works on what the other one left.
            let (mine, theirs) = match round % 2 {
                0 => (images[0], images[1]),
                _ => (images[1], images[0]),
            };
            let operations: Vec<_> = (0..6)
                .map(|_| Operation::random(&mut random, &mut length))
                .collect();
            println!("{operations:?}");
            on_host(async {
                let disk = open(&files.path(mine)).await;
                for operation in &operations {
                    operation.apply(&disk).await;
                }
                disk.close().await.unwrap();
            });
            let words: Vec<_> = operations.iter().map(|one| one.in_words()).collect();
            let mut line = vec!["-f", "qcow2"];
            line.extend(words.iter().flat_map(|word| ["-c", word]));
            let name = files.text(theirs);
            line.push(&name);
            qemu("qemu-io", &line);
            files.check(mine);
            assert_eq!(stored(&files, mine), stored(&files, theirs));
        }
    }
}

#[test]
fn a_disk_with_an_inconsistent_bitmap_keeps_its_length() {
    if !has_qemu() {
        return;
    }
    let files = Files::new();
    let (path, name) = (files.path("a.qcow2"), files.text("a.qcow2"));
    on_host(async {
        rig::make(&path, &CreateOptions::new(1 << 20)).await;
        let disk = open(&path).await;
        bitmaps::add(&disk, "b", 512);
        disk.close().await.unwrap();
        let killed = open(&path).await;
        let left = std::fs::read(&path).unwrap();
        killed.close().await.unwrap();
        std::fs::write(&path, left).unwrap();
    });
    for (length, bytes) in [("2M", 2 << 20), ("512k", 512 << 10)] {
        let resize_it = ["resize", "-f", "qcow2", "--shrink", &name, length];
        let output = Command::new("qemu-img").args(resize_it).output().unwrap();
        let by_qemu = String::from_utf8(output.stderr).unwrap();
        let by_us = on_host(async {
            let disk = open(&path).await;
            let refused = disk.node.resize(resize(bytes)).await.unwrap_err();
            assert_eq!(disk.node.length(), 1 << 20);
            disk.close().await.unwrap();
            refused
        });
        let first = by_qemu.lines().next().unwrap();
        assert_eq!(first, format!("qemu-img: {}", by_us.message));
    }
}
