//! QEMU's tools as oracle, both ways, on real files.

use super::rig::{self, Disk, Setup};
use super::workload::{History, Workload};
use crate::qcow2::CreateOptions;
use block::{Preallocation, Resize};
use executor::{Config, Executor};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

const SIZE: u64 = 3 << 20;

/// Runs one of QEMU's programs; its output when it succeeds.
pub(crate) fn qemu(program: &str, arguments: &[&str]) -> String {
    loop {
        let output = Command::new(program).args(arguments).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (out, error) = (text(&output.stdout), text(&output.stderr));
        // Where CPU time is counted in ticks, it now and then cannot measure key derivation.
        if error.contains("Unable to get accurate CPU usage") {
            continue;
        }
        let success = output.status.success();
        assert!(success, "{program} {arguments:?}: {out}{error}");
        return out;
    }
}

/// Whether QEMU's tools are there; says so when they are not.
pub(crate) fn has_qemu() -> bool {
    let there = Command::new("qemu-img").arg("--version").output().is_ok();
    if !there {
        println!("skipped: qemu-img is not installed");
    }
    there
}

/// A directory with files of a test.
pub(crate) struct Files(tempfile::TempDir);

impl Files {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
    pub(crate) fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }
    pub(crate) fn check(&self, name: &str) {
        qemu(
            "qemu-img",
            &["check", "-q", "-f", "qcow2", &self.text(name)],
        );
    }
    /// The disk as QEMU reads it.
    pub(crate) fn content(&self, name: &str) -> Vec<u8> {
        let raw = self.text("content.raw");
        let image = self.text(name);
        qemu(
            "qemu-img",
            &["convert", "-f", "qcow2", "-O", "raw", &image, &raw],
        );
        std::fs::read(raw).unwrap()
    }
}

pub(crate) fn on_host<T>(future: impl Future<Output = T>) -> T {
    let executor = Executor::new(&Config::default()).unwrap();
    executor.block_on(future)
}

pub(super) async fn open(path: &Path) -> Disk {
    Disk::open(path, Setup::default()).await.unwrap()
}

/// Runs a random workload on the image and gives the disk's content.
pub(super) fn work(path: &Path, setup: Setup, seed: u64) -> Vec<u8> {
    on_host(work_here(path, setup, seed))
}

/// The same on the executor that is running.
pub(super) async fn work_here(path: &Path, setup: Setup, seed: u64) -> Vec<u8> {
    let disk = Disk::open(path, setup).await.unwrap();
    let history = History::new(disk.node.length(), || 0);
    let workload = Workload {
        seed,
        tasks: 4,
        requests: 40,
        longest: 256 << 10,
    };
    workload.run(&disk, &history).await;
    assert_eq!(history.failures.get(), 0);
    let content = disk.read_all().await.unwrap();
    disk.close().await.unwrap();
    content
}

/// Cluster sizes, refcount widths, versions; not the whole product.
const SHAPES: &[(u64, u32, u32)] = &[
    (512, 1, 3),
    (512, 16, 2),
    (1024, 64, 3),
    (1024, 2, 3),
    (4096, 4, 3),
    (4096, 64, 3),
    (8192, 8, 3),
    (65536, 16, 2),
    (65536, 16, 3),
    (65536, 32, 3),
    (2 << 20, 1, 3),
];

#[test]
fn images_of_every_shape_agree_with_qemu() {
    if !has_qemu() {
        return;
    }
    for (seed, &(cluster_size, refcount_bits, version)) in (1..).zip(SHAPES) {
        for made_by_qemu in [true, false] {
            println!("{cluster_size} {refcount_bits} v{version} {made_by_qemu} seed {seed}");
            let files = Files::new();
            let path = files.path("a.qcow2");
            if made_by_qemu {
                let compat = if version == 2 { "0.10" } else { "1.1" };
                let options = format!(
                    "cluster_size={cluster_size},refcount_bits={refcount_bits},compat={compat}"
                );
                let (name, size) = (files.text("a.qcow2"), SIZE.to_string());
                let arguments = ["create", "-q", "-f", "qcow2", "-o", &options, &name, &size];
                qemu("qemu-img", &arguments);
            } else {
                let options = CreateOptions {
                    cluster_size,
                    refcount_bits,
                    version,
                    ..CreateOptions::new(SIZE)
                };
                on_host(rig::make(&path, &options));
                files.check("a.qcow2");
            }
            both_ways(&files, "a.qcow2", seed, Setup::default);
        }
    }
}

/// Works on an image with the driver, then with QEMU, then with the driver again.
fn both_ways(files: &Files, name: &str, seed: u64, setup: impl Fn() -> Setup) {
    let path = files.path(name);
    let content = work(&path, setup(), seed);
    files.check(name);
    assert!(content == files.content(name), "QEMU reads something else");
    let image = files.text(name);
    let commands = [
        "write -P 0x11 100k 300k",
        "write -z 1M 128k",
        "write -z -u 2M 64k",
        "discard 512k 256k",
        "write -P 0x22 2500k 1k",
    ];
    let arguments: Vec<&str> = commands
        .iter()
        .flat_map(|command| ["-c", *command])
        .collect();
    qemu(
        "qemu-io",
        &[&["-f", "qcow2"], &arguments[..], &[&image]].concat(),
    );
    files.check(name);
    let by_qemu = files.content(name);
    let read = on_host(async {
        let disk = Disk::open(&path, setup()).await.unwrap();
        disk.read_all().await.unwrap()
    });
    assert!(by_qemu == read, "QEMU wrote something else");
    let content = work(&path, setup(), seed + 1000);
    files.check(name);
    assert!(content == files.content(name), "QEMU reads something else");
}

#[test]
fn subclusters_and_data_files_agree_with_qemu() {
    if !has_qemu() {
        return;
    }
    let layouts = [
        ("extended_l2=on,cluster_size=16k", false, false),
        ("extended_l2=on,refcount_bits=1", false, false),
        ("extended_l2=on,cluster_size=2M", false, false),
        ("cluster_size=4k", true, false),
        ("cluster_size=64k,extended_l2=on", true, false),
        ("cluster_size=8k", true, true),
        ("cluster_size=32k,extended_l2=on", true, true),
    ];
    for (seed, (options, has_data_file, is_raw)) in (1..).zip(layouts) {
        println!("{options} {has_data_file} {is_raw} seed {seed}");
        let files = Files::new();
        let (name, data) = (files.text("a.qcow2"), files.text("a.data"));
        let mut options = options.to_owned();
        if has_data_file {
            options += &format!(",data_file={data}");
        }
        if is_raw {
            options += ",data_file_raw=on";
        }
        let create = ["create", "-q", "-f", "qcow2", "-o", &options, &name];
        qemu("qemu-img", &[&create[..], &[&SIZE.to_string()]].concat());
        let setup = || Setup {
            data_file: has_data_file.then(|| files.path("a.data")),
            ..Setup::default()
        };
        both_ways(&files, "a.qcow2", seed, setup);
        if is_raw {
            let mut raw = std::fs::read(&data).unwrap();
            raw.resize(SIZE as usize, 0);
            assert!(raw == files.content("a.qcow2"), "the data file differs");
        }
    }
}

#[test]
fn chains_read_through_and_copy_on_write_as_qemu_does() {
    if !has_qemu() {
        return;
    }
    for options in [
        "cluster_size=4k,compat=0.10",
        "cluster_size=4k",
        "cluster_size=16k,extended_l2=on",
    ] {
        chain(options);
    }
}

/// A raw base, an image over it, and one with the given options over that, which is worked on.
fn chain(options: &str) {
    let files = Files::new();
    let base: Vec<u8> = (0..2 << 20).map(|at: u32| (at >> 9) as u8 | 1).collect();
    std::fs::write(files.path("base.raw"), base).unwrap();
    let (middle, top) = (files.text("middle.qcow2"), files.text("top.qcow2"));
    let size = SIZE.to_string();
    let create = ["create", "-q", "-f", "qcow2"];
    let over_raw = ["-b", "base.raw", "-F", "raw", &middle, &size];
    qemu("qemu-img", &[&create[..], &over_raw].concat());
    let write = ["-f", "qcow2", "-c", "write -P 0x77 1000k 100k", &middle];
    qemu("qemu-io", &write);
    let small = ["-o", options];
    let over_middle = ["-b", "middle.qcow2", "-F", "qcow2", &top, &size];
    qemu("qemu-img", &[&create[..], &small, &over_middle].concat());
    for seed in 0..3 {
        println!("{options}, seed {seed}");
        let content = on_host(async {
            let lower = Setup {
                backing: Some(rig::leaf(&files.path("base.raw"))),
                ..Setup::default()
            };
            let middle = Disk::open(&files.path("middle.qcow2"), lower)
                .await
                .unwrap();
            let upper = Setup {
                backing: Some(Arc::clone(&middle.node)),
                ..Setup::default()
            };
            let top = Disk::open(&files.path("top.qcow2"), upper).await.unwrap();
            let history = History::new(SIZE, || 0);
            let workload = Workload {
                seed,
                tasks: 3,
                requests: 20,
                longest: 64 << 10,
            };
            workload.run(&top, &history).await;
            assert_eq!(history.failures.get(), 0);
            let content = top.read_all().await.unwrap();
            top.close().await.unwrap();
            content
        });
        files.check("top.qcow2");
        assert!(content == files.content("top.qcow2"));
    }
}

#[test]
fn a_snapshot_keeps_its_content_while_the_disk_changes() {
    if !has_qemu() {
        return;
    }
    for compat in ["0.10", "1.1"] {
        let files = Files::new();
        let image = files.text("a.qcow2");
        let options = format!("compat={compat},cluster_size=4k");
        let size = SIZE.to_string();
        let create = ["create", "-q", "-f", "qcow2", "-o", &options, &image, &size];
        qemu("qemu-img", &create);
        work(&files.path("a.qcow2"), Setup::default(), 5);
        let before = files.content("a.qcow2");
        qemu("qemu-img", &["snapshot", "-c", "one", &image]);
        let content = work(&files.path("a.qcow2"), Setup::default(), 6);
        files.check("a.qcow2");
        assert!(content == files.content("a.qcow2"));
        let raw = files.text("snapshot.raw");
        let convert = [
            "convert", "-f", "qcow2", "-l", "one", "-O", "raw", &image, &raw,
        ];
        qemu("qemu-img", &convert);
        assert!(
            before == std::fs::read(raw).unwrap(),
            "the snapshot changed"
        );
        qemu("qemu-img", &["snapshot", "-d", "one", &image]);
        files.check("a.qcow2");
        work(&files.path("a.qcow2"), Setup::default(), 7);
        files.check("a.qcow2");
    }
}

#[test]
fn a_resized_disk_keeps_what_still_belongs_to_it() {
    if !has_qemu() {
        return;
    }
    let files = Files::new();
    let path = files.path("a.qcow2");
    let options = CreateOptions {
        cluster_size: 512,
        ..CreateOptions::new(SIZE)
    };
    on_host(rig::make(&path, &options));
    let mut content = work(&path, Setup::default(), 3);
    for length in [SIZE + 512, 40 << 20, 5 << 20, 1 << 20, 9 << 20] {
        println!("to {length}");
        on_host(async {
            let disk = open(&path).await;
            let resize = Resize::to(length);
            disk.node.resize(resize).await.unwrap();
            assert_eq!(disk.node.length(), length);
            disk.close().await.unwrap();
        });
        files.check("a.qcow2");
        content.resize(length as usize, 0);
        assert!(content == files.content("a.qcow2"));
    }
}

#[test]
fn preallocated_metadata_maps_everything_in_place() {
    if !has_qemu() {
        return;
    }
    for cluster_size in [512, 65536] {
        let files = Files::new();
        let options = CreateOptions {
            cluster_size,
            preallocation: Preallocation::Metadata,
            ..CreateOptions::new(SIZE + 512)
        };
        on_host(rig::make(&files.path("a.qcow2"), &options));
        files.check("a.qcow2");
        let map = qemu(
            "qemu-img",
            &["map", "--output=json", &files.text("a.qcow2")],
        );
        assert!(!map.contains("\"data\": false"), "{map}");
        let content = work(&files.path("a.qcow2"), Setup::default(), 1);
        files.check("a.qcow2");
        assert!(content == files.content("a.qcow2"));
    }
}
