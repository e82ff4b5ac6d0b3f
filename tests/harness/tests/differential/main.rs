//! qcow2 against QEMU's tools: the same random sequences of operations on two images, one worked on by
//! outboard's stack, the other by qemu-io and qemu-img. After each round both images must be sound and
//! show the same bytes, and the sides change images, so that each reads what the other wrote.
//!
//! `OUTBOARD_SEQUENCES` sets how many sequences each family runs, `OUTBOARD_SEED` the first seed. A
//! failure names its seed: `OUTBOARD_SEED=N OUTBOARD_SEQUENCES=1` runs that sequence alone.

#![expect(clippy::unwrap_used, reason = "tests")]

mod operation;
mod ours;
mod peer;
mod sequence;
mod shape;

use sequence::Family;

fn setting(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text
            .parse()
            .unwrap_or_else(|_| panic!("{name}={text} is not a number")),
        Err(_) => default,
    }
}

/// Runs `default` sequences of a family, or as many as asked for.
fn run(family: Family, default: u64) {
    let first = setting("OUTBOARD_SEED", 1);
    for seed in first..first + setting("OUTBOARD_SEQUENCES", default) {
        sequence::run(family, seed);
    }
}

#[test]
fn requests_on_images_of_every_shape_agree() {
    run(Family::Plain, 75);
}

#[test]
fn requests_over_a_backing_agree() {
    run(Family::Backed, 75);
}

#[test]
fn compressed_writes_agree() {
    run(Family::Compressed, 75);
}

#[test]
fn snapshots_agree() {
    run(Family::Snapshots, 75);
}
