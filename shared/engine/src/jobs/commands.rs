//! Commands on jobs: `query-jobs`, `job-*`, and their older twins for block jobs.

use std::rc::Rc;

use qmp::{Arguments, Result, Value, json};
use serde::Deserialize;

use super::job::Job;
use super::status::Verb;
use crate::engine::Engine;

#[derive(Deserialize)]
struct ById {
    id: String,
}

#[derive(Deserialize)]
struct ByDevice {
    device: String,
}

fn named(engine: &Engine, arguments: Arguments) -> Result<Rc<Job>> {
    let ById { id } = arguments.parse()?;
    engine.jobs.find(&id)
}

fn named_block_job(engine: &Engine, arguments: Arguments) -> Result<Rc<Job>> {
    let ByDevice { device } = arguments.parse()?;
    engine.jobs.find_block_job(&device)
}

pub(crate) async fn query_jobs(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    arguments.finish()?;
    let jobs = engine.jobs.newest_first();
    Ok(jobs.iter().map(|job| job.describe()).collect())
}

pub(crate) async fn query_block_jobs(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    arguments.finish()?;
    let jobs = engine.jobs.newest_first();
    let jobs = jobs.iter().filter(|job| job.options.kind.is_block_job());
    Ok(jobs.map(|job| job.describe_block_job()).collect())
}

async fn cancel_one(engine: &Engine, job: &Rc<Job>) -> Result<Value> {
    job.status().check(Verb::Cancel, job.id())?;
    engine.cancel_job(job).await;
    Ok(json!({}))
}

pub(crate) async fn cancel(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    let job = named(engine, arguments)?;
    cancel_one(engine, &job).await
}

#[derive(Deserialize)]
struct BlockJobCancel {
    device: String,
    /// A job that is paused is cancelled only when asked twice.
    #[serde(default)]
    force: bool,
}

pub(crate) async fn block_job_cancel(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    let BlockJobCancel { device, force } = arguments.parse()?;
    let job = engine.jobs.find_block_job(&device)?;
    if job.is_user_paused() && !force {
        let what = format!("The block job for device '{device}' is currently paused");
        return Err(qmp::Error::generic(what));
    }
    cancel_one(engine, &job).await
}

pub(crate) async fn pause(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    named(engine, arguments)?.pause()?;
    Ok(json!({}))
}

pub(crate) async fn block_job_pause(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    named_block_job(engine, arguments)?.pause()?;
    Ok(json!({}))
}

pub(crate) async fn resume(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    named(engine, arguments)?.resume()?;
    Ok(json!({}))
}

pub(crate) async fn block_job_resume(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    named_block_job(engine, arguments)?.resume()?;
    Ok(json!({}))
}

pub(crate) async fn complete(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    named(engine, arguments)?.complete()?;
    Ok(json!({}))
}

pub(crate) async fn block_job_complete(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    named_block_job(engine, arguments)?.complete()?;
    Ok(json!({}))
}

async fn finalize_one(job: &Rc<Job>) -> Result<Value> {
    job.status().check(Verb::Finalize, job.id())?;
    job.group.finalize().await;
    Ok(json!({}))
}

pub(crate) async fn finalize(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    let job = named(engine, arguments)?;
    finalize_one(&job).await
}

pub(crate) async fn block_job_finalize(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    let ById { id } = arguments.parse()?;
    let job = engine.jobs.find_block_job(&id)?;
    finalize_one(&job).await
}

fn dismiss_one(engine: &Engine, job: &Rc<Job>) -> Result<Value> {
    job.status().check(Verb::Dismiss, job.id())?;
    engine.jobs.dismiss(job);
    Ok(json!({}))
}

pub(crate) async fn dismiss(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    let job = named(engine, arguments)?;
    dismiss_one(engine, &job)
}

pub(crate) async fn block_job_dismiss(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    let ById { id } = arguments.parse()?;
    let job = engine.jobs.find_block_job(&id)?;
    dismiss_one(engine, &job)
}

#[derive(Deserialize)]
struct SetSpeed {
    device: String,
    speed: i64,
}

pub(crate) async fn set_speed(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    let SetSpeed { device, speed } = arguments.parse()?;
    engine.jobs.find_block_job(&device)?.set_speed(speed)?;
    Ok(json!({}))
}
