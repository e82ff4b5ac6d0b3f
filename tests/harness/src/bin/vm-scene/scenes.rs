//! The scenes: what happens in which order, and what must be true in between.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use harness::scene::{BackEnd, Boot, Guest, program};
use serde_json::{Value, json};

use crate::Options;
use crate::network::{self, HostEnd};
use crate::story::{Story, milliseconds};

const BASE_BYTES: u64 = 512 << 20;

/// The `--blockdev` option for a bare disk; file names are relative to the scene's directory.
const RAW_DISK: &str = "driver=raw,node-name=disk,file.driver=file,file.filename=disk.raw";

pub(crate) fn play(options: &Options, story: &mut Story) -> Result<()> {
    let directory = tempfile::Builder::new().prefix("scene-").tempdir()?;
    let directory = directory.path();
    std::env::set_current_dir(directory).context("enter the scene's directory")?;
    match options.scene.as_str() {
        "survive-kills" => survive_kills(options, directory, story),
        "resize" => resize(options, directory, story),
        "late-back-end" => late_back_end(options, directory, story),
        "network" => network::network(options, directory, story),
        "shell" => shell(options, directory, story),
        other => {
            bail!("unknown scene '{other}': survive-kills, resize, late-back-end, network or shell")
        }
    }
}

/// A guest writes and fsyncs files on ext4 on a qcow2 overlay while the daemon dies again and again; then, with a network card, the
/// same with a transfer and the network's daemon.
fn survive_kills(options: &Options, directory: &Path, story: &mut Story) -> Result<()> {
    let blockdev = make_overlay(directory)?;
    story.tell("prepared", &[("base_bytes", BASE_BYTES.into())]);
    let mut host = match options.network {
        true => Some(HostEnd::start(options, directory, story)?),
        false => None,
    };
    let mut back_end = BackEnd::disk(directory, &blockdev, options.queues);
    let took = back_end.start()?;
    story.tell("daemon_ready", &[("took_ms", milliseconds(took).into())]);
    let mut boot = options.boot(Some(back_end.socket()));
    boot.card = host.as_ref().map(|host| host.card(options));
    let mut guest = start(&boot, directory, story)?;
    story.pass_on(&guest.ask("files 2", "started")?);
    for number in 1..=options.kills {
        let calm = wait_for_syncs(&mut guest, options)?;
        back_end.kill()?;
        story.tell(
            "killed",
            &[
                ("number", number.into()),
                ("pause_before_ms", pause_of(&calm)),
            ],
        );
        let took = back_end.start()?;
        let after = wait_for_syncs(&mut guest, options)?;
        let fields = [
            ("number", number.into()),
            ("restart_ms", milliseconds(took).into()),
            ("pause_ms", pause_of(&after)),
            ("bytes", after["bytes"].clone()),
        ];
        story.tell("resumed", &fields);
    }
    wait_for_syncs(&mut guest, options)?;
    finish_load(&mut guest, story)?;
    if let Some(host) = &mut host {
        network::connect(&mut guest, story)?;
        host.survive_kills(&mut guest, options, story)?;
        host.finish_transfer(&mut guest, story)?;
    }
    expect_no_complaints(&mut guest, story)?;
    power_off(guest, story)?;
    back_end.terminate()?;
    if let Some(host) = host {
        host.end()?;
    }
    check_image(&directory.join("overlay.qcow2"), story)
}

/// Four queues of a bare disk under load: the daemon dies once, then the disk grows and the guest sees it.
fn resize(options: &Options, directory: &Path, story: &mut Story) -> Result<()> {
    let disk = directory.join("disk.raw");
    make_raw(&disk, 64 << 20)?;
    let mut back_end = BackEnd::disk(directory, RAW_DISK, options.queues);
    back_end.start()?;
    let mut guest = boot(options, &back_end, directory, story)?;
    guest.ask(&format!("device {}", options.cpus), "started")?;
    wait_for_syncs(&mut guest, options)?;
    back_end.kill()?;
    let took = back_end.start()?;
    let after = wait_for_syncs(&mut guest, options)?;
    story.tell(
        "resumed",
        &[
            ("restart_ms", milliseconds(took).into()),
            ("pause_ms", pause_of(&after)),
        ],
    );
    let larger: u64 = 96 << 20;
    guest.tell(&format!("size {larger}"))?;
    let arguments = json!({"node-name": "disk", "size": larger});
    back_end.monitor()?.execute("block_resize", arguments)?;
    let seen = guest.expect("size")?;
    story.pass_on(&seen);
    finish_load(&mut guest, story)?;
    expect_no_complaints(&mut guest, story)?;
    power_off(guest, story)?;
    back_end.terminate()
}

/// The VMM is there before the daemon; the guest is reset, then its power button is pressed.
fn late_back_end(options: &Options, directory: &Path, story: &mut Story) -> Result<()> {
    make_raw(&directory.join("disk.raw"), 16 << 20)?;
    let mut back_end = BackEnd::disk(directory, RAW_DISK, options.queues);
    let mut guest = Guest::start(&options.boot(Some(back_end.socket())), directory)?;
    story.tell("vmm_started", &[]);
    back_end.start()?;
    story.tell("daemon_ready", &[]);
    story.pass_on(&guest.expect("ready")?);
    let mut vmm = guest.monitor()?;
    let status = vmm.execute("query-status", json!({}))?;
    ensure!(status["status"] == "running", "query-status says {status}");
    vmm.execute("system_reset", json!({}))?;
    story.tell("reset", &[]);
    story.pass_on(&guest.expect("ready")?);
    guest.ask("power-button", "waiting")?;
    vmm.execute("system_powerdown", json!({}))?;
    story.pass_on(&guest.expect("pressed")?);
    power_off(guest, story)?;
    back_end.terminate()
}

/// A shell in a guest with the overlay as its disk, until the user powers it off.
fn shell(options: &Options, directory: &Path, story: &mut Story) -> Result<()> {
    let blockdev = make_overlay(directory)?;
    let host = match options.network {
        true => Some(HostEnd::start(options, directory, story)?),
        false => None,
    };
    let mut back_end = BackEnd::disk(directory, &blockdev, options.queues);
    back_end.start()?;
    let mut boot = options.boot(Some(back_end.socket()));
    boot.card = host.as_ref().map(|host| host.card(options));
    boot.run = String::new();
    Guest::on_this_terminal(&boot, directory)?;
    back_end.terminate()?;
    host.map_or(Ok(()), HostEnd::end)
}

fn boot(
    options: &Options,
    back_end: &BackEnd,
    directory: &Path,
    story: &mut Story,
) -> Result<Guest> {
    start(&options.boot(Some(back_end.socket())), directory, story)
}

/// Starts a guest with a disk, and looks at what it sees of it.
fn start(boot: &Boot, directory: &Path, story: &mut Story) -> Result<Guest> {
    let mut guest = Guest::start(boot, directory)?;
    let ready = guest.expect("ready")?;
    story.pass_on(&ready);
    let queues = boot.disk.as_ref().map_or(0, |(_, queues)| *queues);
    let expected = queues.min(boot.cpus);
    ensure!(
        ready["queues"] == expected,
        "the guest has {} queues, not {expected}",
        ready["queues"]
    );
    // With "write through" the guest would never flush, and an fsync would promise nothing.
    let cache = &ready["write_cache"];
    ensure!(
        *cache == "write back",
        "the guest takes its disk's cache for {cache}"
    );
    Ok(guest)
}

/// Waits for the guest to finish more syncs, and returns its counts with the longest pause of that time.
fn wait_for_syncs(guest: &mut Guest, options: &Options) -> Result<Value> {
    guest.ask(&format!("progress {}", options.syncs), "mark")
}

pub(crate) fn pause_of(mark: &Value) -> Value {
    mark["longest_pause_ms"].clone()
}

fn finish_load(guest: &mut Guest, story: &mut Story) -> Result<()> {
    story.pass_on(&guest.ask("stop", "stopped")?);
    story.pass_on(&guest.ask("verify", "verified")?);
    Ok(())
}

pub(crate) fn expect_no_complaints(guest: &mut Guest, story: &mut Story) -> Result<()> {
    let log = guest.ask("log", "log")?;
    story.pass_on(&log);
    ensure!(
        log["complaints"] == json!([]),
        "the guest's kernel complains: {log}"
    );
    Ok(())
}

pub(crate) fn power_off(mut guest: Guest, story: &mut Story) -> Result<()> {
    guest.tell("exit")?;
    guest.wait()?;
    story.tell("powered_off", &[]);
    Ok(())
}

fn check_image(image: &Path, story: &mut Story) -> Result<()> {
    let output = Command::new(program("qemu-img"))
        .args(["check", "--output=json"])
        .arg(image)
        .output()
        .context("run qemu-img check")?;
    let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let bytes = std::fs::metadata(image)
        .context("look at the overlay")?
        .len();
    story.tell(
        "checked",
        &[("report", report.clone()), ("overlay_bytes", bytes.into())],
    );
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "qemu-img check: {} {report} {errors}",
        output.status
    );
    Ok(())
}

/// An ext4 file system in a raw base image with a qcow2 overlay above it; the `--blockdev` option that opens both.
fn make_overlay(directory: &Path) -> Result<String> {
    let base = directory.join("base.raw");
    make_raw(&base, BASE_BYTES)?;
    run(Command::new(program("mke2fs"))
        .args(["-q", "-t", "ext4", "-F"])
        .arg(&base))?;
    run(Command::new(program("qemu-img"))
        .args([
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            "base.raw",
            "-F",
            "raw",
            "overlay.qcow2",
        ])
        .current_dir(directory))?;
    Ok("driver=qcow2,node-name=disk,file.driver=file,file.filename=overlay.qcow2".into())
}

fn make_raw(path: &Path, bytes: u64) -> Result<()> {
    let file = std::fs::File::create(path);
    let sized = file.and_then(|file| file.set_len(bytes));
    sized.with_context(|| format!("create {}", path.display()))
}

fn run(command: &mut Command) -> Result<()> {
    let output = command
        .output()
        .with_context(|| format!("run {command:?}"))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "{command:?}: {} {errors}",
        output.status
    );
    Ok(())
}
