//! `info` for people.

use serde_json::{Map, Value};
use tools::dump;
use tools::size::human;

/// The description of one image, from the members of QMP's `ImageInfo` in their order of display.
pub(crate) fn image(info: &Map<String, Value>) -> String {
    let text = |key: &str| info.get(key).and_then(Value::as_str).unwrap_or_default();
    let number = |key: &str| info.get(key).and_then(Value::as_u64);
    let is_set = |key: &str| info.get(key).and_then(Value::as_bool) == Some(true);
    let mut out = format!(
        "image: {}\nfile format: {}\n",
        text("filename"),
        text("format")
    );
    let virtual_size = number("virtual-size").unwrap_or_default();
    out.push_str(&format!(
        "virtual size: {} ({virtual_size} bytes)\n",
        human(virtual_size)
    ));
    let disk = number("actual-size").map_or("unavailable".to_owned(), human);
    out.push_str(&format!("disk size: {disk}\n"));
    if is_set("encrypted") {
        out.push_str("encrypted: yes\n");
    }
    if let Some(size) = number("cluster-size") {
        out.push_str(&format!("cluster_size: {size}\n"));
    }
    if is_set("dirty-flag") {
        out.push_str("cleanly shut down: no\n");
    }
    if info.contains_key("backing-filename") {
        let (name, full) = (text("backing-filename"), info.get("full-backing-filename"));
        out.push_str(&format!("backing file: {name}"));
        match full.and_then(Value::as_str) {
            None => out.push_str(" (cannot determine actual path)"),
            Some(full) if full != name => out.push_str(&format!(" (actual path: {full})")),
            Some(_) => {}
        }
        out.push('\n');
        if info.contains_key("backing-filename-format") {
            let format = text("backing-filename-format");
            out.push_str(&format!("backing file format: {format}\n"));
        }
    }
    if let Some(limits) = info.get("limits") {
        out.push_str(&dump::members("Block limits", limits));
    }
    if let Some(snapshots) = info.get("snapshots").and_then(Value::as_array) {
        out.push_str(&crate::snapshot::table(snapshots));
    }
    if let Some(specific) = info.get("format-specific") {
        out.push_str(&dump::specific(specific));
    }
    out
}
