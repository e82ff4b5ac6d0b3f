//! Raw images in files: every request, against a model; alignment, growth and resizing.

use crate::rig::{filled, graph, open_root, options, read, run};
use block::{Buffer, ByteRange, Errno, Preallocation, Resize, RootHandle, WriteFlags, ZeroFlags};
use rand::rngs::SmallRng;
use rand::{Rng, RngCore, SeedableRng};
use serde_json::json;
use std::path::Path;
use tempfile::TempDir;

const LENGTH: u64 = 1 << 20;

fn image(dir: &TempDir, length: u64) -> String {
    let path = dir.path().join("image.raw");
    std::fs::File::create(&path)
        .unwrap()
        .set_len(length)
        .unwrap();
    path.to_str().unwrap().to_owned()
}

/// A temporary directory on a disk file system, which has `O_DIRECT`.
fn disk_dir() -> TempDir {
    TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// Issues a random request and applies it to the model.
async fn step(root: &RootHandle, model: &mut [u8], rng: &mut SmallRng) {
    let grain = [1u64, 512, 4096][rng.random_range(0..3)];
    let max = (128 << 10) / grain;
    let length = rng.random_range(1..=max) * grain;
    let offset = rng.random_range(0..=(model.len() as u64 - length) / grain) * grain;
    let span = offset as usize..(offset + length) as usize;
    let range = ByteRange::new(offset, length);
    match rng.random_range(0..8) {
        0..=3 => {
            let mut data = vec![0; length as usize];
            if rng.random_bool(0.8) {
                rng.fill_bytes(&mut data);
            }
            model[span].copy_from_slice(&data);
            let flags = WriteFlags {
                fua: rng.random_bool(0.2),
                ..WriteFlags::default()
            };
            // A buffer whose memory is not aligned either.
            let shift = rng.random_range(0..3);
            let memory = Buffer::zeroed(data.len() + shift);
            let buffer = memory.slice(shift..memory.len());
            buffer.copy_from_slice(&data);
            root.write(offset, buffer, flags).await.unwrap();
        }
        4 => {
            model[span].fill(0);
            let flags = ZeroFlags {
                may_unmap: rng.random(),
                ..ZeroFlags::default()
            };
            root.write_zeroes(range, flags).await.unwrap();
        }
        5 => root.flush().await.unwrap(),
        _ => {
            let got = read(root, offset, length as usize).await.unwrap();
            assert!(got == model[span], "read at {offset} of {length} bytes");
        }
    }
}

fn compare_with_model(extra: serde_json::Value, dir: &Path, seed: u64) {
    println!("seed {seed}");
    let mut rng = SmallRng::seed_from_u64(seed);
    let path = dir.join("image.raw");
    std::fs::File::create(&path)
        .unwrap()
        .set_len(LENGTH)
        .unwrap();
    let mut definition = options(
        json!({"driver": "raw", "node-name": "r", "discard": "unmap",
        "file": {"driver": "file", "filename": path.to_str().unwrap()}}),
    );
    definition.extend(options(extra));
    let mut model = vec![0u8; LENGTH as usize];
    run(async {
        let graph = graph();
        let node = graph.add(definition).await.unwrap();
        let handle = open_root(&node).attach();
        for _ in 0..400 {
            step(&handle, &mut model, &mut rng).await;
        }
        drop((handle, node));
        graph.remove("r").await.unwrap();
    });
    assert!(std::fs::read(&path).unwrap() == model);
}

#[test]
fn buffered_requests_of_any_alignment_match_the_model() {
    let dir = TempDir::new().unwrap();
    for seed in 0..4 {
        compare_with_model(json!({}), dir.path(), seed);
        compare_with_model(json!({"detect-zeroes": "unmap"}), dir.path(), seed);
    }
}

#[test]
fn direct_requests_of_any_alignment_match_the_model() {
    let dir = disk_dir();
    for seed in 0..4 {
        compare_with_model(json!({"cache": {"direct": true}}), dir.path(), seed);
        let detect = json!({"cache": {"direct": true}, "detect-zeroes": "on"});
        compare_with_model(detect, dir.path(), seed);
    }
}

#[test]
fn unaligned_direct_writes_side_by_side_lose_nothing() {
    let dir = disk_dir();
    let path = image(&dir, 64 << 10);
    run(async {
        let graph = graph();
        let node = graph
            .add(options(
                json!({"driver": "file", "node-name": "f", "filename": path,
                "cache": {"direct": true}}),
            ))
            .await
            .unwrap();
        let root = open_root(&node);
        let tasks: Vec<_> = (0..64u64)
            .map(|part| {
                let root = root.attach();
                executor::spawn(async move {
                    for round in 0..4u8 {
                        let data = filled(&[part as u8 ^ round; 100]);
                        root.write(part * 100, data, WriteFlags::default())
                            .await
                            .unwrap();
                    }
                })
            })
            .collect();
        for task in tasks {
            task.await;
        }
        let got = read(&root.attach(), 0, 6400).await.unwrap();
        for part in 0..64u8 {
            let at = usize::from(part) * 100;
            assert!(got[at..at + 100].iter().all(|b| *b == part ^ 3), "{part}");
        }
    });
}

#[test]
fn a_window_shows_its_part_of_the_file_only() {
    let dir = TempDir::new().unwrap();
    let path = image(&dir, 1 << 20);
    run(async {
        let graph = graph();
        let node = graph
            .add(options(
                json!({"driver": "raw", "node-name": "w", "offset": 4096, "size": 8192,
                "file": {"driver": "file", "filename": path}}),
            ))
            .await
            .unwrap();
        let root = open_root(&node).attach();
        assert_eq!(root.length(), 8192);
        root.write(0, filled(&[1; 8192]), WriteFlags::default())
            .await
            .unwrap();
        let beyond = root.write(8192, filled(&[1; 512]), WriteFlags::default());
        assert_eq!(beyond.await, Err(Errno::EINVAL));
        assert_eq!(
            root.read(u64::MAX - 10, Buffer::zeroed(512)).await,
            Err(Errno::EINVAL)
        );
        let resize = Resize::to(4096);
        assert_eq!(
            node.resize(resize).await.unwrap_err().message,
            "Cannot resize fixed-size raw disks"
        );
    });
    let bytes = std::fs::read(dir.path().join("image.raw")).unwrap();
    assert!(bytes[4096..12288].iter().all(|b| *b == 1));
    assert!(bytes[..4096].iter().chain(&bytes[12288..]).all(|b| *b == 0));
}

#[test]
fn a_new_length_reaches_every_user() {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};
    let dir = TempDir::new().unwrap();
    let path = image(&dir, 1 << 20);
    run(async {
        let graph = graph();
        let file = graph
            .add(options(
                json!({"driver": "file", "node-name": "f", "filename": path}),
            ))
            .await
            .unwrap();
        let raw = graph
            .add(options(
                json!({"driver": "raw", "node-name": "r", "file": "f"}),
            ))
            .await
            .unwrap();
        let root = open_root(&raw);
        let heard = Arc::new(AtomicU64::new(0));
        let hearer = Arc::clone(&heard);
        root.on_resize(Box::new(move |length| {
            hearer.store(length, Ordering::Relaxed)
        }));
        for (node, length, preallocation) in [
            (&raw, 2 << 20, Preallocation::Off),
            (&file, 3 << 20, Preallocation::Falloc),
            (&raw, 4 << 20, Preallocation::Full),
            (&raw, 1 << 20, Preallocation::Off),
        ] {
            let resize = Resize {
                length,
                preallocation,
            };
            node.resize(resize).await.unwrap();
            assert_eq!(heard.load(Ordering::Relaxed), length);
            assert_eq!(root.attach().length(), length);
            assert_eq!(std::fs::metadata(&path).unwrap().len(), length);
        }
    });
}

#[test]
fn a_partial_last_sector_reads_as_zeroes_and_can_be_written() {
    let dir = TempDir::new().unwrap();
    let path = image(&dir, 1000);
    run(async {
        let graph = graph();
        let node = graph
            .add(options(
                json!({"driver": "file", "node-name": "f", "filename": path}),
            ))
            .await
            .unwrap();
        let root = open_root(&node).attach();
        assert_eq!(root.length(), 1024);
        assert!(read(&root, 512, 512).await.unwrap().iter().all(|b| *b == 0));
        root.write(512, filled(&[7; 512]), WriteFlags::default())
            .await
            .unwrap();
        assert_eq!(read(&root, 512, 512).await.unwrap(), [7; 512]);
    });
    assert_eq!(std::fs::metadata(path).unwrap().len(), 1024);
}

#[test]
fn read_only_nodes_and_roots_refuse_writes() {
    let dir = TempDir::new().unwrap();
    let path = image(&dir, 4096);
    run(async {
        let graph = graph();
        let node = graph
            .add(options(
                json!({"driver": "file", "node-name": "f", "filename": path,
                "read-only": true}),
            ))
            .await
            .unwrap();
        let reader = block::Permissions::READ;
        let root = block::Root::new("", &node, reader, block::Permissions::ALL).unwrap();
        let root = root.attach();
        let write = root.write(0, filled(&[1; 512]), WriteFlags::default());
        assert_eq!(write.await, Err(Errno::EPERM));
        let range = ByteRange::new(0, 512);
        assert_eq!(root.discard(range).await, Err(Errno::EPERM));
        let zero = root.write_zeroes(range, ZeroFlags::default());
        assert_eq!(zero.await, Err(Errno::EPERM));
        let direct = node.write(0, filled(&[1; 512]), WriteFlags::default());
        assert_eq!(direct.await, Err(Errno::EPERM));
        root.flush().await.unwrap();
    });
}

#[test]
fn holes_and_data_are_told_apart() {
    let dir = TempDir::new().unwrap();
    let path = image(&dir, 1 << 20);
    run(async {
        let graph = graph();
        let node = graph
            .add(options(
                json!({"driver": "raw", "node-name": "r", "discard": "unmap",
                "file": {"driver": "file", "filename": path}}),
            ))
            .await
            .unwrap();
        let root = open_root(&node).attach();
        let write = root.write(64 << 10, filled(&[1; 64 << 10]), WriteFlags::default());
        write.await.unwrap();
        let status = async |offset: u64| {
            let range = ByteRange::new(offset, (1 << 20) - offset);
            let extent = node.block_status(range).await.unwrap();
            (extent.length, extent.status.data, extent.status.zero)
        };
        assert_eq!(status(0).await, (64 << 10, false, true));
        assert_eq!(status(64 << 10).await, (64 << 10, true, false));
        root.discard(ByteRange::new(64 << 10, 64 << 10))
            .await
            .unwrap();
        assert_eq!(status(0).await, (1 << 20, false, true));
    });
}

#[test]
fn a_file_that_ends_within_a_block_is_data_to_the_end_of_the_block_with_direct_io() {
    let dir = disk_dir();
    let path = image(&dir, 0);
    let length = (64 << 10) - 1;
    std::fs::write(&path, vec![1; length]).unwrap();
    run(async {
        let status = async |direct: bool| {
            let definition = json!({"driver": "file", "filename": path, "read-only": true,
                "node-name": if direct { "direct" } else { "cached" },
                "cache": {"direct": direct}});
            let graph = graph();
            let node = graph.add(options(definition)).await.unwrap();
            let range = ByteRange::new(0, 64 << 10);
            let extent = node.block_status(range).await.unwrap();
            assert!(extent.status.data);
            extent.length
        };
        assert_eq!(status(true).await, 64 << 10);
        assert_eq!(status(false).await, length as u64);
    });
}

#[test]
fn devices_are_opened_by_their_drivers_and_nothing_else_is() {
    let dir = TempDir::new().unwrap();
    let folder = dir.path().to_str().unwrap();
    let plain = image(&dir, 512);
    run(async {
        let open = async |driver: &str, path: &str, read_only: bool| {
            let definition = json!({"driver": driver, "node-name": "n", "filename": path,
                "read-only": read_only, "locking": "off"});
            let opened = graph().add(options(definition)).await;
            let node = opened.map_err(|error| error.message)?;
            // Such a device has nothing that could be made durable.
            node.flush().await.map_err(|errno| errno.to_string())?;
            Ok(node.length())
        };
        let a_directory = Err(format!("Could not open '{folder}': Is a directory"));
        for driver in ["file", "host_device", "host_cdrom"] {
            assert_eq!(open(driver, folder, false).await, a_directory);
        }
        let refused = |driver: &str, path: &str, wanted: &str| {
            Err(format!(
                "'{driver}' driver requires '{path}' to be {wanted}"
            ))
        };
        let device = "either a character or block device";
        for (driver, path, wanted) in [
            ("file", folder, "a regular file"),
            ("file", "/dev/null", "a regular file"),
            ("host_device", folder, device),
            ("host_device", &plain, device),
            ("host_cdrom", folder, device),
        ] {
            assert_eq!(
                open(driver, path, true).await,
                refused(driver, path, wanted)
            );
        }
        for driver in ["host_device", "host_cdrom"] {
            assert_eq!(open(driver, "/dev/null", true).await, Ok(0));
            assert_eq!(open(driver, "/dev/null", false).await, Ok(0));
        }
    });
}
