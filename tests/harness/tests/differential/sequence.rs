//! One sequence: two images of one shape, some rounds.

use crate::operation::{Change, NOISE, Operation};
use crate::shape::Shape;
use crate::{ours, peer};
use block::ByteRange;
use rand::rngs::SmallRng;
use rand::{Rng, RngCore, SeedableRng};
use std::collections::BTreeSet;
use std::ops::Range;
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
    /// Compressed writes among the others, of either compression type.
    Compressed,
    /// Snapshots are taken, applied and deleted between rounds.
    Snapshots,
}

/// Runs a sequence.
pub(crate) fn run(family: Family, seed: u64) {
    let mut random = SmallRng::seed_from_u64(seed);
    let shape = Shape::random(&mut random, family);
    println!("seed {seed}: {family:?} {shape:?}");
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    std::fs::write(directory.join(NOISE.0), ours::noise()).unwrap();
    create(family, &shape, directory, &mut random);
    let mut state = State {
        length: shape.size,
        snapshots: Vec::new(),
        written: BTreeSet::new(),
        compressed: BTreeSet::new(),
        unpacked: false,
    };
    for round in 0..ROUNDS {
        // The side that works on an image changes with every round.
        let [mine, theirs] = match round % 2 {
            0 => IMAGES,
            _ => [IMAGES[1], IMAGES[0]],
        };
        let operations = operations(&mut random, &mut state, (family, &shape));
        println!("round {round}: {operations:?}");
        let change = (family == Family::Snapshots).then(|| state.change(&mut random));
        println!("then {change:?}");
        let written = ours::with(&directory.join(mine), async |disk| {
            for operation in &operations {
                disk.apply(*operation).await;
            }
            if let Some(change) = change {
                disk.change(change).await;
            }
            disk.content().await
        });
        peer::apply(directory, theirs, &operations);
        if let Some(change) = change {
            peer::change(directory, theirs, change);
        }
        judge(directory, [mine, theirs], &written);
        judge_snapshots(directory, [mine, theirs], &state);
    }
}

/// What both images should be like.
struct State {
    /// Bytes of the disk.
    length: u64,
    /// Snapshots by number, with the length of each.
    snapshots: Vec<(u32, u64)>,
    /// Clusters that were written: the peer does not compress those any more.
    written: BTreeSet<u64>,
    /// Clusters that were compressed since the peer opened the image.
    compressed: BTreeSet<u64>,
    /// One of those was changed. It may have been the last one in its host cluster, where the peer
    /// would go on packing compressed clusters after it became another cluster's.
    unpacked: bool,
}

impl State {
    /// Takes note of an operation; what the peer cannot do becomes a flush.
    fn note(&mut self, operation: Operation, (family, shape): (Family, &Shape)) -> Operation {
        // The peer cannot hide the rest of a backing without zero clusters, nor tell the lengths
        // of version 2's snapshots.
        let may_resize = shape.is_v3 || !matches!(family, Family::Backed | Family::Snapshots);
        let clusters = |range: ByteRange| {
            let end = range.offset + range.length;
            range.offset / shape.cluster_size..end.div_ceil(shape.cluster_size)
        };
        match operation {
            Operation::Resize { .. } if !may_resize => Operation::Flush,
            Operation::Resize { length } => {
                self.unpack(length / shape.cluster_size..u64::MAX);
                self.length = length;
                operation
            }
            Operation::WriteCompressed { range, .. } => {
                let clusters = clusters(range);
                if self.unpacked || self.written.range(clusters.clone()).next().is_some() {
                    return Operation::Flush;
                }
                self.written.extend(clusters.clone());
                self.compressed.extend(clusters);
                operation
            }
            Operation::Write { range, .. } | Operation::Zero { range, .. } => {
                self.unpack(clusters(range));
                self.written.extend(clusters(range));
                operation
            }
            Operation::Discard { range } => {
                self.unpack(clusters(range));
                operation
            }
            Operation::Flush => operation,
        }
    }

    /// Clusters are changed.
    fn unpack(&mut self, clusters: Range<u64>) {
        self.unpacked |= self.compressed.range(clusters).next().is_some();
    }

    fn change(&mut self, random: &mut SmallRng) -> Change {
        let kept: Vec<u32> = self.snapshots.iter().map(|(number, _)| *number).collect();
        let change = Change::random(random, &kept);
        match change {
            Change::Create(number) => self.snapshots.push((number, self.length)),
            Change::Apply(number) => {
                let applied = self.snapshots.iter().find(|(kept, _)| *kept == number);
                self.length = applied.unwrap().1;
            }
            Change::Delete(number) => self.snapshots.retain(|(kept, _)| *kept != number),
        }
        change
    }
}

/// Operations on a disk, whose length they may change.
fn operations(
    random: &mut SmallRng,
    state: &mut State,
    (family, shape): (Family, &Shape),
) -> Vec<Operation> {
    state.compressed.clear();
    state.unpacked = false;
    (0..OPERATIONS)
        .map(|_| {
            let operation = Operation::random(random, state.length, shape);
            state.note(operation, (family, shape))
        })
        .collect()
}

/// Makes both images, and the backing that they share.
fn create(family: Family, shape: &Shape, directory: &Path, random: &mut SmallRng) {
    let size = shape.size.to_string();
    let mut arguments = vec!["create", "-q", "-f", "qcow2"];
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
        let options = shape.options(image);
        let arguments = [&arguments[..], &["-o", &options, image, &size]].concat();
        peer::run(directory, "qemu-img", &arguments);
    }
}

/// Both images are sound and show the same; ours shows what was read while it was open.
fn judge(directory: &Path, [mine, theirs]: [&str; 2], written: &[u8]) {
    peer::run(directory, "qemu-img", &["check", "-q", "-f", "qcow2", mine]);
    let formats = ["compare", "-q", "-f", "qcow2", "-F", "qcow2"];
    let compare = [&formats[..], &[mine, theirs]].concat();
    peer::run(directory, "qemu-img", &compare);
    let read = ours::with(&directory.join(theirs), async |disk| disk.content().await);
    assert!(read == written, "outboard reads the peer's image otherwise");
}

/// The newest and the oldest snapshot are the same in both images, read by either side.
fn judge_snapshots(directory: &Path, [mine, theirs]: [&str; 2], state: &State) {
    let (first, last) = (state.snapshots.first(), state.snapshots.last());
    for &(number, length) in first.into_iter().chain(last) {
        let by_us = ours::with(&directory.join(theirs), async |disk| {
            disk.snapshot(number).await
        });
        assert_eq!(by_us.len() as u64, length);
        // The peer reads a snapshot at the disk's present length.
        let by_peer = peer::snapshot(directory, mine, number);
        let common = by_us.len().min(by_peer.len());
        assert!(
            by_us[..common] == by_peer[..common],
            "snapshot {number} differs"
        );
    }
}
