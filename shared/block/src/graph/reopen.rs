//! Opening nodes anew: other options, other children, a node above another. See `docs/graph.md`.
//!
//! ```text
//!   plan: what changes, children first ──► drain ──► flush ──► take down ──► bring up ──► move users ──► resume
//!                                                      │error        └───────────┴──error──► as it was ──► resume
//!                                                      └──► resume
//! ```
//!
//! A driver does not change its options: it is closed, and another one is opened in its place, in a node of
//! the same name to which the users of the old one move. So every driver can be reopened, and none has
//! code for it. A node without children (a file) keeps its old driver until the new one is there: what a
//! sandbox or a deleted file would refuse to open again is not closed.
//!
//! Promises: all of a list or nothing; no request sees the time between; dirty bitmaps go along. Whoever holds an `Arc<Node>` beyond a command holds a [`crate::Root`] instead.

use super::change::{DrainedAbove, move_users};
use super::{Entry, Graph, OpenedFrom};
use crate::driver::{ChildrenChange, ChildrenRefusal};
use crate::error::{Error, ErrorKind, Result};
use crate::node::Node;
use crate::open::{ChildRole, Definition, Inherited, Options, Source};
use serde_json::{Map, Value};
use std::sync::Arc;

/// Options of every node, which any driver takes.
const COMMON: [&str; 8] = [
    "driver",
    "node-name",
    "read-only",
    "auto-read-only",
    "cache",
    "discard",
    "detect-zeroes",
    "force-share",
];

/// Options of nodes without children that mean the same file, whatever they are.
const HARMLESS: [&str; 3] = ["aio", "aio-max-batch", "drop-cache"];

/// A node to be opened anew.
pub struct Reopen {
    /// Its name.
    pub node_name: String,
    /// All of its options; those that are absent take their defaults.
    pub options: Map<String, Value>,
}

/// A change of a list of children.
pub enum ChildChange {
    /// The node becomes the last of them.
    Add(Arc<Node>),
    /// The child with this name (`children.1`) is none any more.
    Remove(String),
}

impl ChildChange {
    /// Whether the driver of `parent` allows it.
    fn check(&self, parent: &Node) -> Result<()> {
        let kind = match self {
            Self::Add(_) => ChildrenChange::Add,
            Self::Remove(_) => ChildrenChange::Remove,
        };
        let checked = parent.driver().check_children_change(kind);
        checked.map_err(|refusal| match refusal {
            ChildrenRefusal::NoList => invalid(self.unsupported(parent)),
            ChildrenRefusal::Reason(reason) => invalid(reason),
        })
    }

    fn unsupported(&self, parent: &Node) -> String {
        let verb = match self {
            Self::Add(_) => "adding",
            Self::Remove(_) => "removing",
        };
        format!("The node {} does not support {verb} a child", parent.name())
    }
}

/// Takes back a change that was made, once, before any other change of these nodes.
pub struct Undo {
    changes: Vec<Change>,
    redirect: Option<Redirect>,
}

/// A node that is to be replaced by one opened from other options.
struct Change {
    old: Arc<Node>,
    origin: OpenedFrom,
    /// Children that the options name, held so that they stay.
    children: Vec<Arc<Node>>,
}

/// The users of one node become those of another, which is above it.
struct Redirect {
    from: String,
    to: String,
}

/// A change that is under way.
struct Step {
    old: Arc<Node>,
    /// What `old` is opened from when all is to be as it was.
    before: OpenedFrom,
    children: Vec<Arc<Node>>,
    new: Option<Arc<Node>>,
}

fn invalid(message: String) -> Error {
    Error::new(ErrorKind::Invalid, message)
}

fn is_leaf(node: &Node) -> bool {
    node.driver().edges().is_empty()
}

impl Graph {
    /// Opens nodes anew: all of them, or nothing has changed.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` for what cannot change; those of opening; `Busy`.
    pub async fn reopen(&self, nodes: Vec<Reopen>) -> Result<()> {
        let mut changes = Vec::new();
        for Reopen { node_name, options } in nodes {
            let node = self.node(&node_name).ok_or_else(|| {
                let message = format!("Failed to find node with node-name='{node_name}'");
                Error::new(ErrorKind::NotFound, message)
            })?;
            let inherited = self.origin(&node).inherited;
            self.plan(&mut changes, &node, (options, inherited))?;
        }
        let replaced: Vec<_> = changes
            .iter()
            .map(|change| Arc::clone(&change.old))
            .collect();
        for Change { old, origin, .. } in &changes {
            let options = Options::new(origin.options.clone(), origin.place.path.clone())
                .take_node(origin.inherited.unwrap_or_default())?;
            if options.read_only && old.users().writes_beside(&replaced) {
                return Err(invalid(format!(
                    "Read-only block node '{}' cannot support read-write users",
                    old.name()
                )));
            }
        }
        self.settle(sorted(changes)).await
    }

    /// Puts the node `overlay`, which has no backing and no user, above `node`, whose users become its
    /// own; `node` is read-only then.
    ///
    /// # Errors
    /// As for [`Graph::reopen`].
    pub async fn put_above(&self, node: &Arc<Node>, overlay: &Arc<Node>) -> Result<Undo> {
        let mut changes = Vec::new();
        let below = self.origin(node);
        let mut options = self.with_child_names(node, below.options.clone());
        options.insert("read-only".to_owned(), Value::Bool(true));
        options.shift_remove("auto-read-only");
        self.plan(&mut changes, node, (options, below.inherited))?;
        let above = self.origin(overlay);
        let mut options = self.with_child_names(overlay, above.options.clone());
        options.insert("backing".to_owned(), node.name().into());
        self.plan(&mut changes, overlay, (options, above.inherited))?;
        let redirect = Redirect {
            from: node.name().to_owned(),
            to: overlay.name().to_owned(),
        };
        self.carry_out(sorted(changes), Some(redirect)).await
    }

    /// Opens `parent` anew with one child more or less in its list of children.
    ///
    /// # Errors
    /// In QEMU's words: `parent` has no such list, or its driver does not allow it; `change` makes no sense; those of reopening.
    pub async fn change_children(&self, parent: Arc<Node>, change: ChildChange) -> Result<()> {
        change.check(&parent)?;
        let before = self.origin(&parent);
        let mut options = self.with_child_names(&parent, before.options.clone());
        let list = options.get_mut("children").and_then(Value::as_object_mut);
        let list = list.ok_or_else(|| invalid(change.unsupported(&parent)))?;
        match &change {
            ChildChange::Add(child) => {
                let numbers = list.keys().filter_map(|number| number.parse::<u16>().ok());
                let next = numbers.max().map_or(0, |last| last.saturating_add(1));
                if reaches(child, &parent) {
                    let (child, parent) = (child.name(), parent.name());
                    return Err(invalid(format!(
                        "Making '{child}' a children.{next} child of '{parent}' would create a cycle"
                    )));
                }
                if child.has_parent_node() {
                    let message = format!("The node {} already has a parent", child.name());
                    return Err(invalid(message));
                }
                list.insert(next.to_string(), child.name().into());
            }
            ChildChange::Remove(name) => {
                let number = name.strip_prefix("children.").unwrap_or_default();
                list.shift_remove(number);
            }
        }
        let mut changes = Vec::new();
        self.plan(&mut changes, &parent, (options, before.inherited))?;
        // It holds its children as long as it is held.
        drop(parent);
        self.settle(changes).await
    }

    /// Takes a change back.
    ///
    /// # Errors
    /// Those of opening what was open before.
    pub async fn undo(&self, undo: Undo) -> Result<()> {
        self.carry_out(undo.changes, undo.redirect).await.map(drop)
    }

    fn origin(&self, node: &Arc<Node>) -> OpenedFrom {
        let entries = self.entries.borrow();
        let entry = entries.iter().find(|entry| Arc::ptr_eq(&entry.node, node));
        entry.map_or_else(
            || OpenedFrom {
                options: Map::new(),
                inherited: None,
                place: Default::default(),
            },
            |entry| entry.origin.clone(),
        )
    }

    /// The options with each child that they define, or that the image names, as a reference to the node that it is now.
    fn with_child_names(&self, node: &Node, mut options: Map<String, Value>) -> Map<String, Value> {
        let mut lists: Map<String, Value> = Map::new();
        for (name, edge) in node.driver().edges() {
            let child = Value::from(edge.node().name());
            match name.split_once('.') {
                None => {
                    options.insert(name.to_owned(), child);
                }
                // One of a list: by its number, which it keeps.
                Some((list, number)) => {
                    let list = lists.entry(list).or_insert_with(|| Map::new().into());
                    list[number] = child;
                }
            }
        }
        options.extend(lists);
        options
    }

    /// Adds what is to be done for `node` to have `options`, its inline children included.
    fn plan(
        &self,
        changes: &mut Vec<Change>,
        node: &Arc<Node>,
        (mut options, inherited): (Map<String, Value>, Option<Inherited>),
    ) -> Result<()> {
        let before = self.origin(node);
        match options.get("driver").and_then(Value::as_str) {
            Some(driver) if driver == node.driver().driver_name() => {}
            _ => return Err(invalid("Cannot change the option 'driver'".to_owned())),
        }
        if is_leaf(node) {
            check_leaf(&before.options, &options)?;
        }
        let parent = Options::new(options.clone(), before.place.path.clone())
            .take_node(inherited.unwrap_or_default())?;
        let mut children = Vec::new();
        for (name, edge) in node.driver().edges() {
            let child = Arc::clone(edge.child());
            match options.get(name) {
                Some(Value::Object(definition)) => {
                    if self.is_owned(child.name()) {
                        return Err(invalid(format!("Cannot change the option '{name}'")));
                    }
                    let definition = definition.clone();
                    let inherited = Inherited::of(&parent, edge.role());
                    self.plan_inline(changes, &child, (definition, inherited))?;
                    options.insert(name.to_owned(), child.name().into());
                    children.push(child);
                }
                None if edge.role() == ChildRole::Backing => {
                    let message = format!("backing is missing for '{}'", node.name());
                    return Err(invalid(message));
                }
                _ => {}
            }
        }
        for (name, value) in &options {
            if let ("file" | "backing" | "data-file", Value::String(child)) = (&**name, value) {
                if child.is_empty() {
                    continue;
                }
                let child = self.node(child).ok_or_else(|| {
                    let message = format!("Cannot find device='' nor node-name='{child}'");
                    Error::new(ErrorKind::NotFound, message)
                })?;
                if reaches(&child, node) {
                    return Err(invalid(format!(
                        "Making '{}' a {name} child of '{}' would create a cycle",
                        child.name(),
                        node.name()
                    )));
                }
                children.push(child);
            }
        }
        options.shift_remove("node-name");
        changes.retain(|change| !Arc::ptr_eq(&change.old, node));
        changes.push(Change {
            old: Arc::clone(node),
            origin: OpenedFrom {
                options,
                inherited,
                place: before.place,
            },
            children,
        });
        Ok(())
    }

    /// The same for an inline child, which changes only when its own options do.
    fn plan_inline(
        &self,
        changes: &mut Vec<Change>,
        child: &Arc<Node>,
        (definition, inherited): (Map<String, Value>, Inherited),
    ) -> Result<()> {
        let before = self.origin(child);
        let now = Options::new(definition.clone(), String::new()).take_node(inherited)?;
        let mut same = definition.clone();
        same.shift_remove("node-name");
        let mut known = before.options;
        known.shift_remove("node-name");
        if now.same_as(child.options()) && same == known {
            return Ok(());
        }
        self.plan(changes, child, (definition, Some(inherited)))
    }

    /// Makes changes that nobody takes back.
    async fn settle(&self, changes: Vec<Change>) -> Result<()> {
        let undo = self.carry_out(changes, None).await?;
        drop(undo);
        // Children that were only there to be put back.
        self.sweep().await;
        Ok(())
    }

    /// Makes the changes, children first.
    async fn carry_out(&self, changes: Vec<Change>, redirect: Option<Redirect>) -> Result<Undo> {
        let olds = changes.iter().map(|change| Arc::clone(&change.old));
        let mut drained = DrainedAbove::new(olds.collect()).await;
        for change in &changes {
            if !change.old.options().read_only {
                change.old.flush().await.map_err(|errno| {
                    Error::io(
                        format!("Could not flush node '{}'", change.old.name()),
                        errno,
                    )
                })?;
            }
        }
        let mut steps = Vec::with_capacity(changes.len());
        let mut wanted = Vec::with_capacity(changes.len());
        for change in changes {
            let mut before = self.origin(&change.old);
            before.options = self.with_child_names(&change.old, before.options);
            before.options.shift_remove("node-name");
            let edges = change.old.driver().edges();
            let children = edges.iter().map(|(_, edge)| Arc::clone(edge.child()));
            steps.push(Step {
                children: children.collect(),
                old: change.old,
                before,
                new: None,
            });
            wanted.push(change.origin);
        }
        let changed = self
            .swap(&mut steps, wanted, (redirect.as_ref(), &mut drained))
            .await;
        if let Err(error) = changed {
            self.put_back(&mut steps, &mut drained).await;
            drop((steps, drained));
            self.sweep().await;
            return Err(error);
        }
        let undo = Undo {
            redirect: redirect.map(|done| Redirect {
                from: done.to,
                to: done.from,
            }),
            changes: steps.into_iter().filter_map(Step::finish).collect(),
        };
        drop(drained);
        self.sweep().await;
        Ok(undo)
    }

    async fn swap(
        &self,
        steps: &mut [Step],
        wanted: Vec<OpenedFrom>,
        (redirect, drained): (Option<&Redirect>, &mut DrainedAbove),
    ) -> Result<()> {
        let mut closed = Ok(());
        for step in steps.iter().rev() {
            let this = match is_leaf(&step.old) {
                true => Ok(()),
                false => step.old.driver().close().await,
            };
            step.old.retire();
            let name = step.old.name();
            let failed = |errno| Error::io(format!("Could not close node '{name}'"), errno);
            closed = closed.and(this.map_err(failed));
        }
        closed?;
        let olds: Vec<_> = steps.iter().map(|step| Arc::clone(&step.old)).collect();
        let stay = |node: &Node| olds.iter().any(|old| std::ptr::eq(&**old, node));
        for (step, origin) in steps.iter_mut().zip(wanted) {
            let new = self.open_successor(&step.old, origin).await?;
            step.new = Some(Arc::clone(&new));
            let leaves = |redirect: &&Redirect| redirect.from == step.old.name();
            if redirect.filter(leaves).is_none() {
                move_users((&step.old, &new), &stay, drained)?;
            }
        }
        if let Some(redirect) = redirect {
            let old = olds.iter().find(|old| old.name() == redirect.from);
            let new = self.node(&redirect.to);
            if let (Some(old), Some(new)) = (old, new) {
                move_users((old, &new), &stay, drained)?;
            }
        }
        Ok(())
    }

    /// Opens a node in the place of `old`, under its name. On an error `old` keeps its place.
    async fn open_successor(&self, old: &Arc<Node>, origin: OpenedFrom) -> Result<Arc<Node>> {
        let mut place = origin.place;
        place.successor_of = Some(old.name().to_owned());
        // What an image named has been checked and is open; its options refer to nodes by now.
        place.source = Source::User;
        let definition = Definition {
            options: origin.options,
            // An owned node is one that inherits nothing.
            inherited: origin.inherited,
            place,
            descriptor: None,
            file: None,
        };
        let (index, entry) = self.take_entry(old);
        let opened = self.open(definition).await;
        let mut entries = self.entries.borrow_mut();
        match opened {
            Ok(new) => {
                if let Some(at) = entries
                    .iter()
                    .position(|entry| Arc::ptr_eq(&entry.node, &new))
                {
                    let entry = entries.remove(at);
                    let index = index.min(entries.len());
                    entries.insert(index, entry);
                }
                take_bitmaps(old, &new);
                new.follow_watermark(old);
                Ok(new)
            }
            Err(error) => {
                if let Some(entry) = entry {
                    let index = index.min(entries.len());
                    entries.insert(index, entry);
                }
                Err(error)
            }
        }
    }

    fn take_entry(&self, node: &Arc<Node>) -> (usize, Option<Entry>) {
        let mut entries = self.entries.borrow_mut();
        let at = entries
            .iter()
            .position(|entry| Arc::ptr_eq(&entry.node, node));
        match at {
            Some(at) => (at, Some(entries.remove(at))),
            None => (entries.len(), None),
        }
    }

    /// Makes everything as it was before [`Graph::swap`] began. What cannot be opened again is reported, and its
    /// users get errors.
    async fn put_back(&self, steps: &mut [Step], drained: &mut DrainedAbove) {
        for step in steps.iter().rev() {
            if let Some(new) = &step.new {
                if let Err(errno) = new.driver().close().await {
                    tracing::warn!(node = new.name(), %errno, "closing failed");
                }
                new.retire();
            }
        }
        let gone: Vec<_> = steps.iter().map(|step| Arc::clone(&step.old)).collect();
        let new: Vec<_> = steps.iter().filter_map(|step| step.new.clone()).collect();
        let stay = |node: &Node| {
            let mut all = gone.iter().chain(&new);
            all.any(|other| std::ptr::eq(&**other, node))
        };
        for step in steps.iter_mut() {
            let current = step.new.take().unwrap_or_else(|| Arc::clone(&step.old));
            let restored = match is_leaf(&step.old) {
                true => {
                    let (index, entry) = self.take_entry(&current);
                    if let Some(mut entry) = entry {
                        entry.node = Arc::clone(&step.old);
                        self.entries.borrow_mut().insert(index, entry);
                    }
                    step.old.come_back().map(|()| Arc::clone(&step.old))
                }
                false => self.open_successor(&current, step.before.clone()).await,
            };
            let back = restored.and_then(|restored| match Arc::ptr_eq(&restored, &current) {
                true => Ok(()),
                false => move_users((&current, &restored), &stay, drained),
            });
            if let Err(error) = back {
                tracing::error!(node = step.old.name(), %error, "a node could not be opened again");
            }
        }
        // Users that stayed with a node in between.
        for step in steps.iter() {
            if let Some(now) = self.node(step.old.name())
                && !Arc::ptr_eq(&now, &step.old)
                && let Err(error) = move_users((&step.old, &now), &stay, drained)
            {
                tracing::error!(node = now.name(), %error, "an edge could not be put back");
            }
        }
    }
}

impl Step {
    /// What would take the step back.
    fn finish(self) -> Option<Change> {
        Some(Change {
            old: self.new?,
            origin: self.before,
            children: self.children,
        })
    }
}

/// The bitmaps of `old` are those of `new`: whoever uses one goes on with it. What `new` has loaded of them has the same bits.
fn take_bitmaps(old: &Node, new: &Node) {
    for bitmap in old.bitmaps().list().iter() {
        let loaded = bitmap.is_named().then(|| new.bitmaps().find(bitmap.name()));
        if let Some(loaded) = loaded.flatten() {
            bitmap.set_read_only(loaded.is_read_only());
            new.bitmaps().detach(&loaded);
        }
        new.bitmaps().attach(Arc::clone(bitmap));
    }
}

/// Whether `node` is `from` or below it.
fn reaches(from: &Arc<Node>, node: &Arc<Node>) -> bool {
    Arc::ptr_eq(from, node)
        || from
            .driver()
            .edges()
            .into_iter()
            .any(|(_, edge)| reaches(edge.child(), node))
}

/// A node without children stays what it is.
fn check_leaf(before: &Map<String, Value>, now: &Map<String, Value>) -> Result<()> {
    let matters = |name: &&String| {
        let name = name.as_str();
        !COMMON.contains(&name) && !HARMLESS.contains(&name)
    };
    let names = now.keys().chain(before.keys());
    let changed = names
        .filter(matters)
        .find(|name| before.get(*name) != now.get(*name));
    match changed {
        Some(name) => Err(invalid(format!("Cannot change the option '{name}'"))),
        None => Ok(()),
    }
}

/// Children before their parents.
fn sorted(mut changes: Vec<Change>) -> Vec<Change> {
    let mut ordered: Vec<Change> = Vec::with_capacity(changes.len());
    while !changes.is_empty() {
        let is_above = |parent: &Change, child: &Change| {
            let named = parent.children.iter();
            named.clone().any(|node| reaches(node, &child.old))
        };
        let free = changes.iter().position(|candidate| {
            let others = changes
                .iter()
                .filter(|other| !std::ptr::eq(*other, candidate));
            !others.into_iter().any(|other| is_above(candidate, other))
        });
        let next = changes.remove(free.unwrap_or(0));
        ordered.push(next);
    }
    ordered
}
