//! The registry of nodes: names, insertion, removal, the driver catalogue.

use crate::error::Result;
use crate::node::Node;
use crate::open::DriverEntry;
use std::path::PathBuf;
use std::sync::Arc;

/// What names inside images may open besides files beneath the image's own directory.
#[derive(Clone, Debug, Default)]
pub struct NamePolicy {
    /// Directories given with `--allow-dir`.
    pub allowed_dirs: Vec<PathBuf>,
}

/// All nodes of a process. Used by the control thread only.
pub struct Graph {}

impl Graph {
    /// An empty graph with the drivers of `tables`.
    pub fn new(tables: &[&'static [DriverEntry]], policy: NamePolicy) -> Graph {
        todo!()
    }
    /// Opens a node (and inline children) from `--blockdev`/`blockdev-add` options and adds it.
    /// Values may be typed JSON or strings (from `key=value`).
    pub async fn add(
        &self,
        options: serde_json::Map<String, serde_json::Value>,
    ) -> Result<Arc<Node>> {
        todo!()
    }
    /// Removes and closes a node that has no parents; inline children go with it.
    pub async fn remove(&self, node_name: &str) -> Result<()> {
        todo!()
    }
    /// A node by name.
    pub fn node(&self, node_name: &str) -> Option<Arc<Node>> {
        todo!()
    }
    /// All nodes, newest first (the order of `query-named-block-nodes`).
    pub fn nodes(&self) -> Vec<Arc<Node>> {
        todo!()
    }
    /// Flushes and closes every node, parents first.
    pub async fn close_all(&self) -> Result<()> {
        todo!()
    }
}
