//! Commands that change what lies above what: `blockdev-snapshot`, `blockdev-snapshot-sync`, `blockdev-reopen`,
//! `x-blockdev-change`, `change-backing-file`.

use std::rc::Rc;
use std::sync::Arc;

use block::create::Target;
use block::graph::{ChildChange, Reopen, Undo};
use block::{BackingReference, Node};
use qmp::{Arguments, Error, Map, Result, Value, json};
use serde::Deserialize;

use crate::engine::Engine;
use crate::error::from_block;
use crate::transaction::{self, Context, Prepared};
use crate::{nodes, schema};

/// `blockdev-reopen`
pub(crate) async fn blockdev_reopen(
    engine: &Rc<Engine>,
    mut arguments: Arguments,
) -> Result<Value> {
    let list = match arguments.take_value("options") {
        Some(Value::Array(list)) => list,
        Some(_) => return Err(Error::parameter_type("options", "array")),
        None => return Err(Error::missing_parameter("options")),
    };
    arguments.finish()?;
    let mut changes = Vec::with_capacity(list.len());
    for (index, options) in list.into_iter().enumerate() {
        let path = format!("options[{index}]");
        let Value::Object(options) = options else {
            return Err(Error::parameter_type(path, "object"));
        };
        changes.push(reopened(&path, options)?);
    }
    engine.graph.reopen(changes).await.map_err(from_block)?;
    Ok(json!({}))
}

fn reopened(path: &str, options: Map<String, Value>) -> Result<Reopen> {
    schema::check("BlockdevOptions", &options, path)?;
    match options.get("node-name") {
        Some(Value::String(name)) => Ok(Reopen {
            node_name: name.clone(),
            options,
        }),
        _ => Err(Error::generic("node-name not specified")),
    }
}

#[derive(Deserialize)]
struct Change {
    parent: String,
    child: Option<String>,
    node: Option<String>,
}

/// `x-blockdev-change`
pub(crate) async fn blockdev_change(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    let Change {
        parent,
        child,
        node,
    } = arguments.parse()?;
    let parent = nodes::find(engine, Some(&parent), Some(&parent))?;
    let change = match (child, node) {
        (Some(_), Some(_)) => {
            return Err(Error::generic(
                "The parameters child and node are in conflict",
            ));
        }
        (None, None) => return Err(Error::generic("Either child or node must be specified")),
        (Some(name), None) => {
            let edges = parent.driver().edges();
            if !edges.iter().any(|(known, _)| *known == name) {
                let parent = parent.name();
                let what = format!("Node '{parent}' does not have child '{name}'");
                return Err(Error::generic(what));
            }
            ChildChange::Remove(name)
        }
        (None, Some(name)) => {
            let found = engine.graph.node(&name);
            let unknown = || Error::generic(format!("Node '{name}' not found"));
            ChildChange::Add(found.ok_or_else(unknown)?)
        }
    };
    let changed = engine.graph.change_children(parent, change).await;
    changed.map_err(from_block)?;
    Ok(json!({}))
}

#[derive(Deserialize)]
struct Snapshot {
    node: String,
    overlay: String,
}

pub(crate) async fn snapshot(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    transaction::alone(engine, arguments, |context, data| {
        Box::pin(prepare_snapshot(context, data))
    })
    .await
}

pub(crate) async fn snapshot_sync(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    transaction::alone(engine, arguments, |context, data| {
        Box::pin(prepare_snapshot_sync(context, data))
    })
    .await
}

/// Refuses a node that is not the top of what it is in.
fn check_top(node: &Node) -> Result<()> {
    match node.backing_of() {
        None => Ok(()),
        Some(above) => {
            let name = node.name();
            Err(Error::generic(format!(
                "Node '{name}' is busy: node is used as backing hd of '{above}'"
            )))
        }
    }
}

pub(crate) async fn prepare_snapshot(context: &Context, data: Arguments) -> Result<Prepared> {
    let Snapshot { node, overlay } = data.parse()?;
    let engine = &context.engine;
    let node = nodes::find(engine, Some(&node), Some(&node))?;
    check_top(&node)?;
    let overlay = nodes::find(engine, Some(&overlay), Some(&overlay))?;
    put_above(engine, &node, &overlay).await
}

async fn put_above(engine: &Rc<Engine>, node: &Arc<Node>, overlay: &Arc<Node>) -> Result<Prepared> {
    if overlay.in_use() {
        return Err(Error::generic("The overlay is already in use"));
    }
    let edges = overlay.driver().edges();
    if edges.iter().any(|(name, _)| *name == "backing") {
        return Err(Error::generic("The overlay already has a backing image"));
    }
    if !overlay.driver().takes_backing() {
        return Err(Error::generic(
            "The overlay does not support backing images",
        ));
    }
    let undo = engine.graph.put_above(node, overlay).await;
    let undo = undo.map_err(from_block)?;
    tracing::info!(
        node = node.name(),
        overlay = overlay.name(),
        "snapshot taken"
    );
    Ok(Prepared::done(take_back(Rc::clone(engine), undo)))
}

async fn take_back(engine: Rc<Engine>, undo: Undo) {
    if let Err(error) = engine.graph.undo(undo).await {
        tracing::error!(%error, "a snapshot could not be taken back");
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct ChangeBackingFile {
    device: String,
    image_node_name: String,
    backing_file: String,
}

/// `change-backing-file`: what an image says about its backing; what is open stays.
pub(crate) async fn change_backing_file(
    engine: &Rc<Engine>,
    arguments: Arguments,
) -> Result<Value> {
    let request: ChangeBackingFile = arguments.parse()?;
    let top = nodes::find(engine, Some(&request.device), Some(&request.device))?;
    let image = nodes::find(engine, None, Some(&request.image_node_name))?;
    let Some(mut backing) = nodes::below(&image) else {
        let what = "not allowing backing file change on an image without a backing file";
        return Err(Error::generic(what));
    };
    let mut chain = std::iter::successors(Some(&*top), |node| nodes::below(node));
    if !chain.any(|node| std::ptr::eq(node, &*image)) {
        let device = &request.device;
        let what = format!("'{device}' and image file are not in the same chain");
        return Err(Error::generic(what));
    }
    while let Some(filtered) = backing.driver().filtered() {
        backing = filtered.node();
    }
    let to = BackingReference {
        name: Some(request.backing_file),
        format: Some(backing.driver().driver_name().to_owned()),
    };
    image.refer_to_backing(to).await.map_err(from_block)?;
    Ok(json!({}))
}

#[derive(Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
enum NewImageMode {
    Existing,
    #[default]
    AbsolutePaths,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct SnapshotSync {
    device: Option<String>,
    node_name: Option<String>,
    snapshot_file: String,
    snapshot_node_name: Option<String>,
    format: Option<String>,
    #[serde(default)]
    mode: NewImageMode,
}

pub(crate) async fn prepare_snapshot_sync(context: &Context, data: Arguments) -> Result<Prepared> {
    let request: SnapshotSync = data.parse()?;
    let engine = &context.engine;
    let node = nodes::find(
        engine,
        request.device.as_deref(),
        request.node_name.as_deref(),
    )?;
    check_top(&node)?;
    let Some(name) = request.snapshot_node_name else {
        return Err(Error::generic("New overlay node-name missing"));
    };
    if engine.graph.node(&name).is_some() {
        return Err(Error::generic("New overlay node-name already in use"));
    }
    let format = request.format.as_deref().unwrap_or("qcow2");
    if request.mode != NewImageMode::Existing {
        make_overlay(engine, &node, (format, &request.snapshot_file)).await?;
    }
    let options = json!({
        "driver": format,
        "node-name": name,
        "file": { "driver": "file", "filename": request.snapshot_file },
        "backing": null,
    });
    let Value::Object(options) = options else {
        unreachable!("the literal is an object");
    };
    let overlay = engine.graph.add(options).await.map_err(from_block)?;
    match put_above(engine, &node, &overlay).await {
        Ok(prepared) => {
            let engine = Rc::clone(engine);
            Ok(prepared.and_then_abort(async move { remove(&engine, &name).await }))
        }
        Err(error) => {
            drop(overlay);
            remove(engine, &name).await;
            Err(error)
        }
    }
}

async fn remove(engine: &Engine, name: &str) {
    if let Err(error) = engine.graph.remove(name).await {
        tracing::warn!(node = name, %error, "an overlay stays");
    }
}

/// Makes an image over what `node` shows.
async fn make_overlay(engine: &Engine, node: &Node, (format, file): (&str, &str)) -> Result<()> {
    let backing = node.filename();
    if backing.is_empty() {
        let name = node.name();
        let what = format!("Node '{name}' has no file name that an image could refer to");
        return Err(Error::generic(what));
    }
    let members = json!({
        "size": node.length(),
        "backing-file": backing,
        "backing-fmt": node.driver().driver_name(),
    });
    let Value::Object(members) = members else {
        unreachable!("the literal is an object");
    };
    let target = Target::Name(file.to_owned());
    let made = engine.graph.create(format, target, members).await;
    made.map_err(from_block)
}

#[cfg(test)]
mod tests;
