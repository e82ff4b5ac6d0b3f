//! Draining roots, within a thread and across threads.

use crate::rig::{filled, graph, open_root, options, run};
use block::{Buffer, Node, Root, WriteFlags};
use executor::{Config, Executor, Handle};
use serde_json::json;
use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;

async fn slow_node() -> Arc<Node> {
    let definition = json!({"driver": "null-co", "node-name": "n", "latency-ns": 2_000_000});
    graph().add(options(definition)).await.unwrap()
}

#[test]
fn a_drain_waits_for_what_is_in_flight() {
    run(async {
        let root = open_root(&slow_node().await);
        let handle = Rc::new(root.attach());
        let done = Rc::new(Cell::new(0));
        for _ in 0..8 {
            let (handle, done) = (Rc::clone(&handle), Rc::clone(&done));
            executor::spawn(async move {
                handle.read(0, Buffer::zeroed(4096)).await.unwrap();
                done.set(done.get() + 1);
            });
        }
        // One more, so that the others have begun.
        handle.read(0, Buffer::zeroed(4096)).await.unwrap();
        let drained = root.drain().await;
        assert_eq!(done.get(), 8);
        assert_eq!(handle.in_flight(), 0);
        drop(drained);
    });
}

#[test]
fn requests_that_come_while_drained_wait_for_the_last_resume() {
    run(async {
        let root = open_root(&slow_node().await);
        let handle = Rc::new(root.attach());
        let outer = root.drain().await;
        let inner = root.drain().await;
        let done = Rc::new(Cell::new(false));
        let task = {
            let (handle, done) = (Rc::clone(&handle), Rc::clone(&done));
            executor::spawn(async move {
                let data = filled(&[1; 4096]);
                handle.write(0, data, WriteFlags::default()).await.unwrap();
                done.set(true);
            })
        };
        // A root attached while drained waits as well.
        let late = root.attach();
        drop(outer);
        executor::time::sleep(std::time::Duration::from_millis(5)).await;
        assert!(!done.get());
        assert_eq!(handle.in_flight() + late.in_flight(), 0);
        drop(inner);
        task.await;
        assert!(done.get());
        late.read(0, Buffer::zeroed(512)).await.unwrap();
    });
}

#[test]
fn an_abandoned_request_does_not_hold_a_drain() {
    run(async {
        let root = open_root(&slow_node().await);
        let handle = root.attach();
        {
            let read = handle.read(0, Buffer::zeroed(4096));
            assert!(read.ready().is_none());
            assert_eq!(handle.in_flight(), 1);
        }
        assert_eq!(handle.in_flight(), 0);
        drop(root.drain().await);
    });
}

#[test]
fn a_drain_waits_for_what_an_abandoned_write_left_with_the_kernel() {
    let directory = tempfile::TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = directory.path().join("image");
    std::fs::write(&path, vec![0; 1 << 20]).unwrap();
    run(async {
        let definition = json!({"driver": "file", "node-name": "f", "filename": path,
            "cache": {"direct": true}});
        let graph = graph();
        let node = graph.add(options(definition)).await.unwrap();
        let root = open_root(&node);
        let handle = root.attach();
        drop(handle.write(0, filled(&[7; 1 << 20]), WriteFlags::default()));
        assert_eq!(handle.in_flight(), 1);
        drop(handle);
        drop(root.drain().await);
        assert_eq!(std::fs::read(&path).unwrap(), vec![7; 1 << 20]);
    });
}

/// A thread that reads in a loop and counts, until told to stop.
fn reader(root: Root, stop: Arc<AtomicBool>, reads: Arc<AtomicU64>) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        run(async move {
            let handle = root.attach();
            while !stop.load(Ordering::Relaxed) {
                handle.read(0, Buffer::zeroed(4096)).await.unwrap();
                reads.fetch_add(1, Ordering::Relaxed);
            }
        });
    })
}

#[test]
fn a_drain_stops_every_thread_until_it_ends() {
    run(async {
        let definition = json!({"driver": "null-co", "node-name": "n", "latency-ns": 10_000});
        let graph = graph();
        let node = graph.add(options(definition)).await.unwrap();
        let root = open_root(&node);
        let stop = Arc::new(AtomicBool::new(false));
        let counts: Vec<_> = (0..3).map(|_| Arc::new(AtomicU64::new(0))).collect();
        let threads: Vec<_> = counts
            .iter()
            .map(|count| reader(root.clone(), Arc::clone(&stop), Arc::clone(count)))
            .collect();
        let total = || {
            counts
                .iter()
                .map(|c| c.load(Ordering::Relaxed))
                .sum::<u64>()
        };
        for _ in 0..20 {
            let before = total();
            while total() < before + 10 {
                executor::time::sleep(std::time::Duration::from_micros(100)).await;
            }
            let drained = root.drain().await;
            let nested = root.drain().await;
            let during = total();
            drop(drained);
            executor::time::sleep(std::time::Duration::from_millis(1)).await;
            assert_eq!(total(), during);
            drop(nested);
        }
        stop.store(true, Ordering::Relaxed);
        for thread in threads {
            thread.join().unwrap();
        }
        // Threads that are gone hold nothing up.
        drop(root.drain().await);
    });
}

#[test]
fn an_executor_that_ends_does_not_hold_a_drain() {
    let (tx, rx) = mpsc::channel();
    let node = run(slow_node());
    let root = open_root(&node);
    let other = root.clone();
    let thread = std::thread::spawn(move || {
        let executor = Executor::new(&Config::default()).unwrap();
        executor.block_on(async move {
            let handle = other.attach();
            executor::spawn(async move {
                handle.read(0, Buffer::zeroed(4096)).await.unwrap();
            });
            tx.send(Handle::current()).unwrap();
        });
    });
    let _handle = rx.recv().unwrap();
    thread.join().unwrap();
    run(async move { drop(root.drain().await) });
}
