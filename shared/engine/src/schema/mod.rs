//! `query-qmp-schema`: what the commands take and answer, for clients that adapt to it.
//!
//! ```text
//!   commands.schema ──parse──► entities ──number──► the list of SchemaInfo
//!   drivers, object types ─────────┘
//! ```
//!
//! Names of types are masked by numbers, in the order in which the commands and events need them, as QEMU's are: clients follow
//! references. Owns the description. Promises: each command of the table is described, and nothing else (a test).

mod check;
mod parse;

pub(crate) use check::check;

use std::collections::HashMap;
use std::rc::Rc;

use qmp::{Arguments, Map, Result, Value, json};

use crate::catalogue;
use crate::engine::Engine;
use crate::objects::{self, Property};
use parse::{Description, Entity, Member, Object, Shape, Type};

const TEXT: &str = include_str!("commands.schema");

pub(crate) async fn query(_engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    arguments.finish()?;
    Ok(Value::Array(describe()))
}

/// The description with what the tables of drivers and objects say.
fn description() -> Description {
    let mut description = parse::parse(TEXT);
    let drivers = catalogue::drivers();
    let entries = || drivers.iter().flat_map(|table| table.iter());
    let mut names: Vec<String> = entries().map(|entry| entry.name.to_owned()).collect();
    names.sort();
    for (union, makes) in [("BlockdevOptions", false), ("BlockdevCreateOptions", true)] {
        if let Some(Entity::Object(object)) = description.entities.get_mut(union) {
            let known = |name: &str| {
                let mut found = entries().filter(|entry| entry.name == name);
                found.any(|entry| !makes || entry.create.is_some())
            };
            object.variants.retain(|(case, _)| known(case));
        }
    }
    let mut entity = |name: &str, entity| description.entities.insert(name.to_owned(), entity);
    entity("BlockdevDriver", Entity::Enum(names));
    let names = objects::TYPES.iter().map(|known| known.name);
    let names = names.chain(objects::ALIASES.iter().map(|(alias, _)| *alias));
    let types: Vec<_> = names
        .filter_map(|name| Some((name, objects::type_named(name)?)))
        .collect();
    let names = types.iter().map(|(name, _)| (*name).to_owned()).collect();
    entity("ObjectType", Entity::Enum(names));
    let variants = types.into_iter().map(|(name, known)| {
        let members = known.properties.iter().map(property).collect();
        let object = Object {
            members,
            ..Object::default()
        };
        (name.to_owned(), Shape::Own(object))
    });
    let required = |name: &str, kind: &str| Member {
        name: name.to_owned(),
        optional: false,
        kind: Type::Named(kind.to_owned()),
        features: Vec::new(),
    };
    let object = Object {
        members: vec![required("qom-type", "ObjectType"), required("id", "str")],
        tag: Some("qom-type".to_owned()),
        variants: variants.collect(),
    };
    entity("ObjectOptions", Entity::Object(object));
    description
}

fn property(property: &Property) -> Member {
    let kind = Type::Named(
        match property.kind {
            "string" => "str",
            other => other,
        }
        .to_owned(),
    );
    // The only list there is; QOM names its elements.
    let kind = match property.kind {
        "QAuthZListRule" => Type::List(Box::new(kind)),
        _ => kind,
    };
    Member {
        name: property.name.to_owned(),
        optional: true,
        kind,
        features: Vec::new(),
    }
}

/// Gives numbers to types as they are needed.
struct Numbering<'d> {
    description: &'d Description,
    /// By name; an object without one has its place in memory for a name.
    numbers: HashMap<String, usize>,
    next: usize,
    /// Descriptions of types, in the order of their numbers.
    types: Vec<Value>,
    pending: Vec<(usize, &'d Entity)>,
    lists: Vec<String>,
}

/// The whole answer.
fn describe() -> Vec<Value> {
    let description = description();
    let mut numbering = Numbering {
        description: &description,
        numbers: HashMap::new(),
        next: 0,
        types: Vec::new(),
        pending: Vec::new(),
        lists: Vec::new(),
    };
    let mut list: Vec<Value> = description
        .top
        .iter()
        .map(|name| numbering.top(name))
        .collect();
    numbering.finish();
    list.append(&mut numbering.types);
    list.iter().map(json::ordered).collect()
}

fn with_features(mut info: Value, features: &[String]) -> Value {
    if !features.is_empty() {
        info["features"] = json!(features);
    }
    info
}

impl<'d> Numbering<'d> {
    fn top(&mut self, name: &str) -> Value {
        match &self.description.entities[name] {
            Entity::Command {
                takes,
                answers,
                features,
            } => {
                let takes = self.shape(takes);
                let nothing = Shape::Own(Object::default());
                let answers = match answers {
                    Some(kind) => self.kind(kind),
                    None => self.shape_owned(&nothing),
                };
                let info = json!({
                    "name": name, "meta-type": "command", "arg-type": takes, "ret-type": answers,
                });
                with_features(info, features)
            }
            Entity::Event(takes) => {
                json!({ "name": name, "meta-type": "event", "arg-type": self.shape(takes) })
            }
            _ => unreachable!("only commands and events are at the top"),
        }
    }

    fn number(&mut self, key: &str) -> (usize, bool) {
        if let Some(known) = self.numbers.get(key) {
            return (*known, false);
        }
        let number = self.next;
        self.next += 1;
        self.numbers.insert(key.to_owned(), number);
        (number, true)
    }

    fn shape(&mut self, shape: &'d Shape) -> String {
        match shape {
            Shape::Named(name) => self.named(name),
            Shape::Own(object) if object.members.is_empty() => self.shape_owned(shape),
            Shape::Own(object) => {
                let (number, _) = self.number(&format!("{:p}", std::ptr::from_ref(object)));
                let info = self.object(number, object);
                self.types.push(info);
                number.to_string()
            }
        }
    }

    /// The object without members, of which there is one.
    fn shape_owned(&mut self, _nothing: &Shape) -> String {
        let (number, is_new) = self.number("nothing");
        if is_new {
            self.types.push(json!({
                "name": number.to_string(), "meta-type": "object", "members": [],
            }));
        }
        number.to_string()
    }

    fn kind(&mut self, kind: &Type) -> String {
        match kind {
            Type::Named(name) => self.named(name),
            Type::List(element) => {
                let element = self.kind(element);
                let name = format!("[{element}]");
                if !self.lists.contains(&name) {
                    self.lists.push(name.clone());
                    self.types.push(json!({
                        "name": name, "meta-type": "array", "element-type": element,
                    }));
                }
                name
            }
        }
    }

    fn named(&mut self, name: &str) -> String {
        let name = if name == "size" { "int" } else { name };
        let json_type = match name {
            "str" => "string",
            "int" => "int",
            "number" => "number",
            "bool" => "boolean",
            "null" => "null",
            "any" => "value",
            _ => return self.defined(name),
        };
        if !self.lists.iter().any(|known| known == name) {
            self.lists.push(name.to_owned());
            self.types.push(json!({
                "name": name, "meta-type": "builtin", "json-type": json_type,
            }));
        }
        name.to_owned()
    }

    fn defined(&mut self, name: &str) -> String {
        let (number, is_new) = self.number(name);
        if is_new {
            let entity = self.description.entities.get(name);
            let entity = entity.unwrap_or_else(|| panic!("'{name}' is not described"));
            self.pending.push((number, entity));
        }
        number.to_string()
    }

    /// Describes what is referred to and was not described yet.
    fn finish(&mut self) {
        while !self.pending.is_empty() {
            let (number, entity) = self.pending.remove(0);
            let info = match entity {
                Entity::Object(object) => self.object(number, object),
                Entity::Enum(values) => {
                    let members: Vec<_> = values
                        .iter()
                        .map(|value| json!({ "name": value }))
                        .collect();
                    json!({
                        "name": number.to_string(), "meta-type": "enum",
                        "members": members, "values": values,
                    })
                }
                Entity::Alternate(kinds) => {
                    let members: Vec<_> = kinds
                        .iter()
                        .map(|kind| json!({ "type": self.kind(kind) }))
                        .collect();
                    json!({
                        "name": number.to_string(), "meta-type": "alternate", "members": members,
                    })
                }
                Entity::Command { .. } | Entity::Event(_) => {
                    unreachable!("commands and events are no types")
                }
            };
            self.types.push(info);
        }
    }

    fn object(&mut self, number: usize, object: &'d Object) -> Value {
        let members: Vec<_> = object
            .members
            .iter()
            .map(|member| self.member(member))
            .collect();
        let mut info = json!({
            "name": number.to_string(), "meta-type": "object", "members": members,
        });
        if let Some(tag) = &object.tag {
            info["tag"] = json!(tag);
            info["variants"] = self.variants(object, tag);
        }
        info
    }

    /// Every value of the tag has a variant; those with nothing of their own have the empty object.
    fn variants(&mut self, object: &'d Object, tag: &str) -> Value {
        let kinds = object.members.iter();
        let kind = kinds
            .filter(|member| member.name == tag)
            .find_map(|member| match &member.kind {
                Type::Named(name) => self.description.entities.get(name),
                Type::List(_) => None,
            });
        let Some(Entity::Enum(values)) = kind else {
            panic!("the tag '{tag}' is no enumeration");
        };
        let mut variants = Vec::new();
        for value in values {
            let found = object.variants.iter().find(|(case, _)| case == value);
            let kind = match found {
                Some((_, shape)) => self.shape(shape),
                None => self.shape_owned(&Shape::Own(Object::default())),
            };
            variants.push(json!({ "case": value, "type": kind }));
        }
        Value::Array(variants)
    }

    fn member(&mut self, member: &Member) -> Value {
        let mut info = Map::new();
        info.insert("name".to_owned(), json!(member.name));
        info.insert("type".to_owned(), json!(self.kind(&member.kind)));
        if member.optional {
            info.insert("default".to_owned(), Value::Null);
        }
        with_features(Value::Object(info), &member.features)
    }
}

#[cfg(test)]
mod tests;
