//! Events: what a server tells every negotiated client without being asked.

use serde::Serialize;
use serde_json::{Map, Value, json};
use std::cell::RefCell;
use std::rc::{Rc, Weak};
use std::time::{SystemTime, UNIX_EPOCH};

/// One event, stamped with the time it happened.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    name: &'static str,
    data: Option<Value>,
    at: SystemTime,
}

impl Event {
    /// An event without data that happens now.
    pub fn new(name: &'static str) -> Self {
        Self {
            name,
            data: None,
            at: SystemTime::now(),
        }
    }

    /// An event with data that happens now.
    ///
    /// Data that has no JSON form (a map with keys that are not strings) becomes an empty object.
    pub fn with_data(name: &'static str, data: impl Serialize) -> Self {
        let data = serde_json::to_value(data).unwrap_or_else(|_| Value::Object(Map::new()));
        Self {
            data: Some(data),
            ..Self::new(name)
        }
    }

    /// Its name, in capitals.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Its data.
    pub fn data(&self) -> Option<&Value> {
        self.data.as_ref()
    }

    /// The message on the wire.
    pub(crate) fn to_value(&self) -> Value {
        let since_epoch = self.at.duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut message = json!({
            "timestamp": {
                "seconds": since_epoch.as_secs(),
                "microseconds": since_epoch.subsec_micros(),
            },
            "event": self.name,
        });
        if let Some(data) = &self.data {
            message["data"] = data.clone();
        }
        message
    }
}

/// Hears every event. It must not call back into whoever tells it.
pub trait EventSink {
    /// Something happened.
    fn event(&self, event: &Event);
}

/// Everyone who hears the events of a server.
#[derive(Default)]
pub struct EventSinks {
    sinks: RefCell<Vec<Weak<dyn EventSink>>>,
}

impl EventSinks {
    /// Sends every later event to `sink` while it lives.
    pub fn subscribe(&self, sink: &Rc<dyn EventSink>) {
        let mut sinks = self.sinks.borrow_mut();
        sinks.retain(|known| known.strong_count() > 0);
        sinks.push(Rc::downgrade(sink));
    }

    /// Tells everyone of `event`.
    pub fn emit(&self, event: &Event) {
        let sinks: Vec<_> = self
            .sinks
            .borrow()
            .iter()
            .filter_map(Weak::upgrade)
            .collect();
        for sink in sinks {
            sink.event(event);
        }
    }
}
