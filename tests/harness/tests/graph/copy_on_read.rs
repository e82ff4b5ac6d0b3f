//! The `copy-on-read` filter over a chain of qcow2 images: what is read once is in the topmost.

use crate::rig::{filled, graph, open_root, options, read, refusal, run};
use block::{ByteRange, ErrorKind, Permissions, Root, WriteFlags};
use harness::peer;
use serde_json::{Value, json};
use std::path::Path;

const CLUSTER: u64 = 64 << 10;

/// An image of 1 MiB in `directory`, with a byte written to some clusters by the peer.
fn image(directory: &Path, name: &str, options: &str, written: &[(u64, u8)]) {
    let path = directory.join(name);
    peer::create("qcow2", &path, 1 << 20, options).unwrap();
    for (cluster, byte) in written {
        let command = format!("write -P {byte} {} {CLUSTER}", cluster * CLUSTER);
        let path = path.to_str().unwrap();
        peer::run("qemu-io", &["-f", "qcow2", "-c", &command, path]).unwrap();
    }
}

/// `top` over `middle` over `base`: each holds a cluster of its own, and they share none.
fn chain(directory: &Path) -> Value {
    image(directory, "base", "", &[(1, 1), (4, 9)]);
    image(directory, "middle", "", &[(2, 2)]);
    image(directory, "top", "", &[(3, 3)]);
    let file = |name: &str| json!({"driver": "file", "filename": directory.join(name)});
    json!({"driver": "qcow2", "node-name": "top", "file": file("top"),
        "backing": {"driver": "qcow2", "node-name": "middle", "file": file("middle"),
            "backing": {"driver": "qcow2", "node-name": "base", "file": file("base")}}})
}

/// The first bytes of the clusters that the image itself holds.
fn allocated(path: &Path) -> Vec<u64> {
    let arguments = ["map", "--output=json", path.to_str().unwrap()];
    let map: Value = serde_json::from_str(&peer::run("qemu-img", &arguments).unwrap()).unwrap();
    let extents = map.as_array().unwrap().iter();
    let present = extents.filter(|extent| extent["present"] == true);
    let clusters = present.flat_map(|extent| {
        let start = extent["start"].as_u64().unwrap() / CLUSTER;
        start..start + extent["length"].as_u64().unwrap() / CLUSTER
    });
    clusters.collect()
}

fn filter(image: Value, more: Value) -> Value {
    let mut filter = json!({"driver": "copy-on-read", "node-name": "filter", "file": image});
    let more = options(more);
    filter.as_object_mut().unwrap().extend(more);
    filter
}

#[test]
fn what_is_read_is_in_the_image_and_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let definition = filter(chain(directory.path()), json!({}));
    run(async {
        let graph = graph();
        let node = graph.add(options(definition)).await.unwrap();
        let handle = open_root(&node).attach();
        // Some bytes of cluster 1, all of 2 and 3 and some of 5, which nobody has.
        let bytes = read(&handle, CLUSTER + 512, 1024).await.unwrap();
        assert_eq!(bytes, [1; 1024]);
        let bytes = read(&handle, 2 * CLUSTER, 2 * CLUSTER as usize)
            .await
            .unwrap();
        assert!(bytes[..CLUSTER as usize].iter().all(|byte| *byte == 2));
        assert!(bytes[CLUSTER as usize..].iter().all(|byte| *byte == 3));
        assert_eq!(read(&handle, 5 * CLUSTER, 512).await.unwrap(), [0; 512]);
        let range = ByteRange::new(4 * CLUSTER, CLUSTER);
        assert!(!node.block_status(range).await.unwrap().status.allocated);
        drop((handle, node));
        graph.remove("filter").await.unwrap();
    });
    let top = directory.path().join("top");
    peer::check("qcow2", &top).unwrap();
    assert_eq!(allocated(&top), [1, 2, 3, 5]);
    let reads = [
        "read -P 1 64k 64k",
        "read -P 2 128k 64k",
        "read -P 0 320k 64k",
    ];
    for command in reads {
        let path = top.to_str().unwrap();
        peer::run("qemu-io", &["-f", "qcow2", "-c", command, path]).unwrap();
    }
}

#[test]
fn images_below_the_bottom_are_not_copied_from() {
    let directory = tempfile::tempdir().unwrap();
    let definition = filter(chain(directory.path()), json!({"bottom": "middle"}));
    run(async {
        let graph = graph();
        let node = graph.add(options(definition)).await.unwrap();
        let handle = open_root(&node).attach();
        let bytes = read(&handle, 0, 6 * CLUSTER as usize).await.unwrap();
        let firsts: Vec<u8> = bytes.iter().copied().step_by(CLUSTER as usize).collect();
        assert_eq!(firsts, [0, 1, 2, 3, 9, 0]);
        drop((handle, node));
        graph.remove("filter").await.unwrap();
    });
    assert_eq!(allocated(&directory.path().join("top")), [2, 3]);
}

#[test]
fn a_bottom_that_makes_no_sense_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let image = chain(directory.path());
    run(async {
        let graph = graph();
        let elsewhere = json!({"driver": "null-co", "node-name": "elsewhere"});
        graph.add(options(elsewhere)).await.unwrap();
        for (bottom, message) in [
            ("nobody", "Bottom node 'nobody' not found"),
            (
                "elsewhere",
                "Bottom node 'elsewhere' is not in the backing chain",
            ),
        ] {
            let definition = filter(image.clone(), json!({"bottom": bottom}));
            assert_eq!(refusal(&graph, definition).await, message);
        }
        let inner = json!({"driver": "copy-on-read", "node-name": "inner",
            "file": {"driver": "null-co"}});
        let definition = filter(inner, json!({"bottom": "inner"}));
        assert_eq!(
            refusal(&graph, definition).await,
            "Bottom node 'inner' is a filter"
        );
    });
}

#[test]
fn an_image_that_is_not_written_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let definition = filter(chain(directory.path()), json!({"read-only": true}));
    run(async {
        let graph = graph();
        let message = refusal(&graph, definition).await;
        assert_eq!(message, "Block node is read-only");
    });
}

#[test]
fn nobody_else_writes_to_the_image() {
    let directory = tempfile::tempdir().unwrap();
    let image = chain(directory.path());
    run(async {
        let graph = graph();
        let top = graph.add(options(image)).await.unwrap();
        let node = graph
            .add(options(filter(json!("top"), json!({}))))
            .await
            .unwrap();
        let permissions = Permissions::READ_WRITE;
        let refused = Root::new("", &top, permissions, Permissions::ALL);
        assert_eq!(refused.err().unwrap().kind, ErrorKind::Busy);
        let handle = open_root(&node).attach();
        let data = filled(&[7; 512]);
        handle
            .write(512, data, WriteFlags::default())
            .await
            .unwrap();
        assert_eq!(read(&handle, 512, 512).await.unwrap(), [7; 512]);
    });
}
