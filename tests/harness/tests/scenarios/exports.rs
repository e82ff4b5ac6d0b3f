//! Exports that change while they are in use: their threads, their being there at all, their company.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, ensure};
use harness::driver::features::bits;
use harness::driver::{
    Endpoint, FrontEnd, Operation, Options, Queue, Request, STATUS_IOERR, STATUS_OK,
    STATUS_UNSUPPORTED, SectorRange,
};
use harness::load::{self, Plan, Stop};
use harness::peer;
use harness::process::Program;
use harness::qmp_client::QmpClient;
use harness::rig::{Access, Disk, Format, Rig};
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

const SECURE_ERASE: Operation = Operation::Unknown(14);

/// Everything that would change a disk, of the disk's first sectors.
fn changes(range: SectorRange) -> [(Request, Vec<u8>); 5] {
    let zeroes = [Operation::WriteZeroes, Operation::WriteZeroesUnmap];
    let [keeping, unmapping] = zeroes.map(|kind| (Request::clear(kind, range), Vec::new()));
    let erase = Request::clear(SECURE_ERASE, SectorRange::new(0, 0));
    [
        (
            Request::contiguous(Operation::Write, range),
            vec![0xee; range.bytes()],
        ),
        (Request::clear(Operation::Discard, range), Vec::new()),
        keeping,
        unmapping,
        (erase, Vec::new()),
    ]
}

#[test]
fn exports_of_a_read_only_node_work_side_by_side_and_refuse_every_change() -> Result<()> {
    let disk = Disk {
        access: Access::ReadOnly,
        ..Disk::new(Program::OutboardBlkd, Format::Qcow2).queues(1, 2)
    };
    let range = SectorRange::new(0, 64);
    let write = format!("write -P 0x5a 0 {}", range.bytes());
    let rig = Rig::start_prepared(disk, |paths| {
        peer::io("qcow2", &paths.image, &[&write]).map(drop)
    })?;
    let image = std::fs::read(&rig.paths.image)?;
    let mut monitor = rig.monitor()?;
    let mut disks = vec![rig.connect(Options::default())?];
    for name in ["x", "y", "z"] {
        let path = rig.paths.socket.with_file_name(format!("{name}.sock"));
        let export = json!({
            "type": "vhost-user-blk", "id": name, "node-name": "n", "iothread": "io1",
            "addr": {"type": "unix", "path": path},
        });
        let mut writable = export.clone();
        writable["writable"] = json!(true);
        let refused = monitor.execute("block-export-add", writable);
        ensure!(refused.is_err(), "a writable export of a read-only node");
        monitor.execute("block-export-add", export)?;
        disks.push(FrontEnd::connect(
            Endpoint::Connect(path),
            Options::default(),
        )?);
    }
    let serve = |(front_end, queues): &mut (FrontEnd, Vec<Queue>)| -> Result<()> {
        let offered = front_end.offered();
        let changing = bits::DISCARD | bits::WRITE_ZEROES | 1 << 16;
        ensure!(offered & bits::RO != 0 && offered & changing == 0);
        for round in 0..100 {
            let read = Request::contiguous(Operation::Read, range);
            let seen = queues[0].run(read, &[])?.ok()?;
            ensure!(seen.iter().all(|byte| *byte == 0x5a), "round {round}");
            for (request, data) in changes(range) {
                let operation = request.operation;
                let status = queues[0].run(request, &data)?.status;
                let refused = [STATUS_IOERR, STATUS_UNSUPPORTED].contains(&status);
                ensure!(refused, "{operation:?} ended with status {status}");
            }
            ensure!(queues[0].run(Request::flush(), &[])?.status == STATUS_OK);
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let serving: Vec<_> = disks
            .iter_mut()
            .map(|disk| scope.spawn(move || serve(disk)))
            .collect();
        serving
            .into_iter()
            .try_for_each(|thread| thread.join().expect("a disk's thread does not panic"))
    })?;
    // One that goes leaves the others.
    drop(disks.pop());
    remove(&mut monitor, "z")?;
    disks.iter_mut().try_for_each(serve)?;
    drop(disks);
    let mut rig = rig;
    ensure!(rig.daemon.stop()?.success());
    ensure!(
        std::fs::read(&rig.paths.image)? == image,
        "the file changed"
    );
    Ok(())
}
