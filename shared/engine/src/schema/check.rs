//! Holding arguments against the description, for commands whose work begins after they have answered.

use qmp::{Error, Map, Result, Value};

use super::description;
use super::parse::{Description, Entity, Member, Object, Shape, Type};

/// Checks `members` as a value of the type `name`, which stands at `path` of the arguments.
///
/// # Errors
/// The first mistake, in QEMU's words.
pub(crate) fn check(name: &str, members: &Map<String, Value>, path: &str) -> Result<()> {
    let description = description();
    match &description.entities[name] {
        Entity::Object(object) => Checker(&description).object(object, members, path),
        other => unreachable!("'{name}' is {other:?}"),
    }
}

struct Checker<'d>(&'d Description);

impl<'d> Checker<'d> {
    fn object(&self, object: &'d Object, given: &Map<String, Value>, path: &str) -> Result<()> {
        let mut known: Vec<&str> = Vec::new();
        self.members(object, (given, path), &mut known)?;
        if let Some(tag) = &object.tag {
            let case = given.get(tag).and_then(Value::as_str).unwrap_or_default();
            let found = object.variants.iter().find(|(name, _)| name == case);
            if let Some(own) = found.and_then(|(_, shape)| self.shape(shape)) {
                self.members(own, (given, path), &mut known)?;
            }
        }
        match given.keys().find(|key| !known.contains(&key.as_str())) {
            Some(key) => Err(Error::unexpected_parameter(format!("{path}.{key}"))),
            None => Ok(()),
        }
    }

    fn shape(&self, shape: &'d Shape) -> Option<&'d Object> {
        match shape {
            Shape::Own(object) => Some(object),
            Shape::Named(name) => match self.0.entities.get(name)? {
                Entity::Object(object) => Some(object),
                _ => None,
            },
        }
    }

    fn members(
        &self,
        object: &'d Object,
        (given, path): (&Map<String, Value>, &str),
        known: &mut Vec<&'d str>,
    ) -> Result<()> {
        for Member {
            name,
            optional,
            kind,
            ..
        } in &object.members
        {
            known.push(name);
            let path = format!("{path}.{name}");
            match given.get(name) {
                Some(value) => self.value(kind, value, &path)?,
                None if *optional => {}
                None => return Err(Error::missing_parameter(path)),
            }
        }
        Ok(())
    }

    fn value(&self, kind: &'d Type, value: &Value, path: &str) -> Result<()> {
        let name = match (kind, value) {
            (Type::Named(name), _) => name.as_str(),
            (Type::List(element), Value::Array(items)) => {
                let mut items = items.iter().enumerate();
                return items.try_for_each(|(at, item)| {
                    self.value(element, item, &format!("{path}[{at}]"))
                });
            }
            (Type::List(_), _) => return Err(Error::parameter_type(path, "array")),
        };
        let (fits, expected) = match name {
            "str" => (value.is_string(), "string"),
            "bool" => (value.is_boolean(), "boolean"),
            "int" => (value.is_i64(), "integer"),
            "number" => (value.is_number(), "number"),
            "null" => (value.is_null(), "null"),
            "any" => return Ok(()),
            "size" if value.is_u64() => return Ok(()),
            "size" => return Err(Error::parameter_expects(path, "uint64")),
            _ => return self.defined(name, value, path),
        };
        match fits {
            true => Ok(()),
            false => Err(Error::parameter_type(path, expected)),
        }
    }

    fn defined(&self, name: &str, value: &Value, path: &str) -> Result<()> {
        match (&self.0.entities[name], value) {
            (Entity::Enum(values), Value::String(word)) => {
                if values.iter().any(|known| known == word) {
                    return Ok(());
                }
                // The peer names the member alone.
                let member = path.rsplit('.').next().unwrap_or(path);
                Err(Error::parameter_value(member, word))
            }
            (Entity::Enum(_), _) => Err(Error::parameter_type(path, "string")),
            (Entity::Object(object), Value::Object(members)) => self.object(object, members, path),
            (Entity::Object(_), _) => Err(Error::parameter_type(path, "object")),
            (Entity::Alternate(kinds), value) => {
                let fits = |kind: &Type| match kind {
                    Type::Named(name) if name == "str" => value.is_string(),
                    Type::Named(name) if name == "null" => value.is_null(),
                    Type::Named(name) => match self.0.entities.get(name) {
                        Some(Entity::Enum(_)) => value.is_string(),
                        _ => value.is_object(),
                    },
                    Type::List(_) => value.is_array(),
                };
                let found = kinds.iter().find(|kind| fits(kind));
                // The peer names the member alone.
                let member = path.rsplit('.').next().unwrap_or(path);
                match (found, value) {
                    (None, _) => Err(Error::parameter_type(member, name)),
                    (Some(kind), Value::Object(_) | Value::Array(_)) => {
                        self.value(kind, value, path)
                    }
                    (Some(_), _) => Ok(()),
                }
            }
            (Entity::Command { .. } | Entity::Event(_), _) => {
                unreachable!("commands and events are no types")
            }
        }
    }
}
