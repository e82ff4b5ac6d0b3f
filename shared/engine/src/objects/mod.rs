//! User-creatable objects: `object-add`, `object-del`, and what `--object` makes.
//!
//! ```text
//!   TYPES: name · properties · make ──► Objects: id → Box<dyn Object>
//!                                          │ get, set (qom-*)   release (object-del)
//! ```
//!
//! A type is a line in [`TYPES`] and a module. Owns: which objects exist, by id. Promises: an id is
//! used once; an object that somebody uses stays. Must not know: who uses an object, which finds it
//! where its type puts it (the graph, the iothreads).

mod authz;
mod iothread;
mod secret;
mod throttle_group;
mod tls_creds;

use std::cell::RefCell;
use std::rc::Rc;

use block::Graph;
use qmp::{Arguments, Error, Result, Value, json};
use service::objects::{self, IoThreads};

use crate::engine::Engine;

/// A type of objects.
pub struct ObjectType {
    /// What `qom-type` says.
    pub name: &'static str,
    /// The type that it is a kind of, one of [`ABSTRACT`] or `object`.
    pub parent: &'static str,
    /// What can be given beside `qom-type` and `id`.
    pub properties: &'static [Property],
    /// Makes an object, and puts it where its users look.
    pub make: fn(&Home<'_>, &str, Arguments) -> Result<Box<dyn Object>>,
}

/// A property of a type.
#[derive(Clone, Copy, Debug)]
pub struct Property {
    /// Its name.
    pub name: &'static str,
    /// What it takes, in QOM's words: `int`, `string`, `bool`, or the name of an enumeration.
    pub kind: &'static str,
}

impl Property {
    /// A property `name` of a `kind`.
    pub const fn new(name: &'static str, kind: &'static str) -> Self {
        Self { name, kind }
    }
}

/// Where objects are put for their users.
pub struct Home<'h> {
    /// Nodes find secrets and the like here.
    pub graph: &'h Graph,
    /// Exports find threads here.
    pub iothreads: &'h IoThreads,
}

/// An object that exists.
pub trait Object {
    /// The value of one of its type's properties, where it can be told.
    fn get(&self, property: &str) -> Option<Value>;
    /// Changes a property.
    ///
    /// # Errors
    /// A property that does not change, or a value out of its range.
    fn set(&self, home: &Home<'_>, property: &str, value: Value) -> Result<()> {
        let _ = (home, value);
        Err(Error::generic(format!(
            "Property '{property}' can no longer be set"
        )))
    }
    /// Takes it away from where its users look.
    ///
    /// # Errors
    /// [`in_use`] when it has users; nothing has changed then.
    fn release(&self, home: &Home<'_>, id: &str) -> Result<()>;
}

pub use authz::find as authorization;
pub use tls_creds::find as credentials;

/// The error for an object that has users.
pub fn in_use(id: &str) -> Error {
    Error::generic(format!("object '{id}' is in use, can not be deleted"))
}

/// Every type, in the order of their names.
pub const TYPES: &[&ObjectType] = &[
    &authz::LIST,
    &authz::LIST_FILE,
    &authz::SIMPLE,
    &iothread::TYPE,
    &secret::TYPE,
    &secret::KEYRING,
    &throttle_group::TYPE,
    &tls_creds::ANONYMOUS,
    &tls_creds::PRE_SHARED,
    &tls_creds::X509,
];

/// Types that there are only kinds of, with what they are a kind of.
pub(crate) const ABSTRACT: &[(&str, Option<&str>)] = &[
    ("authz", Some("object")),
    ("event-loop-base", Some("object")),
    ("interface", None),
    ("object", None),
    ("secret_common", Some("object")),
    ("tls-creds", Some("object")),
    ("user-creatable", Some("interface")),
];

/// Names that QEMU's command line and QMP have for types which are called otherwise.
pub(crate) const ALIASES: &[(&str, &str)] = &[("authz-listfile", "authz-list-file")];

/// Types that QEMU may be built without, and that are not here.
const ABSENT: &[&str] = &["authz-pam"];

/// The type `name`.
pub fn type_named(name: &str) -> Option<&'static ObjectType> {
    let alias = ALIASES.iter().find(|(alias, _)| *alias == name);
    let name = alias.map_or(name, |(_, name)| *name);
    TYPES.iter().copied().find(|known| known.name == name)
}

/// What `--object help` and `--object TYPE,help` print; `None` for any other text.
pub fn help(text: &str) -> Option<String> {
    let asked = match text.strip_suffix(",help") {
        Some(name) => type_named(name.strip_prefix("qom-type=").unwrap_or(name)),
        None if text == "help" => None,
        None => return None,
    };
    let Some(known) = asked else {
        let names = TYPES.iter().map(|known| format!("  {}\n", known.name));
        let list: String = names.collect();
        return Some(format!("List of user creatable objects:\n{list}"));
    };
    let shown = |property: &Property| format!("  {}=<{}>\n", property.name, property.kind);
    let mut lines: Vec<_> = known.properties.iter().map(shown).collect();
    lines.sort();
    Some(format!("{} options:\n{}", known.name, lines.concat()))
}

struct Entry {
    id: String,
    kind: &'static ObjectType,
    object: Rc<dyn Object>,
}

/// The objects of a process, in the order in which they were made. Lives on the control thread.
#[derive(Default)]
pub struct Objects {
    iothreads: IoThreads,
    list: RefCell<Vec<Entry>>,
}

impl Objects {
    fn home<'h>(&'h self, graph: &'h Graph) -> Home<'h> {
        Home {
            graph,
            iothreads: &self.iothreads,
        }
    }

    /// The objects of type `iothread`.
    pub fn iothreads(&self) -> &IoThreads {
        &self.iothreads
    }

    /// Makes the object that `arguments` describe: `qom-type`, `id`, and the type's properties.
    ///
    /// # Errors
    /// No type or id, wrong properties, an id that is none or is taken.
    pub fn add(&self, graph: &Graph, arguments: Arguments) -> Result<()> {
        let new = objects::take_identity(arguments)?;
        if ABSENT.contains(&new.type_name.as_str()) {
            let what = format!("invalid object type: {}", new.type_name);
            return Err(Error::generic(what));
        }
        let Some(kind) = type_named(&new.type_name) else {
            return Err(Error::parameter_value("qom-type", new.type_name));
        };
        if !qmp::is_identifier(&new.id) {
            return Err(Error::parameter_expects("id", "an identifier"));
        }
        if self.list.borrow().iter().any(|known| known.id == new.id) {
            return Err(objects::taken(&new.id));
        }
        let object = (kind.make)(&self.home(graph), &new.id, new.properties)?;
        self.list.borrow_mut().push(Entry {
            id: new.id,
            kind,
            object: object.into(),
        });
        Ok(())
    }

    /// Deletes the object `id`.
    ///
    /// # Errors
    /// There is none; it is in use.
    pub fn remove(&self, graph: &Graph, id: &str) -> Result<()> {
        let (object, _) = self
            .find(id)
            .ok_or_else(|| Error::generic(format!("object '{id}' not found")))?;
        object.release(&self.home(graph), id)?;
        self.list.borrow_mut().retain(|known| known.id != id);
        Ok(())
    }

    /// The object `id`, with its type.
    pub fn find(&self, id: &str) -> Option<(Rc<dyn Object>, &'static ObjectType)> {
        let list = self.list.borrow();
        let found = list.iter().find(|known| known.id == id)?;
        Some((Rc::clone(&found.object), found.kind))
    }

    /// Changes a property of `object`.
    ///
    /// # Errors
    /// The object's.
    pub fn set(
        &self,
        graph: &Graph,
        object: &dyn Object,
        (property, value): (&str, Value),
    ) -> Result<()> {
        object.set(&self.home(graph), property, value)
    }

    /// The ids of all objects, with their types.
    pub fn list(&self) -> Vec<(String, &'static ObjectType)> {
        let list = self.list.borrow();
        list.iter()
            .map(|known| (known.id.clone(), known.kind))
            .collect()
    }

    /// Forgets all objects. Threads that nobody else holds end.
    pub fn clear(&self) {
        self.list.borrow_mut().clear();
        self.iothreads.clear();
    }
}

pub(crate) async fn object_add(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    engine.objects.add(&engine.graph, arguments)?;
    Ok(json!({}))
}

pub(crate) async fn object_del(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    let id = objects::parse_id(arguments)?;
    engine.objects.remove(&engine.graph, &id)?;
    Ok(json!({}))
}

pub(crate) async fn query_iothreads(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    arguments.finish()?;
    Ok(engine.objects.iothreads().describe())
}

#[cfg(test)]
mod tests {
    use super::*;
    use block::graph::NamePolicy;
    use qmp::keyval;

    fn add(objects: &Objects, graph: &Graph, text: &str) -> Result<(), String> {
        let arguments = keyval::parse(text, Some("qom-type")).unwrap();
        objects.add(graph, arguments).map_err(|error| error.desc)
    }

    #[test]
    fn an_object_is_found_until_it_is_removed_and_its_id_is_used_once() {
        let graph = Graph::new(&[], NamePolicy::default());
        let objects = Objects::default();
        add(&objects, &graph, "secret,id=s,data=word").unwrap();
        assert!(graph.secrets().contains("s"));
        assert_eq!(
            add(&objects, &graph, "secret,id=s,data=word").unwrap_err(),
            "attempt to add duplicate property 's' to object (type 'container')"
        );
        objects.remove(&graph, "s").unwrap();
        assert!(!graph.secrets().contains("s"));
        assert_eq!(
            objects.remove(&graph, "s").unwrap_err().desc,
            "object 's' not found"
        );
    }

    #[test]
    fn mistakes_are_named_and_leave_nothing() {
        let graph = Graph::new(&[], NamePolicy::default());
        let objects = Objects::default();
        for (text, expected) in [
            ("id=x", "Parameter 'qom-type' is missing"),
            ("secret", "Parameter 'id' is missing"),
            ("authz-pam,id=a", "invalid object type: authz-pam"),
            ("zz,id=a", "Parameter 'qom-type' does not accept value 'zz'"),
            ("secret,id=0,data=a", "Parameter 'id' expects an identifier"),
            ("secret,id=a,data=a,b=c", "Parameter 'b' is unexpected"),
            ("secret,id=a", "Must provide 'file' or 'data'"),
        ] {
            assert_eq!(add(&objects, &graph, text).unwrap_err(), expected);
        }
        assert!(objects.list().is_empty());
    }

    #[test]
    fn a_type_is_found_by_either_of_its_names() {
        for name in ["authz-listfile", "authz-list-file"] {
            assert_eq!(type_named(name).unwrap().name, "authz-list-file");
        }
    }

    #[test]
    fn help_lists_types_and_their_properties() {
        assert!(help("help").unwrap().contains("\n  secret\n"));
        assert!(
            help("secret,help")
                .unwrap()
                .contains("\n  keyid=<string>\n")
        );
        assert!(help("nothing,help").unwrap().starts_with("List of"));
        assert_eq!(help("secret,id=help"), None);
        assert!(TYPES.is_sorted_by_key(|known| known.name));
    }
}
