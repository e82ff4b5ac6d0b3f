//! Image locks against QEMU's tools: whoever holds the image, the other is refused.

use crate::rig::{graph, open_root, options, run};
use block::{Permissions, Root};
use serde_json::json;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Output, Stdio};
use tempfile::TempDir;

fn tool(program: &str, arguments: &[&str]) -> Output {
    Command::new(program)
        .args(arguments)
        .output()
        .expect("scripts/setup installs QEMU's tools")
}

fn image(dir: &TempDir) -> String {
    let path = dir.path().join("image.raw");
    std::fs::File::create(&path)
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn the_peer_is_refused_while_a_writer_is_attached() {
    let dir = TempDir::new().unwrap();
    let path = image(&dir);
    run(async {
        let graph = graph();
        let node = graph
            .add(options(json!({"driver": "raw", "node-name": "r",
                "file": {"driver": "file", "filename": path}})))
            .await
            .unwrap();
        let write = ["-f", "raw", "-c", "write 0 512", &path];
        // Nobody uses the node: nothing is locked.
        let idle = tool("qemu-io", &write);
        assert!(idle.status.success(), "{idle:?}");
        let shared = Permissions {
            write: false,
            resize: false,
            ..Permissions::ALL
        };
        let root = Root::new("", &node, Permissions::READ_WRITE, shared).unwrap();
        let busy = tool("qemu-io", &write);
        let text = String::from_utf8_lossy(&busy.stderr).into_owned();
        assert!(!busy.status.success());
        assert!(text.contains("Failed to get \"write\" lock"), "{text}");
        drop(root);
        let idle = tool("qemu-io", &write);
        assert!(idle.status.success(), "{idle:?}");
    });
}

#[test]
fn an_image_that_the_peer_writes_is_refused() {
    let dir = TempDir::new().unwrap();
    let path = image(&dir);
    let peer = Command::new("qemu-io")
        .args(["-f", "raw", &path])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn();
    let mut peer = peer.expect("scripts/setup installs QEMU's tools");
    // The answer to a command shows that the image is open.
    let mut input = peer.stdin.take().unwrap();
    writeln!(input, "length").unwrap();
    let mut answer = String::new();
    BufReader::new(peer.stdout.take().unwrap())
        .read_line(&mut answer)
        .unwrap();
    run(async {
        let graph = graph();
        let node = graph
            .add(options(
                json!({"driver": "file", "node-name": "f", "filename": path}),
            ))
            .await
            .unwrap();
        let shared = Permissions {
            write: false,
            ..Permissions::ALL
        };
        let error = Root::new("", &node, Permissions::READ, shared)
            .err()
            .unwrap();
        assert_eq!(error.message, "Failed to get shared \"write\" lock");
        let hint = format!("Is another process using the image [{path}]?");
        assert_eq!(error.hint.as_deref(), Some(hint.as_str()));
        // A refused claim leaves nothing locked.
        Root::new("", &node, Permissions::READ, Permissions::ALL).unwrap();
        let unlocked = graph
            .add(options(
                json!({"driver": "file", "node-name": "u", "filename": path,
                "locking": "off"}),
            ))
            .await
            .unwrap();
        drop(open_root(&unlocked));
    });
    drop(input);
    peer.wait().unwrap();
}

#[test]
fn two_nodes_on_one_file_exclude_each_other() {
    let dir = TempDir::new().unwrap();
    let path = image(&dir);
    run(async {
        let graph = graph();
        let mut nodes = Vec::new();
        for name in ["a", "b"] {
            let definition = json!({"driver": "file", "node-name": name, "filename": path});
            nodes.push(graph.add(options(definition)).await.unwrap());
        }
        let alone = Permissions {
            write: false,
            ..Permissions::ALL
        };
        let first = Root::new("", &nodes[0], Permissions::READ_WRITE, alone).unwrap();
        let error = Root::new("", &nodes[1], Permissions::READ_WRITE, Permissions::ALL);
        assert_eq!(error.err().unwrap().message, "Failed to get \"write\" lock");
        drop(first);
        Root::new("", &nodes[1], Permissions::READ_WRITE, alone).unwrap();
    });
}

#[test]
fn an_open_qcow2_image_is_closed_to_the_peer() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("image.qcow2");
    let path = path.to_str().unwrap();
    let create = ["create", "-q", "-f", "qcow2", path, "1M"];
    let created = tool("qemu-img", &create);
    assert!(created.status.success(), "{created:?}");
    let refusal = |program, arguments: &[&str]| {
        let output = tool(program, arguments);
        assert!(!output.status.success(), "{output:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    run(async {
        let graph = graph();
        let definition = json!({"driver": "qcow2", "node-name": "q",
            "file": {"driver": "file", "filename": path}});
        graph.add(options(definition)).await.unwrap();
        let write = refusal("qemu-io", &["-c", "write 0 512", path]);
        assert!(write.contains("Failed to get \"write\" lock"), "{write}");
        let info = refusal("qemu-img", &["info", path]);
        assert!(
            info.contains("Failed to get shared \"write\" lock"),
            "{info}"
        );
        let forced = tool("qemu-img", &["info", "-U", path]);
        assert!(forced.status.success(), "{forced:?}");
        graph.remove("q").await.unwrap();
        let free = tool("qemu-io", &["-c", "write 0 512", path]);
        assert!(free.status.success(), "{free:?}");
    });
}
