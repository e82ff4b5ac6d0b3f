//! The life cycle of jobs, with work that does what the test says.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use block::BoxFuture;
use executor::sync::Latch;
use qmp::{Error, Event, EventSink, Result, Value, json};

use super::{Group, Job, JobKind, JobOptions, Status, Step, Work};
use crate::Engine;
use crate::tests::{engine, on_executor, run};

#[derive(Default)]
struct Story(RefCell<Vec<String>>);

impl Story {
    fn tell(&self, what: impl Into<String>) {
        self.0.borrow_mut().push(what.into());
    }
}

impl EventSink for Story {
    fn event(&self, event: &Event) {
        let data = event.data().cloned().unwrap_or_default();
        let status = data["status"].as_str().unwrap_or("?").to_owned();
        self.tell(status);
    }
}

/// Works until it is let go or cancelled.
struct Waits {
    story: Rc<Story>,
    go: Rc<Latch>,
    result: Cell<Option<Error>>,
}

impl Work for Waits {
    fn run<'a>(&'a self, job: &'a Job) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            super::first_of(self.go.wait(), job.cancelled()).await;
            job.pause_point().await;
            self.result.take().map_or(Ok(()), Err)
        })
    }
    fn commit(&self) {
        self.story.tell("commit");
    }
    fn abort(&self) {
        self.story.tell("abort");
    }
    fn clean(&self) {
        self.story.tell("clean");
    }
}

struct Rig {
    engine: Rc<Engine>,
    story: Rc<Story>,
    go: Rc<Latch>,
}

impl Rig {
    fn new() -> Self {
        let engine = engine();
        let story = Rc::new(Story::default());
        let sink: Rc<dyn EventSink> = story.clone();
        engine.subscribe(&sink);
        // The story hears as long as somebody holds it.
        Self {
            engine,
            story,
            go: Rc::new(Latch::new()),
        }
    }

    async fn start(&self, id: &str, finalize: Step, result: Option<Error>) -> Rc<Job> {
        self.start_in(id, finalize, result, None).await
    }

    async fn start_in(
        &self,
        id: &str,
        finalize: Step,
        result: Option<Error>,
        group: Option<Rc<Group>>,
    ) -> Rc<Job> {
        let options = JobOptions {
            id: id.into(),
            kind: JobKind::Create,
            finalize,
            dismiss: Step::Manual,
        };
        let work = Waits {
            story: Rc::clone(&self.story),
            go: Rc::clone(&self.go),
            result: Cell::new(result),
        };
        let started = self.engine.start_job(options, Box::new(work), group).await;
        started.unwrap()
    }

    async fn until(&self, job: &Job, status: Status) {
        loop {
            let changed = job.changed.notified();
            if job.status() == status {
                return;
            }
            changed.await;
        }
    }

    async fn verb(&self, name: &str, id: &str) -> Result<Value, String> {
        run(&self.engine, name, json!({ "id": id })).await
    }

    fn story(&self) -> String {
        self.story.0.take().join(" ")
    }
}

#[test]
fn a_job_that_succeeds_is_committed_and_stays_until_it_is_dismissed() {
    on_executor(async {
        let rig = Rig::new();
        let job = rig.start("a", Step::Automatic, None).await;
        assert_eq!(rig.story(), "created running");
        let taken = rig.verb("job-dismiss", "a").await.unwrap_err();
        assert_eq!(
            taken,
            "Job 'a' in state 'running' cannot accept command verb 'dismiss'"
        );
        rig.go.set();
        rig.until(&job, Status::Concluded).await;
        assert_eq!(rig.story(), "waiting pending commit clean concluded");
        rig.verb("job-dismiss", "a").await.unwrap();
        assert_eq!(rig.story(), "null");
        assert_eq!(
            rig.verb("job-dismiss", "a").await.unwrap_err(),
            "Job not found"
        );
    });
}

#[test]
fn a_job_that_fails_is_aborted_and_tells_why() {
    on_executor(async {
        let rig = Rig::new();
        let job = rig
            .start("a", Step::Automatic, Some(Error::generic("no luck")))
            .await;
        rig.go.set();
        rig.until(&job, Status::Concluded).await;
        assert_eq!(
            rig.story(),
            "created running aborting abort clean concluded"
        );
        let jobs = run(&rig.engine, "query-jobs", json!({})).await.unwrap();
        assert_eq!(jobs[0]["error"], "no luck");
    });
}

#[test]
fn a_pending_job_waits_for_the_user_who_may_still_cancel_it() {
    on_executor(async {
        let rig = Rig::new();
        rig.go.set();
        rig.start("a", Step::Manual, None).await;
        rig.start("b", Step::Manual, None).await;
        rig.story();
        rig.verb("job-finalize", "a").await.unwrap();
        assert_eq!(rig.story(), "commit clean concluded");
        rig.verb("job-cancel", "b").await.unwrap();
        assert_eq!(rig.story(), "aborting abort clean concluded");
        let jobs = run(&rig.engine, "query-jobs", json!({})).await.unwrap();
        assert_eq!(jobs[0]["error"], "Operation canceled");
    });
}

#[test]
fn a_paused_job_goes_on_when_it_is_resumed() {
    on_executor(async {
        let rig = Rig::new();
        let job = rig.start("a", Step::Automatic, None).await;
        assert_eq!(
            rig.verb("job-resume", "a").await.unwrap_err(),
            "Can't resume a job that was not paused"
        );
        rig.verb("job-pause", "a").await.unwrap();
        assert_eq!(
            rig.verb("job-pause", "a").await.unwrap_err(),
            "Job is already paused"
        );
        rig.go.set();
        while job.status() != Status::Paused {
            executor::time::yield_now().await;
        }
        rig.verb("job-resume", "a").await.unwrap();
        rig.until(&job, Status::Concluded).await;
        assert_eq!(
            rig.story(),
            "created running paused running waiting pending commit clean concluded"
        );
    });
}

#[test]
fn one_failing_job_of_a_group_cancels_the_others() {
    on_executor(async {
        let rig = Rig::new();
        let group = Rc::new(Group::default());
        let other = Rig {
            engine: Rc::clone(&rig.engine),
            story: Rc::clone(&rig.story),
            go: Rc::new(Latch::new()),
        };
        let waits = other
            .start_in("w", Step::Automatic, None, Some(Rc::clone(&group)))
            .await;
        let failure = Some(Error::generic("no luck"));
        let fails = rig
            .start_in("f", Step::Automatic, failure, Some(group))
            .await;
        rig.go.set();
        rig.until(&waits, Status::Concluded).await;
        rig.until(&fails, Status::Concluded).await;
        let jobs = run(&rig.engine, "query-jobs", json!({})).await.unwrap();
        assert_eq!(jobs[0]["error"], "no luck");
        assert_eq!(jobs[1]["error"], "Operation canceled");
    });
}

#[test]
fn no_job_outlives_the_engine() {
    on_executor(async {
        let rig = Rig::new();
        let running = rig.start("a", Step::Automatic, None).await;
        rig.engine.shut_down().await.unwrap();
        assert_eq!(running.status(), Status::Null);
    });
}
