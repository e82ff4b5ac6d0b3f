//! Images of VMware, in one file and in several.

use super::{LENGTH, content, noise, only_read, subject};
use executor::sim::Image;
use harness::conformance::{IMAGE, Subject};
use serde_json::json;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Runs qemu-img in a directory of its own.
fn qemu_img(directory: &Path, arguments: &[&str]) {
    let output = Command::new("qemu-img")
        .current_dir(directory)
        .args(arguments)
        .output()
        .expect("scripts/setup installs QEMU's tools");
    assert!(output.status.success(), "{arguments:?}: {output:?}");
}

/// A vmdk image made by qemu-img; over a vmdk image with something in it if `backed`.
pub(super) fn vmdk(options: &str, backed: bool) -> Subject {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let length = LENGTH + LENGTH / 2 + 1536;
    let mut definition = json!({"driver": "vmdk", "node-name": "subject", "discard": "unmap",
        "file": {"driver": "file", "filename": IMAGE}});
    let mut files = Image::new();
    let mut create = vec!["create", "-q", "-f", "vmdk", "-o", options];
    if backed {
        std::fs::write(path("raw"), noise(LENGTH)).unwrap();
        qemu_img(
            directory.path(),
            &["convert", "-f", "raw", "-O", "vmdk", "raw", "base"],
        );
        let base = "/simulated/base";
        files.insert(base.into(), std::fs::read(path("base")).unwrap());
        definition["backing"] =
            json!({"driver": "vmdk", "file": {"driver": "file", "filename": base}});
        create.extend(["-b", "base", "-F", "vmdk"]);
    }
    let length = length.to_string();
    create.extend(["image", &length]);
    qemu_img(directory.path(), &create);
    files.insert(IMAGE.into(), std::fs::read(path("image")).unwrap());
    Subject {
        check: |files| vmdk_check(&files[Path::new(IMAGE)]),
        ..subject("vmdk", files, definition)
    }
}

/// The extents of [`vmdk_extents`]: their names, sectors and what they are.
const EXTENTS: [(&str, usize, &str); 4] = [
    ("/simulated/s001", 768, "SPARSE \"s001\""),
    ("/simulated/flat", 5, "FLAT \"flat\" 3"),
    ("/simulated/s002", 1000, "SPARSE \"s002\""),
    ("/simulated/cowd", 300, "VMFSSPARSE \"cowd\""),
];

/// A vmdk image of extents of several kinds, whose lengths are not those of grains.
pub(super) fn vmdk_extents() -> Subject {
    let directory = tempfile::tempdir().unwrap();
    let mut definition = json!({"driver": "vmdk", "node-name": "subject", "discard": "unmap",
        "file": {"driver": "file", "filename": IMAGE}, "extents": []});
    let mut files = Image::new();
    let mut lines = String::new();
    for (path, sectors, kind) in EXTENTS {
        let bytes = match kind.split_once(' ') {
            Some(("FLAT", _)) => vec![0; (sectors + 3) * 512],
            Some(("VMFSSPARSE", _)) => samples::vmdk::cowd(&vec![0; sectors * 512], 8),
            _ => {
                let length = (sectors * 512).to_string();
                qemu_img(
                    directory.path(),
                    &["create", "-q", "-f", "vmdk", "image", &length],
                );
                std::fs::read(directory.path().join("image")).unwrap()
            }
        };
        files.insert(path.into(), bytes);
        lines += &format!("RW {sectors} {kind}\n");
        let extents = definition["extents"].as_array_mut().unwrap();
        extents.push(json!({"driver": "file", "filename": path}));
    }
    let descriptor = samples::vmdk::descriptor("twoGbMaxExtentSparse", &lines);
    files.insert(IMAGE.into(), descriptor.into_bytes());
    Subject {
        check: |files| {
            let sparse = EXTENTS
                .iter()
                .filter(|(.., kind)| kind.starts_with("SPARSE"));
            let mut checks = sparse.map(|(path, ..)| vmdk_check(&files[Path::new(path)]));
            checks.find(Result::is_err).unwrap_or(Ok(()))
        },
        ..subject("vmdk extents", files, definition)
    }
}

/// Nothing is mapped to where the file has nothing, and no grain is given away twice.
fn vmdk_check(image: &[u8]) -> Result<(), String> {
    let word = |at: usize| u32::from_le_bytes(image[at..at + 4].try_into().unwrap()) as usize;
    // What qemu-img made has one table, which its directory names.
    let table = word(word(56) * 512) * 512;
    let mut users = std::collections::BTreeSet::new();
    let entries = (0..512).map(|index| word(table + index * 4));
    for entry in entries.filter(|entry| *entry > 1) {
        if !users.insert(entry) {
            return Err(format!("two grains at sector {entry}"));
        }
    }
    let mut file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    file.write_all(image).unwrap();
    // Without its parent, which is elsewhere.
    let name = file.path().display();
    let options = format!("driver=vmdk,file.driver=file,file.filename={name},backing=");
    let output = Command::new("qemu-img")
        .args(["check", "--image-opts", &options])
        .output()
        .unwrap();
    match output.status.success() {
        true => Ok(()),
        false => Err(format!("{output:?}")),
    }
}

/// An image that only a descriptor can name, in one extent of its own.
pub(super) fn vmdk_extent(create_type: &str, kind: &str, bytes: Vec<u8>) -> Subject {
    let line = format!("RW {} {kind} \"extent\"\n", LENGTH / 512);
    let descriptor = samples::vmdk::descriptor(create_type, &line).into_bytes();
    let mut subject = only_read("vmdk", bytes);
    let name = PathBuf::from("/simulated/descriptor");
    subject.files.insert(name.clone(), descriptor);
    let extents = json!([subject.definition["file"]]);
    let file = json!({"driver": "file", "filename": name});
    subject
        .definition
        .extend([("file".to_owned(), file), ("extents".to_owned(), extents)]);
    subject
}

/// The samples of extents that only a descriptor can name are what the formats say.
#[test]
fn qemu_img_reads_the_samples_of_extents_as_they_were_meant() {
    let content = content();
    for (create_type, kind, bytes) in [
        ("vmfsSparse", "VMFSSPARSE", samples::vmdk::cowd(&content, 1)),
        ("vmfsSparse", "VMFSSPARSE", samples::vmdk::cowd(&content, 8)),
        ("seSparse", "SESPARSE", samples::vmdk::se_sparse(&content)),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let line = format!("RW {} {kind} \"extent\"\n", LENGTH / 512);
        let descriptor = samples::vmdk::descriptor(create_type, &line);
        std::fs::write(path("image"), descriptor).unwrap();
        std::fs::write(path("extent"), bytes).unwrap();
        qemu_img(
            directory.path(),
            &["convert", "-f", "vmdk", "-O", "raw", "image", "raw"],
        );
        assert!(std::fs::read(path("raw")).unwrap() == content, "{kind}");
    }
}
