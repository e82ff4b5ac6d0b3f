//! One disk, several threads: every node may be entered from any of them at any time.

use crate::rig::{filled, graph, open_root, options, read, run};
use block::{ByteRange, Root, WriteFlags, ZeroFlags};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use std::path::Path;
use std::process::Command;
use std::rc::Rc;
use tempfile::TempDir;

const THREADS: u64 = 4;
/// Requests of a thread at a time.
const DEPTH: u64 = 8;
const LENGTH: u64 = 8 << 20;
/// Smaller than any cluster or block: threads and tasks share all of them.
const GRAIN: u64 = 512;

/// Writes, zeroes and reads back sectors that belong to one task.
async fn task(root: Rc<block::RootHandle>, number: u64, seed: u64) {
    let mut random = SmallRng::seed_from_u64(seed << 8 | number);
    let lane = THREADS * DEPTH;
    let mut model = vec![None; (LENGTH / GRAIN / lane) as usize];
    for step in 0..150 {
        let index = random.random_range(0..model.len());
        let offset = (index as u64 * lane + number) * GRAIN;
        match random.random_range(0..8) {
            0..4 => {
                let byte = (step % 255 + 1) as u8;
                let write = root.write(
                    offset,
                    filled(&[byte; GRAIN as usize]),
                    WriteFlags::default(),
                );
                write.await.unwrap();
                model[index] = Some(byte);
            }
            4 => {
                let range = ByteRange::new(offset, GRAIN);
                root.write_zeroes(range, ZeroFlags::default())
                    .await
                    .unwrap();
                model[index] = Some(0);
            }
            5 => root.flush().await.unwrap(),
            _ => {
                let bytes = read(&root, offset, GRAIN as usize).await.unwrap();
                let expected = model[index].unwrap_or(0);
                assert!(bytes.iter().all(|b| *b == expected), "seed {seed}");
            }
        }
    }
    for (index, expected) in model.into_iter().enumerate() {
        let offset = (index as u64 * lane + number) * GRAIN;
        let bytes = read(&root, offset, GRAIN as usize).await.unwrap();
        assert!(
            bytes.iter().all(|b| *b == expected.unwrap_or(0)),
            "seed {seed}"
        );
    }
}

fn thread(root: Root, first: u64, seed: u64) {
    run(async {
        let root = Rc::new(root.attach());
        let tasks: Vec<_> = (first..first + DEPTH)
            .map(|number| executor::spawn(task(Rc::clone(&root), number, seed)))
            .collect();
        for task in tasks {
            task.await;
        }
    });
}

fn hammer(definition: Value, seed: u64) {
    println!("seed {seed}");
    run(async {
        let graph = graph();
        let node = graph.add(options(definition)).await.unwrap();
        let name = node.name().to_owned();
        let root = open_root(&node);
        let threads: Vec<_> = (0..THREADS)
            .map(|number| {
                let root = root.clone();
                std::thread::spawn(move || thread(root, number * DEPTH, seed))
            })
            .collect();
        // Drains come in between; draining is the only thing that waits for the threads.
        for _ in 0..20 {
            drop(root.drain().await);
            executor::time::sleep(std::time::Duration::from_millis(2)).await;
        }
        for thread in threads {
            thread.join().unwrap();
        }
        drop((root, node));
        graph.remove(&name).await.unwrap();
    });
}

fn place(direct: bool) -> TempDir {
    match direct {
        true => TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap(),
        false => TempDir::new_in("/dev/shm").unwrap(),
    }
}

#[test]
fn threads_share_a_raw_file() {
    for direct in [false, true] {
        let directory = place(direct);
        let path = directory.path().join("image");
        std::fs::File::create(&path)
            .unwrap()
            .set_len(LENGTH)
            .unwrap();
        hammer(
            json!({"driver": "raw", "node-name": "r", "cache": {"direct": direct},
                "file": {"driver": "file", "filename": path}}),
            1,
        );
    }
}

fn check(path: &Path) {
    let output = Command::new("qemu-img")
        .arg("check")
        .arg(path)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn threads_share_a_qcow2_image_that_grows() {
    for (direct, seed) in [(false, 2), (false, 3), (true, 4)] {
        let directory = place(direct);
        let path = directory.path().join("image");
        let created = Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-o", "cluster_size=16k"])
            .arg(&path)
            .arg(LENGTH.to_string())
            .status();
        assert!(
            created
                .expect("scripts/setup installs QEMU's tools")
                .success()
        );
        hammer(
            json!({"driver": "qcow2", "node-name": "q", "cache": {"direct": direct},
                "discard": "unmap", "file": {"driver": "file", "filename": path}}),
            seed,
        );
        check(&path);
    }
}
