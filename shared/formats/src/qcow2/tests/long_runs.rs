//! Tables that are longer than what a refcount block covers.

use super::change::{cut, each_cut};
use super::checker::Checker;
use super::rig::{self, Disk, Setup};
use super::workload::pattern;
use crate::qcow2::CreateOptions;
use block::Resize;
use executor::Executor;
use executor::sim::{Config, Subset, World};
use std::path::Path;

const IMAGE: &str = "disk.qcow2";
const CLUSTER: u64 = 512;
/// Of the disk at first: one L1 entry covers 32 KiB.
const SIZE: u64 = 1 << 20;
/// Needs an L1 table of 80 clusters; a refcount block covers 64.
const LARGE: u64 = 160 << 20;

/// A world with a closed image, and the content of its disk.
fn world() -> (World, Vec<u8>) {
    let config = Config::default();
    let world = World::new(config.clone());
    let options = CreateOptions {
        cluster_size: CLUSTER,
        refcount_bits: 64,
        ..CreateOptions::new(SIZE)
    };
    let content = Executor::simulated(&world).block_on(async {
        rig::make(Path::new(IMAGE), &options).await;
        let disk = Disk::open(Path::new(IMAGE), Setup::default())
            .await
            .unwrap();
        let bytes = pattern(1, 100 * CLUSTER as usize);
        disk.write(7 * CLUSTER, &bytes).await.unwrap();
        let content = disk.read_all().await.unwrap();
        disk.close().await.unwrap();
        content
    });
    let all = cut(world.log_len(), Subset::All);
    (world.restart(&all, config), content)
}

#[test]
fn an_l1_table_longer_than_a_refcount_block_covers_survives_a_power_cut() {
    let (world, content) = world();
    Executor::simulated(&world).block_on(async {
        let disk = Disk::open(Path::new(IMAGE), Setup::default())
            .await
            .unwrap();
        let larger = Resize::to(LARGE);
        disk.node.resize(larger).await.unwrap();
        disk.write(LARGE - CLUSTER, &[7; CLUSTER as usize])
            .await
            .unwrap();
        assert!(disk.read(0, content.len()).await.unwrap() == content);
        disk.close().await.unwrap();
    });
    let files = world.files();
    let bytes = &files[Path::new(IMAGE)];
    assert_eq!(Checker::new(bytes).check(), Default::default());
    assert!(bytes.len() < 1 << 20, "{} bytes", bytes.len());
    each_cut(&world, |cut| {
        let files = world.power_cut(cut);
        let findings = Checker::new(&files[Path::new(IMAGE)]).check();
        assert!(findings.corruptions.is_empty(), "{cut:?}: {findings:#x?}");
    });
}
