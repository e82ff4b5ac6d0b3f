//! The commands on a real executor.

use std::cell::RefCell;
use std::path::PathBuf;
use std::rc::Rc;

use executor::{Config, Executor};
use qmp::{Arguments, Error, Event, EventSink, Value, Version, json, keyval};

use crate::{Engine, EngineOptions, NamePolicy};

#[derive(Default)]
struct Heard(RefCell<Vec<&'static str>>);

impl EventSink for Heard {
    fn event(&self, event: &Event) {
        self.0.borrow_mut().push(event.name());
    }
}

pub(crate) fn engine() -> Rc<Engine> {
    Engine::new(EngineOptions {
        name_policy: NamePolicy::default(),
        redo_dir: None,
        fds: vhost_daemon::notify::NamedFds::new(vec![("named".to_owned(), 9999)]),
        version: Version::announced("test"),
        chardevs: Rc::default(),
    })
}

pub(crate) fn on_executor<F: Future>(future: F) -> F::Output {
    let executor = Executor::new(&Config::default()).unwrap();
    executor.block_on(future)
}

pub(crate) async fn run(
    engine: &Rc<Engine>,
    name: &str,
    arguments: Value,
) -> Result<Value, String> {
    let Value::Object(members) = arguments else {
        panic!("not an object")
    };
    let arguments = Arguments::from_json(members);
    let result = engine.run(name, arguments).await;
    result.map_err(|error: Error| error.desc)
}

fn socket(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("outboard-{name}-{}.sock", std::process::id()))
}

#[test]
fn an_export_holds_its_node_and_its_iothreads_until_it_is_gone() {
    on_executor(async {
        let engine = engine();
        let heard = Rc::new(Heard::default());
        let sink: Rc<dyn EventSink> = heard.clone();
        engine.subscribe(&sink);
        for id in ["a", "b"] {
            let iothread = json!({"qom-type": "iothread", "id": id});
            run(&engine, "object-add", iothread).await.unwrap();
        }
        let node = json!({"driver": "null-co", "node-name": "n", "size": 1 << 20});
        run(&engine, "blockdev-add", node).await.unwrap();
        let path = socket("export");
        let export = json!({
            "type": "vhost-user-blk", "id": "e", "node-name": "n", "num-queues": 2,
            "addr": {"type": "unix", "path": path}, "iothread": ["a", "b"],
        });
        run(&engine, "block-export-add", export.clone())
            .await
            .unwrap();
        assert_eq!(engine.socket_paths(), [path]);
        let again = run(&engine, "block-export-add", export).await;
        assert_eq!(again.unwrap_err(), "Block export id 'e' is already in use");
        let in_use = run(&engine, "object-del", json!({"id": "b"})).await;
        assert_eq!(
            in_use.unwrap_err(),
            "object 'b' is in use, can not be deleted"
        );
        let in_use = run(&engine, "blockdev-del", json!({"node-name": "n"})).await;
        assert_eq!(in_use.unwrap_err(), "Node n is in use");
        run(&engine, "block-export-del", json!({"id": "e"}))
            .await
            .unwrap();
        engine.stop_all_exports().await;
        assert_eq!(*heard.0.borrow(), ["BLOCK_EXPORT_DELETED"]);
        run(&engine, "object-del", json!({"id": "b"}))
            .await
            .unwrap();
        run(&engine, "blockdev-del", json!({"node-name": "n"}))
            .await
            .unwrap();
        engine.shut_down().await.unwrap();
    });
}

#[test]
fn a_refused_export_leaves_nothing_behind() {
    on_executor(async {
        let engine = engine();
        let node = json!({"driver": "null-co", "node-name": "n", "size": 1 << 20});
        run(&engine, "blockdev-add", node).await.unwrap();
        let mut export = json!({
            "type": "vhost-user-blk", "id": "e", "node-name": "n",
            "addr": {"type": "unix", "path": "/nonexistent/dir/sock"},
        });
        for (key, value, expected) in [
            ("physical-block-size", json!(1000), "power of 2"),
            ("physical-block-size", json!(4096), "Failed to bind socket"),
            ("secure-erase", json!(true), "writable"),
            ("iothread", json!([]), "expected: BlockExportIothreads"),
            (
                "iothread",
                json!(["nobody"]),
                "iothread \"nobody\" not found",
            ),
            ("iothread", json!(vec!["a"; 65]), "at most 64 iothreads"),
        ] {
            export[key] = value;
            let error = run(&engine, "block-export-add", export.clone()).await;
            let error = error.unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
        let exports = run(&engine, "query-block-exports", json!({})).await;
        assert_eq!(exports.unwrap(), json!([]));
        run(&engine, "blockdev-del", json!({"node-name": "n"}))
            .await
            .unwrap();
    });
}

#[test]
fn descriptors_are_found_by_name_and_number_and_only_when_handed_over() {
    let engine = on_executor(async { engine() });
    for (name, expected) in [
        ("named", "Cannot use file descriptor 'named'"),
        ("9998", "Cannot use file descriptor '9998'"),
        ("0", "Cannot use file descriptor '0'"),
        ("other", "No file descriptor named 'other' was passed"),
    ] {
        let error = engine.claim_fd(name).unwrap_err().desc;
        assert!(error.starts_with(expected), "{error}");
    }
}

#[test]
fn bitmaps_are_changed_under_qemus_conditions() {
    on_executor(async {
        let engine = engine();
        for (name, size) in [("n", 1 << 20), ("m", 2 << 20)] {
            let node = json!({"driver": "null-co", "node-name": name, "size": size});
            run(&engine, "blockdev-add", node).await.unwrap();
        }
        let refused = [
            (
                "add",
                json!({"node": "x", "name": "b"}),
                "Cannot find device='x' nor node-name='x'",
            ),
            (
                "add",
                json!({"node": "n", "name": ""}),
                "Bitmap name cannot be empty",
            ),
            (
                "add",
                json!({"node": "n", "name": "b", "granularity": 513}),
                "Granularity must be power of 2 and at least 512",
            ),
            (
                "add",
                json!({"node": "n", "name": "b", "granularity": -512}),
                "Parameter 'granularity' expects uint32_t",
            ),
            (
                "add",
                json!({"node": "n", "name": "b", "persistent": true}),
                "Can't store persistent bitmaps to n: Operation not supported",
            ),
            (
                "clear",
                json!({"node": "x", "name": "b"}),
                "Node 'x' not found",
            ),
            (
                "remove",
                json!({"node": "n", "name": "b"}),
                "Dirty bitmap 'b' not found",
            ),
            (
                "merge",
                json!({"node": "n", "target": "a", "bitmaps": [{"node": "m", "name": "a"}]}),
                "Bitmaps are of different sizes (destination size is 1048576, source size is \
                 2097152) and can't be merged",
            ),
        ];
        for node in ["n", "m"] {
            let add = json!({"node": node, "name": "a"});
            run(&engine, "block-dirty-bitmap-add", add).await.unwrap();
        }
        for (command, arguments, expected) in refused {
            let command = format!("block-dirty-bitmap-{command}");
            let error = run(&engine, &command, arguments).await.unwrap_err();
            assert_eq!(error, expected);
        }
        let add = json!({"node": "n", "name": "b", "granularity": 512, "disabled": true});
        run(&engine, "block-dirty-bitmap-add", add).await.unwrap();
        let node = engine.graph.node("n").unwrap();
        let root = block::Root::new(
            "writer",
            &node,
            block::Permissions::READ_WRITE,
            block::Permissions::ALL,
        );
        let handle = root.unwrap().attach();
        let zeroes = block::ByteRange::new(4096, 1);
        handle
            .write_zeroes(zeroes, block::ZeroFlags::default())
            .await
            .unwrap();
        let merge = json!({"node": "n", "target": "b", "bitmaps": ["a"]});
        run(&engine, "block-dirty-bitmap-merge", merge)
            .await
            .unwrap();
        let nodes = run(&engine, "query-named-block-nodes", json!({}))
            .await
            .unwrap();
        let described = nodes
            .as_array()
            .unwrap()
            .iter()
            .find(|node| node["node-name"] == "n");
        let expected = json!([
            {"name": "b", "recording": false, "persistent": false, "busy": false,
             "granularity": 512, "count": 65536},
            {"name": "a", "recording": true, "persistent": false, "busy": false,
             "granularity": 65536, "count": 65536},
        ]);
        assert_eq!(described.unwrap()["dirty-bitmaps"], expected);
        let named = json!({"node": "n", "name": "a"});
        let sum = run(&engine, "x-debug-block-dirty-bitmap-sha256", named.clone()).await;
        let one = "7c9fa136d4413fa6173637e883b6998d32e1d675f88cddff9dcbcf331820f4b8";
        assert_eq!(sum.unwrap()["sha256"], one);
        run(&engine, "block-dirty-bitmap-remove", named)
            .await
            .unwrap();
        let snapshot = json!({"device": "n", "name": "s"});
        let error = run(&engine, "blockdev-snapshot-internal-sync", snapshot).await;
        assert_eq!(
            error.unwrap_err(),
            "Block format 'null-co' used by device 'n' does not support internal snapshots"
        );
    });
}

#[test]
fn options_and_json_run_the_same_command() {
    on_executor(async {
        let engine = engine();
        let text = "raw,node-name=n,file.driver=null-co,file.size=64K,file.node-name=below";
        let arguments = keyval::parse(text, Some("driver")).unwrap();
        engine.run("blockdev-add", arguments).await.unwrap();
        let nodes = run(&engine, "query-named-block-nodes", json!({}))
            .await
            .unwrap();
        let described: Vec<_> = nodes.as_array().unwrap().iter().collect();
        assert_eq!(described.len(), 2);
        for node in described {
            assert_eq!(node["image"]["virtual-size"], 65536);
            assert_eq!(node["backing_file_depth"], 0);
        }
        engine.request_quit();
        engine.quit_requested().await;
        engine.shut_down().await.unwrap();
        let nodes = run(&engine, "query-named-block-nodes", json!({})).await;
        assert_eq!(nodes.unwrap(), json!([]));
    });
}

#[test]
fn nbd_exports_come_and_go_with_their_server() {
    on_executor(async {
        let engine = engine();
        let heard = Rc::new(Heard::default());
        let sink: Rc<dyn EventSink> = heard.clone();
        engine.subscribe(&sink);
        let node = json!({"driver": "null-co", "node-name": "n", "size": 1 << 20});
        run(&engine, "blockdev-add", node).await.unwrap();
        let bitmap = json!({"node": "n", "name": "b"});
        run(&engine, "block-dirty-bitmap-add", bitmap.clone())
            .await
            .unwrap();
        let add = |name: &str, more: Value| {
            let mut members = json!({"device": "n", "name": name});
            for (key, value) in more.as_object().unwrap() {
                members[key] = value.clone();
            }
            run(&engine, "nbd-server-add", members)
        };
        let early = add("a", json!({})).await;
        assert_eq!(early.unwrap_err(), "NBD server not running");
        let path = socket("nbd");
        let start = json!({"addr": {"type": "unix", "data": {"path": path}}});
        run(&engine, "nbd-server-start", start.clone())
            .await
            .unwrap();
        assert_eq!(engine.socket_paths(), std::slice::from_ref(&path));
        let again = run(&engine, "nbd-server-start", start).await;
        assert_eq!(again.unwrap_err(), "NBD server already running");
        add("a", json!({"writable": true, "bitmap": "b"}))
            .await
            .unwrap();
        let busy = run(&engine, "block-dirty-bitmap-clear", bitmap.clone()).await;
        assert!(busy.unwrap_err().contains("in use"));
        for (name, more, expected) in [
            ("a", json!({}), "Block export id 'a' is already in use"),
            ("c", json!({"bitmap": "x"}), "Bitmap 'x' is not found"),
        ] {
            assert_eq!(add(name, more).await.unwrap_err(), expected);
        }
        run(&engine, "nbd-server-remove", json!({"name": "a"}))
            .await
            .unwrap();
        assert_eq!(*heard.0.borrow(), ["BLOCK_EXPORT_DELETED"]);
        let readonly = add("a", json!({"bitmap": "b"})).await.unwrap_err();
        assert_eq!(
            readonly,
            "Enabled bitmap 'b' incompatible with readonly export"
        );
        run(&engine, "block-dirty-bitmap-clear", bitmap)
            .await
            .unwrap();
        let export = json!({
            "type": "nbd", "id": "e", "node-name": "n", "description": "text",
            "bitmaps": [{"node": "n", "name": "b"}], "writable": true,
        });
        run(&engine, "block-export-add", export).await.unwrap();
        run(&engine, "nbd-server-stop", json!({})).await.unwrap();
        assert!(!path.exists());
        assert_eq!(heard.0.borrow().len(), 2);
        let twice = run(&engine, "nbd-server-stop", json!({})).await;
        assert_eq!(twice.unwrap_err(), "NBD server not running");
        engine.shut_down().await.unwrap();
    });
}

#[test]
fn types_are_listed_with_what_they_are_kinds_of() {
    on_executor(async {
        let engine = engine();
        let listed = |arguments| run(&engine, "qom-list-types", arguments);
        let secret = json!({"name": "secret", "parent": "secret_common"});
        let keyring = json!({"name": "secret_keyring", "parent": "secret_common"});
        let kinds = listed(json!({"implements": "secret_common"}))
            .await
            .unwrap();
        assert_eq!(kinds, json!([secret, keyring]));
        let all = json!({"implements": "secret_common", "abstract": true});
        let kind = json!({"abstract": true, "name": "secret_common", "parent": "object"});
        assert_eq!(listed(all).await.unwrap(), json!([secret, keyring, kind]));
        let made = listed(json!({"implements": "user-creatable"}))
            .await
            .unwrap();
        let objects = listed(json!({"implements": "object"})).await.unwrap();
        assert_eq!(made, objects);
        engine.shut_down().await.unwrap();
    });
}
