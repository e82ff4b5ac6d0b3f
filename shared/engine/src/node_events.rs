//! Events of nodes, on their way from any thread to the monitors.
//!
//! ```text
//!   queue thread ─ image_corrupted ─► list, notify ─► task of the control thread ─► Engine::emit
//! ```
//!
//! The list is short: a node reports an image as corrupt at most twice.

use std::rc::{Rc, Weak};
use std::sync::{Arc, Mutex, PoisonError};

use block::events::{ImageCorrupted, NodeEvents};
use executor::sync::Notify;
use qmp::{Event, Value, json};

use crate::engine::Engine;

/// What nodes reported and the control thread has not seen.
#[derive(Default)]
pub(crate) struct Reported {
    list: Mutex<Vec<ImageCorrupted>>,
    changed: Notify,
}

impl Reported {
    fn take(&self) -> Vec<ImageCorrupted> {
        let mut list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *list)
    }
}

impl NodeEvents for Reported {
    fn image_corrupted(&self, event: ImageCorrupted) {
        self.list
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(event);
        self.changed.notify_all();
    }
}

/// Emits what is reported while the engine lives.
pub(crate) async fn emit_reported(engine: Weak<Engine>, reported: Arc<Reported>) {
    loop {
        let changed = reported.changed.notified();
        let Some(engine) = engine.upgrade() else {
            return;
        };
        for event in reported.take() {
            engine.emit(&image_corrupted(&event));
        }
        drop::<Rc<Engine>>(engine);
        changed.await;
    }
}

/// `BLOCK_IMAGE_CORRUPTED` of QEMU's QMP reference. Devices are the system emulator's: none here.
fn image_corrupted(event: &ImageCorrupted) -> Event {
    let mut data = json!({
        "device": "",
        "node-name": event.node_name,
        "msg": event.message,
    });
    if let (Value::Object(members), Some(range)) = (&mut data, event.range) {
        members.insert("offset".to_owned(), json!(range.offset));
        members.insert("size".to_owned(), json!(range.length));
    }
    if let Value::Object(members) = &mut data {
        members.insert("fatal".to_owned(), json!(event.fatal));
    }
    Event::with_data("BLOCK_IMAGE_CORRUPTED", data)
}
