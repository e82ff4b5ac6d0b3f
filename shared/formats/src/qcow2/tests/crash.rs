//! Crashes on the simulated world: power cuts, failing disks, kills.
//!
//! A failure names its seed: `OUTBOARD_SEED=N OUTBOARD_SEEDS=1` runs that seed alone, in every test.
//! A larger `OUTBOARD_SEEDS` runs more seeds; `OUTBOARD_EVERY_POINT=1` leaves no point out where sweeps sample otherwise.

use super::bitmaps::{self, State};
use super::cases::{
    AES, AES_DATA_FILE, BITMAPS, BRIEF, BRIEF_AES, BRIEF_AES_DATA_FILE, BRIEF_AES_KEPT, BRIEF_KEPT,
    BRIEF_LAZY, BRIEF_LUKS, BRIEF_LUKS_DATA_FILE, BRIEF_SNAPSHOTS, Case, DATA, DATA_FILE, KEPT,
    KEPT_SUBCLUSTERS, LAZY, LAZY_BITMAPS, LUKS, Layout, RAW_DATA_FILE, ROOMY, SNAPSHOTS,
    SUBCLUSTER_SNAPSHOTS, SUBCLUSTERS, TIGHT, TIGHT_LAZY, TIGHT_SNAPSHOTS,
};
use super::checker::Checker;
use super::checks::{check_bytes, repaired_bytes};
use super::encrypted::cipher;
use super::rig::{self, Disk, Setup};
use super::snapshots;
use super::workload::History;
use block::{ByteRange, RedoLog, SectorCipher};
use executor::sim::{Config, Fault, Image, PowerCut, Subset, World};
use executor::{Errno, Executor};
use std::cell::Cell;
use std::ops::Range;
use std::path::Path;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};

const IMAGE: &str = "disk.qcow2";

/// Random parts of what was not flushed that are tried in each epoch.
const SUBSETS: usize = 50;

fn setting(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    let number = text.parse();
    Some(number.unwrap_or_else(|_| panic!("{name}={text} is not a number")))
}

/// The seeds of a test: the usual ones, or those asked for.
fn seeds(usual: Range<u64>) -> Range<u64> {
    let first = setting("OUTBOARD_SEED").unwrap_or(usual.start);
    let count = setting("OUTBOARD_SEEDS").unwrap_or(usual.end - usual.start);
    first..first + count
}

/// Nothing is left out.
fn is_exhaustive() -> bool {
    setting("OUTBOARD_EVERY_POINT").is_some_and(|number| number != 0)
}

/// The step that leaves about `points` of `total`.
fn sample(total: u64, points: u64) -> usize {
    if is_exhaustive() {
        return 1;
    }
    (total / points).max(1) as usize
}

/// How densely power is cut, unless everywhere: at each so-manieth point, in so many ways.
fn density(usual: (usize, usize)) -> (usize, usize) {
    if is_exhaustive() { (1, SUBSETS) } else { usual }
}

/// A new encrypted image, and what its data is encrypted with.
struct Encrypted {
    files: Image,
    cipher: Box<dyn SectorCipher>,
}

/// Deriving keys takes long, so the image is made once.
fn encrypted(case: &Case) -> Arc<Encrypted> {
    type Made = Vec<((u64, u64, Layout), Arc<Encrypted>)>;
    static MADE: Mutex<Made> = Mutex::new(Vec::new());
    let key = (case.size, case.cluster_size, case.layout);
    let mut made = MADE.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, image)) = made.iter().find(|(known, _)| *known == key) {
        return Arc::clone(image);
    }
    let world = new_world(Config::default(), case);
    let image = Arc::new(Encrypted {
        files: world.files(),
        cipher: Executor::simulated(&world).block_on(cipher(Path::new(IMAGE))),
    });
    made.push((key, Arc::clone(&image)));
    image
}

fn world(seed: u64, case: &Case) -> World {
    let config = Config {
        seed,
        short_transfers: true,
        ..Config::default()
    };
    match case.layout.method() {
        Some(_) => World::with_files(config, encrypted(case).files.clone()),
        None => new_world(config, case),
    }
}

fn new_world(config: Config, case: &Case) -> World {
    let options = &case.image();
    let world = World::new(config.clone());
    Executor::simulated(&world).block_on(async {
        rig::make(Path::new(IMAGE), options).await;
        rig::with_features(Path::new(IMAGE), case.size, case.layout.features()).await;
        if case.bitmaps != 0 {
            let disk = Disk::open(Path::new(IMAGE), case.setup()).await.unwrap();
            (0..case.bitmaps).for_each(|number| bitmaps::add(&disk, &format!("b{number}"), 512));
            disk.close().await.unwrap();
        }
    });
    world.restart(&cut(world.log_len(), Subset::All), config)
}

fn cut(prefix: usize, subset: Subset) -> PowerCut {
    PowerCut {
        prefix,
        subset,
        tear: 512,
    }
}

/// The bytes of an image and of its data file, as they are when it has been opened for writing again.
struct Files {
    image: Vec<u8>,
    data: Option<Vec<u8>>,
    encrypted: Option<Arc<Encrypted>>,
}

thread_local! {
    static JUDGED: Cell<u64> = const { Cell::new(0) };
}

/// One image in how many the driver's own check looks at, too.
const OWN_CHECK: u64 = 32;

/// Whether the dirty bit is set (QEMU docs/interop/qcow2.txt, incompatible features).
fn is_dirty(image: &[u8]) -> bool {
    image[79] & 1 != 0
}

impl Files {
    fn new(case: &Case, mut files: Image) -> Self {
        let data = files.remove(Path::new(DATA));
        let mut image = files.remove(Path::new(IMAGE)).unwrap();
        if is_dirty(&image) {
            assert!(case.lazy_refcounts, "marked as dirty");
            image = repaired_bytes(&image);
        }
        Self {
            image,
            data,
            encrypted: case.layout.method().map(|_| encrypted(case)),
        }
    }
    fn checker(&self) -> Checker<'_> {
        let mut checker = Checker::new(&self.image);
        if let Some(data) = &self.data {
            checker = checker.with_data(data);
        }
        match &self.encrypted {
            Some(encrypted) => checker.with_cipher(&*encrypted.cipher),
            None => checker,
        }
    }
    /// Asserts that the image is sound, and that the driver's own check agrees; answers with the
    /// disk's content.
    fn sound_content(&self, context: &str) -> Vec<u8> {
        let findings = self.checker().check();
        assert!(findings.corruptions.is_empty(), "{context}: {findings:#x?}");
        let number = JUDGED.replace(JUDGED.get() + 1);
        if is_exhaustive() || number.is_multiple_of(OWN_CHECK) {
            let (checked, messages) = check_bytes(&self.image);
            let found = (checked.corruptions, checked.check_errors);
            assert_eq!(found, (0, 0), "{context}: {messages:#?}");
            // The independent reader also counts what is allocated past the end of the file.
            assert!(checked.leaks <= findings.leaks, "{context}: {messages:#?}");
        }
        self.checker().read_all(&[])
    }
}

/// Runs a workload to its end and closes the disk.
fn run_and_close(world: &World, history: &Rc<History>, (case, seed): (&Case, u64)) {
    Executor::simulated(world).block_on(async {
        let disk = Disk::open(Path::new(IMAGE), case.setup()).await.unwrap();
        case.run(&disk, history, seed).await;
        let content = disk.read_all().await.unwrap();
        history.check_kill(&content, &[], usize::MAX).unwrap();
        disk.close().await.unwrap();
    });
    assert_eq!(history.failures.get(), 0, "seed {seed}");
}

#[test]
fn a_clean_run_leaves_no_leak_and_the_right_content() {
    let cases = [
        (&ROOMY, 0..8),
        (&TIGHT, 20..22),
        (&SNAPSHOTS, 40..48),
        (&TIGHT_SNAPSHOTS, 50..52),
        (&BITMAPS, 70..78),
        (&SUBCLUSTERS, 40..48),
        (&SUBCLUSTER_SNAPSHOTS, 40..44),
        (&DATA_FILE, 50..54),
        (&RAW_DATA_FILE, 60..64),
        (&AES, 80..84),
        (&LUKS, 84..88),
        (&LAZY, 90..94),
        (&TIGHT_LAZY, 94..95),
        (&LAZY_BITMAPS, 95..98),
        (&AES_DATA_FILE, 96..100),
        (&BRIEF_LUKS_DATA_FILE, 96..100),
        (&KEPT, 100..108),
        (&BRIEF_KEPT, 108..112),
        (&KEPT_SUBCLUSTERS, 112..116),
    ];
    for (case, usual) in cases {
        let mut longest_table = 0;
        for seed in seeds(usual) {
            println!("seed {seed}");
            let world = world(seed, case);
            let history = History::of_world(case.size, &world);
            run_and_close(&world, &history, (case, seed));
            assert!(!is_dirty(&world.files()[Path::new(IMAGE)]), "seed {seed}");
            let files = Files::new(case, world.files());
            let checker = files.checker();
            assert_eq!(checker.check(), Default::default(), "seed {seed}");
            longest_table = longest_table.max(checker.refcount_table_clusters());
            let content = checker.read_all(&[]);
            history.check_kill(&content, &[], usize::MAX).unwrap();
            snapshots::check(&history, &checker, usize::MAX).unwrap();
            if case.bitmaps != 0 {
                bitmaps::check(&checker, &content, State::Closed).unwrap();
            }
            if case.layout == (Layout::DataFile { raw: true }) {
                let mut raw = files.data.clone().unwrap();
                raw.resize(content.len(), 0);
                assert!(raw == content, "seed {seed}: the raw data file differs");
            }
        }
        let must_grow = case.size == TIGHT.size;
        assert!(
            longest_table > u32::from(must_grow),
            "no refcount table grew"
        );
    }
}

#[test]
fn flushed_data_survives_a_power_cut_at_every_moment() {
    for seed in seeds(0..2) {
        println!("seed {seed}");
        cut_power_everywhere(&ROOMY, seed, (1, SUBSETS));
    }
}

#[test]
fn flushed_data_survives_a_power_cut_with_full_caches_and_growing_tables() {
    for seed in seeds(30..31) {
        println!("seed {seed}");
        let density = density((6, 5));
        cut_power_everywhere(&TIGHT, seed, density);
    }
}

#[test]
fn snapshots_survive_a_power_cut_at_every_moment() {
    for seed in seeds(60..61) {
        println!("seed {seed}");
        let density = density((4, 10));
        cut_power_everywhere(&SNAPSHOTS, seed, density);
        cut_power_everywhere(&BRIEF_SNAPSHOTS, seed, (1, SUBSETS));
    }
}

#[test]
fn subclusters_and_data_files_survive_a_power_cut() {
    for (case, usual) in [
        (&SUBCLUSTERS, 40..41),
        (&DATA_FILE, 50..51),
        (&RAW_DATA_FILE, 60..61),
    ] {
        for seed in seeds(usual) {
            println!("seed {seed}");
            let density = density((5, 20));
            cut_power_everywhere(case, seed, density);
        }
    }
}

#[test]
fn kept_clusters_survive_a_power_cut_at_every_moment() {
    for seed in seeds(100..101) {
        println!("seed {seed}");
        cut_power_everywhere(&BRIEF_KEPT, seed, (1, SUBSETS));
        let density = density((8, 10));
        cut_power_everywhere(&KEPT, seed, density);
        cut_power_everywhere(&KEPT_SUBCLUSTERS, seed, density);
    }
}

#[test]
fn encrypted_data_survives_a_power_cut_at_every_moment() {
    for seed in seeds(80..81) {
        println!("seed {seed}");
        cut_power_everywhere(&BRIEF_AES, seed, (1, SUBSETS));
        let density = density((2, 10));
        cut_power_everywhere(&BRIEF_LUKS, seed, density);
    }
}

#[test]
fn encrypted_data_whose_place_stays_survives_a_power_cut_at_every_moment() {
    for seed in seeds(82..83) {
        println!("seed {seed}");
        cut_power_everywhere(&BRIEF_AES_DATA_FILE, seed, (1, SUBSETS));
        cut_power_everywhere(&BRIEF_AES_KEPT, seed, (1, SUBSETS));
        let density = density((2, 10));
        cut_power_everywhere(&BRIEF_LUKS_DATA_FILE, seed, density);
    }
}

#[test]
fn lazy_refcounts_survive_a_power_cut_at_every_moment() {
    for seed in seeds(90..91) {
        println!("seed {seed}");
        for (case, density) in [
            (&BRIEF_LAZY, (1, 6)),
            (&LAZY, (16, 3)),
            (&LAZY_BITMAPS, (16, 3)),
        ] {
            let density = self::density(density);
            cut_power_everywhere(case, seed, density);
        }
        if is_exhaustive() {
            cut_power_everywhere(&TIGHT_LAZY, seed, (6, 5));
        }
    }
}

#[test]
fn bitmaps_never_say_too_little_after_a_power_cut() {
    for seed in seeds(70..71) {
        println!("seed {seed}");
        cut_power_everywhere(&BITMAPS, seed, (1, SUBSETS));
    }
}

/// Cuts the power at every `step`-th entry of the log of a workload, and leaves of what was not
/// flushed nothing, everything, and random parts: at least `subsets` in every epoch.
fn cut_power_everywhere(case: &Case, seed: u64, (step, subsets): (usize, usize)) {
    let world = world(seed, case);
    let history = History::of_world(case.size, &world);
    run_and_close(&world, &history, (case, seed));
    for epoch in world.epochs() {
        let random = subsets.div_ceil(epoch.len().div_ceil(step)) as u64;
        for prefix in epoch.step_by(step) {
            let extremes = [(Subset::None, 512), (Subset::All, 512)];
            let parts = (0..random).map(|number| {
                let tear = if number % 2 == 0 { 512 } else { 4096 };
                (Subset::Random(seed.wrapping_add(number << 32)), tear)
            });
            for (subset, tear) in extremes.into_iter().chain(parts) {
                let cut = PowerCut {
                    prefix,
                    subset,
                    tear,
                };
                assert_survived(case, (&world, &history), &cut, seed);
            }
        }
    }
}

fn assert_survived(case: &Case, (world, history): (&World, &History), cut: &PowerCut, seed: u64) {
    let files = Files::new(case, world.power_cut(cut));
    let context = format!("seed {seed}, {cut:?}");
    let disk = files.sound_content(&context);
    let checked = history
        .check_power_cut(&disk, &[], cut.prefix)
        .and_then(|()| snapshots::check(history, &files.checker(), cut.prefix))
        .and_then(|()| case.check_bitmaps(&files.checker(), &disk));
    checked.unwrap_or_else(|wrong| panic!("{context}: {wrong}"));
}

#[test]
fn a_failing_disk_never_succeeds_silently() {
    fail_everywhere(&[
        (&BRIEF, u64::MAX),
        (&BRIEF_SNAPSHOTS, u64::MAX),
        (&BITMAPS, u64::MAX),
        (&ROOMY, 24),
        (&TIGHT, 6),
        (&TIGHT_SNAPSHOTS, 12),
    ]);
}

#[test]
fn a_failing_disk_never_succeeds_silently_with_any_feature() {
    fail_everywhere(&[
        (&SUBCLUSTERS, 16),
        (&SUBCLUSTER_SNAPSHOTS, 12),
        (&DATA_FILE, 8),
        (&BRIEF_LAZY, 60),
        (&LAZY_BITMAPS, 24),
        (&TIGHT_LAZY, 2),
        (&BRIEF_KEPT, 24),
        (&KEPT_SUBCLUSTERS, 8),
    ]);
}

#[test]
fn a_failing_disk_never_succeeds_silently_with_encryption() {
    fail_everywhere(&[
        (&BRIEF_AES, u64::MAX),
        (&BRIEF_LUKS, 20),
        (&BRIEF_AES_DATA_FILE, 16),
        (&BRIEF_AES_KEPT, 12),
        (&BRIEF_LUKS_DATA_FILE, 4),
    ]);
}

/// Runs the workloads of cases with about so many operations failing, once and for good.
fn fail_everywhere(cases: &[(&Case, u64)]) {
    for &(case, points) in cases {
        for seed in seeds(7..8) {
            println!("seed {seed}");
            let probe = run_with_fault(case, seed, None);
            for op_index in (0..probe).step_by(sample(probe, points)) {
                for sticky in [false, true] {
                    let fault = Fault {
                        op_index,
                        errno: Errno::EIO,
                        sticky,
                    };
                    run_with_fault(case, seed, Some(fault));
                }
            }
        }
    }
}

/// Runs a workload with a fault, then cuts the power; answers with the number of operations.
fn run_with_fault(case: &Case, seed: u64, fault: Option<Fault>) -> u64 {
    let world = world(seed, case);
    let history = History::of_world(case.size, &world);
    if let Some(fault) = fault {
        world.inject(fault);
    }
    let context = format!("seed {seed}, fault {fault:?}");
    Executor::simulated(&world).block_on(async {
        let opened = Disk::open(Path::new(IMAGE), case.setup()).await;
        let Ok(disk) = opened else { return };
        case.run(&disk, &history, seed).await;
        if let Ok(content) = disk.read_all().await {
            let checked = history.check_kill(&content, &[], usize::MAX);
            checked.unwrap_or_else(|wrong| panic!("{context}: {wrong}"));
        }
        let _ = disk.close().await;
    });
    let moment = world.log_len();
    for subset in [Subset::None, Subset::All, Subset::Random(1)] {
        let files = Files::new(case, world.power_cut(&cut(moment, subset)));
        let disk = files.sound_content(&context);
        let checked = history
            .check_power_cut(&disk, &[], moment)
            .and_then(|()| snapshots::check(&history, &files.checker(), moment))
            .and_then(|()| case.check_bitmaps(&files.checker(), &disk));
        checked.unwrap_or_else(|wrong| panic!("{context}, {subset:?}: {wrong}"));
    }
    world.op_count()
}

#[test]
fn completed_writes_survive_a_kill_at_every_moment() {
    let cases = [
        (&BRIEF, 11..12, u64::MAX),
        (&BRIEF_SNAPSHOTS, 13..14, u64::MAX),
        (&SNAPSHOTS, 13..14, 60),
        (&BITMAPS, 14..15, u64::MAX),
        (&ROOMY, 11..12, 80),
        (&TIGHT, 12..13, 14),
        (&SUBCLUSTERS, 13..14, 40),
        (&DATA_FILE, 14..15, 20),
        (&RAW_DATA_FILE, 15..16, 20),
        (&BRIEF_AES, 16..17, u64::MAX),
        (&BRIEF_LUKS, 17..18, 20),
        (&BRIEF_LAZY, 18..19, u64::MAX),
        (&LAZY_BITMAPS, 19..20, 24),
        (&LAZY, 20..21, 16),
        (&TIGHT_LAZY, 21..22, 3),
        (&BRIEF_AES_DATA_FILE, 25..26, 20),
        (&BRIEF_LUKS_DATA_FILE, 26..27, 6),
        (&BRIEF_KEPT, 23..24, 30),
        (&KEPT_SUBCLUSTERS, 24..25, 12),
    ];
    for (case, usual, points) in cases {
        for seed in seeds(usual) {
            let total = kill_at(case, seed, u64::MAX);
            println!("seed {seed}, {total} operations");
            for operations in (0..total).step_by(sample(total, points)) {
                kill_at(case, seed, operations);
            }
        }
    }
}

/// Kills the process after so many file operations, opens the image again with the redo log,
/// checks, flushes, cuts the power and checks again. Answers with the operations that a whole run
/// takes.
fn kill_at(case: &'static Case, seed: u64, operations: u64) -> u64 {
    // What the killed process had in flight holds the request epochs of its thread.
    let life = std::thread::spawn(move || kill_here(case, seed, operations));
    life.join()
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn kill_here(case: &Case, seed: u64, operations: u64) -> u64 {
    let context = format!("seed {seed}, kill at {operations}");
    let world = world(seed, case);
    let history = History::of_world(case.size, &world);
    let log = RedoLog::in_memory(case.log);
    let before = world.op_count();
    run_until_killed(
        &world,
        &history,
        case.setup_with(log.share()),
        (case, seed, operations),
    );
    let total = world.op_count() - before;
    let killed = world.log_len();
    let config = Config {
        seed: seed + 1,
        ..Config::default()
    };
    let world = world.restart(&cut(killed, Subset::All), config);
    Files::new(case, world.files()).sound_content(&context);
    let executor = Executor::simulated(&world);
    let before = world.log_len();
    executor.block_on(async {
        let setup = Setup {
            left_behind: Some(log.recover().unwrap()),
            ..case.setup_with(RedoLog::disabled())
        };
        let view = Disk::open(Path::new(IMAGE), setup).await.unwrap();
        let content = view.read_all().await.unwrap();
        let checked = history.check_kill(&content, &[], killed);
        checked.unwrap_or_else(|wrong| panic!("{context}, only read: {wrong}"));
        view.close().await.unwrap();
    });
    assert_eq!(world.log_len(), before, "{context}: a reader wrote");
    let disk = executor.block_on(async {
        let disk = Disk::open(Path::new(IMAGE), case.setup_with(log))
            .await
            .unwrap();
        let content = disk.read_all().await.unwrap();
        let checked = history.check_kill(&content, &[], killed);
        checked.unwrap_or_else(|wrong| panic!("{context}: {wrong}"));
        disk.root.flush().await.unwrap();
        disk
    });
    let files = Files::new(case, world.power_cut(&cut(world.log_len(), Subset::None)));
    let content = files.sound_content(&context);
    let checked = history
        .check_kill(&content, &[], killed)
        .and_then(|()| snapshots::check(&history, &files.checker(), killed))
        .and_then(|()| case.check_bitmaps(&files.checker(), &content));
    checked.unwrap_or_else(|wrong| panic!("{context}, power cut: {wrong}"));
    executor.block_on(disk.close()).unwrap();
    total
}

fn run_until_killed(
    world: &World,
    history: &Rc<History>,
    setup: Setup,
    (case, seed, operations): (&Case, u64, u64),
) {
    rig::die_after(operations);
    let executor = Executor::simulated(world);
    executor.block_on(async {
        let whole = async {
            let disk = Disk::open(Path::new(IMAGE), setup).await.unwrap();
            case.run(&disk, history, seed).await;
        };
        rig::until_death(whole).await;
    });
    drop(executor);
    rig::die_after(u64::MAX);
}

#[test]
fn taking_over_lazy_refcounts_may_be_cut_off_at_every_moment() {
    for seed in seeds(22..23) {
        println!("seed {seed}");
        let total = kill_at(&BRIEF_LAZY, seed, u64::MAX);
        for operations in (total / 4..total).step_by(sample(total, 4)) {
            let second = |second| {
                std::thread::spawn(move || kill_twice(&BRIEF_LAZY, seed, [operations, second]))
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            (0..).take_while(|number| second(*number)).for_each(drop);
        }
    }
}

/// Kills the process, and its successor while it opens the image; a third one finds all. Also, the power
/// is cut when the successor dies. False when the successor had opened the image before.
fn kill_twice(case: &Case, seed: u64, [first, second]: [u64; 2]) -> bool {
    let context = format!("seed {seed}, kills at {first} and {second}");
    let world = world(seed, case);
    let history = History::of_world(case.size, &world);
    let log = RedoLog::in_memory(case.log);
    let setup = || case.setup_with(log.share());
    run_until_killed(&world, &history, setup(), (case, seed, first));
    let killed = world.log_len();
    let is_flushed = |world: &World, subset| {
        let files = Files::new(case, world.power_cut(&cut(world.log_len(), subset)));
        let content = files.sound_content(&context);
        let checked = history.check_power_cut(&content, &[], killed);
        checked.unwrap_or_else(|wrong| panic!("{context}, power cut: {wrong}"));
    };
    rig::die_after(second);
    let executor = Executor::simulated(&world);
    let is_open = Cell::new(false);
    executor.block_on(rig::until_death(async {
        let _disk = Disk::open(Path::new(IMAGE), setup()).await.unwrap();
        is_open.set(true);
    }));
    drop(executor);
    rig::die_after(u64::MAX);
    for subset in [Subset::None, Subset::All, Subset::Random(seed + second)] {
        is_flushed(&world, subset);
    }
    let config = Config::default();
    let world = world.restart(&cut(world.log_len(), Subset::All), config);
    Executor::simulated(&world).block_on(async {
        let disk = Disk::open(Path::new(IMAGE), setup()).await.unwrap();
        let content = disk.read_all().await.unwrap();
        let checked = history.check_kill(&content, &[], killed);
        checked.unwrap_or_else(|wrong| panic!("{context}: {wrong}"));
        disk.close().await.unwrap();
    });
    let files = Files::new(case, world.files());
    assert_eq!(files.checker().check(), Default::default(), "{context}");
    !is_open.get()
}

#[test]
fn lazy_refcounts_are_written_when_the_image_is_closed() {
    let case = &LAZY;
    let world = world(1, case);
    let (mark, cluster) = (
        || is_dirty(&world.files()[Path::new(IMAGE)]),
        case.cluster_size,
    );
    let uncounted = || {
        let files = world.files();
        check_bytes(&files[Path::new(IMAGE)]).0.corruptions
    };
    Executor::simulated(&world).block_on(async {
        let disk = Disk::open(Path::new(IMAGE), case.setup()).await.unwrap();
        disk.write(0, &[1; 512]).await.unwrap();
        assert!(!mark(), "nothing in the file refers to the data yet");
        disk.root.flush().await.unwrap();
        assert!(
            mark() && uncounted() != 0,
            "the cluster is referred to and not counted"
        );
        let writes = |bytes: u8| {
            let (disk, world) = (disk.clone(), world.clone());
            async move {
                let before = world.op_count();
                disk.write(cluster * u64::from(bytes), &[bytes; 512])
                    .await
                    .unwrap();
                disk.root.flush().await.unwrap();
                world.op_count() - before
            }
        };
        // The data, the L2 slice, and a flush after each.
        assert_eq!(writes(2).await, 4);
        assert!(!disk.node.driver().describe().is_empty());
        assert_eq!(disk.node.driver().describe()["dirty-flag"], true);
        disk.close().await.unwrap();
        assert!(!mark());
    });
    assert_eq!(uncounted(), 0);
}

#[test]
fn exact_refcounts_never_mark_the_image() {
    let case = &ROOMY;
    let world = world(1, case);
    Executor::simulated(&world).block_on(async {
        let disk = Disk::open(Path::new(IMAGE), case.setup()).await.unwrap();
        disk.write(0, &[1; 512]).await.unwrap();
        disk.root.flush().await.unwrap();
        let files = world.files();
        assert!(!is_dirty(&files[Path::new(IMAGE)]));
        assert_eq!(check_bytes(&files[Path::new(IMAGE)]).0.corruptions, 0);
        disk.close().await.unwrap();
    });
}

#[test]
fn a_freed_cluster_is_reused_only_when_durable_and_no_older_request_is_left() {
    let case = &ROOMY;
    let world = world(1, case);
    Executor::simulated(&world).block_on(async {
        let disk = Disk::open(Path::new(IMAGE), case.setup()).await.unwrap();
        let cluster = |number: u64| ByteRange::new(number * case.cluster_size, case.cluster_size);
        let write = async |number: u64| {
            let bytes = vec![number as u8 + 1; case.cluster_size as usize];
            disk.write(cluster(number).offset, &bytes).await.unwrap();
            let status = disk.node.block_status(cluster(number)).await.unwrap();
            status.status.offset.unwrap()
        };
        let freed = write(0).await;
        disk.root.flush().await.unwrap();
        let older_request = block::epoch::pin();
        disk.root.discard(cluster(0)).await.unwrap();
        assert_ne!(write(1).await, freed, "the discard is not durable");
        disk.root.flush().await.unwrap();
        assert_ne!(write(2).await, freed, "an older request is under way");
        drop(older_request);
        // A flush is a request itself: the one after it finds everything older ended.
        disk.root.flush().await.unwrap();
        disk.root.flush().await.unwrap();
        assert_eq!(write(3).await, freed);
        disk.close().await.unwrap();
    });
}
