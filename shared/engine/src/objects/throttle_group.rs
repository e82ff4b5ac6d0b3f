//! `throttle-group`: limits that the `throttle` nodes of a group share.
//!
//! `limits` can be given at once and changed at any time; its members exist as properties of their own, too,
//! which are given when the group is made and only read later.

use std::sync::Arc;

use filters::throttle::{NAMES, ThrottleGroup, ThrottleLimits};
use qmp::{Arguments, Error, Map, Result, Value, json};
use serde::Deserialize;

use super::{Home, Object, ObjectType, Property, in_use};
use crate::error::from_block;

/// Reads members that are called alike, with a prefix or without.
macro_rules! members {
    ($($field:ident: $name:literal, $own:literal;)*) => {
        /// `ThrottleLimits` of QEMU's QMP reference: what is absent stays as it is.
        #[derive(Deserialize)]
        #[serde(rename_all = "kebab-case")]
        struct Limits {
            $($field: Option<i64>,)*
        }

        /// The properties of a group.
        #[derive(Deserialize)]
        struct Properties {
            limits: Option<Limits>,
            $(#[serde(rename = $own)] $field: Option<i64>,)*
        }

        impl Limits {
            fn given(&self) -> impl Iterator<Item = (&'static str, i64)> {
                [$(($name, self.$field),)*]
                    .into_iter()
                    .filter_map(|(name, value)| Some((name, value?)))
            }
        }

        impl Properties {
            fn given(&self) -> impl Iterator<Item = (&'static str, i64)> {
                [$(($name, self.$field),)*]
                    .into_iter()
                    .filter_map(|(name, value)| Some((name, value?)))
            }
        }

        /// The type's table line.
        pub(super) const TYPE: ObjectType = ObjectType {
            name: "throttle-group",
    parent: "object",
            properties: &[
                Property::new("limits", "ThrottleLimits"),
                $(Property::new($own, "int"),)*
            ],
            make,
        };
    };
}

members! {
    bps_total: "bps-total", "x-bps-total";
    bps_total_max: "bps-total-max", "x-bps-total-max";
    bps_total_max_length: "bps-total-max-length", "x-bps-total-max-length";
    bps_read: "bps-read", "x-bps-read";
    bps_read_max: "bps-read-max", "x-bps-read-max";
    bps_read_max_length: "bps-read-max-length", "x-bps-read-max-length";
    bps_write: "bps-write", "x-bps-write";
    bps_write_max: "bps-write-max", "x-bps-write-max";
    bps_write_max_length: "bps-write-max-length", "x-bps-write-max-length";
    iops_total: "iops-total", "x-iops-total";
    iops_total_max: "iops-total-max", "x-iops-total-max";
    iops_total_max_length: "iops-total-max-length", "x-iops-total-max-length";
    iops_read: "iops-read", "x-iops-read";
    iops_read_max: "iops-read-max", "x-iops-read-max";
    iops_read_max_length: "iops-read-max-length", "x-iops-read-max-length";
    iops_write: "iops-write", "x-iops-write";
    iops_write_max: "iops-write-max", "x-iops-write-max";
    iops_write_max_length: "iops-write-max-length", "x-iops-write-max-length";
    iops_size: "iops-size", "x-iops-size";
}

struct Group {
    group: Arc<ThrottleGroup>,
}

fn make(home: &Home<'_>, id: &str, arguments: Arguments) -> Result<Box<dyn Object>> {
    let properties: Properties = arguments.parse()?;
    if properties.given().any(|(_, value)| value < 0) {
        return Err(Error::generic("Property values cannot be negative"));
    }
    let members = properties.limits.iter().flat_map(Limits::given);
    let limits = changed(ThrottleLimits::default(), properties.given().chain(members))?;
    let group = Arc::new(ThrottleGroup::new(limits));
    home.graph.objects().insert(id.to_owned(), group.clone());
    Ok(Box::new(Group { group }))
}

/// `limits` with other members, if that makes sense.
fn changed(
    mut limits: ThrottleLimits,
    members: impl Iterator<Item = (&'static str, i64)>,
) -> Result<ThrottleLimits> {
    for (name, value) in members {
        limits.set(name, value).map_err(from_block)?;
    }
    limits.check().map_err(from_block)?;
    Ok(limits)
}

impl Object for Group {
    fn get(&self, property: &str) -> Option<Value> {
        let limits = self.group.limits();
        if property == "limits" {
            let members = NAMES.map(|name| (name.to_owned(), json!(limits.get(name))));
            return Some(Value::Object(Map::from_iter(members)));
        }
        let name = property.strip_prefix("x-")?;
        NAMES.contains(&name).then(|| json!(limits.get(name)))
    }

    fn set(&self, _home: &Home<'_>, property: &str, value: Value) -> Result<()> {
        #[derive(Deserialize)]
        struct Change {
            limits: Limits,
        }
        if property != "limits" {
            let message = "Property cannot be set after initialization";
            return Err(Error::generic(message));
        }
        let arguments = Map::from_iter([("limits".to_owned(), value)]);
        let change: Change = Arguments::from_json(arguments).parse()?;
        let limits = changed(self.group.limits(), change.limits.given())?;
        self.group.set_limits(limits);
        Ok(())
    }

    fn release(&self, home: &Home<'_>, id: &str) -> Result<()> {
        // The graph's reference, and this one.
        if Arc::strong_count(&self.group) > 2 {
            return Err(in_use(id));
        }
        home.graph.objects().remove(id);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::Objects;
    use super::*;
    use block::Graph;
    use block::graph::NamePolicy;
    use qmp::keyval;

    fn add(objects: &Objects, graph: &Graph, properties: &str) -> Result<(), String> {
        let text = format!("throttle-group,id=g,{properties}");
        let arguments = keyval::parse(&text, Some("qom-type")).unwrap();
        objects.add(graph, arguments).map_err(|error| error.desc)
    }

    fn limit(objects: &Objects, name: &str) -> i64 {
        let (object, _) = objects.find("g").unwrap();
        object.get("limits").unwrap()[name].as_i64().unwrap()
    }

    #[test]
    fn limits_are_given_one_way_or_the_other_and_changed_later() {
        let graph = Graph::new(&[filters::DRIVERS], NamePolicy::default());
        let objects = Objects::default();
        add(&objects, &graph, "x-bps-total=64k,limits.iops-total=5").unwrap();
        assert_eq!(limit(&objects, "bps-total"), 65536);
        assert_eq!(limit(&objects, "iops-total"), 5);
        assert_eq!(limit(&objects, "iops-read-max-length"), 1);
        let (object, _) = objects.find("g").unwrap();
        assert_eq!(object.get("x-iops-total"), Some(json!(5)));
        let set = |property, value| objects.set(&graph, &*object, (property, value));
        set("limits", json!({"iops-total": 0, "bps-total": 7})).unwrap();
        assert_eq!(limit(&objects, "bps-total"), 7);
        let group = graph.objects().find::<ThrottleGroup>("g").unwrap();
        assert_eq!(group.limits().get("iops-total"), 0);
        for (property, value, message) in [
            (
                "x-bps-total",
                json!(1),
                "Property cannot be set after initialization",
            ),
            (
                "limits",
                json!({"bps-read": 5}),
                "bps/iops/max total values and read/write values cannot be used at the same time",
            ),
            (
                "limits",
                json!({"bps-read": "a"}),
                "Invalid parameter type for 'limits.bps-read', expected: integer",
            ),
            (
                "limits",
                json!({"x": 1}),
                "Parameter 'limits.x' is unexpected",
            ),
        ] {
            assert_eq!(set(property, value).unwrap_err().desc, message);
        }
        assert_eq!(limit(&objects, "bps-read"), 0);
        assert_eq!(
            objects.remove(&graph, "g").unwrap_err().desc,
            "object 'g' is in use, can not be deleted"
        );
        drop(group);
        objects.remove(&graph, "g").unwrap();
        assert!(!graph.objects().contains("g"));
    }

    #[test]
    fn limits_that_make_no_sense_leave_no_group() {
        let graph = Graph::new(&[filters::DRIVERS], NamePolicy::default());
        let objects = Objects::default();
        for (properties, message) in [
            ("x-iops-total=-1", "Property values cannot be negative"),
            (
                "limits.iops-size=5",
                "iops size requires an iops value to be set",
            ),
        ] {
            assert_eq!(add(&objects, &graph, properties).unwrap_err(), message);
        }
        assert!(!graph.objects().contains("g"));
    }
}
