//! `x-blockdev-amend`: a job that changes what the image of a node was created with, while it serves.

use std::cell::RefCell;
use std::rc::{Rc, Weak};

use block::amend::Force;
use block::{AmendRequest, BoxFuture, Permissions, Root};
use qmp::{Arguments, Error, Map, Result, Value, json};
use serde::Deserialize;

use super::job::{Job, JobKind, JobOptions, Progress, Step, Work};
use crate::engine::Engine;
use crate::error::from_block;
use crate::{catalogue, nodes, schema};

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Request {
    job_id: String,
    node_name: String,
    #[serde(default)]
    force: bool,
}

struct Amend {
    engine: Weak<Engine>,
    /// Keeps the node; reopening it waits for the visit of the run.
    root: Root,
    force: Force,
    /// Taken by the run.
    members: RefCell<Map<String, Value>>,
}

pub(crate) async fn x_blockdev_amend(
    engine: &Rc<Engine>,
    mut arguments: Arguments,
) -> Result<Value> {
    let options = arguments
        .take_object("options")?
        .ok_or_else(|| Error::missing_parameter("options"));
    let request: Request = arguments.parse()?;
    let mut members = options?.into_members();
    schema::check("BlockdevAmendOptions", &members, "options")?;
    let driver = match members.shift_remove("driver") {
        Some(Value::String(driver)) => driver,
        _ => return Err(Error::missing_parameter("options.driver")),
    };
    let node = nodes::find(engine, None, Some(&request.node_name))?;
    if node.driver().driver_name() != driver {
        let what = "x-blockdev-amend doesn't support changing the block driver";
        return Err(Error::generic(what));
    }
    if !catalogue::amends(&driver) {
        let what = "Driver does not support x-blockdev-amend";
        return Err(Error::generic(what));
    }
    let root = Root::new("", &node, Permissions::NONE, Permissions::ALL);
    let work = Amend {
        engine: Rc::downgrade(engine),
        root: root.map_err(from_block)?,
        force: match request.force {
            true => Force::Allow,
            false => Force::Refuse,
        },
        members: RefCell::new(members),
    };
    let options = JobOptions {
        id: request.job_id,
        kind: JobKind::Amend,
        finalize: Step::Automatic,
        dismiss: Step::Manual,
    };
    engine.start_job(options, Box::new(work), None).await?;
    Ok(json!({}))
}

impl Amend {
    async fn amend(&self) -> Result<()> {
        let Some(engine) = self.engine.upgrade() else {
            return Err(Error::generic("the daemon is ending"));
        };
        let handle = self.root.attach();
        let visit = handle.visit().await;
        // What is written below a node that serves comes in one piece; there is nothing to tell between.
        let mut untold = |_, _| {};
        let changes = AmendRequest::new(self.members.take(), self.force, &mut untold);
        let mut changes = changes.with_secrets(engine.graph.secrets());
        visit.node().amend(&mut changes).await.map_err(from_block)
    }
}

impl Work for Amend {
    fn run<'a>(&'a self, job: &'a Job) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            job.set_progress(Progress {
                current: 0,
                total: 1,
            });
            let amended = self.amend().await;
            job.set_progress(Progress {
                current: 1,
                total: 1,
            });
            amended
        })
    }
}

#[cfg(test)]
mod tests;
