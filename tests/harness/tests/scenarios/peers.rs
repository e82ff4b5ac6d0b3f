//! The harness itself is right: its driver and oracle agree with back-ends that are not ours.

use std::time::Duration;

use anyhow::{Result, ensure};
use harness::driver::features::bits;
use harness::driver::{Alignment, Endpoint, FrontEnd, Options, Request, SectorRange, Wait};
use harness::driver::{ID_BYTES, Operation};
use harness::load::{self, Mix, Plan, Stop};
use harness::oracle::{Initial, Oracle};
use harness::process::Program;
use harness::ramdisk::{RamDisk, SERIAL};
use harness::rig::{Disk, Format};

use crate::{clear, lifecycle, memory, verify};

const PEER: Program = Program::QemuStorageDaemon;

#[test]
fn driver_verifies_against_qemu_storage_daemon() -> Result<()> {
    for format in [Format::Raw, Format::Qcow2, Format::Qcow2Overlay] {
        let disk = Disk::new(PEER, format).queues(2, 1);
        verify::verify(disk, Options::default(), Plan::default(), 2000)?;
    }
    Ok(())
}

#[test]
fn driver_polls_without_event_idx_and_indirect_against_qemu_storage_daemon() -> Result<()> {
    let options = Options {
        wait: Wait::Poll,
        ..Options::default()
    }
    .without_features(bits::RING_EVENT_IDX | bits::RING_INDIRECT_DESC);
    let plan = Plan {
        mix: Mix::TRANSFERS,
        alignment: Alignment::Sector,
        ..Plan::default()
    };
    verify::verify(Disk::new(PEER, Format::Qcow2), options, plan, 2000)
}

#[test]
fn driver_swaps_memory_against_qemu_storage_daemon() -> Result<()> {
    memory::regions_are_replaced_between_loads(PEER)
}

#[test]
fn driver_clears_against_qemu_storage_daemon() -> Result<()> {
    clear::zeroes_and_discards_mean_what_virtio_says(PEER)
}

#[test]
fn driver_reconnects_against_qemu_storage_daemon() -> Result<()> {
    lifecycle::front_ends_come_and_go(PEER)
}

#[test]
fn driver_verifies_against_rust_vmm_backend() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let socket = directory.path().join("vhost.sock");
    let bytes = 32 << 20;
    let back_end = RamDisk::serve(&socket, bytes, 2)?;
    let options = Options {
        queues: 2,
        ..Options::default()
    };
    let (front_end, mut queues) = FrontEnd::connect(Endpoint::Connect(socket), options)?;
    let serial = queues[0].run(Request::get_id(), &[])?.ok()?;
    ensure!(
        serial.len() == ID_BYTES && serial.starts_with(SERIAL),
        "serial {serial:?}"
    );
    let oracle = Oracle::new((bytes / 512) as u64, Initial::Zero);
    load::run_on_all(&mut queues, &oracle, &Plan::default(), Stop::After(3000))?;
    load::verify_all(&mut queues[0], &oracle)?;
    drop(front_end);
    back_end.join()
}

#[test]
fn a_silent_back_end_is_an_error_and_not_a_hang() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let socket = directory.path().join("vhost.sock");
    let back_end = RamDisk::serve(&socket, 1 << 20, 1)?;
    let timeout = Duration::from_millis(200);
    let options = Options {
        timeout,
        ..Options::default()
    };
    let (mut front_end, mut queues) = FrontEnd::connect(Endpoint::Connect(socket), options)?;
    front_end.stop_ring(0)?;
    let read = Request::contiguous(Operation::Read, SectorRange::new(0, 1));
    let error = queues[0]
        .run(read, &[])
        .expect_err("nobody serves the ring");
    ensure!(error.to_string().contains("no completion"), "{error:#}");
    drop(front_end);
    back_end.join()
}

#[test]
fn the_oracle_notices_a_lost_write() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let socket = directory.path().join("vhost.sock");
    let back_end = RamDisk::serve(&socket, 1 << 20, 1)?;
    let endpoint = Endpoint::Connect(socket);
    let (front_end, mut queues) = FrontEnd::connect(endpoint, Options::default())?;
    let oracle = Oracle::new(2048, Initial::Zero);
    let range = SectorRange::new(8, 8);
    let (ticket, data) = oracle
        .begin_write(range, (1, 1))
        .expect("nothing is in flight");
    let mut lost = data.clone();
    lost[3 * 512..4 * 512].fill(0);
    queues[0]
        .run(Request::contiguous(Operation::Write, range), &lost)?
        .ok()?;
    oracle.complete(&ticket, &[])?;
    let error = load::verify_all(&mut queues[0], &oracle).expect_err("sector 11 was lost");
    ensure!(format!("{error:#}").contains("sector 11"), "{error:#}");
    drop(front_end);
    back_end.join()
}
