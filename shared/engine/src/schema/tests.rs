//! The description tells what is there.

use std::collections::BTreeSet;

use qmp::{Value, json};

use super::parse::{Entity, Object, Shape, Type};
use super::{describe, description};
use crate::tests::{engine, on_executor, run};

#[test]
fn every_command_is_described_and_nothing_else() {
    let description = description();
    let is_command = |name: &&String| matches!(description.entities[*name], Entity::Command { .. });
    let described: BTreeSet<_> = description.top.iter().filter(is_command).cloned().collect();
    let table = crate::commands::table().describe();
    let names = table.as_array().into_iter().flatten();
    let names = names.filter_map(|entry| entry["name"].as_str().map(str::to_owned));
    let known: BTreeSet<_> = names.filter(|name| name != "qmp_capabilities").collect();
    assert_eq!(described, known);
}

#[test]
fn every_reference_leads_to_a_type() {
    let list = describe();
    let names: BTreeSet<_> = list
        .iter()
        .filter_map(|info| info["name"].as_str())
        .collect();
    assert_eq!(names.len(), list.len(), "a name is used once");
    fn references<'v>(value: &'v Value, found: &mut Vec<&'v str>) {
        match value {
            Value::Object(members) => {
                for (key, value) in members {
                    match (key.as_str(), value) {
                        (
                            "type" | "arg-type" | "ret-type" | "element-type",
                            Value::String(name),
                        ) => {
                            found.push(name);
                        }
                        _ => references(value, found),
                    }
                }
            }
            Value::Array(items) => items.iter().for_each(|item| references(item, found)),
            _ => {}
        }
    }
    for info in &list {
        let mut found = Vec::new();
        references(info, &mut found);
        for name in found {
            assert!(names.contains(name), "{name} in {info}");
        }
    }
}

/// A value that is none of a type.
fn wrong(kind: &Type) -> Value {
    match kind {
        Type::Named(name) if name == "str" => json!(5),
        _ => json!("no such word"),
    }
}

/// What a command takes beside what `with` gives already.
async fn check_members(name: &str, object: &Object, with: Value) {
    let engine = engine();
    for member in &object.members {
        // Anything will do for it.
        let takes_all = member.kind == Type::Named("any".to_owned());
        if with.get(&member.name).is_some() || takes_all {
            continue;
        }
        let mut arguments = with.clone();
        arguments[&member.name] = wrong(&member.kind);
        let result = run(&engine, name, arguments.clone()).await;
        let unknown = format!("Parameter '{}' is unexpected", member.name);
        assert_ne!(result.err(), Some(unknown), "{name} {arguments}");
    }
    engine.shut_down().await.unwrap();
}

#[test]
fn commands_know_the_arguments_that_are_described() {
    on_executor(async {
        let description = description();
        for name in &description.top {
            let Entity::Command { takes, .. } = &description.entities[name] else {
                continue;
            };
            let object = match takes {
                Shape::Own(object) => object,
                Shape::Named(kind) => match &description.entities[kind] {
                    Entity::Object(object) => object,
                    other => panic!("{name} takes {other:?}"),
                },
            };
            check_members(name, object, json!({})).await;
        }
    });
}

#[test]
fn objects_and_exports_know_the_properties_that_are_described() {
    on_executor(async {
        let description = description();
        for (command, union, id) in [
            ("object-add", "ObjectOptions", json!({"id": "o"})),
            (
                "block-export-add",
                "ExportOptions",
                json!({"id": "e", "node-name": "n"}),
            ),
        ] {
            let Entity::Object(object) = &description.entities[union] else {
                panic!("{union}");
            };
            let tag = object.tag.as_deref().unwrap();
            for (case, shape) in &object.variants {
                let own = match shape {
                    Shape::Own(own) => own,
                    Shape::Named(kind) => match &description.entities[kind] {
                        Entity::Object(own) => own,
                        other => panic!("{other:?}"),
                    },
                };
                let mut with = id.clone();
                with[tag] = json!(case);
                check_members(command, own, with).await;
            }
        }
    });
}
