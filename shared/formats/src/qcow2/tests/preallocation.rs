//! Preallocation over a backing: what `qemu-img` makes of it, and what is read then.

use super::peers::{Files, has_qemu, on_host, qemu, work_here};
use super::rig::{self, Disk, Setup};
use crate::qcow2::CreateOptions;
use block::{Preallocation, Resize};

const SIZE: u64 = 3 << 20;
const MODES: [(&str, Preallocation); 3] = [
    ("metadata", Preallocation::Metadata),
    ("falloc", Preallocation::Falloc),
    ("full", Preallocation::Full),
];

/// A base that is longer than the images over it.
fn with_base() -> (Files, Vec<u8>) {
    let files = Files::new();
    let base: Vec<u8> = (0..5 << 20).map(|at: u32| (at >> 9) as u8 | 1).collect();
    std::fs::write(files.path("base.raw"), &base).unwrap();
    (files, base)
}

fn over_base(files: &Files) -> Setup {
    Setup {
        backing: Some(rig::leaf(&files.path("base.raw"))),
        ..Setup::default()
    }
}

fn options(has_backing: bool, preallocation: Preallocation) -> CreateOptions {
    CreateOptions {
        extended_l2: true,
        backing_file: has_backing.then(|| "base.raw".into()),
        backing_format: has_backing.then(|| "raw".into()),
        preallocation,
        ..CreateOptions::new(SIZE)
    }
}

#[test]
fn reserved_clusters_are_those_of_qemu_img_and_hide_nothing() {
    if !has_qemu() {
        return;
    }
    for (seed, has_backing) in (0..).zip([true, false]) {
        for (mode, preallocation) in MODES {
            println!("{mode}, backing: {has_backing}");
            let (files, base) = with_base();
            let ours = files.path("ours.qcow2");
            on_host(rig::make(&ours, &options(has_backing, preallocation)));
            let made = format!("extended_l2=on,preallocation={mode}");
            let (theirs, size) = (files.text("theirs.qcow2"), SIZE.to_string());
            let create = ["create", "-q", "-f", "qcow2", "-o", &made, &theirs, &size];
            let backing: &[&str] = match has_backing {
                true => &["-b", "base.raw", "-F", "raw"],
                false => &[],
            };
            qemu("qemu-img", &[&create[..], backing].concat());
            let map = |name| qemu("qemu-img", &["map", "--output=json", &files.text(name)]);
            assert_eq!(map("ours.qcow2"), map("theirs.qcow2"));
            // Elsewhere QEMU moves the refcount table.
            if preallocation == Preallocation::Metadata {
                let bytes = |name| std::fs::read(files.path(name)).unwrap();
                assert!(bytes("ours.qcow2") == bytes("theirs.qcow2"));
            }
            let content = files.content("ours.qcow2");
            match has_backing {
                true => assert!(content == base[..SIZE as usize]),
                false => assert!(content.iter().all(|byte| *byte == 0)),
            }
            let setup = match has_backing {
                true => over_base(&files),
                false => Setup::default(),
            };
            let content = on_host(work_here(&ours, setup, seed));
            files.check("ours.qcow2");
            assert!(content == files.content("ours.qcow2"));
        }
    }
}

#[test]
fn only_extended_entries_let_a_backing_show_through_what_is_preallocated() {
    for (_, preallocation) in MODES {
        let options = CreateOptions {
            extended_l2: false,
            ..options(true, preallocation)
        };
        let files = Files::new();
        let refused = on_host(async {
            let file = rig::image_edge(&files.path("a.qcow2"));
            crate::qcow2::create(file, &options).await
        });
        assert_eq!(
            refused.unwrap_err().message,
            "Backing file and preallocation can only be used at the same time if extended_l2 is on"
        );
    }
}

#[test]
fn a_disk_that_grows_over_its_backing_hides_it_whatever_is_preallocated() {
    if !has_qemu() {
        return;
    }
    for extended_l2 in [false, true] {
        for (mode, preallocation) in MODES {
            println!("{mode}, extended: {extended_l2}");
            let (files, base) = with_base();
            let path = files.path("a.qcow2");
            let options = CreateOptions {
                extended_l2,
                ..options(true, Preallocation::Off)
            };
            let length = 6 << 20;
            on_host(async {
                rig::make(&path, &options).await;
                let disk = Disk::open(&path, over_base(&files)).await.unwrap();
                let resize = Resize {
                    length,
                    preallocation,
                };
                disk.node.resize(resize).await.unwrap();
                disk.close().await.unwrap();
            });
            files.check("a.qcow2");
            let mut right = base[..SIZE as usize].to_vec();
            right.resize(length as usize, 0);
            assert!(files.content("a.qcow2") == right);
            let bytes = std::fs::metadata(&path).unwrap().len();
            assert!(bytes >= length - SIZE, "{bytes} bytes are no preallocation");
        }
    }
}
