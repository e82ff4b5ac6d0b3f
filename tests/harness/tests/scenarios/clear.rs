//! Discard and write-zeroes (virtio 1.2, section 5.2.6.1 and 5.2.6.2).

use anyhow::{Result, ensure};
use harness::driver::{
    Operation, Options, Queue, Request, STATUS_IOERR, STATUS_OK, STATUS_UNSUPPORTED, SectorRange,
};
use harness::load;
use harness::oracle::Oracle;
use harness::process::Program;
use harness::rig::{Disk, Format, Rig};

/// Ranges that start and end inside clusters, span several, and end with the disk.
const RANGES: [SectorRange; 4] = [
    SectorRange { first: 1, count: 3 },
    SectorRange {
        first: 120,
        count: 1000,
    },
    SectorRange {
        first: 4096,
        count: 4096,
    },
    SectorRange {
        first: 131_072 - 200,
        count: 200,
    },
];

fn write_all(queue: &mut Queue, oracle: &Oracle, (range, count): (SectorRange, u64)) -> Result<()> {
    let mut at = range.first;
    while at < range.end() {
        let part = SectorRange::new(at, (range.end() - at).min(256));
        let name = (1, count << 32 | (at + 1));
        let (ticket, data) = oracle
            .begin_write(part, name)
            .expect("nothing is in flight");
        queue
            .run(Request::contiguous(Operation::Write, part), &data)?
            .ok()?;
        oracle.complete(&ticket, &[])?;
        at = part.end();
    }
    Ok(())
}

fn clear(
    queue: &mut Queue,
    oracle: &Oracle,
    (operation, range): (Operation, SectorRange),
) -> Result<()> {
    let ticket = oracle
        .begin(operation, vec![range])
        .expect("nothing is in flight");
    queue.run(Request::clear(operation, range), &[])?.ok()?;
    oracle.complete(&ticket, &[])
}

/// Cleared ranges read as zeroes (or, discarded, as before), their neighbours are untouched, and
/// data written over them is there.
pub(crate) fn zeroes_and_discards_mean_what_virtio_says(program: Program) -> Result<()> {
    for format in [Format::Raw, Format::Qcow2, Format::Qcow2Overlay] {
        let rig = Rig::start(Disk::new(program, format))?;
        let (front_end, mut queues) = rig.connect(Options::default())?;
        let queue = &mut queues[0];
        for (round, operation) in [
            Operation::WriteZeroes,
            Operation::WriteZeroesUnmap,
            Operation::Discard,
        ]
        .into_iter()
        .enumerate()
        {
            for range in RANGES {
                let start = range.first.saturating_sub(8);
                let end = (range.end() + 8).min(rig.oracle.sectors());
                let around = SectorRange::new(start, end - start);
                write_all(queue, &rig.oracle, (around, round as u64))?;
                clear(queue, &rig.oracle, (operation, range))?;
            }
            load::verify_all(queue, &rig.oracle)?;
            write_all(
                queue,
                &rig.oracle,
                (SectorRange::new(130, 20), 10 + round as u64),
            )?;
            load::verify_all(queue, &rig.oracle)?;
        }
        rig.finish(front_end, queues)?;
    }
    Ok(())
}

#[test]
fn cleared_ranges_read_right_and_neighbours_stay() -> Result<()> {
    zeroes_and_discards_mean_what_virtio_says(Program::OutboardBlkd)
}

#[test]
fn clearing_beyond_the_limits_is_refused_and_changes_nothing() -> Result<()> {
    for format in [Format::Raw, Format::Qcow2] {
        let rig = Rig::start(Disk::new(Program::OutboardBlkd, format))?;
        let (front_end, mut queues) = rig.connect(Options::default())?;
        let queue = &mut queues[0];
        write_all(queue, &rig.oracle, (SectorRange::new(0, 64), 1))?;
        let end = rig.oracle.sectors();
        for operation in [Operation::Discard, Operation::WriteZeroes] {
            for range in [
                SectorRange::new(end - 8, 9),
                SectorRange::new(end, 1),
                SectorRange::new(u64::MAX - 3, 8),
                SectorRange::new(u64::MAX / 512, 8),
            ] {
                let done = queue.run(Request::clear(operation, range), &[])?;
                ensure!(
                    done.status == STATUS_IOERR,
                    "{operation:?} {range:?}: {}",
                    done.status
                );
            }
        }
        load::verify_all(queue, &rig.oracle)?;
        rig.finish(front_end, queues)?;
    }
    Ok(())
}

#[test]
fn several_ranges_in_one_request_are_all_cleared_or_refused() -> Result<()> {
    let rig = Rig::start(Disk::new(Program::OutboardBlkd, Format::Qcow2))?;
    let (front_end, mut queues) = rig.connect(Options::default())?;
    let allowed = front_end.config().max_write_zeroes_seg;
    let queue = &mut queues[0];
    write_all(queue, &rig.oracle, (SectorRange::new(0, 4096), 1))?;
    let ranges = [
        SectorRange::new(3, 5),
        SectorRange::new(1000, 300),
        SectorRange::new(2048, 128),
    ];
    let operation = Operation::WriteZeroes;
    let ticket = rig
        .oracle
        .begin(operation, ranges.to_vec())
        .expect("nothing is in flight");
    let mut request = Request::clear(operation, ranges[0]);
    request.more_ranges = ranges[1..].to_vec();
    let done = queue.run(request, &[])?;
    if allowed as usize >= ranges.len() {
        ensure!(done.status == STATUS_OK, "status {}", done.status);
        rig.oracle.complete(&ticket, &[])?;
    } else {
        let refused = [STATUS_IOERR, STATUS_UNSUPPORTED].contains(&done.status);
        ensure!(refused, "{} ranges with a limit of {allowed}", ranges.len());
        rig.oracle.fail(&ticket);
    }
    load::verify_all(queue, &rig.oracle)?;
    rig.finish(front_end, queues)
}
