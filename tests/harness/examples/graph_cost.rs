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
/// Requests timed together: short enough that other work on the machine misses some batches.
const BATCH: u64 = 256;

async fn measure(name: &str, mut step: impl AsyncFnMut(u64)) {
    let limit = Duration::from_millis(300);
    let (start, cpu) = (Instant::now(), cpu_time());
    let (mut calls, mut least) = (0u64, Duration::MAX);
    while start.elapsed() < limit {
        let batch = Instant::now();
        for _ in 0..BATCH {
            step(scattered(calls)).await;
            calls += 1;
        }
        least = least.min(batch.elapsed());
    }
    let each = start.elapsed().as_nanos() as f64 / calls as f64;
    let cpu = (cpu_time() - cpu).as_nanos() as f64 / calls as f64;
    let least = least.as_nanos() as f64 / BATCH as f64;
    println!("{name:<32} {each:>9.1} ns {cpu:>9.1} ns CPU {least:>9.1} ns in the best batch");
}

/// The block of the `call`-th request: any of them, in no order.
fn scattered(call: u64) -> u64 {
    let block = call.wrapping_mul(2_862_933_555_777_941_757) >> 33;
    block % (LENGTH / BLOCK as u64) * BLOCK as u64
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
    if root.can_prefetch() {
        let mut call = 0;
        measure(&format!("{name}: read, announced"), async |offset| {
            call += 1;
            root.prefetch(scattered(call));
            black_box(root.read(offset, buffer.clone()).await).unwrap();
        })
        .await;
    }
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

/// What `step` on the second root costs more than on the first, batch by batch in turns: other work
/// on the machine slows neighbouring batches down alike, and the median leaves out the rest.
async fn compare(name: &str, roots: [&RootHandle; 2], step: impl AsyncFn(&RootHandle, u64)) {
    let (start, mut calls) = (Instant::now(), 0u64);
    let mut pairs = Vec::new();
    while start.elapsed() < Duration::from_secs(2) {
        let mut batches = [0.0; 2];
        for (root, batch) in roots.iter().zip(&mut batches) {
            let start = Instant::now();
            for call in calls..calls + BATCH {
                step(root, call).await;
            }
            *batch = start.elapsed().as_nanos() as f64 / BATCH as f64;
        }
        calls += BATCH;
        pairs.push(batches);
    }
    let median = |of: fn(&[f64; 2]) -> f64| {
        let mut values: Vec<f64> = pairs.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let (first, more) = (median(|pair| pair[0]), median(|pair| pair[1] - pair[0]));
    println!("{name:<32} {first:>9.1} ns {more:>+9.1} ns");
}

async fn qcow2_against_raw(memory: &tempfile::TempDir) {
    let (_raw, raw) = open(image(memory, "raw", false)).await;
    let (_qcow2, qcow2) = open(image(memory, "qcow2", false)).await;
    let roots = [&raw, &qcow2];
    let data = Buffer::zeroed(1 << 20);
    data.fill(1);
    for root in roots {
        for offset in (0..LENGTH).step_by(data.len()) {
            let write = root.write(offset, data.clone(), WriteFlags::default());
            write.await.unwrap();
        }
        root.flush().await.unwrap();
    }
    let buffer = Buffer::zeroed(BLOCK);
    compare("qcow2 over raw: read", roots, async |root, call| {
        let read = root.read(scattered(call), buffer.clone());
        black_box(read.await).unwrap();
    })
    .await;
    compare(
        "qcow2 over raw: read, announced",
        roots,
        async |root, call| {
            root.prefetch(scattered(call + 1));
            let read = root.read(scattered(call), buffer.clone());
            black_box(read.await).unwrap();
        },
    )
    .await;
    compare("qcow2 over raw: announcement", roots, async |root, call| {
        root.prefetch(scattered(call));
    })
    .await;
    compare("qcow2 over raw: write", roots, async |root, call| {
        let write = root.write(scattered(call), buffer.clone(), WriteFlags::default());
        black_box(write.await).unwrap();
    })
    .await;
    let sector = Buffer::zeroed(512);
    compare("qcow2 over raw: read of 512", roots, async |root, call| {
        let read = root.read(scattered(call), sector.clone());
        black_box(read.await).unwrap();
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
        let memory = tempfile::TempDir::new_in("/dev/shm").unwrap();
        qcow2_against_raw(&memory).await;
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
