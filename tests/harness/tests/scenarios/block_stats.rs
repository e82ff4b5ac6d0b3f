//! Counters: what a guest and an NBD client did is what `query-blockstats` says.

use anyhow::{Result, ensure};
use harness::driver::{Operation, Options, Queue, Request, SectorRange};
use harness::peer;
use harness::process::Program;
use harness::qmp_client::QmpClient;
use harness::rig::{Disk, Format, Rig};
use serde_json::{Value, json};

/// The counters of export `id`.
fn stats_of(monitor: &mut QmpClient, id: &str) -> Result<Value> {
    let all = monitor.execute("query-blockstats", json!({}))?;
    let mut exports = all.as_array().into_iter().flatten();
    let found = exports.find(|export| export["qdev"] == id);
    Ok(found.map_or(Value::Null, |export| export["stats"].clone()))
}

fn expect(stats: &Value, expected: &[(&str, u64)]) -> Result<()> {
    for (name, value) in expected {
        ensure!(
            stats[*name] == *value,
            "{name}: {value} expected in {stats}"
        );
    }
    Ok(())
}

/// The sum of a histogram's bins.
fn counted(stats: &Value, kind: &str) -> u64 {
    let bins = stats[format!("{kind}_latency_histogram")]["bins"].as_array();
    bins.into_iter().flatten().filter_map(Value::as_u64).sum()
}

/// Three writes, two reads, a flush, a discard, a write of zeroes and a read beyond the end.
fn requests(queue: &mut Queue) -> Result<()> {
    let data = vec![7; 8192];
    for sector in [0, 16, 4096] {
        let request = Request::contiguous(Operation::Write, SectorRange::new(sector, 16));
        queue.run(request, &data)?.ok()?;
    }
    for sectors in [8, 32] {
        let request = Request::contiguous(Operation::Read, SectorRange::new(0, sectors));
        queue.run(request, &[])?.ok()?;
    }
    queue.run(Request::flush(), &[])?.ok()?;
    let discard = Request::clear(Operation::Discard, SectorRange::new(128, 128));
    queue.run(discard, &[])?.ok()?;
    let zeroes = Request::clear(Operation::WriteZeroes, SectorRange::new(0, 8));
    queue.run(zeroes, &[])?.ok()?;
    let beyond = Request::contiguous(Operation::Read, SectorRange::new(u64::MAX >> 10, 8));
    ensure!(
        queue.run(beyond, &[])?.ok().is_err(),
        "a read beyond the end"
    );
    Ok(())
}

#[test]
fn a_guests_requests_are_counted() -> Result<()> {
    let rig = Rig::start(Disk::new(Program::OutboardBlkd, Format::Qcow2).queues(2, 2))?;
    let (mut front_end, mut queues) = rig.connect(Options::default())?;
    let mut monitor = rig.monitor()?;
    let before = stats_of(&mut monitor, "e")?;
    expect(&before, &[("rd_operations", 0), ("wr_bytes", 0)])?;
    ensure!(before["idle_time_ns"].is_null(), "{before}");
    let boundaries = json!({"id": "e", "boundaries": [1, 1_000_000_000]});
    monitor.execute("block-latency-histogram-set", boundaries)?;
    for queue in &mut queues {
        requests(queue)?;
    }
    let stats = stats_of(&mut monitor, "e")?;
    let zeroed = 8 * 512;
    expect(
        &stats,
        &[
            ("wr_operations", 2 * 4),
            ("wr_bytes", 2 * (3 * 8192 + zeroed)),
            ("rd_operations", 2 * 2),
            ("rd_bytes", 2 * (8 + 32) * 512),
            ("flush_operations", 2),
            ("unmap_operations", 2),
            ("unmap_bytes", 2 * 128 * 512),
            ("invalid_rd_operations", 2),
            ("invalid_wr_operations", 0),
            ("failed_rd_operations", 0),
            ("wr_highest_offset", 4096 * 512 + 8192),
            ("rd_merged", 0),
        ],
    )?;
    for kind in ["rd", "wr", "flush"] {
        let time = stats[format!("{kind}_total_time_ns")].as_u64();
        ensure!(time.is_some_and(|time| time > 0), "{kind}: {stats}");
        let operations = stats[format!("{kind}_operations")].as_u64();
        ensure!(Some(counted(&stats, kind)) == operations, "{kind}: {stats}");
    }
    ensure!(stats["idle_time_ns"].as_u64().is_some(), "{stats}");
    front_end.disconnect();
    // What was counted outlives the connection that it was counted for.
    let after = stats_of(&mut monitor, "e")?;
    expect(&after, &[("rd_operations", 4), ("wr_operations", 8)])?;
    Ok(())
}

#[test]
fn an_nbd_clients_requests_are_counted() -> Result<()> {
    let rig = Rig::start(Disk::new(Program::OutboardBlkd, Format::Raw))?;
    let mut monitor = rig.monitor()?;
    let socket = rig.paths.second.display().to_string();
    let address = json!({"type": "unix", "data": {"path": socket}});
    monitor.execute("nbd-server-start", json!({"addr": address}))?;
    let node =
        json!({"driver": "null-co", "node-name": "counted", "size": 1 << 20, "read-zeroes": true});
    monitor.execute("blockdev-add", node)?;
    let export = json!({"type": "nbd", "id": "nbd", "node-name": "counted", "writable": true});
    monitor.execute("block-export-add", export)?;
    let url = format!("nbd+unix:///counted?socket={socket}");
    let commands = [
        "read 0 4096",
        "read 512k 256k",
        "write 0 64k",
        "write -z 0 512",
        "flush",
        "discard 0 4096",
    ];
    let mut arguments = vec!["-f", "raw", &url];
    for command in commands {
        arguments.extend(["-c", command]);
    }
    peer::run("qemu-io", &arguments)?;
    let stats = stats_of(&mut monitor, "nbd")?;
    expect(
        &stats,
        &[
            ("rd_operations", 2),
            ("rd_bytes", 4096 + (256 << 10)),
            ("wr_operations", 2),
            ("wr_bytes", (64 << 10) + 512),
            ("invalid_wr_operations", 0),
        ],
    )?;
    for kind in ["rd", "wr"] {
        let time = stats[format!("{kind}_total_time_ns")].as_u64();
        ensure!(time.is_some_and(|time| time > 0), "{kind}: {stats}");
    }
    Ok(())
}
