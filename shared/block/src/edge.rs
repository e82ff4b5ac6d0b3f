//! A parent's reference to a child node, with the permissions it holds on it.
//!
//! ```text
//!   parent's parents' permissions ─┐
//!   role of the child ─────────────┼─► permissions on the child ─► its children ... ─► file locks
//!   parent read-only? ─────────────┘
//! ```
//!
//! Owns: [`Permissions`], the rules by which a [`ChildRole`] turns a node's own permissions into
//! those on a child, and [`Edge`]. Promises: an edge exists only with its permissions granted, and
//! gives them back when dropped; following an edge costs one pointer read. Must not know: what a
//! driver does with its children.
//!
//! The permission lists are changed by the control thread only.

#![expect(
    unsafe_code,
    reason = "an edge is followed on every request and must cost one pointer read"
)]

use crate::error::Result;
use crate::graph::DrainedAbove;
use crate::node::{Node, ResizeListener, User};
use crate::open::ChildRole;
use crate::root::Drained;
use std::cell::UnsafeCell;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

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

impl Permissions {
    /// Nothing.
    pub const NONE: Self = Self {
        consistent_read: false,
        write: false,
        write_unchanged: false,
        resize: false,
    };
    /// Everything.
    pub const ALL: Self = Self {
        consistent_read: true,
        write: true,
        write_unchanged: true,
        resize: true,
    };
    /// Reading only.
    pub const READ: Self = Self {
        consistent_read: true,
        ..Self::NONE
    };
    /// Reading and writing.
    pub const READ_WRITE: Self = Self {
        consistent_read: true,
        write: true,
        ..Self::NONE
    };

    /// What either set holds.
    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self {
            consistent_read: self.consistent_read | other.consistent_read,
            write: self.write | other.write,
            write_unchanged: self.write_unchanged | other.write_unchanged,
            resize: self.resize | other.resize,
        }
    }
    /// What both sets hold.
    #[must_use]
    pub const fn intersection(self, other: Self) -> Self {
        Self {
            consistent_read: self.consistent_read & other.consistent_read,
            write: self.write & other.write,
            write_unchanged: self.write_unchanged & other.write_unchanged,
            resize: self.resize & other.resize,
        }
    }
    /// What this set holds and `other` does not.
    #[must_use]
    pub const fn minus(self, other: Self) -> Self {
        Self {
            consistent_read: self.consistent_read & !other.consistent_read,
            write: self.write & !other.write,
            write_unchanged: self.write_unchanged & !other.write_unchanged,
            resize: self.resize & !other.resize,
        }
    }
    /// Whether the set holds nothing.
    pub const fn is_empty(self) -> bool {
        !(self.consistent_read | self.write | self.write_unchanged | self.resize)
    }
    /// The names and lock-byte numbers of what the set holds, in QEMU's order.
    pub fn named(self) -> impl Iterator<Item = (u64, &'static str)> {
        [
            (self.consistent_read, 0, "consistent read"),
            (self.write, 1, "write"),
            (self.write_unchanged, 2, "write unchanged"),
            (self.resize, 3, "resize"),
        ]
        .into_iter()
        .filter_map(|(held, bit, name)| held.then_some((bit, name)))
    }
}

impl FromStr for Permissions {
    type Err = UnknownPermission;

    /// One permission by the name that QEMU's QMP reference gives it (`write-unchanged`).
    fn from_str(name: &str) -> std::result::Result<Self, UnknownPermission> {
        let all = Self::ALL.named();
        let mut found = all.filter(|(_, known)| known.replace(' ', "-") == name);
        let (bit, _) = found.next().ok_or(UnknownPermission)?;
        let is = |wanted| bit == wanted;
        Ok(Self {
            consistent_read: is(0),
            write: is(1),
            write_unchanged: is(2),
            resize: is(3),
        })
    }
}

/// No permission has that name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownPermission;

impl std::fmt::Display for Permissions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (index, (_, name)) in self.named().enumerate() {
            let separator = if index == 0 { "" } else { ", " };
            write!(f, "{separator}{name}")?;
        }
        Ok(())
    }
}

/// What a user of a node takes and tolerates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Claim {
    /// What it does.
    pub(crate) permissions: Permissions,
    /// What others may do.
    pub(crate) shared: Permissions,
}

impl Claim {
    /// The claim of a node without parents: does nothing, tolerates everything.
    pub(crate) const IDLE: Self = Self {
        permissions: Permissions::NONE,
        shared: Permissions::ALL,
    };
}

/// Who attaches to a child, and as what.
#[derive(Clone, Debug)]
pub struct EdgeSpec {
    /// The parent's node name (for messages).
    pub parent: String,
    /// What the parent calls the child: "file", "backing", "data-file".
    pub name: &'static str,
    /// What the child is to the parent.
    pub role: ChildRole,
    /// The parent never writes.
    pub read_only: bool,
}

/// A claim that follows from no role, but from the options of a node that is for tests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Beyond {
    /// What is done.
    pub takes: Permissions,
    /// What others may not do.
    pub refuses: Permissions,
}

impl Beyond {
    fn added_to(self, claim: Claim) -> Claim {
        Claim {
            permissions: claim.permissions.union(self.takes),
            shared: claim.shared.minus(self.refuses),
        }
    }
}

impl EdgeSpec {
    /// The claim on the child, given what the parent's own parents claim.
    fn claim(&self, own: Claim, force_share: bool) -> Claim {
        let metadata_write = Permissions {
            write: !self.read_only,
            resize: !self.read_only,
            ..Permissions::NONE
        };
        let mut claim = match self.role {
            ChildRole::Filtered => own,
            // Whoever wrote elsewhere could be undone by a copy that read before.
            ChildRole::Populated => Claim {
                permissions: Permissions {
                    write_unchanged: true,
                    ..own.permissions
                },
                shared: Permissions {
                    write: false,
                    write_unchanged: true,
                    ..own.shared
                },
            },
            ChildRole::Preallocated => {
                let changes = own.permissions.write || own.permissions.resize;
                Claim {
                    permissions: Permissions {
                        write: changes,
                        resize: changes,
                        ..own.permissions
                    },
                    shared: Permissions {
                        write: own.shared.write && !changes,
                        resize: own.shared.resize && !changes,
                        ..own.shared
                    },
                }
            }
            ChildRole::Copy | ChildRole::RepairedCopy => Claim {
                permissions: Permissions {
                    write: own.permissions.write || self.role == ChildRole::RepairedCopy,
                    ..own.permissions
                },
                // The copies must not come to differ.
                shared: Permissions {
                    consistent_read: own.shared.consistent_read,
                    write_unchanged: true,
                    ..Permissions::NONE
                },
            },
            ChildRole::Image => Claim {
                permissions: own
                    .permissions
                    .union(Permissions::READ)
                    .union(metadata_write),
                shared: Permissions {
                    consistent_read: own.shared.consistent_read,
                    write_unchanged: true,
                    ..Permissions::NONE
                },
            },
            ChildRole::Data => Claim {
                permissions: own.permissions,
                shared: Permissions {
                    resize: false,
                    ..own.shared
                },
            },
            ChildRole::Backing => Claim {
                permissions: own.permissions.intersection(Permissions::READ),
                shared: Permissions {
                    consistent_read: true,
                    write: own.shared.write,
                    write_unchanged: true,
                    resize: own.shared.write,
                },
            },
        };
        if self.read_only && self.role != ChildRole::RepairedCopy {
            claim.permissions.write = false;
            claim.permissions.resize = false;
        }
        if force_share {
            claim.shared = Permissions::ALL;
        }
        claim
    }
}

/// A reference from a parent (node or root) to a child node.
///
/// Following it costs a pointer: what it points to changes only while both sides are drained.
pub struct Edge {
    child: UnsafeCell<Arc<Node>>,
    id: u64,
    spec: EdgeSpec,
    beyond: Beyond,
}

// SAFETY: the cell is written only by `replace`, whose caller promises that no thread is in another
// method of this edge or holds a reference from it, and by `drop`, which has the edge to itself.
// Everything else in an edge is `Send + Sync`.
unsafe impl Sync for Edge {}

/// Permissions change in one place at a time, all the way down.
fn changing() -> MutexGuard<'static, ()> {
    static CHANGES: Mutex<()> = Mutex::new(());
    CHANGES.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Edge {
    /// Attaches to `child` with the permissions that the role needs. `Busy` when another user of
    /// the node, or of what is below it, does not allow them; `Invalid` when the child is
    /// read-only and the parent is not.
    pub fn attach(child: &Arc<Node>, spec: EdgeSpec) -> Result<Edge> {
        Self::attach_beyond(child, spec, Beyond::default())
    }

    /// Attaches to `child` with more than the role needs; errors as for [`Edge::attach`].
    pub fn attach_beyond(child: &Arc<Node>, spec: EdgeSpec, beyond: Beyond) -> Result<Edge> {
        let label = format!("node '{}'", spec.parent);
        let claim = spec.claim(Claim::IDLE, child.options().force_share);
        let claim = beyond.added_to(claim);
        let mut edge = Self::attach_claim(child, spec, (label, claim))?;
        edge.beyond = beyond;
        Ok(edge)
    }

    /// Attaches with a claim that is not derived from a role (roots).
    pub(crate) fn attach_claim(
        child: &Arc<Node>,
        spec: EdgeSpec,
        (label, claim): (String, Claim),
    ) -> Result<Edge> {
        static NEXT_ID: AtomicU64 = AtomicU64::new(1);
        let _changing = changing();
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
        let user = User::new(id, label, spec.name);
        child.users().add(child, user, claim)?;
        let child = UnsafeCell::new(Arc::clone(child));
        Ok(Edge {
            child,
            id,
            spec,
            beyond: Beyond::default(),
        })
    }

    /// The child.
    #[inline]
    pub fn node(&self) -> &Node {
        self.child()
    }

    /// The child, in the handle that keeps it alive.
    #[inline]
    pub fn child(&self) -> &Arc<Node> {
        // SAFETY: the cell is written only when no reference from here is alive (see the
        // implementation of `Sync`).
        unsafe { &*self.child.get() }
    }

    /// What the parent calls this child.
    pub fn name(&self) -> &'static str {
        self.spec.name
    }

    /// What the child is to the parent.
    pub fn role(&self) -> ChildRole {
        self.spec.role
    }

    /// The number under which it is registered with its child.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    /// Claims nothing any more, until [`Edge::update`] says otherwise.
    pub(crate) fn park(&self) {
        let child = self.child();
        if let Err(error) = child.users().change(child, self.id, Claim::IDLE) {
            tracing::warn!(node = child.name(), %error, "could not give permissions back");
        }
    }

    /// Points the edge at `new` as [`Edge::replace`] does.
    pub(crate) fn point_at(&self, new: &Arc<Node>, drained: &DrainedAbove) -> Result<Arc<Node>> {
        assert!(drained.covers(self.child()), "an edge above is not drained");
        // SAFETY: every root above the child is drained, so no request is below this edge; the control thread alone
        // changes the graph, and holds no reference from the edge here.
        unsafe { self.redirect(new) }
    }

    /// Points the edge at `new`, taking the same permissions there, and gives the old child back.
    /// On an error nothing has changed.
    ///
    /// # Safety
    /// No request may be running below any root above this edge (`_proof` is the caller's word
    /// for the one root it comes from; every other root above must be drained too), and no thread
    /// may be using this edge or a reference that [`Edge::node`] or [`Edge::child`] gave.
    pub unsafe fn replace(&self, new: &Arc<Node>, _proof: &Drained) -> Result<Arc<Node>> {
        // SAFETY: the caller's promise.
        unsafe { self.redirect(new) }
    }

    /// # Safety
    /// As for [`Edge::replace`].
    unsafe fn redirect(&self, new: &Arc<Node>) -> Result<Arc<Node>> {
        let _changing = changing();
        let users = self.child().users();
        let (user, claim, listener) = users
            .get(self.id)
            .expect("an edge is registered with its child until it is dropped");
        new.users().add(new, user, claim)?;
        if let Some(listener) = listener {
            new.users().listen(self.id, listener);
        }
        // SAFETY: the caller promises that nobody else looks at the cell.
        let old = unsafe { std::mem::replace(&mut *self.child.get(), Arc::clone(new)) };
        old.users().remove(&old, self.id);
        Ok(old)
    }

    /// Changes the claim to what follows from the parent's own one.
    pub(crate) fn update(&self, own: Claim) -> Result<()> {
        let child = self.child();
        let claim = self.spec.claim(own, child.options().force_share);
        let claim = self.beyond.added_to(claim);
        child.users().change(child, self.id, claim)
    }

    /// Tells the child who hears of its changes of length.
    pub(crate) fn listen(&self, listener: Weak<dyn ResizeListener>) {
        self.child().users().listen(self.id, listener);
    }
}

impl Drop for Edge {
    fn drop(&mut self) {
        let _changing = changing();
        let child = self.child();
        child.users().remove(child, self.id);
    }
}

#[cfg(test)]
mod tests;
