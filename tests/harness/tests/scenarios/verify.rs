//! Data written through every shape of request reads back right.

use anyhow::Result;
use harness::driver::features::bits;
use harness::driver::{Alignment, Options, Wait};
use harness::load::{self, Mix, Plan, Stop};
use harness::process::Program;
use harness::rig::{Disk, Format, Rig};

/// Random verified load of `plan` on every queue, then everything is read back and compared with
/// what QEMU's tools see in the image.
fn verify(disk: Disk, options: Options, plan: Plan, requests: u64) -> Result<()> {
    let rig = Rig::start(disk)?;
    let (front_end, mut queues) = rig.connect(options)?;
    let plan = Plan {
        max_segments: plan.max_segments.min(front_end.max_segments()),
        ..plan
    };
    let summary = load::run_on_all(&mut queues, &rig.oracle, &plan, Stop::After(requests))?;
    println!("{summary:?}");
    rig.finish(front_end, queues)
}

#[test]
fn driver_verifies_against_qemu_storage_daemon() -> Result<()> {
    for format in [Format::Raw, Format::Qcow2, Format::Qcow2Overlay] {
        let disk = Disk::new(Program::QemuStorageDaemon, format).queues(2, 1);
        verify(disk, Options::default(), Plan::default(), 3000)?;
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
    let disk = Disk::new(Program::QemuStorageDaemon, Format::Qcow2);
    let plan = Plan {
        mix: Mix::TRANSFERS,
        alignment: Alignment::Sector,
        ..Plan::default()
    };
    verify(disk, options, plan, 3000)
}
