//! What the device says about itself, and what it refuses.

use anyhow::{Result, ensure};
use harness::driver::features::{CONFIG_WRITEBACK_AT, bits};
use harness::driver::{
    ID_BYTES, Operation, Options, Queue, Request, STATUS_IOERR, STATUS_UNSUPPORTED, SectorRange,
};
use harness::load::{self, Mix, Plan, Stop};
use harness::process::{PATIENCE, Program};
use harness::rig::{Access, Disk, Format, Rig};
use harness::wire::protocol_feature;
use serde_json::json;

const OURS: Program = Program::OutboardBlkd;

fn status_of(queue: &mut Queue, operation: Operation, range: SectorRange) -> Result<u8> {
    let data = if operation == Operation::Write {
        vec![1; range.bytes()]
    } else {
        Vec::new()
    };
    Ok(queue
        .run(Request::contiguous(operation, range), &data)?
        .status)
}

#[test]
fn the_device_offers_what_a_guest_expects() -> Result<()> {
    let rig = Rig::start(Disk::new(OURS, Format::Qcow2).queues(4, 2))?;
    let (front_end, queues) = rig.connect(Options::default())?;
    let wanted = [
        ("SEG_MAX", bits::SEG_MAX),
        ("BLK_SIZE", bits::BLK_SIZE),
        ("TOPOLOGY", bits::TOPOLOGY),
        ("FLUSH", bits::FLUSH),
        ("CONFIG_WCE", bits::CONFIG_WCE),
        ("MQ", bits::MQ),
        ("DISCARD", bits::DISCARD),
        ("WRITE_ZEROES", bits::WRITE_ZEROES),
        ("INDIRECT_DESC", bits::RING_INDIRECT_DESC),
        ("EVENT_IDX", bits::RING_EVENT_IDX),
    ];
    for (name, bit) in wanted {
        ensure!(front_end.offered() & bit != 0, "{name} is not offered");
    }
    ensure!(
        front_end.offered() & bits::RO == 0,
        "a writable disk claims to be read-only"
    );
    let protocol = [
        ("MQ", protocol_feature::MQ),
        ("REPLY_ACK", protocol_feature::REPLY_ACK),
        ("BACKEND_REQ", protocol_feature::BACKEND_REQ),
        ("CONFIG", protocol_feature::CONFIG),
        ("INFLIGHT_SHMFD", protocol_feature::INFLIGHT_SHMFD),
        ("RESET_DEVICE", protocol_feature::RESET_DEVICE),
        ("CONFIGURE_MEM_SLOTS", protocol_feature::CONFIGURE_MEM_SLOTS),
        ("STATUS", protocol_feature::STATUS),
    ];
    for (name, bit) in protocol {
        ensure!(
            front_end.protocol() & bit != 0,
            "protocol feature {name} is not offered"
        );
    }
    let config = front_end.config();
    ensure!(
        config.capacity == rig.oracle.sectors(),
        "capacity {}",
        config.capacity
    );
    ensure!(config.num_queues == 4, "{} queues", config.num_queues);
    ensure!(config.block_size == 512, "block size {}", config.block_size);
    ensure!(
        config.max_discard_sectors > 0 && config.max_write_zeroes_sectors > 0,
        "{config:?}"
    );
    rig.finish(front_end, queues)
}

#[test]
fn get_id_returns_the_serial_padded_with_zeroes() -> Result<()> {
    let disk = Disk {
        serial: Some("outboard-4711".into()),
        ..Disk::new(OURS, Format::Raw)
    };
    let rig = Rig::start(disk)?;
    let (front_end, mut queues) = rig.connect(Options::default())?;
    let serial = queues[0].run(Request::get_id(), &[])?.ok()?;
    let mut expected = b"outboard-4711".to_vec();
    expected.resize(ID_BYTES, 0);
    ensure!(serial == expected, "serial {serial:?}");
    rig.finish(front_end, queues)
}

#[test]
fn a_read_only_export_reads_and_refuses_every_change() -> Result<()> {
    for format in [Format::Raw, Format::Qcow2] {
        let disk = Disk {
            access: Access::ReadOnly,
            ..Disk::new(OURS, format)
        };
        let rig = Rig::start(disk)?;
        let (front_end, mut queues) = rig.connect(Options::default())?;
        ensure!(front_end.offered() & bits::RO != 0, "RO is not offered");
        let queue = &mut queues[0];
        let range = SectorRange::new(0, 8);
        ensure!(
            status_of(queue, Operation::Write, range)? == STATUS_IOERR,
            "write"
        );
        for operation in [Operation::Discard, Operation::WriteZeroes] {
            let status = queue.run(Request::clear(operation, range), &[])?.status;
            let refused = [STATUS_IOERR, STATUS_UNSUPPORTED].contains(&status);
            ensure!(refused, "{operation:?} ended with status {status}");
        }
        let plan = Plan {
            mix: Mix::READS,
            ..Plan::default()
        };
        load::run_on_all(&mut queues, &rig.oracle, &plan, Stop::After(300))?;
        rig.finish(front_end, queues)?;
    }
    Ok(())
}

#[test]
fn transfers_beyond_the_end_fail_and_change_nothing() -> Result<()> {
    for format in [Format::Raw, Format::Qcow2] {
        let rig = Rig::start(Disk::new(OURS, format))?;
        let (front_end, mut queues) = rig.connect(Options::default())?;
        let queue = &mut queues[0];
        let end = rig.oracle.sectors();
        for operation in [Operation::Read, Operation::Write] {
            for first in [end - 7, end, u64::MAX / 512, u64::MAX - 1] {
                let status = status_of(queue, operation, SectorRange::new(first, 8))?;
                ensure!(
                    status == STATUS_IOERR,
                    "{operation:?} at {first}: status {status}"
                );
            }
        }
        load::verify_all(queue, &rig.oracle)?;
        rig.finish(front_end, queues)?;
    }
    Ok(())
}

#[test]
fn an_unknown_request_is_unsupported() -> Result<()> {
    let rig = Rig::start(Disk::new(OURS, Format::Raw))?;
    let (front_end, mut queues) = rig.connect(Options::default())?;
    for number in [2, 3, 99, u32::MAX] {
        let request = Request::clear(Operation::Unknown(number), SectorRange::new(0, 0));
        let status = queues[0].run(request, &[])?.status;
        ensure!(
            status == STATUS_UNSUPPORTED,
            "type {number}: status {status}"
        );
    }
    rig.finish(front_end, queues)
}

#[test]
fn the_guest_switches_the_write_cache() -> Result<()> {
    let rig = Rig::start(Disk::new(OURS, Format::Raw))?;
    let (mut front_end, mut queues) = rig.connect(Options::default())?;
    ensure!(
        front_end.config().writeback == 1,
        "write-back is the default"
    );
    front_end.set_config(CONFIG_WRITEBACK_AT, &[0])?;
    ensure!(
        front_end.refresh_config()?.writeback == 0,
        "write-through was not taken"
    );
    load::run_on_all(&mut queues, &rig.oracle, &Plan::default(), Stop::After(200))?;
    rig.finish(front_end, queues)
}

#[test]
fn a_reset_device_starts_afresh() -> Result<()> {
    for without in [0, protocol_feature::RESET_DEVICE] {
        let rig = Rig::start(Disk::new(OURS, Format::Qcow2).queues(2, 1))?;
        let options = Options::default().without_protocol(without);
        let (mut front_end, mut queues) = rig.connect(options)?;
        for seed in 31..34 {
            let plan = Plan {
                seed,
                ..Plan::default()
            };
            load::run_on_all(&mut queues, &rig.oracle, &plan, Stop::After(200))?;
            front_end.reset_device()?;
            ensure!(
                front_end.status()? == 0,
                "status {:#x} after a reset",
                front_end.status()?
            );
            queues.iter_mut().for_each(Queue::reset);
            front_end.start()?;
        }
        rig.finish(front_end, queues)?;
    }
    Ok(())
}

#[test]
fn a_live_resize_reaches_the_guest_as_a_config_change() -> Result<()> {
    for format in [Format::Raw, Format::Qcow2] {
        let rig = Rig::start(Disk::new(OURS, format))?;
        let (mut front_end, mut queues) = rig.connect(Options::default())?;
        load::run_on_all(&mut queues, &rig.oracle, &Plan::default(), Stop::After(300))?;
        let mut monitor = rig.monitor()?;
        let bytes = rig.disk.bytes * 3 / 2;
        monitor.execute("block_resize", json!({"node-name": "n", "size": bytes}))?;
        front_end.config_change(PATIENCE)?;
        let sectors = front_end.refresh_config()?.capacity;
        ensure!(
            sectors == bytes / 512,
            "capacity {sectors} after growing to {bytes} bytes"
        );
        rig.oracle.grow(sectors);
        let plan = Plan {
            seed: 2,
            ..Plan::default()
        };
        load::run_on_all(&mut queues, &rig.oracle, &plan, Stop::After(500))?;
        rig.finish(front_end, queues)?;
    }
    Ok(())
}
