//! User-creatable objects: `object-add`, `object-del`. Types are `iothread` and `secret`.

use std::rc::Rc;

use qmp::{Arguments, Result, Value, json};
use serde::Deserialize;
use service::objects;

use crate::engine::Engine;
use crate::secret::{self, Format, SecretProperties};

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

pub(crate) async fn object_add(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    let taken = |id: &str| engine.iothreads.find(id).is_ok() || engine.graph.secrets().contains(id);
    let (object, id) = objects::parse_new(arguments, taken)?;
    match object {
        Object::Iothread { poll_max_ns } => engine.iothreads.add(&id, poll_max_ns)?,
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
        }
    }
    Ok(json!({}))
}

pub(crate) async fn object_del(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    let id = objects::parse_id(arguments)?;
    if !engine.graph.secrets().remove(&id) {
        engine.iothreads.remove(&id)?;
    }
    Ok(json!({}))
}

pub(crate) async fn query_iothreads(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    arguments.finish()?;
    Ok(engine.iothreads.describe())
}
