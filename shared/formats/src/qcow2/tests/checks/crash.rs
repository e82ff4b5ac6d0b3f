//! Repairs under power cuts and failing I/O, on the simulated world.

use super::{check_as_tool, edge};
use crate::qcow2::CreateOptions;
use crate::qcow2::tests::checker::Checker;
use crate::qcow2::tests::rig::{self, Disk, Setup};
use block::{ByteRange, Repair, ZeroFlags};
use executor::sim::{Config, Fault, PowerCut, Subset, World};
use executor::{Errno, Executor};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::path::Path;

const IMAGE: &str = "disk.qcow2";
const CLUSTER: usize = 1024;

fn world_of(bytes: &[u8]) -> World {
    World::with_files(Config::default(), [(IMAGE.into(), bytes.to_vec())].into())
}

fn image_of(world: &World) -> Vec<u8> {
    world.files().remove(Path::new(IMAGE)).unwrap()
}

/// An image with data, zeroes and holes in several L2 tables.
fn sample(refcount_bits: u32) -> Vec<u8> {
    let world = World::new(Config::default());
    Executor::simulated(&world).block_on(async {
        let options = CreateOptions {
            cluster_size: CLUSTER as u64,
            refcount_bits,
            ..CreateOptions::new(512 << 10)
        };
        rig::make(Path::new(IMAGE), &options).await;
        let disk = Disk::open(Path::new(IMAGE), Setup::default())
            .await
            .unwrap();
        for number in 0..24_u64 {
            let offset = number * 21_504 % (480 << 10);
            disk.write(offset, &[number as u8 + 1; 3000]).await.unwrap();
        }
        let range = ByteRange::new(64 << 10, 8 << 10);
        let zeroed = disk.root.write_zeroes(range, ZeroFlags::default());
        zeroed.await.unwrap();
        disk.close().await.unwrap();
    });
    image_of(&world)
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// Damages what a repair restores without loss: refcounts, their structure, COPIED flags, marks.
fn damage(bytes: &mut [u8], random: &mut SmallRng) {
    let table = word(bytes, 48) as usize;
    let block = word(bytes, table) as usize;
    let l1 = word(bytes, 40) as usize;
    for _ in 0..random.random_range(1..6) {
        match random.random_range(0..8) {
            // Refcounts that are too high, too low, or gone.
            0..4 => bytes[block + random.random_range(0..CLUSTER)] ^= random.random_range(1..4),
            4 => bytes[table..table + 8].fill(0),
            5 => bytes[table + 6] ^= 2,
            6 => {
                let l2 = (word(bytes, l1) & 0x00ff_ffff_ffff_fe00) as usize;
                let entry = l2 + 8 * random.random_range(0..CLUSTER / 8);
                if word(bytes, entry) & !(1 << 63) > 1 {
                    bytes[entry] ^= 0x80;
                }
            }
            _ => bytes[79] |= random.random_range(1..4),
        }
    }
}

/// A repair of the image in the world; whether it says that all is well.
fn repair(world: &World) -> (Result<i32, Errno>, Vec<String>) {
    let (outcome, messages) = Executor::simulated(world).block_on(async {
        let file = edge(Path::new(IMAGE));
        check_as_tool(&file, Repair::All).await
    });
    let code = outcome.map(|outcome| outcome.code);
    (code.map_err(|error| error.errno.unwrap()), messages)
}

fn assert_repaired(bytes: &[u8], content: &[u8], context: &str) {
    let checker = Checker::new(bytes);
    assert_eq!(checker.check(), Default::default(), "{context}");
    assert_eq!(bytes[79], 0, "{context}: marks");
    assert!(checker.read_all(&[]) == content, "{context}: content");
}

#[test]
fn a_repair_that_is_cut_off_is_repeated() {
    for seed in 0..12 {
        let refcount_bits = [16, 1, 64, 8][seed as usize % 4];
        let mut random = SmallRng::seed_from_u64(seed);
        let mut bytes = sample(refcount_bits);
        let content = Checker::new(&bytes).read_all(&[]);
        damage(&mut bytes, &mut random);
        let world = world_of(&bytes);
        let (code, messages) = repair(&world);
        let context = format!("seed {seed}: {messages:#?}");
        assert_eq!(code, Ok(0), "{context}");
        assert_repaired(&image_of(&world), &content, &context);
        for prefix in 0..=world.log_len() {
            let random = (0..6).map(|number| Subset::Random(seed * 100 + number));
            for subset in [Subset::None, Subset::All].into_iter().chain(random) {
                let cut = PowerCut {
                    prefix,
                    subset,
                    tear: 512,
                };
                let again = world.restart(&cut, Config::default());
                let (code, messages) = repair(&again);
                let context = format!("seed {seed}, cut {cut:?}: {messages:#?}");
                assert_eq!(code, Ok(0), "{context}");
                assert_repaired(&image_of(&again), &content, &context);
            }
        }
    }
}

#[test]
fn a_repair_on_a_failing_disk_never_claims_success() {
    for seed in 0..4 {
        let mut random = SmallRng::seed_from_u64(seed);
        let mut bytes = sample(16);
        let content = Checker::new(&bytes).read_all(&[]);
        damage(&mut bytes, &mut random);
        let probe = world_of(&bytes);
        repair(&probe).0.unwrap();
        for op_index in 0..probe.op_count() {
            for sticky in [false, true] {
                let world = world_of(&bytes);
                world.inject(Fault {
                    op_index,
                    errno: Errno::EIO,
                    sticky,
                });
                let (code, messages) = repair(&world);
                let context = format!("seed {seed}, operation {op_index}: {messages:#?}");
                let bytes = image_of(&world);
                if code == Ok(0) {
                    assert_repaired(&bytes, &content, &context);
                }
                let again = world_of(&bytes);
                let (code, messages) = repair(&again);
                assert_eq!(code, Ok(0), "{context}, then {messages:#?}");
                assert_repaired(&image_of(&again), &content, &context);
            }
        }
    }
}

#[test]
fn a_dirty_image_is_repaired_when_it_is_opened_for_writing() {
    let mut bytes = sample(16);
    let block = word(&bytes, word(&bytes, 48) as usize) as usize;
    // Written with lazy refcounts and not closed: most refcounts are too low.
    bytes[block + 12..block + 60].fill(0);
    bytes[79] |= 1;
    let content = Checker::new(&bytes).read_all(&[]);
    let world = world_of(&bytes);
    Executor::simulated(&world).block_on(async {
        let disk = Disk::open(Path::new(IMAGE), Setup::default())
            .await
            .unwrap();
        assert_eq!(disk.node.driver().describe()["dirty-flag"], false);
        assert!(disk.read_all().await.unwrap() == content);
        disk.write(200 << 10, &[9; 4096]).await.unwrap();
        disk.close().await.unwrap();
    });
    let after = image_of(&world);
    assert_eq!(Checker::new(&after).check(), Default::default());
    assert_eq!(after[79], 0);
}

#[test]
fn after_a_failed_sync_no_flush_succeeds_until_the_image_is_opened_again() {
    let world = world_of(&sample(16));
    Executor::simulated(&world).block_on(async {
        let open = || Disk::open(Path::new(IMAGE), Setup::default());
        let disk = open().await.unwrap();
        disk.write(0, &[1; 512]).await.unwrap();
        disk.root.flush().await.unwrap();
        disk.write(0, &[2; 512]).await.unwrap();
        world.inject(Fault {
            op_index: world.op_count(),
            errno: Errno::EIO,
            sticky: false,
        });
        assert_eq!(disk.root.flush().await, Err(Errno::EIO));
        // The disk works again, and what it has lost is not known.
        assert!(disk.root.flush().await.is_err());
        disk.write(0, &[3; 512]).await.unwrap();
        disk.write(300 << 10, &[3; 512]).await.unwrap();
        assert!(disk.root.flush().await.is_err());
        assert!(disk.close().await.is_err());
        let disk = open().await.unwrap();
        disk.write(0, &[4; 512]).await.unwrap();
        disk.root.flush().await.unwrap();
        disk.close().await.unwrap();
    });
}
