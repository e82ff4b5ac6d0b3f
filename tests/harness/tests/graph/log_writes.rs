//! The `blklogwrites` filter writes the log that the peer writes.

use crate::rig::{filled, graph, options, refusal, run};
use block::{ByteRange, Node, WriteFlags, ZeroFlags};
use harness::peer;
use serde_json::{Value, json};
use std::path::Path;

const MIB: u64 = 1 << 20;

fn definition(directory: &Path, more: Value) -> Value {
    let file = |name: &str| json!({"driver": "file", "filename": directory.join(name)});
    let mut definition = json!({"driver": "blklogwrites", "node-name": "top",
        "discard": "unmap", "file": file("disk"), "log": file("log")});
    let more = options(more);
    definition.as_object_mut().unwrap().extend(more);
    definition
}

/// A disk of zeroes and an empty log.
fn files() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("disk"), vec![0; MIB as usize]).unwrap();
    std::fs::write(directory.path().join("log"), []).unwrap();
    directory
}

/// What the peer logs when it does the same as [`work`].
fn peer_log(directory: &Path, more: &str) -> Vec<u8> {
    let name = |name: &str| directory.join(name).display().to_string();
    let image = format!(
        "driver=blklogwrites,discard=unmap,file.driver=file,file.filename={},\
         log.driver=file,log.filename={}{more}",
        name("disk"),
        name("log")
    );
    let commands = [
        "write -P 90 4096 8192",
        "write -z 65536 4096",
        "discard 131072 4096",
        "write -P 91 8192 4096",
        "flush",
    ];
    let mut arguments = vec!["--image-opts", &image];
    arguments.extend(commands.iter().flat_map(|command| ["-c", command]));
    peer::run("qemu-io", &arguments).unwrap();
    std::fs::read(directory.join("log")).unwrap()
}

async fn work(node: &Node) {
    let flags = WriteFlags::default();
    node.write(4096, filled(&[90; 8192]), flags).await.unwrap();
    let zeroes = ByteRange::new(65536, 4096);
    node.write_zeroes(zeroes, ZeroFlags::default())
        .await
        .unwrap();
    // The peer flushes after zeroes, unasked.
    node.flush().await.unwrap();
    node.discard(ByteRange::new(131_072, 4096)).await.unwrap();
    node.write(8192, filled(&[91; 4096]), flags).await.unwrap();
    node.flush().await.unwrap();
}

/// Works on the disk and closes it.
fn our_log(directory: &Path, more: Value) -> Vec<u8> {
    run(async {
        let graph = graph();
        let node = graph
            .add(options(definition(directory, more)))
            .await
            .unwrap();
        work(&node).await;
        drop(node);
        graph.remove("top").await.unwrap();
    });
    std::fs::read(directory.join("log")).unwrap()
}

/// A log without what is behind its last entry but one (closing flushes, as often as one likes).
fn entries(log: &[u8], sector: usize) -> (u64, Vec<u8>) {
    let count = u64::from_le_bytes(log[16..24].try_into().unwrap());
    // Flushes at the end are alike.
    let mut end = log.len() / sector * sector;
    let flush = |entry: &[u8]| entry[16] == 1 && entry[8] == 0;
    while flush(&log[end - sector..end]) {
        end -= sector;
    }
    let flushes = (log.len() / sector * sector - end) / sector;
    (count - flushes as u64, log[sector..end].to_vec())
}

#[test]
fn a_log_is_what_the_peer_writes() {
    for (ours, theirs, sector) in [
        (json!({}), "", 512),
        (
            json!({"log-sector-size": 4096}),
            ",log-sector-size=4096",
            4096,
        ),
    ] {
        let (one, other) = (files(), files());
        let our_log = our_log(one.path(), ours);
        let peer_log = peer_log(other.path(), theirs);
        assert_eq!(our_log[..16], peer_log[..16]);
        assert_eq!(our_log[24..28], peer_log[24..28]);
        assert!(
            entries(&our_log, sector) == entries(&peer_log, sector),
            "sectors of {sector}"
        );
    }
}

#[test]
fn a_log_of_the_peer_is_gone_on_with() {
    let directory = files();
    let before = peer_log(directory.path(), "");
    let after = our_log(directory.path(), json!({"log-append": true}));
    assert_eq!(after[512..before.len()], before[512..]);
    let (appended, _) = entries(&after, 512);
    let (first, entries_of_first) = entries(&before, 512);
    assert!(appended >= 2 * first, "{appended} after {first}");
    assert!(after.ends_with(&after[after.len() - 512..]) && !entries_of_first.is_empty());
}

#[test]
fn logs_that_make_no_sense_are_refused_with_the_peers_words() {
    let directory = files();
    let log = directory.path().join("log");
    let superblock = |magic: u64, version: u64, entries: u64| {
        let mut bytes = [magic, version, entries, 512]
            .map(u64::to_le_bytes)
            .concat();
        bytes.resize(1024, 0xff);
        bytes
    };
    let magic = 0x006a_7366_7773_6872;
    let append = json!({"log-append": true});
    let cases = [
        (
            json!({"log-sector-size": 100}),
            Vec::new(),
            "Invalid log sector size 100",
        ),
        (
            json!({"log-sector-size": 16}),
            Vec::new(),
            "Invalid log sector size 16",
        ),
        (
            json!({"log-append": true, "log-sector-size": 512}),
            Vec::new(),
            "log-append and log-sector-size are mutually exclusive",
        ),
        (
            json!({"log-super-update-interval": 0}),
            Vec::new(),
            "Invalid log superblock update interval 0",
        ),
        (
            append.clone(),
            superblock(1, 1, 0),
            "Invalid log superblock magic",
        ),
        (
            append.clone(),
            superblock(magic, 2, 0),
            "Unsupported log version 2",
        ),
        (
            append.clone(),
            superblock(magic, 1, 1),
            "Invalid flags 0xffffffffffffffff in log entry 0",
        ),
        (
            append,
            superblock(magic, 1, u64::MAX)[..512].to_vec(),
            "Failed to read log entry 0: Input/output error",
        ),
    ];
    run(async {
        for (more, bytes, message) in cases {
            std::fs::write(&log, bytes).unwrap();
            let definition = definition(directory.path(), more);
            assert_eq!(refusal(&graph(), definition).await, message);
        }
    });
}
