//! What a name inside an image may open.

use crate::rig::{open_root, options, read, run};
use block::graph::{Graph, NamePolicy};
use block::{Error, ErrorKind};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

/// Runs qemu-img in a directory; false when there is none.
pub(crate) fn qemu_img(directory: &Path, arguments: &[&str]) {
    let output = Command::new("qemu-img")
        .current_dir(directory)
        .args(arguments)
        .output()
        .expect("scripts/setup installs QEMU's tools");
    assert!(output.status.success(), "{arguments:?}: {output:?}");
}

/// Directories `images` (with `base.raw` and `top.qcow2`) and, beside it, `other` (with
/// `other.raw`).
fn directories() -> TempDir {
    let dir = TempDir::new().unwrap();
    let images = dir.path().join("images");
    for (name, byte) in [("images/base.raw", 1), ("other/other.raw", 2)] {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, vec![byte; 65536]).unwrap();
    }
    qemu_img(&images, &["create", "-f", "qcow2", "top.qcow2", "64k"]);
    dir
}

/// Writes a backing name into the image, as an attacker would.
fn name_backing(dir: &TempDir, name: &str) {
    let rebase = ["rebase", "-u", "-F", "raw", "-b", name, "top.qcow2"];
    qemu_img(&dir.path().join("images"), &rebase);
}

/// Opens the image; the first byte that it reads.
fn open(dir: &TempDir, policy: NamePolicy) -> Result<u8, Error> {
    let path = dir.path().join("images/top.qcow2");
    run(async {
        let graph = Graph::new(&[protocols::DRIVERS, formats::DRIVERS], policy);
        let definition = json!({"driver": "qcow2", "node-name": "top",
            "file": {"driver": "file", "filename": path}});
        let opened = graph.add(options(definition)).await;
        if opened.is_err() {
            assert!(graph.nodes().is_empty(), "a failed open leaves nothing");
        }
        let root = open_root(&opened?).attach();
        Ok(read(&root, 0, 512).await.unwrap()[0])
    })
}

#[test]
fn a_file_beside_the_image_opens_read_only() {
    let dir = directories();
    name_backing(&dir, "base.raw");
    assert_eq!(open(&dir, NamePolicy::default()).unwrap(), 1);
    // It is only read: a write-protected one does as well.
    let base = dir.path().join("images/base.raw");
    let mut permissions = std::fs::metadata(&base).unwrap().permissions();
    permissions.set_readonly(true);
    std::fs::set_permissions(&base, permissions).unwrap();
    assert_eq!(open(&dir, NamePolicy::default()).unwrap(), 1);
}

#[test]
fn names_that_lead_elsewhere_are_refused() {
    let dir = directories();
    let images = dir.path().join("images");
    let absolute = dir.path().join("other/other.raw");
    std::os::unix::fs::symlink(&absolute, images.join("link.raw")).unwrap();
    std::os::unix::fs::symlink("../other", images.join("link")).unwrap();
    let fifo = images.join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let names = [
        absolute.to_str().unwrap(),
        "../other/other.raw",
        "link.raw",
        "link/other.raw",
        "./../images/../other/other.raw",
        "fifo",
        ".",
        "json:{\"file\":{\"driver\":\"file\",\"filename\":\"base.raw\"}}",
        "nbd://localhost/x",
        "http://localhost:1/x",
        "json:{\"file\":{\"driver\":\"https\",\"url\":\"https://localhost:1/x\"}}",
        "file:base.raw",
        "/dev/zero",
        "/proc/self/fd/0",
    ];
    for name in names {
        name_backing(&dir, name);
        let error = open(&dir, NamePolicy::default()).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Forbidden, "{name}: {error}");
        let start = "Could not open backing file: ";
        assert!(error.message.starts_with(start), "{name}: {error}");
    }
    name_backing(&dir, "missing.raw");
    let error = open(&dir, NamePolicy::default()).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Io, "{error}");
}

#[test]
fn an_allowed_directory_widens_what_names_may_open() {
    let dir = directories();
    let allow = |name: &str| NamePolicy {
        allowed_dirs: vec![PathBuf::from("/nonexistent"), dir.path().join(name)],
        ..NamePolicy::default()
    };
    let absolute = dir.path().join("other/other.raw");
    for name in [absolute.to_str().unwrap(), "../other/other.raw"] {
        name_backing(&dir, name);
        assert_eq!(open(&dir, allow("other")).unwrap(), 2, "{name}");
        let error = open(&dir, allow("images")).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Forbidden, "{name}: {error}");
    }
    let image = dir.path().join("images/base.raw");
    let link = dir.path().join("other/link.raw");
    std::os::unix::fs::symlink(image, &link).unwrap();
    name_backing(&dir, link.to_str().unwrap());
    let error = open(&dir, allow("other")).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Forbidden, "{error}");
}

#[test]
fn an_allowed_driver_does_not_allow_another() {
    let dir = directories();
    let allow = |name: &str| NamePolicy {
        allowed_drivers: vec![name.to_owned()],
        ..NamePolicy::default()
    };
    // Nobody listens there.
    for (name, driver, other) in [
        ("http://127.0.0.1:1/x", "http", "nbd"),
        ("https://127.0.0.1:1/x", "https", "http"),
        ("nbd://127.0.0.1:1/x", "nbd", "http"),
    ] {
        name_backing(&dir, name);
        let error = open(&dir, allow(other)).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Forbidden, "{name}: {error}");
        let error = open(&dir, allow(driver)).unwrap_err();
        assert_ne!(error.kind, ErrorKind::Forbidden, "{name}: {error}");
    }
}

#[test]
fn a_chain_that_bites_its_tail_is_refused() {
    let dir = directories();
    let images = dir.path().join("images");
    std::fs::copy(images.join("top.qcow2"), images.join("middle.qcow2")).unwrap();
    let rebase = |image, backing| {
        let rebase = ["rebase", "-u", "-F", "qcow2", "-b", backing, image];
        qemu_img(&images, &rebase);
    };
    rebase("top.qcow2", "middle.qcow2");
    rebase("middle.qcow2", "top.qcow2");
    let error = open(&dir, NamePolicy::default()).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Corrupt, "{error}");
    rebase("top.qcow2", "top.qcow2");
    let error = open(&dir, NamePolicy::default()).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Corrupt, "{error}");
}

#[test]
fn a_backing_file_without_a_format_is_not_probed() {
    let dir = directories();
    name_backing(&dir, "base.raw");
    let path = dir.path().join("images/top.qcow2");
    let mut image = std::fs::read(&path).unwrap();
    let extension = [0xe2, 0x79, 0x2a, 0xca];
    let at = image.windows(4).position(|w| w == extension).unwrap();
    // An extension that nobody knows is skipped.
    image[at] = 0x12;
    std::fs::write(&path, image).unwrap();
    let error = open(&dir, NamePolicy::default()).unwrap_err();
    assert!(
        error.message.contains("format of its backing file"),
        "{error}"
    );
}

/// Gives the image the external data file `data.raw`, then names another one, as an attacker would.
fn name_data_file(dir: &TempDir, name: &str) {
    let images = dir.path().join("images");
    let create = [
        "create",
        "-f",
        "qcow2",
        "-o",
        "data_file=data.raw",
        "top.qcow2",
        "64k",
    ];
    qemu_img(&images, &create);
    let path = images.join("top.qcow2");
    let mut bytes = std::fs::read(&path).unwrap();
    let known = b"DATA\0\0\0\x08data.raw";
    let at = bytes
        .windows(known.len())
        .position(|window| window == known);
    let at = at.unwrap();
    // The extension grows over the padding and the end mark behind it.
    assert!(name.len() <= 256);
    let mut extension = b"DATA".to_vec();
    extension.extend((name.len() as u32).to_be_bytes());
    extension.extend(name.as_bytes());
    extension.resize(extension.len().next_multiple_of(8) + 8, 0);
    bytes[at..at + extension.len()].copy_from_slice(&extension);
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn a_data_file_is_opened_under_the_same_policy() {
    let dir = directories();
    name_data_file(&dir, "data.raw");
    let allowed = open(&dir, NamePolicy::default());
    assert_eq!(allowed.unwrap(), 0);
    let absolute = dir.path().join("other/other.raw");
    let absolute = absolute.to_str().unwrap();
    let json = "json:{\"driver\":\"file\"}";
    for name in [absolute, "../other/other.raw", json] {
        name_data_file(&dir, name);
        let error = open(&dir, NamePolicy::default()).expect_err(name);
        assert_eq!(error.kind, ErrorKind::Forbidden, "{name}: {error}");
    }
    name_data_file(&dir, "top.qcow2");
    let error = open(&dir, NamePolicy::default()).expect_err("itself");
    assert_eq!(error.kind, ErrorKind::Corrupt, "{error}");
    name_data_file(&dir, absolute);
    let policy = NamePolicy {
        allowed_dirs: vec![dir.path().join("other")],
        ..NamePolicy::default()
    };
    let error = open(&dir, policy);
    assert_eq!(error.unwrap(), 0, "unallocated clusters read as zeroes");
}
