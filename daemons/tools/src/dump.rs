//! What a format tells of an image, for people.

use serde_json::Value;

/// The lines for an `ImageInfoSpecific` of QMP; none when there is nothing to tell.
pub fn specific(specific: &Value) -> String {
    let data = specific.get("data").unwrap_or(&Value::Null);
    members("Format specific information", data)
}

/// The members of `value` below a line with the title; nothing when there are none.
pub fn members(title: &str, value: &Value) -> String {
    let mut lines = String::new();
    nested(&mut lines, value, 1);
    match lines.is_empty() {
        true => lines,
        false => format!("{title}:\n{lines}"),
    }
}

/// The members of an object or array, one a line.
fn nested(out: &mut String, value: &Value, depth: usize) {
    match value {
        Value::Object(members) => {
            for (key, value) in members {
                entry(out, (&key.replace('-', " "), value), depth);
            }
        }
        Value::Array(items) => {
            for (index, value) in items.iter().enumerate() {
                entry(out, (&format!("[{index}]"), value), depth);
            }
        }
        _ => {}
    }
}

fn entry(out: &mut String, (name, value): (&str, &Value), depth: usize) {
    let indent = " ".repeat(4 * depth);
    let shown = match value {
        Value::String(text) => text.clone(),
        Value::Object(_) | Value::Array(_) => {
            out.push_str(&format!("{indent}{name}:\n"));
            return nested(out, value, depth + 1);
        }
        other => other.to_string(),
    };
    out.push_str(&format!("{indent}{name}: {shown}\n"));
}
