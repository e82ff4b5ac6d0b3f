//! A graph on an executor, options from JSON.

use block::graph::{Graph, NamePolicy};
use block::{Buffer, Errno, Node, Permissions, Root, RootHandle};
use executor::{Config, Executor};
use serde_json::{Map, Value};
use std::future::Future;
use std::sync::Arc;

/// A graph with every driver.
pub(crate) fn graph() -> Graph {
    Graph::new(
        &[protocols::DRIVERS, formats::DRIVERS, filters::DRIVERS],
        NamePolicy::default(),
    )
}

/// The members of a JSON object.
pub(crate) fn options(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        other => panic!("{other} is not an object"),
    }
}

/// Runs `future` on an executor of its own.
pub(crate) fn run<F: Future>(future: F) -> F::Output {
    Executor::new(&Config::default()).unwrap().block_on(future)
}

/// The message of a failed `add`.
pub(crate) async fn refusal(graph: &Graph, value: Value) -> String {
    match graph.add(options(value)).await {
        Ok(node) => panic!("{} was added", node.name()),
        Err(error) => error.message,
    }
}

/// A root that reads and writes and tolerates everything.
pub(crate) fn open_root(node: &Arc<Node>) -> Root {
    let permissions = Permissions {
        resize: true,
        ..Permissions::READ_WRITE
    };
    Root::new("", node, permissions, Permissions::ALL).unwrap()
}

/// A private buffer with content.
pub(crate) fn filled(bytes: &[u8]) -> Buffer {
    let buffer = Buffer::zeroed(bytes.len());
    buffer.copy_from_slice(bytes);
    buffer
}

/// Reads `len` bytes at `offset`.
pub(crate) async fn read(root: &RootHandle, offset: u64, len: usize) -> Result<Vec<u8>, Errno> {
    let buffer = Buffer::zeroed(len);
    root.read(offset, buffer.clone()).await?;
    Ok(buffer.to_heap().to_vec())
}
