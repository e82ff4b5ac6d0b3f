//! Changing what edges point at while the requests above wait.

use super::Graph;
use crate::edge::{Edge, Permissions};
use crate::error::{Error, ErrorKind, Result};
use crate::node::{Node, Parent};
use crate::root::{Drained, Root};
use std::sync::Arc;

/// Nodes below which no request runs: every root above them is drained while this lives.
pub(crate) struct DrainedAbove {
    nodes: Vec<Arc<Node>>,
    _roots: Vec<Drained>,
}

impl DrainedAbove {
    /// Drains every root above `nodes`.
    pub(crate) async fn new(nodes: Vec<Arc<Node>>) -> Self {
        let mut seen = nodes;
        let mut roots: Vec<Root> = Vec::new();
        let mut next = 0;
        while let Some(node) = seen.get(next).cloned() {
            next += 1;
            for (_, parent) in node.users().parents() {
                match parent {
                    Some(Parent::Root(root)) => roots.push(root),
                    Some(Parent::Node(above)) if !holds(&seen, &above) => seen.push(above),
                    _ => {}
                }
            }
        }
        let mut drained = Vec::with_capacity(roots.len());
        for root in roots {
            drained.push(root.drain().await);
        }
        Self {
            nodes: seen,
            _roots: drained,
        }
    }

    /// Whether `node` is one of them, or above one.
    pub(crate) fn covers(&self, node: &Arc<Node>) -> bool {
        holds(&self.nodes, node)
    }

    /// A node that has taken the place of one of them, or that nobody uses yet.
    pub(super) fn include(&mut self, node: &Arc<Node>) {
        if !self.covers(node) {
            self.nodes.push(Arc::clone(node));
        }
    }
}

fn holds(list: &[Arc<Node>], node: &Arc<Node>) -> bool {
    list.iter().any(|other| Arc::ptr_eq(other, node))
}

/// Requests of all roots above some nodes wait until this is dropped.
#[must_use = "requests go on as soon as this is dropped"]
pub struct Quiet(#[expect(dead_code, reason = "held to be dropped")] DrainedAbove);

impl Graph {
    /// Drains every root above any node of the graph: one moment for all of them.
    pub async fn drain_all(&self) -> Quiet {
        Quiet(DrainedAbove::new(self.nodes()).await)
    }
}

/// Somebody who uses a node.
pub struct User {
    /// What it is.
    pub kind: UserKind,
    /// What it calls the node.
    pub edge: &'static str,
    /// What it does.
    pub permissions: Permissions,
    /// What it lets others do.
    pub shared: Permissions,
}

/// Kinds of users.
pub enum UserKind {
    /// An export, a job, a tool.
    Root,
    /// A node above.
    Node(Arc<Node>),
    /// Work on the node that is under way.
    Other,
}

impl Node {
    /// Who uses the node, oldest first.
    pub fn users_of(&self) -> Vec<User> {
        let users = self.users();
        let mut list: Vec<_> = users
            .parents()
            .into_iter()
            .filter_map(|(id, parent)| {
                let (user, claim, _) = users.get(id)?;
                Some(User {
                    kind: match parent {
                        Some(Parent::Root(_)) => UserKind::Root,
                        Some(Parent::Node(node)) => UserKind::Node(node),
                        None => UserKind::Other,
                    },
                    edge: user.edge(),
                    permissions: claim.permissions,
                    shared: claim.shared,
                })
            })
            .collect();
        list.reverse();
        list
    }
}

/// Runs `change` on the edge number `id` of `parent`.
fn on_edge<T>(parent: &Parent, id: u64, change: impl FnOnce(&Edge) -> T) -> Option<T> {
    match parent {
        Parent::Root(root) => Some(change(root.edge())),
        Parent::Node(node) => {
            let edges = node.driver().edges();
            let found = edges.into_iter().find(|(_, edge)| edge.id() == id);
            found.map(|(_, edge)| change(edge))
        }
    }
}

/// Gives the users of `old` the child `new`, but for those that `stay`. All move or none.
///
/// # Errors
/// `Busy` when one of them cannot have the same permissions there, or cannot move.
pub(super) fn move_users(
    (old, new): (&Arc<Node>, &Arc<Node>),
    stay: &dyn Fn(&Node) -> bool,
    drained: &mut DrainedAbove,
) -> Result<()> {
    drained.include(old);
    drained.include(new);
    let mut moved: Vec<(u64, Parent)> = Vec::new();
    let mut failure = None;
    for (id, parent) in old.users().parents() {
        let Some(parent) = parent else {
            let message = format!("Node '{}' is used by an operation", old.name());
            failure = Some(Error::new(ErrorKind::Busy, message));
            break;
        };
        if matches!(&parent, Parent::Node(node) if stay(node)) {
            continue;
        }
        match on_edge(&parent, id, |edge| edge.point_at(new, drained)) {
            Some(Ok(_)) => moved.push((id, parent)),
            Some(Err(error)) => {
                failure = Some(error);
                break;
            }
            None => {}
        }
    }
    let Some(error) = failure else {
        return Ok(());
    };
    for (id, parent) in moved.iter().rev() {
        if let Some(Err(error)) = on_edge(parent, *id, |edge| edge.point_at(old, drained)) {
            tracing::error!(node = old.name(), %error, "an edge could not be put back");
        }
    }
    Err(error)
}
