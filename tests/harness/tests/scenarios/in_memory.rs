//! Images on tmpfs, which the daemon copies from and to through a mapping.

use anyhow::{Result, ensure};
use harness::driver::{Operation, Options, Request, SectorRange};
use harness::load::{self, Plan, Stop};
use harness::process::Program;
use harness::rig::{Disk, Format, Leaks, Place, Rig};
use harness::supervisor::{self, Ordeal, Strike};

const FORMATS: [Format; 3] = [Format::Raw, Format::Qcow2, Format::Qcow2Overlay];

fn disk(format: Format) -> Disk {
    Disk {
        place: Place::Memory,
        ..Disk::new(Program::OutboardBlkd, format)
    }
}

#[test]
fn random_load_on_several_queues_verifies() -> Result<()> {
    for format in FORMATS {
        let rig = Rig::start(disk(format).queues(2, 2))?;
        let (front_end, mut queues) = rig.connect(Options::default())?;
        let summary = load::run_on_all(
            &mut queues,
            &rig.oracle,
            &Plan::default(),
            Stop::After(6000),
        )?;
        println!("{format:?}: {summary:?}");
        rig.finish(front_end, queues)?;
    }
    Ok(())
}

#[test]
fn kills_lose_nothing() -> Result<()> {
    for (seed, format) in (31..).zip(FORMATS) {
        let mut rig = Rig::start(disk(format).queues(2, 2))?;
        let (mut front_end, mut queues) = rig.connect(Options::default())?;
        let ordeal = Ordeal {
            strike: Strike::Kill,
            times: 8,
            seed,
        };
        let plan = Plan {
            seed,
            ..Plan::default()
        };
        let report = supervisor::run(&mut rig, (&mut front_end, &mut queues), &plan, ordeal)?;
        println!("{format:?}, seed {seed}: {report}");
        load::verify_all(&mut queues[0], &rig.oracle)?;
        drop(front_end);
        rig.finish_offline(Leaks::Allowed)?;
    }
    Ok(())
}

#[test]
fn an_image_that_another_program_truncates_is_served_as_far_as_it_goes() -> Result<()> {
    const SECTORS: u64 = 8;
    let rig = Rig::start(disk(Format::Raw))?;
    let (front_end, mut queues) = rig.connect(Options::default())?;
    let queue = &mut queues[0];
    let transfer =
        |operation, first| Request::contiguous(operation, SectorRange::new(first, SECTORS));
    let ones = vec![1; SECTORS as usize * 512];
    // Whole granules, so that all of them are mapped.
    let granule = SectorRange::new(0, 128);
    for first in (0..rig.oracle.sectors()).step_by(128) {
        let range = SectorRange::new(first, granule.count);
        let write = Request::contiguous(Operation::Write, range);
        queue.run(write, &vec![1; range.bytes()])?.ok()?;
    }
    let image = std::fs::File::options()
        .write(true)
        .open(&rig.paths.image)?;
    image.set_len(1 << 20)?;
    let (kept, lost) = (64, 50_000);
    let read = queue.run(transfer(Operation::Read, lost), &[])?.ok()?;
    ensure!(
        read.iter().all(|byte| *byte == 0),
        "what is cut off is zero"
    );
    let read = queue.run(transfer(Operation::Read, kept), &[])?.ok()?;
    ensure!(read == ones, "what is left is there");
    queue.run(transfer(Operation::Write, lost), &ones)?.ok()?;
    let read = queue.run(transfer(Operation::Read, lost), &[])?.ok()?;
    ensure!(read == ones, "what is written again is there");
    ensure!(
        image.metadata()?.len() == (lost + SECTORS) * 512,
        "and in the file"
    );
    drop(front_end);
    Ok(())
}
