//! The side that outboard works on: the graph on real files, as the daemon has it.

use crate::operation::Operation;
use block::graph::{Graph, NamePolicy};
use block::{
    Buffer, Node, Permissions, Preallocation, Resize, Root, RootHandle, WriteFlags, ZeroFlags,
};
use executor::{Config, Executor};
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;

/// An image opened through the graph.
pub(crate) struct Disk {
    pub(crate) node: Arc<Node>,
    root: RootHandle,
}

/// Opens the image, lets `work` have it, closes it.
pub(crate) fn with<T>(path: &Path, work: impl AsyncFnOnce(&Disk) -> T) -> T {
    let executor = Executor::new(&Config::default()).unwrap();
    executor.block_on(async {
        let drivers = [protocols::DRIVERS, formats::DRIVERS];
        let graph = Graph::new(&drivers, NamePolicy::default());
        let definition = json!({
            "driver": "qcow2", "node-name": "disk", "discard": "unmap",
            "file": {"driver": "file", "filename": path.to_str().unwrap()},
        });
        let Value::Object(definition) = definition else {
            unreachable!("an object was written above")
        };
        let node = graph.add(definition).await.unwrap();
        let permissions = Permissions {
            resize: true,
            ..Permissions::READ_WRITE
        };
        let root = Root::new("test", &node, permissions, Permissions::ALL).unwrap();
        let disk = Disk {
            node,
            root: root.attach(),
        };
        let result = work(&disk).await;
        drop((disk, root));
        graph.remove("disk").await.unwrap();
        result
    })
}

impl Disk {
    /// Does it; every operation is valid and must succeed.
    pub(crate) async fn apply(&self, operation: Operation) {
        let result = match operation {
            Operation::Write { range, fill } => {
                let buffer = Buffer::zeroed(range.length as usize);
                buffer.fill(fill);
                let flags = WriteFlags::default();
                self.root.write(range.offset, buffer, flags).await
            }
            Operation::Zero { range, unmap } => {
                let flags = ZeroFlags {
                    may_unmap: unmap,
                    ..ZeroFlags::default()
                };
                self.root.write_zeroes(range, flags).await
            }
            Operation::Discard { range } => self.root.discard(range).await,
            Operation::Flush => self.root.flush().await,
            Operation::Resize { length } => {
                let resize = Resize {
                    length,
                    preallocation: Preallocation::Off,
                };
                self.node.resize(resize).await.unwrap();
                Ok(())
            }
        };
        result.unwrap_or_else(|errno| panic!("{operation:?}: {errno}"));
    }

    /// Everything that the disk shows.
    pub(crate) async fn content(&self) -> Vec<u8> {
        let buffer = Buffer::zeroed(self.root.length() as usize);
        self.root.read(0, buffer.clone()).await.unwrap();
        buffer.to_heap().to_vec()
    }
}
