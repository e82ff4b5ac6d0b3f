//! Images of formats that are only read, opened in a simulated world.

use crate::qcow2::tests::rig::{edge, leaf};
use block::open::ChildRole;
use block::{Buffer, Edge, Errno, Error, FormatNode, Node, NodeOptions, ReadFormat, ReadOnly};
use executor::Executor;
use executor::sim::{Config, Image, World};
use std::path::Path;

const IMAGE: &str = "/simulated/image";

/// Opens the image, and works with its node if that succeeds.
fn with_image<F: ReadFormat, T>(
    image: Vec<u8>,
    open: impl AsyncFnOnce(Edge) -> Result<F, Error>,
    work: impl AsyncFnOnce(&Node) -> T,
) -> Result<T, Error> {
    let world = World::with_files(Config::default(), Image::from([(IMAGE.into(), image)]));
    Executor::simulated(&world).block_on(async {
        let file = leaf(Path::new(IMAGE));
        let format = open(edge(&file, "file", ChildRole::Image)).await?;
        let options = NodeOptions {
            read_only: true,
            ..NodeOptions::default()
        };
        let node = Node::new(options, Box::new(FormatNode::new(ReadOnly(format))));
        Ok(work(&node).await)
    })
}

/// What `work` makes of an image that can be opened.
pub(crate) fn opened<F: ReadFormat, T>(
    image: Vec<u8>,
    open: impl AsyncFnOnce(Edge) -> Result<F, Error>,
    work: impl AsyncFnOnce(&Node) -> T,
) -> T {
    with_image(image, open, work).unwrap_or_else(|error| panic!("{}", error.message))
}

/// The message of an image that cannot be opened.
pub(crate) fn open_error<F: ReadFormat>(
    image: Vec<u8>,
    open: impl AsyncFnOnce(Edge) -> Result<F, Error>,
) -> String {
    match with_image(image, open, async |_| ()) {
        Ok(()) => panic!("the image can be opened"),
        Err(error) => error.message,
    }
}

pub(crate) async fn read(node: &Node, offset: u64, length: usize) -> Result<Vec<u8>, Errno> {
    let buffer = Buffer::zeroed(length);
    node.read(offset, buffer.clone()).await?;
    Ok(buffer.to_heap().to_vec())
}
