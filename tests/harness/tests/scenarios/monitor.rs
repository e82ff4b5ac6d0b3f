//! The daemon's QMP monitor.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use harness::driver::Options;
use harness::load::{self, Plan, Stop};
use harness::process::Program;
use harness::qmp_client::{QmpClient, QmpError};
use harness::rig::{Disk, Format, Rig};
use serde_json::{Value, json};

const OURS: Program = Program::OutboardBlkd;

fn class_of(result: Result<Value>) -> String {
    match result {
        Ok(value) => format!("no error but {value}"),
        Err(error) => match error.downcast_ref::<QmpError>() {
            Some(error) => error.class.clone(),
            None => format!("{error:#}"),
        },
    }
}

fn names(list: &Value, key: &str) -> Vec<String> {
    let items = list.as_array().map(Vec::as_slice).unwrap_or_default();
    items
        .iter()
        .filter_map(|item| item[key].as_str().map(str::to_owned))
        .collect()
}

/// Queries, errors, and adding and removing nodes and exports at run time.
fn commands_work(monitor: &mut QmpClient, rig: &Rig) -> Result<()> {
    monitor.execute("query-version", json!({}))?;
    let commands = names(&monitor.execute("query-commands", json!({}))?, "name");
    for command in [
        "blockdev-add",
        "blockdev-del",
        "block-export-add",
        "block_resize",
        "quit",
    ] {
        ensure!(
            commands.iter().any(|name| name == command),
            "{command} is not listed"
        );
    }
    let nodes = names(
        &monitor.execute("query-named-block-nodes", json!({}))?,
        "node-name",
    );
    ensure!(
        nodes.iter().any(|name| name == "n") && nodes.iter().any(|name| name == "f"),
        "{nodes:?}"
    );
    ensure!(
        class_of(monitor.execute("no-such-command", json!({}))) == "CommandNotFound",
        "class"
    );
    let missing = monitor.execute("blockdev-del", json!({"node-name": "nobody"}));
    ensure!(class_of(missing) == "GenericError", "class");
    let in_use = monitor.execute("blockdev-del", json!({"node-name": "n"}));
    ensure!(
        class_of(in_use) == "GenericError",
        "a node in use was deleted"
    );
    let node =
        json!({"driver": "null-co", "node-name": "later", "size": 1 << 20, "read-zeroes": true});
    monitor.execute("blockdev-add", node.clone())?;
    ensure!(
        class_of(monitor.execute("blockdev-add", node)) == "GenericError",
        "duplicate"
    );
    let socket = rig.paths.second.display().to_string();
    let export = json!({
        "type": "vhost-user-blk", "id": "late", "node-name": "later",
        "addr": {"type": "unix", "path": socket},
    });
    monitor.execute("block-export-add", export)?;
    let exports = names(&monitor.execute("query-block-exports", json!({}))?, "id");
    ensure!(
        exports.len() == 2 && exports.contains(&"late".to_owned()),
        "{exports:?}"
    );
    let (front_end, mut queues) = rig.connect_second()?;
    let oracle = harness::oracle::Oracle::new(2048, harness::oracle::Initial::Zero);
    load::verify_all(&mut queues[0], &oracle)?;
    drop(front_end);
    monitor.execute("block-export-del", json!({"id": "late"}))?;
    monitor.event("BLOCK_EXPORT_DELETED")?;
    monitor.execute("blockdev-del", json!({"node-name": "later"}))?;
    Ok(())
}

fn monitor_works(program: Program) -> Result<()> {
    let rig = Rig::start(Disk::new(program, Format::Qcow2))?;
    let mut monitor = rig.monitor()?;
    commands_work(&mut monitor, &rig)?;
    drop(monitor);
    let mut monitor = rig.monitor().context("a second monitor connection")?;
    let bad = monitor.exchange("{\"execute\": nonsense}")?;
    ensure!(bad["error"]["class"] == "GenericError", "{bad}");
    monitor.execute("query-version", json!({}))?;
    Ok(())
}

#[test]
fn commands_answer_as_qemu_storage_daemon_does() -> Result<()> {
    monitor_works(OURS)
}

#[test]
fn the_monitor_scenario_holds_for_qemu_storage_daemon() -> Result<()> {
    monitor_works(Program::QemuStorageDaemon)
}

#[test]
fn commands_are_answered_while_the_guest_is_busy() -> Result<()> {
    let rig = Rig::start(Disk::new(OURS, Format::Qcow2).queues(2, 2))?;
    let (front_end, mut queues) = rig.connect(Options::default())?;
    std::thread::scope(|scope| -> Result<()> {
        let oracle = &rig.oracle;
        let queues = &mut queues;
        let load = scope
            .spawn(move || load::run_on_all(queues, oracle, &Plan::default(), Stop::After(2000)));
        let mut monitor = rig.monitor()?;
        for _ in 0..200 {
            monitor.execute("query-named-block-nodes", json!({}))?;
        }
        load.join().expect("a load does not panic").map(drop)
    })?;
    rig.finish(front_end, queues)
}

#[test]
fn quit_ends_the_daemon_with_status_zero() -> Result<()> {
    let mut rig = Rig::start(Disk::new(OURS, Format::Qcow2))?;
    let (_front_end, mut queues) = rig.connect(Options::default())?;
    load::run_on_all(&mut queues, &rig.oracle, &Plan::default(), Stop::After(100))?;
    let mut monitor = rig.monitor()?;
    monitor.execute("quit", json!({}))?;
    let status = rig.daemon.ended()?;
    ensure!(status.success(), "{status}\n{}", rig.daemon.stderr());
    Ok(())
}

/// The interpreter of the virtual environment that scripts/setup makes, or the system's.
fn python() -> PathBuf {
    let venv = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../target/python/bin/python3"
    );
    let venv = PathBuf::from(venv);
    if venv.exists() {
        venv
    } else {
        "python3".into()
    }
}

/// A client that is not ours: PyPI's `qemu.qmp`.
fn python_client_works(program: Program) -> Result<()> {
    let rig = Rig::start(Disk::new(program, Format::Qcow2))?;
    let python = python();
    let found = Command::new(&python)
        .args(["-c", "import qemu.qmp"])
        .output();
    ensure!(
        found.is_ok_and(|output| output.status.success()),
        "{} has no module qemu.qmp: run scripts/setup",
        python.display()
    );
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/scenarios/qmp_client.py");
    let output = Command::new(&python)
        .arg(script)
        .arg(&rig.paths.qmp)
        .output()?;
    ensure!(
        output.status.success(),
        "{}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

#[test]
fn pythons_qemu_qmp_drives_the_daemon() -> Result<()> {
    python_client_works(OURS)
}

#[test]
fn the_python_scenario_holds_for_qemu_storage_daemon() -> Result<()> {
    python_client_works(Program::QemuStorageDaemon)
}
