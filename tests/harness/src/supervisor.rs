//! Interrupts a daemon again and again under verified load, and measures what the guest notices.
//!
//! The load runs on the queues all the time, as a guest's does. The supervisor waits until a random
//! number of further requests has completed, strikes, and lets the front-end reconnect with the same
//! inflight region, as a VMM does. Some strikes follow the reconnect at once, so that they hit replay.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::driver::{FrontEnd, Queue};
use crate::load::{Load, Plan, Stop, Summary};
use crate::process::PATIENCE;
use crate::progress::Progress;
use crate::rig::Rig;

/// Most completions between two strikes.
const MAX_COMPLETIONS: u64 = 1200;

/// What happens to the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strike {
    /// SIGKILL, and a new daemon with the same command line.
    Kill,
    /// The front-end closes the connection and opens another; the daemon lives on.
    Disconnect,
}

/// How often what happens.
#[derive(Clone, Copy, Debug)]
pub struct Ordeal {
    /// What.
    pub strike: Strike,
    /// How often.
    pub times: usize,
    /// Seed of the moments.
    pub seed: u64,
}

/// Times of all strikes, shortest first.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// What the load did.
    pub load: Summary,
    /// From the strike to the next completion.
    pub pauses: Vec<Duration>,
    /// From the moment the daemon was ready again to the next completion.
    pub resumptions: Vec<Duration>,
}

impl Report {
    /// The pause that `percent` per cent of the pauses do not exceed.
    pub fn pause(&self, percent: usize) -> Duration {
        percentile(&self.pauses, percent)
    }

    /// The same for resumptions.
    pub fn resumption(&self, percent: usize) -> Duration {
        percentile(&self.resumptions, percent)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let line = |times: &[Duration]| {
            let [half, most, all] = [50, 99, 100].map(|p| percentile(times, p));
            format!("p50 {half:.1?} p99 {most:.1?} max {all:.1?}")
        };
        write!(
            f,
            "{} strikes, {} requests ({} flushes, {} MiB): pause {}; daemon ready to next completion {}",
            self.pauses.len(),
            self.load.requests,
            self.load.flushes,
            self.load.bytes >> 20,
            line(&self.pauses),
            line(&self.resumptions)
        )
    }
}

/// Puts the rig through `ordeal` while every queue runs `plan`.
///
/// # Errors
/// When the load sees a wrong answer, an error status or no answer, or the daemon does not come back.
pub fn run(
    rig: &mut Rig,
    (front_end, queues): (&mut FrontEnd, &mut [Queue]),
    plan: &Plan,
    ordeal: Ordeal,
) -> Result<Report> {
    let progress = Progress::default();
    let stop = AtomicBool::new(false);
    let oracle = rig.oracle.clone();
    std::thread::scope(|scope| {
        let (progress, stop, oracle) = (&progress, &stop, &oracle);
        let loads: Vec<_> = queues
            .iter_mut()
            .map(|queue| {
                scope.spawn(move || {
                    let _announce = EndOfLoad { progress, stop };
                    let load = Load::new(queue, oracle, plan.clone()).reporting_to(progress);
                    load.run(Stop::When(stop))
                })
            })
            .collect();
        let struck = strike_repeatedly(rig, front_end, progress, ordeal);
        stop.store(true, Ordering::Relaxed);
        let summary = loads.into_iter().try_fold(Summary::default(), |sum, load| {
            Ok::<_, anyhow::Error>(sum.merge(load.join().expect("a load does not panic")?))
        });
        // A load's error comes first: it is the cause when the supervisor gave up as well.
        let summary = match (summary, &struck) {
            (Err(error), Err(other)) => return Err(error.context(format!("supervisor: {other:#}"))),
            (summary, _) => summary?,
        };
        Ok(Report {
            load: summary,
            ..struck?
        })
    })
    .with_context(|| format!("{ordeal:?}"))
}

/// Tells everybody when a load ends before it is asked to.
struct EndOfLoad<'a> {
    progress: &'a Progress,
    stop: &'a AtomicBool,
}

impl Drop for EndOfLoad<'_> {
    fn drop(&mut self) {
        if !self.stop.swap(true, Ordering::Relaxed) {
            self.progress.stop();
        }
    }
}

fn strike_repeatedly(
    rig: &mut Rig,
    front_end: &mut FrontEnd,
    progress: &Progress,
    ordeal: Ordeal,
) -> Result<Report> {
    let mut rng = SmallRng::seed_from_u64(ordeal.seed);
    let mut report = Report::default();
    for number in 0..ordeal.times {
        let at_once = number > 0 && rng.random_ratio(1, 10);
        let completions = if at_once {
            0
        } else {
            rng.random_range(1..MAX_COMPLETIONS)
        };
        let (pause, resumption) =
            strike_once(rig, front_end, progress, (ordeal.strike, completions))
                .with_context(|| format!("strike {number}, after {completions} completions"))?;
        report.pauses.push(pause);
        report.resumptions.push(resumption);
    }
    report.pauses.sort_unstable();
    report.resumptions.sort_unstable();
    Ok(report)
}

/// Strikes after that many completions; the pause, and its part after the daemon was ready again.
fn strike_once(
    rig: &mut Rig,
    front_end: &mut FrontEnd,
    progress: &Progress,
    (strike, completions): (Strike, u64),
) -> Result<(Duration, Duration)> {
    progress.wait_for(completions, PATIENCE)?;
    let struck = Instant::now();
    match strike {
        Strike::Kill => rig.kill_and_restart()?,
        Strike::Disconnect => front_end.disconnect(),
    }
    let ready = Instant::now();
    progress.mark_pause(struck);
    front_end.reconnect()?;
    let pause = progress.pause(PATIENCE)?;
    Ok((pause, pause.saturating_sub(ready - struck)))
}

fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or_default()
}
