//! Data written through every shape of request reads back right.

use anyhow::Result;
use harness::driver::features::bits;
use harness::driver::{Alignment, Options, Wait};
use harness::load::{self, Mix, Plan, Stop};
use harness::process::Program;
use harness::rig::{Disk, Format, Rig};

const FORMATS: [Format; 3] = [Format::Raw, Format::Qcow2, Format::Qcow2Overlay];

/// Random verified load of `plan` on every queue, then everything is read back and compared with
/// what QEMU's tools see in the image.
pub(crate) fn verify(disk: Disk, options: Options, plan: Plan, requests: u64) -> Result<()> {
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

fn verify_on_all_formats(options: &Options, plan: &Plan, requests: u64) -> Result<()> {
    FORMATS.into_iter().try_for_each(|format| {
        let disk = Disk::new(Program::OutboardBlkd, format);
        verify(disk, options.clone(), plan.clone(), requests)
    })
}

#[test]
fn random_load_verifies_with_event_idx_and_indirect_descriptors() -> Result<()> {
    verify_on_all_formats(&Options::default(), &Plan::default(), 2500)
}

#[test]
fn random_load_verifies_without_event_idx() -> Result<()> {
    let options = Options::default().without_features(bits::RING_EVENT_IDX);
    verify_on_all_formats(
        &options,
        &Plan {
            seed: 2,
            ..Plan::default()
        },
        1500,
    )
}

#[test]
fn random_load_verifies_without_indirect_descriptors() -> Result<()> {
    let options = Options::default().without_features(bits::RING_INDIRECT_DESC);
    verify_on_all_formats(
        &options,
        &Plan {
            seed: 3,
            ..Plan::default()
        },
        1500,
    )
}

#[test]
fn sector_aligned_load_verifies_with_a_polling_driver() -> Result<()> {
    let options = Options {
        wait: Wait::Poll,
        ..Options::default()
    };
    let plan = Plan {
        alignment: Alignment::Sector,
        seed: 4,
        ..Plan::default()
    };
    verify_on_all_formats(&options, &plan, 1500)
}

#[test]
fn requests_of_up_to_1024_segments_at_any_address_verify() -> Result<()> {
    let options = Options {
        queue_size: 1024,
        depth: 4,
        max_segments: 1024,
        max_request_bytes: 1 << 20,
        ..Options::default()
    };
    let plan = Plan {
        mix: Mix::TRANSFERS,
        max_segments: 1024,
        max_sectors: 2048,
        depth: 4,
        seed: 5,
        ..Plan::default()
    };
    verify_on_all_formats(&options, &plan, 250)
}

#[test]
fn requests_above_one_mebibyte_verify() -> Result<()> {
    let options = Options {
        depth: 4,
        max_request_bytes: 4 << 20,
        max_segments: 64,
        ..Options::default()
    };
    let plan = Plan {
        mix: Mix::TRANSFERS,
        max_sectors: 8192,
        max_segments: 64,
        depth: 4,
        seed: 6,
        ..Plan::default()
    };
    verify_on_all_formats(&options, &plan, 150)
}

#[test]
fn four_queues_on_two_iothreads_verify() -> Result<()> {
    FORMATS.into_iter().try_for_each(|format| {
        let disk = Disk::new(Program::OutboardBlkd, format).queues(4, 2);
        verify(
            disk,
            Options::default(),
            Plan {
                seed: 7,
                ..Plan::default()
            },
            1500,
        )
    })
}

#[test]
fn queues_that_share_clusters_do_not_disturb_each_other() -> Result<()> {
    // Sector-sized writes crowd into few clusters, so that queues allocate the same ones at once.
    let plan = Plan {
        mix: Mix::TRANSFERS,
        max_sectors: 3,
        area: Some(harness::driver::SectorRange::new(0, 16384)),
        seed: 8,
        ..Plan::default()
    };
    [Format::Qcow2, Format::Qcow2Overlay]
        .into_iter()
        .try_for_each(|format| {
            let disk = Disk::new(Program::OutboardBlkd, format).queues(4, 2);
            verify(disk, Options::default(), plan.clone(), 3000)
        })
}
