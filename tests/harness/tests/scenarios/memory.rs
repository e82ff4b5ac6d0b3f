//! The guest's memory changes while requests are in flight.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Result;
use harness::driver::Options;
use harness::load::{self, Plan, Stop};
use harness::process::Program;
use harness::rig::{Disk, Format, Rig};
use harness::wire::protocol_feature;

/// Replaces data regions and repeats the memory table `times` times while two queues are loaded.
pub(crate) fn regions_are_replaced_under_load(program: Program, times: usize) -> Result<()> {
    for slots in [false, true] {
        let rig = Rig::start(Disk::new(program, Format::Qcow2).queues(2, 1))?;
        let mut options = Options {
            data_regions: 3,
            ..Options::default()
        };
        if !slots {
            options = options.without_protocol(protocol_feature::CONFIGURE_MEM_SLOTS);
        }
        let (front_end, mut queues) = rig.connect(options)?;
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
