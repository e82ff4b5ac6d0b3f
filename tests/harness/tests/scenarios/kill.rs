//! kill -9 under verified load: the guest notices a pause and nothing else.
//!
//! The tests of this module add up to 200 kills.

use std::time::Duration;

use anyhow::{Result, ensure};
use harness::driver::Options;
use harness::load::{self, Plan};
use harness::process::Program;
use harness::rig::{Disk, Format, Leaks, Rig};
use harness::supervisor::{self, Ordeal, Strike};

/// What the guest may notice of most kills beyond the time the daemon takes to start. The slowest
/// are left to the report: on a machine with other work they tell more of that than of the daemon.
const MOST_RESUMPTIONS: (usize, Duration) = (90, Duration::from_millis(200));

fn survive(format: Format, times: usize, seed: u64) -> Result<()> {
    let mut rig = Rig::start(Disk::new(Program::OutboardBlkd, format).queues(2, 2))?;
    let (mut front_end, mut queues) = rig.connect(Options::default())?;
    let ordeal = Ordeal {
        strike: Strike::Kill,
        times,
        seed,
    };
    let plan = Plan {
        seed,
        ..Plan::default()
    };
    let report = supervisor::run(&mut rig, (&mut front_end, &mut queues), &plan, ordeal)?;
    println!("{format:?}: {report}");
    load::verify_all(&mut queues[0], &rig.oracle)?;
    drop(front_end);
    rig.finish_offline(Leaks::Allowed)?;
    let (percent, limit) = MOST_RESUMPTIONS;
    let resumption = report.resumption(percent);
    ensure!(
        resumption < limit,
        "{percent} % of the resumptions take up to {resumption:?}"
    );
    Ok(())
}

#[test]
fn raw_survives_100_kills_without_loss_or_error() -> Result<()> {
    survive(Format::Raw, 100, 21)
}

#[test]
fn qcow2_survives_70_kills_without_loss_or_error() -> Result<()> {
    survive(Format::Qcow2, 70, 22)
}

#[test]
fn qcow2_overlay_survives_30_kills_without_loss_or_error() -> Result<()> {
    survive(Format::Qcow2Overlay, 30, 23)
}
