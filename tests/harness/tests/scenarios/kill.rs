//! kill -9 under verified load: the guest notices a pause and nothing else.
//!
//! The tests of raw and qcow2 share [`KILLS`] kills, each other format has 2 % of them; `OUTBOARD_KILLS=1000` asks for more, and
//! `OUTBOARD_SEED` for other moments and other load.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use harness::driver::Options;
use harness::driver::features::bits;
use harness::load::{self, Plan};
use harness::process::Program;
use harness::rig::{Disk, Format, Leaks, Rig};
use harness::supervisor::{self, Ordeal, Strike};

/// What the guest may notice of most kills beyond the time the daemon takes to start. The slowest
/// are left to the report: on a machine with other work they tell more of that than of the daemon.
const MOST_RESUMPTIONS: (usize, Duration) = (90, Duration::from_millis(200));

/// Kills of all tests together, unless the environment asks for another number.
const KILLS: usize = 200;

/// How the rings lie in memory.
#[derive(Clone, Copy, Debug)]
enum Rings {
    Split,
    Packed,
}

/// A number from the environment.
fn setting<T: std::str::FromStr>(name: &str) -> Result<Option<T>> {
    let Ok(value) = std::env::var(name) else {
        return Ok(None);
    };
    let number = value.parse().ok();
    number
        .with_context(|| format!("{name}={value} is no number"))
        .map(Some)
}

/// Goes through `percent` per cent of all kills.
fn survive((format, rings): (Format, Rings), percent: usize, seed: u64) -> Result<()> {
    let kills = setting("OUTBOARD_KILLS")?.unwrap_or(KILLS);
    let times = (kills * percent).div_ceil(100);
    let seed = seed + 1000 * setting::<u64>("OUTBOARD_SEED")?.unwrap_or(0);
    let mut rig = Rig::start(Disk::new(Program::OutboardBlkd, format).queues(2, 2))?;
    let options = match rings {
        Rings::Split => Options::default(),
        Rings::Packed => Options::default().packed(),
    };
    let (mut front_end, mut queues) = rig.connect(options)?;
    let packed = front_end.features() & bits::RING_PACKED != 0;
    ensure!(packed == matches!(rings, Rings::Packed), "packed: {packed}");
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
    println!("{format:?}, {rings:?}, seed {seed}: {report}");
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
fn raw_with_split_rings_survives_kills_without_loss_or_error() -> Result<()> {
    survive((Format::Raw, Rings::Split), 25, 21)
}

#[test]
fn raw_with_packed_rings_survives_kills_without_loss_or_error() -> Result<()> {
    survive((Format::Raw, Rings::Packed), 20, 24)
}

#[test]
fn qcow2_with_split_rings_survives_kills_without_loss_or_error() -> Result<()> {
    survive((Format::Qcow2, Rings::Split), 15, 22)
}

#[test]
fn qcow2_with_packed_rings_survives_kills_without_loss_or_error() -> Result<()> {
    survive((Format::Qcow2, Rings::Packed), 20, 25)
}

#[test]
fn qcow2_overlay_with_split_rings_survives_kills_without_loss_or_error() -> Result<()> {
    survive((Format::Qcow2Overlay, Rings::Split), 10, 23)
}

#[test]
fn qcow2_overlay_with_packed_rings_survives_kills_without_loss_or_error() -> Result<()> {
    survive((Format::Qcow2Overlay, Rings::Packed), 10, 26)
}

/// The other formats that a guest may write to.
const OTHERS: [&str; 7] = ["parallels", "qcow", "qed", "vdi", "vhdx", "vmdk", "vpc"];

#[test]
fn disks_of_every_format_survive_kills_without_loss_or_error() -> Result<()> {
    for (number, format) in (0..).zip(OTHERS) {
        let format = Format::Other(format);
        survive((format, Rings::Split), 2, 30 + number).context(format.name())?;
    }
    Ok(())
}
