//! How drivers are found and opened.
//!
//! A driver is one [`DriverEntry`] in the table of its crate; the engine joins the tables into a
//! catalogue. Opening gets an [`OpenRequest`]: the node's own options, and a way to get children:
//! by reference to a node, from an inline definition, or (backing files) by a name that the image
//! holds, under the name policy.

use crate::driver::{BoxFuture, Driver};
use crate::edge::Edge;
use crate::error::Result;
use crate::node::NodeOptions;

/// One line of a crate's driver table.
pub struct DriverEntry {
    /// Name on the command line.
    pub name: &'static str,
    /// Opens a node. Driver-specific options are taken out of the request; what remains
    /// untaken is refused by the graph ("Parameter 'x' is unexpected").
    pub open: for<'a> fn(&'a mut OpenRequest<'_>) -> BoxFuture<'a, Result<Box<dyn Driver>>>,
}

/// What a driver's `open` gets.
pub struct OpenRequest<'g> {
    graph: &'g crate::graph::Graph,
    node: NodeOptions,
    options: serde_json::Map<String, serde_json::Value>,
}

impl OpenRequest<'_> {
    /// Options common to all nodes.
    pub fn node(&self) -> &NodeOptions {
        &self.node
    }
    /// Lets the driver fall back to read-only (`auto-read-only`).
    pub fn set_read_only(&mut self) {
        self.node.read_only = true;
    }
    /// Takes a string option.
    pub fn take_str(&mut self, name: &str) -> Result<Option<String>> {
        todo!()
    }
    /// Takes an on/off option (JSON boolean, or "on"/"off").
    pub fn take_bool(&mut self, name: &str) -> Result<Option<bool>> {
        todo!()
    }
    /// Takes a size option (JSON integer, or a number with k/M/G/T suffix), in bytes.
    pub fn take_size(&mut self, name: &str) -> Result<Option<u64>> {
        todo!()
    }
    /// Takes a raw option.
    pub fn take(&mut self, name: &str) -> Option<serde_json::Value> {
        self.options.remove(name)
    }
    /// The child under option `name`: a node name or an inline definition. `None` when absent;
    /// `Some(None)` when given as null.
    pub async fn child(
        &mut self,
        name: &'static str,
        role: ChildRole,
    ) -> Result<Option<Option<Edge>>> {
        todo!()
    }
    /// Opens the backing file that an image names, when policy allows: a plain file name that
    /// resolves beneath the directory of `image_file` (or of an allowed directory).
    pub async fn backing_named(
        &mut self,
        image_file: &Edge,
        name: &str,
        format: Option<&str>,
    ) -> Result<Edge> {
        todo!()
    }
}

/// What a child is to its parent; decides permissions and inherited options.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChildRole {
    /// Data and metadata of a format.
    Image,
    /// Data only (`data-file`).
    Data,
    /// Read where the parent has nothing.
    Backing,
    /// What a filter passes through to.
    Filtered,
}
