//! One sequence: two images of one shape, some rounds.

use crate::operation::Operation;
use crate::shape::Shape;
use crate::{ours, peer};
use harness::peer as tools;
use rand::rngs::SmallRng;
use rand::{Rng, RngCore, SeedableRng};
use std::path::Path;

const ROUNDS: usize = 3;
const OPERATIONS: usize = 10;
const IMAGES: [&str; 2] = ["a.qcow2", "b.qcow2"];

/// What sequences are about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    /// One image.
    Plain,
    /// An image over a raw or qcow2 backing, shorter or longer than it.
    Backed,
}

/// Runs a sequence.
pub(crate) fn run(family: Family, seed: u64) {
    let mut random = SmallRng::seed_from_u64(seed);
    let shape = Shape::random(&mut random, family == Family::Backed);
    println!("seed {seed}: {family:?} {shape:?}");
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    create(family, &shape, directory, &mut random);
    let mut length = shape.size;
    for round in 0..ROUNDS {
        // The side that works on an image changes with every round.
        let [mine, theirs] = match round % 2 {
            0 => IMAGES,
            _ => [IMAGES[1], IMAGES[0]],
        };
        let operations = operations(&mut random, &mut length, (family, &shape));
        println!("round {round}: {operations:?}");
        let written = ours::with(&directory.join(mine), async |disk| {
            for operation in &operations {
                disk.apply(*operation).await;
            }
            disk.content().await
        });
        peer::apply(directory, theirs, &operations);
        judge(directory, [mine, theirs], &written);
    }
}

/// Operations on a disk of `length` bytes, which they may change.
fn operations(
    random: &mut SmallRng,
    length: &mut u64,
    (family, shape): (Family, &Shape),
) -> Vec<Operation> {
    // The peer cannot hide the rest of a backing without zero clusters.
    let may_resize = family == Family::Plain || shape.is_v3;
    let mut operations = Vec::new();
    for _ in 0..OPERATIONS {
        let mut operation = Operation::random(random, *length, shape.cluster_size);
        match operation {
            Operation::Resize { length: new } if may_resize => *length = new,
            Operation::Resize { .. } => operation = Operation::Flush,
            _ => {}
        }
        operations.push(operation);
    }
    operations
}

/// Makes both images, and the backing that they share.
fn create(family: Family, shape: &Shape, directory: &Path, random: &mut SmallRng) {
    let size = shape.size.to_string();
    let options = shape.options();
    let mut arguments = vec!["create", "-q", "-f", "qcow2", "-o", &options];
    if family == Family::Backed {
        let length = random.random_range(1..=2 * shape.size / 512) * 512;
        let mut content = vec![0; length as usize];
        random.fill_bytes(&mut content);
        std::fs::write(directory.join("base.raw"), content).unwrap();
        let convert = ["convert", "-O", "qcow2", "-f", "raw", "base.raw", "base"];
        match random.random() {
            true => {
                peer::run(directory, "qemu-img", &convert);
                arguments.extend(["-b", "base", "-F", "qcow2"]);
            }
            false => arguments.extend(["-b", "base.raw", "-F", "raw"]),
        }
    }
    for image in IMAGES {
        let arguments = [&arguments[..], &[image, &size]].concat();
        peer::run(directory, "qemu-img", &arguments);
    }
}

/// Both images are sound and show the same; ours shows what was read while it was open.
fn judge(directory: &Path, [mine, theirs]: [&str; 2], written: &[u8]) {
    let (mine, theirs) = (directory.join(mine), directory.join(theirs));
    tools::check("qcow2", &mine).unwrap();
    tools::compare(("qcow2", &mine), ("qcow2", &theirs)).unwrap();
    let read = ours::with(&theirs, async |disk| disk.content().await);
    assert!(read == written, "outboard reads the peer's image otherwise");
}
