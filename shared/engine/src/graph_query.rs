//! What the graph looks like and where it runs: `x-debug-query-block-graph`, `x-blockdev-set-iothread`.

use std::rc::Rc;
use std::sync::Arc;

use block::graph::{User, UserKind};
use block::{Node, Permissions};
use qmp::{Arguments, Error, Result, Value, json};
use serde::Deserialize;

use crate::engine::Engine;

/// Permissions by name, the last bit first.
fn names(permissions: Permissions) -> Value {
    let mut names: Vec<_> = permissions
        .named()
        .map(|(_, name)| name.replace(' ', "-"))
        .collect();
    names.reverse();
    json!(names)
}

/// `XDbgBlockGraph` of QEMU's QMP reference: roots have the lowest numbers, then nodes by age; the highest comes first.
pub(crate) async fn debug_graph(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    arguments.finish()?;
    let mut nodes = engine.graph.nodes();
    nodes.reverse();
    let users: Vec<(usize, User)> = nodes
        .iter()
        .enumerate()
        .flat_map(|(child, node)| node.users_of().into_iter().map(move |user| (child, user)))
        .collect();
    let is_root = |(_, user): &&(usize, User)| matches!(user.kind, UserKind::Root);
    let root_count = users.iter().filter(is_root).count();
    let number = |index: usize| root_count + index + 1;
    let index_of = |wanted: &Arc<Node>| nodes.iter().position(|node| Arc::ptr_eq(node, wanted));
    let mut described = Vec::new();
    let mut edges = Vec::new();
    let mut roots = 0;
    for (child, user) in &users {
        let parent = match &user.kind {
            UserKind::Root => {
                roots += 1;
                let root = json!({ "id": roots, "type": "block-backend", "name": "" });
                described.push(root);
                roots
            }
            UserKind::Node(node) => match index_of(node) {
                Some(index) => number(index),
                None => continue,
            },
            UserKind::Other => continue,
        };
        edges.push((
            parent,
            json!({
                "parent": parent,
                "child": number(*child),
                "name": user.edge,
                "perm": names(user.permissions),
                "shared-perm": names(user.shared),
            }),
        ));
    }
    let shown = nodes.iter().enumerate();
    described.extend(shown.map(
        |(index, node)| json!({ "id": number(index), "type": "block-driver", "name": node.name() }),
    ));
    described.reverse();
    // Of one parent, those to younger children come last.
    edges.sort_by_key(|(parent, _)| std::cmp::Reverse(*parent));
    let edges: Vec<_> = edges.into_iter().map(|(_, edge)| edge).collect();
    Ok(json::ordered(
        &json!({ "nodes": described, "edges": edges }),
    ))
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct SetIothread {
    node_name: String,
    #[serde(default, rename = "force")]
    _force: bool,
}

/// Nodes belong to no thread: any thread may enter any of them, and exports say which do. What is asked for is checked.
pub(crate) async fn set_iothread(engine: &Rc<Engine>, mut arguments: Arguments) -> Result<Value> {
    let iothread = arguments.take_value("iothread");
    let SetIothread { node_name, .. } = arguments.parse()?;
    let iothread = match iothread {
        None => return Err(Error::missing_parameter("iothread")),
        Some(Value::Null) => None,
        Some(Value::String(id)) => Some(id),
        Some(_) => return Err(Error::parameter_type("iothread", "StrOrNull")),
    };
    if engine.graph.node(&node_name).is_none() {
        let what = format!("Failed to find node with node-name='{node_name}'");
        return Err(Error::generic(what));
    }
    if let Some(id) = iothread
        && engine.objects.iothreads().find(&id).is_err()
    {
        return Err(Error::generic(format!("Cannot find iothread {id}")));
    }
    Ok(json!({}))
}
