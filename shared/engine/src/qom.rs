//! The object tree as `qom-*` commands show it: `/objects/ID` and `/chardevs/ID`.
//!
//! What is in it lives elsewhere (objects, the service's character devices); here it gets paths, types and
//! properties. A path that does not begin with `/` is the end of one.

use std::rc::Rc;

use qmp::{Arguments, Error, ErrorClass, Result, Value, json};
use serde::Deserialize;

use crate::engine::Engine;
use crate::objects::{self, ABSTRACT, ObjectType, Property, TYPES};

/// Where a path leads.
enum Place {
    Root,
    Objects,
    Chardevs,
    Object(String, &'static ObjectType),
    Chardev(&'static str),
}

fn not_found(what: String) -> Error {
    Error::new(ErrorClass::DeviceNotFound, what)
}

fn resolve(engine: &Engine, path: &str) -> Result<Place> {
    let object = |id: &str| {
        let (_, kind) = engine.objects.find(id)?;
        Some(Place::Object(id.to_owned(), kind))
    };
    let chardev = |id: &str| {
        let list = engine.chardevs.list();
        let (_, kind) = list.into_iter().find(|(known, _)| known == id)?;
        Some(Place::Chardev(kind))
    };
    let mut parts = path.split('/').filter(|part| !part.is_empty());
    let (first, second, rest) = (parts.next(), parts.next(), parts.next());
    let place = match (path.starts_with('/'), first, second, rest) {
        (_, _, _, Some(_)) => None,
        (_, None, ..) => Some(Place::Root),
        (_, Some("objects"), None, _) => Some(Place::Objects),
        (_, Some("chardevs"), None, _) => Some(Place::Chardevs),
        (_, Some("objects"), Some(id), _) => object(id),
        (_, Some("chardevs"), Some(id), _) => chardev(id),
        (false, Some(id), None, _) => object(id).or_else(|| chardev(id)),
        _ => None,
    };
    place.ok_or_else(|| not_found(format!("Device '{path}' not found")))
}

/// One line of an answer.
fn property(name: &str, kind: &str) -> Value {
    json!({ "name": name, "type": kind })
}

fn properties(own: &[Property]) -> Value {
    let own = own.iter().map(|one| property(one.name, one.kind));
    std::iter::once(property("type", "string"))
        .chain(own)
        .collect()
}

#[derive(Deserialize)]
struct Path {
    path: String,
}

pub(crate) async fn list(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    let Path { path } = arguments.parse()?;
    let children: Vec<Value> = match resolve(engine, &path)? {
        Place::Root => ["objects", "chardevs"]
            .map(|name| property(name, "child<container>"))
            .into(),
        Place::Objects => {
            let list = engine.objects.list();
            list.iter()
                .map(|(id, kind)| property(id, &format!("child<{}>", kind.name)))
                .collect()
        }
        Place::Chardevs => {
            let list = engine.chardevs.list();
            list.iter()
                .map(|(id, kind)| property(id, &format!("child<chardev-{kind}>")))
                .collect()
        }
        Place::Object(_, kind) => return Ok(properties(kind.properties)),
        Place::Chardev(_) => Vec::new(),
    };
    Ok(std::iter::once(property("type", "string"))
        .chain(children)
        .collect())
}

#[derive(Deserialize)]
struct Get {
    path: String,
    property: String,
}

pub(crate) async fn get(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    let Get { path, property } = arguments.parse()?;
    let place = resolve(engine, &path)?;
    let (type_name, value) = match &place {
        Place::Root | Place::Objects | Place::Chardevs => ("container", None),
        Place::Object(id, kind) => {
            let found = engine.objects.find(id);
            let is_known = kind.properties.iter().any(|known| known.name == property);
            let value = found.and_then(|(object, _)| object.get(&property));
            if is_known && value.is_none() {
                let what = format!("Property '{}.{property}' is not readable", kind.name);
                return Err(Error::generic(what));
            }
            (kind.name, value)
        }
        Place::Chardev(kind) => (*kind, None),
    };
    let shown = match place {
        Place::Chardev(kind) => format!("chardev-{kind}"),
        _ => type_name.to_owned(),
    };
    let child = |container: &str| {
        let path = format!("/{container}/{property}");
        resolve(engine, &path).ok().map(|_| Value::String(path))
    };
    let value = match (&place, property.as_str()) {
        (_, "type") => Some(json!(shown)),
        (Place::Root, "objects" | "chardevs") => Some(json!(format!("/{property}"))),
        (Place::Objects, _) => child("objects"),
        (Place::Chardevs, _) => child("chardevs"),
        _ => value,
    };
    value.ok_or_else(|| Error::generic(format!("Property '{shown}.{property}' not found")))
}

#[derive(Deserialize)]
struct SetPath {
    path: String,
    property: String,
}

pub(crate) async fn set(engine: &Rc<Engine>, mut arguments: Arguments) -> Result<Value> {
    let value = arguments.take_value("value");
    let SetPath { path, property } = arguments.parse()?;
    let value = value.ok_or_else(|| Error::missing_parameter("value"))?;
    let place = resolve(engine, &path)?;
    let (type_name, is_known) = match &place {
        Place::Object(_, kind) => {
            let is_known = kind.properties.iter().any(|known| known.name == property);
            (kind.name.to_owned(), is_known)
        }
        Place::Chardev(kind) => (format!("chardev-{kind}"), false),
        _ => ("container".to_owned(), false),
    };
    let (true, Place::Object(id, _)) = (is_known, &place) else {
        let problem = if property == "type" {
            "is not writable"
        } else {
            "not found"
        };
        return Err(Error::generic(format!(
            "Property '{type_name}.{property}' {problem}"
        )));
    };
    let Some((object, _)) = engine.objects.find(id) else {
        return Err(not_found(format!("Device '{path}' not found")));
    };
    engine
        .objects
        .set(&engine.graph, &*object, (&property, value))?;
    Ok(json!({}))
}

#[derive(Deserialize)]
struct TypeName {
    typename: String,
}

pub(crate) async fn list_properties(_engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    let TypeName { typename } = arguments.parse()?;
    let found = objects::type_named(&typename);
    let found = found.ok_or_else(|| not_found(format!("Class '{typename}' not found")))?;
    Ok(properties(found.properties))
}

#[derive(Deserialize)]
struct ListTypes {
    implements: Option<String>,
    #[serde(default, rename = "abstract")]
    with_abstract: bool,
}

/// What each type is a kind of, and whether there are only kinds of it.
fn parents() -> impl Iterator<Item = (&'static str, Option<&'static str>, bool)> {
    let made = TYPES
        .iter()
        .map(|known| (known.name, Some(known.parent), false));
    let kinds = ABSTRACT.iter().map(|(name, parent)| (*name, *parent, true));
    made.chain(kinds)
}

/// Whether the type `name` is `wanted` or a kind of it.
fn is_a(name: &str, wanted: &str) -> bool {
    let found = parents().find(|(known, ..)| *known == name);
    let parent = found.and_then(|(_, parent, _)| parent);
    let makes = wanted == "user-creatable" && objects::type_named(name).is_some();
    makes || name == wanted || parent.is_some_and(|parent| is_a(parent, wanted))
}

/// Types that users can make, and with `abstract` those that these are kinds of.
pub(crate) async fn list_types(_engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    let ListTypes {
        implements,
        with_abstract,
    } = arguments.parse()?;
    let fits = |name: &str| {
        let wanted = implements.as_deref();
        wanted.is_none_or(|wanted| is_a(name, wanted))
    };
    let types = parents().filter(|(_, _, is_abstract)| with_abstract || !is_abstract);
    let types = types.filter(|(name, ..)| fits(name));
    let described = types.map(|(name, parent, is_abstract)| {
        let mut info = json!({ "name": name });
        if is_abstract {
            info["abstract"] = json!(true);
        }
        if let Some(parent) = parent {
            info["parent"] = json!(parent);
        }
        info
    });
    Ok(described.collect())
}
