//! `iothread`: a thread for the queues of exports.
//!
//! `poll-max-ns` is followed. How polling adapts and how many requests go to the kernel at a time are
//! the executor's own decisions: the properties for these are checked and shown, and change nothing.

use qmp::{Arguments, Error, Result, Value, json};
use serde::Deserialize;

use super::{Home, Object, ObjectType, Property, in_use};

/// The type's table line.
pub(super) const TYPE: ObjectType = ObjectType {
    name: "iothread",
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

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Properties {
    poll_max_ns: Option<i64>,
    poll_grow: Option<i64>,
    poll_shrink: Option<i64>,
    aio_max_batch: Option<i64>,
    thread_pool_min: Option<i64>,
    thread_pool_max: Option<i64>,
}

struct IoThread {
    properties: Properties,
}

fn make(home: &Home<'_>, id: &str, arguments: Arguments) -> Result<Box<dyn Object>> {
    let properties: Properties = arguments.parse()?;
    let hints = [
        ("poll-grow", properties.poll_grow),
        ("poll-shrink", properties.poll_shrink),
        ("aio-max-batch", properties.aio_max_batch),
    ];
    if let Some((name, _)) = hints
        .iter()
        .find(|(_, value)| value.is_some_and(|value| value < 0))
    {
        let range = format!("[0, {}]", i64::MAX);
        return Err(Error::generic(format!(
            "{name} value must be in range {range}"
        )));
    }
    let (min, max) = (
        properties.thread_pool_min.unwrap_or(0),
        properties.thread_pool_max.unwrap_or(POOL_MAX),
    );
    if min < 0 || max <= 0 || min > max {
        let what = format!("bad thread-pool-min/thread-pool-max values: {min}, {max}");
        return Err(Error::generic(what));
    }
    home.iothreads.add(id, properties.poll_max_ns)?;
    Ok(Box::new(IoThread { properties }))
}

impl Object for IoThread {
    fn get(&self, property: &str) -> Option<Value> {
        let given = &self.properties;
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

    fn release(&self, home: &Home<'_>, id: &str) -> Result<()> {
        home.iothreads.remove(id).map_err(|_| in_use(id))
    }
}
