//! Jobs that succeed together or not at all. A job alone is a group of one.
//!
//! ```text
//!   each: run ends well ──► waiting ──all waiting──► pending ──finalize──► prepare each ──► commit each
//!   one fails or is cancelled ──► the others are cancelled, and waited for ──► abort each
//! ```

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use qmp::Result;

use super::job::{Job, Step};
use super::status::Status;

/// Members of a group.
#[derive(Default)]
pub struct Group {
    jobs: RefCell<Vec<Rc<Job>>>,
    aborting: Cell<bool>,
}

impl Group {
    pub(super) fn join(&self, job: &Rc<Job>) {
        self.jobs.borrow_mut().push(Rc::clone(job));
    }

    fn jobs(&self) -> Vec<Rc<Job>> {
        self.jobs.borrow().clone()
    }

    /// The work of `job` has returned.
    pub(super) async fn run_ended(&self, job: &Rc<Job>, result: Result<()>) {
        if let Err(error) = result {
            job.fail(error.desc);
        }
        job.judge();
        job.ended.set(true);
        job.changed.notify_all();
        if self.aborting.get() {
            // Whoever aborts the group is waiting for this.
            return;
        }
        if job.failed() {
            return self.abort().await;
        }
        job.become_status(Status::Waiting);
        let jobs = self.jobs();
        if !jobs.iter().all(|job| job.status() == Status::Waiting) {
            return;
        }
        for job in &jobs {
            job.become_status(Status::Pending);
            if job.options.finalize == Step::Manual {
                job.announce_pending();
            }
        }
        if jobs
            .iter()
            .all(|job| job.options.finalize == Step::Automatic)
        {
            self.finalize().await;
        }
    }

    /// Ends the jobs, all of which are pending.
    pub(super) async fn finalize(&self) {
        for job in self.jobs() {
            if let Err(error) = job.work.prepare().await {
                job.fail(error.desc);
                return self.abort().await;
            }
        }
        for job in self.jobs() {
            self.conclude(&job);
        }
    }

    /// Cancels what still runs, and ends all jobs as failed.
    pub(super) async fn abort(&self) {
        if self.aborting.replace(true) {
            return;
        }
        for job in self.jobs() {
            if !job.failed() {
                job.request_cancel();
            }
        }
        for job in self.jobs() {
            loop {
                let changed = job.changed.notified();
                if job.ended.get() || job.status() == Status::Created {
                    break;
                }
                changed.await;
            }
            job.judge();
            self.conclude(&job);
        }
    }

    fn conclude(&self, job: &Rc<Job>) {
        if job.failed() {
            job.become_status(Status::Aborting);
            job.work.abort();
        } else {
            job.work.commit();
        }
        job.work.clean();
        job.announce_end();
        job.become_status(Status::Concluded);
        job.changed.notify_all();
        self.jobs
            .borrow_mut()
            .retain(|other| !Rc::ptr_eq(other, job));
        if job.options.dismiss == Step::Automatic
            && let Some(engine) = job.engine.upgrade()
        {
            engine.jobs.dismiss(job);
        }
    }
}
