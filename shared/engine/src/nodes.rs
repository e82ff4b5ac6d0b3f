//! Commands on nodes: `blockdev-add`, `blockdev-del`, `block_resize`, `query-named-block-nodes`.

use std::rc::Rc;
use std::sync::Arc;

use block::Resize;
use block::node::{DetectZeroes, Node};
use qmp::{Arguments, Error, Map, Result, Value, json};
use serde::Deserialize;

use crate::catalogue;
use crate::engine::Engine;
use crate::error::from_block;

pub(crate) async fn blockdev_add(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    match arguments.get("driver") {
        None => return Err(Error::missing_parameter("driver")),
        Some(Value::String(name)) if !catalogue::knows(name) => {
            return Err(Error::parameter_value("driver", name));
        }
        Some(_) => {}
    }
    if arguments.get("node-name").is_none() {
        let what = "'node-name' must be specified for the root node";
        return Err(Error::generic(what));
    }
    let options = arguments.into_members();
    let node = engine.graph.add(options).await.map_err(from_block)?;
    tracing::info!(
        node = node.name(),
        driver = node.driver().driver_name(),
        bytes = node.length(),
        "node added"
    );
    Ok(json!({}))
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct NodeName {
    node_name: String,
}

pub(crate) async fn blockdev_del(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    let NodeName { node_name } = arguments.parse()?;
    if engine.graph.node(&node_name).is_none() {
        return Err(Error::generic(format!(
            "Failed to find node with node-name='{node_name}'"
        )));
    }
    engine.graph.remove(&node_name).await.map_err(from_block)?;
    tracing::info!(node = node_name, "node removed");
    Ok(json!({}))
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct BlockResize {
    device: Option<String>,
    node_name: Option<String>,
    /// Bytes.
    size: i64,
}

pub(crate) async fn block_resize(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    let request: BlockResize = arguments.parse()?;
    let node = find(
        engine,
        request.device.as_deref(),
        request.node_name.as_deref(),
    )?;
    let length =
        u64::try_from(request.size).map_err(|_| Error::parameter_expects("size", "a >0 size"))?;
    let resize = Resize::to(length);
    node.resize(resize).await.map_err(from_block)?;
    tracing::info!(node = node.name(), bytes = length, "node resized");
    Ok(json!({}))
}

/// The node that a command means. Devices are the system emulator's; there are none here.
pub(crate) fn find(
    engine: &Engine,
    device: Option<&str>,
    node_name: Option<&str>,
) -> Result<Arc<Node>> {
    let found = node_name.and_then(|name| engine.graph.node(name));
    found.ok_or_else(|| {
        let (device, node_name) = (device.unwrap_or_default(), node_name.unwrap_or_default());
        let what = format!("Cannot find device='{device}' nor node-name='{node_name}'");
        Error::generic(what)
    })
}

#[derive(Deserialize)]
struct QueryNodes {
    /// Leave backing images out.
    #[serde(default)]
    flat: bool,
}

pub(crate) async fn query_named_block_nodes(
    engine: &Rc<Engine>,
    arguments: Arguments,
) -> Result<Value> {
    let QueryNodes { flat } = arguments.parse()?;
    let nodes = engine.graph.nodes();
    Ok(nodes.iter().map(|node| describe(node, flat)).collect())
}

/// `BlockDeviceInfo` of QEMU's QMP reference.
fn describe(node: &Node, flat: bool) -> Value {
    let options = node.options();
    let filename = node.filename();
    let mut info = json!({
        "iops_rd": 0,
        "detect_zeroes": match options.detect_zeroes {
            DetectZeroes::Off => "off",
            DetectZeroes::On => "on",
            DetectZeroes::Unmap => "unmap",
        },
        "image": image(node, flat),
        "iops_wr": 0,
        "ro": options.read_only,
        "node-name": node.name(),
        "backing_file_depth": backing_depth(node),
        "drv": node.driver().driver_name(),
        "iops": 0,
        "bps_wr": 0,
        // Signed in the schema.
        "write_threshold": node.write_threshold().cast_signed(),
    });
    if let Some(bitmaps) = crate::bitmaps::describe(node) {
        info["dirty-bitmaps"] = bitmaps;
    }
    let rest = json!({
        "encrypted": false,
        "bps": 0,
        "bps_rd": 0,
        "cache": {
            "no-flush": options.cache_no_flush,
            "direct": options.cache_direct,
            "writeback": true,
        },
        "file": filename,
    });
    if let (Value::Object(info), Value::Object(rest)) = (&mut info, rest) {
        info.extend(rest);
    }
    if let Some(backing) = backing(node) {
        info["backing_file"] = backing.filename().into();
    }
    info
}

/// `ImageInfo`, with the chain of backing images unless `flat`.
fn image(node: &Node, flat: bool) -> Value {
    let mut image = Map::new();
    let mut current = Some(node);
    let mut depth = 0;
    while let Some(node) = current {
        let driver = node.driver();
        let mut info = json!({
            "virtual-size": node.length(),
            "filename": node.filename(),
            "format": driver.driver_name(),
        });
        for (key, value) in driver.describe() {
            info[key] = value;
        }
        insert_backing(&mut image, depth, info);
        depth += 1;
        current = if flat { None } else { below(node) };
    }
    Value::Object(image)
}

/// Puts `info` under `depth` levels of `backing-image`.
fn insert_backing(image: &mut Map<String, Value>, depth: usize, info: Value) {
    let Value::Object(info) = info else { return };
    let mut level = image;
    for _ in 0..depth {
        let below = level.entry("backing-image").or_insert_with(|| json!({}));
        level = below.as_object_mut().expect("only objects are put there");
    }
    level.extend(info);
}

fn backing(node: &Node) -> Option<&Node> {
    let edges = node.driver().edges();
    let edge = edges.into_iter().find(|(role, _)| *role == "backing");
    edge.map(|(_, edge)| edge.node())
}

/// The next image or filter of the chain.
pub(crate) fn below(node: &Node) -> Option<&Node> {
    let filtered = node.driver().filtered();
    filtered.map(|edge| edge.node()).or_else(|| backing(node))
}

fn backing_depth(node: &Node) -> usize {
    std::iter::successors(below(node), |node| below(node)).count()
}
