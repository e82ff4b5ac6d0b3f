//! `-s`: an image whose changes go to a temporary overlay, which is gone when it is closed.

use block::create::Target;
use block::{Error, ErrorKind};
use serde_json::{Map, Value, json};
use std::path::PathBuf;
use tools::image::Tool;

/// Where temporary files are made unless `TMPDIR` says otherwise: they may be large.
const DIRECTORY: &str = "/var/tmp";

/// What the image below a temporary overlay is called.
const BASE: &str = "snapshot-base";

/// The options of a temporary overlay over the image that `options` open.
pub(crate) async fn overlay(
    tool: &Tool,
    mut options: Map<String, Value>,
) -> Result<Map<String, Value>, Error> {
    let name = options.insert("node-name".to_owned(), json!(BASE));
    options.insert("read-only".to_owned(), json!(true));
    let base = tool.graph().add(options).await?;
    let failed = |error: std::io::Error| {
        let message = format!("Could not create a temporary file: {error}");
        Error::new(ErrorKind::Io, message)
    };
    let directory = std::env::var_os("TMPDIR").map_or_else(|| DIRECTORY.into(), PathBuf::from);
    let file = tempfile::Builder::new()
        .prefix("outboard-io.")
        .tempfile_in(directory);
    let file = file.map_err(failed)?;
    let path = file.path().to_string_lossy().into_owned();
    let members = json!({"size": base.length().next_multiple_of(512)});
    let members = members.as_object().cloned().unwrap_or_default();
    let graph = tool.graph();
    graph
        .create("qcow2", Target::Name(path.clone()), members)
        .await?;
    // The node keeps the file open; its name is not needed any more.
    let protocol = json!({"driver": "file", "filename": path, "node-name": "snapshot-file"});
    graph
        .add(protocol.as_object().cloned().unwrap_or_default())
        .await?;
    drop(file);
    let overlay =
        json!({"driver": "qcow2", "file": "snapshot-file", "backing": BASE, "discard": "unmap"});
    let mut overlay = overlay.as_object().cloned().unwrap_or_default();
    overlay.insert(
        "node-name".to_owned(),
        name.unwrap_or_else(|| json!("snapshot")),
    );
    Ok(overlay)
}
