//! Who uses a node, with which permissions.
//!
//! Owns: a node's list of users (edges of parents, and roots), the conflict check between them and
//! the passing on of the sum of their claims to the children and to the driver (which turns it
//! into file locks). Promises: either a change is granted all the way down, or nothing changes.
//! Must not know: what the users do.

use super::Node;
use crate::edge::{Claim, Permissions};
use crate::error::{Error, ErrorKind, Result};
use crate::root::Root;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// Hears that a child's length may have changed.
pub(crate) trait ResizeListener: Send + Sync {
    /// The child's length may have changed.
    fn child_resized(&self);
    /// Itself, for whoever gives it another child.
    fn as_parent(&self) -> Option<Parent>;
}

/// Who holds an edge.
#[derive(Clone)]
pub(crate) enum Parent {
    /// A node.
    Node(Arc<Node>),
    /// A root.
    Root(Root),
}

/// Does not keep the user alive.
pub(crate) type Listener = Weak<dyn ResizeListener>;

/// Who a user is, for messages.
#[derive(Clone, Debug)]
pub(crate) struct User {
    id: u64,
    label: String,
    name: &'static str,
}

impl User {
    pub(crate) fn new(id: u64, label: String, name: &'static str) -> Self {
        Self { id, label, name }
    }

    /// What it calls the node.
    pub(crate) fn edge(&self) -> &'static str {
        self.name
    }

    fn describe(&self, node: &str) -> String {
        format!(
            "{} (uses node '{node}' as '{}' child)",
            self.label, self.name
        )
    }
}

struct Entry {
    user: User,
    claim: Claim,
    listener: Option<Listener>,
}

/// The users of one node, newest first.
#[derive(Default)]
pub(crate) struct Users {
    list: Mutex<Vec<Entry>>,
}

impl Users {
    fn list(&self) -> MutexGuard<'_, Vec<Entry>> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Registers a user of `node`, whose list this is.
    pub(crate) fn add(&self, node: &Node, user: User, claim: Claim) -> Result<()> {
        self.check(node, &user, claim)?;
        let before = self.sum();
        let id = user.id;
        let entry = Entry {
            user,
            claim,
            listener: None,
        };
        self.list().insert(0, entry);
        pass_on(node, before, self.sum()).inspect_err(|_| self.remove(node, id))
    }

    /// Changes what a user claims.
    pub(crate) fn change(&self, node: &Node, id: u64, claim: Claim) -> Result<()> {
        let (user, old, _) = self
            .get(id)
            .expect("an edge is registered until it is dropped");
        if old == claim {
            return Ok(());
        }
        self.check(node, &user, claim)?;
        let before = self.sum();
        self.set(id, claim);
        pass_on(node, before, self.sum()).inspect_err(|_| {
            let failed = self.sum();
            self.set(id, old);
            give_back(node, failed, self.sum());
        })
    }

    /// Forgets a user.
    pub(crate) fn remove(&self, node: &Node, id: u64) {
        let before = self.sum();
        self.list().retain(|entry| entry.user.id != id);
        give_back(node, before, self.sum());
    }

    /// A user, its claim and who hears for it.
    pub(crate) fn get(&self, id: u64) -> Option<(User, Claim, Option<Listener>)> {
        let list = self.list();
        let entry = list.iter().find(|entry| entry.user.id == id)?;
        Some((entry.user.clone(), entry.claim, entry.listener.clone()))
    }

    /// Who uses the node, each with the number of the edge; `None` for one who cannot be given another child.
    pub(crate) fn parents(&self) -> Vec<(u64, Option<Parent>)> {
        let listed: Vec<_> = {
            let list = self.list();
            let entries = list.iter();
            entries
                .map(|entry| (entry.user.id, entry.listener.clone()))
                .collect()
        };
        let parent = |listener: Option<Listener>| listener?.upgrade()?.as_parent();
        listed
            .into_iter()
            .map(|(id, listener)| (id, parent(listener)))
            .collect()
    }

    /// Whether somebody writes, beside the nodes `but`.
    pub(crate) fn writes_beside(&self, but: &[Arc<Node>]) -> bool {
        let writers: Vec<_> = {
            let list = self.list();
            let writing = list.iter().filter(|entry| entry.claim.permissions.write);
            writing.map(|entry| entry.listener.clone()).collect()
        };
        let parent = |listener: Option<Listener>| listener?.upgrade()?.as_parent();
        writers.into_iter().any(|writer| match parent(writer) {
            Some(Parent::Node(node)) => !but.iter().any(|other| Arc::ptr_eq(other, &node)),
            _ => true,
        })
    }

    /// Whether nobody uses the node.
    pub(crate) fn is_empty(&self) -> bool {
        self.list().is_empty()
    }

    /// Whether some user is not a node but a root.
    pub(crate) fn has_root(&self) -> bool {
        self.list()
            .iter()
            .any(|entry| entry.user.name == crate::root::EDGE_NAME)
    }

    /// Whether some user is a node.
    pub(crate) fn has_node(&self) -> bool {
        self.list()
            .iter()
            .any(|entry| entry.user.name != crate::root::EDGE_NAME)
    }

    pub(crate) fn listen(&self, id: u64, listener: Listener) {
        let mut list = self.list();
        if let Some(entry) = list.iter_mut().find(|entry| entry.user.id == id) {
            entry.listener = Some(listener);
        }
    }

    /// Tells every user that the length may have changed.
    pub(crate) fn notify_resize(&self) {
        let listeners: Vec<_> = self
            .list()
            .iter()
            .filter_map(|entry| entry.listener.as_ref()?.upgrade())
            .collect();
        for listener in listeners {
            listener.child_resized();
        }
    }

    /// What all users together claim.
    pub(crate) fn sum(&self) -> Claim {
        self.list().iter().fold(Claim::IDLE, |sum, entry| Claim {
            permissions: sum.permissions.union(entry.claim.permissions),
            shared: sum.shared.intersection(entry.claim.shared),
        })
    }

    fn set(&self, id: u64, claim: Claim) {
        let mut list = self.list();
        if let Some(entry) = list.iter_mut().find(|entry| entry.user.id == id) {
            entry.claim = claim;
        }
    }

    fn check(&self, node: &Node, user: &User, claim: Claim) -> Result<()> {
        let changes = claim.permissions.minus(Permissions::READ);
        if node.options().read_only && !changes.is_empty() {
            return Err(Error::new(ErrorKind::Invalid, "Block node is read-only"));
        }
        for other in self.list().iter().filter(|other| other.user.id != user.id) {
            let refused = other.claim.permissions.minus(claim.shared);
            if !refused.is_empty() {
                return Err(conflict(node.name(), refused, (&other.user, user)));
            }
            let refused = claim.permissions.minus(other.claim.shared);
            if !refused.is_empty() {
                return Err(conflict(node.name(), refused, (user, &other.user)));
            }
        }
        Ok(())
    }
}

fn conflict(node: &str, refused: Permissions, (wants, refuses): (&User, &User)) -> Error {
    let (wants, refuses) = (wants.describe(node), refuses.describe(node));
    Error::new(
        ErrorKind::Busy,
        format!(
            "Permission conflict on node '{node}': permissions '{refused}' are both required by \
             {wants} and unshared by {refuses}."
        ),
    )
}

/// Grants a changed sum of claims below `node`.
fn pass_on(node: &Node, before: Claim, after: Claim) -> Result<()> {
    if before == after || node.is_retired() {
        return Ok(());
    }
    for (_, edge) in node.driver().edges() {
        edge.update(after)?;
    }
    node.driver()
        .set_permissions(after.permissions, after.shared)
}

/// Claims below `node` what its users claim.
pub(super) fn claim_again(node: &Node) -> Result<()> {
    let sum = node.users().sum();
    for (_, edge) in node.driver().edges() {
        edge.update(sum)?;
    }
    node.driver().set_permissions(sum.permissions, sum.shared)
}

/// Takes a grant back, which nobody can refuse.
fn give_back(node: &Node, before: Claim, after: Claim) {
    if let Err(error) = pass_on(node, before, after) {
        tracing::warn!(node = node.name(), %error, "could not give permissions back");
    }
}
