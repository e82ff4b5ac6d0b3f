//! Adding and removing nodes: the answers are those of qemu-storage-daemon 7.2.

use crate::rig::{graph, open_root, options, refusal, run};
use serde_json::json;

#[test]
fn malformed_definitions_get_the_peers_messages() {
    let cases = [
        (json!({"node-name": "a"}), "Parameter 'driver' is missing"),
        (
            json!({"driver": "bogus", "node-name": "a"}),
            "Parameter 'driver' does not accept value 'bogus'",
        ),
        (
            json!({"driver": "null-co"}),
            "'node-name' must be specified for the root node",
        ),
        (
            json!({"driver": "null-co", "node-name": "#x"}),
            "Invalid node-name: '#x'",
        ),
        (
            json!({"driver": "null-co", "node-name": "1x"}),
            "Invalid node-name: '1x'",
        ),
        (
            json!({"driver": "null-co", "node-name": ""}),
            "Invalid node-name: ''",
        ),
        (
            json!({"driver": "null-co", "node-name": "x".repeat(32)}),
            "Node name too long",
        ),
        (
            json!({"driver": "null-co", "node-name": "a", "bogus": 1}),
            "Parameter 'bogus' is unexpected",
        ),
        (
            json!({"driver": "null-co", "node-name": "a", "cache": {"foo": true}}),
            "Parameter 'cache.foo' is unexpected",
        ),
        (
            json!({"driver": "null-co", "node-name": "a", "cache": 3}),
            "Invalid parameter type for 'cache', expected: object",
        ),
        (
            json!({"driver": "null-co", "node-name": "a", "discard": "foo"}),
            "Parameter 'discard' does not accept value 'foo'",
        ),
        (
            json!({"driver": "null-co", "node-name": "a", "read-only": "maybe"}),
            "Parameter 'read-only' expects 'on' or 'off'",
        ),
        (
            json!({"driver": "null-co", "node-name": "a", "read-only": 1}),
            "Invalid parameter type for 'read-only', expected: boolean",
        ),
        (
            json!({"driver": "null-co", "node-name": "a", "size": -1}),
            "Parameter 'size' expects a non-negative number below 2^64",
        ),
        (
            json!({"driver": "null-co", "node-name": "a", "latency-ns": u64::MAX}),
            "latency-ns is invalid",
        ),
        (
            json!({"driver": "null-co", "node-name": "a", "detect-zeroes": "unmap"}),
            "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap",
        ),
        (
            json!({"driver": "null-co", "node-name": "a", "force-share": true}),
            "force-share=on can only be used with read-only images",
        ),
        (
            json!({"driver": "raw", "node-name": "a"}),
            "Parameter 'file' is missing",
        ),
        (
            json!({"driver": "raw", "node-name": "a", "file": "no"}),
            "Cannot find device='no' nor node-name='no'",
        ),
        (
            json!({"driver": "raw", "node-name": "a", "file": null}),
            "Invalid parameter type for 'file', expected: BlockdevRef",
        ),
        (
            json!({"driver": "raw", "node-name": "a", "file": {"filename": "x"}}),
            "Parameter 'file.driver' is missing",
        ),
        (
            json!({"driver": "raw", "node-name": "a", "file": {"driver": "raw", "file": {"driver": "null-co", "foo": 1}}}),
            "Parameter 'file.file.foo' is unexpected",
        ),
        (
            json!({"driver": "raw", "node-name": "a", "size": 513, "file": {"driver": "null-co"}}),
            "Specified size is not multiple of 512",
        ),
        (
            json!({"driver": "raw", "node-name": "a", "offset": 2048, "file": {"driver": "null-co", "size": 1024}}),
            "Offset (2048) cannot be greater than size of the containing file (1024)",
        ),
        (
            json!({"driver": "raw", "node-name": "a", "offset": 512, "size": 1024, "file": {"driver": "null-co", "size": 1024}}),
            "The sum of offset (512) and size (1024) has to be smaller or equal to the  actual size of the containing file (1024)",
        ),
        (
            json!({"driver": "file", "node-name": "a"}),
            "Parameter 'filename' is missing",
        ),
        (
            json!({"driver": "file", "node-name": "a", "filename": ""}),
            "The 'file' block driver requires a file name",
        ),
        (
            json!({"driver": "file", "node-name": "a", "filename": "/nosuch"}),
            "Could not open '/nosuch': No such file or directory",
        ),
        (
            json!({"driver": "file", "node-name": "a", "filename": "/"}),
            "Could not open '/': Is a directory",
        ),
        (
            json!({"driver": "file", "node-name": "a", "filename": "/dev/null"}),
            "'file' driver requires '/dev/null' to be a regular file",
        ),
        (
            json!({"driver": "file", "node-name": "a", "filename": "/nosuch", "locking": "foo"}),
            "Parameter 'locking' does not accept value 'foo'",
        ),
        (
            json!({"driver": "file", "node-name": "a", "filename": "/nosuch", "aio": "native"}),
            "aio=native was specified, but it requires cache.direct=on, which was not specified.",
        ),
    ];
    run(async {
        let graph = graph();
        for (definition, message) in cases {
            let text = definition.to_string();
            assert_eq!(refusal(&graph, definition).await, message, "{text}");
            assert!(graph.nodes().is_empty(), "{text} left a node behind");
        }
    });
}

#[test]
fn strings_from_a_command_line_mean_the_same_as_typed_values() {
    run(async {
        let graph = graph();
        let typed = json!({"driver": "null-co", "node-name": "a", "size": 65536, "read-only": true,
            "cache": {"direct": true, "no-flush": false}});
        let strings = json!({"driver": "null-co", "node-name": "b", "size": "64k", "read-only": "on",
            "cache": {"direct": "on", "no-flush": "off"}});
        let a = graph.add(options(typed)).await.unwrap();
        let b = graph.add(options(strings)).await.unwrap();
        assert_eq!(a.length(), b.length());
        assert!(a.options().read_only && b.options().read_only);
        assert!(a.options().cache_direct && b.options().cache_direct);
        assert!(!a.options().cache_no_flush && !b.options().cache_no_flush);
    });
}

#[test]
fn inline_children_inherit_and_go_with_their_parent() {
    run(async {
        let graph = graph();
        let definition = json!({"driver": "raw", "node-name": "top", "read-only": true,
            "cache": {"direct": true}, "file": {"driver": "null-co"}});
        let top = graph.add(options(definition)).await.unwrap();
        let names: Vec<_> = graph.nodes().iter().map(|n| n.name().to_owned()).collect();
        assert_eq!(names, ["top", "#block001"]);
        let child = graph.node("#block001").unwrap();
        assert!(child.options().read_only && child.options().cache_direct);
        assert_eq!(child.options().discard, block::Discard::Unmap);
        drop((top, child));
        let error = graph.remove("#block001").await.unwrap_err();
        assert_eq!(error.message, "Node #block001 is not owned by the monitor");
        graph.remove("top").await.unwrap();
        assert!(graph.nodes().is_empty());
    });
}

#[test]
fn a_node_in_use_is_not_removed() {
    run(async {
        let graph = graph();
        let node = graph
            .add(options(json!({"driver": "null-co", "node-name": "n"})))
            .await
            .unwrap();
        let raw = graph
            .add(options(
                json!({"driver": "raw", "node-name": "r", "file": "n"}),
            ))
            .await
            .unwrap();
        let message = async |name: &str| graph.remove(name).await.unwrap_err().message;
        assert_eq!(message("n").await, "Block device n is in use");
        let root = open_root(&raw);
        assert_eq!(message("r").await, "Node r is in use");
        assert_eq!(message("z").await, "Failed to find node with node-name='z'");
        assert_eq!(
            refusal(&graph, json!({"driver": "null-co", "node-name": "n"})).await,
            "Duplicate nodes with node-name='n'"
        );
        drop((root, raw));
        graph.remove("r").await.unwrap();
        drop(node);
        graph.remove("n").await.unwrap();
    });
}

#[test]
fn permissions_conflict_across_a_transparent_node() {
    use block::{Permissions, Root};
    run(async {
        let graph = graph();
        let node = graph
            .add(options(json!({"driver": "null-co", "node-name": "n"})))
            .await
            .unwrap();
        let raw = graph
            .add(options(
                json!({"driver": "raw", "node-name": "r", "file": "n"}),
            ))
            .await
            .unwrap();
        let alone = Permissions {
            write: false,
            resize: false,
            ..Permissions::ALL
        };
        let writer = Root::new("", &node, Permissions::READ_WRITE, alone).unwrap();
        let error = Root::new("", &raw, Permissions::READ_WRITE, Permissions::ALL)
            .err()
            .unwrap();
        assert_eq!(
            error.message,
            "Permission conflict on node 'n': permissions 'write' are both required by node 'r' \
             (uses node 'n' as 'file' child) and unshared by an unnamed block device (uses node \
             'n' as 'root' child)."
        );
        drop(writer);
        Root::new("", &raw, Permissions::READ_WRITE, Permissions::ALL).unwrap();

        let fixed = graph
            .add(options(
                json!({"driver": "null-co", "node-name": "ro", "read-only": true}),
            ))
            .await
            .unwrap();
        let error = Root::new("", &fixed, Permissions::READ_WRITE, Permissions::ALL)
            .err()
            .unwrap();
        assert_eq!(error.message, "Block node is read-only");
    });
}

#[test]
fn definitions_nest_to_a_limit_and_no_further() {
    let nested = |depth: usize| {
        (0..depth).fold(
            json!({"driver": "null-co"}),
            |below, _| json!({"driver": "raw", "file": below}),
        )
    };
    run(async {
        let graph = graph();
        let mut definition = nested(block::open::MAX_CHAIN);
        definition["node-name"] = json!("deep");
        let node = graph.add(options(definition)).await.unwrap();
        let root = open_root(&node);
        crate::rig::read(&root.attach(), 0, 512).await.unwrap();
        drop((root, node));
        graph.remove("deep").await.unwrap();
        assert!(graph.nodes().is_empty());
        let mut definition = nested(block::open::MAX_CHAIN + 1);
        definition["node-name"] = json!("deeper");
        let message = refusal(&graph, definition).await;
        assert_eq!(message, "more than 200 nodes below each other");
        assert!(graph.nodes().is_empty());
    });
}
