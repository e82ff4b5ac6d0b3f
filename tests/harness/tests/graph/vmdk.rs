//! Images of VMware in several files: what their descriptors may open, and both ways with QEMU's tools.

use crate::names::qemu_img;
use crate::rig::{filled, open_root, options, read, run};
use block::graph::{Graph, NamePolicy};
use block::{ByteRange, Error, ErrorKind, ZeroFlags};
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

const SIZE: usize = 5 << 20;

const SUBFORMATS: [&str; 5] = [
    "monolithicSparse",
    "monolithicFlat",
    "twoGbMaxExtentSparse",
    "twoGbMaxExtentFlat",
    "streamOptimized",
];

fn graph(policy: NamePolicy) -> Graph {
    Graph::new(&[protocols::DRIVERS, formats::DRIVERS], policy)
}

fn definition(path: &Path) -> Map<String, Value> {
    options(json!({"driver": "vmdk", "node-name": "disk",
        "file": {"driver": "file", "filename": path}}))
}

/// Opens the image; its length.
fn open(path: &Path, policy: NamePolicy) -> Result<u64, Error> {
    run(async {
        let graph = graph(policy);
        let opened = graph.add(definition(path)).await.map(|node| node.length());
        if opened.is_err() {
            assert!(graph.nodes().is_empty(), "a failed open leaves nothing");
        }
        graph.close_all().await.unwrap();
        opened
    })
}

/// A directory with a file of 64 KiB beside another directory, with one, too; and a descriptor that
/// names `name`.
fn naming(name: &str) -> TempDir {
    let dir = TempDir::new().unwrap();
    for file in ["images/flat", "other/flat"] {
        let path = dir.path().join(file);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, vec![1; 65536]).unwrap();
    }
    describe(&dir, &format!("RW 64 FLAT \"{name}\" 0\n"));
    dir
}

fn image(dir: &TempDir) -> PathBuf {
    dir.path().join("images/image.vmdk")
}

fn describe(dir: &TempDir, extents: &str) {
    let text = samples::vmdk::descriptor("twoGbMaxExtentFlat", extents);
    std::fs::write(image(dir), text).unwrap();
}

#[test]
fn extents_open_plain_files_beside_the_descriptor_only() {
    let dir = naming("flat");
    assert_eq!(open(&image(&dir), NamePolicy::default()).unwrap(), 32768);
    let images = dir.path().join("images");
    let absolute = dir.path().join("other/flat");
    std::os::unix::fs::symlink(&absolute, images.join("link")).unwrap();
    std::os::unix::fs::symlink("../other", images.join("directory")).unwrap();
    nix::unistd::mkfifo(&images.join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    for name in [
        absolute.to_str().unwrap(),
        "../other/flat",
        "./../images/../other/flat",
        "link",
        "directory/flat",
        "fifo",
        "/dev/zero",
        "/proc/self/fd/0",
        "nbd://localhost/x",
        "file:flat",
        "json:{'driver':'file','filename':'flat'}",
    ] {
        describe(&dir, &format!("RW 64 FLAT \"{name}\" 0\n"));
        let error = open(&image(&dir), NamePolicy::default()).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Forbidden, "{name}: {error}");
    }
    describe(&dir, "RW 64 FLAT \"missing\" 0\n");
    let error = open(&image(&dir), NamePolicy::default()).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Io, "{error}");
}

#[test]
fn an_allowed_directory_may_hold_extents() {
    let dir = naming("../other/flat");
    let allow = |name: &str| NamePolicy {
        allowed_dirs: vec![dir.path().join(name)],
        ..NamePolicy::default()
    };
    assert_eq!(open(&image(&dir), allow("other")).unwrap(), 32768);
    let error = open(&image(&dir), allow("images")).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Forbidden, "{error}");
}

#[test]
fn descriptors_whose_extents_cannot_be_are_refused() {
    let dir = naming("flat");
    let images = dir.path().join("images");
    let sparse = ["create", "-q", "-f", "vmdk", "sparse", "64k"];
    qemu_img(&images, &sparse);
    for (extents, message) in [
        (
            "RW 64 FLAT \"image.vmdk\" 0\n",
            "is an image above it in the chain",
        ),
        (
            "RW 129 FLAT \"flat\" 0\n",
            "is too short: it has 65536 bytes, 66048 are needed",
        ),
        (
            "RW 64 FLAT \"flat\" 65\n",
            "is too short: it has 65536 bytes, 66048 are needed",
        ),
        ("RW 64 FLAT \"flat\" 18446744073709551615\n", "is too short"),
        (
            "RW 18446744073709551615 FLAT \"flat\" 0\n",
            "longer than any disk",
        ),
        ("RW 64 SPARSE \"flat\"\n", "Image not in VMDK format"),
        (
            "RW 64 SESPARSE \"sparse\"\n",
            "No write support for seSparse images available",
        ),
        (
            "RW 128 SPARSE \"sparse\"\nRW 128 SPARSE \"sparse\"\n",
            "is named twice",
        ),
        (
            "RW 64 VMFS \"flat\" 1\n",
            "Invalid extent line: RW 64 VMFS \"flat\" 1",
        ),
        ("", "the VMDK descriptor names no extent"),
    ] {
        describe(&dir, extents);
        let error = open(&image(&dir), NamePolicy::default()).unwrap_err();
        assert!(error.message.contains(message), "{extents}: {error}");
    }
    std::fs::write(image(&dir), "version=1\n").unwrap();
    let error = open(&image(&dir), NamePolicy::default()).unwrap_err();
    assert_eq!(error.message, "invalid VMDK image descriptor");
    let long = format!("version=1\n#{}", "x".repeat(1 << 20));
    std::fs::write(image(&dir), long).unwrap();
    let error = open(&image(&dir), NamePolicy::default()).unwrap_err();
    assert!(error.message.contains("is longer than 1048575"), "{error}");
}

#[test]
fn parts_of_one_file_are_extents_at_their_offsets() {
    let dir = naming("flat");
    let flat = dir.path().join("images/flat");
    std::fs::write(&flat, samples::disk(65536, 1)).unwrap();
    describe(&dir, "RW 3 FLAT \"flat\" 64\nRW 5 FLAT \"flat\" 2\n");
    run(async {
        let graph = graph(NamePolicy::default());
        let root = open_root(&graph.add(definition(&image(&dir))).await.unwrap());
        let handle = root.attach();
        let bytes = read(&handle, 0, 8 * 512).await.unwrap();
        let file = samples::disk(65536, 1);
        assert!(bytes == [&file[64 * 512..67 * 512], &file[2 * 512..7 * 512]].concat());
        // Across both.
        let written = filled(&[7; 1024]);
        handle
            .write(2 * 512, written, Default::default())
            .await
            .unwrap();
        drop((handle, root));
        graph.close_all().await.unwrap();
    });
    let file = std::fs::read(flat).unwrap();
    let changed = [66 * 512..67 * 512, 2 * 512..3 * 512];
    assert!(
        changed
            .into_iter()
            .all(|range| file[range].iter().all(|byte| *byte == 7))
    );
    assert!(file[3 * 512..66 * 512] == samples::disk(65536, 1)[3 * 512..66 * 512]);
}

async fn create(graph: &Graph, path: &Path, members: Value) -> Result<(), Error> {
    let target = block::create::Target::Name(path.display().to_string());
    graph.create("vmdk", target, options(members)).await
}

/// What QEMU's tools read.
fn content(dir: &Path, name: &str) -> Vec<u8> {
    qemu_img(dir, &["convert", "-f", "vmdk", "-O", "raw", name, "raw"]);
    std::fs::read(dir.join("raw")).unwrap()
}

#[test]
fn what_is_made_and_written_here_is_read_by_qemu_img() {
    for subformat in SUBFORMATS {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("image.vmdk");
        let disk = samples::disk(SIZE, 3);
        run(async {
            let graph = graph(NamePolicy::default());
            create(&graph, &path, json!({"size": SIZE, "subformat": subformat}))
                .await
                .unwrap();
            let root = open_root(&graph.add(definition(&path)).await.unwrap());
            let handle = root.attach();
            for (number, grain) in disk.chunks(65536).enumerate() {
                let at = number as u64 * 65536;
                handle
                    .write(at, filled(grain), Default::default())
                    .await
                    .unwrap();
            }
            if subformat != "streamOptimized" {
                let range = ByteRange::new(100 << 10, 300 << 10);
                handle
                    .write_zeroes(range, ZeroFlags::default())
                    .await
                    .unwrap();
            }
            assert!(
                read(&handle, 0, 4096).await.unwrap() == disk[..4096],
                "{subformat}"
            );
            drop((handle, root));
            graph.close_all().await.unwrap();
        });
        let mut expected = disk;
        if subformat != "streamOptimized" {
            expected[100 << 10..400 << 10].fill(0);
        }
        qemu_img(dir.path(), &["check", "-f", "vmdk", "image.vmdk"]);
        assert!(content(dir.path(), "image.vmdk") == expected, "{subformat}");
    }
}

#[test]
fn what_qemu_img_makes_is_read_here() {
    for subformat in SUBFORMATS {
        let dir = TempDir::new().unwrap();
        let disk = samples::disk(SIZE - 512, 4);
        std::fs::write(dir.path().join("raw"), &disk).unwrap();
        let options = format!("subformat={subformat}");
        let convert = [
            "convert",
            "-f",
            "raw",
            "-O",
            "vmdk",
            "-o",
            &options,
            "raw",
            "image.vmdk",
        ];
        qemu_img(dir.path(), &convert);
        run(async {
            let graph = graph(NamePolicy::default());
            let path = dir.path().join("image.vmdk");
            let root = open_root(&graph.add(definition(&path)).await.unwrap());
            let bytes = read(&root.attach(), 0, disk.len()).await.unwrap();
            assert!(bytes == disk, "{subformat}");
            drop(root);
            graph.close_all().await.unwrap();
        });
    }
}

#[test]
fn grains_of_a_stream_are_written_once_and_whole() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("image.vmdk");
    run(async {
        let graph = graph(NamePolicy::default());
        let members = json!({"size": SIZE, "subformat": "streamOptimized"});
        create(&graph, &path, members).await.unwrap();
        let root = open_root(&graph.add(definition(&path)).await.unwrap());
        let handle = root.attach();
        let grain = || filled(&[5; 65536]);
        handle
            .write(65536, grain(), Default::default())
            .await
            .unwrap();
        let again = handle.write(65536, grain(), Default::default()).await;
        assert_eq!(again, Err(block::Errno::EIO));
        let partial = handle
            .write(0, filled(&[5; 4096]), Default::default())
            .await;
        assert_eq!(partial, Err(block::Errno::EINVAL));
        drop((handle, root));
        graph.close_all().await.unwrap();
    });
    let content = content(dir.path(), "image.vmdk");
    assert!(content[65536..131_072].iter().all(|byte| *byte == 5));
    assert!(content[..65536].iter().all(|byte| *byte == 0));
}

/// The CID that an image has.
fn cid(path: &Path) -> u64 {
    run(async {
        let graph = graph(NamePolicy::default());
        let mut definition = definition(path);
        definition.insert("read-only".into(), true.into());
        definition.insert("backing".into(), Value::Null);
        let node = graph.add(definition).await.unwrap();
        let described = node.driver().describe();
        let cid = described["format-specific"]["data"]["cid"]
            .as_u64()
            .unwrap();
        drop(node);
        graph.close_all().await.unwrap();
        cid
    })
}

#[test]
fn an_overlay_notices_that_its_parent_was_changed() {
    let dir = TempDir::new().unwrap();
    let path = |name: &str| dir.path().join(name);
    run(async {
        let graph = graph(NamePolicy::default());
        create(&graph, &path("base"), json!({"size": SIZE}))
            .await
            .unwrap();
        let members = json!({"size": SIZE, "backing-file": "base", "zeroed-grain": true});
        create(&graph, &path("top"), members).await.unwrap();
    });
    let first_byte = |change: u8| {
        run(async {
            let graph = graph(NamePolicy::default());
            let root = open_root(&graph.add(definition(&path("top"))).await.unwrap());
            let handle = root.attach();
            handle
                .write(65536, filled(&[change; 512]), Default::default())
                .await?;
            let byte = read(&handle, 0, 512).await.map(|bytes| bytes[0]);
            drop((handle, root));
            graph.close_all().await.unwrap();
            byte
        })
    };
    let before = (cid(&path("base")), cid(&path("top")));
    assert_eq!(first_byte(1), Ok(0));
    let after = (cid(&path("base")), cid(&path("top")));
    assert_eq!(before.0, after.0, "the parent is only read");
    assert_ne!(before.1, after.1, "the overlay was changed");
    run(async {
        let graph = graph(NamePolicy::default());
        let root = open_root(&graph.add(definition(&path("base"))).await.unwrap());
        let handle = root.attach();
        handle
            .write(0, filled(&[9; 512]), Default::default())
            .await
            .unwrap();
        drop((handle, root));
        graph.close_all().await.unwrap();
    });
    assert_ne!(cid(&path("base")), before.0);
    assert_eq!(first_byte(2), Err(block::Errno::EINVAL));
}

#[test]
fn only_images_of_the_same_kind_are_parents() {
    let dir = TempDir::new().unwrap();
    let path = |name: &str| dir.path().join(name);
    std::fs::write(path("raw"), vec![0; 65536]).unwrap();
    run(async {
        let graph = graph(NamePolicy::default());
        for (members, message) in [
            (
                json!({"size": SIZE, "backing-file": "raw"}),
                "backing_file must be a vmdk image",
            ),
            (
                json!({"size": SIZE, "backing-file": "raw", "subformat": "monolithicFlat"}),
                "Flat image can't have backing file",
            ),
            (
                json!({"size": SIZE, "zeroed-grain": true, "subformat": "monolithicFlat"}),
                "Flat image can't enable zeroed grain",
            ),
            (
                json!({"size": SIZE, "subformat": "x"}),
                "invalid parameter value: x",
            ),
            (
                json!({"size": SIZE, "adapter-type": "x"}),
                "invalid parameter value: x",
            ),
            (
                json!({"size": SIZE, "compat6": true, "hwversion": "7"}),
                "compat6 cannot be enabled with hwversion set",
            ),
            (
                json!({"size": SIZE, "hwversion": "7\"\nRW 1 FLAT \"x\" 0"}),
                "Invalid parameter 'hwversion'",
            ),
            (json!({"size": 0}), "VMDK disks have at least one sector"),
            (
                json!({"size": (8_u64 << 40) + 512, "subformat": "twoGbMaxExtentFlat"}),
                "Image size 8796093022720 takes more than 4096 extents",
            ),
            (
                json!({"size": (1_u64 << 46) + 512}),
                "Image size 70368744178176 is more than the 70368744177664 bytes of VMDK disks",
            ),
        ] {
            let refused = create(&graph, &path("image"), members).await;
            assert_eq!(refused.unwrap_err().message, message);
            assert!(!path("image").exists(), "{message}");
        }
        // The extent goes with the image that could not be made.
        let members = json!({"size": SIZE, "subformat": "monolithicFlat", "x": 1});
        assert!(create(&graph, &path("image"), members).await.is_err());
        assert!(!path("image").exists() && !path("image-flat").exists());
    });
}
