//! The node that is served.

use crate::options::ImageOptions;
use block::create::Target;
use block::snapshot::{self, Selector};
use block::{Node, NodeOptions};
use serde_json::{Map, Value, json};
use std::path::Path;
use std::sync::Arc;
use tools::failure::{Failure, described};
use tools::image::{Access, ImageSpec, Opening, Sharing, Tool, warn_of_guess};

/// What is served.
pub(crate) struct Served {
    pub(crate) node: Arc<Node>,
    /// The smallest request, in bytes: a sector where the format was only guessed to be raw.
    pub(crate) minimum_block: u32,
}

const SECTOR: u32 = 512;

/// Opens the image as the command line asks.
pub(crate) async fn open(tool: &Tool, image: &ImageOptions) -> Result<Served, Failure> {
    for directory in &image.allowed_dirs {
        tool.allow_dir(directory);
    }
    let options = node_options(tool, image).map_err(|error| not_opened(image, &error))?;
    let guessed = !options.contains_key("driver");
    let opened = add(tool, options).await;
    let mut node = opened.map_err(|error| not_opened(image, &error))?;
    let raw = node.driver().driver_name() == "raw";
    if guessed {
        warn_of_guess(&node);
    }
    if image.temporary_overlay {
        let overlay = overlay(tool, node).await;
        node = overlay.map_err(|error| not_opened(image, &error))?;
    }
    if let Some(wanted) = &image.snapshot {
        node = load_snapshot(&node, wanted).await?;
    }
    if image.offset > 0 {
        node = offset(tool, node, image.offset).await?;
    }
    Ok(Served {
        node,
        minimum_block: if guessed && raw { SECTOR } else { 1 },
    })
}

fn not_opened(image: &ImageOptions, error: &block::Error) -> Failure {
    let what = format!("Failed to blk_new_open '{}'", image.name);
    Failure::message(described(&what, error))
}

fn node_options(tool: &Tool, image: &ImageOptions) -> Result<Map<String, Value>, block::Error> {
    let spec = ImageSpec {
        name: image.name.clone(),
        format: image.format.clone(),
        notation: image.notation,
    };
    let reads = image.read_only || image.temporary_overlay;
    let how = Opening {
        access: if reads { Access::Read } else { Access::Write },
        sharing: Sharing::Locked,
        cache: image.cache,
    };
    let mut options = tool.node_options(&spec, how)?;
    let discard = options.entry("discard");
    discard.or_insert(json!(image.discard));
    let detect = options.entry("detect-zeroes");
    detect.or_insert(json!(image.detect_zeroes));
    Ok(options)
}

async fn add(tool: &Tool, options: Map<String, Value>) -> Result<Arc<Node>, block::Error> {
    tool.graph().add(options).await
}

/// A temporary overlay for the writes. It has no name any more once it is open.
async fn overlay(tool: &Tool, node: Arc<Node>) -> Result<Arc<Node>, block::Error> {
    let failed = |error: std::io::Error| {
        let errno = block::Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
        block::Error::io("Could not create temporary overlay", errno)
    };
    let directory = std::env::var_os("TMPDIR").unwrap_or_else(|| "/var/tmp".into());
    let file = tempfile::Builder::new()
        .prefix("outboard-overlay-")
        .tempfile_in(Path::new(&directory))
        .map_err(failed)?;
    let path = file.path().to_string_lossy().into_owned();
    let members = json!({"size": node.length().next_multiple_of(u64::from(SECTOR))});
    let Value::Object(members) = members else {
        return Ok(node);
    };
    let target = Target::Name(path.clone());
    tool.graph().create("qcow2", target, members).await?;
    let definition = json!({
        "driver": "qcow2",
        "node-name": "overlay",
        "file": {"driver": "file", "filename": path, "cache": {"no-flush": true}},
        "backing": node.name(),
        "discard": "unmap",
    });
    drop(node);
    match definition {
        Value::Object(definition) => add(tool, definition).await,
        _ => Err(block::Error::new(block::ErrorKind::Invalid, "no options")),
    }
}

/// The disk as it was when a snapshot was taken.
async fn load_snapshot(node: &Arc<Node>, wanted: &str) -> Result<Arc<Node>, Failure> {
    let failed =
        |error: &block::Error| Failure::message(described("Failed to load snapshot", error));
    let Some(snapshots) = node.driver().snapshots() else {
        let message = "Failed to load snapshot: Can't find snapshot";
        return Err(Failure::message(message));
    };
    let list = snapshots.list();
    let found = match selector(wanted)? {
        Some((id, name)) => Selector {
            id: id.as_deref(),
            name: name.as_deref(),
        }
        .find(&list),
        None => snapshot::find_by_id_or_name(&list, wanted),
    };
    let Some(found) = found else {
        let message = "Failed to load snapshot: Can't find snapshot";
        return Err(Failure::message(message));
    };
    let driver = snapshots
        .open(&found.id)
        .await
        .map_err(|error| failed(&error))?;
    let options = NodeOptions {
        node_name: "snapshot".to_owned(),
        read_only: true,
        ..node.options().clone()
    };
    Ok(Node::new(options, driver))
}

type IdAndName = (Option<String>, Option<String>);

/// `snapshot.id=...,snapshot.name=...`; `None` for a plain text.
fn selector(text: &str) -> Result<Option<IdAndName>, Failure> {
    if !text.starts_with("snapshot.") {
        return Ok(None);
    }
    let parsed = qmp::keyval::parse(text, None);
    let invalid = || Failure::message(format!("Failed to parse snapshot parameter '{text}'"));
    let mut members = parsed.map_err(|_| invalid())?.into_members();
    let Some(Value::Object(mut snapshot)) = members.remove("snapshot") else {
        return Err(invalid());
    };
    let mut take = |name: &str| match snapshot.remove(name) {
        Some(Value::String(text)) => Some(text),
        _ => None,
    };
    let found = (take("id"), take("name"));
    match snapshot.is_empty() && members.is_empty() {
        true => Ok(Some(found)),
        false => Err(invalid()),
    }
}

/// The part of a node from `offset` on.
async fn offset(tool: &Tool, node: Arc<Node>, offset: u64) -> Result<Arc<Node>, Failure> {
    let length = node.length();
    if offset > length {
        return Err(Failure::message(format!(
            "Offset ({offset}) cannot be greater than size of the containing file ({length})"
        )));
    }
    let definition = json!({
        "driver": "raw",
        "node-name": "part",
        "read-only": node.options().read_only,
        "discard": "unmap",
        "offset": offset,
        "file": node.name(),
    });
    drop(node);
    let Value::Object(definition) = definition else {
        return Err(Failure::Silent(1));
    };
    let added = add(tool, definition).await;
    added.map_err(|error| Failure::message(error.message))
}
