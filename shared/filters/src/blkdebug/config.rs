//! Files of rules, in the style of git's configuration.
//!
//! ```text
//!   # a comment
//!   [inject-error]
//!   event = "l2_load"
//!   errno = "5"
//!   once = "on"
//!
//!   [set-state]
//!   event = "l2_load"
//!   state = "1"
//!   new_state = "2"
//! ```

use serde_json::{Map, Value};

/// Longest file in bytes.
pub(super) const MAX_BYTES: u64 = 1 << 20;

/// A section's name and members.
pub(super) type Section = (String, Map<String, Value>);

/// The sections of a file in order: their names and members.
pub(super) fn parse(text: &str) -> Result<Vec<Section>, String> {
    let mut sections: Vec<Section> = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        let failed = |what: &str| Err(format!("line {}: {what}", index + 1));
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(rest) = line.strip_prefix('[') {
            let Some(name) = rest.strip_suffix(']') else {
                return failed("a section's name has no end");
            };
            let name = name.split_whitespace().next().unwrap_or_default();
            if !["inject-error", "set-state"].contains(&name) {
                return failed(&format!("there is no group '{name}'"));
            }
            sections.push((name.to_owned(), Map::new()));
            continue;
        }
        let Some((_, members)) = sections.last_mut() else {
            return failed("no group defined");
        };
        let Some((name, value)) = line.split_once('=') else {
            return failed("parse error");
        };
        let value = value.trim();
        let quoted = value
            .strip_prefix('"')
            .and_then(|rest| rest.strip_suffix('"'));
        let Some(value) = quoted else {
            return failed("a value is not in quotes");
        };
        members.insert(name.trim().to_owned(), Value::from(value));
    }
    Ok(sections)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn sections_hold_quoted_values() {
        let text = "\n# x\n[inject-error]\nevent = \"l2_load\"\n errno=\"5\"\n[set-state]\n[inject-error \"a\"]\n";
        let sections = parse(text).unwrap();
        let names: Vec<_> = sections.iter().map(|(name, _)| &name[..]).collect();
        assert_eq!(names, ["inject-error", "set-state", "inject-error"]);
        let expected = json!({"event": "l2_load", "errno": "5"});
        assert_eq!(Value::Object(sections[0].1.clone()), expected);
    }

    #[test]
    fn what_is_not_a_section_or_a_value_is_named_by_its_line() {
        for (text, line) in [
            ("x = \"1\"", 1),
            ("[foo]", 1),
            ("[set-state]\nx", 2),
            ("[set-state]\nx = 1", 2),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.starts_with(&format!("line {line}:")), "{error}");
        }
    }
}
