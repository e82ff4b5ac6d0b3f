//! Commands on internal snapshots: `blockdev-snapshot-internal-sync` and
//! `blockdev-snapshot-delete-internal-sync`.

use std::rc::Rc;
use std::sync::Arc;

use block::Node;
use block::snapshot::{NewSnapshot, Selector, SnapshotInfo, Snapshots};
use qmp::{Arguments, Error, Map, Result, Value, json};
use serde::Deserialize;

use crate::engine::Engine;
use crate::nodes;
use crate::transaction::{self, Context, Prepared};

const NANOSECONDS: u64 = 1_000_000_000;

#[derive(Deserialize)]
struct Create {
    device: String,
    name: String,
}

#[derive(Deserialize)]
struct Delete {
    device: String,
    id: Option<String>,
    name: Option<String>,
}

/// The node of a command, which no other node may use.
fn root_node(engine: &Engine, device: &str) -> Result<Arc<Node>> {
    let node = nodes::find(engine, Some(device), Some(device))?;
    if node.has_parent_node() {
        return Err(Error::generic("Need a root block node"));
    }
    Ok(node)
}

pub(crate) async fn create(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    transaction::alone(engine, arguments, |context, data| {
        Box::pin(prepare_create(context, data))
    })
    .await
}

pub(crate) async fn prepare_create(context: &Context, arguments: Arguments) -> Result<Prepared> {
    let engine = &context.engine;
    let Create { device, name } = arguments.parse()?;
    let node = root_node(engine, &device)?;
    if node.options().read_only {
        return Err(Error::generic(format!("Device '{device}' is read only")));
    }
    let driver = node.driver();
    let Some(snapshots) = driver.snapshots() else {
        let what = format!(
            "Block format '{}' used by device '{device}' does not support internal snapshots",
            driver.driver_name()
        );
        return Err(Error::generic(what));
    };
    if name.is_empty() {
        return Err(Error::generic("Name is empty"));
    }
    let same_name = Selector {
        name: Some(&name),
        id: None,
    };
    if same_name.find(&list(snapshots)?).is_some() {
        let what = format!("Snapshot with name '{name}' already exists on device '{device}'");
        return Err(Error::generic(what));
    }
    let mut new = NewSnapshot::now(name.as_str());
    // Without a guest, its clock is the host's.
    new.vm_clock_ns = u64::from(new.date_seconds) * NANOSECONDS + u64::from(new.date_ns);
    let created = snapshots.create(new).await;
    let created = created.map_err(|error| {
        let reason = error.errno.map_or(error.message, executor::reason);
        let what = format!("Failed to create snapshot '{name}' on device '{device}': {reason}");
        Error::generic(what)
    })?;
    tracing::info!(node = device, snapshot = name, "snapshot taken");
    let engine = Rc::downgrade(engine);
    Ok(Prepared::done(async move {
        // By name: the node may have been opened anew.
        let engine = engine.upgrade();
        let Some(node) = engine.and_then(|engine| engine.graph.node(&device)) else {
            return;
        };
        if let Some(snapshots) = node.driver().snapshots()
            && let Err(error) = snapshots.delete(&created.id).await
        {
            tracing::error!(node = node.name(), %error, "a snapshot stays");
        }
    }))
}

fn list(snapshots: &dyn Snapshots) -> Result<Vec<SnapshotInfo>> {
    let listed = snapshots.check();
    listed.map_err(|error| {
        Error::generic(format!("Failed to get a snapshot list: {}", error.message))
    })?;
    Ok(snapshots.list())
}

pub(crate) async fn delete(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    let Delete { device, id, name } = arguments.parse()?;
    let node = root_node(engine, &device)?;
    if id.is_none() && name.is_none() {
        return Err(Error::generic("Name or id must be provided"));
    }
    let Some(snapshots) = node.driver().snapshots() else {
        let what = "Failed to get a snapshot list: Operation not supported";
        return Err(Error::generic(what));
    };
    let selector = Selector {
        id: id.as_deref(),
        name: name.as_deref(),
    };
    let all = list(snapshots)?;
    let Some(found) = selector.find(&all) else {
        let text = |given: &Option<String>| given.clone().unwrap_or_else(|| "null".into());
        let what = format!(
            "Snapshot with id '{}' and name '{}' does not exist on device '{device}'",
            text(&id),
            text(&name)
        );
        return Err(Error::generic(what));
    };
    snapshots.delete(&found.id).await.map_err(|error| {
        let what = format!(
            "Failed to delete snapshot '{}' on device '{device}'",
            found.name
        );
        Error::generic(format!("{what}: {}", error.message))
    })?;
    tracing::info!(node = device, snapshot = found.name, "snapshot deleted");
    Ok(info(found))
}

/// `SnapshotInfo` of QEMU's QMP reference.
fn info(snapshot: &SnapshotInfo) -> Value {
    let mut info = Map::new();
    if let Some(icount) = snapshot.icount {
        info.insert("icount".into(), json!(icount));
    }
    let rest = json!({
        "vm-clock-nsec": snapshot.vm_clock_ns % NANOSECONDS,
        "name": snapshot.name,
        "date-sec": snapshot.date_seconds,
        "date-nsec": snapshot.date_ns,
        "vm-clock-sec": snapshot.vm_clock_ns / NANOSECONDS,
        "id": snapshot.id,
        "vm-state-size": snapshot.vm_state_size,
    });
    if let Value::Object(rest) = rest {
        info.extend(rest);
    }
    Value::Object(info)
}
