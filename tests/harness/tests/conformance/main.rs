//! The conformance suite, once per driver. `CONFORMANCE_SEEDS=100..200` runs other seeds than
//! the few that every run takes.

#![expect(clippy::unwrap_used, reason = "tests")]

mod vmdk;

use executor::sim::Image;
use filters::throttle::{ThrottleGroup, ThrottleLimits};
use harness::conformance::{
    IMAGE, Subject, broken_images, concurrent_requests, failed_operations, power_cuts, readings,
};
use rand::rngs::SmallRng;
use rand::{RngCore, SeedableRng};
use samples::dmg::{Codec, Table};
use serde_json::{Value, json};
use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use vmdk::{vmdk, vmdk_extent, vmdk_extents};
use zeroize::Zeroizing;

/// Length of the disks.
const LENGTH: usize = 1 << 20;

fn seeds(usual: u64) -> Range<u64> {
    let Ok(asked) = std::env::var("CONFORMANCE_SEEDS") else {
        return 0..usual;
    };
    let (first, end) = asked.split_once("..").expect("a range of seeds");
    first.parse().unwrap()..end.parse().unwrap()
}

fn noise(length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    SmallRng::seed_from_u64(1).fill_bytes(&mut bytes);
    bytes
}

fn subject(name: &'static str, files: Image, definition: Value) -> Subject {
    let Value::Object(definition) = definition else {
        panic!("{definition} is not an object");
    };
    Subject {
        name,
        tables: vec![protocols::DRIVERS, formats::DRIVERS, filters::DRIVERS],
        files,
        definition,
        marks_use: false,
        prepare: |_| {},
        check: |_| Ok(()),
    }
}

fn file() -> Subject {
    subject(
        "file",
        Image::from([(PathBuf::from(IMAGE), noise(LENGTH))]),
        json!({"driver": "file", "node-name": "subject", "filename": IMAGE, "discard": "unmap"}),
    )
}

fn raw_window() -> Subject {
    subject(
        "raw window",
        Image::from([(PathBuf::from(IMAGE), noise(2 * LENGTH))]),
        json!({"driver": "raw", "node-name": "subject", "offset": 1024, "size": LENGTH,
            "discard": "unmap", "detect-zeroes": "unmap",
            "file": {"driver": "file", "filename": IMAGE}}),
    )
}

/// A qcow2 image made by qemu-img, over a backing file that ends before it if `backed`.
fn qcow2(name: &'static str, options: &str, backed: bool) -> Subject {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    let created = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-o", options])
        .arg(&path)
        .arg(LENGTH.to_string())
        .status()
        .expect("scripts/setup installs QEMU's tools");
    assert!(created.success(), "{name}: qemu-img: {created:?}");
    let image = (PathBuf::from(IMAGE), std::fs::read(&path).unwrap());
    let mut definition = json!({"driver": "qcow2", "node-name": "subject", "discard": "unmap",
        "file": {"driver": "file", "filename": IMAGE}});
    let mut files = Image::from([image]);
    if backed {
        let base = "/simulated/base";
        files.insert(PathBuf::from(base), noise(LENGTH / 4 * 3 + 512));
        definition["backing"] = json!({"driver": "raw",
            "file": {"driver": "file", "filename": base}});
    }
    Subject {
        check: qemu_img_check,
        ..subject(name, files, definition)
    }
}

/// A qed image made by qemu-img, over a backing file that ends before it if `backed`.
fn qed(name: &'static str, options: &str, backed: bool) -> Subject {
    Subject {
        check: |files| peer_check("qed", files),
        ..allocating(name, ("qed", options), backed)
    }
}

/// A qcow image made by qemu-img, which has no check for it, over a backing file that ends before it if
/// `backed`.
fn qcow(name: &'static str, options: &str, backed: bool) -> Subject {
    let mut subject = allocating(name, ("qcow", options), backed);
    if options.contains("aes") {
        let encrypt = json!({"format": "aes", "key-secret": "s"});
        subject.definition.insert("encrypt".to_owned(), encrypt);
        subject.prepare = |graph| {
            let password = Zeroizing::new(b"geheim".to_vec());
            graph.secrets().insert("s".to_owned(), password);
        };
    }
    subject
}

/// An image of a format that allocates clusters, made by qemu-img, over a backing file that ends before it if
/// `backed`.
fn allocating(name: &'static str, (format, options): (&str, &str), backed: bool) -> Subject {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    let created = Command::new("qemu-img")
        .args(["create", "-q", "--object", "secret,id=s,data=geheim"])
        .args(["-f", format, "-o", options])
        .arg(&path)
        .arg((LENGTH + 1536).to_string())
        .status()
        .expect("scripts/setup installs QEMU's tools");
    assert!(created.success(), "{name}: qemu-img: {created:?}");
    let mut definition = json!({"driver": format, "node-name": "subject", "discard": "unmap",
        "file": {"driver": "file", "filename": IMAGE}});
    let image = (PathBuf::from(IMAGE), std::fs::read(&path).unwrap());
    let mut files = Image::from([image]);
    if backed {
        let base = "/simulated/base";
        files.insert(PathBuf::from(base), noise(LENGTH / 4 * 3 + 512));
        definition["backing"] = json!({"driver": "raw",
            "file": {"driver": "file", "filename": base}});
    }
    subject(name, files, definition)
}

/// A vdi image made by qemu-img, of some blocks.
fn vdi(options: &str) -> Subject {
    Subject {
        check: vdi_check,
        ..mapped("vdi", options)
    }
}

/// What `qemu-img check` says of the image, as `driver`.
fn checked(files: &Image, driver: &str, arguments: &[&str]) -> Output {
    let mut file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    file.write_all(&files[Path::new(IMAGE)]).unwrap();
    let mut command = Command::new("qemu-img");
    command.args(["check", "-f", driver]).args(arguments);
    command.arg(file.path()).output().unwrap()
}

/// No block is used twice or lies outside. A count that is behind the map does no harm.
fn vdi_check(files: &Image) -> Result<(), String> {
    let output = checked(files, "vdi", &[]);
    let errors = String::from_utf8_lossy(&output.stderr);
    let is_harmless = |line: &str| line.is_empty() || line.contains("allocated blocks mismatch");
    let counted = ["errors were found", "Data may be corrupted"];
    match errors
        .lines()
        .all(|line| is_harmless(line) || counted.iter().any(|c| line.contains(c)))
    {
        true => Ok(()),
        false => Err(format!("{output:?}")),
    }
}

/// A vhdx image made by qemu-img, of some blocks.
fn vhdx(options: &str) -> Subject {
    let mut subject = mapped("vhdx", &format!("block_size=1M,{options}"));
    if !options.contains("fixed")
        && let Some(image) = subject.files.get_mut(Path::new(IMAGE))
    {
        // Headers, log, table and metadata; the rest is not used yet.
        image.truncate(4 << 20);
    }
    Subject {
        check: vhdx_check,
        ..subject
    }
}

/// The peer replays the log, if there is anything in it, and finds nothing wrong.
fn vhdx_check(files: &Image) -> Result<(), String> {
    let output = checked(files, "vhdx", &["-r", "all"]);
    match output.status.success() {
        true => Ok(()),
        false => Err(format!("{output:?}")),
    }
}

/// An image of one of the formats with one level of mapping, made empty by qemu-img.
fn mapped(driver: &'static str, options: &str) -> Subject {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    let created = Command::new("qemu-img")
        .args(["create", "-q", "-f", driver, "-o", options])
        .arg(&path)
        .arg((LENGTH + LENGTH / 2 + 1536).to_string())
        .status()
        .expect("scripts/setup installs QEMU's tools");
    assert!(created.success(), "{driver}: qemu-img: {created:?}");
    let definition = json!({"driver": driver, "node-name": "subject", "discard": "unmap",
        "file": {"driver": "file", "filename": IMAGE}});
    let files = Image::from([(PathBuf::from(IMAGE), std::fs::read(&path).unwrap())]);
    subject(driver, files, definition)
}

/// A parallels image; whoever does not close it leaves it marked.
fn parallels(options: &str, backed: bool) -> Subject {
    let mut subject = mapped("parallels", options);
    subject
        .definition
        .insert("prealloc-size".into(), json!(192 << 10));
    if backed {
        let base = "/simulated/base";
        let bytes = noise(LENGTH / 4 * 3 + 512);
        subject.files.insert(PathBuf::from(base), bytes);
        let backing = json!({"driver": "raw", "file": {"driver": "file", "filename": base}});
        subject.definition.insert("backing".into(), backing);
    }
    Subject {
        marks_use: true,
        check: parallels_check,
        ..subject
    }
}

/// No block is outside of the file or of another one. Marks and what is preallocated do no harm.
fn parallels_check(files: &Image) -> Result<(), String> {
    let output = checked(files, "parallels", &[]);
    let errors = String::from_utf8_lossy(&output.stderr);
    let harmless = [
        "was not closed correctly",
        "space leaked at the end",
        "errors were found",
        "Data may be corrupted",
        "leaked clusters were found",
        "waste of disk space",
    ];
    let is_harmless = |line: &str| line.is_empty() || harmless.iter().any(|it| line.contains(it));
    match errors.lines().all(is_harmless) && !errors.contains("outside") {
        true => Ok(()),
        false => Err(format!("{output:?}")),
    }
}

/// A vpc image: after whatever happened, the peer reads all of it, and all sectors of blocks count.
fn vpc(options: &str) -> Subject {
    Subject {
        check: vpc_check,
        ..mapped("vpc", options)
    }
}

fn vpc_check(files: &Image) -> Result<(), String> {
    let image = &files[Path::new(IMAGE)];
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let (path, raw) = (directory.path().join("image"), directory.path().join("raw"));
    std::fs::write(&path, image).unwrap();
    let output = Command::new("qemu-img")
        .args(["convert", "-f", "vpc", "-O", "raw"])
        .args([&path, &raw])
        .output()
        .unwrap();
    if !output.status.success() {
        return Err(format!("{output:?}"));
    }
    if image[512..].starts_with(b"cxsparse") {
        let entries = image[1536..2048].as_chunks().0.iter();
        for entry in entries.map(|entry| u32::from_be_bytes(*entry)) {
            let bitmap = image.get(entry as usize * 512..).unwrap_or(&[0xff; 512]);
            if entry != u32::MAX && bitmap.iter().take(512).any(|byte| *byte != 0xff) {
                return Err(format!("sectors of the block at {entry} do not count"));
            }
        }
    }
    Ok(())
}

/// What the images that are read hold: zeroes, repeated bytes, noise.
fn content() -> Vec<u8> {
    samples::disk(LENGTH, 7)
}

/// An image of a format that is only read.
fn only_read(driver: &'static str, image: Vec<u8>) -> Subject {
    let files = Image::from([(PathBuf::from(IMAGE), image)]);
    let definition = json!({"driver": driver, "node-name": "subject", "read-only": true,
        "file": {"driver": "file", "filename": IMAGE}});
    subject(driver, files, definition)
}

/// An image with [`content`] that qemu-img made of a raw one, with `arguments` of `convert`.
fn converted(driver: &'static str, arguments: &[&str]) -> Subject {
    let directory = tempfile::tempdir().unwrap();
    let (raw, path) = (directory.path().join("raw"), directory.path().join("image"));
    std::fs::write(&raw, content()).unwrap();
    let made = Command::new("qemu-img")
        .args(["convert", "-f", "raw", "-O", driver])
        .args(arguments)
        .args([&raw, &path])
        .output()
        .expect("scripts/setup installs QEMU's tools");
    assert!(made.status.success(), "{driver}: {made:?}");
    only_read(driver, std::fs::read(&path).unwrap())
}

fn vhdx_sample(sector_bytes: u32) -> Subject {
    let shape = samples::vhdx::Shape {
        sector_bytes,
        is_logged: false,
    };
    only_read("vhdx", samples::vhdx::image(shape, &content()))
}

fn bochs(version: u32, extent_bytes: usize) -> Subject {
    let shape = samples::bochs::Shape {
        version,
        extent_bytes,
        spare: 3,
    };
    only_read("bochs", samples::bochs::image(shape, &content()))
}

fn parallels_sample(form: samples::parallels::Form, block_sectors: usize) -> Subject {
    let shape = samples::parallels::Shape {
        form,
        block_sectors,
    };
    only_read("parallels", samples::parallels::image(shape, &content()))
}

fn dmg(codec: Codec, table: Table) -> Subject {
    let shape = samples::dmg::Shape {
        codec,
        table,
        chunk_bytes: 24 << 10,
        chunks_per_table: 7,
        data_fork: 4096,
    };
    only_read("dmg", samples::dmg::image(shape, &content()))
}

fn compress(options: &str) -> Subject {
    compressing(qcow2("compress", options, false))
}

/// Everything that is written to the image is compressed first.
fn compressing(mut subject: Subject) -> Subject {
    let mut image = std::mem::take(&mut subject.definition);
    image.remove("node-name");
    let filter =
        json!({"driver": "compress", "node-name": "subject", "discard": "unmap", "file": image});
    if let Value::Object(filter) = filter {
        subject.definition = filter;
    }
    subject
}

/// What is read from the backing is kept.
fn copy_on_read() -> Subject {
    let mut subject = qcow2("copy-on-read", "cluster_size=4k", true);
    let mut image = std::mem::take(&mut subject.definition);
    image.remove("node-name");
    let filter = json!({"driver": "copy-on-read", "node-name": "subject", "discard": "unmap",
        "file": image});
    if let Value::Object(filter) = filter {
        subject.definition = filter;
    }
    subject
}

/// A node that listens to events and has other limits, below a format.
fn blkdebug() -> Subject {
    let mut subject = qcow2("qcow2 over blkdebug", "cluster_size=4k", false);
    let debugged = json!({"driver": "blkdebug", "align": 1024, "max-transfer": 8192,
        "opt-write-zero": 2048, "max-write-zero": 4096, "opt-discard": 2048, "max-discard": 4096,
        "image": {"driver": "file", "filename": IMAGE}});
    subject.definition.insert("file".to_owned(), debugged);
    subject
}

/// Some requests wait for limits.
fn throttle() -> Subject {
    let definition = json!({"driver": "throttle", "node-name": "subject", "discard": "unmap",
        "throttle-group": "group", "file": {"driver": "file", "filename": IMAGE}});
    let files = Image::from([(PathBuf::from(IMAGE), noise(LENGTH))]);
    Subject {
        prepare: |graph| {
            let mut limits = ThrottleLimits::default();
            for (name, value) in [("iops-write", 2000), ("bps-total", 8 << 20)] {
                limits.set(name, value).unwrap();
            }
            let group = Arc::new(ThrottleGroup::new(limits));
            graph.objects().insert("group".to_owned(), group);
        },
        ..subject("throttle", files, definition)
    }
}

/// Every change is logged.
fn logged() -> Subject {
    let log = "/simulated/log";
    let definition = json!({"driver": "blklogwrites", "node-name": "subject", "discard": "unmap",
        "file": {"driver": "file", "filename": IMAGE}, "log": {"driver": "file", "filename": log}});
    let files = [(IMAGE, noise(LENGTH)), (log, Vec::new())];
    let files = files.map(|(name, bytes)| (PathBuf::from(name), bytes));
    subject("blklogwrites", Image::from(files), definition)
}

/// The file of an image is longer than it needs to be.
fn preallocated() -> Subject {
    let mut subject = qcow2("preallocate", "cluster_size=4k", false);
    subject.definition["file"] = json!({"driver": "preallocate", "prealloc-size": 256 << 10,
        "prealloc-align": 64 << 10, "file": {"driver": "file", "filename": IMAGE}});
    subject
}

/// Three copies.
fn quorum() -> Subject {
    let names = ["/simulated/0", "/simulated/1", "/simulated/2"];
    let children = names.map(|name| json!({"driver": "file", "filename": name}));
    let definition = json!({"driver": "quorum", "node-name": "subject", "vote-threshold": 2,
        "rewrite-corrupted": true, "discard": "unmap", "children": children});
    let files = names.map(|name| (PathBuf::from(name), noise(LENGTH)));
    subject("quorum", Image::from(files), definition)
}

/// An image and a file that must always be alike.
fn verified() -> Subject {
    let mut subject = qcow2("blkverify", "cluster_size=4k", false);
    let mut image = std::mem::take(&mut subject.definition);
    image.remove("node-name");
    let raw = "/simulated/raw";
    subject.files.insert(PathBuf::from(raw), vec![0; LENGTH]);
    let definition = json!({"driver": "blkverify", "node-name": "subject",
        "raw": {"driver": "file", "filename": raw}, "test": image});
    if let Value::Object(definition) = definition {
        subject.definition = definition;
    }
    subject
}

/// A disk of luks with [`content`], made by qemu-img.
fn luks(options: &str) -> Subject {
    let directory = tempfile::tempdir().unwrap();
    let (raw, path) = (directory.path().join("raw"), directory.path().join("image"));
    std::fs::write(&raw, content()).unwrap();
    let secret = "secret,id=s,data=geheim";
    let options = format!("key-secret=s,iter-time=1,{options}");
    loop {
        let created = Command::new("qemu-img")
            .args([
                "convert", "--object", secret, "-f", "raw", "-O", "luks", "-o", &options,
            ])
            .args([&raw, &path])
            .output()
            .expect("scripts/setup installs QEMU's tools");
        // Where CPU time is counted in ticks, it now and then cannot measure key derivation.
        let error = String::from_utf8_lossy(&created.stderr);
        if !error.contains("Unable to get accurate CPU usage") {
            assert!(created.status.success(), "{options}: {error}");
            break;
        }
    }
    let image = (PathBuf::from(IMAGE), std::fs::read(&path).unwrap());
    Subject {
        prepare: |graph| {
            let password = Zeroizing::new(b"geheim".to_vec());
            graph.secrets().insert("s".to_owned(), password);
        },
        ..subject(
            "luks",
            Image::from([image]),
            json!({"driver": "luks", "node-name": "subject", "key-secret": "s",
                "file": {"driver": "file", "filename": IMAGE}}),
        )
    }
}

fn qemu_img_check(files: &Image) -> Result<(), String> {
    peer_check("qcow2", files)
}

/// Leaked clusters are no error.
fn peer_check(format: &str, files: &Image) -> Result<(), String> {
    let output = checked(files, format, &[]);
    match output.status.code() {
        Some(0 | 3) => Ok(()),
        _ => Err(format!("{output:?}")),
    }
}

macro_rules! conformance {
    ($($module:ident: $subject:expr;)*) => {$(
        mod $module {
            use super::*;

            #[test]
            fn requests_side_by_side_see_their_own_writes() {
                let subject = $subject;
                seeds(8).for_each(|seed| concurrent_requests(&subject, seed));
            }

            #[test]
            fn flushed_data_survives_a_power_cut() {
                let subject = $subject;
                seeds(2).for_each(|seed| power_cuts(&subject, seed));
            }

            #[test]
            fn failed_operations_lose_nothing_that_was_promised() {
                let subject = $subject;
                seeds(2).for_each(|seed| failed_operations(&subject, seed));
            }
        }
    )*};
}

conformance! {
    plain_file: file();
    window: raw_window();
    qcow2_default: qcow2("qcow2", "cluster_size=64k", false);
    qcow2_small_clusters: qcow2("qcow2, 2 KiB clusters", "cluster_size=2k", false);
    qcow2_tiny_refcounts: qcow2("qcow2, 1 bit refcounts", "cluster_size=512,refcount_bits=1", false);
    qcow2_version_2: qcow2("qcow2 v2", "compat=0.10,cluster_size=4k", false);
    qcow2_overlay: qcow2("qcow2 overlay", "cluster_size=16k", true);
    qcow2_subclusters: qcow2("qcow2, subclusters", "cluster_size=16k,extended_l2=on", false);
    qcow2_subclusters_overlay: qcow2("qcow2 overlay, subclusters", "cluster_size=16k,extended_l2=on", true);
    compressed: compress("cluster_size=4k");
    compressed_zstd: compress("cluster_size=16k,compression_type=zstd");
    debugged: blkdebug();
    throttled: throttle();
    logging_writes: logged();
    preallocating: preallocated();
    copying_on_read: copy_on_read();
    parallels_default: parallels("cluster_size=1M", false);
    parallels_odd_blocks: parallels("cluster_size=3584", false);
    parallels_overlay: parallels("cluster_size=64k", true);
    qcow_default: qcow("qcow", "encryption=off", false);
    qcow_overlay: qcow("qcow overlay", "encryption=off", true);
    qcow_encrypted: qcow("qcow, AES", "encrypt.format=aes,encrypt.key-secret=s", false);
    qed_default: qed("qed", "cluster_size=64k", false);
    qed_overlay: qed("qed overlay", "cluster_size=16k", true);
    qed_small_clusters: qed("qed, 4 KiB clusters", "cluster_size=4k,table_size=2", false);
    vdi_dynamic: vdi("static=off");
    vhdx_dynamic: vhdx("subformat=dynamic");
    vmdk_sparse: vmdk("zeroed_grain=off", false);
    vmdk_overlay: vmdk("zeroed_grain=on", true);
    vmdk_plain_overlay: vmdk("zeroed_grain=off", true);
    vmdk_several: vmdk_extents();
    vpc_dynamic: vpc("force_size=on");
    vpc_fixed: vpc("subformat=fixed");
    qcow2_version_2_overlay: qcow2("qcow2 v2 overlay", "compat=0.10,cluster_size=4k", true);
}

macro_rules! reading {
    ($($module:ident: $subject:expr;)*) => {$(
        mod $module {
            use super::*;

            #[test]
            fn what_the_image_holds_is_read() {
                let subject = $subject;
                seeds(2).for_each(|seed| readings(&subject, &content(), seed));
            }

            #[test]
            fn broken_images_are_refused_or_read() {
                let subject = $subject;
                seeds(4).for_each(|seed| broken_images(&subject, seed));
            }
        }
    )*};
}

reading! {
    parallels_reading: converted("parallels", &["-o", "cluster_size=64k"]);
    parallels_older_reading: parallels_sample(samples::parallels::Form::Sectors, 63);
    raw_reading: converted("raw", &[]);
    qcow2_reading: converted("qcow2", &[]);
    qcow2_compressed_reading: converted("qcow2", &["-c", "-o", "cluster_size=4k"]);
    qcow2_subclusters_reading: converted("qcow2", &["-o", "cluster_size=16k,extended_l2=on"]);
    qcow_reading: converted("qcow", &[]);
    qcow_sample_reading: only_read("qcow", samples::qcow::image(&content()));
    qed_reading: converted("qed", &[]);
    qed_sample_reading: only_read("qed", samples::qed::image(&content(), 0));
    qed_small_clusters_reading: converted("qed", &["-o", "cluster_size=4k,table_size=2"]);
    vdi_reading: converted("vdi", &[]);
    vpc_reading: converted("vpc", &["-o", "force_size=on"]);
    vpc_sample_reading: only_read("vpc", samples::vpc::image(8192, &content()));
    vpc_fixed_reading: converted("vpc", &["-o", "subformat=fixed,force_size=on"]);
    vdi_sample_reading: only_read("vdi", samples::vdi::image(&content()));
    vhdx_reading: converted("vhdx", &["-o", "block_size=1M"]);
    vhdx_sample_reading: vhdx_sample(4096);
    vmdk_reading: converted("vmdk", &[]);
    vmdk_compressed_reading: converted("vmdk", &["-o", "subformat=streamOptimized"]);
    vmdk_stream_reading: only_read("vmdk", samples::vmdk::stream(&content()));
    vmdk_cowd_reading: vmdk_extent("vmfsSparse", "VMFSSPARSE", samples::vmdk::cowd(&content(), 1));
    vmdk_se_sparse_reading: vmdk_extent("seSparse", "SESPARSE", samples::vmdk::se_sparse(&content()));
    vmdk_flat_reading: vmdk_extent("vmfs", "VMFS", content());
    bochs_reading: bochs(2, 4096);
    bochs_version_1_reading: bochs(1, 64 << 10);
    bochs_one_extent_reading: bochs(2, 1 << 20);
    cloop_reading: only_read("cloop", samples::cloop::image(64 << 10, &content()));
    cloop_small_blocks_reading: only_read("cloop", samples::cloop::image(2048, &content()));
    dmg_reading: dmg(Codec::Zlib, Table::Xml);
    dmg_plain_reading: dmg(Codec::Raw, Table::Xml);
    dmg_bzip2_reading: dmg(Codec::Bzip2, Table::Fork);
}

/// The images that nothing on this machine writes are what the formats say: the peer reads them so.
#[test]
fn qemu_img_reads_the_samples_as_they_were_meant() {
    let directory = tempfile::tempdir().unwrap();
    let (image, raw) = (directory.path().join("image"), directory.path().join("raw"));
    // The peer's module for bzip2 is not everywhere.
    let subjects = [
        bochs(2, 4096),
        bochs(1, 64 << 10),
        bochs(2, 1 << 20),
        only_read("cloop", samples::cloop::image(64 << 10, &content())),
        dmg(Codec::Zlib, Table::Xml),
        dmg(Codec::Zlib, Table::Fork),
        dmg(Codec::Raw, Table::Xml),
        only_read("qcow", samples::qcow::image(&content())),
        only_read("qed", samples::qed::image(&content(), 0)),
        only_read("vdi", samples::vdi::image(&content())),
        // The peer knows no larger sectors.
        vhdx_sample(512),
        only_read("vmdk", samples::vmdk::stream(&content())),
        parallels_sample(samples::parallels::Form::Sectors, 63),
        parallels_sample(samples::parallels::Form::Blocks, 128),
        only_read("vpc", samples::vpc::image(8192, &content())),
    ];
    for subject in subjects {
        std::fs::write(&image, &subject.files[Path::new(IMAGE)]).unwrap();
        let converted = Command::new("qemu-img")
            .args(["convert", "-f", subject.name, "-O", "raw"])
            .args([&image, &raw])
            .output()
            .expect("scripts/setup installs QEMU's tools");
        assert!(
            converted.status.success(),
            "{}: {converted:?}",
            subject.name
        );
        let read = std::fs::read(&raw).unwrap();
        assert!(read == content(), "{} is read otherwise", subject.name);
    }
}

#[test]
fn copies_see_the_writes_of_requests_side_by_side() {
    let subject = quorum();
    seeds(8).for_each(|seed| concurrent_requests(&subject, seed));
}

#[test]
fn compressed_writes_side_by_side_are_kept_without_reference_counts() {
    for backed in [false, true] {
        let subject = compressing(qcow("compress over qcow", "encryption=off", backed));
        seeds(4).for_each(|seed| concurrent_requests(&subject, seed));
    }
}

#[test]
fn static_images_hold_what_was_written_side_by_side() {
    let subject = vdi("static=on");
    seeds(4).for_each(|seed| concurrent_requests(&subject, seed));
}

#[test]
fn fixed_vhdx_images_hold_what_was_written_side_by_side() {
    let subject = vhdx("subformat=fixed,block_state_zero=off");
    seeds(4).for_each(|seed| concurrent_requests(&subject, seed));
}

#[test]
fn an_image_under_verification_is_like_its_file() {
    let subject = verified();
    seeds(8).for_each(|seed| concurrent_requests(&subject, seed));
}

/// One seed: whenever the disk is opened, its key is derived.
#[test]
fn luks_disks_are_read_and_broken_ones_refused() {
    let mut subject = luks("cipher-alg=aes-128,cipher-mode=cbc,hash-alg=sha1");
    let read_only = ("read-only".to_owned(), Value::Bool(true));
    subject.definition.extend([read_only]);
    readings(&subject, &content(), 0);
    broken_images(&subject, 0);
}

/// One seed: whenever the disk is opened, its key is derived.
#[test]
fn luks_disks_hold_what_was_written_and_flushed() {
    let subject = luks("cipher-alg=aes-128,cipher-mode=cbc,hash-alg=sha1");
    concurrent_requests(&subject, 0);
    power_cuts(&subject, 0);
}

#[test]
#[should_panic(expected = "holds")]
fn the_suite_notices_flushes_that_are_not_passed_on() {
    let mut subject = file();
    subject
        .definition
        .insert("cache".to_owned(), json!({"no-flush": true}));
    (0..4).for_each(|seed| power_cuts(&subject, seed));
}
