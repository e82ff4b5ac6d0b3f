//! Images that lie, logs that lie, and logs that the power cuts short. What sound images hold is the conformance suite's.

mod hostile;
mod peer;
mod power;
mod sample;

use super::create::{Kind, Plan};
use super::metadata::Shape;
use super::{Access, MIB, Vhdx};
use crate::qcow2::tests::rig::{edge, leaf};
use block::open::ChildRole;
use block::{Buffer, Edge, Error, FormatNode, Node, NodeOptions, Purpose, WriteFlags};
use executor::Executor;
use executor::sim::{Config, Image, World};
use std::path::Path;
use std::sync::Arc;

const IMAGE: &str = "/simulated/image";
/// Where the table of blocks and the metadata are in the images of these tests.
const BAT: u64 = 2 * MIB;
const METADATA: u64 = 3 * MIB;

/// The file of the simulated world that the caller is in.
fn file() -> Edge {
    edge(&leaf(Path::new(IMAGE)), "file", ChildRole::Image)
}

/// A new image of a disk with blocks of 1 MiB.
fn new_image(disk_bytes: u64, kind: Kind) -> Vec<u8> {
    let shape = Shape {
        disk_bytes,
        block_bytes: MIB,
        sector_bytes: 512,
    };
    let plan = Plan::new(shape, MIB, kind);
    let empty = vec![0; plan.end as usize];
    let world = World::with_files(Config::default(), Image::from([(IMAGE.into(), empty)]));
    Executor::simulated(&world).block_on(async {
        plan.write(&file()).await.unwrap();
    });
    content(&world)
}

fn world(image: Vec<u8>) -> World {
    World::with_files(Config::default(), Image::from([(IMAGE.into(), image)]))
}

/// What the image's file holds.
fn content(world: &World) -> Vec<u8> {
    world.files()[Path::new(IMAGE)].clone()
}

/// Opens the image of a world and works with its node.
fn with_disk<T>(
    world: &World,
    how: (Purpose, Access),
    work: impl AsyncFnOnce(Arc<Node>) -> T,
) -> Result<T, Error> {
    Executor::simulated(world).block_on(async {
        let image = Vhdx::open(file(), how).await?;
        let options = NodeOptions {
            read_only: how.1 == Access::Read,
            ..NodeOptions::default()
        };
        Ok(work(Node::new(options, Box::new(FormatNode::new(image)))).await)
    })
}

const WRITING: (Purpose, Access) = (Purpose::Serve, Access::Write);
const READING: (Purpose, Access) = (Purpose::Serve, Access::Read);

async fn write(node: &Node, offset: u64, bytes: &[u8]) {
    let buffer = Buffer::zeroed(bytes.len());
    buffer.copy_from_slice(bytes);
    let flags = WriteFlags::default();
    node.write(offset, buffer, flags).await.unwrap();
}

async fn read(node: &Node, offset: u64, length: usize) -> Vec<u8> {
    let buffer = Buffer::zeroed(length);
    buffer.fill(0xdb);
    node.read(offset, buffer.clone()).await.unwrap();
    buffer.to_heap().to_vec()
}
