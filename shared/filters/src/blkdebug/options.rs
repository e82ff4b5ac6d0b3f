//! The rules in the options of a node.

use super::config;
use super::rules::{Action, Injection, Kind, Rule, Rules};
use block::debug::Event;
use block::edge::{Beyond, Permissions};
use block::error::{Error, ErrorKind, Result, reason};
use block::naming::Names;
use block::{Errno, OpenRequest};
use serde_json::{Map, Value};
use std::fs::File;
use std::io::Read;

/// Bytes of a sector, which places of errors are counted in.
const SECTOR: u64 = 512;

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Invalid, message)
}

/// The options for `blkdebug:CONFIG:IMAGE`; the name of the rules' file may be empty.
///
/// # Errors
/// `Invalid` when there is no image; what its name answers.
pub(super) fn parse_filename(names: &Names<'_>, name: &str) -> Result<Map<String, Value>> {
    let rest = name.split_once(':').map_or("", |(_, rest)| rest);
    let Some((config, image)) = rest.split_once(':') else {
        return Err(invalid("blkdebug requires both config file and image path"));
    };
    let mut options = Map::new();
    if !config.is_empty() {
        options.insert("config".to_owned(), config.into());
    }
    options.insert("image".to_owned(), names.options(image)?.into());
    Ok(options)
}

/// A `filename` beside the other options is that of the image, whose own options may be given.
///
/// # Errors
/// What the name answers.
pub(super) fn take_filename(request: &mut OpenRequest<'_>) -> Result<()> {
    let Some(name) = request.take_str("filename")? else {
        return Ok(());
    };
    let image = match request.take("image") {
        Some(Value::Object(mut image)) if image.contains_key("driver") => {
            image.insert("filename".to_owned(), name.into());
            image
        }
        Some(Value::Object(given)) => {
            let mut image = request.names().options(&name)?;
            image.extend(given);
            image
        }
        None => request.names().options(&name)?,
        Some(_) => return Err(invalid("an image is named twice")),
    };
    request.give("image", image.into());
    Ok(())
}

/// Takes what is claimed of the child besides.
pub(super) fn take_permissions(request: &mut OpenRequest<'_>) -> Result<Beyond> {
    Ok(Beyond {
        takes: permissions("take-child-perms", request)?,
        refuses: permissions("unshare-child-perms", request)?,
    })
}

/// A list of permissions.
fn permissions(name: &str, request: &mut OpenRequest<'_>) -> Result<Permissions> {
    let items: Vec<Value> = match request.take(name) {
        None => Vec::new(),
        Some(Value::Array(items)) => items,
        Some(_) => return Err(wrong_type(name, "array")),
    };
    let mut sum = Permissions::NONE;
    for item in items {
        let Value::String(item) = item else {
            return Err(wrong_type(name, "string"));
        };
        let unknown = |_| invalid(format!("Parameter '{name}' does not accept value '{item}'"));
        sum = sum.union(item.parse().map_err(unknown)?);
    }
    Ok(sum)
}

/// Takes all rules.
pub(super) fn take_rules(request: &mut OpenRequest<'_>, rules: &mut Rules) -> Result<()> {
    if let Some(path) = request.take_str("config")?
        && !path.is_empty()
    {
        request.only_for_users("a file of rules")?;
        for (name, members) in read(&path)? {
            rules.add(rule(&name, members)?);
        }
    }
    for name in ["inject-error", "set-state"] {
        for members in list(name, request.take(name))? {
            rules.add(rule(name, members)?);
        }
    }
    Ok(())
}

fn read(path: &str) -> Result<Vec<config::Section>> {
    let failed = |error: std::io::Error| {
        let errno = Errno::from_raw(error.raw_os_error().unwrap_or(Errno::EIO as i32));
        invalid(format!(
            "Could not read blkdebug config file: {}",
            reason(errno)
        ))
    };
    let mut text = String::new();
    let file = File::open(path).map_err(failed)?;
    let mut limited = file.take(config::MAX_BYTES);
    limited.read_to_string(&mut text).map_err(failed)?;
    config::parse(&text)
        .map_err(|message| invalid(format!("Could not parse blkdebug config file: {message}")))
}

/// The members of a list of objects, which command lines give as an object with numbers for names.
fn list(name: &str, value: Option<Value>) -> Result<Vec<Map<String, Value>>> {
    let items: Vec<Value> = match value {
        None => Vec::new(),
        Some(Value::Array(items)) => items,
        Some(Value::Object(members)) => members.into_iter().map(|(_, item)| item).collect(),
        Some(_) => return Err(wrong_type(name, "array")),
    };
    let objects = items.into_iter().map(|item| match item {
        Value::Object(members) => Ok(members),
        _ => Err(wrong_type(name, "object")),
    });
    objects.collect()
}

fn wrong_type(name: &str, expected: &str) -> Error {
    invalid(format!(
        "Invalid parameter type for '{name}', expected: {expected}"
    ))
}

fn text(members: &mut Map<String, Value>, name: &str) -> Result<Option<String>> {
    match members.shift_remove(name) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(_) => Err(wrong_type(name, "string")),
    }
}

fn number(members: &mut Map<String, Value>, name: &str) -> Result<Option<i64>> {
    let failed = || invalid(format!("Parameter '{name}' expects a number"));
    match members.shift_remove(name) {
        None => Ok(None),
        Some(Value::String(text)) => text.parse().map(Some).map_err(|_| failed()),
        Some(value) => value.as_i64().map(Some).ok_or_else(failed),
    }
}

fn switch(members: &mut Map<String, Value>, name: &str) -> Result<bool> {
    let failed = || invalid(format!("Parameter '{name}' expects 'on' or 'off'"));
    match members.shift_remove(name) {
        None => Ok(false),
        Some(Value::Bool(on)) => Ok(on),
        Some(Value::String(text)) => match text.as_str() {
            "on" => Ok(true),
            "off" => Ok(false),
            _ => Err(failed()),
        },
        Some(_) => Err(failed()),
    }
}

/// A state; 0 stands for any.
fn state(members: &mut Map<String, Value>, name: &str) -> Result<Option<u64>> {
    let value = number(members, name)?.unwrap_or(0);
    let value = u64::try_from(value).map_err(|_| invalid(format!("Invalid value of '{name}'")))?;
    Ok(Some(value).filter(|value| *value != 0))
}

fn rule(kind: &str, mut members: Map<String, Value>) -> Result<Rule> {
    let Some(event) = text(&mut members, "event")? else {
        return Err(invalid("Missing event name for rule"));
    };
    let Some(event) = Event::parse(&event) else {
        return Err(invalid(format!("Invalid event name \"{event}\"")));
    };
    let state_before = state(&mut members, "state")?;
    let action = match kind {
        "set-state" => Action::SetState(state(&mut members, "new_state")?.unwrap_or(0)),
        _ => Action::Inject(injection(&mut members)?),
    };
    match members.keys().next() {
        Some(name) => Err(invalid(format!("Invalid parameter '{name}'"))),
        None => Ok(Rule {
            event,
            state: state_before,
            action,
        }),
    }
}

fn injection(members: &mut Map<String, Value>) -> Result<Injection> {
    let kind = match text(members, "iotype")? {
        None => None,
        Some(name) => {
            let kind = Kind::parse(&name);
            Some(kind.ok_or_else(|| invalid(format!("Invalid iotype value: '{name}'")))?)
        }
    };
    let errno = number(members, "errno")?.unwrap_or(Errno::EIO as i64);
    let sector = number(members, "sector")?.unwrap_or(-1);
    Ok(Injection {
        kind,
        errno: Errno::from_raw(i32::try_from(errno).unwrap_or(Errno::EIO as i32)),
        offset: u64::try_from(sector)
            .ok()
            .map(|sector| sector.saturating_mul(SECTOR)),
        once: switch(members, "once")?,
        immediately: switch(members, "immediately")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parsed(kind: &str, members: Value) -> Result<Rule> {
        let members = members.as_object().cloned().expect("an object");
        rule(kind, members)
    }

    #[test]
    fn rules_come_typed_or_as_text() {
        let typed = json!({"event": "l2_load", "errno": 28, "sector": 8, "once": true});
        let text = json!({"event": "l2_load", "errno": "28", "sector": "8", "once": "on"});
        let typed = parsed("inject-error", typed).unwrap();
        assert_eq!(typed, parsed("inject-error", text).unwrap());
        let Action::Inject(injection) = typed.action else {
            panic!("{typed:?}");
        };
        assert_eq!(
            (injection.errno, injection.offset),
            (Errno::ENOSPC, Some(4096))
        );
    }

    #[test]
    fn mistakes_are_named() {
        let message = |members| parsed("inject-error", members).unwrap_err().message;
        assert_eq!(message(json!({})), "Missing event name for rule");
        assert_eq!(message(json!({"event": "x"})), "Invalid event name \"x\"");
        let unknown = json!({"event": "none", "foo": 1});
        assert_eq!(message(unknown), "Invalid parameter 'foo'");
    }
}
