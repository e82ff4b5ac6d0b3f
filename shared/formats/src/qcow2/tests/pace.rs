//! Writers keep their pace: metadata is flushed beside them, before they would have to wait.

use super::rig::{self, Disk, Setup};
use crate::qcow2::CreateOptions;
use block::RedoLog;
use executor::sim::{Config, World};
use executor::{Executor, spawn, time};
use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

const CLUSTER: u64 = 4096;
const TASKS: u64 = 4;
const WRITES_PER_TASK: u64 = 800;

/// Allocates a cluster with every write; how often a writer waited for a flush.
fn allocate_everywhere(log: RedoLog, cache: u64) -> u64 {
    let world = World::new(Config::default());
    Executor::simulated(&world).block_on(async move {
        let path = Path::new("disk.qcow2");
        let clusters = TASKS * WRITES_PER_TASK;
        let size = clusters * CLUSTER * 64;
        let options = CreateOptions {
            cluster_size: CLUSTER,
            ..CreateOptions::new(size)
        };
        rig::make(path, &options).await;
        let setup = Setup {
            log: log.share(),
            cache,
            ..Setup::default()
        };
        let disk = Disk::open(path, setup).await.unwrap();
        let tasks: Vec<_> = (0..TASKS)
            .map(|task| {
                let disk = disk.clone();
                spawn(async move {
                    for write in 0..WRITES_PER_TASK {
                        let place = (write * TASKS + task) * 7919 % clusters;
                        disk.write(place * CLUSTER * 64, &[7; 512]).await.unwrap();
                    }
                })
            })
            .collect();
        for task in tasks {
            task.await;
        }
        let stalls = disk.stalls.load(Relaxed);
        disk.close().await.unwrap();
        stalls
    })
}

#[test]
fn a_small_redo_log_is_emptied_before_it_is_full() {
    // Each write takes some three records, so all of them take five times the log.
    assert_eq!(allocate_everywhere(RedoLog::in_memory(2048), 16 << 20), 0);
}

#[test]
fn a_small_cache_is_cleaned_before_all_of_it_is_dirty() {
    // Writes touch 1600 tables of 4 KiB; a quarter of them fits.
    assert_eq!(allocate_everywhere(RedoLog::in_memory(1 << 16), 4 << 20), 0);
}

#[test]
fn without_room_writers_wait_and_lose_nothing() {
    assert!(allocate_everywhere(RedoLog::in_memory(16), 0) > 0);
}

#[test]
fn an_idle_image_has_no_task() {
    let world = World::new(Config::default());
    Executor::simulated(&world).block_on(async move {
        let path = Path::new("disk.qcow2");
        rig::make(path, &CreateOptions::new(64 << 20)).await;
        let setup = Setup {
            log: RedoLog::in_memory(32),
            ..Setup::default()
        };
        let disk = Disk::open(path, setup).await.unwrap();
        for write in 0..20 {
            disk.write(write << 20, &[1; 512]).await.unwrap();
        }
        // What the last write asked for comes to its end.
        for _ in 0..100 {
            time::sleep(Duration::from_millis(1)).await;
        }
        let operations = world.op_count();
        time::sleep(Duration::from_secs(3600)).await;
        time::sleep(Duration::from_secs(3600)).await;
        assert_eq!(world.op_count(), operations, "hours without a request");
        disk.close().await.unwrap();
    });
}
