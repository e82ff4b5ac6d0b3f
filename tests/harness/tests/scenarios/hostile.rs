//! A hostile guest or VMM harms nobody but itself.

use std::io::Write;

use anyhow::{Context, Result, ensure};
use harness::driver::{Endpoint, FrontEnd, Operation, Options, Queue, Request, SectorRange};
use harness::fuzz_frontend::{RingAttack, attack_messages, attack_ring, truncated_messages};
use harness::load::{self, Plan, Stop};
use harness::oracle::{Initial, Oracle};
use harness::process::{PATIENCE, Program};
use harness::qmp_client::QmpClient;
use harness::rig::{Disk, Format, Rig};
use harness::{peer, wire};
use rand::SeedableRng;
use rand::rngs::SmallRng;
use serde_json::json;

/// A daemon with a victim (the second export and the monitor) that is in use all the time.
struct Victim {
    rig: Rig,
    monitor: QmpClient,
    second: (FrontEnd, Vec<Queue>),
    open_files: usize,
}

impl Victim {
    fn new(program: Program) -> Result<Self> {
        let disk = Disk {
            second_export: true,
            ..Disk::new(program, Format::Qcow2)
        };
        let rig = Rig::start(disk)?;
        let monitor = rig.monitor()?;
        let second = rig.connect_second()?;
        let mut victim = Self {
            rig,
            monitor,
            second,
            open_files: 0,
        };
        // Whatever is opened once, on first use, is opened now.
        victim.serves_a_good_front_end()?;
        victim.open_files = victim.count_open_files()?;
        Ok(victim)
    }

    fn is_unharmed(&mut self) -> Result<()> {
        ensure!(
            self.rig.daemon.is_running(),
            "the daemon ended:\n{}",
            self.rig.daemon.stderr()
        );
        let read = Request::contiguous(Operation::Read, SectorRange::new(0, 8));
        let data = self.second.1[0]
            .run(read, &[])
            .context("second export")?
            .ok()?;
        ensure!(
            data.iter().all(|&byte| byte == 0),
            "the second export's data changed"
        );
        self.monitor.execute("query-version", json!({}))?;
        Ok(())
    }

    fn serves_a_good_front_end(&self) -> Result<()> {
        let (_front_end, mut queues) = self.rig.connect(Options::default())?;
        let oracle = Oracle::new(self.rig.oracle.sectors(), Initial::Unknown);
        load::run_on_all(&mut queues, &oracle, &Plan::default(), Stop::After(100))?;
        Ok(())
    }

    /// Counts with one good front-end connected: its being served shows that the connection before
    /// it is gone.
    fn count_open_files(&self) -> Result<usize> {
        let (_front_end, _queues) = self.rig.connect(Options::default())?;
        self.rig.daemon.open_files()
    }

    fn finish(mut self) -> Result<()> {
        self.is_unharmed()?;
        self.serves_a_good_front_end()?;
        let now = self.count_open_files()?;
        ensure!(
            now <= self.open_files,
            "{} open descriptors became {now}",
            self.open_files
        );
        drop(self.second);
        ensure!(self.rig.daemon.stop()?.success(), "SIGTERM");
        peer::check("qcow2", &self.rig.paths.image)
    }
}

fn malformed_messages_harm_nobody(program: Program, sessions: u64) -> Result<()> {
    let mut victim = Victim::new(program)?;
    for seed in 0..sessions {
        let mut rng = SmallRng::seed_from_u64(seed);
        let socket = victim.rig.endpoint()?.open(PATIENCE)?;
        attack_messages(&socket, &mut rng, 60)?;
        drop(socket);
        victim
            .is_unharmed()
            .with_context(|| format!("after message attack with seed {seed}"))?;
    }
    for bytes in truncated_messages() {
        let mut socket = victim.rig.endpoint()?.open(PATIENCE)?;
        // The daemon may hang up in the middle of it.
        let _ = socket.write_all(&bytes);
        drop(socket);
        victim.is_unharmed()?;
    }
    victim.finish()
}

fn malformed_rings_harm_nobody(program: Program, seeds: u64) -> Result<()> {
    let mut victim = Victim::new(program)?;
    for seed in 0..seeds {
        for attack in RingAttack::ALL {
            let what = || format!("{attack:?} with seed {seed}");
            let (mut front_end, _queues) =
                victim.rig.connect(Options::default()).with_context(what)?;
            attack_ring(&mut front_end, 0, attack, seed).with_context(what)?;
            drop(front_end);
            victim.is_unharmed().with_context(what)?;
        }
    }
    victim.finish()
}

#[test]
fn malformed_messages_end_at_most_their_own_session() -> Result<()> {
    malformed_messages_harm_nobody(Program::OutboardBlkd, 1000)
}

#[test]
fn malformed_rings_end_at_most_their_own_session() -> Result<()> {
    malformed_rings_harm_nobody(Program::OutboardBlkd, 20)
}

#[test]
fn a_ring_larger_than_the_inflight_region_is_refused() -> Result<()> {
    let mut victim = Victim::new(Program::OutboardBlkd)?;
    let options = Options {
        queue_size: 128,
        ..Options::default()
    };
    let (front_end, _queues) =
        FrontEnd::connect(Endpoint::Connect(victim.rig.paths.socket.clone()), options)?;
    let larger = [0u32.to_le_bytes(), 1024u32.to_le_bytes()].concat();
    let header = (wire::request::SET_VRING_NUM, wire::flag::NEED_REPLY);
    wire::send(front_end.socket(), header, &larger, &[])?;
    let refused =
        wire::receive(front_end.socket()).map_or(true, |reply| reply.value().unwrap_or(1) != 0);
    ensure!(
        refused,
        "a ring of 1024 was accepted with an inflight region for 128"
    );
    drop(front_end);
    victim.is_unharmed()?;
    victim.finish()
}

#[test]
fn malformed_rings_are_survived_by_qemu_storage_daemon_too() -> Result<()> {
    malformed_rings_harm_nobody(Program::QemuStorageDaemon, 1)
}
