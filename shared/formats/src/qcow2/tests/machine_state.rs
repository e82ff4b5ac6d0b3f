//! Machine state behind the disk, and zeroes for parts of clusters, on the simulated world.

use super::rig::{self, Disk, Setup};
use crate::qcow2::CreateOptions;
use block::check::Silent;
use block::{Buffer, ByteRange, CheckOptions, Errno, NewSnapshot, Resize, ZeroFlags};
use executor::Executor;
use executor::sim::{Config, World};
use std::path::Path;

const IMAGE: &str = "disk.qcow2";
const CLUSTER: u64 = 4096;
const SIZE: u64 = 4 << 20;

async fn open() -> Disk {
    Disk::open(Path::new(IMAGE), Setup::default())
        .await
        .unwrap()
}

async fn write_state(disk: &Disk, offset: u64, byte: u8) -> Result<(), Errno> {
    let state = disk.node.driver().machine_state().unwrap();
    let bytes = vec![byte; 3 * CLUSTER as usize];
    state.write(offset, Buffer::from(&bytes[..])).await
}

async fn read_state(disk: &Disk, offset: u64) -> Vec<u8> {
    let state = disk.node.driver().machine_state().unwrap();
    let buffer = Buffer::zeroed(3 * CLUSTER as usize);
    state.read(offset, buffer.clone()).await.unwrap();
    buffer.to_heap().to_vec()
}

/// No errors, no leaks.
async fn assert_clean() {
    let file = rig::image_edge(Path::new(IMAGE));
    let checked = crate::qcow2::check(&file, CheckOptions::default(), &mut Silent).await;
    let result = checked.unwrap();
    let found = (result.corruptions, result.check_errors, result.leaks);
    assert_eq!(found, (0, 0, 0), "{result:?}");
}

fn on_an_image(life: impl AsyncFnOnce()) {
    let world = World::new(Config::default());
    Executor::simulated(&world).block_on(async {
        let options = CreateOptions {
            cluster_size: CLUSTER,
            ..CreateOptions::new(SIZE)
        };
        rig::make(Path::new(IMAGE), &options).await;
        life().await;
        assert_clean().await;
    });
}

#[test]
fn machine_state_belongs_to_the_snapshot_taken_of_it() {
    on_an_image(async || {
        let disk = open().await;
        let far = 40 << 20;
        for at in [100, far] {
            write_state(&disk, at, 1).await.unwrap();
        }
        let taken = disk.snapshots().create(NewSnapshot::now("s")).await;
        for at in [100, far] {
            write_state(&disk, at, 2).await.unwrap();
        }
        disk.write(0, &[7; 512]).await.unwrap();
        disk.close().await.unwrap();
        assert_clean().await;
        let disk = open().await;
        assert_eq!(read_state(&disk, far).await, [2; 3 * CLUSTER as usize]);
        disk.snapshots().apply(&taken.unwrap().id).await.unwrap();
        for at in [100, far] {
            assert_eq!(read_state(&disk, at).await, [1; 3 * CLUSTER as usize]);
        }
        assert_eq!(disk.read(0, 512).await.unwrap(), [0; 512]);
        disk.close().await.unwrap();
    });
}

#[test]
fn a_disk_that_shrinks_gives_its_machine_state_back() {
    on_an_image(async || {
        let disk = open().await;
        write_state(&disk, 0, 1).await.unwrap();
        let resize = Resize::to(SIZE / 2);
        disk.node.resize(resize).await.unwrap();
        assert_eq!(read_state(&disk, 0).await, [0; 3 * CLUSTER as usize]);
        disk.close().await.unwrap();
    });
}

#[test]
fn machine_state_never_shows_when_the_disk_grows_over_it() {
    on_an_image(async || {
        let disk = open().await;
        let start = disk.node.driver().machine_state().unwrap().offset();
        write_state(&disk, 0, 1).await.unwrap();
        let resize = Resize::to(start + (1 << 20));
        disk.node.resize(resize).await.unwrap();
        let shown = disk.read(start, 3 * CLUSTER as usize).await.unwrap();
        assert_eq!(shown, [0; 3 * CLUSTER as usize]);
        disk.close().await.unwrap();
    });
}

#[test]
fn machine_state_too_far_away_is_refused() {
    on_an_image(async || {
        let disk = open().await;
        for at in [1 << 62, u64::MAX - CLUSTER] {
            let refused = write_state(&disk, at, 1).await;
            assert_eq!(refused, Err(Errno::EFBIG));
        }
        disk.close().await.unwrap();
    });
}

#[test]
fn zeroes_for_a_part_of_a_cluster_take_no_space_where_the_rest_reads_as_zeroes() {
    on_an_image(async || {
        let disk = open().await;
        let zero = async |offset, length| {
            let range = ByteRange::new(offset, length);
            disk.root.write_zeroes(range, ZeroFlags::default()).await
        };
        disk.write(CLUSTER, &[5; 512]).await.unwrap();
        zero(512, 1024).await.unwrap();
        zero(CLUSTER + 1024, 1024).await.unwrap();
        zero(2 * CLUSTER + 3072, 2048).await.unwrap();
        let status = async |cluster: u64| {
            let range = ByteRange::new(cluster * CLUSTER, CLUSTER);
            disk.node.block_status(range).await.unwrap().status
        };
        for cluster in [0, 2, 3] {
            let status = status(cluster).await;
            assert!(status.zero && status.allocated && !status.data, "{cluster}");
        }
        assert!(status(1).await.data);
        assert_eq!(disk.read(CLUSTER, 512).await.unwrap(), [5; 512]);
        disk.close().await.unwrap();
    });
}
