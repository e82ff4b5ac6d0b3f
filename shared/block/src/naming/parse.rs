//! From names to options.

use super::Reach;
use crate::error::{Error, ErrorKind, Result};
use crate::open::{DriverEntry, FILE_PROTOCOL};
use serde_json::{Map, Value};
use std::os::unix::fs::FileTypeExt;

/// What names of options begin with.
const JSON: &str = "json:";

/// The protocol of names that are devices of the host.
const DEVICE_PROTOCOL: &str = "host_device";

/// Deepest nesting of names inside names.
const MAX_DEPTH: usize = 16;

/// The drivers whose names are understood.
#[derive(Clone, Copy)]
pub struct Names<'d> {
    drivers: &'d [&'static DriverEntry],
    depth: usize,
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Invalid, message)
}

impl<'d> Names<'d> {
    pub(crate) fn new(drivers: &'d [&'static DriverEntry]) -> Self {
        Self { drivers, depth: 0 }
    }

    /// The options, `driver` included, of the protocol's node that `name` stands for. A name that
    /// begins with `json:` may stand for any node, and for one whose format is to be found out.
    ///
    /// # Errors
    /// `Invalid`: an unknown protocol, or a name that its protocol does not understand.
    pub fn options(&self, name: &str) -> Result<Map<String, Value>> {
        if let Some(text) = name.strip_prefix(JSON) {
            return members_of_json(text);
        }
        if self.depth > MAX_DEPTH {
            return Err(invalid("too many names inside each other"));
        }
        let inner = Names {
            depth: self.depth + 1,
            ..*self
        };
        let entry = self.protocol_of(name)?;
        let mut options = Map::from_iter([("driver".to_owned(), Value::from(entry.name))]);
        if let Some(protocol) = &entry.protocol {
            options.extend((protocol.parse)(&inner, name)?);
        }
        Ok(options)
    }

    /// The driver that opens `name`.
    fn protocol_of(&self, name: &str) -> Result<&'static DriverEntry> {
        let find = |driver: &str| self.drivers.iter().find(|entry| entry.name == driver);
        let missing = |prefix: &str| invalid(format!("Unknown protocol '{prefix}'"));
        let Some(prefix) = protocol_prefix(name) else {
            let device = is_device(name).then(|| find(DEVICE_PROTOCOL));
            let entry = device.flatten().or_else(|| find(FILE_PROTOCOL));
            return entry.copied().ok_or_else(|| missing(FILE_PROTOCOL));
        };
        let entry = self.drivers.iter().find(|entry| {
            let prefixes = entry.protocol.map_or(&[][..], |protocol| protocol.prefixes);
            prefixes.contains(&prefix)
        });
        entry.copied().ok_or_else(|| missing(prefix))
    }
}

impl Reach {
    /// What nodes of `entry` touch themselves.
    pub(crate) fn of(entry: &DriverEntry) -> Self {
        entry
            .protocol
            .map_or(Reach::Nothing, |protocol| protocol.reach)
    }
}

fn is_device(name: &str) -> bool {
    std::fs::metadata(name).is_ok_and(|metadata| {
        let kind = metadata.file_type();
        kind.is_block_device() || kind.is_char_device()
    })
}

/// What stands before a colon that comes before any slash.
fn protocol_prefix(name: &str) -> Option<&str> {
    let end = name.find([':', '/'])?;
    name[end..].starts_with(':').then(|| &name[..end])
}

/// Whether `name` says which protocol it is of.
pub fn has_protocol(name: &str) -> bool {
    protocol_prefix(name).is_some()
}

/// `name` as seen from the directory of the file that is called `base`. Names with a protocol and
/// absolute ones are not relative to anything.
pub fn combine(base: &str, name: &str) -> String {
    if name.starts_with('/') || has_protocol(name) {
        return name.to_owned();
    }
    let start = protocol_prefix(base).map_or(0, |prefix| prefix.len() + 1);
    let end = base[start..].rfind('/').map_or(start, |at| start + at + 1);
    format!("{}{name}", &base[..end])
}

/// The options in the JSON text behind `json:`, nested.
///
/// # Errors
/// `Invalid` when it is not an object.
pub fn members_of_json(text: &str) -> Result<Map<String, Value>> {
    match qmp::json::parse(text) {
        Ok(Value::Object(members)) => nested(members),
        Ok(_) => Err(invalid("Invalid JSON object given")),
        Err(error) => Err(invalid(format!(
            "Could not parse the JSON options: {}",
            error.desc
        ))),
    }
}

/// Turns `{"file.driver": "x"}` into `{"file": {"driver": "x"}}`.
///
/// # Errors
/// `Invalid` when a name has both a value and members.
pub fn nested(members: Map<String, Value>) -> Result<Map<String, Value>> {
    let mut result = Map::new();
    for (name, value) in members {
        let value = match value {
            Value::Object(members) => Value::Object(nested(members)?),
            other => other,
        };
        insert(&mut result, &name, value)?;
    }
    Ok(result
        .into_iter()
        .map(|(name, value)| (name, with_list(value)))
        .collect())
}

fn insert(members: &mut Map<String, Value>, name: &str, value: Value) -> Result<()> {
    let mixed = || invalid("Cannot mix scalar and non-scalar keys");
    let Some((first, rest)) = name.split_once('.') else {
        return match (members.get_mut(name), value) {
            (Some(Value::Object(known)), Value::Object(more)) => {
                known.extend(more);
                Ok(())
            }
            (Some(_), _) => Err(mixed()),
            (None, value) => {
                members.insert(name.to_owned(), value);
                Ok(())
            }
        };
    };
    let inner = members
        .entry(first)
        .or_insert_with(|| Value::Object(Map::new()));
    insert(inner.as_object_mut().ok_or_else(mixed)?, rest, value)
}

/// An object whose keys are 0, 1, ... is a list.
fn with_list(value: Value) -> Value {
    let Value::Object(members) = value else {
        return value;
    };
    let is_list = !members.is_empty()
        && (0..members.len()).all(|index| members.contains_key(&index.to_string()));
    let members = members
        .into_iter()
        .map(|(name, value)| (name, with_list(value)));
    if !is_list {
        return Value::Object(members.collect());
    }
    let mut items: Vec<(usize, Value)> = members
        .map(|(name, value)| (name.parse().unwrap_or(usize::MAX), value))
        .collect();
    items.sort_by_key(|(index, _)| *index);
    Value::Array(items.into_iter().map(|(_, value)| value).collect())
}

/// The leaves of nested options, with dots in their names.
pub fn flattened(options: &Map<String, Value>) -> Map<String, Value> {
    fn walk(value: &Value, name: &str, flat: &mut Map<String, Value>) {
        match value {
            Value::Object(members) if !members.is_empty() => {
                for (member, value) in members {
                    walk(value, &format!("{name}.{member}"), flat);
                }
            }
            Value::Array(items) if !items.is_empty() => {
                for (index, value) in items.iter().enumerate() {
                    walk(value, &format!("{name}.{index}"), flat);
                }
            }
            leaf => {
                flat.insert(name.to_owned(), leaf.clone());
            }
        }
    }
    let mut flat = Map::new();
    for (name, value) in options {
        walk(value, name, &mut flat);
    }
    flat
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn relative_names_are_seen_from_the_directory_of_the_base() {
        let cases = [
            ("/a/b", "c", "/a/c"),
            ("b", "c", "c"),
            ("a/b", "../c", "a/../c"),
            ("file:a/b", "c", "file:a/c"),
            ("/a/b", "/c", "/c"),
            ("/a/b", "nbd:x", "nbd:x"),
            ("/a/", "c", "/a/c"),
            ("proto:b", "c", "proto:c"),
        ];
        for (base, name, expected) in cases {
            assert_eq!(combine(base, name), expected, "{base} {name}");
        }
    }

    #[test]
    fn a_colon_behind_a_slash_is_no_protocol() {
        assert!(has_protocol("nbd:x") && has_protocol("a:") && has_protocol("json:{}"));
        assert!(!has_protocol("./nbd:x") && !has_protocol("/a:b") && !has_protocol("a"));
    }

    #[test]
    fn dotted_names_in_json_nest() {
        let text = r#"{"driver": "quorum", "children.0.driver": "raw", "children.0.file.filename": "a",
            "children.1": "node", "file": {"server.path": "p"}, "file.export": "x"}"#;
        let expected = json!({"driver": "quorum",
            "children": [{"driver": "raw", "file": {"filename": "a"}}, "node"],
            "file": {"server": {"path": "p"}, "export": "x"}});
        let members = members_of_json(text).unwrap();
        assert_eq!(Value::Object(members.clone()), expected);
        let flat = flattened(&members);
        assert_eq!(flat["children.0.file.filename"], json!("a"));
        assert_eq!(flat["file.server.path"], json!("p"));
        let error = members_of_json(r#"{"file": "a", "file.driver": "b"}"#).unwrap_err();
        assert_eq!(error.message, "Cannot mix scalar and non-scalar keys");
    }

    #[test]
    fn json_that_is_no_object_is_refused_in_the_peers_words() {
        let message = |text| members_of_json(text).unwrap_err().message;
        assert_eq!(message("[]"), "Invalid JSON object given");
        assert_eq!(
            message("{"),
            "Could not parse the JSON options: JSON parse error, premature EOI"
        );
        let deep = format!("{}1{}", "{\"a\":".repeat(2000), "}".repeat(2000));
        assert!(message(&deep).contains("nesting"), "no stack overflow");
    }

    #[test]
    fn an_unknown_protocol_is_named() {
        let error = Names::new(&[]).options("foo:bar").unwrap_err();
        assert_eq!(error.message, "Unknown protocol 'foo'");
    }
}
