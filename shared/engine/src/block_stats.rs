//! Counters: `query-blockstats`, `block-latency-histogram-set`; and `block-set-write-threshold`.
//!
//! What counts are exports: each is an entry of its own, found by `qdev`, its id. Nodes know how far they were written, and what
//! their drivers count.

use std::rc::Rc;

use block::accounting::{Accounting, Boundaries, Kind, Totals};
use block::{ChildRole, Edge, Node};
use executor::time;
use qmp::{Arguments, Error, ErrorClass, Map, Result, Value, json};
use serde::Deserialize;

use crate::engine::Engine;

/// Each kind with what members of `BlockDeviceStats` call it.
const KINDS: [(Kind, &str); 4] = [
    (Kind::Read, "rd"),
    (Kind::Write, "wr"),
    (Kind::Flush, "flush"),
    (Kind::Unmap, "unmap"),
];

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct QueryBlockStats {
    /// All nodes, not what is exported of them.
    #[serde(default)]
    query_nodes: bool,
}

pub(crate) async fn query(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    let QueryBlockStats { query_nodes } = arguments.parse()?;
    if query_nodes {
        let nodes = engine.graph.nodes();
        // The oldest comes first.
        let described = nodes.iter().rev();
        return Ok(described.map(|node| of_node(node, Below::File)).collect());
    }
    let counted = engine.exports.counted().into_iter();
    let described = counted.map(|export| {
        let mut stats = of_node(&export.node, Below::FileAndBacking);
        stats["device"] = "".into();
        stats["qdev"] = export.id.into();
        let Some(members) = stats["stats"].as_object_mut() else {
            unreachable!("the statistics of a node are an object")
        };
        add_counted(members, &export.accounting);
        stats
    });
    Ok(described.collect())
}

/// Which nodes below one are described with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Below {
    /// That of its data.
    File,
    /// And that of what it does not have itself.
    FileAndBacking,
}

/// `BlockStats` of QEMU's QMP reference.
fn of_node(node: &Node, below: Below) -> Value {
    let mut stats = json!({
        "node-name": node.name(),
        "stats": of_nobody(node.highest_write()),
    });
    let driver = node.driver();
    let own = driver.statistics();
    if !own.is_empty() {
        let mut own = Value::Object(own);
        own["driver"] = driver.driver_name().into();
        stats["driver-specific"] = own;
    }
    let edges = driver.edges();
    let first = |wanted: fn(ChildRole) -> bool| {
        let mut found = edges.iter().filter(|(_, edge)| wanted(edge.role()));
        found.next().map(|(_, edge)| *edge)
    };
    let describe = |edge: &Edge| of_node(edge.node(), below);
    if let Some(edge) = first(|role| role != ChildRole::Backing) {
        stats["parent"] = describe(edge);
    }
    let backing = driver
        .filtered()
        .or(first(|role| role == ChildRole::Backing));
    if let (Below::FileAndBacking, Some(edge)) = (below, backing) {
        stats["backing"] = describe(edge);
    }
    stats
}

/// `BlockDeviceStats` of a node: its users count, not it.
fn of_nobody(highest_write: u64) -> Value {
    let mut stats = members(&Totals::default());
    stats.insert("wr_highest_offset".to_owned(), highest_write.into());
    // Nothing merges requests.
    for kind in ["rd", "wr", "unmap"] {
        stats.insert(format!("{kind}_merged"), 0.into());
    }
    // Nobody has asked for intervals.
    stats.insert("timed_stats".to_owned(), json!([]));
    for what in ["account_invalid", "account_failed"] {
        stats.insert(what.to_owned(), false.into());
    }
    Value::Object(stats)
}

/// Puts what was counted in the place of zeroes.
fn add_counted(stats: &mut Map<String, Value>, accounting: &Accounting) {
    let totals = accounting.totals();
    stats.extend(members(&totals));
    // Failed requests add to the times, and both end the idle time.
    for what in ["account_invalid", "account_failed"] {
        stats.insert(what.to_owned(), true.into());
    }
    if let Some(last) = totals.last_access() {
        let idle = time::now().saturating_sub(last).as_nanos();
        let idle = u64::try_from(idle).unwrap_or(u64::MAX);
        stats.insert("idle_time_ns".to_owned(), idle.into());
    }
}

fn members(totals: &Totals) -> Map<String, Value> {
    let mut members = Map::new();
    for (kind, name) in KINDS {
        let counted = totals.of(kind);
        let mut insert = |key: String, value: u64| members.insert(key, value.into());
        insert(format!("{name}_operations"), counted.operations);
        insert(format!("{name}_total_time_ns"), counted.time);
        insert(format!("failed_{name}_operations"), counted.failed);
        insert(format!("invalid_{name}_operations"), counted.invalid);
        if kind != Kind::Flush {
            insert(format!("{name}_bytes"), counted.bytes);
        }
        if let Some((boundaries, bins)) = &counted.histogram {
            let histogram = json!({ "boundaries": boundaries, "bins": bins });
            members.insert(format!("{name}_latency_histogram"), histogram);
        }
    }
    members
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct HistogramSet {
    id: String,
    boundaries: Option<Vec<u64>>,
    boundaries_read: Option<Vec<u64>>,
    boundaries_write: Option<Vec<u64>>,
    boundaries_flush: Option<Vec<u64>>,
}

pub(crate) async fn set_histogram(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    let set: HistogramSet = arguments.parse()?;
    let HistogramSet { id, boundaries, .. } = set;
    let mut counted = engine.exports.counted().into_iter();
    let accounting = match counted.find(|export| export.id == id) {
        Some(export) => export.accounting,
        None => return Err(not_found(&id)),
    };
    let given = [
        (Kind::Read, "read", set.boundaries_read),
        (Kind::Write, "write", set.boundaries_write),
        (Kind::Flush, "flush", set.boundaries_flush),
    ];
    if boundaries.is_none() && given.iter().all(|(_, _, own)| own.is_none()) {
        for (kind, ..) in given {
            accounting.set_histogram(kind, None);
        }
        return Ok(json!({}));
    }
    for (kind, name, own) in given {
        let Some(list) = own.or_else(|| boundaries.clone()) else {
            continue;
        };
        let Some(list) = Boundaries::new(list) else {
            let what = format!("Device '{id}' set {name} boundaries fail");
            return Err(Error::generic(what));
        };
        accounting.set_histogram(kind, Some(list));
    }
    Ok(json!({}))
}

fn not_found(device: &str) -> Error {
    let what = format!("Device '{device}' not found");
    Error::new(ErrorClass::DeviceNotFound, what)
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct SetWriteThreshold {
    node_name: String,
    /// Bytes; 0 for none.
    write_threshold: u64,
}

pub(crate) async fn set_write_threshold(
    engine: &Rc<Engine>,
    arguments: Arguments,
) -> Result<Value> {
    let SetWriteThreshold {
        node_name,
        write_threshold,
    } = arguments.parse()?;
    let node = engine.graph.node(&node_name);
    let node = node.ok_or_else(|| Error::generic(format!("Device '{node_name}' not found")))?;
    node.set_write_threshold(write_threshold, engine.graph.reporter(&node));
    Ok(json!({}))
}

#[cfg(test)]
mod tests;
