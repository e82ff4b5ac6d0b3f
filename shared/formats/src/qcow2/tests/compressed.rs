//! Compressed clusters: QEMU's tools both ways, packing, and streams that lie.

use super::checker::Checker;
use super::peers::{Files, has_qemu, on_host, open, qemu};
use super::rig::Setup;
use super::rig::{self, Disk};
use crate::qcow2::CreateOptions;
use block::{ByteRange, Errno, ZeroFlags};
use rand::rngs::SmallRng;
use rand::{Rng, RngCore, SeedableRng};

/// Runs of text, of noise and of zeroes, in pieces of up to 100 KiB.
fn mixed(seed: u64, length: usize) -> Vec<u8> {
    let mut random = SmallRng::seed_from_u64(seed);
    let mut bytes = Vec::with_capacity(length);
    while bytes.len() < length {
        let piece = random.random_range(1..100 << 10).min(length - bytes.len());
        let start = bytes.len();
        bytes.resize(start + piece, 0);
        match random.random_range(0..4) {
            0 => random.fill_bytes(&mut bytes[start..]),
            1 => {}
            _ => {
                let word: [u8; 13] = random.random();
                let text = bytes[start..].iter_mut().zip(word.iter().cycle());
                text.for_each(|(byte, letter)| *byte = b'a' + letter % 26);
                for _ in 0..piece / 50 {
                    let at = start + random.random_range(0..piece);
                    bytes[at] = random.random();
                }
            }
        }
    }
    bytes
}

const SIZE: usize = (3 << 20) + 512;

#[test]
fn what_qemu_compressed_is_read_and_overwritten() {
    if !has_qemu() {
        return;
    }
    let shapes = [
        ("zlib", 512),
        ("zlib", 65536),
        ("zstd", 4096),
        ("zstd", 65536),
        ("zlib", 2 << 20),
        ("zstd", 2 << 20),
    ];
    for (seed, (codec, cluster_size)) in (1..).zip(shapes) {
        println!("seed {seed}: {codec} {cluster_size}");
        let files = Files::new();
        let mut content = mixed(seed, SIZE);
        std::fs::write(files.path("base.raw"), &content).unwrap();
        let options = format!("compression_type={codec},cluster_size={cluster_size}");
        let (raw, image) = (files.text("base.raw"), files.text("a.qcow2"));
        let convert = ["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &options];
        qemu("qemu-img", &[&convert[..], &[&raw, &image]].concat());
        on_host(async {
            let disk = open(&files.path("a.qcow2")).await;
            assert!(disk.read_all().await.unwrap() == content);
            let mut random = SmallRng::seed_from_u64(seed);
            for _ in 0..60 {
                let at = random.random_range(0..SIZE / 512) * 512;
                let length = random.random_range(1..200_usize) * 512;
                let span = at..(at + length).min(SIZE);
                match random.random_range(0..4) {
                    0 => {
                        let read = disk.read(at as u64, span.len()).await.unwrap();
                        assert!(read == content[span]);
                    }
                    1 => {
                        let range = ByteRange::new(at as u64, span.len() as u64);
                        let zeroed = disk.root.write_zeroes(range, ZeroFlags::default());
                        zeroed.await.unwrap();
                        content[span].fill(0);
                    }
                    _ => {
                        content[span.clone()].copy_from_slice(&mixed(at as u64, span.len()));
                        disk.write(at as u64, &content[span]).await.unwrap();
                    }
                }
            }
            assert!(disk.read_all().await.unwrap() == content);
            disk.close().await.unwrap();
        });
        files.check("a.qcow2");
        assert!(content == files.content("a.qcow2"));
    }
}

#[test]
fn what_is_compressed_here_is_read_and_overwritten_by_qemu() {
    if !has_qemu() {
        return;
    }
    let shapes = [
        ("zlib", 512, 16),
        ("zlib", 65536, 16),
        ("zstd", 65536, 1),
        ("zstd", 4096, 64),
        ("zlib", 2 << 20, 2),
    ];
    for (seed, (codec, cluster_size, refcount_bits)) in (11..).zip(shapes) {
        println!("seed {seed}: {codec} {cluster_size} {refcount_bits}");
        let files = Files::new();
        let image = files.text("a.qcow2");
        let options = format!(
            "compression_type={codec},cluster_size={cluster_size},refcount_bits={refcount_bits}"
        );
        let size = SIZE.to_string();
        let create = ["create", "-q", "-f", "qcow2", "-o", &options, &image, &size];
        qemu("qemu-img", &create);
        let mut content = vec![0; SIZE];
        on_host(async {
            let disk = open(&files.path("a.qcow2")).await;
            let grain = cluster_size.max(65536) as usize;
            let mut random = SmallRng::seed_from_u64(seed);
            // Every cluster once, some of them again.
            let starts = (0..SIZE).step_by(grain);
            let again = (0..20).map(|_| random.random_range(0..SIZE / grain) * grain);
            for start in starts.chain(again.collect::<Vec<_>>()) {
                let span = start..(start + grain).min(SIZE);
                content[span.clone()].copy_from_slice(&mixed(random.random(), span.len()));
                let write = disk.write_compressed(start as u64, &content[span]);
                write.await.unwrap();
                if random.random_bool(0.1) {
                    disk.root.flush().await.unwrap();
                }
            }
            assert!(disk.read_all().await.unwrap() == content);
            disk.close().await.unwrap();
        });
        let bytes = std::fs::read(files.path("a.qcow2")).unwrap();
        assert_eq!(Checker::new(&bytes).check(), Default::default());
        files.check("a.qcow2");
        assert!(content == files.content("a.qcow2"));
        let write = ["-f", "qcow2", "-c", "write -P 7 100k 300k", &image];
        qemu("qemu-io", &write);
        content[100 << 10..400 << 10].fill(7);
        on_host(async {
            let disk = open(&files.path("a.qcow2")).await;
            assert!(disk.read_all().await.unwrap() == content);
            disk.close().await.unwrap();
        });
        files.check("a.qcow2");
    }
}

/// Options of an image with 64 KiB clusters in the simulated world of one thread.
fn options() -> CreateOptions {
    CreateOptions::new(1 << 20)
}

#[test]
fn compressed_clusters_are_packed_behind_each_other_also_after_some_are_freed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.qcow2");
    on_host(async {
        rig::make(&path, &options()).await;
        let disk = Disk::open(&path, Setup::default()).await.unwrap();
        let cluster = |fill: u8| vec![fill; 65536];
        let end = async || {
            disk.root.flush().await.unwrap();
            std::fs::metadata(&path).unwrap().len()
        };
        disk.write_compressed(0, &cluster(1)).await.unwrap();
        let first = end().await;
        for number in 1..16_u8 {
            let (at, bytes) = (u64::from(number) << 16, cluster(number));
            disk.write_compressed(at, &bytes).await.unwrap();
        }
        // Sixteen clusters of one byte each take a few hundred bytes.
        assert!(end().await < first + 4096);
        // All of them go; what comes next must not land in what was given back.
        let all = ByteRange::new(0, 1 << 20);
        disk.root.discard(all).await.unwrap();
        for _ in 0..3 {
            disk.root.flush().await.unwrap();
        }
        for number in 0..16_u8 {
            let (at, bytes) = (u64::from(number) << 16, cluster(number + 100));
            disk.write_compressed(at, &bytes).await.unwrap();
        }
        for number in 0..16_u8 {
            let read = disk.read(u64::from(number) << 16, 65536).await.unwrap();
            assert!(read == cluster(number + 100), "{number}");
        }
        disk.close().await.unwrap();
    });
    let bytes = std::fs::read(&path).unwrap();
    assert_eq!(Checker::new(&bytes).check(), Default::default());
}

#[test]
fn a_stream_that_lies_is_an_error_and_the_rest_stays_readable() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.qcow2");
    on_host(async {
        rig::make(&path, &options()).await;
        let disk = Disk::open(&path, Setup::default()).await.unwrap();
        for number in 0..4_u8 {
            let (at, bytes) = (u64::from(number) << 16, [number; 65536]);
            disk.write_compressed(at, &bytes).await.unwrap();
        }
        disk.close().await.unwrap();
    });
    let good = std::fs::read(&path).unwrap();
    let word = |at: u64| u64::from_be_bytes(good[at as usize..][..8].try_into().unwrap());
    let l2 = word(word(40)) & 0x00ff_ffff_ffff_fe00;
    let entry = word(l2);
    let offset = entry & ((1 << 54) - 1);
    let with_entry = |value: u64| {
        let mut bad = good.clone();
        bad[l2 as usize..][..8].copy_from_slice(&value.to_be_bytes());
        bad
    };
    let with_stream = |byte: u8, length: usize| {
        let mut bad = good.clone();
        bad[offset as usize..][..length].fill(byte);
        bad
    };
    let images = [
        // Beyond the end of the file, near 2^54, in the middle of nothing.
        with_entry(1 << 62 | 1 << 40),
        with_entry(1 << 62 | ((1 << 54) - 1)),
        with_entry(1 << 62 | 0xff << 54 | 70_000),
        // Streams of nonsense, and one that is cut short.
        with_stream(0xff, 4),
        with_stream(0, 20),
        good[..offset as usize + 3].to_vec(),
    ];
    for (number, image) in images.iter().enumerate() {
        std::fs::write(&path, image).unwrap();
        on_host(async {
            let disk = Disk::open(&path, Setup::default()).await.unwrap();
            assert_eq!(disk.read(0, 512).await, Err(Errno::EIO), "image {number}");
            assert_eq!(disk.write(512, &[1; 512]).await, Err(Errno::EIO));
            // Written as a whole it needs nothing of the old content.
            disk.write(0, &[9; 65536]).await.unwrap();
            assert_eq!(disk.read(512, 1).await.unwrap(), [9]);
            let _ = disk.close().await;
        });
    }
}
