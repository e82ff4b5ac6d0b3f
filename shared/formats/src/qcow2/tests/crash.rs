//! Crashes on the simulated world: power cuts, failing disks, kills.

use super::checker::Checker;
use super::rig::{self, Disk, Setup};
use super::workload::{History, Workload};
use crate::qcow2::CreateOptions;
use block::RedoLog;
use executor::sim::{Config, Fault, PowerCut, Subset, World};
use executor::{Errno, Executor};
use std::path::Path;
use std::rc::Rc;

const IMAGE: &str = "disk.qcow2";
const SIZE: u64 = 256 << 10;

fn small_image() -> CreateOptions {
    CreateOptions {
        cluster_size: 1024,
        ..CreateOptions::new(SIZE)
    }
}

fn world(seed: u64, options: &CreateOptions) -> World {
    let world = World::new(Config {
        seed,
        short_transfers: true,
        ..Config::default()
    });
    Executor::simulated(&world).block_on(rig::make(Path::new(IMAGE), options));
    world.restart(
        &cut(world.log_len(), Subset::All),
        Config {
            seed,
            short_transfers: true,
            ..Config::default()
        },
    )
}

fn cut(prefix: usize, subset: Subset) -> PowerCut {
    PowerCut {
        prefix,
        subset,
        tear: 512,
    }
}

fn image_of(world: &World) -> Vec<u8> {
    world.files().remove(Path::new(IMAGE)).unwrap()
}

/// Asserts that an image's bytes are sound.
fn assert_sound(bytes: &[u8], context: &str) {
    let findings = Checker::new(bytes).check();
    assert!(findings.corruptions.is_empty(), "{context}: {findings:#x?}");
}

const WORKLOAD: Workload = Workload {
    seed: 0,
    tasks: 4,
    requests: 40,
    longest: 24 << 10,
};

#[test]
fn a_clean_run_leaves_no_leak_and_the_right_content() {
    for seed in 0..8 {
        println!("seed {seed}");
        let world = world(seed, &small_image());
        let history = History::of_world(SIZE, &world);
        Executor::simulated(&world).block_on(async {
            let disk = Disk::open(Path::new(IMAGE), Setup::default())
                .await
                .unwrap();
            Workload { seed, ..WORKLOAD }.run(&disk, &history).await;
            let content = disk.read_all().await.unwrap();
            history.check_kill(&content, &[], usize::MAX).unwrap();
            disk.close().await.unwrap();
        });
        assert_eq!(history.failures.get(), 0, "seed {seed}");
        let bytes = image_of(&world);
        let checker = Checker::new(&bytes);
        let findings = checker.check();
        assert_eq!(findings, Default::default(), "seed {seed}");
        let content = checker.read_all(&[]);
        history.check_kill(&content, &[], usize::MAX).unwrap();
    }
}

#[test]
fn flushed_data_survives_a_power_cut_at_every_moment() {
    for seed in 0..4 {
        println!("seed {seed}");
        let world = world(seed, &small_image());
        let history = History::of_world(SIZE, &world);
        Executor::simulated(&world).block_on(async {
            let disk = Disk::open(Path::new(IMAGE), Setup::default())
                .await
                .unwrap();
            Workload { seed, ..WORKLOAD }.run(&disk, &history).await;
            disk.close().await.unwrap();
        });
        for prefix in 0..=world.log_len() {
            for subset in [Subset::Random(seed), Subset::None, Subset::All] {
                let mut files = world.power_cut(&cut(prefix, subset));
                let bytes = files.remove(Path::new(IMAGE)).unwrap();
                let context = format!("seed {seed}, prefix {prefix}, {subset:?}");
                assert_sound(&bytes, &context);
                let content = Checker::new(&bytes).read_all(&[]);
                let checked = history.check_power_cut(&content, &[], prefix);
                checked.unwrap_or_else(|wrong| panic!("{context}: {wrong}"));
            }
        }
    }
}

#[test]
fn a_failing_disk_never_succeeds_silently() {
    let probe = run_with_fault(None);
    let step = (probe / 80).max(1);
    for op_index in (0..probe).step_by(step as usize) {
        for sticky in [false, true] {
            run_with_fault(Some(Fault {
                op_index,
                errno: Errno::EIO,
                sticky,
            }));
        }
    }
}

/// Runs a workload with a fault, then cuts the power; answers with the number of operations.
fn run_with_fault(fault: Option<Fault>) -> u64 {
    let seed = 7;
    let world = world(seed, &small_image());
    let history = History::of_world(SIZE, &world);
    if let Some(fault) = fault {
        world.inject(fault);
    }
    let context = format!("fault {fault:?}");
    Executor::simulated(&world).block_on(async {
        let opened = Disk::open(Path::new(IMAGE), Setup::default()).await;
        let Ok(disk) = opened else { return };
        let workload = Workload {
            requests: 30,
            seed,
            ..WORKLOAD
        };
        workload.run(&disk, &history).await;
        if let Ok(content) = disk.read_all().await {
            let checked = history.check_kill(&content, &[], usize::MAX);
            checked.unwrap_or_else(|wrong| panic!("{context}: {wrong}"));
        }
        let _ = disk.close().await;
    });
    let moment = world.log_len();
    for subset in [Subset::None, Subset::All, Subset::Random(1)] {
        let mut files = world.power_cut(&cut(moment, subset));
        let bytes = files.remove(Path::new(IMAGE)).unwrap();
        assert_sound(&bytes, &context);
        let content = Checker::new(&bytes).read_all(&[]);
        let checked = history.check_power_cut(&content, &[], moment);
        checked.unwrap_or_else(|wrong| panic!("{context}, {subset:?}: {wrong}"));
    }
    world.op_count()
}

#[test]
fn completed_writes_survive_a_kill_at_every_moment() {
    let seed = 11;
    let total = kill_at(seed, u64::MAX);
    println!("seed {seed}, {total} operations");
    let step = (total / 120).max(1);
    for operations in (0..total).step_by(step as usize) {
        kill_at(seed, operations);
    }
}

/// Kills the process after so many file operations, opens the image again with the redo log,
/// checks, flushes, cuts the power and checks again. Answers with the operations that a whole run
/// takes.
fn kill_at(seed: u64, operations: u64) -> u64 {
    let context = format!("seed {seed}, kill at {operations}");
    let world = world(seed, &small_image());
    let history = History::of_world(SIZE, &world);
    let log = RedoLog::in_memory(1024);
    let before = world.op_count();
    run_until_killed(&world, &history, log.share(), (seed, operations));
    let total = world.op_count() - before;
    let killed = world.log_len();
    let config = Config {
        seed: seed + 1,
        ..Config::default()
    };
    let world = world.restart(&cut(killed, Subset::All), config);
    assert_sound(&image_of(&world), &context);
    let setup = Setup {
        log,
        ..Setup::default()
    };
    let executor = Executor::simulated(&world);
    let disk = executor.block_on(async {
        let disk = Disk::open(Path::new(IMAGE), setup).await.unwrap();
        let content = disk.read_all().await.unwrap();
        let checked = history.check_kill(&content, &[], killed);
        checked.unwrap_or_else(|wrong| panic!("{context}: {wrong}"));
        disk.root.flush().await.unwrap();
        disk
    });
    let mut files = world.power_cut(&cut(world.log_len(), Subset::None));
    let bytes = files.remove(Path::new(IMAGE)).unwrap();
    assert_sound(&bytes, &context);
    let content = Checker::new(&bytes).read_all(&[]);
    let checked = history.check_kill(&content, &[], killed);
    checked.unwrap_or_else(|wrong| panic!("{context}, power cut: {wrong}"));
    executor.block_on(disk.close()).unwrap();
    total
}

fn run_until_killed(
    world: &World,
    history: &Rc<History>,
    log: RedoLog,
    (seed, operations): (u64, u64),
) {
    let setup = Setup {
        log,
        ..Setup::default()
    };
    rig::die_after(operations);
    let executor = Executor::simulated(world);
    executor.block_on(async {
        let whole = async {
            let disk = Disk::open(Path::new(IMAGE), setup).await.unwrap();
            let workload = Workload { seed, ..WORKLOAD };
            workload.run(&disk, history).await;
        };
        rig::until_death(whole).await;
    });
    drop(executor);
    rig::die_after(u64::MAX);
}
