//! Where data lands in the file, and in how many writes.

use super::rig::{self, Disk, Setup};
use crate::qcow2::CreateOptions;
use block::{ByteRange, ZeroFlags};
use executor::Executor;
use executor::sim::{Config, World};
use std::path::Path;

const PATH: &str = "disk.qcow2";
const CLUSTER: u64 = 4096;

/// Runs `work` on a new image of 64 clusters.
fn on_new_image(work: impl AsyncFnOnce(&Disk, &World)) {
    on_image_of(CreateOptions::new(64 * CLUSTER), work);
}

fn on_image_of(options: CreateOptions, work: impl AsyncFnOnce(&Disk, &World)) {
    let world = World::new(Config::default());
    Executor::simulated(&world).block_on(async {
        let options = CreateOptions {
            cluster_size: CLUSTER,
            ..options
        };
        rig::make(Path::new(PATH), &options).await;
        let disk = Disk::open(Path::new(PATH), Setup::default()).await.unwrap();
        work(&disk, &world).await;
        disk.close().await.unwrap();
    });
}

/// Where the guest's cluster `number` is in the file.
async fn place(disk: &Disk, number: u64) -> Option<u64> {
    let range = ByteRange::new(number * CLUSTER, CLUSTER);
    disk.node.block_status(range).await.unwrap().status.offset
}

#[test]
fn data_and_zeroes_with_neighbouring_storage_are_one_write() {
    on_new_image(async |disk, world| {
        disk.write(0, &[1; 4 * CLUSTER as usize]).await.unwrap();
        let first = place(disk, 0).await.unwrap();
        let keeping = ZeroFlags::default();
        let zeroed = disk
            .root
            .write_zeroes(ByteRange::new(CLUSTER, CLUSTER), keeping);
        zeroed.await.unwrap();
        let before = world.op_count();
        // From within the first cluster to within the last.
        let (start, length) = (512, 4 * CLUSTER as usize - 1024);
        disk.write(start, &vec![2; length]).await.unwrap();
        assert_eq!(world.op_count() - before, 1);
        for number in 0..4 {
            assert_eq!(place(disk, number).await, Some(first + number * CLUSTER));
        }
        let mut expected = vec![1; 4 * CLUSTER as usize];
        expected[start as usize..][..length].fill(2);
        assert_eq!(disk.read(0, expected.len()).await.unwrap(), expected);
    });
}

#[test]
fn zeroes_whose_storage_is_elsewhere_are_a_write_of_their_own() {
    on_new_image(async |disk, world| {
        for number in [0, 2, 1] {
            disk.write(number * CLUSTER, &[1; CLUSTER as usize])
                .await
                .unwrap();
        }
        let keeping = ZeroFlags::default();
        let zeroed = disk
            .root
            .write_zeroes(ByteRange::new(CLUSTER, CLUSTER), keeping);
        zeroed.await.unwrap();
        let before = world.op_count();
        let bytes = [2; 3 * CLUSTER as usize];
        disk.write(0, &bytes).await.unwrap();
        assert_eq!(world.op_count() - before, 3);
        assert_eq!(disk.read(0, bytes.len()).await.unwrap(), bytes);
    });
}

#[test]
fn a_write_passes_holes_by_that_are_too_short_for_it() {
    on_new_image(async |disk, _| {
        disk.write(0, &[1; 8 * CLUSTER as usize]).await.unwrap();
        let first = place(disk, 0).await.unwrap();
        let drop = async |number: u64| {
            let range = ByteRange::new(number * CLUSTER, CLUSTER);
            disk.root.discard(range).await.unwrap();
            // A flush is a request itself: the one after it finds everything older ended.
            disk.root.flush().await.unwrap();
            disk.root.flush().await.unwrap();
        };
        drop(2).await;
        disk.write(20 * CLUSTER, &[2; 2 * CLUSTER as usize])
            .await
            .unwrap();
        assert_eq!(place(disk, 20).await, Some(first + 8 * CLUSTER));
        // What is freed has the search begin before it.
        drop(1).await;
        disk.write(30 * CLUSTER, &[3; 2 * CLUSTER as usize])
            .await
            .unwrap();
        assert_eq!(place(disk, 30).await, Some(first + CLUSTER));
        assert_eq!(place(disk, 31).await, Some(first + 2 * CLUSTER));
    });
}

#[test]
fn a_write_stays_in_one_piece_where_a_refcount_block_is_made() {
    let options = CreateOptions {
        refcount_bits: 64,
        ..CreateOptions::new(1024 * CLUSTER)
    };
    on_image_of(options, async |disk, _| {
        let covered = CLUSTER / 8 * CLUSTER;
        let written = 16 * CLUSTER;
        let mut crossed = 0;
        for offset in (0..800 * CLUSTER).step_by(written as usize) {
            disk.write(offset, &vec![1; written as usize])
                .await
                .unwrap();
            let first = place(disk, offset / CLUSTER).await.unwrap();
            for number in 0..written / CLUSTER {
                let found = place(disk, offset / CLUSTER + number).await;
                assert_eq!(found, Some(first + number * CLUSTER));
            }
            crossed += u64::from(first / covered != (first + written - 1) / covered);
        }
        assert_eq!(crossed, 1, "the test must have a write over the edge");
    });
}
