//! `-o name=value,...`: the options of `create` and `amend`.

use crate::failure::Failure;
use crate::size;
use block::create::{OptionKind, OptionSpec};
use serde_json::{Map, Value, json};

/// Options as they were given, the last of equal names.
#[derive(Clone, Debug, Default)]
pub struct Given(Vec<(String, Value, String)>);

/// The value of one `-o`: lists of several are joined, so none may begin or end with a comma that
/// separates.
///
/// # Errors
/// A message that shows the list.
pub fn list(text: String) -> Result<String, Failure> {
    let commas_at_end = text.len() - text.trim_end_matches(',').len();
    match text.is_empty() || text.starts_with(',') || commas_at_end % 2 == 1 {
        true => Err(Failure::message(format!("Invalid option list: {text}"))),
        false => Ok(text),
    }
}

/// Whether `-o` asks what there is.
pub fn asks_for_help(text: &str) -> bool {
    split(text).any(|part| part == "help" || part == "?")
}

/// Parts at single commas; `,,` is a comma inside a value.
fn split(text: &str) -> impl Iterator<Item = String> {
    let mut rest = Some(text);
    std::iter::from_fn(move || {
        let mut text = rest?;
        let mut part = String::new();
        loop {
            match text.find(',') {
                None => {
                    part.push_str(text);
                    rest = None;
                    return Some(part);
                }
                Some(at) if text[at + 1..].starts_with(',') => {
                    part.push_str(&text[..=at]);
                    text = &text[at + 2..];
                }
                Some(at) => {
                    part.push_str(&text[..at]);
                    rest = Some(&text[at + 1..]).filter(|text| !text.is_empty());
                    return Some(part);
                }
            }
        }
    })
}

impl Given {
    /// Adds the options in `text`.
    pub fn parse(&mut self, text: &str, known: &[&OptionSpec]) -> Result<(), String> {
        for part in split(text) {
            let (name, value) = match part.split_once('=') {
                Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
                None => (part, None),
            };
            match value {
                Some(value) => self.set(known, &name, &value)?,
                // A bare name turns a switch on, and one that begins with "no" turns it off.
                None => match name.strip_prefix("no") {
                    Some(name) => self.set(known, name, "off")?,
                    None => self.set(known, &name, "on")?,
                },
            }
        }
        Ok(())
    }

    /// Sets one option.
    pub fn set(&mut self, known: &[&OptionSpec], name: &str, value: &str) -> Result<(), String> {
        let spec = known
            .iter()
            .find(|spec| spec.name == name)
            .ok_or_else(|| format!("Invalid parameter '{name}'"))?;
        let typed = typed(spec, value)?;
        self.0.retain(|(known, ..)| known != name);
        self.0.push((name.to_owned(), typed, value.to_owned()));
        Ok(())
    }

    /// The text of a given option.
    pub fn text(&self, name: &str) -> Option<&str> {
        let found = self.0.iter().find(|(known, ..)| known == name);
        found.map(|(_, _, text)| text.as_str())
    }

    /// The value of a given number or size.
    pub fn number(&self, name: &str) -> Option<u64> {
        let found = self.0.iter().find(|(known, ..)| known == name);
        found.and_then(|(_, value, _)| value.as_u64())
    }

    /// ` name=value` for each option that is given or has a default.
    pub fn shown(&self, known: &[&OptionSpec]) -> String {
        let mut line = String::new();
        for spec in known {
            let given = self.0.iter().find(|(name, ..)| name == spec.name);
            let value = match given {
                Some((_, Value::Number(number), _)) => number.to_string(),
                Some((_, Value::Bool(on), _)) => if *on { "on" } else { "off" }.to_owned(),
                Some((_, _, text)) => quoted(text),
                None => match spec.default {
                    Some(value) => value.to_owned(),
                    None => continue,
                },
            };
            line.push_str(&format!(" {}={value}", spec.name));
        }
        line
    }

    /// The options that were given as QMP's object.
    pub fn members(&self, known: &[&OptionSpec]) -> Map<String, Value> {
        let mut root = Map::new();
        for spec in known {
            let Some((_, value, _)) = self.0.iter().find(|(name, ..)| name == spec.name) else {
                continue;
            };
            let alias = spec
                .aliases
                .iter()
                .find(|(old, _)| value.as_str() == Some(old));
            let value = alias.map_or_else(|| value.clone(), |(_, new)| json!(new));
            let mut branch = &mut root;
            let mut path = spec.member;
            while let Some((parent, below)) = path.split_once('.') {
                let child = branch
                    .entry(parent)
                    .or_insert_with(|| Value::Object(Map::new()));
                branch = child.as_object_mut().expect("a parent is never a value");
                path = below;
            }
            branch.insert(path.to_owned(), value);
        }
        root
    }
}

/// Commas in a value are doubled.
fn quoted(text: &str) -> String {
    text.replace(',', ",,")
}

fn typed(spec: &OptionSpec, value: &str) -> Result<Value, String> {
    let name = spec.name;
    match spec.kind {
        OptionKind::Text => Ok(json!(value)),
        OptionKind::Switch => match value {
            "on" => Ok(json!(true)),
            "off" => Ok(json!(false)),
            _ => Err(format!("Parameter '{name}' expects 'on' or 'off'")),
        },
        OptionKind::Number => {
            let number =
                number(value).ok_or_else(|| format!("Parameter '{name}' expects a number"))?;
            let number = number
                .map_err(|_| format!("Value '{value}' is too large for parameter '{name}'"))?;
            Ok(json!(number))
        }
        OptionKind::Size => match size::parse(value) {
            Ok(bytes) => Ok(json!(bytes)),
            Err(error) => Err(size::option_error(name, value, error)),
        },
    }
}

/// A number as C's `strtoull` reads it: octal after `0`, hexadecimal after `0x`, and a negative one
/// stands for its two's complement.
fn number(text: &str) -> Option<Result<u64, std::num::ParseIntError>> {
    let text = text.trim_start_matches(|c: char| c.is_ascii_whitespace());
    let (is_negative, text) = match (text.strip_prefix('-'), text.strip_prefix('+')) {
        (Some(rest), _) => (true, rest),
        (None, Some(rest)) => (false, rest),
        (None, None) => (false, text),
    };
    let (digits, radix) = match (text.strip_prefix("0x"), text.strip_prefix('0')) {
        (Some(digits), _) => (digits, 16),
        (None, Some(digits)) if !digits.is_empty() => (digits, 8),
        _ => (text, 10),
    };
    if digits.is_empty() || !digits.chars().all(|c| c.is_digit(radix)) {
        return None;
    }
    let number = u64::from_str_radix(digits, radix);
    Some(number.map(|number| match is_negative {
        true => number.wrapping_neg(),
        false => number,
    }))
}

/// The list that `-o help` prints, one line each.
pub fn help(known: &[&OptionSpec]) -> String {
    let mut sorted = known.to_vec();
    sorted.sort_by_key(|spec| spec.name);
    let lines = sorted.into_iter().map(|spec| {
        let kind = match spec.kind {
            OptionKind::Text => "str",
            OptionKind::Switch => "bool (on/off)",
            OptionKind::Number => "num",
            OptionKind::Size => "size",
        };
        let name = format!("{}=<{kind}>", spec.name);
        format!("  {name:<22} - {}\n", spec.help)
    });
    lines.collect()
}

/// A failure whose message begins with the image's name.
pub fn of_image(name: &str, message: &str) -> Failure {
    Failure::message(format!("{name}: {message}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPECS: [OptionSpec; 4] = [
        OptionSpec::new(("encrypt.format", "encrypt.format"), OptionKind::Text, ""),
        OptionSpec::new(("compat", "version"), OptionKind::Text, "").with_aliases(&[("1.1", "v3")]),
        OptionSpec::new(("lazy", "lazy-refcounts"), OptionKind::Switch, "").with_default("off"),
        OptionSpec::new(("size", "size"), OptionKind::Size, ""),
    ];

    #[test]
    fn options_become_members_of_nested_objects() {
        let known: Vec<_> = SPECS.iter().collect();
        let mut given = Given::default();
        given
            .parse("size=1k,encrypt.format=a,,b,compat=1.1,lazy", &known)
            .unwrap();
        let expected = json!({"encrypt": {"format": "a,b"}, "version": "v3", "lazy-refcounts": true, "size": 1024});
        assert_eq!(Value::Object(given.members(&known)), expected);
        assert_eq!(
            given.shown(&known),
            " encrypt.format=a,,b compat=1.1 lazy=on size=1024"
        );
    }

    #[test]
    fn mistakes_have_the_words_of_the_peer() {
        let known: Vec<_> = SPECS.iter().collect();
        let error = |text: &str| Given::default().parse(text, &known).unwrap_err();
        assert_eq!(error("foo=1"), "Invalid parameter 'foo'");
        assert_eq!(
            error("lazy=maybe"),
            "Parameter 'lazy' expects 'on' or 'off'"
        );
        assert_eq!(error("nocow"), "Invalid parameter 'cow'");
        assert!(error("size").starts_with("Parameter 'size' expects a non-negative number"));
    }
}
