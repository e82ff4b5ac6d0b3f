//! Commands on dirty bitmaps: `block-dirty-bitmap-*`, `x-debug-block-dirty-bitmap-sha256`.

use std::rc::Rc;
use std::sync::Arc;

use block::Node;
use block::bitmap::{DirtyBitmap, NewBitmap, ops};
use qmp::{Arguments, Error, Result, Value, json};
use serde::Deserialize;

use crate::engine::Engine;
use crate::error::from_block;

/// What names a bitmap.
#[derive(Deserialize)]
struct BlockDirtyBitmap {
    node: String,
    name: String,
}

#[derive(Deserialize)]
struct Add {
    node: String,
    name: String,
    granularity: Option<i64>,
    #[serde(default)]
    persistent: bool,
    #[serde(default)]
    disabled: bool,
}

fn node(engine: &Engine, name: &str) -> Result<Arc<Node>> {
    let found = engine.graph.node(name);
    found.ok_or_else(|| Error::generic(format!("Node '{name}' not found")))
}

pub(crate) async fn add(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    let request: Add = arguments.parse()?;
    let node = crate::nodes::find(engine, Some(&request.node), Some(&request.node))?;
    let granularity = match request.granularity.map(u32::try_from) {
        None => None,
        Some(Ok(bytes)) => Some(bytes),
        Some(Err(_)) => return Err(Error::parameter_expects("granularity", "uint32_t")),
    };
    let new = NewBitmap {
        name: request.name,
        granularity,
        persistent: request.persistent,
        disabled: request.disabled,
    };
    ops::add(&node, new).map_err(from_block)?;
    Ok(json!({}))
}

pub(crate) async fn remove(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    let BlockDirtyBitmap {
        node: name,
        name: bitmap,
    } = arguments.parse()?;
    let node = node(engine, &name)?;
    ops::remove(&node, &bitmap).await.map_err(from_block)?;
    Ok(json!({}))
}

/// Runs one of the operations that are done at once.
fn change(
    engine: &Engine,
    arguments: Arguments,
    operation: impl FnOnce(&Node, &str) -> block::error::Result<()>,
) -> Result<Value> {
    let BlockDirtyBitmap {
        node: name,
        name: bitmap,
    } = arguments.parse()?;
    let node = node(engine, &name)?;
    operation(&node, &bitmap).map_err(from_block)?;
    Ok(json!({}))
}

pub(crate) async fn clear(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    change(engine, arguments, ops::clear)
}

pub(crate) async fn enable(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    change(engine, arguments, ops::enable)
}

pub(crate) async fn disable(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    change(engine, arguments, ops::disable)
}

#[derive(Deserialize)]
struct Merge {
    node: String,
    target: String,
    bitmaps: Vec<Value>,
}

pub(crate) async fn merge(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    let syntax = arguments.syntax();
    let request: Merge = arguments.parse()?;
    let target_node = node(engine, &request.node)?;
    let target = ops::find(&target_node, &request.target).map_err(from_block)?;
    let mut sources = Vec::with_capacity(request.bitmaps.len());
    for (index, source) in request.bitmaps.into_iter().enumerate() {
        let (source_node, name) = match source {
            Value::String(name) => (Arc::clone(&target_node), name),
            Value::Object(members) => {
                let missing = ["node", "name"]
                    .into_iter()
                    .find(|key| !members.contains_key(*key));
                if let Some(key) = missing {
                    return Err(Error::missing_parameter(format!("bitmaps[{index}].{key}")));
                }
                let named: BlockDirtyBitmap = Arguments::new(members, syntax).parse()?;
                (node(engine, &named.node)?, named.name)
            }
            _ => return Err(Error::parameter_type("null", "BlockDirtyBitmapOrStr")),
        };
        sources.push(ops::find(&source_node, &name).map_err(from_block)?);
    }
    ops::merge(&target, &sources).map_err(from_block)?;
    Ok(json!({}))
}

pub(crate) async fn sha256(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    let BlockDirtyBitmap {
        node: name,
        name: bitmap,
    } = arguments.parse()?;
    let node = node(engine, &name)?;
    let found = ops::find(&node, &bitmap).map_err(from_block)?;
    Ok(json!({"sha256": found.sha256()}))
}

/// `BlockDirtyInfo` of every bitmap of a node, newest first; `None` when there is none.
pub(crate) fn describe(node: &Node) -> Option<Value> {
    let list = node.bitmaps().list();
    let successors: Vec<_> = list
        .iter()
        .filter_map(|bitmap| bitmap.successor_of())
        .collect();
    let is_shown =
        |bitmap: &&Arc<DirtyBitmap>| !successors.iter().any(|other| Arc::ptr_eq(other, bitmap));
    let shown = list
        .iter()
        .rev()
        .filter(is_shown)
        .map(|bitmap| info(bitmap));
    (!list.is_empty()).then(|| shown.collect())
}

fn info(bitmap: &DirtyBitmap) -> Value {
    let mut info = qmp::Map::new();
    if bitmap.is_named() {
        info.insert("name".into(), json!(bitmap.name()));
    }
    info.insert("recording".into(), json!(bitmap.is_recorded()));
    info.insert("persistent".into(), json!(bitmap.is_persistent()));
    info.insert("busy".into(), json!(bitmap.is_busy()));
    if bitmap.is_inconsistent() {
        info.insert("inconsistent".into(), json!(true));
    }
    info.insert("granularity".into(), json!(bitmap.granularity()));
    info.insert("count".into(), json!(bitmap.count()));
    Value::Object(info)
}
