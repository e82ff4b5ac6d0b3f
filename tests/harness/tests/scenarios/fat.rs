//! A directory as a disk, from within the daemon's sandbox.

use std::process::Command;

use anyhow::{Result, ensure};
use harness::process::{Launch, Program, installed};

/// Files of the directory are opened as they are read, which is after the daemon has confined itself.
#[test]
fn a_confined_daemon_reads_the_files_of_its_directory() -> Result<()> {
    let content: Vec<u8> = (0..1_000_000u32).map(|at| (at ^ at >> 8) as u8).collect();
    let directory = tempfile::tempdir()?;
    let shown = directory.path().join("shown");
    std::fs::create_dir_all(shown.join("below"))?;
    std::fs::write(shown.join("below/file"), &content)?;
    let socket = directory.path().join("nbd.sock");
    let arguments = [
        "--sandbox".to_owned(),
        "strict".to_owned(),
        "--blockdev".to_owned(),
        format!("vvfat,node-name=n,dir={},read-only=on", shown.display()),
        "--nbd-server".to_owned(),
        format!("addr.type=unix,addr.path={}", socket.display()),
        "--export".to_owned(),
        "nbd,id=e,node-name=n,name=n".to_owned(),
    ];
    let launch = Launch::new(Program::OutboardBlkd, arguments.into(), directory.path());
    let _daemon = launch.start()?;
    let (disk, copy) = (directory.path().join("disk"), directory.path().join("copy"));
    let mut convert = Command::new(installed("qemu-img", "qemu-utils")?);
    convert.args(["convert", "-f", "raw", "-O", "raw"]);
    convert.arg(format!("nbd+unix:///n?socket={}", socket.display()));
    convert.arg(&disk);
    // The volume begins behind the partition table.
    let mut take = Command::new(installed("mcopy", "mtools")?);
    take.arg("-i").arg(format!("{}@@32256", disk.display()));
    take.arg("::below/file").arg(&copy);
    for mut command in [convert, take] {
        let output = command.output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{command:?}: {said}");
    }
    ensure!(std::fs::read(&copy)? == content);
    Ok(())
}
