//! `object-add`, `object-del`, `query-iothreads`: threads for queue pairs and back-ends.

use std::rc::Rc;
use std::time::Duration;

use executor::{IoThread, IoThreadOptions};
use qmp::{Arguments, Error, Result, Value, json};
use serde::Deserialize;

use super::Netd;

#[derive(Deserialize)]
#[serde(rename = "qom-type", rename_all = "kebab-case")]
enum Object {
    #[serde(rename_all = "kebab-case")]
    Iothread { poll_max_ns: Option<i64> },
}

#[derive(Deserialize)]
struct Identity {
    id: String,
}

pub(super) async fn object_add(netd: &Rc<Netd>, mut arguments: Arguments) -> Result<Value> {
    // The type goes first, as the most telling mistake.
    if arguments.get("qom-type").is_none() {
        return Err(Error::missing_parameter("qom-type"));
    }
    let Object::Iothread { poll_max_ns } = arguments.take()?;
    let Identity { id } = arguments.parse()?;
    if !qmp::is_identifier(&id) {
        return Err(Error::parameter_expects("id", "an identifier"));
    }
    if netd.iothread(&id).is_ok() {
        return Err(Error::generic(format!(
            "attempt to add duplicate property '{id}' to object (type 'container')"
        )));
    }
    let mut options = IoThreadOptions::default();
    if let Some(nanoseconds) = poll_max_ns {
        let nanoseconds = u64::try_from(nanoseconds).map_err(|_| {
            let range = format!("[0, {}]", i64::MAX);
            Error::generic(format!("poll-max-ns value must be in range {range}"))
        })?;
        options.poll_max = Duration::from_nanos(nanoseconds);
    }
    let iothread = start(&id, options)?;
    netd.iothreads.borrow_mut().push(iothread);
    Ok(json!({}))
}

/// Starts a thread, named in the error when it cannot.
pub(super) fn start(id: &str, options: IoThreadOptions) -> Result<Rc<IoThread>> {
    let started = IoThread::start(id, options);
    let failed = |error| Error::generic(format!("Cannot start iothread '{id}': {error}"));
    started.map(Rc::new).map_err(failed)
}

pub(super) async fn object_del(netd: &Rc<Netd>, arguments: Arguments) -> Result<Value> {
    let Identity { id } = arguments.parse()?;
    let mut iothreads = netd.iothreads.borrow_mut();
    let Some(index) = iothreads.iter().position(|iothread| iothread.id() == id) else {
        return Err(Error::generic(format!("object '{id}' not found")));
    };
    if Rc::strong_count(&iothreads[index]) > 1 {
        return Err(Error::generic(format!(
            "object '{id}' is in use, can not be deleted"
        )));
    }
    iothreads.remove(index);
    Ok(json!({}))
}

pub(super) async fn query(netd: &Rc<Netd>, arguments: Arguments) -> Result<Value> {
    arguments.finish()?;
    let iothreads = netd.iothreads.borrow();
    let described = iothreads.iter().map(|iothread| {
        let poll_max = iothread.options().poll_max;
        json!({ "id": iothread.id(), "poll-max-ns": poll_max.as_nanos() as u64 })
    });
    Ok(described.collect())
}
