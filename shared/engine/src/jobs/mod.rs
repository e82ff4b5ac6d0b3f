//! Jobs: work that goes on after its command has answered. See `docs/jobs.md`.
//!
//! ```text
//!   command ──► Jobs::start(options, Work) ──► task on the control thread ──► Group ──► concluded
//!                                                   │ JOB_STATUS_CHANGE, BLOCK_JOB_* events
//!   job-pause, -resume, -cancel, -complete, -finalize, -dismiss ──► Job
//! ```
//!
//! A kind of job is a [`JobKind`], an implementation of [`Work`] and a line in the command table. Owns: the table of jobs,
//! their life cycle and events. Promises: a verb acts only in the states that QEMU lists for it; a job
//! that has concluded can be queried until it is dismissed; no job outlives the engine. Must not know: what a kind of job does.

mod amend;
pub(crate) mod commands;
mod create;
mod group;
mod job;
mod status;

#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::future::poll_fn;
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;

use executor::sync::Notify;
use qmp::{Error, ErrorClass, Result};

pub use group::Group;
pub use job::{Job, JobKind, JobOptions, Progress, Step, Work};
pub use status::{Status, Verb};

pub(crate) use amend::x_blockdev_amend;
pub(crate) use create::blockdev_create;

use crate::engine::Engine;

/// The jobs of a process, in the order in which they were made.
#[derive(Default)]
pub struct Jobs {
    list: RefCell<Vec<Rc<Job>>>,
    /// A job has gone.
    gone: Notify,
}

impl Jobs {
    /// The job `id`.
    ///
    /// # Errors
    /// There is none.
    pub fn find(&self, id: &str) -> Result<Rc<Job>> {
        let list = self.list.borrow();
        let found = list.iter().find(|job| job.id() == id).cloned();
        found.ok_or_else(|| Error::generic("Job not found"))
    }

    /// The block job `id`.
    fn find_block_job(&self, id: &str) -> Result<Rc<Job>> {
        let found = self.find(id).ok();
        let found = found.filter(|job| job.options.kind.is_block_job());
        found.ok_or_else(|| {
            let what = format!("Block job '{id}' not found");
            Error::new(ErrorClass::DeviceNotActive, what)
        })
    }

    fn newest_first(&self) -> Vec<Rc<Job>> {
        self.list.borrow().iter().rev().cloned().collect()
    }

    pub(super) fn dismiss(&self, job: &Rc<Job>) {
        job.become_status(Status::Null);
        self.list
            .borrow_mut()
            .retain(|known| !Rc::ptr_eq(known, job));
        self.gone.notify_all();
    }
}

impl Engine {
    /// Makes a job and begins its work, in `group` or alone.
    ///
    /// What the work does before it first waits is done when this returns.
    ///
    /// # Errors
    /// An id that is none, or is taken.
    pub async fn start_job(
        self: &Rc<Self>,
        options: JobOptions,
        work: Box<dyn Work>,
        group: Option<Rc<Group>>,
    ) -> Result<Rc<Job>> {
        if !qmp::is_identifier(&options.id) {
            return Err(Error::generic(format!("Invalid job ID '{}'", options.id)));
        }
        if self.jobs.find(&options.id).is_ok() {
            let what = format!("Job ID '{}' already in use", options.id);
            return Err(Error::generic(what));
        }
        let group = group.unwrap_or_default();
        let job = Rc::new(Job::new(self, Rc::clone(&group), options, work));
        group.join(&job);
        self.jobs.list.borrow_mut().push(Rc::clone(&job));
        job.announce_created();
        let running = Rc::clone(&job);
        let mut life = Box::pin(async move {
            running.pause_point().await;
            let result = running.work.run(&running).await;
            running.group.run_ended(&running, result).await;
        });
        let at_once = poll_fn(|context| Poll::Ready(life.as_mut().poll(context))).await;
        if at_once.is_pending() {
            drop(executor::spawn(life));
        }
        Ok(job)
    }

    /// Cancels a job, whatever it is doing.
    pub(crate) async fn cancel_job(&self, job: &Rc<Job>) {
        job.request_cancel();
        if matches!(job.status(), Status::Waiting | Status::Pending) {
            job.group.abort().await;
        }
    }

    /// Cancels all jobs, and waits for their end.
    pub(crate) async fn cancel_all_jobs(&self) {
        for job in self.jobs.newest_first() {
            if job.status() == Status::Concluded {
                self.jobs.dismiss(&job);
            } else {
                self.cancel_job(&job).await;
            }
        }
        loop {
            let gone = self.jobs.gone.notified();
            let left = self.jobs.newest_first();
            for job in &left {
                if job.status() == Status::Concluded {
                    self.jobs.dismiss(job);
                }
            }
            let Some(job) = left.iter().find(|job| job.status() != Status::Null) else {
                return;
            };
            let changed = job.changed.notified();
            if job.status() == Status::Concluded {
                continue;
            }
            first_of(gone, changed).await;
        }
    }
}

/// Resolves with the first of two futures.
async fn first_of(one: impl Future<Output = ()>, other: impl Future<Output = ()>) {
    let (mut one, mut other) = (pin!(one), pin!(other));
    poll_fn(|context| {
        if one.as_mut().poll(context).is_ready() {
            return Poll::Ready(());
        }
        other.as_mut().poll(context)
    })
    .await;
}
