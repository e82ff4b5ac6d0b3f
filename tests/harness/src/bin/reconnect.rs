//! Measures what a guest notices of `kill -9`: from the kill to the first request that completes after it,
//! under verified load, with every format and both kinds of rings.
//!
//! `reconnect [KILLS]`: so many kills in each case, 200 unless told otherwise. A successor is started at once,
//! as a service manager does; its start is a part of the pause. Ends with an error when a request fails or
//! reads something wrong, whatever the times are. `scripts/bench reconnect` builds what it measures.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use harness::driver::Options;
use harness::load::{self, Plan};
use harness::process::Program;
use harness::rig::{Disk, Format, Leaks, Rig};
use harness::supervisor::{self, Ordeal, Report, Strike};

/// The longest pause that 99 of 100 kills may make.
const BAR: Duration = Duration::from_millis(100);
const KILLS: usize = 200;

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let kills = match (arguments.next().map(|text| text.parse()), arguments.next()) {
        (None, None) => KILLS,
        (Some(Ok(kills)), None) if kills > 0 => kills,
        _ => {
            eprintln!("usage: reconnect [KILLS]");
            return ExitCode::from(2);
        }
    };
    match measure(kills) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("reconnect: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn measure(kills: usize) -> Result<()> {
    println!(
        "{:<14}{:<8}{:>10}{:>10}{:>10}{:>12}  (ms; {kills} kills; bar: p99 < {} ms)",
        "format",
        "rings",
        "p50",
        "p99",
        "max",
        "start p50",
        BAR.as_millis()
    );
    for format in [Format::Raw, Format::Qcow2, Format::Qcow2Overlay] {
        for (rings, options) in [
            ("split", Options::default()),
            ("packed", Options::default().packed()),
        ] {
            let report = endure(format, options, kills)
                .with_context(|| format!("{format:?}, {rings} rings"))?;
            let ms = |time: Duration| format!("{:.1}", time.as_secs_f64() * 1000.0);
            let start = report.pause(50).saturating_sub(report.resumption(50));
            let verdict = if report.pause(99) < BAR {
                "met"
            } else {
                "missed"
            };
            println!(
                "{:<14}{rings:<8}{:>10}{:>10}{:>10}{:>12}  {verdict}",
                format!("{format:?}").to_lowercase(),
                ms(report.pause(50)),
                ms(report.pause(99)),
                ms(report.pause(100)),
                ms(start),
            );
        }
    }
    Ok(())
}

fn endure(format: Format, options: Options, kills: usize) -> Result<Report> {
    let mut rig = Rig::start(Disk::new(Program::OutboardBlkd, format).queues(2, 2))?;
    let (mut front_end, mut queues) = rig.connect(options)?;
    let ordeal = Ordeal {
        strike: Strike::Kill,
        times: kills,
        seed: 1,
    };
    let plan = Plan::default();
    let report = supervisor::run(&mut rig, (&mut front_end, &mut queues), &plan, ordeal)?;
    load::verify_all(&mut queues[0], &rig.oracle)?;
    drop(front_end);
    rig.finish_offline(Leaks::Allowed)?;
    Ok(report)
}
