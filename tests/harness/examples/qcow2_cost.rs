//! What requests to a qcow2 image on tmpfs cost on this machine, in nanoseconds: cold writes, each
//! of which allocates, and reads and writes of what is mapped.
//!
//! `cargo run --release -p harness --example qcow2_cost [cold|read|write]`; one name for a profiler.
#![expect(clippy::unwrap_used, reason = "a measuring tool")]

use block::graph::{Graph, NamePolicy};
use block::{Buffer, Permissions, Root, RootHandle, WriteFlags};
use executor::{Config, Executor};
use serde_json::{Value, json};
use std::hint::black_box;
use std::path::Path;
use std::process::Command;
use std::rc::Rc;
use std::time::Instant;

const CLUSTER: u64 = 64 << 10;
const CLUSTERS: u64 = 16_384;
const DEPTH: u64 = 32;

/// The `number`-th cluster of a walk through all of them in no order.
fn scattered(number: u64) -> u64 {
    number * 7_919 % CLUSTERS * CLUSTER
}

async fn open(path: &Path) -> (Graph, RootHandle) {
    let graph = Graph::new(
        &[protocols::DRIVERS, formats::DRIVERS],
        NamePolicy::default(),
    );
    let definition = json!({"driver": "qcow2", "node-name": "q",
        "file": {"driver": "file", "filename": path}});
    let Value::Object(definition) = definition else {
        panic!("an object");
    };
    let node = graph.add(definition).await.unwrap();
    let root = Root::new("", &node, Permissions::READ_WRITE, Permissions::ALL).unwrap();
    (graph, root.attach())
}

/// `count` requests, `DEPTH` at a time.
async fn measure(name: &str, count: u64, step: impl AsyncFn(u64) + 'static) {
    let step = Rc::new(step);
    let start = Instant::now();
    let tasks: Vec<_> = (0..DEPTH)
        .map(|lane| {
            let step = Rc::clone(&step);
            executor::spawn(async move {
                for number in (lane..count).step_by(DEPTH as usize) {
                    step(number).await;
                }
            })
        })
        .collect();
    for task in tasks {
        task.await;
    }
    let each = start.elapsed().as_nanos() as f64 / count as f64;
    println!("{name:<32} {each:>9.1} ns");
}

fn create(path: &Path) {
    let size = (CLUSTER * CLUSTERS).to_string();
    let status = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(path)
        .arg(size)
        .status();
    assert!(status.unwrap().success());
}

fn main() {
    let only = std::env::args().nth(1);
    let wanted = |name: &str| only.as_deref().is_none_or(|only| only == name);
    let directory = tempfile::TempDir::new_in("/dev/shm").unwrap();
    let path = directory.path().join("image");
    create(&path);
    Executor::new(&Config::default()).unwrap().block_on(async {
        let (_graph, root) = open(&path).await;
        let root = Rc::new(root);
        let transfer = |length: usize, offset: fn(u64) -> u64| {
            let (root, buffer) = (Rc::clone(&root), Buffer::zeroed(length));
            async move |number| {
                let write = root.write(offset(number), buffer.clone(), WriteFlags::default());
                black_box(write.await).unwrap();
            }
        };
        if wanted("cold") || wanted("write") || wanted("read") {
            let cold = transfer(4096, scattered);
            measure("cold random write, 4 KiB", CLUSTERS / 2, cold).await;
        }
        if wanted("write") {
            let warm = transfer(4096, |number| scattered(number % (CLUSTERS / 2)));
            measure("random write in place, 4 KiB", CLUSTERS * 16, warm).await;
        }
        if wanted("read") {
            let (root, buffer) = (Rc::clone(&root), Buffer::zeroed(4096));
            let read = async move |number| {
                let offset = scattered(number % (CLUSTERS / 2));
                black_box(root.read(offset, buffer.clone()).await).unwrap();
            };
            measure("random read, 4 KiB", CLUSTERS * 16, read).await;
        }
    });
    if wanted("sequential") {
        std::fs::remove_file(&path).unwrap();
        create(&path);
        Executor::new(&Config::default()).unwrap().block_on(async {
            let (_graph, root) = open(&path).await;
            let buffer = Buffer::zeroed(CLUSTER as usize);
            let write = async move |number| {
                let offset = number * CLUSTER;
                let write = root.write(offset, buffer.clone(), WriteFlags::default());
                black_box(write.await).unwrap();
            };
            measure("cold sequential write, 64 KiB", CLUSTERS / 2, write).await;
        });
    }
}
