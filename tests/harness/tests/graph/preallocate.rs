//! The `preallocate` filter: the file below is longer than the disk, until it is closed.

use crate::rig::{filled, graph, open_root, options, read, refusal, run};
use block::{ByteRange, Node, Preallocation, Resize, WriteFlags, ZeroFlags};
use serde_json::{Value, json};
use std::path::Path;

const MIB: u64 = 1 << 20;

fn definition(path: &Path) -> Value {
    json!({"driver": "preallocate", "node-name": "top", "prealloc-size": 8 * MIB,
        "file": {"driver": "file", "filename": path}})
}

fn length(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().len()
}

async fn resize(node: &Node, length: u64, preallocation: Preallocation) {
    let resize = Resize {
        length,
        preallocation,
    };
    node.resize(resize).await.unwrap();
}

#[test]
fn a_file_is_made_longer_once_for_many_writes_and_is_cut_at_the_end() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    std::fs::write(&path, vec![1; 4096]).unwrap();
    run(async {
        let graph = graph();
        let node = graph.add(options(definition(&path))).await.unwrap();
        assert_eq!(length(&path), 4096);
        for index in 1..=100_u64 {
            let flags = WriteFlags::default();
            node.write(index * 4096, filled(&[7; 4096]), flags)
                .await
                .unwrap();
            assert_eq!(node.length(), (index + 1) * 4096);
            assert_eq!(length(&path), 9 * MIB);
        }
        // Zeroes just beyond the data are there already.
        let zeroes = ByteRange::new(node.length(), MIB);
        node.write_zeroes(zeroes, ZeroFlags::default())
            .await
            .unwrap();
        assert_eq!(node.length(), 101 * 4096 + MIB);
        assert_eq!(length(&path), 9 * MIB);
        let handle = open_root(&node).attach();
        assert_eq!(read(&handle, zeroes.offset, 512).await.unwrap(), [0; 512]);
        drop((handle, node));
        graph.remove("top").await.unwrap();
    });
    assert_eq!(length(&path), 101 * 4096 + MIB);
    let bytes = std::fs::read(&path).unwrap();
    assert!(bytes[4096..101 * 4096].iter().all(|byte| *byte == 7));
    assert!(bytes[101 * 4096..].iter().all(|byte| *byte == 0));
}

#[test]
fn a_new_length_takes_from_what_is_reserved_when_it_is_to_be_allocated() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    std::fs::write(&path, []).unwrap();
    run(async {
        let graph = graph();
        let node = graph.add(options(definition(&path))).await.unwrap();
        let data = filled(&[7; 4096]);
        node.write(0, data, WriteFlags::default()).await.unwrap();
        assert_eq!(length(&path), 9 * MIB);
        resize(&node, 2 * MIB, Preallocation::Falloc).await;
        assert_eq!((node.length(), length(&path)), (2 * MIB, 9 * MIB));
        resize(&node, 3 * MIB, Preallocation::Off).await;
        assert_eq!((node.length(), length(&path)), (3 * MIB, 3 * MIB));
        resize(&node, MIB, Preallocation::Off).await;
        assert_eq!((node.length(), length(&path)), (MIB, MIB));
        resize(&node, 20 * MIB, Preallocation::Falloc).await;
        assert_eq!((node.length(), length(&path)), (20 * MIB, 20 * MIB));
    });
}

#[test]
fn an_alignment_that_is_no_multiple_of_a_sector_is_refused() {
    run(async {
        let definition = json!({"driver": "preallocate", "node-name": "top",
            "prealloc-align": 100, "file": {"driver": "null-co"}});
        let expected = "prealloc-align parameter of preallocate filter is not aligned to 512";
        assert_eq!(refusal(&graph(), definition).await, expected);
    });
}
