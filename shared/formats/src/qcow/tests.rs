//! Entries that lead nowhere, compressed clusters that are none, and images both ways with QEMU. What
//! sound images hold is the conformance suite's.

use super::*;
use crate::qcow2::tests::peers::{Files, has_qemu, on_host, qemu};
use crate::qcow2::tests::rig::{edge, leaf};
use block::{Node, NodeOptions, WriteFlags};
use executor::Executor;
use executor::sim::{Config, Image, World};
use samples::qcow::{CLUSTER, PLACES};
use std::path::Path;
use std::sync::Arc;

const IMAGE: &str = "/simulated/image";
const DISK: usize = 64 << 10;

/// Another value of eight bytes of the image.
type Change = (usize, u64);

fn image(changes: &[Change]) -> Vec<u8> {
    let mut image = samples::qcow::image(&samples::disk(DISK, 3));
    for (offset, value) in changes {
        image[*offset..offset + 8].copy_from_slice(&value.to_be_bytes());
    }
    image
}

async fn open_at(path: &Path, cipher: Option<Sectors>) -> Arc<Node> {
    let file = edge(&leaf(path), "file", ChildRole::Image);
    let header = read_header(&file).await.unwrap();
    let parts = Parts {
        backing_name: read_name(&file, &header).await.unwrap(),
        header,
        cipher,
    };
    let image = Qcow::open((file, None), parts, Access::Write)
        .await
        .unwrap();
    Node::new(NodeOptions::default(), Box::new(FormatNode::new(image)))
}

/// Works with an image; what the file is afterwards.
fn with_image(image: Vec<u8>, work: impl AsyncFnOnce(&Node)) -> Vec<u8> {
    let world = World::with_files(Config::default(), Image::from([(IMAGE.into(), image)]));
    Executor::simulated(&world).block_on(async {
        work(&*open_at(Path::new(IMAGE), None).await).await;
    });
    world.files()[Path::new(IMAGE)].clone()
}

async fn read(node: &Node, offset: u64, length: usize) -> Result<Vec<u8>, Errno> {
    let buffer = Buffer::zeroed(length);
    node.read(offset, buffer.clone()).await?;
    Ok(buffer.to_heap().to_vec())
}

async fn write(node: &Node, offset: u64, bytes: &[u8], flags: WriteFlags) -> Result<(), Errno> {
    let buffer = Buffer::zeroed(bytes.len());
    buffer.copy_from_slice(bytes);
    node.write(offset, buffer, flags).await
}

const COMPRESSED_WRITE: WriteFlags = WriteFlags {
    compressed: true,
    ..PLAIN_WRITE
};
const PLAIN_WRITE: WriteFlags = WriteFlags {
    fua: false,
    compressed: false,
};

#[test]
fn entries_that_lead_nowhere_are_errors_and_harm_nothing() {
    for value in [1, 47, 1 << 40, COMPRESSED - 1] {
        for field in [PLACES.l1, PLACES.l2] {
            let broken = image(&[(field, value)]);
            let after = with_image(broken.clone(), async |node| {
                assert_eq!(read(node, 0, 512).await, Err(Errno::EIO));
                let written = write(node, 0, &[1; 512], PLAIN_WRITE).await;
                assert_eq!(written, Err(Errno::EIO));
            });
            assert!(after == broken, "{value:#x} at {field}");
        }
    }
}

#[test]
fn compressed_clusters_that_are_none_are_errors_and_can_be_replaced() {
    let length = |bytes: u64| COMPRESSED | bytes << (63 - 12);
    // No bytes, the header, beyond the end, at the end of all offsets.
    for entry in [length(0) | 48, length(48), length(9) | 1 << 40, u64::MAX] {
        with_image(image(&[(PLACES.l2, entry)]), async |node| {
            assert_eq!(read(node, 0, 512).await, Err(Errno::EIO), "{entry:#x}");
            // A part cannot be kept of what cannot be read.
            let part = write(node, 512, &[1; 512], PLAIN_WRITE).await;
            assert_eq!(part, Err(Errno::EIO));
            write(node, 0, &[7; CLUSTER], PLAIN_WRITE).await.unwrap();
            assert_eq!(read(node, 512, 512).await, Ok(vec![7; 512]));
        });
    }
}

#[test]
fn an_image_that_is_made_empty_shows_nothing_and_is_written_anew() {
    let (mut length, sound) = (0, image(&[]));
    let before = sound.len();
    let after = with_image(sound, async |node| {
        read(node, 0, DISK).await.unwrap();
        node.driver().make_empty().await.unwrap();
        assert_eq!(read(node, 0, DISK).await, Ok(vec![0; DISK]));
        let packed = write(node, 0, &[3; CLUSTER], COMPRESSED_WRITE).await;
        packed.unwrap();
        write(node, 8192, &[5; 512], PLAIN_WRITE).await.unwrap();
        assert_eq!(read(node, 0, CLUSTER).await, Ok(vec![3; CLUSTER]));
        assert_eq!(read(node, 8192, 512).await, Ok(vec![5; 512]));
        length = PLACES.l1 + 8;
        node.driver().close().await.unwrap();
    });
    assert!(after.len() < before && after.len() > length);
}

#[test]
fn what_is_written_plain_compressed_and_encrypted_is_what_qemu_reads() {
    if !has_qemu() {
        return;
    }
    let files = Files::new();
    let (path, text, raw) = (files.path("image"), files.text("image"), files.text("raw"));
    let secret = "secret,id=s,data=geheim";
    let encrypted = "encrypt.format=aes,encrypt.key-secret=s";
    for options in ["", encrypted] {
        let is_encrypted = !options.is_empty();
        let mut create = vec!["create", "-q", "-f", "qcow", "--object", secret];
        if is_encrypted {
            create.extend(["-o", options]);
        }
        create.extend([text.as_str(), "9M"]);
        qemu("qemu-img", &create);
        let mut expected = vec![0; 9 << 20];
        on_host(async {
            let cipher = is_encrypted.then(|| legacy_aes(b"geheim"));
            let node = open_at(&path, cipher).await;
            for number in 0..90_u64 {
                let packs = number % 3 == 0 && !is_encrypted;
                let (unit, flags) = match packs {
                    true => (CLUSTER as u64, COMPRESSED_WRITE),
                    false => (512, PLAIN_WRITE),
                };
                let offset = number * 7919 * unit % (2 << 20);
                let length = unit as usize * (1 + number as usize % 5);
                let bytes = samples::disk(length, number);
                write(&node, offset, &bytes, flags).await.unwrap();
                let at = offset as usize;
                expected[at..at + length].copy_from_slice(&bytes);
            }
            assert!(read(&node, 0, expected.len()).await.as_ref() == Ok(&expected));
            node.driver().close().await.unwrap();
        });
        let source = format!("driver=qcow,encrypt.key-secret=s,file.filename={text}");
        let plain = format!("driver=qcow,file.filename={text}");
        let source = if is_encrypted { source } else { plain };
        let convert = [
            "convert",
            "--object",
            secret,
            "--image-opts",
            &source,
            "-O",
            "raw",
            &raw,
        ];
        qemu("qemu-img", &convert);
        assert!(std::fs::read(&raw).unwrap() == expected, "{options}");
    }
}
