//! The mark, what becomes of it, and images whose entries lead nowhere. What sound images hold is the
//! conformance suite's.

use super::header::FEATURES_AT;
use super::*;
use crate::qcow2::tests::peers::{Files, has_qemu, on_host, qemu};
use crate::qcow2::tests::rig::{edge, leaf};
use block::{Buffer, Node, NodeOptions, WriteFlags};
use executor::Executor;
use executor::sim::{Config, Image, World};
use samples::qed::{CLUSTER, NEED_CHECK as DIRTY, PLACES};
use std::path::Path;
use std::sync::Arc;

const IMAGE: &str = "/simulated/image";
const DISK: usize = 64 << 10;

/// Another value of eight bytes of the image.
type Change = (usize, u64);

fn image(features: u64, changes: &[Change]) -> Vec<u8> {
    let mut image = samples::qed::image(&samples::disk(DISK, 3), features);
    for (offset, value) in changes {
        image[*offset..offset + 8].copy_from_slice(&value.to_le_bytes());
    }
    image
}

async fn open_at(path: &Path, read_only: bool) -> Result<Arc<Node>, Error> {
    let file = edge(&leaf(path), "file", ChildRole::Image);
    let header = read_header(&file).await?;
    let name = read_name(&file, &header).await?;
    let options = OpenOptions {
        purpose: Purpose::Serve,
        read_only,
    };
    let image = Qed::open((file, None), (header, name), options).await?;
    let options = NodeOptions {
        read_only,
        ..NodeOptions::default()
    };
    Ok(Node::new(options, Box::new(FormatNode::new(image))))
}

/// Works with an image; what the file is afterwards.
fn with_image(
    (image, read_only): (Vec<u8>, bool),
    work: impl AsyncFnOnce(Result<Arc<Node>, Error>, &World),
) -> Vec<u8> {
    let world = World::with_files(Config::default(), Image::from([(IMAGE.into(), image)]));
    Executor::simulated(&world).block_on(async {
        work(open_at(Path::new(IMAGE), read_only).await, &world).await;
    });
    content(&world)
}

fn content(world: &World) -> Vec<u8> {
    world.files()[Path::new(IMAGE)].clone()
}

fn long(image: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(*image[offset..].first_chunk().unwrap())
}

async fn read(node: &Node, offset: u64, length: usize) -> Result<Vec<u8>, Errno> {
    let buffer = Buffer::zeroed(length);
    node.read(offset, buffer.clone()).await?;
    Ok(buffer.to_heap().to_vec())
}

async fn write(node: &Node, offset: u64, bytes: &[u8]) -> Result<(), Errno> {
    let buffer = Buffer::zeroed(bytes.len());
    buffer.copy_from_slice(bytes);
    node.write(offset, buffer, WriteFlags::default()).await
}

/// The first L2 entry of a cluster in the file.
fn first_mapped(image: &[u8]) -> usize {
    let entries = (0..DISK / CLUSTER).map(|number| PLACES.l2 + 8 * number);
    let mut mapped = entries.filter(|at| long(image, *at) > 1);
    mapped.next().unwrap()
}

#[test]
fn the_mark_is_there_before_the_file_grows_and_goes_when_it_is_closed() {
    let empty = (0..DISK / CLUSTER).map(|number| (PLACES.l2 + 8 * number, 0));
    let sound = image(0, &empty.collect::<Vec<_>>());
    let length = sound.len();
    let after = with_image((sound, false), async |node, world| {
        let node = node.unwrap();
        write(&node, 4096, &[5; 512]).await.unwrap();
        let now = content(world);
        assert_eq!(long(&now, FEATURES_AT as usize), NEED_CHECK);
        assert!(now.len() > length + CLUSTER);
        node.driver().close().await.unwrap();
    });
    assert_eq!(long(&after, FEATURES_AT as usize), 0);
    assert_eq!(after.len(), length + CLUSTER);
    assert_eq!(after[length..length + 512], [5; 512]);
}

#[test]
fn a_dirty_image_is_repaired_when_it_is_opened_for_writing() {
    let at = first_mapped(&image(0, &[]));
    let beyond = (at, 1 << 40);
    let table_beyond = (PLACES.l1 + 8 * 9, 1 << 40);
    let mut dirty = image(DIRTY, &[beyond, table_beyond]);
    let length = dirty.len();
    dirty.resize(length + 3 * CLUSTER, 7);
    let guest = ((at - PLACES.l2) / 8 * CLUSTER) as u64;
    let read_only = with_image((dirty.clone(), true), async |node, _| {
        assert_eq!(read(&node.unwrap(), guest, 512).await, Err(Errno::EINVAL));
    });
    assert!(read_only == dirty, "who only reads has written");
    let repaired = with_image((dirty, false), async |node, _| {
        let zeroes = read(&node.unwrap(), guest, 512).await;
        assert_eq!(zeroes, Ok(vec![0; 512]));
    });
    let fields = [FEATURES_AT as usize, at, PLACES.l1 + 8 * 9];
    assert_eq!(fields.map(|field| long(&repaired, field)), [0; 3]);
    // The cluster that the entry had been about was the last one.
    assert_eq!(repaired.len(), length - CLUSTER);
}

#[test]
fn a_dirty_image_with_a_cluster_used_twice_is_not_written() {
    let sound = image(0, &[]);
    let at = first_mapped(&sound);
    let twice = (PLACES.l2 + 8 * 100, long(&sound, at));
    let dirty = image(DIRTY, &[twice]);
    let after = with_image((dirty.clone(), false), async |node, _| {
        let error = node.err().unwrap().message;
        assert_eq!(error, "Could not repair dirty image: errors remain");
    });
    assert!(after == dirty);
}

#[test]
fn entries_that_lead_nowhere_are_errors_and_harm_nothing() {
    let sound = image(0, &[]);
    let at = first_mapped(&sound);
    let guest = ((at - PLACES.l2) / 8 * CLUSTER) as u64;
    let wrong = [2, 4096 + 512, 1 << 30, u64::MAX, 0xffff_ffff_ffff_f000];
    for value in wrong {
        for field in [at, PLACES.l1] {
            // Neither unaligned, nor beyond the end, nor the header.
            let broken = image(0, &[(field, value)]);
            let after = with_image((broken.clone(), false), async |node, _| {
                let node = node.unwrap();
                assert_eq!(read(&node, guest, 512).await, Err(Errno::EINVAL));
                assert_eq!(write(&node, guest, &[1; 512]).await, Err(Errno::EINVAL));
            });
            assert!(after == broken, "{value:#x} at {field}");
        }
    }
}

#[test]
fn unknown_bits_that_clear_themselves_are_cleared_by_writers_alone() {
    let odd = image(0, &[(AUTOCLEAR_AT as usize, 6)]);
    let after = |read_only| {
        let after = with_image((odd.clone(), read_only), async |node, _| {
            drop(node.unwrap())
        });
        long(&after, AUTOCLEAR_AT as usize)
    };
    assert_eq!([true, false].map(after), [6, 0]);
}

#[test]
fn a_new_reference_to_a_backing_file_leaves_the_old_name_until_it_counts() {
    let base = |name: &str, format: Option<&str>| BackingReference {
        name: Some(name.to_owned()),
        format: format.map(str::to_owned),
    };
    let mut length = 0;
    let after = with_image((image(0, &[]), false), async |node, world| {
        let node = node.unwrap();
        length = content(world).len();
        let driver = node.driver();
        driver.refer_to_backing(base("first", None)).await.unwrap();
        let now = content(world);
        assert_eq!((long(&now, 16), &now[64..69]), (1, &b"first"[..]));
        driver
            .refer_to_backing(base("second", Some("raw")))
            .await
            .unwrap();
        let now = content(world);
        assert_eq!((long(&now, 16), &now[64..69]), (5, &b"first"[..]));
        let long_name = "n".repeat(1024);
        let refused = driver.refer_to_backing(base(&long_name, None)).await;
        assert_eq!(refused.unwrap_err().message, "Backing file name too long");
        let described = driver.describe();
        assert_eq!(described["backing-filename"], "second");
        assert_eq!(described["backing-filename-format"], "raw");
        driver
            .refer_to_backing(BackingReference::default())
            .await
            .unwrap();
    });
    assert_eq!((long(&after, 16), after.len()), (0, length));
}

#[test]
fn what_is_written_is_what_qemu_reads_and_no_cluster_is_lost() {
    if !has_qemu() {
        return;
    }
    let files = Files::new();
    for options in ["cluster_size=4k,table_size=2", "cluster_size=64k"] {
        let (path, text) = (files.path("image"), files.text("image"));
        let create = ["create", "-q", "-f", "qed", "-o", options, &text, "9M"];
        qemu("qemu-img", &create);
        let mut expected = vec![0; 9 << 20];
        on_host(async {
            let node = open_at(&path, false).await.unwrap();
            for number in 0..60_u64 {
                let offset = number * 7919 * 512 % (8 << 20);
                let bytes = samples::disk(512 * (1 + number as usize * 3), number);
                write(&node, offset, &bytes).await.unwrap();
                let at = offset as usize;
                expected[at..at + bytes.len()].copy_from_slice(&bytes);
            }
            node.driver().close().await.unwrap();
        });
        qemu("qemu-img", &["check", "-q", "-f", "qed", &text]);
        let raw = files.text("raw");
        qemu(
            "qemu-img",
            &["convert", "-f", "qed", "-O", "raw", &text, &raw],
        );
        assert!(std::fs::read(&raw).unwrap() == expected, "{options}");
    }
}
