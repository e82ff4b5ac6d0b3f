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
    let world = World::new(Config::default());
    Executor::simulated(&world).block_on(async {
        let options = CreateOptions {
            cluster_size: CLUSTER,
            ..CreateOptions::new(64 * CLUSTER)
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
