//! `object-add`, `object-del`, `query-iothreads`: threads for queue pairs and back-ends.

use std::rc::Rc;

use qmp::{Arguments, Result, Value, json};
use serde::Deserialize;
use service::objects;

use super::Netd;

#[derive(Deserialize)]
#[serde(rename = "qom-type", rename_all = "kebab-case")]
enum Object {
    #[serde(rename_all = "kebab-case")]
    Iothread { poll_max_ns: Option<i64> },
}

pub(super) async fn object_add(netd: &Rc<Netd>, arguments: Arguments) -> Result<Value> {
    let taken = |id: &str| netd.iothreads.find(id).is_ok();
    let (Object::Iothread { poll_max_ns }, id) = objects::parse_new(arguments, taken)?;
    netd.iothreads.add(&id, poll_max_ns)?;
    Ok(json!({}))
}

pub(super) async fn object_del(netd: &Rc<Netd>, arguments: Arguments) -> Result<Value> {
    netd.iothreads.remove(&objects::parse_id(arguments)?)?;
    Ok(json!({}))
}

pub(super) async fn query(netd: &Rc<Netd>, arguments: Arguments) -> Result<Value> {
    arguments.finish()?;
    Ok(netd.iothreads.describe())
}
