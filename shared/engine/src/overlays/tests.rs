//! Reopening, snapshots and transactions on images in files.

use std::rc::Rc;

use block::{Buffer, ByteRange, Permissions, Root, RootHandle, WriteFlags};
use qmp::{Value, json};

use crate::Engine;
use crate::tests::{engine, on_executor, run};

const LENGTH: u64 = 1 << 20;

struct Rig {
    engine: Rc<Engine>,
    directory: tempfile::TempDir,
}

impl Rig {
    fn new() -> Self {
        Self {
            engine: engine(),
            directory: tempfile::tempdir().unwrap(),
        }
    }

    fn path(&self, name: &str) -> String {
        self.directory.path().join(name).display().to_string()
    }

    async fn make(&self, name: &str, version: &str) {
        let target = block::create::Target::Name(self.path(name));
        let Value::Object(members) = json!({ "size": LENGTH, "version": version }) else {
            unreachable!()
        };
        let made = self.engine.graph.create("qcow2", target, members).await;
        made.unwrap();
    }

    /// Makes an image and opens it as a node of its name, with its file inline.
    async fn image(&self, name: &str) -> Value {
        self.make(name, "v3").await;
        let options = json!({
            "driver": "qcow2", "node-name": name, "backing": null,
            "file": {"driver": "file", "filename": self.path(name)},
        });
        self.ok("blockdev-add", options.clone()).await;
        options
    }

    async fn ok(&self, command: &str, arguments: Value) -> Value {
        run(&self.engine, command, arguments).await.unwrap()
    }

    async fn refused(&self, command: &str, arguments: Value) -> String {
        run(&self.engine, command, arguments).await.unwrap_err()
    }

    fn root(&self, name: &str) -> Root {
        let node = self.engine.graph.node(name).unwrap();
        Root::new("", &node, Permissions::READ_WRITE, Permissions::ALL).unwrap()
    }

    /// Where the bytes at `offset` of a node are in its file.
    async fn place(&self, name: &str, offset: u64) -> Option<u64> {
        let node = self.engine.graph.node(name).unwrap();
        let status = node.block_status(ByteRange::new(offset, 4096)).await;
        status.unwrap().status.offset
    }

    fn is_read_only(&self, name: &str) -> bool {
        self.engine.graph.node(name).unwrap().options().read_only
    }

    fn bitmaps(&self, name: &str) -> Vec<(String, u64)> {
        let node = self.engine.graph.node(name).unwrap();
        let list = node.bitmaps().list();
        list.iter()
            .map(|bitmap| (bitmap.name().to_owned(), bitmap.count()))
            .collect()
    }
}

async fn write(handle: &RootHandle, offset: u64, byte: u8) {
    let buffer = Buffer::zeroed(4096);
    buffer.fill(byte);
    handle
        .write(offset, buffer, WriteFlags::default())
        .await
        .unwrap();
}

async fn read(handle: &RootHandle, offset: u64) -> u8 {
    let buffer = Buffer::zeroed(4096);
    handle.read(offset, buffer.clone()).await.unwrap();
    buffer.to_heap()[0]
}

#[test]
fn discards_keep_or_free_clusters_as_the_node_is_told() {
    const CLUSTER: u64 = 65536;
    on_executor(async {
        let rig = Rig::new();
        let mut options = rig.image("q").await;
        options["discard"] = json!("unmap");
        let root = rig.root("q");
        let handle = root.attach();
        write(&handle, 0, 7).await;
        let first = rig.place("q", 0).await.unwrap();
        let mut keeping = options.clone();
        keeping["discard-no-unref"] = json!(true);
        let discard_and_write = async |options: Value, other: u64| {
            rig.ok("blockdev-reopen", json!({ "options": [options] }))
                .await;
            handle.discard(ByteRange::new(0, CLUSTER)).await.unwrap();
            for _ in 0..3 {
                handle.flush().await.unwrap();
            }
            assert_eq!(read(&handle, 0).await, 0);
            write(&handle, other * CLUSTER, 8).await;
            rig.place("q", other * CLUSTER).await.unwrap()
        };
        assert_ne!(discard_and_write(keeping.clone(), 1).await, first);
        write(&handle, 0, 9).await;
        assert_eq!(rig.place("q", 0).await, Some(first));
        assert_eq!(discard_and_write(options, 2).await, first);
        rig.make("old", "v2").await;
        keeping["node-name"] = json!("old");
        keeping["file"]["filename"] = json!(rig.path("old"));
        assert_eq!(
            rig.refused("blockdev-add", keeping).await,
            "discard-no-unref is only supported since qcow2 version 3"
        );
        drop(handle);
        drop(root);
        rig.engine.shut_down().await.unwrap();
    });
}

#[test]
fn users_of_a_reopened_node_go_on_with_the_same_disk() {
    on_executor(async {
        let rig = Rig::new();
        let options = rig.image("q").await;
        let root = rig.root("q");
        let handle = root.attach();
        write(&handle, 0, 7).await;
        rig.ok("block-dirty-bitmap-add", json!({"node": "q", "name": "b"}))
            .await;
        let mut changed = options.clone();
        changed["discard"] = json!("unmap");
        changed["l2-cache-size"] = json!(65536);
        rig.ok("blockdev-reopen", json!({ "options": [changed] }))
            .await;
        assert_eq!(read(&handle, 0).await, 7);
        write(&handle, 4096, 8).await;
        assert_eq!(read(&handle, 4096).await, 8);
        assert_eq!(root.node().name(), "q");
        assert_eq!(root.node().options().discard, block::Discard::Unmap);
        assert_eq!(rig.bitmaps("q"), [("b".to_owned(), 65536)]);
        // What is absent has its default again.
        rig.ok("blockdev-reopen", json!({ "options": [options] }))
            .await;
        assert_eq!(root.node().options().discard, block::Discard::Ignore);
        drop((handle, root));
        rig.engine.shut_down().await.unwrap();
    });
}

#[test]
fn a_node_becomes_read_only_only_without_writers_and_its_file_with_it() {
    on_executor(async {
        let rig = Rig::new();
        let mut options = rig.image("q").await;
        let root = rig.root("q");
        options["read-only"] = json!(true);
        let request = json!({ "options": [options.clone()] });
        assert_eq!(
            rig.refused("blockdev-reopen", request.clone()).await,
            "Read-only block node 'q' cannot support read-write users"
        );
        drop(root);
        rig.ok("blockdev-reopen", request).await;
        assert!(rig.is_read_only("q"));
        let file = rig.engine.graph.node("q").unwrap();
        let (_, edge) = file.driver().edges()[0];
        assert!(edge.node().options().read_only);
        drop(file);
        options["read-only"] = json!(false);
        rig.ok("blockdev-reopen", json!({ "options": [options] }))
            .await;
        let root = rig.root("q");
        write(&root.attach(), 0, 1).await;
        drop(root);
        rig.engine.shut_down().await.unwrap();
    });
}

#[test]
fn when_one_of_a_list_cannot_be_reopened_all_stay_as_they_were() {
    on_executor(async {
        let rig = Rig::new();
        let (mut first, mut second) = (rig.image("a").await, rig.image("b").await);
        let (a, b) = (rig.root("a"), rig.root("b"));
        let (a, b) = (a.attach(), b.attach());
        write(&a, 0, 1).await;
        write(&b, 0, 2).await;
        first["discard"] = json!("unmap");
        second["encrypt"] = json!({"format": "luks", "key-secret": "nobody"});
        let request = json!({ "options": [first, second] });
        rig.refused("blockdev-reopen", request).await;
        assert_eq!((read(&a, 0).await, read(&b, 0).await), (1, 2));
        write(&a, 4096, 3).await;
        write(&b, 4096, 4).await;
        assert_eq!((read(&a, 4096).await, read(&b, 4096).await), (3, 4));
        let node = rig.engine.graph.node("a").unwrap();
        assert_eq!(node.options().discard, block::Discard::Ignore);
        drop((a, b, node));
        rig.engine.shut_down().await.unwrap();
    });
}

#[test]
fn what_cannot_change_is_named_in_the_peers_words() {
    on_executor(async {
        let rig = Rig::new();
        let options = rig.image("q").await;
        rig.image("o").await;
        let with = |key: &str, value: Value| {
            let mut changed = options.clone();
            changed[key] = value;
            json!({ "options": [changed] })
        };
        let other = json!({"driver": "file", "filename": rig.path("o")});
        for (request, expected) in [
            (
                with("driver", json!("raw")),
                "Parameter 'options[0].backing' is unexpected",
            ),
            (
                json!({"options": [{"driver": "raw", "node-name": "q", "file": options["file"]}]}),
                "Cannot change the option 'driver'",
            ),
            (
                with("node-name", json!("zz")),
                "Failed to find node with node-name='zz'",
            ),
            (with("file", other), "Cannot change the option 'filename'"),
            (
                with("file", json!("zz")),
                "Cannot find device='' nor node-name='zz'",
            ),
            (
                with("backing", json!("q")),
                "Making 'q' a backing child of 'q' would create a cycle",
            ),
            (
                json!({"options": [{"driver": "qcow2", "node-name": "q"}]}),
                "Parameter 'options[0].file' is missing",
            ),
            (
                json!({"options": [{"driver": "qcow2", "file": "o"}]}),
                "node-name not specified",
            ),
        ] {
            assert_eq!(rig.refused("blockdev-reopen", request).await, expected);
        }
        // With a backing, it has to be given.
        rig.ok("blockdev-reopen", with("backing", json!("o"))).await;
        let mut without = options.clone();
        if let Some(members) = without.as_object_mut() {
            members.remove("backing");
        }
        assert_eq!(
            rig.refused("blockdev-reopen", json!({ "options": [without] }))
                .await,
            "backing is missing for 'q'"
        );
        rig.ok("blockdev-reopen", with("backing", Value::Null))
            .await;
        rig.engine.shut_down().await.unwrap();
    });
}

#[test]
fn after_a_snapshot_users_write_to_the_overlay_and_the_old_top_is_read_only() {
    on_executor(async {
        let rig = Rig::new();
        rig.image("base").await;
        rig.image("top").await;
        let root = rig.root("base");
        let handle = root.attach();
        write(&handle, 0, 1).await;
        let request = json!({"node": "base", "overlay": "top"});
        rig.ok("blockdev-snapshot", request.clone()).await;
        assert_eq!(root.node().name(), "top");
        assert!(rig.is_read_only("base"));
        assert_eq!(read(&handle, 0).await, 1);
        write(&handle, 0, 2).await;
        assert_eq!(read(&handle, 0).await, 2);
        let base = rig.engine.graph.node("base").unwrap();
        let old = Root::new("", &base, Permissions::READ, Permissions::ALL).unwrap();
        assert_eq!(read(&old.attach(), 0).await, 1);
        assert_eq!(
            rig.refused("blockdev-snapshot", request).await,
            "Node 'base' is busy: node is used as backing hd of 'top'"
        );
        drop((handle, root, old, base));
        rig.engine.shut_down().await.unwrap();
    });
}

#[test]
fn snapshot_sync_makes_the_overlay_that_it_puts_above() {
    on_executor(async {
        let rig = Rig::new();
        rig.image("base").await;
        let root = rig.root("base");
        let handle = root.attach();
        write(&handle, 0, 1).await;
        let request = json!({
            "node-name": "base", "snapshot-file": rig.path("s"), "snapshot-node-name": "s",
        });
        rig.ok("blockdev-snapshot-sync", request).await;
        assert_eq!(root.node().name(), "s");
        assert_eq!(read(&handle, 0).await, 1);
        let described = root.node().driver().describe();
        assert_eq!(described["backing-filename"], json!(rig.path("base")));
        drop((handle, root));
        rig.engine.shut_down().await.unwrap();
    });
}

fn action(name: &str, data: Value) -> Value {
    json!({ "type": name, "data": data })
}

#[test]
fn a_transaction_that_fails_takes_everything_back() {
    on_executor(async {
        let rig = Rig::new();
        rig.image("q").await;
        rig.image("top").await;
        let root = rig.root("q");
        let handle = root.attach();
        let bitmap = json!({"node": "q", "name": "b"});
        rig.ok("block-dirty-bitmap-add", bitmap.clone()).await;
        write(&handle, 0, 1).await;
        let actions = [
            action(
                "block-dirty-bitmap-add",
                json!({"node": "q", "name": "new"}),
            ),
            action("block-dirty-bitmap-clear", bitmap.clone()),
            action(
                "blockdev-snapshot-internal-sync",
                json!({"device": "q", "name": "s"}),
            ),
            action("blockdev-snapshot", json!({"node": "q", "overlay": "top"})),
            action("abort", json!({})),
        ];
        assert_eq!(
            rig.refused("transaction", json!({ "actions": actions }))
                .await,
            "Transaction aborted using Abort action"
        );
        assert_eq!(rig.bitmaps("q"), [("b".to_owned(), 65536)]);
        assert_eq!(root.node().name(), "q");
        assert!(!rig.is_read_only("q"));
        let node = rig.engine.graph.node("q").unwrap();
        assert!(node.driver().snapshots().unwrap().list().is_empty());
        write(&handle, 65536, 2).await;
        assert_eq!(read(&handle, 65536).await, 2);
        drop((handle, root, node));
        rig.engine.shut_down().await.unwrap();
    });
}

#[test]
fn actions_of_a_transaction_see_what_those_before_them_made() {
    on_executor(async {
        let rig = Rig::new();
        rig.image("q").await;
        let root = rig.root("q");
        let handle = root.attach();
        let old = json!({"node": "q", "name": "old"});
        rig.ok("block-dirty-bitmap-add", old.clone()).await;
        write(&handle, 0, 1).await;
        let actions = [
            action(
                "block-dirty-bitmap-add",
                json!({"node": "q", "name": "new", "disabled": true}),
            ),
            action(
                "block-dirty-bitmap-merge",
                json!({"node": "q", "target": "new", "bitmaps": ["old"]}),
            ),
            action("block-dirty-bitmap-clear", old),
        ];
        rig.ok("transaction", json!({ "actions": actions })).await;
        let expected = [("old".to_owned(), 0), ("new".to_owned(), 65536)];
        assert_eq!(rig.bitmaps("q"), expected);
        for (request, expected) in [
            (
                json!({"actions": [{"type": "zz", "data": {}}]}),
                "Parameter 'type' does not accept value 'zz'",
            ),
            (
                json!({"actions": [{"type": "abort"}]}),
                "Parameter 'actions[0].data' is missing",
            ),
            (
                json!({"actions": [action("block-dirty-bitmap-add", json!({"node": "q"}))]}),
                "Parameter 'actions[0].data.name' is missing",
            ),
            (
                json!({
                    "actions": [action("block-dirty-bitmap-clear", json!({"node": "q", "name": "new"}))],
                    "properties": {"completion-mode": "grouped"},
                }),
                "Action 'block-dirty-bitmap-clear' does not support Transaction property \
                 completion-mode = grouped",
            ),
        ] {
            assert_eq!(rig.refused("transaction", request).await, expected);
        }
        let node = rig.engine.graph.node("q").unwrap();
        let found = node.bitmaps().find("new").unwrap();
        assert!(found.next_dirty(ByteRange::new(0, LENGTH)).is_some());
        drop((handle, root, node, found));
        rig.engine.shut_down().await.unwrap();
    });
}

#[test]
fn an_image_refers_to_another_backing_file_that_is_opened_next_time() {
    on_executor(async {
        let rig = Rig::new();
        rig.image("base").await;
        let sync = json!({
            "node-name": "base", "snapshot-file": rig.path("top"), "snapshot-node-name": "top",
        });
        rig.ok("blockdev-snapshot-sync", sync).await;
        rig.image("other").await;
        let change = |image: &str| {
            let name = "base-of-tomorrow";
            json!({"device": "top", "image-node-name": image, "backing-file": name})
        };
        rig.ok("change-backing-file", change("top")).await;
        let shown = rig
            .ok("query-named-block-nodes", json!({"flat": true}))
            .await;
        let list = shown.as_array().unwrap();
        let top = list.iter().find(|node| node["node-name"] == "top").unwrap();
        assert_eq!(top["image"]["backing-filename"], "base-of-tomorrow");
        assert_eq!(top["image"]["backing-filename-format"], "qcow2");
        assert_eq!(top["backing_file"], rig.path("base"));
        let refused = rig.refused("change-backing-file", change("other")).await;
        assert_eq!(
            refused,
            "not allowing backing file change on an image without a backing file"
        );
        rig.engine.shut_down().await.unwrap();
    });
}
