//! Persistent bitmaps: what a crash may leave of them, and QEMU's tools as oracle, both ways.

use super::checker::Checker;
use super::peers::{Files, has_qemu, on_host, open, qemu, work};
use super::rig::{self, Disk, Setup};
use super::workload::Check;
use crate::qcow2::CreateOptions;
use block::bitmap::ops::{self, NewBitmap};
use block::{ByteRange, Resize};

/// Adds a bitmap that is stored.
pub(super) fn add(disk: &Disk, name: &str, granularity: u32) {
    let new = NewBitmap {
        name: name.into(),
        granularity: Some(granularity),
        persistent: true,
        disabled: false,
    };
    ops::add(&disk.node, new).unwrap();
}

/// Removes one stored bitmap and adds another one.
pub(super) async fn replace(disk: Disk) {
    // A failing disk may refuse.
    if ops::remove(&disk.node, "b1").await.is_ok() {
        add(&disk, "new", 512);
    }
}

/// Checks the bitmaps of an image whose disk was empty when "b0" was made, as it is after a crash
/// or a clean end: everything that was written is dirty, unless the bitmap says that it is in use.
pub(super) fn check(image: &Checker<'_>, content: &[u8], state: State) -> Check {
    let bitmaps = image.bitmaps();
    let Some(bitmap) = bitmaps.iter().find(|bitmap| bitmap.name == "b0") else {
        return Err("the bitmap is gone".into());
    };
    if bitmap.in_use {
        return match state {
            State::Closed => Err("the bitmap is in use".into()),
            State::Crashed => Ok(()),
        };
    }
    for (number, sector) in content.chunks(512).enumerate() {
        let granule = number as u64 * 512 / bitmap.granularity;
        if sector.iter().any(|byte| *byte != 0) && !bitmap.is_dirty(granule) {
            return Err(format!("sector {number:#x} was written and is not dirty"));
        }
    }
    Ok(())
}

/// How the image came to be as it is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Closed,
    Crashed,
}

fn info(files: &Files, name: &str) -> serde_json::Value {
    let text = qemu("qemu-img", &["info", "--output=json", &files.text(name)]);
    let info: serde_json::Value = serde_json::from_str(&text).unwrap();
    info["format-specific"]["data"]["bitmaps"].clone()
}

/// The dirty areas of a bitmap as QEMU exports them, found through a merge into one that is read.
fn areas(disk: &Disk, name: &str) -> Vec<(u64, u64)> {
    let bitmap = ops::find(&disk.node, name).unwrap();
    bitmap
        .dirty_areas()
        .map(|area| (area.offset, area.length))
        .collect()
}

#[test]
fn bitmaps_stored_here_are_qemus_and_the_other_way_round() {
    if !has_qemu() {
        return;
    }
    for (cluster_size, granularity) in [(512, 512), (4096, 65536), (65536, 512)] {
        println!("clusters of {cluster_size}, granules of {granularity}");
        let files = Files::new();
        let (path, image) = (files.path("a.qcow2"), files.text("a.qcow2"));
        let options = CreateOptions {
            cluster_size,
            ..CreateOptions::new(8 << 20)
        };
        on_host(rig::make(&path, &options));
        let marked = on_host(async {
            let disk = open(&path).await;
            add(&disk, "ours", granularity);
            add(&disk, "disabled", 4096);
            ops::disable(&disk.node, "disabled").unwrap();
            disk.write(1 << 20, &[7; 70_000]).await.unwrap();
            let marked = areas(&disk, "ours");
            disk.close().await.unwrap();
            marked
        });
        files.check("a.qcow2");
        let expected = serde_json::json!([
            {"flags": ["auto"], "name": "ours", "granularity": granularity},
            {"flags": [], "name": "disabled", "granularity": 4096},
        ]);
        assert_eq!(info(&files, "a.qcow2"), expected);
        // QEMU loads, marks more, adds and stores.
        let grain = granularity.to_string();
        qemu(
            "qemu-img",
            &["bitmap", "--add", "-g", &grain, &image, "theirs"],
        );
        qemu("qemu-img", &["bitmap", "--merge", "ours", &image, "theirs"]);
        qemu("qemu-io", &["-f", "qcow2", "-c", "write 4M 1k", &image]);
        files.check("a.qcow2");
        on_host(async {
            let disk = open(&path).await;
            let mut more = marked.clone();
            let unit = u64::from(granularity);
            more.push((4 << 20, unit.max(1024)));
            assert_eq!(areas(&disk, "theirs"), more, "merged, then written");
            assert_eq!(areas(&disk, "ours"), more);
            assert_eq!(areas(&disk, "disabled"), []);
            ops::clear(&disk.node, "ours").unwrap();
            ops::remove(&disk.node, "disabled").await.unwrap();
            let resize = Resize::to(9 << 20);
            disk.node.resize(resize).await.unwrap();
            disk.close().await.unwrap();
        });
        files.check("a.qcow2");
        let names: Vec<_> = info(&files, "a.qcow2").as_array().unwrap().clone();
        assert_eq!(names.len(), 2);
        qemu("qemu-img", &["bitmap", "--remove", &image, "ours"]);
        qemu("qemu-img", &["bitmap", "--remove", &image, "theirs"]);
        files.check("a.qcow2");
        work(&path, Setup::default(), 3);
        files.check("a.qcow2");
        assert_eq!(info(&files, "a.qcow2"), serde_json::Value::Null);
    }
}

#[test]
fn the_last_bitmap_removed_leaves_a_header_without_the_extension() {
    if !has_qemu() {
        return;
    }
    let files = Files::new();
    let (path, image) = (files.path("a.qcow2"), files.text("a.qcow2"));
    let create = [
        "create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", &image, "1M",
    ];
    std::fs::write(files.path("base.raw"), vec![0x55; 1 << 20]).unwrap();
    qemu("qemu-img", &create);
    for _ in 0..2 {
        on_host(async {
            let disk = open(&path).await;
            add(&disk, "b", 512);
            disk.close().await.unwrap();
            let disk = open(&path).await;
            ops::remove(&disk.node, "b").await.unwrap();
            disk.close().await.unwrap();
        });
        files.check("a.qcow2");
        assert_eq!(info(&files, "a.qcow2"), serde_json::Value::Null);
        assert!(files.content("a.qcow2").iter().all(|byte| *byte == 0x55));
    }
}

#[test]
fn a_bitmap_found_in_use_can_only_be_removed() {
    let files = Files::new();
    let path = files.path("a.qcow2");
    on_host(async {
        rig::make(&path, &CreateOptions::new(1 << 20)).await;
        let disk = open(&path).await;
        add(&disk, "b", 512);
        disk.close().await.unwrap();
        let killed = open(&path).await;
        killed.write(0, &[1; 512]).await.unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert!(Checker::new(&bytes).bitmaps()[0].in_use);
        let disk = open(&path).await;
        let bitmap = ops::find(&disk.node, "b").unwrap();
        assert!(bitmap.is_inconsistent() && !bitmap.is_recording());
        let refused = "Bitmap 'b' is inconsistent and cannot be used";
        for result in [
            ops::clear(&disk.node, "b"),
            ops::enable(&disk.node, "b"),
            ops::merge(&bitmap, &[]),
        ] {
            assert_eq!(result.unwrap_err().message, refused);
        }
        disk.close().await.unwrap();
        let disk = open(&path).await;
        assert!(ops::find(&disk.node, "b").unwrap().is_inconsistent());
        ops::remove(&disk.node, "b").await.unwrap();
        disk.close().await.unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert!(Checker::new(&bytes).bitmaps().is_empty());
        drop(killed);
    });
}

#[test]
fn every_change_is_marked_before_it_completes() {
    let files = Files::new();
    let path = files.path("a.qcow2");
    on_host(async {
        rig::make(&path, &CreateOptions::new(1 << 20)).await;
        let disk = open(&path).await;
        add(&disk, "b", 512);
        let bitmap = ops::find(&disk.node, "b").unwrap();
        disk.write(0, &[1; 512]).await.unwrap();
        let zeroes = ByteRange::new(2048, 512);
        let flags = block::ZeroFlags::default();
        disk.root.write_zeroes(zeroes, flags).await.unwrap();
        disk.root
            .discard(ByteRange::new(65536, 65536))
            .await
            .unwrap();
        let expected = [(0, 512), (2048, 512), (65536, 65536)];
        assert_eq!(areas(&disk, "b"), expected);
        bitmap.disable();
        disk.write(512, &[1; 512]).await.unwrap();
        assert_eq!(areas(&disk, "b"), expected);
        disk.close().await.unwrap();
    });
}
