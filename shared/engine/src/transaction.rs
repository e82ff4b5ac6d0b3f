//! `transaction`: several actions at one moment, all of them or none.
//!
//! ```text
//!   drain everything ──► prepare each, in order ──► commit each, in order ──► resume
//!                              └──error──► abort those prepared, in reverse ──► resume
//! ```
//!
//! An action is a line of [`ACTIONS`] and a function that prepares it. Whatever can fail happens while it is prepared; what it
//! answers commits it, which cannot fail, or takes it back.

use std::rc::Rc;

use block::BoxFuture;
use qmp::{Arguments, Error, Result, Value, json};
use serde::Deserialize;

use crate::engine::Engine;
use crate::jobs::Group;
use crate::{bitmaps, overlays, snapshots};

/// An action that has been prepared.
pub(crate) struct Prepared {
    commit: Box<dyn FnOnce()>,
    abort: BoxFuture<'static, ()>,
}

impl Prepared {
    /// What is done by `commit`, and taken back by running `abort`.
    pub(crate) fn new(
        commit: impl FnOnce() + 'static,
        abort: impl Future<Output = ()> + 'static,
    ) -> Self {
        Self {
            commit: Box::new(commit),
            abort: Box::pin(abort),
        }
    }

    /// What only has to be taken back when the transaction fails.
    pub(crate) fn done(abort: impl Future<Output = ()> + 'static) -> Self {
        Self::new(|| (), abort)
    }

    /// The same, with more to be taken back at the end.
    pub(crate) fn and_then_abort(self, more: impl Future<Output = ()> + 'static) -> Self {
        let abort = self.abort;
        Self {
            commit: self.commit,
            abort: Box::pin(async move {
                abort.await;
                more.await;
            }),
        }
    }

    /// Makes it last.
    pub(crate) fn commit(self) {
        (self.commit)();
    }
}

/// What actions of one transaction share.
pub(crate) struct Context {
    pub(crate) engine: Rc<Engine>,
    /// The group of the jobs that it starts, with `completion-mode=grouped`.
    group: Option<Rc<Group>>,
}

type Prepare = for<'a> fn(&'a Context, Arguments) -> BoxFuture<'a, Result<Prepared>>;

/// One kind of action.
struct Action {
    name: &'static str,
    prepare: Prepare,
}

macro_rules! actions {
    ($($name:literal => $function:path,)*) => {
        &[$(Action {
            name: $name,
            prepare: |context, data| Box::pin($function(context, data)),
        },)*]
    };
}

const ACTIONS: &[Action] = actions! {
    "abort" => abort,
    "block-dirty-bitmap-add" => bitmaps::prepare_add,
    "block-dirty-bitmap-clear" => bitmaps::prepare_clear,
    "block-dirty-bitmap-disable" => bitmaps::prepare_disable,
    "block-dirty-bitmap-enable" => bitmaps::prepare_enable,
    "block-dirty-bitmap-merge" => bitmaps::prepare_merge,
    "block-dirty-bitmap-remove" => bitmaps::prepare_remove,
    "blockdev-snapshot" => overlays::prepare_snapshot,
    "blockdev-snapshot-internal-sync" => snapshots::prepare_create,
    "blockdev-snapshot-sync" => overlays::prepare_snapshot_sync,
};

/// The actions that are not jobs refuse to be grouped, all but this one.
const ABORT: &str = "abort";

async fn abort(_context: &Context, data: Arguments) -> Result<Prepared> {
    data.finish()?;
    Err(Error::generic("Transaction aborted using Abort action"))
}

#[derive(Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
enum CompletionMode {
    #[default]
    Individual,
    Grouped,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Properties {
    #[serde(default)]
    completion_mode: CompletionMode,
}

pub(crate) async fn transaction(engine: &Rc<Engine>, mut arguments: Arguments) -> Result<Value> {
    let properties: Properties = match arguments.take_object("properties")? {
        Some(properties) => properties.parse()?,
        None => Properties::default(),
    };
    let actions = match arguments.take_value("actions") {
        Some(Value::Array(actions)) => actions,
        Some(_) => return Err(Error::parameter_type("actions", "array")),
        None => return Err(Error::missing_parameter("actions")),
    };
    let syntax = arguments.syntax();
    arguments.finish()?;
    let mut parsed = Vec::with_capacity(actions.len());
    for (index, action) in actions.into_iter().enumerate() {
        let path = format!("actions[{index}]");
        let Value::Object(members) = action else {
            return Err(Error::parameter_type(path, "object"));
        };
        parsed.push(parse(Arguments::new(members, syntax).below(&path))?);
    }
    let grouped = properties.completion_mode == CompletionMode::Grouped;
    let context = Context {
        engine: Rc::clone(engine),
        group: grouped.then(Rc::default),
    };
    // One moment for all nodes.
    let _quiet = engine.graph.drain_all().await;
    let mut prepared = Vec::with_capacity(parsed.len());
    for (action, data) in parsed {
        match prepare(&context, action, data).await {
            Ok(done) => prepared.push(done),
            Err(error) => {
                for done in prepared.into_iter().rev() {
                    done.abort.await;
                }
                return Err(error);
            }
        }
    }
    prepared.into_iter().for_each(Prepared::commit);
    Ok(json!({}))
}

fn parse(mut action: Arguments) -> Result<(&'static Action, Arguments)> {
    let name = match action.take_value("type") {
        Some(Value::String(name)) => name,
        Some(_) => return Err(Error::parameter_type(action.path_of("type"), "string")),
        None => return Err(Error::missing_parameter(action.path_of("type"))),
    };
    let known = ACTIONS.iter().find(|known| known.name == name);
    let known = known.ok_or_else(|| Error::parameter_value("type", &name))?;
    let missing = Error::missing_parameter(action.path_of("data"));
    let data = action.take_object("data")?.ok_or(missing)?;
    action.finish()?;
    Ok((known, data))
}

async fn prepare(context: &Context, action: &Action, data: Arguments) -> Result<Prepared> {
    if context.group.is_some() && action.name != ABORT {
        return Err(Error::generic(format!(
            "Action '{}' does not support Transaction property completion-mode = grouped",
            action.name
        )));
    }
    (action.prepare)(context, data).await
}

/// Runs an action as a command of its own.
pub(crate) async fn alone(
    engine: &Rc<Engine>,
    arguments: Arguments,
    prepare: Prepare,
) -> Result<Value> {
    let context = Context {
        engine: Rc::clone(engine),
        group: None,
    };
    prepare(&context, arguments).await?.commit();
    Ok(json!({}))
}
