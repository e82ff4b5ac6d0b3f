//! `http` against a server that is wrong in many ways.

use crate::rig::{graph, options, read, refusal, run};
use block::graph::Graph;
use block::{Errno, Permissions, Root, RootHandle};
use harness::web_server::WebServer;
use serde_json::{Value, json};
use std::rc::Rc;
use std::sync::Arc;

/// Bytes in the file: no whole number of sectors.
const LENGTH: usize = (2 << 20) + 100;

fn file() -> Vec<u8> {
    (0..LENGTH as u32).map(|at| (at % 251) as u8).collect()
}

fn server() -> WebServer {
    WebServer::start(file(), "/").unwrap()
}

fn node(url: &str, more: Value) -> Value {
    let driver = url.split(':').next().unwrap_or_default();
    let mut definition = json!({"driver": driver, "node-name": "n", "read-only": true, "url": url, "readahead": 4096});
    definition.as_object_mut().unwrap().extend(options(more));
    definition
}

/// Runs `check` on a node that was opened.
fn with_node(definition: Value, check: impl AsyncFnOnce(Rc<RootHandle>)) {
    run(async {
        let graph = graph();
        let node = graph.add(options(definition)).await.unwrap();
        let root = Root::new("", &node, Permissions::READ, Permissions::ALL).unwrap();
        check(Rc::new(root.attach())).await;
        drop((root, node));
        graph.remove("n").await.unwrap();
    });
}

fn reason(definition: Value) -> String {
    run(async {
        let graph: Graph = graph();
        let refused = refusal(&graph, definition).await;
        assert!(graph.nodes().is_empty());
        refused
    })
}

#[test]
fn what_is_read_is_the_file_and_comes_once() {
    let server = server();
    with_node(node(&server.url("/file"), json!({})), async |root| {
        let file = file();
        for (offset, length) in [(0, 512), (1000, 3000), (1 << 20, 600_000), (1 << 20, 4096)] {
            let bytes = read(&root, offset, length).await.unwrap();
            assert!(bytes == file[offset as usize..][..length], "{offset}");
        }
        let tail = read(&root, 2 << 20, 512).await.unwrap();
        assert!(tail[..100] == file[2 << 20..] && tail[100..].iter().all(|byte| *byte == 0));
    });
    let ranges: Vec<_> = server.asked().iter().map(|asked| asked.range).collect();
    let mib = 1 << 20;
    assert_eq!(
        ranges,
        [
            Some((0, 4095)),
            Some((mib, mib + 600_000 + 4095)),
            Some((2 << 20, (2 << 20) + 99)),
        ],
        "what is in memory is not asked for again"
    );
}

#[test]
fn reads_beside_each_other_share_what_comes() {
    let server = server();
    with_node(node(&server.url("/file"), json!({})), async |root| {
        let file = file();
        let step = 64 << 10;
        let tasks: Vec<_> = (0..32_u64)
            .map(|index| {
                let root = Rc::clone(&root);
                executor::spawn(async move { read(&root, index * step, step as usize).await })
            })
            .collect();
        for (index, task) in tasks.into_iter().enumerate() {
            let at = index * step as usize;
            assert!(
                task.await.unwrap() == file[at..at + step as usize],
                "{index}"
            );
        }
    });
    let fetched: u64 = server
        .asked()
        .iter()
        .filter_map(|asked| asked.range)
        .map(|(first, last)| last - first + 1)
        .sum();
    assert!(fetched <= LENGTH as u64, "{fetched}");
}

#[test]
fn servers_that_cannot_serve_are_refused_with_the_reason() {
    let server = server();
    let reason = |path: &str| {
        let reason = reason(node(&server.url(path), json!({"timeout": 2})));
        let start = "CURL: Error opening file: ";
        assert!(reason.contains(start), "{reason}");
        reason.split(start).last().unwrap_or_default().to_owned()
    };
    assert_eq!(
        reason("/whole"),
        "Server does not support 'range' (byte ranges)."
    );
    assert_eq!(reason("/missing"), "The requested URL returned error: 404");
    let endless = reason("/endless");
    assert!(endless.contains("header"), "{endless}");
    assert_eq!(reason("/loop"), "more than 10 redirections");
    assert!(reason("/local").starts_with("redirection to 'file:///etc/passwd'"));
}

#[test]
fn a_server_that_goes_wrong_later_fails_the_read_and_not_the_node() {
    for path in [
        "/busy",
        "/cut",
        "/shifted",
        "/new-version",
        "/grows",
        "/silent",
    ] {
        let server = server();
        let definition = node(&server.url(path), json!({"timeout": 1}));
        with_node(definition, async |root| {
            let failed = read(&root, 1 << 20, 4096).await;
            assert_eq!(failed, Err(Errno::EIO), "{path}");
            let known = read(&root, 0, 512).await.unwrap();
            assert!(known == file()[..512], "{path}");
        });
    }
}

#[test]
fn a_body_that_ends_early_is_continued() {
    let server = server();
    let definition = node(&server.url("/halves"), json!({"readahead": 0}));
    with_node(definition, async |root| {
        let bytes = read(&root, 1 << 20, 1000).await.unwrap();
        assert!(bytes == file()[1 << 20..][..1000]);
    });
    assert!(server.asked().len() > 3);
}

#[test]
fn names_and_passwords_stay_with_the_server_they_are_for() {
    let other = server();
    let server = WebServer::start(file(), &other.url("/file")).unwrap();
    run(async {
        let graph = graph();
        graph
            .secrets()
            .insert("p".to_owned(), b"word".to_vec().into());
        let more = json!({"username": "user", "password-secret": "p", "cookie": "a=b"});
        let definition = node(&server.url("/elsewhere"), more);
        let node = graph.add(options(definition)).await.unwrap();
        let root = Root::new("", &node, Permissions::READ, Permissions::ALL).unwrap();
        let handle = root.attach();
        assert!(read(&handle, 1 << 20, 512).await.unwrap() == file()[1 << 20..][..512]);
        assert!(node.filename().starts_with("json:{"), "{}", node.filename());
        drop((handle, root, node));
        graph.remove("n").await.unwrap();
    });
    let first = &server.asked()[0];
    assert_eq!(first.field("authorization"), Some("Basic dXNlcjp3b3Jk"));
    assert_eq!(first.field("cookie"), Some("a=b"));
    assert_eq!(server.asked().len(), 1, "where it was found is remembered");
    for asked in other.asked() {
        assert_eq!(asked.field("authorization"), None);
        assert_eq!(asked.field("cookie"), None);
    }
    assert_eq!(other.asked().len(), 2);
}

#[test]
fn what_is_asked_for_securely_is_not_fetched_in_the_clear() {
    let plain = server();
    let server = WebServer::start_secure(file(), &plain.url("/file")).unwrap();
    let untrusted = reason(node(&server.url("/file"), json!({})));
    assert!(untrusted.contains("certificate"), "{untrusted}");
    let unchecked = json!({"sslverify": false});
    with_node(
        node(&server.url("/file"), unchecked.clone()),
        async |root| {
            assert!(read(&root, 1 << 20, 4096).await.unwrap() == file()[1 << 20..][..4096]);
        },
    );
    let clear = reason(node(&server.url("/elsewhere"), unchecked));
    assert!(clear.contains("in the clear"), "{clear}");
    assert!(plain.asked().is_empty());
}

#[test]
fn an_empty_file_has_no_bytes() {
    let server = WebServer::start(Vec::new(), "/").unwrap();
    run(async {
        let graph = graph();
        let definition = node(&server.url("/file"), json!({}));
        let node = graph.add(options(definition)).await.unwrap();
        assert_eq!(node.length(), 0);
    });
}

#[test]
fn every_thread_has_connections_of_its_own() {
    let server = server();
    run(async {
        let graph = graph();
        let definition = node(&server.url("/file"), json!({}));
        let node = graph.add(options(definition)).await.unwrap();
        let root = Root::new("", &node, Permissions::READ, Permissions::ALL).unwrap();
        let root = Arc::new(root);
        let thread = executor::IoThread::start("t", executor::IoThreadOptions::default()).unwrap();
        let elsewhere = Arc::clone(&root);
        let bytes = thread
            .handle()
            .call(move || async move { read(&elsewhere.attach(), 1 << 20, 4096).await })
            .await;
        assert!(bytes.unwrap().unwrap() == file()[1 << 20..][..4096]);
        drop((root, node));
        graph.remove("n").await.unwrap();
    });
}
