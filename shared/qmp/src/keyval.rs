//! `key=value` option strings: another spelling of a command's arguments.
//!
//! ```text
//!   driver=raw,node-name=a,,b,file.driver=file,server.0.host=x
//!   = {"driver": "raw", "node-name": "a,b", "file": {"driver": "file"}, "server": [{"host": "x"}]}
//! ```
//!
//! Dots nest, number fragments make arrays, `,,` is a comma inside a value, the last of equal keys
//! wins. An option may have an implied first key (`--object iothread,id=x` for
//! `qom-type=iothread,id=x`). A text that starts with `{` is JSON instead. All values of the
//! `key=value` form are strings; [`Arguments`] reads them as what each parameter is
//! ([`Syntax::KeyValue`]).

use crate::json::{self, MAX_NESTING};
use crate::{Arguments, Error, Result, Syntax};
use serde_json::{Map, Value};

/// Parses an option's argument. `implied_key` is the key of a first part without `=`.
pub fn parse(text: &str, implied_key: Option<&str>) -> Result<Arguments> {
    if text.starts_with('{') {
        return match json::parse(text)? {
            Value::Object(members) => Ok(Arguments::new(members, Syntax::Json)),
            _ => Err(Error::generic("expected a JSON object")),
        };
    }
    let mut root = Map::new();
    let mut rest = text;
    if let Some(implied_key) = implied_key {
        let end = rest.find([',', '=']).unwrap_or(rest.len());
        if end > 0 && !rest[end..].starts_with('=') {
            insert(&mut root, implied_key, &rest[..end])?;
            rest = rest[end..].strip_prefix(',').unwrap_or_default();
        }
    }
    while !rest.is_empty() {
        let end = rest.find([',', '=']).unwrap_or(rest.len());
        let key = &rest[..end];
        check_key(key)?;
        let Some(after) = rest[end..].strip_prefix('=') else {
            let what = format!("Expected '=' after parameter '{key}'");
            return Err(Error::generic(what));
        };
        let (value, next) = split_value(after);
        insert(&mut root, key, &value)?;
        rest = next;
    }
    let mut members = Map::new();
    for (key, value) in root {
        let value = with_arrays(value, &key)?;
        members.insert(key, value);
    }
    Ok(Arguments::new(members, Syntax::KeyValue))
}

/// Parses an option in QEMU's older spelling, in which keys do not nest, `key` alone is `key=on`
/// and `nowait` is `wait=off`.
pub fn parse_flags(text: &str, implied_key: Option<&str>) -> Result<Arguments> {
    let mut members = Map::new();
    let mut rest = text;
    let mut implied_key = implied_key;
    while !rest.is_empty() {
        let end = rest.find([',', '=']).unwrap_or(rest.len());
        let (key, after) = rest.split_at(end);
        let (key, value, next) = match (after.strip_prefix('='), implied_key.take()) {
            (Some(value), _) => {
                let (value, next) = split_value(value);
                (key, value, next)
            }
            (None, Some(implied_key)) => {
                let (value, next) = split_value(rest);
                (implied_key, value, next)
            }
            (None, None) => {
                let next = after.strip_prefix(',').unwrap_or_default();
                match key.strip_prefix("no").filter(|rest| *rest == "wait") {
                    Some(key) => (key, "off".to_owned(), next),
                    None => (key, "on".to_owned(), next),
                }
            }
        };
        members.insert(key.to_owned(), Value::String(value));
        rest = next;
    }
    Ok(Arguments::new(members, Syntax::KeyValue))
}

/// Splits off a value that ends at a single comma, and turns `,,` into `,`.
fn split_value(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut rest = text;
    loop {
        let Some(comma) = rest.find(',') else {
            value.push_str(rest);
            return (value, "");
        };
        value.push_str(&rest[..comma]);
        rest = &rest[comma + 1..];
        let Some(after) = rest.strip_prefix(',') else {
            return (value, rest);
        };
        value.push(',');
        rest = after;
    }
}

fn check_key(key: &str) -> Result<()> {
    let is_name = |fragment: &str| {
        fragment.starts_with(|c: char| c.is_ascii_alphabetic())
            && fragment
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    };
    let mut fragments = key.split('.');
    let named = fragments.next().is_some_and(is_name);
    let nested = fragments.all(|fragment| is_name(fragment) || array_index(fragment).is_some());
    if named && nested && key.split('.').count() <= MAX_NESTING {
        Ok(())
    } else {
        Err(Error::generic(format!("Invalid parameter '{key}'")))
    }
}

fn array_index(fragment: &str) -> Option<usize> {
    let canonical = fragment == "0" || !fragment.starts_with('0');
    let digits = fragment.bytes().all(|byte| byte.is_ascii_digit());
    fragment.parse().ok().filter(|_| canonical && digits)
}

fn insert(root: &mut Map<String, Value>, key: &str, value: &str) -> Result<()> {
    let mut branch = root;
    let mut start = 0;
    while let Some(length) = key[start..].find('.') {
        let path = &key[..start + length];
        let child = branch
            .entry(&key[start..start + length])
            .or_insert_with(|| Value::Object(Map::new()));
        branch = child.as_object_mut().ok_or_else(|| inconsistent(path))?;
        start += length + 1;
    }
    let leaf = branch.entry(&key[start..]).or_insert(Value::Null);
    if leaf.is_object() {
        return Err(inconsistent(key));
    }
    *leaf = Value::String(value.into());
    Ok(())
}

fn inconsistent(path: &str) -> Error {
    Error::generic(format!("Parameters '{path}.*' used inconsistently"))
}

/// Turns objects whose keys are 0, 1, 2 ... into arrays.
fn with_arrays(value: Value, path: &str) -> Result<Value> {
    let Value::Object(members) = value else {
        return Ok(value);
    };
    let mut named = Map::new();
    let mut indexed = Vec::new();
    for (key, value) in members {
        let value = with_arrays(value, &format!("{path}.{key}"))?;
        match array_index(&key) {
            Some(index) => indexed.push((index, value)),
            None => {
                named.insert(key, value);
            }
        }
    }
    if indexed.is_empty() {
        return Ok(Value::Object(named));
    }
    if !named.is_empty() {
        return Err(inconsistent(path));
    }
    indexed.sort_by_key(|(index, _)| *index);
    for (expected, (index, _)) in indexed.iter().enumerate() {
        if *index != expected {
            let what = format!("Parameter '{path}.{expected}' missing");
            return Err(Error::generic(what));
        }
    }
    Ok(indexed.into_iter().map(|(_, value)| value).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn value(text: &str, implied_key: Option<&str>) -> Result<Value> {
        Ok(Value::Object(parse(text, implied_key)?.into_members()))
    }

    fn error(text: &str) -> String {
        value(text, Some("driver")).unwrap_err().desc
    }

    #[test]
    fn flags_may_stand_alone() {
        let parsed =
            parse_flags("socket,path=a,,b,server,nowait,mux=off", Some("backend")).unwrap();
        let expected = serde_json::json!({
            "backend": "socket", "path": "a,b", "server": "on", "wait": "off", "mux": "off",
        });
        assert_eq!(Value::Object(parsed.into_members()), expected);
    }

    #[test]
    fn dots_nest_and_numbers_make_arrays() {
        let parsed = value(
            "raw,node-name=a,,b,file.driver=file,s.1.p=2,s.0=x",
            Some("driver"),
        );
        let expected = json!({
            "driver": "raw", "node-name": "a,b", "file": {"driver": "file"}, "s": ["x", {"p": "2"}],
        });
        assert_eq!(parsed.unwrap(), expected);
    }

    #[test]
    fn last_of_equal_keys_wins_and_json_is_taken_as_it_is() {
        assert_eq!(value("a=1,a=2,", None).unwrap(), json!({"a": "2"}));
        assert_eq!(value("{'a': 1}", None).unwrap(), json!({"a": 1}));
        assert_eq!(value("", Some("driver")).unwrap(), json!({}));
        assert_eq!(value("a==,b=", None).unwrap(), json!({"a": "=", "b": ""}));
    }

    #[test]
    fn errors_are_those_of_the_peer() {
        for (text, expected) in [
            ("null-co,size", "Expected '=' after parameter 'size'"),
            ("=x", "Invalid parameter ''"),
            ("5=3", "Invalid parameter '5'"),
            ("a..b=3", "Invalid parameter 'a..b'"),
            ("a.=3", "Invalid parameter 'a.'"),
            ("null-co,,x", "Invalid parameter ''"),
            ("a=1,a.b=2", "Parameters 'a.*' used inconsistently"),
            ("a.b=1,a=2", "Parameters 'a.*' used inconsistently"),
            ("a.0=1,a.x=3", "Parameters 'a.*' used inconsistently"),
            ("a.0=1,a.2=3", "Parameter 'a.1' missing"),
        ] {
            assert_eq!(error(text), expected, "{text}");
        }
    }

    #[test]
    fn endless_nesting_is_refused() {
        assert!(error(&format!("a{}=1", ".a".repeat(100_000))).starts_with("Invalid parameter"));
    }
}
