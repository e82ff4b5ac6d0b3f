//! From nodes to names, by QEMU's rules.
//!
//! A protocol's driver knows the name that opens it again, if there is one. A format over a
//! protocol is found by that name too, unless options that matter were given, or its backing is
//! not the one that the image names. Filters are nobody's default, so they have a name only when
//! they have a syntax of their own.

use super::Layer;
use super::parse::{combine, has_protocol};
use crate::edge::Edge;
use crate::error::{Error, ErrorKind, Result};
use crate::node::Node;
use serde_json::{Map, Value};

/// Longest name, in bytes; a longer one ends with dots.
const MAX_NAME: usize = 4095;

impl Node {
    /// The file name that the node is shown by: one that opens it again, or `json:{...}` with all
    /// options that matter.
    pub fn filename(&self) -> String {
        let exact = self.exact_filename();
        if !exact.is_empty() {
            return exact;
        }
        let options = qmp::json::ordered(&Value::Object(self.full_options()));
        let mut name = format!("json:{}", qmp::json::to_string(&options));
        if name.len() > MAX_NAME {
            // JSON is written in ASCII.
            name.truncate(MAX_NAME - 3);
            name.push_str("...");
        }
        name
    }

    /// The plain name that opens the node again; "" when there is none.
    pub fn exact_filename(&self) -> String {
        let driver = self.driver();
        if driver.layer() != Layer::Format {
            return driver.filename();
        }
        let Some(primary) = primary(self) else {
            return String::new();
        };
        let origin = &self.options().origin;
        let is_plain = primary.driver().layer() != Layer::Format
            && !origin.distinctive
            && !self.is_backing_overridden();
        match is_plain {
            true => primary.exact_filename(),
            false => String::new(),
        }
    }

    /// All options that decide what is read from the node, those of its children included.
    pub fn full_options(&self) -> Map<String, Value> {
        let origin = &self.options().origin;
        let mut options = origin.options.clone();
        if options.is_empty() {
            options.insert("driver".into(), self.driver().driver_name().into());
        }
        let overridden = self.is_backing_overridden();
        let mut list: Vec<Value> = Vec::new();
        let edges = self.driver().edges();
        for (role, edge) in &edges {
            let child = Value::Object(edge.node().full_options());
            match *role {
                "backing" if !overridden => {}
                // The image names them.
                role if role.starts_with("extents.") => {}
                role if role.starts_with("children.") => list.push(child),
                role => {
                    options.insert(role.to_owned(), child);
                }
            }
        }
        if !list.is_empty() {
            options.insert("children".into(), Value::Array(list));
        }
        if overridden && backing(self).is_none() {
            options.insert("backing".into(), Value::Null);
        }
        options
    }

    /// What relative names that the node's image holds are put behind: a directory with a slash,
    /// or "".
    ///
    /// # Errors
    /// `Invalid` when the image is nowhere where there are directories.
    pub fn base_directory(&self) -> Result<String> {
        if let Some(directory) = self.driver().base_directory() {
            return directory;
        }
        if let Some(primary) = primary(self) {
            return primary.base_directory();
        }
        match self.driver().filename() {
            name if name.is_empty() => Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "Cannot generate a base directory for {} nodes",
                    self.driver().driver_name()
                ),
            )),
            name => Ok(combine(&name, "")),
        }
    }

    /// A name that the node's image holds, in full.
    ///
    /// # Errors
    /// As for [`Node::base_directory`].
    pub fn absolute_name(&self, name: &str) -> Result<String> {
        match name.starts_with('/') || has_protocol(name) {
            true => Ok(name.to_owned()),
            false => Ok(format!("{}{name}", self.base_directory()?)),
        }
    }

    /// Whether the backing is another than the image names.
    fn is_backing_overridden(&self) -> bool {
        let origin = &self.options().origin;
        if self.driver().layer() != Layer::Format || origin.described {
            return false;
        }
        let named = match &origin.named_backing {
            Some(name) => name.clone(),
            None => {
                let described = self.driver().describe();
                let name = described.get("backing-filename").and_then(Value::as_str);
                name.unwrap_or_default().to_owned()
            }
        };
        match backing(self) {
            Some(backing) => backing.filename() != named,
            None => !named.is_empty(),
        }
    }
}

fn backing(node: &Node) -> Option<&Node> {
    child(node, |role| role == "backing")
}

/// The child that the node's content comes from.
fn primary(node: &Node) -> Option<&Node> {
    child(node, |role| matches!(role, "file" | "image"))
}

fn child(node: &Node, is_meant: impl Fn(&str) -> bool) -> Option<&Node> {
    let edges: Vec<(&'static str, &Edge)> = node.driver().edges();
    let found = edges.into_iter().find(|(role, _)| is_meant(role));
    found.map(|(_, edge)| edge.node())
}
