//! Several threads at once on one image: real threads, real files.
//!
//! `OUTBOARD_THREADS_SECONDS` makes each shape run longer, `OUTBOARD_SEED` repeats its choices.

use super::checker::Checker;
use super::peers::{has_qemu, qemu};
use super::rig::{self, Disk, Setup};
use super::workload::SECTOR;
use crate::qcow2::CreateOptions;
use block::edge::Permissions;
use block::{
    ByteRange, NewSnapshot, Node, NodeOptions, RedoLog, Root, RootHandle, WriteFlags, ZeroFlags,
};
use executor::{Buffer, Config, Executor};
use rand::rngs::SmallRng;
use rand::{Rng, RngCore, SeedableRng};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

const THREADS: u64 = 4;
/// Parts of the disk that are used, evenly spread, so that few bytes touch many tables.
const WINDOWS: u64 = 48;
/// Sectors in a row that belong to one thread, in every other window: less than a cluster, so that
/// threads meet in it. Other windows belong to one thread each.
const STRIPE: u64 = 2;

/// An image and how it is opened.
#[derive(Clone, Copy, Debug)]
struct Shape {
    cluster_size: u64,
    /// Clusters of a window.
    window_clusters: u64,
    /// Bytes of the disk from one window to the next.
    distance: u64,
    refcount_bits: u32,
    cache: u64,
    l2_entry: Option<u64>,
    /// Records in the redo log.
    log: usize,
}

const SHAPES: [Shape; 4] = [
    // Everything fits: allocation and flushes meet, nothing is thrown out.
    Shape {
        cluster_size: 65536,
        window_clusters: 4,
        distance: 32 << 20,
        refcount_bits: 16,
        cache: 4 << 20,
        l2_entry: None,
        log: 32_768,
    },
    // A slice per window and sixteen slots: every look-up may throw something out.
    Shape {
        cluster_size: 65536,
        window_clusters: 4,
        distance: 256 << 20,
        refcount_bits: 16,
        cache: 0,
        l2_entry: None,
        log: 600,
    },
    // Small tables, refcounts that span many blocks.
    Shape {
        cluster_size: 4096,
        window_clusters: 16,
        distance: 4 << 20,
        refcount_bits: 64,
        cache: 0,
        l2_entry: Some(512),
        log: 600,
    },
    // The smallest clusters: tables are made and dropped all the time.
    Shape {
        cluster_size: 512,
        window_clusters: 64,
        distance: 1 << 20,
        refcount_bits: 1,
        cache: 64 << 10,
        l2_entry: None,
        log: 4096,
    },
];

impl Shape {
    fn size(&self) -> u64 {
        WINDOWS * self.distance
    }
    fn window_bytes(&self) -> u64 {
        self.window_clusters * self.cluster_size
    }
    /// Where a byte of the model is on the disk.
    fn on_disk(&self, at: u64) -> u64 {
        at / self.window_bytes() * self.distance + at % self.window_bytes()
    }
    /// Which thread a sector of the model belongs to.
    fn owner(&self, sector: u64) -> u64 {
        let window = sector * SECTOR as u64 / self.window_bytes();
        match window % 2 {
            0 => sector / STRIPE % THREADS,
            _ => window / 2 % THREADS,
        }
    }
}

fn seconds() -> Duration {
    let given = std::env::var("OUTBOARD_THREADS_SECONDS").ok();
    let seconds = given.map(|text| text.parse().expect("a number of seconds"));
    Duration::from_secs_f64(seconds.unwrap_or(1.5))
}

fn seed() -> u64 {
    let given = std::env::var("OUTBOARD_SEED").ok();
    let seed = given.map(|text| text.parse().expect("a number"));
    let seed = seed.unwrap_or_else(|| SmallRng::from_os_rng().random());
    println!("OUTBOARD_SEED={seed}");
    seed
}

#[test]
fn threads_on_roomy_caches_agree_with_their_model() {
    run(&SHAPES[0], Beside::Nothing);
}

#[test]
fn threads_that_throw_out_each_others_tables_agree_with_their_model() {
    run(&SHAPES[1], Beside::Nothing);
}

#[test]
fn threads_on_small_tables_agree_with_their_model() {
    run(&SHAPES[2], Beside::Nothing);
}

#[test]
fn threads_on_the_smallest_clusters_agree_with_their_model() {
    run(&SHAPES[3], Beside::Nothing);
}

#[test]
fn snapshots_come_and_go_while_threads_write() {
    run(&SHAPES[0], Beside::Snapshots);
    run(&SHAPES[2], Beside::Snapshots);
}

/// What another thread does to the image meanwhile.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Beside {
    Nothing,
    Snapshots,
}

/// Takes snapshots, sees that they stand still while the disk changes, and deletes them.
async fn snapshots(disk: &Disk, shape: &Shape, until: Instant) {
    let mut count = 0;
    while Instant::now() < until || count == 0 {
        let snapshots = disk.snapshots();
        let taken = snapshots.create(NewSnapshot::now("s")).await.unwrap();
        {
            let options = NodeOptions {
                node_name: "view".into(),
                read_only: true,
                ..NodeOptions::default()
            };
            let view = Node::new(options, snapshots.open(&taken.id).await.unwrap());
            let before = windows(&view, shape).await;
            assert!(
                windows(&view, shape).await == before,
                "snapshot {count} changed"
            );
            let busy = snapshots.delete(&taken.id).await.unwrap_err();
            assert_eq!(busy.kind, block::ErrorKind::Busy);
        }
        snapshots.delete(&taken.id).await.unwrap();
        count += 1;
    }
    println!("{count} snapshots");
}

async fn windows(node: &Node, shape: &Shape) -> Vec<u8> {
    let mut content = Vec::new();
    for window in 0..WINDOWS {
        let buffer = Buffer::zeroed(shape.window_bytes() as usize);
        let offset = shape.on_disk(window * shape.window_bytes());
        node.read(offset, buffer.clone()).await.unwrap();
        content.extend_from_slice(&buffer.to_heap());
    }
    content
}

fn run(shape: &Shape, beside: Beside) {
    let seed = seed();
    let files = tempfile::tempdir().unwrap();
    let path = files.path().join("a.qcow2");
    let executor = Executor::new(&Config::default()).unwrap();
    let options = CreateOptions {
        cluster_size: shape.cluster_size,
        refcount_bits: shape.refcount_bits,
        ..CreateOptions::new(shape.size())
    };
    executor.block_on(rig::make(&path, &options));
    let disk = executor.block_on(open(&path, shape));
    let until = Instant::now() + seconds();
    let models: Vec<Vec<u8>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|number| {
                let node = Arc::clone(&disk.node);
                let seed = seed ^ number;
                scope.spawn(move || Worker::new(*shape, number, seed).run(&node, until))
            })
            .collect();
        if beside == Beside::Snapshots {
            executor.block_on(snapshots(&disk, shape, until));
        }
        let join = |thread: std::thread::ScopedJoinHandle<'_, Vec<u8>>| thread.join().unwrap();
        threads.into_iter().map(join).collect()
    });
    executor.block_on(compare(&disk, shape, &models));
    executor.block_on(disk.close()).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    assert_eq!(Checker::new(&bytes).check(), Default::default());
    if has_qemu() {
        let path = path.display().to_string();
        qemu("qemu-img", &["check", "-q", "-f", "qcow2", &path]);
    }
    let again = executor.block_on(open(&path, shape));
    executor.block_on(compare(&again, shape, &models));
    executor.block_on(again.close()).unwrap();
}

async fn open(path: &Path, shape: &Shape) -> Disk {
    let setup = Setup {
        log: RedoLog::in_memory(shape.log),
        cache: shape.cache,
        l2_entry: shape.l2_entry,
        ..Setup::default()
    };
    Disk::open(path, setup).await.unwrap()
}

/// The disk holds what the owner of each sector last stored there.
async fn compare(disk: &Disk, shape: &Shape, models: &[Vec<u8>]) {
    for window in 0..WINDOWS {
        let start = window * shape.window_bytes();
        let length = shape.window_bytes() as usize;
        let content = disk.read(shape.on_disk(start), length).await.unwrap();
        for (number, found) in content.chunks(SECTOR).enumerate() {
            let sector = start / SECTOR as u64 + number as u64;
            let at = sector as usize * SECTOR;
            let expected = &models[shape.owner(sector) as usize][at..at + SECTOR];
            assert!(found == expected, "sector {number:#x} of window {window}");
        }
    }
}

/// One thread: what it does, and what the disk must hold in the sectors that are its own.
struct Worker {
    shape: Shape,
    number: u64,
    random: SmallRng,
    model: Vec<u8>,
    /// Where the next request goes: it is announced before the one that precedes it.
    next: Option<Range<u64>>,
}

impl Worker {
    fn new(shape: Shape, number: u64, seed: u64) -> Self {
        Self {
            model: vec![0; (WINDOWS * shape.window_bytes()) as usize],
            random: SmallRng::seed_from_u64(seed),
            shape,
            number,
            next: None,
        }
    }

    fn run(mut self, node: &Arc<Node>, until: Instant) -> Vec<u8> {
        let executor = Executor::new(&Config::default()).unwrap();
        executor.block_on(async {
            let root = Root::new("test", node, Permissions::ALL, Permissions::ALL).unwrap();
            let root = root.attach();
            while Instant::now() < until {
                self.step(&root).await;
            }
        });
        self.model
    }

    async fn step(&mut self, root: &RootHandle) {
        let next = self.range();
        root.prefetch(self.shape.on_disk(next.start));
        let Some(range) = self.next.replace(next) else {
            return;
        };
        let held = range.start as usize..range.end as usize;
        let length = held.len();
        let offset = self.shape.on_disk(range.start);
        let on_disk = ByteRange::new(offset, length as u64);
        match self.random.random_range(0..20) {
            0..9 => {
                self.random.fill_bytes(&mut self.model[held.clone()]);
                let buffer = Buffer::zeroed(length);
                buffer.copy_from_slice(&self.model[held]);
                let flags = WriteFlags::default();
                root.write(offset, buffer, flags).await.unwrap();
            }
            9..11 => {
                let may_unmap = self.random.random();
                let flags = ZeroFlags {
                    may_unmap,
                    ..ZeroFlags::default()
                };
                root.write_zeroes(on_disk, flags).await.unwrap();
                self.model[held].fill(0);
            }
            11..13 => {
                root.discard(on_disk).await.unwrap();
                self.discarded(range);
            }
            13 => root.flush().await.unwrap(),
            _ => {
                let buffer = Buffer::zeroed(length);
                root.read(offset, buffer.clone()).await.unwrap();
                assert!(buffer.to_heap()[..] == self.model[held], "at {offset:#x}");
            }
        }
    }

    /// Bytes of the model that are this thread's own: a stripe, or any sectors of a window.
    fn range(&mut self) -> Range<u64> {
        let window_sectors = self.shape.window_bytes() / SECTOR as u64;
        let (first, count) = if self.random.random() {
            let window = self.random.random_range(0..WINDOWS / 2) * 2;
            let stripe = self
                .random
                .random_range(0..window_sectors / STRIPE / THREADS);
            let start = window * window_sectors;
            // The owner counts stripes from the start of the disk.
            let stripes = start / STRIPE % THREADS;
            let own = (self.number + THREADS - stripes) % THREADS;
            (start + (stripe * THREADS + own) * STRIPE, STRIPE)
        } else {
            let owned = WINDOWS / 2 / THREADS;
            let window = (self.random.random_range(0..owned) * THREADS + self.number) * 2 + 1;
            let first = self.random.random_range(0..window_sectors);
            let count = self.random.random_range(1..=window_sectors - first);
            (window * window_sectors + first, count)
        };
        first * SECTOR as u64..(first + count) * SECTOR as u64
    }

    /// Whole clusters of a discarded range read as zeroes, the rest stays.
    fn discarded(&mut self, range: Range<u64>) {
        let cluster_size = self.shape.cluster_size;
        let start = range.start.next_multiple_of(cluster_size);
        let end = range.end / cluster_size * cluster_size;
        if start < end {
            self.model[start as usize..end as usize].fill(0);
        }
    }
}
