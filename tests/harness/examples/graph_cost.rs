//! What a request through the graph costs on this machine, in nanoseconds.
//!
//! `cargo run --release -p harness --example graph_cost [DIRECTORY ON A DISK]`
#![expect(clippy::unwrap_used, reason = "a measuring tool")]

use block::graph::{Graph, NamePolicy};
use block::{Buffer, Permissions, Root, RootHandle, WriteFlags};
use executor::{Config, Executor};
use serde_json::{Value, json};
use std::hint::black_box;
use std::time::{Duration, Instant};

const BLOCK: usize = 4096;
const LENGTH: u64 = 64 << 20;

async fn measure(name: &str, mut step: impl AsyncFnMut(u64)) {
    let limit = Duration::from_millis(300);
    let (start, cpu) = (Instant::now(), cpu_time());
    let mut calls = 0u64;
    while start.elapsed() < limit {
        for _ in 0..64 {
            let block = calls.wrapping_mul(2_862_933_555_777_941_757) >> 33;
            step(block % (LENGTH / BLOCK as u64) * BLOCK as u64).await;
            calls += 1;
        }
    }
    let each = start.elapsed().as_nanos() as f64 / calls as f64;
    let cpu = (cpu_time() - cpu).as_nanos() as f64 / calls as f64;
    println!("{name:<32} {each:>9.1} ns {cpu:>9.1} ns CPU");
}

fn cpu_time() -> Duration {
    let clock = nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID;
    nix::time::clock_gettime(clock).unwrap().into()
}

async fn open(definition: Value) -> (Graph, RootHandle) {
    let graph = Graph::new(
        &[protocols::DRIVERS, formats::DRIVERS],
        NamePolicy::default(),
    );
    let Value::Object(definition) = definition else {
        panic!("an object");
    };
    let node = graph.add(definition).await.unwrap();
    let root = Root::new("", &node, Permissions::READ_WRITE, Permissions::ALL).unwrap();
    (graph, root.attach())
}

async fn read_and_write(name: &str, definition: Value) {
    let (_graph, root) = open(definition).await;
    let data = Buffer::zeroed(1 << 20);
    data.fill(1);
    for offset in (0..LENGTH).step_by(data.len()) {
        let write = root.write(offset, data.clone(), WriteFlags::default());
        write.await.unwrap();
    }
    let buffer = Buffer::zeroed(BLOCK);
    measure(&format!("{name}: read"), async |offset| {
        black_box(root.read(offset, buffer.clone()).await).unwrap();
    })
    .await;
    let flags = WriteFlags::default();
    measure(&format!("{name}: write"), async |offset| {
        black_box(root.write(offset, buffer.clone(), flags).await).unwrap();
    })
    .await;
    measure(&format!("{name}: flush"), async |_| {
        black_box(root.flush().await).unwrap();
    })
    .await;
}

fn main() {
    let directory = std::env::args().nth(1);
    Executor::new(&Config::default()).unwrap().block_on(async {
        measure("nothing", async |offset| {
            black_box(offset);
        })
        .await;
        let buffer = Buffer::zeroed(BLOCK);
        measure("a buffer's clone", async |_| {
            drop(black_box(buffer.clone()))
        })
        .await;
        read_and_write("null-co", json!({"driver": "null-co", "node-name": "n"})).await;
        let raw = json!({"driver": "raw", "node-name": "r", "file": {"driver": "null-co"}});
        read_and_write("raw on null-co", raw).await;
        measure("epoch pin", async |_| drop(black_box(block::epoch::pin()))).await;
        let memory = tempfile::TempDir::new_in("/dev/shm").unwrap();
        let on_tmpfs = |format| image(&memory, format, false);
        read_and_write("raw on tmpfs", on_tmpfs("raw")).await;
        read_and_write("qcow2 on tmpfs", on_tmpfs("qcow2")).await;
        if let Some(directory) = directory {
            let disk = tempfile::TempDir::new_in(directory).unwrap();
            read_and_write("raw on O_DIRECT", image(&disk, "raw", true)).await;
        }
    });
}

fn image(directory: &tempfile::TempDir, format: &str, direct: bool) -> Value {
    let path = directory.path().join(format);
    harness::peer::create(format, &path, LENGTH, "").unwrap();
    json!({"driver": format, "node-name": "r", "cache": {"direct": direct},
        "file": {"driver": "file", "filename": path}})
}
