//! The `quorum` node: what most copies hold is what is read.

use crate::rig::{filled, open_root, options, read, refusal, run};
use block::error::Result;
use block::events::{
    ImageCorrupted, NodeEvents, QuorumBad, QuorumFailed, QuorumOperation, WriteThreshold,
};
use block::graph::{Graph, NamePolicy};
use block::open::ChildRole;
use block::{
    BoxFuture, Buffer, ByteRange, Driver, DriverEntry, Edge, Errno, IoFuture, Node, WriteFlags,
    ZeroFlags,
};
use filters::filter::{Filter, FilterNode};
use serde_json::{Value, json};
use std::path::Path;
use std::sync::{Arc, Mutex};

/// Passes on what it is told to; else `EIO`.
struct Broken {
    file: Edge,
}

static BROKEN: &[DriverEntry] = &[DriverEntry::new("broken", |request| {
    Box::pin(async move {
        let file = request.required_child("file", ChildRole::Filtered).await?;
        let driver: Result<Box<dyn Driver>> = Ok(Box::new(FilterNode(Broken { file })));
        driver
    })
})];

impl Filter for Broken {
    fn name(&self) -> &'static str {
        "broken"
    }
    fn edge(&self) -> &Edge {
        &self.file
    }
    fn read(&self, _offset: u64, _buffer: Buffer) -> IoFuture<'_> {
        IoFuture::error(Errno::EIO)
    }
    fn write(&self, _offset: u64, _buffer: Buffer, _flags: WriteFlags) -> IoFuture<'_> {
        IoFuture::error(Errno::ENOSPC)
    }
    fn flush(&self) -> IoFuture<'_> {
        IoFuture::error(Errno::EIO)
    }
    fn close(&self) -> BoxFuture<'_, std::result::Result<(), Errno>> {
        Box::pin(async { Ok(()) })
    }
}

#[derive(Default)]
struct Heard {
    bad: Mutex<Vec<QuorumBad>>,
    failed: Mutex<Vec<QuorumFailed>>,
}

impl NodeEvents for Heard {
    fn image_corrupted(&self, _event: ImageCorrupted) {}
    fn quorum_bad(&self, event: QuorumBad) {
        self.bad.lock().unwrap().push(event);
    }
    fn quorum_failed(&self, event: QuorumFailed) {
        self.failed.lock().unwrap().push(event);
    }
    fn write_threshold(&self, _node_name: &str, _event: WriteThreshold) {}
}

impl Heard {
    /// The nodes reported as bad since the last time, with what was asked of them.
    fn take_bad(&self) -> Vec<(String, QuorumOperation, Option<Errno>)> {
        let bad = std::mem::take(&mut *self.bad.lock().unwrap());
        let described = bad
            .into_iter()
            .map(|event| (event.node_name, event.operation, event.error));
        described.collect()
    }
    fn take_failures(&self) -> usize {
        std::mem::take(&mut *self.failed.lock().unwrap()).len()
    }
}

fn graph() -> (Graph, Arc<Heard>) {
    let heard = Arc::<Heard>::default();
    let tables = [
        protocols::DRIVERS,
        formats::DRIVERS,
        filters::DRIVERS,
        BROKEN,
    ];
    let graph = Graph::new(&tables, NamePolicy::default()).with_events(heard.clone());
    (graph, heard)
}

/// Three files of 64 KiB.
fn files() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    for name in ["c0", "c1", "c2"] {
        std::fs::write(directory.path().join(name), vec![5; 64 << 10]).unwrap();
    }
    directory
}

fn copy(directory: &Path, name: &str) -> Value {
    json!({"driver": "file", "node-name": name, "filename": directory.join(name)})
}

fn broken(directory: &Path, name: &str) -> Value {
    json!({"driver": "broken", "node-name": name,
        "file": {"driver": "file", "filename": directory.join(name)}})
}

fn quorum(children: &[Value], more: Value) -> Value {
    let mut quorum = json!({"driver": "quorum", "node-name": "q", "vote-threshold": 2,
        "children": children});
    let more = options(more);
    quorum.as_object_mut().unwrap().extend(more);
    quorum
}

fn copies(directory: &Path) -> [Value; 3] {
    ["c0", "c1", "c2"].map(|name| copy(directory, name))
}

async fn write(node: &Node, offset: u64, byte: u8) -> std::result::Result<(), Errno> {
    let data = filled(&[byte; 4096]);
    node.write(offset, data, WriteFlags::default()).await
}

#[test]
fn what_is_written_is_in_every_copy() {
    let directory = files();
    run(async {
        let (graph, heard) = graph();
        let definition = quorum(&copies(directory.path()), json!({}));
        let node = graph.add(options(definition)).await.unwrap();
        write(&node, 4096, 9).await.unwrap();
        let zeroes = ByteRange::new(8192, 4096);
        node.write_zeroes(zeroes, ZeroFlags::default())
            .await
            .unwrap();
        node.flush().await.unwrap();
        assert!(heard.take_bad().is_empty());
    });
    for name in ["c0", "c1", "c2"] {
        let bytes = std::fs::read(directory.path().join(name)).unwrap();
        assert_eq!(bytes[4095..4098], [5, 9, 9], "{name}");
        assert_eq!(bytes[8191..8194], [9, 0, 0], "{name}");
        assert_eq!(bytes.len(), 64 << 10, "{name}");
    }
}

#[test]
fn a_copy_that_differs_is_outvoted_reported_and_rewritten_if_asked_for() {
    for (rewrite, expected) in [(false, 1), (true, 5)] {
        let directory = files();
        let bad = directory.path().join("c1");
        std::fs::write(&bad, vec![1; 64 << 10]).unwrap();
        run(async {
            let (graph, heard) = graph();
            let more = json!({"rewrite-corrupted": rewrite});
            let definition = quorum(&copies(directory.path()), more);
            let node = graph.add(options(definition)).await.unwrap();
            let handle = open_root(&node).attach();
            assert_eq!(read(&handle, 4096, 1024).await.unwrap(), [5; 1024]);
            let reported = ("c1".to_owned(), QuorumOperation::Read, None);
            assert_eq!(heard.take_bad(), [reported]);
            assert_eq!(heard.take_failures(), 0);
        });
        assert_eq!(std::fs::read(&bad).unwrap()[4096], expected);
    }
}

#[test]
fn without_a_majority_nothing_is_read() {
    let directory = files();
    for (name, byte) in [("c1", 1), ("c2", 2)] {
        std::fs::write(directory.path().join(name), vec![byte; 64 << 10]).unwrap();
    }
    run(async {
        let (graph, heard) = graph();
        let definition = quorum(&copies(directory.path()), json!({}));
        let node = graph.add(options(definition)).await.unwrap();
        let handle = open_root(&node).attach();
        assert_eq!(read(&handle, 0, 512).await, Err(Errno::EIO));
        assert_eq!(heard.take_failures(), 1);
    });
}

#[test]
fn copies_that_fail_are_reported_and_count_as_absent() {
    let directory = files();
    let path = directory.path();
    run(async {
        let (graph, heard) = graph();
        let two = [copy(path, "c0"), broken(path, "c1"), copy(path, "c2")];
        let node = graph.add(options(quorum(&two, json!({})))).await.unwrap();
        let handle = open_root(&node).attach();
        assert_eq!(read(&handle, 0, 512).await.unwrap(), [5; 512]);
        write(&node, 0, 7).await.unwrap();
        node.flush().await.unwrap();
        let (name, eio) = ("c1".to_owned(), Some(Errno::EIO));
        let reported = [
            (name.clone(), QuorumOperation::Read, eio),
            (name.clone(), QuorumOperation::Write, Some(Errno::ENOSPC)),
            (name, QuorumOperation::Flush, eio),
        ];
        assert_eq!(heard.take_bad(), reported);
        drop((handle, node));
        graph.remove("q").await.unwrap();

        let one = [copy(path, "c0"), broken(path, "c1"), broken(path, "c2")];
        let node = graph.add(options(quorum(&one, json!({})))).await.unwrap();
        let handle = open_root(&node).attach();
        assert_eq!(read(&handle, 0, 512).await, Err(Errno::EIO));
        assert_eq!(write(&node, 0, 7).await, Err(Errno::ENOSPC));
        assert_eq!(heard.take_failures(), 2);
        drop((handle, node));

        let fifo = json!({"read-pattern": "fifo", "node-name": "fifo"});
        let order = [broken(path, "d1"), copy(path, "d0")];
        std::fs::write(path.join("d0"), vec![8; 64 << 10]).unwrap();
        std::fs::write(path.join("d1"), vec![9; 64 << 10]).unwrap();
        let node = graph.add(options(quorum(&order, fifo))).await.unwrap();
        let handle = open_root(&node).attach();
        assert_eq!(read(&handle, 0, 512).await.unwrap(), [8; 512]);
    });
}

#[test]
fn definitions_that_make_no_sense_are_refused_with_the_peers_words() {
    let two = [json!({"driver": "null-co"}), json!({"driver": "null-co"})];
    let three = [two[0].clone(), two[0].clone(), two[0].clone()];
    let twofold =
        "blkverify=on can only be set if there are exactly two files and vote-threshold is 2";
    let cases = [
        (&two[..0], json!({}), "Parameter 'children' is missing"),
        (
            &two[..],
            json!({"vote-threshold": 0}),
            "Parameter 'vote-threshold' expects a value >= 1",
        ),
        (
            &two[..],
            json!({"vote-threshold": 3}),
            "threshold may not exceed children count",
        ),
        (
            &two[..],
            json!({"read-pattern": "x"}),
            "Please set read-pattern as fifo or quorum",
        ),
        (&three[..], json!({"blkverify": true}), twofold),
        (
            &two[..],
            json!({"blkverify": true, "vote-threshold": 1}),
            twofold,
        ),
        (
            &two[..],
            json!({"blkverify": true, "rewrite-corrupted": true}),
            "rewrite-corrupted=on cannot be used with blkverify=on",
        ),
    ];
    run(async {
        let (graph, _) = graph();
        for (children, more, message) in cases {
            let definition = quorum(children, more);
            assert_eq!(refusal(&graph, definition).await, message);
            assert!(graph.nodes().is_empty());
        }
        let uneven = [two[0].clone(), json!({"driver": "null-co", "size": 512})];
        let message = refusal(&graph, quorum(&uneven, json!({}))).await;
        let expected = "Could not refresh total sector count: Input/output error";
        assert_eq!(message, expected);
        let bad = [json!(5), two[0].clone()];
        let message = refusal(&graph, quorum(&bad, json!({}))).await;
        assert_eq!(
            message,
            "Invalid parameter type for 'children.0', expected: BlockdevRef"
        );
    });
}
