//! `blockdev-create`: a job that makes an image.

use std::cell::RefCell;
use std::rc::{Rc, Weak};

use block::BoxFuture;
use block::create::Target;
use qmp::{Arguments, Error, Map, Result, Value, json};
use serde::Deserialize;

use super::job::{Job, JobKind, JobOptions, Progress, Step, Work};
use crate::engine::Engine;
use crate::error::from_block;
use crate::schema;

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Identity {
    job_id: String,
}

struct Create {
    engine: Weak<Engine>,
    driver: String,
    /// Taken by the run.
    options: RefCell<Map<String, Value>>,
}

pub(crate) async fn blockdev_create(
    engine: &Rc<Engine>,
    mut arguments: Arguments,
) -> Result<Value> {
    let options = arguments
        .take_object("options")?
        .ok_or_else(|| Error::missing_parameter("options"))?;
    let Identity { job_id } = arguments.parse()?;
    let mut options = options.into_members();
    // The work begins when the command has answered: what is wrong with the options is told before.
    schema::check("BlockdevCreateOptions", &options, "options")?;
    let driver = match options.shift_remove("driver") {
        Some(Value::String(driver)) => driver,
        _ => return Err(Error::missing_parameter("options.driver")),
    };
    let work = Create {
        engine: Rc::downgrade(engine),
        driver,
        options: RefCell::new(options),
    };
    let options = JobOptions {
        id: job_id,
        kind: JobKind::Create,
        finalize: Step::Automatic,
        dismiss: Step::Manual,
    };
    engine.start_job(options, Box::new(work), None).await?;
    Ok(json!({}))
}

impl Create {
    async fn create(&self) -> Result<()> {
        let Some(engine) = self.engine.upgrade() else {
            return Err(Error::generic("the daemon is ending"));
        };
        let mut options = self.options.take();
        let graph = &engine.graph;
        let target = match options.shift_remove("filename") {
            Some(Value::String(name)) => Target::Name(name),
            Some(_) => return Err(Error::parameter_type("options.filename", "string")),
            None => {
                let file = options
                    .shift_remove("file")
                    .ok_or_else(|| Error::missing_parameter("options.file"))?;
                Target::Node(graph.find_or_open(file).await.map_err(from_block)?)
            }
        };
        graph
            .create(&self.driver, target, options)
            .await
            .map_err(from_block)
    }
}

impl Work for Create {
    fn run<'a>(&'a self, job: &'a Job) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            job.set_progress(Progress {
                current: 0,
                total: 1,
            });
            let created = self.create().await;
            job.set_progress(Progress {
                current: 1,
                total: 1,
            });
            created
        })
    }
}
