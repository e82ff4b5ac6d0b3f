//! `iothread`: a thread for the queues of exports.
//!
//! `poll-max-ns` is followed. How polling adapts and how many requests go to the kernel at a time are
//! the executor's own decisions: the properties for these are checked and shown, and change nothing.

use std::cell::Cell;

use qmp::{Arguments, Error, Map, Result, Value, json};
use serde::Deserialize;
use service::objects::out_of_range;

use super::{Home, Object, ObjectType, Property, in_use};

/// The type's table line.
pub(super) const TYPE: ObjectType = ObjectType {
    name: "iothread",
    parent: "event-loop-base",
    properties: &[
        Property::new("aio-max-batch", "int"),
        Property::new("poll-grow", "int"),
        Property::new("poll-max-ns", "int"),
        Property::new("poll-shrink", "int"),
        Property::new("thread-pool-max", "int"),
        Property::new("thread-pool-min", "int"),
    ],
    make,
};

/// Nanoseconds of polling unless told otherwise.
const POLL_MAX_NS: i64 = 32768;
/// Threads of a pool unless told otherwise.
const POOL_MAX: i64 = 64;

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Properties {
    poll_max_ns: Option<i64>,
    poll_grow: Option<i64>,
    poll_shrink: Option<i64>,
    aio_max_batch: Option<i64>,
    thread_pool_min: Option<i64>,
    thread_pool_max: Option<i64>,
}

impl Properties {
    /// Refuses what no thread can have.
    fn check(&self) -> Result<()> {
        let numbers = [
            ("poll-max-ns", self.poll_max_ns),
            ("poll-grow", self.poll_grow),
            ("poll-shrink", self.poll_shrink),
            ("aio-max-batch", self.aio_max_batch),
            ("thread-pool-min", self.thread_pool_min),
            ("thread-pool-max", self.thread_pool_max),
        ];
        let negative = |(_, value): &&(&str, Option<i64>)| value.is_some_and(|value| value < 0);
        if let Some((name, _)) = numbers.iter().find(negative) {
            return Err(out_of_range(name));
        }
        let max = self.thread_pool_max.unwrap_or(POOL_MAX);
        if max == 0 || self.thread_pool_min.unwrap_or(0) > max {
            return Err(Error::generic("bad thread-pool-min/thread-pool-max values"));
        }
        Ok(())
    }

    /// These with what `other` says besides.
    fn changed(self, other: Self) -> Self {
        Self {
            poll_max_ns: other.poll_max_ns.or(self.poll_max_ns),
            poll_grow: other.poll_grow.or(self.poll_grow),
            poll_shrink: other.poll_shrink.or(self.poll_shrink),
            aio_max_batch: other.aio_max_batch.or(self.aio_max_batch),
            thread_pool_min: other.thread_pool_min.or(self.thread_pool_min),
            thread_pool_max: other.thread_pool_max.or(self.thread_pool_max),
        }
    }
}

struct IoThread {
    id: String,
    properties: Cell<Properties>,
}

fn make(home: &Home<'_>, id: &str, arguments: Arguments) -> Result<Box<dyn Object>> {
    let properties: Properties = arguments.parse()?;
    properties.check()?;
    home.iothreads.add(id, properties.poll_max_ns)?;
    Ok(Box::new(IoThread {
        id: id.to_owned(),
        properties: Cell::new(properties),
    }))
}

impl Object for IoThread {
    fn get(&self, property: &str) -> Option<Value> {
        let given = self.properties.get();
        let value = match property {
            "poll-max-ns" => given.poll_max_ns.unwrap_or(POLL_MAX_NS),
            "poll-grow" => given.poll_grow.unwrap_or(0),
            "poll-shrink" => given.poll_shrink.unwrap_or(0),
            "aio-max-batch" => given.aio_max_batch.unwrap_or(0),
            "thread-pool-min" => given.thread_pool_min.unwrap_or(0),
            "thread-pool-max" => given.thread_pool_max.unwrap_or(POOL_MAX),
            _ => return None,
        };
        Some(json!(value))
    }

    fn set(&self, home: &Home<'_>, property: &str, value: Value) -> Result<()> {
        let change = Map::from_iter([(property.to_owned(), value)]);
        let change: Properties = Arguments::from_json(change).parse()?;
        let changed = self.properties.get().changed(change);
        changed.check()?;
        if let Some(nanoseconds) = change.poll_max_ns {
            home.iothreads.set_poll_max(&self.id, nanoseconds)?;
        }
        self.properties.set(changed);
        Ok(())
    }

    fn release(&self, home: &Home<'_>, id: &str) -> Result<()> {
        home.iothreads.remove(id).map_err(|_| in_use(id))
    }
}

#[cfg(test)]
mod tests {
    use super::super::Objects;
    use super::*;
    use block::Graph;
    use block::graph::NamePolicy;
    use qmp::keyval;

    #[test]
    fn how_long_a_thread_polls_changes_while_it_is_used() {
        let graph = Graph::new(&[], NamePolicy::default());
        let objects = Objects::default();
        let arguments = keyval::parse("iothread,id=i,poll-max-ns=7", Some("qom-type")).unwrap();
        objects.add(&graph, arguments).unwrap();
        let _user = objects.iothreads().find("i").unwrap();
        let (object, _) = objects.find("i").unwrap();
        let set = |value| objects.set(&graph, &*object, ("poll-max-ns", json!(value)));
        set(0).unwrap();
        let shown = json!([{"id": "i", "poll-max-ns": 0}]);
        assert_eq!(objects.iothreads().describe(), shown);
        assert!(set(-1).is_err());
        assert_eq!(object.get("poll-max-ns"), Some(json!(0)));
    }
}
