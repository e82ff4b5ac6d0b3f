//! Exports that change while they are in use: their threads, their being there at all, their company.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, ensure};
use harness::driver::{
    Endpoint, FrontEnd, Operation, Options, Queue, Request, STATUS_OK, SectorRange,
};
use harness::load::{self, Plan, Stop};
use harness::process::Program;
use harness::qmp_client::QmpClient;
use harness::rig::{Disk, Format, Rig};
use serde_json::{Value, json};

/// Runs `change` while every queue is loaded and verified.
fn under_load(
    rig: &Rig,
    queues: &mut [Queue],
    change: impl FnOnce() -> Result<()>,
) -> Result<load::Summary> {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (stop, oracle) = (&stop, &rig.oracle);
        let plan = Plan {
            depth: 16,
            ..Plan::default()
        };
        let load = scope.spawn(move || load::run_on_all(queues, oracle, &plan, Stop::When(stop)));
        let changed = change();
        stop.store(true, Ordering::Relaxed);
        let summary = load.join().expect("a load does not panic")?;
        changed.map(|()| summary)
    })
}

fn each_layout(test: impl Fn(Options) -> Result<()>) -> Result<()> {
    test(Options::default()).context("split rings")?;
    test(Options::default().packed()).context("packed rings")
}

#[test]
fn queues_move_between_threads_under_load() -> Result<()> {
    each_layout(|options| {
        let rig = Rig::start(Disk::new(Program::OutboardBlkd, Format::Qcow2).queues(2, 3))?;
        let (front_end, mut queues) = rig.connect(options)?;
        let mut monitor = rig.monitor()?;
        let places = [
            json!("io0"),
            json!(["io1", "io2"]),
            json!(null),
            json!(["io2", "io0", "io1"]),
            json!("io1"),
        ];
        let summary = under_load(&rig, &mut queues, || {
            for round in 0..60 {
                let place = &places[round % places.len()];
                let arguments = json!({"id": "e", "iothread": place});
                monitor.execute("x-block-export-set-iothread", arguments)?;
            }
            Ok(())
        })?;
        println!("{summary:?}");
        // The last place is all that is in use now.
        monitor.execute("object-del", json!({"id": "io0"}))?;
        ensure!(monitor.execute("object-del", json!({"id": "io1"})).is_err());
        let unknown = json!({"id": "e", "iothread": "io0"});
        ensure!(
            monitor
                .execute("x-block-export-set-iothread", unknown)
                .is_err()
        );
        rig.finish(front_end, queues)
    })
}

fn export(rig: &Rig) -> Value {
    let socket = rig.paths.socket.display().to_string();
    json!({
        "type": "vhost-user-blk", "id": "e", "node-name": "n", "writable": true, "num-queues": 2,
        "addr": {"type": "unix", "path": socket}, "iothread": ["io0", "io1"],
    })
}

fn remove(monitor: &mut QmpClient, id: &str) -> Result<()> {
    monitor.execute("block-export-del", json!({"id": id}))?;
    let event = monitor.event("BLOCK_EXPORT_DELETED")?;
    ensure!(event["data"]["id"] == id, "{event}");
    Ok(())
}

#[test]
fn an_export_is_removed_and_added_again_under_load() -> Result<()> {
    each_layout(|options| {
        let rig = Rig::start(Disk::new(Program::OutboardBlkd, Format::Qcow2).queues(2, 2))?;
        let (mut front_end, mut queues) = rig.connect(options)?;
        let mut monitor = rig.monitor()?;
        let summary = under_load(&rig, &mut queues, || {
            for _ in 0..15 {
                remove(&mut monitor, "e")?;
                ensure!(!rig.paths.socket.exists(), "its socket is still there");
                monitor.execute("block-export-add", export(&rig))?;
                front_end.reconnect()?;
            }
            Ok(())
        })?;
        println!("{summary:?}");
        rig.finish(front_end, queues)
    })
}

/// Reads the whole of a small range on another export of the rig's node.
fn read_once(path: &std::path::Path) -> Result<(FrontEnd, Vec<u8>)> {
    let endpoint = Endpoint::Connect(path.to_owned());
    let (front_end, mut queues) = FrontEnd::connect(endpoint, Options::default())?;
    let read = Request::contiguous(Operation::Read, SectorRange::new(0, 8));
    Ok((front_end, queues[0].run(read, &[])?.ok()?))
}

#[test]
fn a_node_has_several_exports_that_come_and_go_under_load() -> Result<()> {
    let rig = Rig::start(Disk::new(Program::OutboardBlkd, Format::Qcow2).queues(2, 2))?;
    let (front_end, mut queues) = rig.connect(Options::default())?;
    let mut monitor = rig.monitor()?;
    let directory = rig
        .paths
        .socket
        .parent()
        .context("the socket's directory")?;
    let under = under_load(&rig, &mut queues, || {
        for round in 0..20 {
            let writable = round % 2 == 0;
            let mut readers = Vec::new();
            for name in ["x", "y"] {
                let path = directory.join(format!("{name}.sock"));
                let export = json!({
                    "type": "vhost-user-blk", "id": name, "node-name": "n", "writable": writable,
                    "addr": {"type": "unix", "path": path}, "iothread": "io1",
                });
                monitor.execute("block-export-add", export)?;
                readers.push(read_once(&path)?.0);
            }
            // With its front-end connected, as with QEMU's daemon.
            remove(&mut monitor, "x")?;
            drop(readers);
            remove(&mut monitor, "y")?;
        }
        Ok(())
    })?;
    println!("{under:?}");
    rig.finish(front_end, queues)
}

#[test]
fn exports_of_one_node_see_each_others_writes() -> Result<()> {
    let rig = Rig::start(Disk::new(Program::OutboardBlkd, Format::Raw))?;
    let (front_end, mut queues) = rig.connect(Options::default())?;
    let mut monitor = rig.monitor()?;
    let path = rig.paths.socket.with_file_name("reader.sock");
    let export = json!({
        "type": "vhost-user-blk", "id": "reader", "node-name": "n",
        "addr": {"type": "unix", "path": path}, "serial": "second", "physical-block-size": 4096,
    });
    monitor.execute("block-export-add", export)?;
    let range = SectorRange::new(0, 8);
    let name = (1, 7);
    let (ticket, data) = rig
        .oracle
        .begin_write(range, name)
        .context("a free range")?;
    let write = Request::contiguous(Operation::Write, range);
    let done = queues[0].run(write, &data)?;
    ensure!(done.status == STATUS_OK);
    rig.oracle.complete(&ticket, &[])?;
    let (reader, seen) = read_once(&path)?;
    ensure!(seen == data, "the second export shows something else");
    drop(reader);
    rig.finish(front_end, queues)
}
