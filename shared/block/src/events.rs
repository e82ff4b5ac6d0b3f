//! What happens in nodes and is told to whoever runs the process.
//!
//! ```text
//!   driver, on any thread ─ Reporter (its node's name) ─► NodeEvents of the graph ─► monitors
//! ```
//!
//! Owns: the events and the seam. The graph hands each driver a [`Reporter`] when it is opened.
//! Promises: reporting neither waits nor fails; without a listener nothing happens. Must not know:
//! QMP.

use crate::driver::ByteRange;
use executor::Errno;
use std::sync::Arc;

/// An image makes no sense.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageCorrupted {
    /// The node of the image.
    pub node_name: String,
    /// What is wrong, for a human.
    pub message: String,
    /// Bytes of the image file that a write was kept from, when that is what revealed it.
    pub range: Option<ByteRange>,
    /// The image takes no more writes; else the one request failed.
    pub fatal: bool,
}

/// What a quorum asked of a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QuorumOperation {
    /// To read.
    Read,
    /// To write.
    Write,
    /// To flush.
    Flush,
}

/// A copy of a quorum failed, or differs from the others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuorumBad {
    /// The copy's node.
    pub node_name: String,
    /// What was asked of it.
    pub operation: QuorumOperation,
    /// Where.
    pub range: ByteRange,
    /// How it failed; `None` when it differs.
    pub error: Option<Errno>,
}

/// Too few copies of a quorum agree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuorumFailed {
    /// The quorum's node.
    pub node_name: String,
    /// Where.
    pub range: ByteRange,
}

/// A node was written beyond the point that somebody watches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriteThreshold {
    /// The point, in bytes.
    pub threshold: u64,
    /// By how many bytes.
    pub exceeded_by: u64,
}

/// Hears of events; called on any thread, queue threads included. Must not block.
pub trait NodeEvents: Send + Sync {
    /// An image was found to be corrupt. Once per image and severity.
    fn image_corrupted(&self, event: ImageCorrupted);
    /// A copy is bad. As often as it is asked for something.
    fn quorum_bad(&self, event: QuorumBad);
    /// A request found no quorum.
    fn quorum_failed(&self, event: QuorumFailed);
    /// A node was written beyond its threshold. Once for each that is set.
    fn write_threshold(&self, node_name: &str, event: WriteThreshold);
}

/// One node's way to report.
#[derive(Clone, Default)]
pub struct Reporter {
    node_name: String,
    events: Option<Arc<dyn NodeEvents>>,
}

/// A finding of corruption.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Corruption {
    /// What is wrong, for a human.
    pub message: String,
    /// See [`ImageCorrupted::range`].
    pub range: Option<ByteRange>,
}

impl<T: Into<String>> From<T> for Corruption {
    fn from(message: T) -> Self {
        Self {
            message: message.into(),
            range: None,
        }
    }
}

impl Reporter {
    /// For the node `node_name`; nobody hears it without `events`.
    pub fn new(node_name: &str, events: Option<Arc<dyn NodeEvents>>) -> Self {
        Self {
            node_name: node_name.to_owned(),
            events,
        }
    }

    /// Reports a bad copy of this node's content.
    pub fn quorum_bad(&self, event: QuorumBad) {
        if let Some(events) = &self.events {
            events.quorum_bad(event);
        }
    }

    /// Reports that too few copies of this node's content agree on `range`.
    pub fn quorum_failed(&self, range: ByteRange) {
        if let Some(events) = &self.events {
            let node_name = self.node_name.clone();
            events.quorum_failed(QuorumFailed { node_name, range });
        }
    }

    /// Reports that the node was written beyond its threshold.
    pub fn write_threshold(&self, event: WriteThreshold) {
        if let Some(events) = &self.events {
            events.write_threshold(&self.node_name, event);
        }
    }

    /// Reports that the node's image is corrupt; `fatal` as in [`ImageCorrupted::fatal`].
    pub fn image_corrupted(&self, found: Corruption, fatal: bool) {
        if let Some(events) = &self.events {
            events.image_corrupted(ImageCorrupted {
                node_name: self.node_name.clone(),
                message: found.message,
                range: found.range,
                fatal,
            });
        }
    }
}
