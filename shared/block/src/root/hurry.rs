//! Letting requests go on that drivers hold back.

use crate::node::Node;
use std::sync::Weak;

/// Nodes whose drivers hold nothing back until this is dropped.
#[must_use = "requests are held back again as soon as this is dropped"]
pub struct Hurried(Vec<Weak<Node>>);

impl Hurried {
    /// Tells every node below.
    pub(super) fn new(node: &Node) -> Self {
        let mut hurried = Self(Vec::new());
        hurried.add(node);
        hurried
    }

    fn add(&mut self, node: &Node) {
        node.driver().drain_begin();
        self.0.push(node.weak());
        for (_, edge) in node.driver().edges() {
            self.add(edge.node());
        }
    }
}

impl Drop for Hurried {
    fn drop(&mut self) {
        for node in self.0.iter().filter_map(Weak::upgrade) {
            node.driver().drain_end();
        }
    }
}
