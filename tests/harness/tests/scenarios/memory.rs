//! The guest's memory changes while requests are in flight.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Result;
use harness::driver::Options;
use harness::load::{self, Plan, Stop};
use harness::process::Program;
use harness::rig::{Disk, Format, Rig};
use harness::wire::protocol_feature;

fn options(slots: bool) -> Options {
    let options = Options {
        data_regions: 3,
        ..Options::default()
    };
    if slots {
        options
    } else {
        options.without_protocol(protocol_feature::CONFIGURE_MEM_SLOTS)
    }
}

/// Replaces data regions between loads, when nothing is in flight.
pub(crate) fn regions_are_replaced_between_loads(program: Program) -> Result<()> {
    for slots in [false, true] {
        let rig = Rig::start(Disk::new(program, Format::Qcow2).queues(2, 1))?;
        let (front_end, mut queues) = rig.connect(options(slots))?;
        for round in 0..6 {
            let plan = Plan {
                seed: 41 + round,
                ..Plan::default()
            };
            load::run_on_all(&mut queues, &rig.oracle, &plan, Stop::After(150))?;
            front_end.replace_region(round as usize % 3)?;
        }
        rig.finish(front_end, queues)?;
    }
    Ok(())
}

/// Replaces data regions and repeats the memory table `times` times while two queues are loaded.
fn regions_are_replaced_under_load(program: Program, times: usize) -> Result<()> {
    for slots in [false, true] {
        let rig = Rig::start(Disk::new(program, Format::Qcow2).queues(2, 1))?;
        let (front_end, mut queues) = rig.connect(options(slots))?;
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| -> Result<()> {
            let (stop, oracle, loaded) = (&stop, &rig.oracle, &mut queues);
            let plan = Plan {
                depth: 8,
                ..Plan::default()
            };
            let load =
                scope.spawn(move || load::run_on_all(loaded, oracle, &plan, Stop::When(stop)));
            let swapped = (0..times).try_for_each(|round| {
                front_end.replace_region(round % 3)?;
                if slots {
                    Ok(())
                } else {
                    front_end.set_memory_table()
                }
            });
            stop.store(true, Ordering::Relaxed);
            let summary = load.join().expect("a load does not panic")?;
            println!("{summary:?}");
            swapped
        })?;
        rig.finish(front_end, queues)?;
    }
    Ok(())
}

#[test]
fn memory_tables_and_slots_are_swapped_under_load() -> Result<()> {
    regions_are_replaced_under_load(Program::OutboardBlkd, 60)
}
