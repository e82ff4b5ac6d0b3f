//! Images both ways between here and QEMU.

use super::*;
use std::path::PathBuf;
use std::process::{Command, Output};

fn run(program: &str, arguments: &[&str], image: &Path) -> Output {
    let output = Command::new(program).args(arguments).arg(image).output();
    output.expect("scripts/setup installs QEMU's tools")
}

fn is_checked(image: &Path) {
    let output = run("qemu-img", &["check", "-q", "-f", "vhdx"], image);
    assert!(output.status.success(), "{output:?}");
}

fn scratch() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let image = directory.path().join("image");
    (directory, image)
}

#[test]
fn qemu_reads_what_is_made_and_written_here() {
    let disk = samples::disk(5 * MIB as usize + 1536, 3);
    for kind in [Kind::NotPresent, Kind::Zero, Kind::Fixed] {
        let world = world(new_image(disk.len() as u64, kind));
        with_disk(&world, WRITING, async |node| {
            // The third block stays as it is.
            for (offset, piece) in (0..).step_by(512 << 10).zip(disk.chunks(512 << 10)) {
                if offset / MIB != 2 {
                    write(&node, offset, piece).await;
                }
            }
            node.driver().close().await.unwrap();
        })
        .unwrap();
        let (_directory, image) = scratch();
        std::fs::write(&image, content(&world)).unwrap();
        is_checked(&image);
        let raw = image.with_extension("raw");
        let convert = ["convert", "-f", "vhdx", "-O", "raw"];
        let source = image.display().to_string();
        let output = run(
            "qemu-img",
            &[&convert[..], &[source.as_str()]].concat(),
            &raw,
        );
        assert!(output.status.success(), "{output:?}");
        let mut expected = disk.clone();
        expected[2 * MIB as usize..3 * MIB as usize].fill(0);
        assert!(std::fs::read(&raw).unwrap() == expected);
    }
}

#[test]
fn what_qemu_left_unclosed_is_replayed_here_and_read_there() {
    let (_directory, image) = scratch();
    let create = ["create", "-q", "-f", "vhdx", "-o", "block_size=1M"];
    let output = Command::new("qemu-img")
        .args(create)
        .arg(&image)
        .arg("64M")
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    // The table of blocks cannot be written: what is to be in it is in the log alone.
    let options = format!(
        "driver=vhdx,file.driver=blkdebug,file.image.driver=file,file.image.filename={},\
         file.inject-error.0.event=none,file.inject-error.0.iotype=write,\
         file.inject-error.0.sector={}",
        image.display(),
        BAT / 512
    );
    let killed = Command::new("qemu-io")
        .args([
            "-c",
            "write -P 5 3M 64k",
            "-c",
            "abort",
            "--image-opts",
            &options,
        ])
        .output()
        .unwrap();
    assert!(!killed.status.success(), "{killed:?}");
    let dirty = std::fs::read(&image).unwrap();
    let refused = with_disk(&world(dirty.clone()), READING, async |_| ());
    let message = refused.unwrap_err().message;
    assert!(message.contains("needs to be replayed"), "{message}");
    let world = world(dirty);
    with_disk(&world, WRITING, async |node| {
        assert!(read(&node, 3 * MIB, 64 << 10).await == [5].repeat(64 << 10));
        write(&node, 50 * MIB, &[7; 512]).await;
        node.driver().close().await.unwrap();
    })
    .unwrap();
    std::fs::write(&image, content(&world)).unwrap();
    is_checked(&image);
    let reads = [
        "-r",
        "-f",
        "vhdx",
        "-c",
        "read -P 5 3M 64k",
        "-c",
        "read -P 7 50M 512",
    ];
    let output = run("qemu-io", &reads, &image);
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && !said.contains("fail"),
        "{output:?}"
    );
}
