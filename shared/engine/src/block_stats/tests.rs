//! What the commands answer; that requests are counted is tested with a guest's requests, in the harness.

use std::cell::RefCell;
use std::rc::Rc;

use block::edge::Permissions;
use block::{Root, WriteFlags};
use executor::Buffer;
use executor::sync::Notify;
use qmp::{Event, EventSink, Value, json};

use crate::tests::{engine, on_executor, run};

#[derive(Default)]
struct Thresholds {
    heard: RefCell<Vec<Value>>,
    changed: Notify,
}

impl EventSink for Thresholds {
    fn event(&self, event: &Event) {
        if event.name() == "BLOCK_WRITE_THRESHOLD" {
            let data = event.data().cloned().unwrap();
            self.heard.borrow_mut().push(data);
            self.changed.notify_all();
        }
    }
}

#[test]
fn a_write_beyond_the_threshold_is_told_once_and_how_far_nodes_were_written_is_shown() {
    on_executor(async {
        let engine = engine();
        let heard = Rc::new(Thresholds::default());
        let sink: Rc<dyn EventSink> = heard.clone();
        engine.subscribe(&sink);
        let node = json!({"driver": "raw", "node-name": "n",
            "file": {"driver": "null-co", "node-name": "file", "size": 1 << 20}});
        run(&engine, "blockdev-add", node).await.unwrap();
        let set = json!({"node-name": "file", "write-threshold": 8192});
        run(&engine, "block-set-write-threshold", set)
            .await
            .unwrap();
        let node = engine.graph.node("n").unwrap();
        let root = Root::new("", &node, Permissions::READ_WRITE, Permissions::ALL).unwrap();
        let handle = root.attach();
        let write = async |offset, length| {
            let flags = WriteFlags::default();
            handle.write(offset, Buffer::zeroed(length), flags).await
        };
        write(4096, 4096).await.unwrap();
        let told = heard.changed.notified();
        write(4096, 4608).await.unwrap();
        told.await;
        write(0, 65536).await.unwrap();
        let nodes = run(&engine, "query-named-block-nodes", json!({})).await;
        for node in nodes.unwrap().as_array().unwrap() {
            assert_eq!(node["write_threshold"], 0);
        }
        let event = json!({"node-name": "file", "amount-exceeded": 512, "write-threshold": 8192});
        assert_eq!(*heard.heard.borrow(), [event]);
        let stats = run(&engine, "query-blockstats", json!({"query-nodes": true})).await;
        let stats = stats.unwrap();
        let top = &stats[1];
        assert_eq!(top["node-name"], "n");
        assert_eq!(top["stats"]["wr_highest_offset"], 65536);
        assert_eq!(top["parent"]["stats"]["wr_highest_offset"], 65536);
        assert_eq!(top["parent"]["node-name"], "file");
        drop(handle);
    });
}

#[test]
fn a_threshold_is_shown_as_it_was_set_and_negative_ones_are_large() {
    on_executor(async {
        let engine = engine();
        let node = json!({"driver": "null-co", "node-name": "n", "size": 1 << 20});
        run(&engine, "blockdev-add", node).await.unwrap();
        let shown = async || {
            let nodes = run(&engine, "query-named-block-nodes", json!({})).await;
            nodes.unwrap()[0]["write_threshold"].clone()
        };
        for (set, expected) in [
            (json!(4096), 4096),
            (json!(-1), -1),
            (json!(u64::MAX), -1),
            (json!(i64::MIN), i64::MIN),
            (json!(0), 0),
        ] {
            let set = json!({"node-name": "n", "write-threshold": set});
            run(&engine, "block-set-write-threshold", set)
                .await
                .unwrap();
            assert_eq!(shown().await, expected);
        }
        for wrong in [json!(1.5), json!("1"), json!(1e20)] {
            let set = json!({"node-name": "n", "write-threshold": wrong});
            let refused = run(&engine, "block-set-write-threshold", set).await;
            let error = refused.unwrap_err();
            assert_eq!(error, "Parameter 'write-threshold' expects uint64");
        }
    });
}

#[test]
fn boundaries_are_those_of_an_export() {
    on_executor(async {
        let engine = engine();
        let set = "block-latency-histogram-set";
        let error = run(&engine, set, json!({"id": "e"})).await.unwrap_err();
        assert_eq!(error, "Device 'e' not found");
        let node = json!({"driver": "null-co", "node-name": "n", "size": 1 << 20});
        run(&engine, "blockdev-add", node).await.unwrap();
        let path = std::env::temp_dir().join(format!("outboard-stats-{}", std::process::id()));
        let export = json!({"type": "vhost-user-blk", "id": "e", "node-name": "n",
            "addr": {"type": "unix", "path": path}});
        run(&engine, "block-export-add", export).await.unwrap();
        for bad in [json!([]), json!([0]), json!([5, 5])] {
            let arguments = json!({"id": "e", "boundaries": [1], "boundaries-write": bad});
            let error = run(&engine, set, arguments).await.unwrap_err();
            assert_eq!(error, "Device 'e' set write boundaries fail");
        }
        let stats = async || {
            let answer = run(&engine, "query-blockstats", json!({})).await.unwrap();
            answer[0].clone()
        };
        let arguments = json!({"id": "e", "boundaries": [10, 20], "boundaries-flush": [5]});
        run(&engine, set, arguments).await.unwrap();
        let shown = stats().await;
        assert_eq!(shown["qdev"], "e");
        let shown = &shown["stats"];
        let empty =
            |boundaries: Value, bins: Value| json!({"boundaries": boundaries, "bins": bins});
        for kind in ["rd", "wr"] {
            let histogram = &shown[format!("{kind}_latency_histogram")];
            assert_eq!(*histogram, empty(json!([10, 20]), json!([0, 0, 0])));
        }
        let flush = &shown["flush_latency_histogram"];
        assert_eq!(*flush, empty(json!([5]), json!([0, 0])));
        assert!(shown.get("idle_time_ns").is_none());
        run(&engine, set, json!({"id": "e"})).await.unwrap();
        let shown = stats().await;
        assert!(shown["stats"].get("rd_latency_histogram").is_none());
        engine.shut_down().await.unwrap();
    });
}

#[test]
fn children_of_a_quorum_come_and_go_while_it_is_written() {
    on_executor(async {
        let engine = engine();
        for name in ["a", "b", "c"] {
            let node = json!({"driver": "null-co", "node-name": name, "size": 1 << 20});
            run(&engine, "blockdev-add", node).await.unwrap();
        }
        let quorum = json!({"driver": "quorum", "node-name": "q", "vote-threshold": 1,
            "children": ["a", {"driver": "null-co", "node-name": "inline", "size": 1 << 20}]});
        run(&engine, "blockdev-add", quorum).await.unwrap();
        let node = engine.graph.node("q").unwrap();
        let root = Root::new("", &node, Permissions::READ_WRITE, Permissions::ALL).unwrap();
        drop(node);
        let handle = root.attach();
        let change = async |arguments| run(&engine, "x-blockdev-change", arguments).await;
        let names = || {
            let node = engine.graph.node("q").unwrap();
            let edges = node.driver().edges().into_iter();
            let named = edges.map(|(name, edge)| format!("{name}={}", edge.node().name()));
            named.collect::<Vec<_>>().join(" ")
        };
        change(json!({"parent": "q", "node": "b"})).await.unwrap();
        assert_eq!(names(), "children.0=a children.1=inline children.2=b");
        change(json!({"parent": "q", "child": "children.1"}))
            .await
            .unwrap();
        assert_eq!(names(), "children.0=a children.2=b");
        assert!(engine.graph.node("inline").is_none());
        change(json!({"parent": "q", "node": "c"})).await.unwrap();
        assert_eq!(names(), "children.0=a children.2=b children.3=c");
        let flags = WriteFlags::default();
        handle.write(0, Buffer::zeroed(512), flags).await.unwrap();
        let stats = run(&engine, "query-blockstats", json!({"query-nodes": true})).await;
        let stats = stats.unwrap();
        let written = stats.as_array().unwrap().iter();
        let written = written.filter(|node| node["stats"]["wr_highest_offset"] == 512);
        assert_eq!(written.count(), 4, "{stats}");
        drop(handle);
    });
}
