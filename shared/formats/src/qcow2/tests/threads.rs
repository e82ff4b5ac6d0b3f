//! Several threads at once on one image: real threads, real files.

use super::checker::Checker;
use super::rig::{self, Disk, Setup};
use super::workload::SECTOR;
use crate::qcow2::CreateOptions;
use block::edge::Permissions;
use block::{ByteRange, Node, Root, WriteFlags, ZeroFlags};
use executor::{Buffer, Config, Executor};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::sync::Arc;

const THREADS: u64 = 3;
const SIZE: u64 = 1 << 20;
/// Sectors in a row that belong to one thread: less than a cluster, so that threads meet in it.
const STRIPE: u64 = 2;

#[test]
fn threads_that_share_clusters_do_not_lose_each_others_writes() {
    let seed: u64 = SmallRng::from_os_rng().random();
    println!("seed {seed}");
    let files = tempfile::tempdir().unwrap();
    let path = files.path().join("a.qcow2");
    let executor = Executor::new(&Config::default()).unwrap();
    let options = CreateOptions {
        cluster_size: 4096,
        ..CreateOptions::new(SIZE)
    };
    executor.block_on(rig::make(&path, &options));
    let setup = Setup {
        cache: 0,
        ..Setup::default()
    };
    let disk = executor.block_on(Disk::open(&path, setup)).unwrap();
    let expected: Vec<Vec<u8>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|number| {
                let node = Arc::clone(&disk.node);
                scope.spawn(move || work(&node, number, seed))
            })
            .collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, Vec<u8>>| thread.join().unwrap();
        threads.into_iter().map(join).collect()
    });
    let content = executor.block_on(disk.read_all()).unwrap();
    for sector in 0..SIZE / SECTOR as u64 {
        let at = sector as usize * SECTOR..(sector as usize + 1) * SECTOR;
        let owner = &expected[owner(sector) as usize];
        assert!(content[at.clone()] == owner[at], "sector {sector:#x}");
    }
    executor.block_on(disk.close()).unwrap();
    let bytes = std::fs::read(path).unwrap();
    assert_eq!(Checker::new(&bytes).check(), Default::default());
}

fn owner(sector: u64) -> u64 {
    sector / STRIPE % THREADS
}

/// Writes, zeroes and reads sectors of one thread; gives what the disk must hold there.
fn work(node: &Arc<Node>, number: u64, seed: u64) -> Vec<u8> {
    let executor = Executor::new(&Config::default()).unwrap();
    let root = Root::new("test", node, Permissions::ALL, Permissions::ALL).unwrap();
    let root = root.attach();
    let mut random = SmallRng::seed_from_u64(seed ^ number);
    let mut expected = vec![0; SIZE as usize];
    executor.block_on(async {
        for round in 0..600_u32 {
            let stripes = SIZE / SECTOR as u64 / STRIPE / THREADS;
            let stripe = random.random_range(0..stripes) * THREADS + number;
            let range = ByteRange::new(stripe * STRIPE * SECTOR as u64, STRIPE * SECTOR as u64);
            let held = range.offset as usize..(range.offset + range.length) as usize;
            match random.random_range(0..10) {
                0..6 => {
                    let fill = (round + 1) as u8;
                    let buffer = Buffer::zeroed(range.length as usize);
                    buffer.fill(fill);
                    let written = root.write(range.offset, buffer, WriteFlags::default());
                    written.await.unwrap();
                    expected[held].fill(fill);
                }
                6 => {
                    let zeroed = root.write_zeroes(range, ZeroFlags::default());
                    zeroed.await.unwrap();
                    expected[held].fill(0);
                }
                7 => root.flush().await.unwrap(),
                _ => {
                    let buffer = Buffer::zeroed(range.length as usize);
                    root.read(range.offset, buffer.clone()).await.unwrap();
                    assert!(buffer.to_heap()[..] == expected[held], "round {round}");
                }
            }
        }
    });
    expected
}
