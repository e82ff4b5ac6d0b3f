//! Events of nodes, on their way from any thread to the monitors.
//!
//! ```text
//!   queue thread ─ image_corrupted, ... ─► list, notify ─► task of the control thread ─► Engine::emit
//! ```
//!
//! The list is short: a node reports an image as corrupt at most twice, and what comes with requests is
//! paced.

mod paced;

use std::rc::{Rc, Weak};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use block::ByteRange;
use block::error::reason;
use block::events::{
    ImageCorrupted, NodeEvents, QuorumBad, QuorumFailed, QuorumOperation, WriteThreshold,
};
use executor::sync::Notify;
use executor::time;
use paced::Paced;
use qmp::{Event, Value, json};

use crate::engine::Engine;

/// Sectors of events, in bytes.
const SECTOR: u64 = 512;

/// What nodes reported and the control thread has not seen.
#[derive(Default)]
pub(crate) struct Reported {
    list: Mutex<List>,
    changed: Notify,
}

#[derive(Default)]
struct List {
    corrupted: Vec<ImageCorrupted>,
    /// One for each threshold that was set.
    beyond_threshold: Vec<Event>,
    /// By the kind of event and the node.
    paced: Paced<(&'static str, String), Event>,
}

impl Reported {
    fn list(&self) -> MutexGuard<'_, List> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pace(&self, node_name: String, event: Event) {
        self.list().paced.report((event.name(), node_name), event);
        self.changed.notify_all();
    }

    /// Takes what is to be emitted now.
    fn take(&self) -> Vec<Event> {
        let mut list = self.list();
        let corrupted = std::mem::take(&mut list.corrupted);
        let mut events: Vec<Event> = corrupted.iter().map(image_corrupted).collect();
        events.append(&mut list.beyond_threshold);
        events.extend(list.paced.due(time::now()));
        events
    }
}

impl NodeEvents for Reported {
    fn image_corrupted(&self, event: ImageCorrupted) {
        self.list().corrupted.push(event);
        self.changed.notify_all();
    }

    fn quorum_bad(&self, event: QuorumBad) {
        let described = quorum_report_bad(&event);
        self.pace(event.node_name, described);
    }

    fn quorum_failed(&self, event: QuorumFailed) {
        let described = quorum_failure(&event);
        self.pace(event.node_name, described);
    }

    fn write_threshold(&self, node_name: &str, event: WriteThreshold) {
        let described = block_write_threshold(node_name, event);
        self.list().beyond_threshold.push(described);
        self.changed.notify_all();
    }
}

/// `BLOCK_WRITE_THRESHOLD` of QEMU's QMP reference.
fn block_write_threshold(node_name: &str, event: WriteThreshold) -> Event {
    let data = json!({
        "amount-exceeded": event.exceeded_by,
        "node-name": node_name,
        "write-threshold": event.threshold,
    });
    Event::with_data("BLOCK_WRITE_THRESHOLD", data)
}

/// Emits what is reported while the engine lives.
pub(crate) async fn emit_reported(engine: Weak<Engine>, reported: Arc<Reported>) {
    loop {
        let changed = reported.changed.notified();
        let Some(engine) = engine.upgrade() else {
            return;
        };
        for event in reported.take() {
            engine.emit(&event);
        }
        drop::<Rc<Engine>>(engine);
        let next = reported.list().paced.next_due();
        match next {
            Some(at) => {
                time::timeout(at.saturating_sub(time::now()), changed).await;
            }
            None => changed.await,
        }
    }
}

/// The sectors that a range touches: the first, and how many.
fn sectors(range: ByteRange) -> (u64, u64) {
    let first = range.offset / SECTOR;
    let end = range.offset.saturating_add(range.length).div_ceil(SECTOR);
    (first, end - first)
}

/// `QUORUM_REPORT_BAD` of QEMU's QMP reference.
fn quorum_report_bad(event: &QuorumBad) -> Event {
    let (first, count) = sectors(event.range);
    let mut data = json!({
        "node-name": event.node_name,
        "sectors-count": count,
        "sector-num": first,
        "type": match event.operation {
            QuorumOperation::Read => "read",
            QuorumOperation::Write => "write",
            QuorumOperation::Flush => "flush",
        },
    });
    if let Some(errno) = event.error {
        data["error"] = reason(errno).into();
    }
    Event::with_data("QUORUM_REPORT_BAD", data)
}

/// `QUORUM_FAILURE` of QEMU's QMP reference.
fn quorum_failure(event: &QuorumFailed) -> Event {
    let (first, count) = sectors(event.range);
    let data = json!({
        "reference": event.node_name,
        "sectors-count": count,
        "sector-num": first,
    });
    Event::with_data("QUORUM_FAILURE", data)
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
