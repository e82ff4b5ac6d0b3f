//! User-creatable objects: `object-add`, `object-del`. Types are `iothread` and `secret`.

use std::rc::Rc;
use std::time::Duration;

use qmp::{Arguments, Error, Result, Value, json};
use serde::Deserialize;

use crate::engine::Engine;
use crate::secret::{self, Format, SecretProperties};
use executor::{IoThread, IoThreadOptions};

/// Every property of every object type.
#[derive(Deserialize)]
#[serde(rename = "qom-type", rename_all = "kebab-case")]
enum Object {
    #[serde(rename_all = "kebab-case")]
    Iothread { poll_max_ns: Option<i64> },
    Secret {
        data: Option<String>,
        file: Option<String>,
        format: Option<Format>,
        keyid: Option<String>,
        iv: Option<String>,
    },
}

/// An object's identity.
#[derive(Deserialize)]
struct Identity {
    id: String,
}

pub(crate) async fn object_add(engine: &Rc<Engine>, mut arguments: Arguments) -> Result<Value> {
    // The type goes first, as the most telling mistake.
    if arguments.get("qom-type").is_none() {
        return Err(Error::missing_parameter("qom-type"));
    }
    let object: Object = arguments.take()?;
    let Identity { id } = arguments.parse()?;
    if !qmp::is_identifier(&id) {
        return Err(Error::parameter_expects("id", "an identifier"));
    }
    if engine.iothread(&id).is_ok() || engine.graph.secrets().contains(&id) {
        return Err(Error::generic(format!(
            "attempt to add duplicate property '{id}' to object (type 'container')"
        )));
    }
    let poll_max_ns = match object {
        Object::Iothread { poll_max_ns } => poll_max_ns,
        Object::Secret {
            data,
            file,
            format,
            keyid,
            iv,
        } => {
            let properties = SecretProperties {
                data,
                file,
                format,
                keyid,
                iv,
            };
            secret::add(&engine.graph, &id, &properties)?;
            return Ok(json!({}));
        }
    };
    let mut options = IoThreadOptions::default();
    if let Some(nanoseconds) = poll_max_ns {
        let nanoseconds = u64::try_from(nanoseconds).map_err(|_| {
            let range = format!("[0, {}]", i64::MAX);
            Error::generic(format!("poll-max-ns value must be in range {range}"))
        })?;
        options.poll_max = Duration::from_nanos(nanoseconds);
    }
    let iothread = IoThread::start(&id, options)
        .map_err(|error| Error::generic(format!("Cannot start iothread '{id}': {error}")))?;
    engine.iothreads.borrow_mut().push(Rc::new(iothread));
    Ok(json!({}))
}

pub(crate) async fn object_del(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    let Identity { id } = arguments.parse()?;
    if engine.graph.secrets().remove(&id) {
        return Ok(json!({}));
    }
    let mut iothreads = engine.iothreads.borrow_mut();
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

pub(crate) async fn query_iothreads(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    arguments.finish()?;
    let iothreads = engine.iothreads.borrow();
    let described = iothreads.iter().map(|iothread| {
        let poll_max = iothread.options().poll_max;
        json!({ "id": iothread.id(), "poll-max-ns": poll_max.as_nanos() as u64 })
    });
    Ok(described.collect())
}
