//! Images made to harm: every one is refused or served, never a panic, a hang or much memory.

use super::rig::{self, Disk, Setup};
use crate::qcow2::CreateOptions;
use block::{ByteRange, ErrorKind, Resize, ZeroFlags};
use executor::Executor;
use executor::sim::{Config, Image, World};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::path::Path;

const IMAGE: &str = "a.qcow2";
const CLUSTER: usize = 4096;
/// A cluster whose header has room for the names of features.
const NAMES_CLUSTER: u64 = 8192;

fn run<T>(files: Image, future: impl Future<Output = T>) -> T {
    let world = World::with_files(Config::default(), files);
    Executor::simulated(&world).block_on(future)
}

fn files_of(bytes: &[u8]) -> Image {
    [(IMAGE.into(), bytes.to_vec())].into()
}

/// A small image with something of everything.
pub(super) fn sample(cluster_size: u64) -> Vec<u8> {
    let world = World::new(Config::default());
    Executor::simulated(&world).block_on(async {
        let options = CreateOptions {
            cluster_size,
            backing_file: Some("base.raw".into()),
            backing_format: Some("raw".into()),
            ..CreateOptions::new(4 << 20)
        };
        rig::make(Path::new(IMAGE), &options).await;
        let disk = Disk::open(Path::new(IMAGE), Setup::default())
            .await
            .unwrap();
        disk.write(0, &[7; 20000]).await.unwrap();
        disk.write(1 << 20, &[8; 9000]).await.unwrap();
        let range = ByteRange::new(2 << 20, 1 << 16);
        let zeroed = disk.root.write_zeroes(range, ZeroFlags::default());
        zeroed.await.unwrap();
        disk.close().await.unwrap();
    });
    world.files().remove(Path::new(IMAGE)).unwrap()
}

/// Opens an image and does a bit of everything; errors are fine.
async fn exercise() {
    let setup = Setup {
        cache: 0,
        ..Setup::default()
    };
    let Ok(disk) = Disk::open(Path::new(IMAGE), setup).await else {
        return;
    };
    let end = disk.node.length();
    for offset in [0, 1 << 20, 2 << 20, end / 2, end.saturating_sub(512)] {
        let offset = offset / 512 * 512;
        let _ = disk.read(offset, 512).await;
        let _ = disk.write(offset, &[1; 512]).await;
        let range = ByteRange::new(offset, 64 << 10);
        let _ = disk.root.write_zeroes(range, ZeroFlags::default()).await;
        let _ = disk.root.discard(range).await;
        let _ = disk.write(offset, &[1; 40 << 10]).await;
        let _ = disk.root.flush().await;
    }
    let resize = Resize::to(end.saturating_add(1 << 20));
    let _ = disk.node.resize(resize).await;
    let _ = disk.close().await;
}

#[test]
fn random_damage_is_refused_or_served() {
    let mut random = SmallRng::seed_from_u64(0x9c0);
    let samples = [sample(512), sample(CLUSTER as u64)];
    for round in 0..1500 {
        let mut bytes = samples[round % 2].clone();
        let tables = if round % 2 == 0 { 8 << 10 } else { 6 * CLUSTER };
        for _ in 0..random.random_range(1..4) {
            // The header is where most of the power is.
            let most = if random.random() { 112 } else { tables };
            let at = random.random_range(4..most.min(bytes.len() - 8));
            match random.random_range(0..4) {
                0 => bytes[at] = random.random(),
                1 => bytes[at] ^= 1 << random.random_range(0..8),
                2 => bytes[at / 8 * 8..][..8].copy_from_slice(&[0xff; 8]),
                _ => {
                    let cluster = random.random_range(0..20_u64) * CLUSTER as u64;
                    let entry = (cluster | 1 << 63).to_be_bytes();
                    bytes[at / 8 * 8..][..8].copy_from_slice(&entry);
                }
            }
        }
        println!("round {round}");
        run(files_of(&bytes), exercise());
    }
}

/// Puts a big-endian value of `width` bytes into a copy of the image.
fn patched(bytes: &[u8], at: usize, value: u64, width: usize) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[at..at + width].copy_from_slice(&value.to_be_bytes()[8 - width..]);
    bytes
}

#[test]
fn header_fields_beyond_their_caps_are_refused() {
    let good = sample(CLUSTER as u64);
    let cases: &[(&str, usize, u64, usize)] = &[
        ("magic", 0, 0x5146_4900, 4),
        ("version", 4, 1, 4),
        ("version", 4, 4, 4),
        ("backing name beyond the cluster", 8, 4090, 8),
        ("backing name at the end of the world", 8, u64::MAX, 8),
        ("backing name too long", 16, 1024, 4),
        ("tiny clusters", 20, 8, 4),
        ("huge clusters", 20, 22, 4),
        ("size beyond the L1 table", 24, 1 << 50, 8),
        ("size negative", 24, 1 << 63, 8),
        ("encryption", 32, 1, 4),
        ("L1 too large", 36, (4 << 20) + 1, 4),
        ("L1 too small", 36, 0, 4),
        ("L1 unaligned", 40, 4096 + 512, 8),
        ("L1 beyond 2^56", 40, 1 << 56, 8),
        ("L1 overflows", 40, u64::MAX - 4095, 8),
        ("refcount table unaligned", 48, 100, 8),
        ("no refcount table", 48, 0, 8),
        ("refcount table in the header", 56, 0, 4),
        ("refcount table too large", 56, 4096, 4),
        ("too many snapshots", 60, 65537, 4),
        ("snapshots unaligned", 64, 1, 8),
        ("external data without a file", 72, 4, 8),
        ("compression type", 72, 8, 8),
        ("extended L2 of small clusters", 72, 16, 8),
        ("unknown feature", 72, 1 << 40, 8),
        ("corrupt", 72, 2, 8),
        ("refcount width", 96, 7, 4),
        ("header too short", 100, 103, 4),
        ("header too long", 100, 4097, 4),
        ("extension too long", 116, 1 << 31, 4),
    ];
    for &(what, at, value, width) in cases {
        let bytes = patched(&good, at, value, width);
        let opened = run(files_of(&bytes), async {
            Disk::open(Path::new(IMAGE), Setup::default()).await.err()
        });
        let error = opened.unwrap_or_else(|| panic!("{what} was accepted"));
        println!("{what}: {error}");
        let kinds = [
            ErrorKind::Corrupt,
            ErrorKind::Unsupported,
            ErrorKind::Invalid,
        ];
        assert!(kinds.contains(&error.kind), "{what}: {error}");
    }
}

#[test]
fn an_unknown_feature_is_named_by_the_image() {
    let mut bytes = patched(&sample(NAMES_CLUSTER), 72, 1 << 5, 8);
    let name = b"external data file";
    let at = bytes.windows(name.len()).position(|window| window == name);
    let entry = at.unwrap();
    bytes[entry - 1] = 5;
    let error = run(files_of(&bytes), async {
        Disk::open(Path::new(IMAGE), Setup::default()).await.err()
    });
    assert_eq!(
        error.unwrap().message,
        "Unsupported qcow2 feature(s): external data file"
    );
}

#[test]
fn metadata_that_counts_as_free_is_not_overwritten() {
    let mut bytes = sample(CLUSTER as u64);
    // Every refcount of the image is zero: its own tables look free.
    bytes[2 * CLUSTER..3 * CLUSTER].fill(0);
    let l1 = bytes[3 * CLUSTER..4 * CLUSTER].to_vec();
    let world = World::with_files(Config::default(), files_of(&bytes));
    Executor::simulated(&world).block_on(async {
        let disk = Disk::open(Path::new(IMAGE), Setup::default())
            .await
            .unwrap();
        assert_eq!(
            disk.write(3 << 20, &[1; 512]).await,
            Err(executor::Errno::EIO)
        );
        assert_eq!(disk.write(0, &[1; 512]).await, Err(executor::Errno::EIO));
    });
    let after = world.files().remove(Path::new(IMAGE)).unwrap();
    assert_eq!(after[3 * CLUSTER..4 * CLUSTER], l1);
    assert_eq!(after[79] & 2, 2, "marked as corrupt");
}

#[test]
fn unknown_autoclear_bits_are_cleared_and_unknown_extensions_kept() {
    let good = sample(NAMES_CLUSTER);
    let mut bytes = patched(&good, 88, 1 << 9, 8);
    let names = 0x6803_f857_u32.to_be_bytes();
    let at = bytes.windows(4).position(|window| window == names).unwrap();
    bytes[at..at + 4].copy_from_slice(b"what");
    let world = World::with_files(Config::default(), files_of(&bytes));
    Executor::simulated(&world).block_on(async {
        let disk = Disk::open(Path::new(IMAGE), Setup::default())
            .await
            .unwrap();
        disk.write(0, &[1; 512]).await.unwrap();
        disk.close().await.unwrap();
    });
    let after = world.files().remove(Path::new(IMAGE)).unwrap();
    assert_eq!(after[88..96], [0; 8]);
    assert_eq!(&after[at..at + 4], b"what");
}
