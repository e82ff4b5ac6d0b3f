//! Writers keep their pace: metadata is flushed beside them, before they would have to wait.

use super::processor_time;
use super::rig::{self, Disk, Setup};
use crate::qcow2::CreateOptions;
use block::check::Silent;
use block::{BoxFuture, Buffer, CheckOptions, Error, NewSnapshot, RedoLog, Repair, WriteFlags};
use executor::sim::{Config, World};
use executor::{Executor, spawn, time};
use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

const CLUSTER: u64 = 4096;
const TASKS: u64 = 4;
const WRITES_PER_TASK: u64 = 800;

/// One less than an image may have.
const MANY: u64 = 65535;
/// Bytes of a snapshot's entry with a name of five.
const ENTRY: usize = 64;
/// Processor time in a build without optimization.
const MOST_FOR_A_SNAPSHOT: Duration = Duration::from_secs(1);

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

/// An image with as many snapshots as fit beside one more, each with an L1 table of its own.
async fn with_many_snapshots(path: &Path) {
    let options = CreateOptions {
        cluster_size: CLUSTER,
        ..CreateOptions::new(16 << 20)
    };
    rig::make(path, &options).await;
    let node = rig::leaf(path);
    let put = async |at: u64, bytes: &[u8]| {
        let write = node.write(at, Buffer::from(bytes), WriteFlags::default());
        write.await.unwrap();
    };
    // The tables lie behind everything; none has an L2 table.
    let first = node.length().next_multiple_of(CLUSTER);
    let table = first + MANY * CLUSTER;
    let mut entries = Vec::new();
    for number in 0..MANY {
        let mut entry = [0; ENTRY];
        let id = format!("{:05}", number + 1);
        entry[..8].copy_from_slice(&(first + number * CLUSTER).to_be_bytes());
        entry[8..12].copy_from_slice(&8_u32.to_be_bytes());
        entry[12..14].copy_from_slice(&(id.len() as u16).to_be_bytes());
        entry[36..40].copy_from_slice(&16_u32.to_be_bytes());
        entry[48..56].copy_from_slice(&(16_u64 << 20).to_be_bytes());
        entry[56..56 + id.len()].copy_from_slice(id.as_bytes());
        entries.extend_from_slice(&entry);
    }
    put(table, &entries).await;
    put(60, &(MANY as u32).to_be_bytes()).await;
    put(64, &table.to_be_bytes()).await;
    drop(node);
    // Nothing of this is counted yet.
    let file = rig::image_edge(path);
    let options = CheckOptions::repairing(Repair::All);
    let result = crate::qcow2::check(&file, options, &mut Silent)
        .await
        .unwrap();
    assert_eq!(
        (result.corruptions, result.check_errors),
        (0, 0),
        "{result:?}"
    );
}

#[test]
fn one_more_snapshot_beside_tens_of_thousands_takes_no_time() {
    let world = World::new(Config::default());
    Executor::simulated(&world).block_on(async {
        let path = Path::new("disk.qcow2");
        with_many_snapshots(path).await;
        let disk = Disk::open(path, Setup::default()).await.unwrap();
        disk.write(0, &[1; 512]).await.unwrap();
        let timed = async |what: &str, change: BoxFuture<'_, Result<(), Error>>| {
            let begun = processor_time();
            change.await.unwrap();
            let took = processor_time() - begun;
            println!("{what}: {took:?}");
            assert!(took < MOST_FOR_A_SNAPSHOT, "{what}: {took:?}");
        };
        let snapshots = disk.snapshots();
        let create = snapshots.create(NewSnapshot::default());
        timed("create", Box::pin(async { create.await.map(|_| ()) })).await;
        assert_eq!(snapshots.list().len() as u64, MANY + 1);
        timed(
            "write",
            Box::pin(async {
                let written = disk.write(4096, &[2; 512]).await;
                written.map_err(|errno| Error::io("write", errno))
            }),
        )
        .await;
        timed("apply", disk.snapshots().apply("00007")).await;
        timed("delete", snapshots.delete("00007")).await;
        disk.close().await.unwrap();
    });
}
