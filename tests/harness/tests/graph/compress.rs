//! The `compress` filter over qcow2: what is written through it is stored compressed.

use crate::rig::{filled, graph, open_root, options, read, refusal, run};
use block::WriteFlags;
use harness::peer;
use serde_json::json;

#[test]
fn writes_of_any_size_are_stored_compressed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.qcow2");
    // The last cluster is half a cluster.
    peer::create("qcow2", &path, (1 << 20) + (32 << 10), "").unwrap();
    let definition = json!({
        "driver": "compress", "node-name": "top",
        "file": {"driver": "qcow2", "file": {"driver": "file", "filename": path.to_str().unwrap()}},
    });
    run(async {
        let graph = graph();
        let node = graph.add(options(definition)).await.unwrap();
        let root = open_root(&node);
        let handle = root.attach();
        for (offset, length) in [(4096, 4096), (200_000, 150_000), ((1 << 20) + 512, 1000)] {
            let data = filled(&vec![0x5a; length]);
            let flags = WriteFlags::default();
            handle.write(offset, data, flags).await.unwrap();
            let back = read(&handle, offset, length).await.unwrap();
            assert!(back.iter().all(|byte| *byte == 0x5a), "at {offset}");
        }
        drop((handle, root, node));
        graph.remove("top").await.unwrap();
    });
    peer::check("qcow2", &path).unwrap();
    let arguments = ["check", "--output=json", path.to_str().unwrap()];
    let report = peer::run("qemu-img", &arguments).unwrap();
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    // Clusters 0, 3 to 5 and the last.
    assert_eq!(report["allocated-clusters"], 5, "{report}");
    assert_eq!(report["compressed-clusters"], 5, "{report}");
}

#[test]
fn a_child_that_does_not_compress_is_refused() {
    run(async {
        let definition = json!({"driver": "compress", "node-name": "top",
            "file": {"driver": "null-co"}});
        let message = refusal(&graph(), definition).await;
        let expected = "Compression is not supported for underlying format: null-co";
        assert_eq!(message, expected);
    });
}
