//! A job: its state, and what its work may ask of it.

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};

use block::BoxFuture;
use executor::sync::Notify;
use qmp::{Error, Event, Map, Result, Value, json};

use super::group::Group;
use super::status::{Status, Verb};
use crate::engine::Engine;

/// The kinds of jobs there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobKind {
    /// Makes an image.
    Create,
    /// Changes what an image was created with.
    Amend,
}

impl JobKind {
    /// Its name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Amend => "amend",
        }
    }

    /// Whether it works on the data of a node: it then has a speed, and events of its own.
    pub fn is_block_job(self) -> bool {
        match self {
            Self::Create | Self::Amend => false,
        }
    }
}

/// Whether a step of a job's life waits for the user.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Step {
    /// It happens by itself.
    #[default]
    Automatic,
    /// It waits for a command.
    Manual,
}

/// What a job is to be.
#[derive(Clone, Debug)]
pub struct JobOptions {
    /// Its name.
    pub id: String,
    /// Its kind.
    pub kind: JobKind,
    /// Whether `job-finalize` is waited for.
    pub finalize: Step,
    /// Whether `job-dismiss` is waited for.
    pub dismiss: Step,
}

/// What a job does. All of it runs on the control thread; none of it holds the lock of commands.
///
/// ```text
///   run ──ok──► (group complete) ──► prepare ──ok──► commit ──► clean
///    └─error─────────────────────────────┴─error────► abort ──► clean
/// ```
pub trait Work {
    /// Does the work. It passes [`Job::pause_point`] often, and ends soon after the job was cancelled.
    fn run<'a>(&'a self, job: &'a Job) -> BoxFuture<'a, Result<()>>;
    /// What `job-complete` does to a job that is ready.
    ///
    /// # Errors
    /// The job has no such step.
    fn complete(&self, job: &Job) -> Result<()> {
        let id = &job.options.id;
        Err(Error::generic(format!(
            "The active block job '{id}' cannot be completed"
        )))
    }
    /// The last step that may fail.
    fn prepare(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }
    /// Makes the result last. Follows `prepare` of all jobs of the group.
    fn commit(&self) {}
    /// Takes back what was begun.
    fn abort(&self) {}
    /// Gives back what the job held.
    fn clean(&self) {}
}

/// How far a job is, in units of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Done.
    pub current: u64,
    /// Done at the end, as known now.
    pub total: u64,
}

/// A job.
pub struct Job {
    pub(super) options: JobOptions,
    pub(super) work: Box<dyn Work>,
    pub(super) group: Rc<Group>,
    pub(super) engine: Weak<Engine>,
    status: Cell<Status>,
    error: RefCell<Option<String>>,
    cancelled: Cell<bool>,
    /// The work has returned.
    pub(super) ended: Cell<bool>,
    user_paused: Cell<bool>,
    progress: Cell<Progress>,
    /// Bytes a second; 0 is no limit.
    speed: Cell<u64>,
    /// Anything that the work may wait for has changed.
    pub(super) changed: Notify,
}

impl Job {
    pub(super) fn new(
        engine: &Rc<Engine>,
        group: Rc<Group>,
        options: JobOptions,
        work: Box<dyn Work>,
    ) -> Self {
        Self {
            options,
            work,
            group,
            engine: Rc::downgrade(engine),
            status: Cell::new(Status::Created),
            error: RefCell::default(),
            cancelled: Cell::new(false),
            ended: Cell::new(false),
            user_paused: Cell::new(false),
            progress: Cell::default(),
            speed: Cell::new(0),
            changed: Notify::new(),
        }
    }

    /// Its name.
    pub fn id(&self) -> &str {
        &self.options.id
    }

    /// Where it is in its life.
    pub fn status(&self) -> Status {
        self.status.get()
    }

    /// Whether it was cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.get()
    }

    /// Tells how far it is.
    pub fn set_progress(&self, progress: Progress) {
        self.progress.set(progress);
    }

    /// Bytes a second that it may move; 0 is no limit.
    pub fn speed(&self) -> u64 {
        self.speed.get()
    }

    /// The work has caught up, and goes on until `job-complete`.
    pub fn become_ready(&self) {
        self.become_status(Status::Ready);
        if self.options.kind.is_block_job() {
            self.emit("BLOCK_JOB_READY", self.block_job_data());
        }
    }

    /// Waits while the job is paused. Returns at once when it is cancelled.
    pub async fn pause_point(&self) {
        loop {
            let changed = self.changed.notified();
            if !self.user_paused.get() || self.is_cancelled() {
                break;
            }
            match self.status() {
                Status::Running => self.become_status(Status::Paused),
                Status::Ready => self.become_status(Status::Standby),
                _ => {}
            }
            changed.await;
        }
        match self.status() {
            Status::Created | Status::Paused => self.become_status(Status::Running),
            Status::Standby => self.become_status(Status::Ready),
            _ => {}
        }
    }

    /// Resolves once the job is cancelled.
    pub async fn cancelled(&self) {
        loop {
            let changed = self.changed.notified();
            if self.is_cancelled() {
                return;
            }
            changed.await;
        }
    }

    /// Tells that it is there.
    pub(super) fn announce_created(&self) {
        self.announce_status();
    }

    pub(super) fn become_status(&self, next: Status) {
        let before = self.status.replace(next);
        debug_assert!(before.may_become(next), "{before:?} to {next:?}");
        self.announce_status();
    }

    fn announce_status(&self) {
        let status = self.status().name();
        self.emit(
            "JOB_STATUS_CHANGE",
            json!({ "status": status, "id": self.options.id }),
        );
    }

    pub(super) fn fail(&self, error: String) {
        let mut known = self.error.borrow_mut();
        known.get_or_insert(error);
    }

    pub(super) fn failed(&self) -> bool {
        self.error.borrow().is_some()
    }

    /// A job that was cancelled has failed, whatever its work says.
    pub(super) fn judge(&self) {
        if self.is_cancelled() {
            self.fail(executor::reason(executor::Errno::ECANCELED));
        }
    }

    /// Asks the work to end.
    pub(super) fn request_cancel(&self) {
        self.cancelled.set(true);
        self.changed.notify_all();
    }

    pub(super) fn is_user_paused(&self) -> bool {
        self.user_paused.get()
    }

    pub(super) fn pause(&self) -> Result<()> {
        self.status().check(Verb::Pause, self.id())?;
        if self.user_paused.replace(true) {
            return Err(Error::generic("Job is already paused"));
        }
        self.changed.notify_all();
        Ok(())
    }

    pub(super) fn resume(&self) -> Result<()> {
        if !self.user_paused.get() {
            return Err(Error::generic("Can't resume a job that was not paused"));
        }
        self.status().check(Verb::Resume, self.id())?;
        self.user_paused.set(false);
        self.changed.notify_all();
        Ok(())
    }

    pub(super) fn complete(&self) -> Result<()> {
        self.status().check(Verb::Complete, self.id())?;
        self.work.complete(self)?;
        self.changed.notify_all();
        Ok(())
    }

    pub(super) fn set_speed(&self, speed: i64) -> Result<()> {
        self.status().check(Verb::SetSpeed, self.id())?;
        let speed = u64::try_from(speed)
            .map_err(|_| Error::parameter_expects("speed", "a non-negative value"))?;
        self.speed.set(speed);
        self.changed.notify_all();
        Ok(())
    }

    /// Tells that it is over, in the events of block jobs.
    pub(super) fn announce_end(&self) {
        if !self.options.kind.is_block_job() {
            return;
        }
        let mut data = self.block_job_data();
        if self.is_cancelled() {
            return self.emit("BLOCK_JOB_CANCELLED", data);
        }
        if let Some(error) = &*self.error.borrow() {
            data["error"] = json!(error);
        }
        self.emit("BLOCK_JOB_COMPLETED", data);
    }

    pub(super) fn announce_pending(&self) {
        if self.options.kind.is_block_job() {
            let data = json!({ "type": self.options.kind.name(), "id": self.options.id });
            self.emit("BLOCK_JOB_PENDING", data);
        }
    }

    fn block_job_data(&self) -> Value {
        let Progress { current, total } = self.progress.get();
        json!({
            "device": self.options.id,
            "len": total,
            "offset": current,
            "speed": self.speed(),
            "type": self.options.kind.name(),
        })
    }

    /// `JobInfo` of QEMU's QMP reference.
    pub(super) fn describe(&self) -> Value {
        let Progress { current, total } = self.progress.get();
        let mut info = json!({
            "current-progress": current,
            "status": self.status().name(),
            "total-progress": total,
            "type": self.options.kind.name(),
            "id": self.options.id,
        });
        if let Some(error) = &*self.error.borrow() {
            info["error"] = json!(error);
        }
        info
    }

    /// `BlockJobInfo` of QEMU's QMP reference.
    pub(super) fn describe_block_job(&self) -> Value {
        let Progress { current, total } = self.progress.get();
        let mut info = Map::new();
        let is_automatic = |step: Step| json!(step == Step::Automatic);
        let is_moving = matches!(self.status(), Status::Running | Status::Ready);
        for (key, value) in [
            ("auto-finalize", is_automatic(self.options.finalize)),
            ("io-status", json!("ok")),
            ("device", json!(self.options.id)),
            ("auto-dismiss", is_automatic(self.options.dismiss)),
            ("busy", json!(is_moving)),
            ("len", json!(total)),
            ("offset", json!(current)),
            ("status", json!(self.status().name())),
            ("paused", json!(self.user_paused.get())),
            ("speed", json!(self.speed())),
            (
                "ready",
                json!(matches!(self.status(), Status::Ready | Status::Standby)),
            ),
            ("type", json!(self.options.kind.name())),
        ] {
            info.insert(key.to_owned(), value);
        }
        if let Some(error) = &*self.error.borrow() {
            info.insert("error".to_owned(), json!(error));
        }
        Value::Object(info)
    }

    fn emit(&self, name: &'static str, data: Value) {
        if let Some(engine) = self.engine.upgrade() {
            engine.emit(&Event::with_data(name, data));
        }
    }
}
