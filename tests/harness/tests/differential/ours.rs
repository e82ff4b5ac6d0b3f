//! The side that outboard works on: the graph on real files, as the daemon has it.

use crate::operation::{Change, Content, NOISE, Operation, snapshot_name};
use block::graph::{Graph, NamePolicy};
use block::snapshot::{NewSnapshot, find_by_id_or_name};
use block::{
    Buffer, ByteRange, Errno, Node, Permissions, Resize, Root, RootHandle, WriteFlags, ZeroFlags,
};
use executor::{Config, Executor};
use rand::rngs::SmallRng;
use rand::{RngCore, SeedableRng};
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;

/// An image opened through the graph.
pub(crate) struct Disk {
    pub(crate) node: Arc<Node>,
    root: RootHandle,
}

/// The noise: the same bytes in every run.
pub(crate) fn noise() -> Vec<u8> {
    let mut bytes = vec![0; NOISE.1];
    SmallRng::seed_from_u64(0).fill_bytes(&mut bytes);
    bytes
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
            Operation::Write { range, content } => {
                self.write(range, content, WriteFlags::default()).await
            }
            Operation::WriteCompressed { range, content } => {
                let flags = WriteFlags {
                    compressed: true,
                    ..WriteFlags::default()
                };
                self.write(range, content, flags).await
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
                let resize = Resize::to(length);
                self.node.resize(resize).await.unwrap();
                Ok(())
            }
        };
        result.unwrap_or_else(|errno| panic!("{operation:?}: {errno}"));
    }

    /// Changes the image's snapshots.
    pub(crate) async fn change(&self, change: Change) {
        let snapshots = self.node.driver().snapshots().unwrap();
        let id = |number| {
            let name = snapshot_name(number);
            let list = snapshots.list();
            find_by_id_or_name(&list, &name).unwrap().id.clone()
        };
        match change {
            Change::Create(number) => {
                let new = NewSnapshot::now(snapshot_name(number));
                snapshots.create(new).await.map(drop).unwrap();
            }
            Change::Apply(number) => self.node.apply_snapshot(&id(number)).await.unwrap(),
            Change::Delete(number) => snapshots.delete(&id(number)).await.unwrap(),
        }
    }

    /// What the disk showed when a snapshot was taken.
    pub(crate) async fn snapshot(&self, number: u32) -> Vec<u8> {
        let snapshots = self.node.driver().snapshots().unwrap();
        let list = snapshots.list();
        let info = find_by_id_or_name(&list, &snapshot_name(number)).unwrap();
        let driver = snapshots.open(&info.id).await.unwrap();
        let buffer = Buffer::zeroed(driver.length() as usize);
        driver.read(0, buffer.clone()).await.unwrap();
        buffer.to_heap().to_vec()
    }

    async fn write(
        &self,
        range: ByteRange,
        content: Content,
        flags: WriteFlags,
    ) -> Result<(), Errno> {
        let buffer = Buffer::zeroed(range.length as usize);
        match content {
            Content::Fill(byte) => buffer.fill(byte),
            Content::Noise => {
                let bytes = noise().into_iter().cycle();
                let bytes: Vec<u8> = bytes.take(range.length as usize).collect();
                buffer.copy_from_slice(&bytes);
            }
        }
        self.root.write(range.offset, buffer, flags).await
    }

    /// Everything that the disk shows.
    pub(crate) async fn content(&self) -> Vec<u8> {
        let buffer = Buffer::zeroed(self.root.length() as usize);
        self.root.read(0, buffer.clone()).await.unwrap();
        buffer.to_heap().to_vec()
    }
}
