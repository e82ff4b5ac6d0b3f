//! A parent's reference to a child node, with the permissions it holds on it.

use crate::node::Node;
use std::sync::Arc;

/// What a parent does with a child (the first set) and tolerates others doing (the second), as
/// in QEMU's permission system.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Permissions {
    /// Reads need consistent content.
    pub consistent_read: bool,
    /// Writes that change what is read.
    pub write: bool,
    /// Writes that do not change what is read.
    pub write_unchanged: bool,
    /// Changes of length.
    pub resize: bool,
}

/// A reference from a parent (node or root) to a child node.
///
/// Following it costs a pointer: what it points to changes only while both sides are drained.
pub struct Edge {
    child: Arc<Node>,
}

impl Edge {
    /// The child.
    pub fn node(&self) -> &Node {
        &self.child
    }
}
