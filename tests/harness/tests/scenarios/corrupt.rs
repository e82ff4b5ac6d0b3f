//! What clients of the monitor hear of an image that turns out to be corrupt.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Result, ensure};
use harness::driver::{Operation, Options, Request, SectorRange};
use harness::peer;
use harness::process::Program;
use harness::rig::{Disk, Format, Rig};
use serde_json::{Value, json};

const OURS: Program = Program::OutboardBlkd;
const PEER: Program = Program::QemuStorageDaemon;
const CLUSTER: u64 = 65536;

fn word(image: &Path, offset: u64) -> Result<u64> {
    let mut bytes = [0; 8];
    OpenOptions::new()
        .read(true)
        .open(image)?
        .read_exact_at(&mut bytes, offset)?;
    Ok(u64::from_be_bytes(bytes))
}

fn overwrite(image: &Path, offset: u64, bytes: &[u8]) -> Result<()> {
    let file = OpenOptions::new().write(true).open(image)?;
    Ok(file.write_all_at(bytes, offset)?)
}

/// The first cluster of the disk lies at no cluster of the file.
fn misplace_data(image: &Path) -> Result<()> {
    peer::io("qcow2", image, &["write -P 1 0 64k"])?;
    const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
    let l1_table = word(image, 40)?;
    let l2_table = word(image, l1_table)? & OFFSET_MASK;
    let entry = word(image, l2_table)? + 512;
    overwrite(image, l2_table, &entry.to_be_bytes())
}

/// The L1 table's cluster counts as free.
fn free_the_l1_table(image: &Path) -> Result<()> {
    let l1_cluster = word(image, 40)? / CLUSTER;
    let refcount_block = word(image, word(image, 48)?)?;
    overwrite(image, refcount_block + 2 * l1_cluster, &[0, 0])
}

/// Runs one request, which fails, and gives the event's data.
fn found_by(
    program: Program,
    harm: fn(&Path) -> Result<()>,
    operation: Operation,
) -> Result<Value> {
    let rig = Rig::start_prepared(Disk::new(program, Format::Qcow2), |paths| {
        harm(&paths.image)
    })?;
    let mut monitor = rig.monitor()?;
    let (_front_end, mut queues) = rig.connect(Options::default())?;
    for _ in 0..2 {
        let request = Request::contiguous(operation, SectorRange::new(0, 8));
        let data = match operation {
            Operation::Write => vec![2; 4096],
            _ => Vec::new(),
        };
        let done = queues[0].run(request, &data)?;
        ensure!(done.status == 1, "status {}", done.status);
    }
    let mut event = monitor.event("BLOCK_IMAGE_CORRUPTED")?;
    ensure!(event["timestamp"]["seconds"].is_u64(), "{event}");
    // Once: nothing more is on the wire before the answer.
    monitor.execute("query-version", json!({}))?;
    ensure!(
        monitor.events().all(|more| more["event"] != event["event"]),
        "told twice"
    );
    let data = event["data"].take();
    let message = data["msg"].as_str().unwrap_or_default();
    ensure!(!message.is_empty(), "{data}");
    Ok(data)
}

/// All but the words for a human.
fn compared(mut data: Value) -> Value {
    if let Some(members) = data.as_object_mut() {
        members.remove("msg");
    }
    data
}

fn told_as_by_the_peer(harm: fn(&Path) -> Result<()>, operation: Operation) -> Result<Value> {
    let ours = found_by(OURS, harm, operation)?;
    let theirs = found_by(PEER, harm, operation)?;
    ensure!(
        compared(ours.clone()) == compared(theirs.clone()),
        "{ours}, the peer: {theirs}"
    );
    Ok(compared(ours))
}

#[test]
fn a_misplaced_cluster_is_told_as_qemu_storage_daemon_does() -> Result<()> {
    let told = told_as_by_the_peer(misplace_data, Operation::Read)?;
    let expected = json!({"device": "", "node-name": "n", "fatal": true});
    ensure!(told == expected, "{told}");
    Ok(())
}

#[test]
fn a_write_that_would_hit_metadata_is_told_as_qemu_storage_daemon_does() -> Result<()> {
    let told = told_as_by_the_peer(free_the_l1_table, Operation::Write)?;
    ensure!(told["offset"].is_u64() && told["size"].is_u64(), "{told}");
    Ok(())
}
