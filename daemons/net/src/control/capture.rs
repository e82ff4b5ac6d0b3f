//! `capture-start`, `capture-stop`: a port's frames in pcapng files.

use std::rc::Rc;

use qmp::{Arguments, Error, Result, Value, json};
use serde::Deserialize;

use super::Netd;
use crate::capture::{CaptureOptions, CaptureState};

#[derive(Deserialize)]
struct Identity {
    id: String,
}

pub(super) async fn start(netd: &Rc<Netd>, mut arguments: Arguments) -> Result<Value> {
    let Identity { id } = arguments.take()?;
    let mut options: CaptureOptions = arguments.parse()?;
    let entry = netd.port(&id)?;
    let file = options.file.display().to_string();
    if let Ok(absolute) = std::path::absolute(&options.file) {
        options.file = absolute;
    }
    let started = entry.hooks().capture.start(&options, &id);
    started.map_err(|error| {
        let error = anyhow::Error::new(error).context(format!("capture to '{file}'"));
        netd.explained(&error, "name its directory with --allow-dir")
    })?;
    tracing::info!(port = id, file, "capture started");
    Ok(json!({}))
}

pub(super) async fn stop(netd: &Rc<Netd>, arguments: Arguments) -> Result<Value> {
    let Identity { id } = arguments.parse()?;
    let stopped = netd.port(&id)?.hooks().capture.stop();
    let none = || Error::generic(format!("port '{id}' has no capture"));
    let state = stopped.ok_or_else(none)?;
    tracing::info!(port = id, frames = state.written, "capture stopped");
    Ok(described(&state))
}

/// A capture in answers.
pub(super) fn described(state: &CaptureState) -> Value {
    let mut capture = json!({
        "file": state.file.display().to_string(),
        "frames": state.written,
        "lost": state.lost,
        "full": state.full,
    });
    if let Some(error) = &state.error {
        capture["error"] = json!(error);
    }
    capture
}
