//! Options of one node: typed JSON from QMP, or strings from `key=value`, with QEMU's messages.

use super::ChildRole;
use crate::error::{Error, ErrorKind, Result};
use crate::naming::{Origin, flattened};
use crate::node::{DetectZeroes, Discard, NodeOptions};
use serde_json::{Map, Value};

/// Longest node name, in bytes.
const MAX_NODE_NAME: usize = 31;

fn invalid(message: String) -> Error {
    Error::new(ErrorKind::Invalid, message)
}

/// The options not taken yet, and where they stand in the whole definition.
pub(crate) struct Options {
    values: Map<String, Value>,
    path: String,
}

impl Options {
    pub(crate) fn new(values: Map<String, Value>, path: String) -> Self {
        Self { values, path }
    }

    /// The names of what nobody took, down to the leaves ("server.path").
    pub(crate) fn left(&self) -> Vec<String> {
        flattened(&self.values).keys().cloned().collect()
    }

    /// An error for the first option that nobody took.
    pub(crate) fn finish(&self) -> Result<()> {
        match self.values.keys().next() {
            None => Ok(()),
            Some(name) => Err(invalid(format!(
                "Parameter '{}{name}' is unexpected",
                self.path
            ))),
        }
    }

    pub(crate) fn missing(&self, name: &str) -> Error {
        invalid(format!("Parameter '{}{name}' is missing", self.path))
    }

    pub(crate) fn wrong_type(&self, name: &str, expected: &str) -> Error {
        invalid(format!(
            "Invalid parameter type for '{}{name}', expected: {expected}",
            self.path
        ))
    }

    fn wrong_value(name: &str, value: &str) -> Error {
        invalid(format!(
            "Parameter '{name}' does not accept value '{value}'"
        ))
    }

    fn expects(&self, name: &str, expected: &str) -> Error {
        invalid(format!(
            "Parameter '{}{name}' expects {expected}",
            self.path
        ))
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.values.contains_key(name)
    }

    pub(crate) fn get(&self, name: &str) -> Option<&Value> {
        self.values.get(name)
    }

    pub(crate) fn get_mut(&mut self, name: &str) -> Option<&mut Value> {
        self.values.get_mut(name)
    }

    pub(crate) fn put(&mut self, name: &str, value: Value) {
        self.values.insert(name.to_owned(), value);
    }

    pub(crate) fn take(&mut self, name: &str) -> Option<Value> {
        self.values.shift_remove(name)
    }

    pub(crate) fn take_str(&mut self, name: &str) -> Result<Option<String>> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(value)) => Ok(Some(value)),
            Some(_) => Err(self.wrong_type(name, "string")),
        }
    }

    pub(crate) fn take_bool(&mut self, name: &str) -> Result<Option<bool>> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(Value::String(value)) => match value.as_str() {
                "on" => Ok(Some(true)),
                "off" => Ok(Some(false)),
                _ => Err(self.expects(name, "'on' or 'off'")),
            },
            Some(_) => Err(self.wrong_type(name, "boolean")),
        }
    }

    pub(crate) fn take_size(&mut self, name: &str) -> Result<Option<u64>> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Number(value)) => match value.as_u64() {
                Some(value) => Ok(Some(value)),
                None => Err(self.expects(name, "a non-negative number below 2^64")),
            },
            Some(Value::String(value)) => match parse_size(&value) {
                Some(value) => Ok(Some(value)),
                None => {
                    Err(self.expects(name, "a size in bytes, or with suffix k, M, G, T, P or E"))
                }
            },
            Some(_) => Err(self.wrong_type(name, "integer")),
        }
    }

    pub(crate) fn take_int(&mut self, name: &str) -> Result<Option<i64>> {
        match self.take(name) {
            None => Ok(None),
            // As in QEMU a number beyond is a negative one.
            Some(Value::Number(value)) => match value
                .as_i64()
                .or_else(|| value.as_u64().map(u64::cast_signed))
            {
                Some(value) => Ok(Some(value)),
                None => Err(self.wrong_type(name, "integer")),
            },
            Some(Value::String(value)) => match value.parse() {
                Ok(value) => Ok(Some(value)),
                Err(_) => Err(self.expects(name, "integer")),
            },
            Some(_) => Err(self.wrong_type(name, "integer")),
        }
    }

    pub(crate) fn take_choice(&mut self, name: &str, values: &[&str]) -> Result<Option<usize>> {
        let Some(value) = self.take_str(name)? else {
            return Ok(None);
        };
        match values.iter().position(|known| *known == value) {
            Some(index) => Ok(Some(index)),
            None => Err(Self::wrong_value(name, &value)),
        }
    }

    pub(crate) fn take_driver(&mut self) -> Result<String> {
        self.take_str("driver")?
            .ok_or_else(|| self.missing("driver"))
    }

    pub(crate) fn unknown_driver(driver: &str) -> Error {
        Self::wrong_value("driver", driver)
    }

    /// Takes the options that every node has, apart from its name.
    pub(crate) fn take_node(&mut self, inherited: Inherited) -> Result<NodeOptions> {
        let (cache_direct, cache_no_flush) = self.take_cache(inherited)?;
        let node = NodeOptions {
            node_name: String::new(),
            read_only: self.take_bool("read-only")?.unwrap_or(inherited.read_only),
            auto_read_only: self
                .take_bool("auto-read-only")?
                .unwrap_or(inherited.auto_read_only),
            cache_direct,
            cache_no_flush,
            discard: match self.take_choice("discard", &["ignore", "unmap", "off", "on"])? {
                None => inherited.discard,
                Some(0 | 2) => Discard::Ignore,
                Some(_) => Discard::Unmap,
            },
            detect_zeroes: match self.take_choice("detect-zeroes", &["off", "on", "unmap"])? {
                None | Some(0) => DetectZeroes::Off,
                Some(1) => DetectZeroes::On,
                Some(_) => DetectZeroes::Unmap,
            },
            force_share: self
                .take_bool("force-share")?
                .unwrap_or(inherited.force_share),
            origin: Origin::default(),
        };
        if node.detect_zeroes == DetectZeroes::Unmap && node.discard != Discard::Unmap {
            return Err(invalid(
                "setting detect-zeroes to unmap is not allowed without setting discard operation \
                 to unmap"
                    .to_owned(),
            ));
        }
        if node.force_share && !node.read_only {
            return Err(invalid(
                "force-share=on can only be used with read-only images".to_owned(),
            ));
        }
        Ok(node)
    }

    fn take_cache(&mut self, inherited: Inherited) -> Result<(bool, bool)> {
        let values = match self.take("cache") {
            None => Map::new(),
            Some(Value::Object(values)) => values,
            Some(_) => return Err(self.wrong_type("cache", "object")),
        };
        let mut cache = Options::new(values, format!("{}cache.", self.path));
        let direct = cache.take_bool("direct")?;
        let no_flush = cache.take_bool("no-flush")?;
        cache.finish()?;
        Ok((
            direct.unwrap_or(inherited.cache_direct),
            no_flush.unwrap_or(inherited.cache_no_flush),
        ))
    }

    /// Takes and checks `node-name`.
    pub(crate) fn take_node_name(&mut self) -> Result<Option<String>> {
        let Some(name) = self.take_str("node-name")? else {
            return Ok(None);
        };
        let mut bytes = name.bytes();
        let well_formed = bytes.next().is_some_and(|b| b.is_ascii_alphabetic())
            && bytes.all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b));
        if !well_formed {
            return Err(invalid(format!("Invalid node-name: '{name}'")));
        }
        if name.len() > MAX_NODE_NAME {
            return Err(invalid("Node name too long".to_owned()));
        }
        Ok(Some(name))
    }
}

/// Defaults of a node's options.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Inherited {
    read_only: bool,
    auto_read_only: bool,
    cache_direct: bool,
    cache_no_flush: bool,
    force_share: bool,
    discard: Discard,
}

impl Inherited {
    /// What a file that is being made has.
    pub(crate) fn for_new() -> Self {
        Self {
            discard: Discard::Unmap,
            ..Self::default()
        }
    }

    /// The same for a node that is written to, or not.
    pub(crate) fn with_read_only(self, read_only: bool) -> Self {
        Self { read_only, ..self }
    }

    /// Whether the node is only read.
    pub(crate) fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// What an inline child in `role` gets from its parent.
    pub(crate) fn of(parent: &NodeOptions, role: ChildRole) -> Self {
        let backing = role == ChildRole::Backing;
        Self {
            read_only: parent.read_only || backing,
            auto_read_only: parent.auto_read_only && !backing,
            cache_direct: parent.cache_direct,
            cache_no_flush: parent.cache_no_flush,
            force_share: parent.force_share,
            discard: Discard::Unmap,
        }
    }
}

/// A number with an optional binary suffix, and before that a fraction.
fn parse_size(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match &text[digits.len()..] {
        "" | "b" | "B" => 0,
        "k" | "K" => 10,
        "M" | "m" => 20,
        "G" | "g" => 30,
        "T" | "t" => 40,
        "P" | "p" => 50,
        "E" | "e" => 60,
        _ => return None,
    };
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, "0"));
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    if !is_number(whole) || !is_number(fraction) {
        return None;
    }
    let part: f64 = format!("0.{fraction}").parse().ok()?;
    if shift == 0 && part != 0.0 {
        return None;
    }
    let bytes = whole.parse::<u64>().ok()?.checked_mul(1 << shift)?;
    bytes.checked_add((part * (1_u64 << shift) as f64).round() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_binary_suffixes_and_a_limit() {
        assert_eq!(parse_size("0"), Some(0));
        assert_eq!(parse_size("64k"), Some(65536));
        assert_eq!(parse_size("1G"), Some(1 << 30));
        assert_eq!(parse_size("15E"), Some(15 << 60));
        assert_eq!(parse_size("1.25M"), Some(5 << 18));
        for bad in [
            "",
            "k",
            "0.5",
            ".5k",
            "-1",
            "+1",
            "1x",
            "1kk",
            "16E",
            "18446744073709551616",
            "0x10",
        ] {
            assert_eq!(parse_size(bad), None, "{bad}");
        }
    }
}
