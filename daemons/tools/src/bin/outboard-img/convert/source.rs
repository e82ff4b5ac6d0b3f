//! What is read: images, or a snapshot in an image.

use block::edge::Permissions;
use block::snapshot::{Selector, SnapshotInfo};
use block::{Node, NodeOptions, Root};
use qmp::keyval;
use serde_json::Value;
use std::sync::Arc;
use tools::failure::{Failure, described, report};
use tools::image::{Image, Sharing, Tool};

/// How `-l` begins when it has options.
const OPTIONS: &str = "snapshot.";

/// Which snapshot `-l` means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Selection {
    /// By identifier, else by name.
    Either(String),
    /// By what is given.
    Options {
        /// `snapshot.id`
        id: Option<String>,
        /// `snapshot.name`
        name: Option<String>,
    },
}

impl Selection {
    /// The value of `-l`.
    pub(crate) fn parse(text: &str) -> Result<Self, Failure> {
        if !text.starts_with(OPTIONS) {
            return Ok(Self::Either(text.to_owned()));
        }
        let failed = |message: String| {
            report(&message);
            Failure::message(format!("Failed in parsing snapshot param '{text}'"))
        };
        let options = keyval::parse(text, None).map_err(|error| failed(error.desc))?;
        let members = options.into_members();
        let inner = members.get("snapshot").and_then(Value::as_object);
        let (mut id, mut name) = (None, None);
        for (key, value) in inner.into_iter().flatten() {
            let value = value.as_str().map(str::to_owned);
            match key.as_str() {
                "id" => id = value,
                "name" => name = value,
                other => return Err(failed(format!("Invalid parameter '{OPTIONS}{other}'"))),
            }
        }
        match members.keys().find(|key| *key != "snapshot") {
            Some(other) => Err(failed(format!("Invalid parameter '{other}'"))),
            None => Ok(Self::Options { id, name }),
        }
    }

    fn find<'l>(&self, list: &'l [SnapshotInfo]) -> Option<&'l SnapshotInfo> {
        let select = |id, name| Selector { id, name }.find(list);
        match self {
            Self::Either(text) => {
                select(Some(text), None).or_else(|| select(None, Some(text.as_str())))
            }
            Self::Options {
                id: None,
                name: None,
            } => None,
            Self::Options { id, name } => select(id.as_deref(), name.as_deref()),
        }
    }
}

/// What is read.
pub(crate) struct Source {
    roots: Vec<Root>,
}

impl Source {
    /// The images, or the snapshot of the only one.
    pub(crate) async fn select(
        images: &[Image],
        selection: Option<&Selection>,
        sharing: Sharing,
    ) -> Result<Self, Failure> {
        let nodes = match (selection, images) {
            (None, images) => images.iter().map(|image| Arc::clone(&image.node)).collect(),
            (Some(selection), [image]) => vec![shown(&image.node, selection).await?],
            (Some(_), _) => {
                let message = "No support for concatenating multiple snapshot";
                return Err(Failure::message(message));
            }
        };
        let shared = match sharing {
            Sharing::Forced => Permissions::ALL,
            // What is copied does not change meanwhile.
            Sharing::Locked => Permissions::READ.union(Permissions {
                write_unchanged: true,
                ..Permissions::NONE
            }),
        };
        let mut roots = Vec::new();
        for node in &nodes {
            let root = Root::new("", node, Permissions::READ, shared);
            roots.push(root.map_err(|error| Failure::message(described("", &error)))?);
        }
        Ok(Self { roots })
    }

    /// The roots, in order.
    pub(crate) fn roots(&self) -> &[Root] {
        &self.roots
    }

    /// Closes everything.
    pub(crate) async fn close(self, tool: &Tool, images: Vec<Image>) -> Result<(), Failure> {
        drop(self);
        for image in images {
            tool.close_image(image).await?;
        }
        Ok(())
    }
}

/// A node that shows a snapshot of `node`.
async fn shown(node: &Node, selection: &Selection) -> Result<Arc<Node>, Failure> {
    let failed = |message: &str| Failure::message(format!("Failed to load snapshot: {message}"));
    let driver = node.driver();
    let Some(snapshots) = driver.snapshots() else {
        return Err(failed(&format!(
            "Block format '{}' used by device '' does not support temporarily loading internal \
             snapshots",
            driver.driver_name()
        )));
    };
    let list = snapshots.list();
    let found = selection
        .find(&list)
        .ok_or_else(|| failed("Can't find snapshot"))?;
    let view = snapshots.open(&found.id).await;
    let view = view.map_err(|error| failed(&error.to_string()))?;
    let options = NodeOptions {
        node_name: format!("snapshot of {}", node.name()),
        read_only: true,
        ..NodeOptions::default()
    };
    Ok(Node::new(options, view))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_is_meant_by_identifier_or_name_or_by_options() {
        let either = Selection::parse("a.b").unwrap();
        assert_eq!(either, Selection::Either("a.b".into()));
        let options = Selection::parse("snapshot.id=1,snapshot.name=x").unwrap();
        let (id, name) = (Some("1".into()), Some("x".into()));
        assert_eq!(options, Selection::Options { id, name });
        assert!(Selection::parse("snapshot.foo=1").is_err());
    }
}
