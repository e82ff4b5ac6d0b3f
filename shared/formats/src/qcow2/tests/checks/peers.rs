//! `qemu-img check` as the oracle.

use super::images::{self, SHAPES, Shape};
use super::{Outcome, check_as_tool, edge};
use block::{CheckResult, Repair};
use executor::{Config, Executor};
use rand::SeedableRng;
use rand::rngs::SmallRng;
use serde_json::Value;
use std::path::Path;
use std::process::Command;

/// What qemu-img says, and its messages.
fn peer(path: &Path, repair: Repair) -> (Outcome, String) {
    let mut command = Command::new("qemu-img");
    command
        .env("LC_ALL", "C")
        .args(["check", "-f", "qcow2", "--output=json"]);
    match repair {
        Repair::None => {}
        Repair::Leaks => drop(command.args(["-r", "leaks"])),
        Repair::All => drop(command.args(["-r", "all"])),
    }
    // QEMU looks for external data files from where it stands.
    let directory = path.parent().unwrap();
    let output = command.arg(path).current_dir(directory).output().unwrap();
    let messages = String::from_utf8_lossy(&output.stderr).into_owned();
    let json: Value = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
    let number = |name: &str| json[name].as_u64().unwrap_or(0);
    let result = CheckResult {
        leaks: number("leaks"),
        corruptions: number("corruptions"),
        check_errors: number("check-errors"),
        leaks_fixed: number("leaks-fixed"),
        corruptions_fixed: number("corruptions-fixed"),
        image_end_offset: json["image-end-offset"].as_u64(),
        total_clusters: number("total-clusters"),
        allocated_clusters: number("allocated-clusters"),
        fragmented_clusters: number("fragmented-clusters"),
        compressed_clusters: number("compressed-clusters"),
    };
    let code = output.status.code().unwrap_or(-1);
    (Outcome { code, result }, messages)
}

fn ours(path: &Path, repair: Repair) -> (Outcome, Vec<String>) {
    let executor = Executor::new(&Config::default()).unwrap();
    let (outcome, messages) = executor.block_on(async {
        let file = edge(path);
        check_as_tool(&file, repair).await
    });
    let failed = Outcome {
        code: 1,
        result: CheckResult::default(),
    };
    (outcome.unwrap_or(failed), messages)
}

fn has_qemu() -> bool {
    let there = Command::new("qemu-img").arg("--version").output().is_ok();
    if !there {
        println!("skipped: qemu-img is not installed");
    }
    there
}

/// The header's first words in version 3, as the offset of a table's entry.
const MAGIC: &str = "4649fb0000000";

/// Rounds for each shape; more by the environment.
fn rounds(least: u64) -> u64 {
    let asked = std::env::var("OUTBOARD_CHECK_ROUNDS").ok();
    asked.and_then(|text| text.parse().ok()).unwrap_or(least)
}

/// A damaged image beside a copy of it.
struct Pair<'d> {
    directory: &'d Path,
    bytes: Vec<u8>,
}

impl Pair<'_> {
    fn fresh(&self, name: &str) -> std::path::PathBuf {
        let path = self.directory.join(name);
        std::fs::write(&path, &self.bytes).unwrap();
        path
    }
}

fn each_damaged(seed: u64, rounds: u64, mut look: impl FnMut(&Pair<'_>, &str)) {
    for (number, shape) in (0..).zip(SHAPES) {
        let files = tempfile::tempdir().unwrap();
        images::make(files.path(), "good.qcow2", shape);
        let good = std::fs::read(files.path().join("good.qcow2")).unwrap();
        let places = images::metadata(&good);
        for round in 0..rounds {
            let mut random = SmallRng::seed_from_u64(seed + number * 1_000_000 + round);
            let mut bytes = good.clone();
            images::damage(&mut bytes, &places, &mut random);
            let pair = Pair {
                directory: files.path(),
                bytes,
            };
            let Shape { options, .. } = shape;
            look(&pair, &format!("{options}, seed {seed}, round {round}"));
        }
    }
}

#[test]
fn sound_images_are_sound() {
    if !has_qemu() {
        return;
    }
    for shape in SHAPES {
        let files = tempfile::tempdir().unwrap();
        images::make(files.path(), "a.qcow2", shape);
        let path = files.path().join("a.qcow2");
        let (expected, _) = peer(&path, Repair::None);
        let (found, messages) = ours(&path, Repair::None);
        assert_eq!(expected.code, 0);
        assert_eq!(found, expected, "{}: {messages:#?}", shape.options);
    }
}

/// Whether QEMU says nothing of the image, while the check goes on: it opens none with bitmaps that cannot be loaded.
fn is_refused(found: &Outcome, expected: &Outcome, theirs: &str) -> bool {
    expected.code == 1 && found.code != 1 && theirs.contains(": Could not open '")
}

/// Collects what differs, to show more than the first case.
#[derive(Default)]
struct Differences {
    cases: Vec<String>,
    images: u64,
}

impl Differences {
    fn compare(
        &mut self,
        context: &str,
        (found, messages): (&Outcome, &[String]),
        (expected, theirs): (&Outcome, &str),
    ) {
        self.images += 1;
        if found == expected {
            return;
        }
        let messages: Vec<_> = messages.iter().rev().take(12).rev().collect();
        let mut theirs: Vec<_> = theirs.lines().rev().take(12).collect();
        theirs.reverse();
        self.cases.push(format!(
            "{context}\nours   {found:?}\nqemu's {expected:?}\nours   {messages:#?}\nqemu's {theirs:#?}"
        ));
    }
    fn finish(self) {
        let Self { cases, images } = self;
        println!("{images} images compared");
        let shown: Vec<_> = cases.iter().take(8).map(String::as_str).collect();
        let all = cases.len();
        assert!(
            all == 0,
            "{all} of {images} differ:\n{}",
            shown.join("\n\n")
        );
    }
}

#[test]
fn damage_is_counted_as_qemu_counts_it() {
    if !has_qemu() {
        return;
    }
    let mut differences = Differences::default();
    each_damaged(1, rounds(24), |pair, context| {
        let path = pair.fresh("a.qcow2");
        let (expected, theirs) = peer(&path, Repair::None);
        let (found, messages) = ours(&path, Repair::None);
        if !is_refused(&found, &expected, &theirs) {
            differences.compare(context, (&found, &messages), (&expected, &theirs));
        }
        assert_eq!(std::fs::read(&path).unwrap(), pair.bytes, "{context}");
    });
    differences.finish();
}

#[test]
fn a_data_cluster_that_is_wrong_in_two_ways_counts_twice() {
    if !has_qemu() {
        return;
    }
    let shape = SHAPES
        .iter()
        .find(|shape| shape.options.contains("extended_l2"));
    let files = tempfile::tempdir().unwrap();
    images::make(files.path(), "a.qcow2", shape.unwrap());
    let path = files.path().join("a.qcow2");
    let mut bytes = std::fs::read(&path).unwrap();
    let offset = |word: u64| (word & 0x00ff_ffff_ffff_fe00) as usize;
    let l1_table = images::word(&bytes, 40) as usize;
    let l2_table = offset(images::word(&bytes, l1_table));
    let holds_data = |at: &usize| {
        images::word(&bytes, *at) >> 62 == 2 && images::word(&bytes, at + 8) as u32 != 0
    };
    let entry = (l2_table..).step_by(16).find(holds_data).unwrap();
    let unaligned = images::word(&bytes, entry) + 512;
    bytes[entry..entry + 8].copy_from_slice(&unaligned.to_be_bytes());
    let allocated = images::word(&bytes, entry + 8) & 0xffff_ffff;
    let contradiction = allocated << 32 | allocated;
    bytes[entry + 8..entry + 16].copy_from_slice(&contradiction.to_be_bytes());
    std::fs::write(&path, &bytes).unwrap();

    let (expected, theirs) = peer(&path, Repair::None);
    let (found, messages) = ours(&path, Repair::None);
    assert_eq!(found, expected, "{messages:#?} {theirs}");
    assert_eq!(
        messages
            .iter()
            .filter(|message| message.contains("cluster is not properly aligned"))
            .count(),
        1
    );
}

#[test]
fn a_cluster_that_loses_its_storage_still_shows_the_backing() {
    if !has_qemu() {
        return;
    }
    let files = tempfile::tempdir().unwrap();
    let qemu_img = |arguments: &[&str]| images::run(files.path(), "qemu-img", arguments);
    std::fs::write(files.path().join("base.raw"), vec![0xff; 128 << 10]).unwrap();
    let overlay = ["-b", "base.raw", "-F", "raw", "a.qcow2"];
    qemu_img(
        &[
            &["create", "-q", "-f", "qcow2", "-o", "extended_l2=on"],
            &overlay[..],
        ]
        .concat(),
    );
    // One subcluster of zeroes with storage; the others are the backing's.
    let commands = ["-c", "write -q 4k 2k", "-c", "write -q -z 4k 2k", "a.qcow2"];
    images::run(
        files.path(),
        "qemu-io",
        &[&["-f", "qcow2"], &commands[..]].concat(),
    );
    qemu_img(&[
        "convert",
        "-f",
        "qcow2",
        "-O",
        "raw",
        "a.qcow2",
        "before.raw",
    ]);

    let path = files.path().join("a.qcow2");
    let mut bytes = std::fs::read(&path).unwrap();
    let l1_table = images::word(&bytes, 40) as usize;
    let l2_table = (images::word(&bytes, l1_table) & 0x00ff_ffff_ffff_fe00) as usize;
    bytes[l2_table + 6] |= 2;
    std::fs::write(&path, &bytes).unwrap();
    let (found, messages) = ours(&path, Repair::All);
    assert_eq!(
        (found.code, found.result.corruptions_fixed),
        (0, 1),
        "{messages:#?}"
    );
    qemu_img(&[
        "compare",
        "-q",
        "-f",
        "qcow2",
        "-F",
        "raw",
        "a.qcow2",
        "before.raw",
    ]);
}

#[test]
fn a_snapshot_table_that_runs_past_the_end_is_replaced_and_the_data_kept() {
    if !has_qemu() {
        return;
    }
    let shape = SHAPES
        .iter()
        .find(|shape| shape.options.contains("cluster_size=2048"));
    let files = tempfile::tempdir().unwrap();
    images::make(files.path(), "a.qcow2", shape.unwrap());
    let path = files.path().join("a.qcow2");
    let mut bytes = std::fs::read(&path).unwrap();
    let table = images::word(&bytes, 64) as usize;
    // The first entry's identifier becomes longer than the file.
    bytes[table + 12..table + 14].copy_from_slice(&0xd800_u16.to_be_bytes());
    std::fs::write(&path, &bytes).unwrap();
    let (found, messages) = ours(&path, Repair::All);
    assert_eq!(found.code, 0, "{messages:#?}");
    let (judged, verdict) = peer(&path, Repair::None);
    assert_eq!(judged.code, 0, "{verdict}");
}

#[test]
fn leaks_are_repaired_as_qemu_repairs_them() {
    if !has_qemu() {
        return;
    }
    let mut differences = Differences::default();
    each_damaged(2, rounds(12), |pair, context| {
        let (expected, theirs) = peer(&pair.fresh("theirs.qcow2"), Repair::Leaks);
        let (found, messages) = ours(&pair.fresh("ours.qcow2"), Repair::Leaks);
        // QEMU discards the clusters that it takes for leaked. When the broken entry is the reason why nothing refers to
        // the snapshot table, that is the end of the table.
        let end_of_table = "snapshot table entry 0 is incomplete";
        let destroyed = theirs.contains(end_of_table)
            && !messages
                .iter()
                .any(|message| message.contains(end_of_table));
        if !destroyed && !is_refused(&found, &expected, &theirs) {
            differences.compare(context, (&found, &messages), (&expected, &theirs));
        }
    });
    differences.finish();
}

#[test]
fn everything_is_repaired_that_qemu_repairs() {
    if !has_qemu() {
        return;
    }
    let mut differences = Differences::default();
    each_damaged(3, rounds(12), |pair, context| {
        let (mut expected, theirs) = peer(&pair.fresh("theirs.qcow2"), Repair::All);
        let path = pair.fresh("ours.qcow2");
        let (found, messages) = ours(&path, Repair::All);
        // Where a new refcount structure goes is the repairer's choice.
        expected.result.image_end_offset = found.result.image_end_offset;
        // Where QEMU gives up (refcount blocks at unaligned offsets), the repair may go on; where
        // a refcount block is past the end, QEMU makes the file as long as the entry says.
        let gives_up = expected.code == 1 && found.code != 1;
        // A table that lies on the header changes with the header, when the new structure is entered there.
        let says = |what: &str| messages.iter().any(|message| message.contains(what));
        let header_is_a_table = says(MAGIC);
        // An L1 table that is also something else is not written to; QEMU writes.
        let refuses = found.code == 1 && says("metadata overlap check failed");
        // QEMU says this when it gives back more than it had counted for the old snapshot table, which ends in new damage.
        let gives_back_too_much = theirs.contains("qcow2_free_clusters failed");
        let is_outside = theirs.contains("is outside image");
        if gives_up || header_is_a_table || refuses || gives_back_too_much || is_outside {
            expected = found.clone();
        }
        differences.compare(context, (&found, &messages), (&expected, &theirs));
        if found.code == 1 {
            return;
        }
        let (judged, verdict) = peer(&path, Repair::None);
        let mut claimed = found.clone();
        claimed.result.leaks_fixed = 0;
        claimed.result.corruptions_fixed = 0;
        let context = format!("{context}, judged by QEMU");
        if !is_refused(&found, &judged, &verdict) {
            differences.compare(&context, (&claimed, &messages), (&judged, &verdict));
        }
        let bytes = std::fs::read(&path).unwrap();
        if found.code == 0 {
            let marks = if bytes[7] >= 3 { bytes[79] & 3 } else { 0 };
            assert_eq!(marks, 0, "{context}");
        }
    });
    differences.finish();
}
