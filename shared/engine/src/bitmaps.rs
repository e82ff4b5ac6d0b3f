//! Commands on dirty bitmaps: `block-dirty-bitmap-*`, `x-debug-block-dirty-bitmap-sha256`.

use std::rc::{Rc, Weak};
use std::sync::Arc;

use block::Node;
use block::bitmap::{DirtyBitmap, NewBitmap, ops};
use qmp::{Arguments, Error, Result, Value, json};
use serde::Deserialize;

use crate::engine::Engine;
use crate::error::from_block;
use crate::transaction::{self, Context, Prepared};

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

macro_rules! alone {
    ($($command:ident => $prepare:ident,)*) => {
        $(pub(crate) async fn $command(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
            transaction::alone(engine, arguments, |context, data| Box::pin($prepare(context, data))).await
        })*
    };
}

alone! {
    add => prepare_add,
    remove => prepare_remove,
    clear => prepare_clear,
    enable => prepare_enable,
    disable => prepare_disable,
    merge => prepare_merge,
}

pub(crate) async fn prepare_add(context: &Context, data: Arguments) -> Result<Prepared> {
    let request: Add = data.parse()?;
    let node = crate::nodes::find(&context.engine, Some(&request.node), Some(&request.node))?;
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
    let named = Named::new(&context.engine, &node, new.name.clone());
    ops::add(&node, new).map_err(from_block)?;
    Ok(Prepared::done(async move {
        named.with(|node, bitmap| node.bitmaps().detach(bitmap));
    }))
}

/// A bitmap by name: a snapshot in the same transaction opens its node anew, and loads what is stored of it.
struct Named {
    engine: Weak<Engine>,
    node: String,
    bitmap: String,
}

impl Named {
    fn new(engine: &Rc<Engine>, node: &Node, bitmap: String) -> Self {
        Self {
            engine: Rc::downgrade(engine),
            node: node.name().to_owned(),
            bitmap,
        }
    }

    fn with(&self, work: impl FnOnce(&Node, &Arc<DirtyBitmap>)) {
        let engine = self.engine.upgrade();
        let node = engine.and_then(|engine| engine.graph.node(&self.node));
        let Some(node) = node else { return };
        match node.bitmaps().find(&self.bitmap) {
            Some(bitmap) => work(&node, &bitmap),
            None => tracing::error!(
                node = self.node,
                bitmap = self.bitmap,
                "a change of a bitmap could not be completed"
            ),
        }
    }
}

/// The bitmap of an action that takes no more than its name, and how to find it later.
fn named(context: &Context, data: Arguments) -> Result<(Arc<Node>, Arc<DirtyBitmap>, Named)> {
    let BlockDirtyBitmap {
        node: name,
        name: bitmap,
    } = data.parse()?;
    let node = node(&context.engine, &name)?;
    let found = ops::find(&node, &bitmap).map_err(from_block)?;
    let named = Named::new(&context.engine, &node, bitmap);
    Ok((node, found, named))
}

pub(crate) async fn prepare_remove(context: &Context, data: Arguments) -> Result<Prepared> {
    let (node, bitmap, name) = named(context, data)?;
    ops::check_remove(&bitmap).map_err(from_block)?;
    // Nobody else uses it from here on; it records until it is gone.
    if !bitmap.try_take() {
        return Err(from_block(ops::busy(&bitmap)));
    }
    if let Err(error) = ops::forget_stored(&node, &bitmap).await {
        bitmap.give_back();
        return Err(from_block(error));
    }
    let was_persistent = bitmap.is_persistent();
    bitmap.set_persistent(false);
    let kept = Arc::clone(&bitmap);
    Ok(Prepared::new(
        move || name.with(|node, bitmap| node.bitmaps().detach(bitmap)),
        async move {
            kept.set_persistent(was_persistent);
            kept.give_back();
        },
    ))
}

pub(crate) async fn prepare_clear(context: &Context, data: Arguments) -> Result<Prepared> {
    let (_, bitmap, name) = named(context, data)?;
    ops::check_change(&bitmap).map_err(from_block)?;
    let saved = bitmap.clear_all();
    Ok(Prepared::done(async move {
        name.with(|_, bitmap| bitmap.restore(&saved));
    }))
}

pub(crate) async fn prepare_enable(context: &Context, data: Arguments) -> Result<Prepared> {
    let (_, bitmap, name) = named(context, data)?;
    ops::check_use(&bitmap).map_err(from_block)?;
    let before = bitmap.is_recording();
    bitmap.enable();
    Ok(Prepared::done(async move {
        if !before {
            name.with(|_, bitmap| bitmap.disable());
        }
    }))
}

pub(crate) async fn prepare_disable(context: &Context, data: Arguments) -> Result<Prepared> {
    let (_, bitmap, name) = named(context, data)?;
    ops::check_use(&bitmap).map_err(from_block)?;
    let before = bitmap.is_recording();
    bitmap.disable();
    Ok(Prepared::done(async move {
        if before {
            name.with(|_, bitmap| bitmap.enable());
        }
    }))
}

#[derive(Deserialize)]
struct Merge {
    node: String,
    target: String,
    bitmaps: Vec<Value>,
}

pub(crate) async fn prepare_merge(context: &Context, arguments: Arguments) -> Result<Prepared> {
    let engine = &context.engine;
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
    let saved = target.saved();
    ops::merge(&target, &sources).map_err(from_block)?;
    let name = Named::new(engine, &target_node, target.name().to_owned());
    // Nothing was written since: the roots of all nodes are drained.
    Ok(Prepared::done(async move {
        name.with(|_, bitmap| {
            bitmap.clear_all();
            bitmap.restore(&saved);
        });
    }))
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
