//! Images whose structures contradict each other: they are not written, and tell why; what can be read of
//! them is read, and reading changes nothing.

use crate::rig::{filled, graph, open_root, options, read, refusal, run};
use block::{Permissions, Root, WriteFlags};
use harness::peer;
use samples::parallels::{Form, Shape};
use serde_json::{Value, json};
use std::path::Path;
use tempfile::TempDir;

const DISK: usize = 64 << 10;
/// Where the block map of a sample of vpc begins, and how long its footer is.
const VPC_MAP: usize = 1536;
const VPC_FOOTER: usize = 512;
/// Where the block map of an image of Parallels begins, and its mark.
const PARALLELS_MAP: usize = 64;
const PARALLELS_IN_USE: usize = 44;

fn definition(driver: &str, path: &Path, read_only: bool) -> Value {
    json!({"driver": driver, "node-name": "n", "read-only": read_only,
        "file": {"driver": "file", "filename": path}})
}

/// Opened for writing, the image is refused with `message`; opened for reading, it gives `readable`, when
/// there is any. Either way the file stays as it was.
fn is_only_read(driver: &str, image: &[u8], (message, readable): (&str, Option<&[u8]>)) {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("image");
    std::fs::write(&path, image).unwrap();
    run(async {
        assert_eq!(
            refusal(&graph(), definition(driver, &path, false)).await,
            message
        );
        let Some(expected) = readable else { return };
        let graph = graph();
        let node = graph.add(options(definition(driver, &path, true))).await;
        let root = Root::new("", &node.unwrap(), Permissions::READ, Permissions::ALL).unwrap();
        let content = read(&root.attach(), 0, expected.len()).await.unwrap();
        assert!(content == expected, "{driver}: read otherwise");
    });
    assert!(
        std::fs::read(&path).unwrap() == image,
        "{driver}: the file has changed"
    );
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

#[test]
fn a_vpc_footer_that_disagrees_with_its_copy() {
    let disk = samples::disk(DISK, 5);
    let mut image = samples::vpc::image(4096, &disk);
    let footer = image.len() - VPC_FOOTER;
    // When it was made, and the checksum: the complement of a sum.
    put(&mut image, footer + 24, &[0, 0, 0, 1]);
    let sum = u32::from_be_bytes(*image[footer + 64..].first_chunk().unwrap());
    put(&mut image, footer + 64, &(sum - 1).to_be_bytes());
    let message = "vpc: the footer and its copy disagree; cannot be opened read/write";
    is_only_read("vpc", &image, (message, Some(&disk)));
}

#[test]
fn a_vpc_footer_that_a_power_cut_tore_is_there_again_with_the_next_block() {
    let disk = samples::disk(DISK, 5);
    let mut image = samples::vpc::image(4096, &disk);
    let footer = image.len() - VPC_FOOTER;
    image[footer..].fill(0);
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("image");
    std::fs::write(&path, &image).unwrap();
    let mut blocks = disk.chunks(4096);
    let absent = blocks.position(|block| block.iter().all(|byte| *byte == 0));
    let absent = 4096 * absent.expect("the sample has blocks of zeroes");
    run(async {
        let graph = graph();
        let node = graph.add(options(definition("vpc", &path, false))).await;
        let root = open_root(&node.unwrap());
        assert!(read(&root.attach(), 0, DISK).await.unwrap() == disk);
        let flags = WriteFlags::default();
        let write = root
            .attach()
            .write(absent as u64, filled(&[7; 512]), flags)
            .await;
        write.unwrap();
        drop(root);
        graph.close_all().await.unwrap();
    });
    let after = std::fs::read(&path).unwrap();
    assert!(after[after.len() - VPC_FOOTER..] == image[..VPC_FOOTER]);
    let raw = directory.path().join("raw");
    let convert = ["convert", "-f", "vpc", "-O", "raw", text(&path), text(&raw)];
    peer::run("qemu-img", &convert).unwrap();
    let mut expected = disk;
    expected[absent..absent + 512].fill(7);
    assert!(std::fs::read(&raw).unwrap() == expected);
}

#[test]
fn vpc_blocks_in_the_place_of_the_headers() {
    let disk = samples::disk(DISK, 5);
    for (block, sector) in [(0_usize, 0_u32), (3, 1), (15, 3)] {
        let mut image = samples::vpc::image(4096, &disk);
        put(&mut image, VPC_MAP + 4 * block, &sector.to_be_bytes());
        let message = format!("vpc: block {block} overlaps the image's headers");
        is_only_read("vpc", &image, (&message, None));
    }
}

#[test]
fn vpc_blocks_behind_the_end() {
    let mut image = samples::vpc::image(4096, &samples::disk(DISK, 5));
    put(&mut image, VPC_MAP, &0x00ff_ffff_u32.to_be_bytes());
    let message = "block-vpc: free_data_block_offset points after the end of file. The image has been truncated.";
    is_only_read("vpc", &image, (message, None));
}

fn parallels(form: Form, block_sectors: usize) -> Vec<u8> {
    let shape = Shape {
        form,
        block_sectors,
    };
    samples::parallels::image(shape, &samples::disk(DISK, 5))
}

#[test]
fn parallels_blocks_in_the_place_of_the_map() {
    // The map ends in the second sector.
    let mut image = parallels(Form::Sectors, 1);
    put(&mut image, PARALLELS_MAP + 4 * 2, &1_u32.to_le_bytes());
    let message = "parallels: cluster 2 overlaps the block map";
    is_only_read("parallels", &image, (message, None));
}

#[test]
fn a_parallels_image_that_somebody_else_left_open() {
    let disk = samples::disk(DISK, 5);
    for form in [Form::Sectors, Form::Blocks, Form::Extended] {
        let mut image = parallels(form, 8);
        put(&mut image, PARALLELS_IN_USE, &0x746f_6e59_u32.to_le_bytes());
        let message = "parallels: Image was not closed correctly; cannot be opened read/write";
        let readable = (form != Form::Extended).then_some(&disk[..]);
        is_only_read("parallels", &image, (message, readable));
    }
}
