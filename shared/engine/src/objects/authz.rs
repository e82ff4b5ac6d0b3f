//! `authz-simple`, `authz-list`, `authz-list-file`: who may come in.

use std::path::PathBuf;
use std::sync::Arc;

use block::Graph;
use qmp::{Arguments, Error, Result, Value};
use serde::Deserialize;
use transport::{Access, Authorization, Rule, RuleFormat};

use super::{Home, Object, ObjectType, Property};

/// One name.
pub(super) const SIMPLE: ObjectType = ObjectType {
    name: "authz-simple",
    parent: "authz",
    properties: &[Property::new("identity", "string")],
    make: |home, id, arguments| {
        let Simple { identity } = arguments.parse()?;
        let told = vec![("identity", Value::from(identity.clone()))];
        add(home, (id, Authorization::Simple(identity)), told)
    },
};

/// A list of rules.
pub(super) const LIST: ObjectType = ObjectType {
    name: "authz-list",
    parent: "authz",
    properties: &[
        Property::new("policy", "QAuthZListPolicy"),
        Property::new("rules", "QAuthZListRule"),
    ],
    make: |home, id, arguments| {
        let list: List = arguments.parse()?;
        let told = vec![("policy", Value::from(list.policy.name()))];
        add(home, (id, list.into_authorization()), told)
    },
};

/// A list of rules in a file.
pub(super) const LIST_FILE: ObjectType = ObjectType {
    name: "authz-list-file",
    parent: "authz",
    properties: &[
        Property::new("filename", "string"),
        Property::new("refresh", "bool"),
    ],
    make: |home, id, arguments| {
        let ListFile { filename, refresh } = arguments.parse()?;
        let failed = |reason: &str| {
            Error::generic(format!(
                "Unable to load authorization list {filename}: {reason}"
            ))
        };
        let text =
            std::fs::read_to_string(&filename).map_err(|error| failed(&error.to_string()))?;
        let now = parse(&text).ok_or_else(|| failed("not a list of rules"))?;
        let told = vec![
            ("filename", Value::from(filename.clone())),
            ("refresh", Value::from(refresh)),
        ];
        let authorization = match refresh {
            false => now,
            true => Authorization::ListFile {
                path: PathBuf::from(&filename),
                parse,
            },
        };
        add(home, (id, authorization), told)
    },
};

#[derive(Deserialize)]
struct Simple {
    identity: String,
}

#[derive(Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Policy {
    #[default]
    Deny,
    Allow,
}

impl Policy {
    fn name(self) -> &'static str {
        match self {
            Policy::Deny => "deny",
            Policy::Allow => "allow",
        }
    }

    fn access(self) -> Access {
        match self {
            Policy::Deny => Access::Deny,
            Policy::Allow => Access::Allow,
        }
    }
}

#[derive(Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Format {
    #[default]
    Exact,
    Glob,
}

#[derive(Deserialize)]
struct ListedRule {
    #[serde(rename = "match")]
    pattern: String,
    policy: Policy,
    #[serde(default)]
    format: Format,
}

#[derive(Deserialize)]
struct List {
    #[serde(default)]
    policy: Policy,
    #[serde(default)]
    rules: Vec<ListedRule>,
}

fn yes() -> bool {
    true
}

#[derive(Deserialize)]
struct ListFile {
    filename: String,
    #[serde(default = "yes")]
    refresh: bool,
}

impl List {
    fn into_authorization(self) -> Authorization {
        let rules = self.rules.into_iter().map(|rule| Rule {
            pattern: rule.pattern,
            access: rule.policy.access(),
            format: match rule.format {
                Format::Exact => RuleFormat::Exact,
                Format::Glob => RuleFormat::Glob,
            },
        });
        Authorization::List {
            rules: rules.collect(),
            otherwise: self.policy.access(),
        }
    }
}

/// The content of a file: the properties of `authz-list`, as JSON.
fn parse(text: &str) -> Option<Authorization> {
    let Ok(Value::Object(members)) = qmp::json::parse(text) else {
        return None;
    };
    let list: List = Arguments::from_json(members).parse().ok()?;
    Some(list.into_authorization())
}

/// An authorization that exists. The graph holds it.
struct Held(Vec<(&'static str, Value)>);

fn add(
    home: &Home<'_>,
    (id, authorization): (&str, Authorization),
    told: Vec<(&'static str, Value)>,
) -> Result<Box<dyn Object>> {
    home.graph
        .objects()
        .insert(id.to_owned(), Arc::new(authorization));
    Ok(Box::new(Held(told)))
}

impl Object for Held {
    fn get(&self, property: &str) -> Option<Value> {
        let found = self.0.iter().find(|(name, _)| *name == property);
        found.map(|(_, value)| value.clone())
    }

    /// Who uses it keeps it.
    fn release(&self, home: &Home<'_>, id: &str) -> Result<()> {
        home.graph.objects().remove(id);
        Ok(())
    }
}

/// The authorization `id`.
///
/// # Errors
/// There is none.
pub fn find(graph: &Graph, id: &str) -> Result<Arc<Authorization>> {
    let found = graph.objects().find::<Authorization>(id);
    found.ok_or_else(|| Error::generic(format!("No authorization object with id '{id}'")))
}
