//! Commands on character devices; what they do is the service's.

use std::rc::Rc;

use qmp::{Arguments, Result, Value};
use service::Chardevs;

use crate::engine::Engine;

pub(crate) async fn add(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    engine.chardevs.add(engine.fds(), arguments).await
}

pub(crate) async fn change(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    engine.chardevs.change(engine.fds(), arguments).await
}

pub(crate) async fn remove(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    engine.chardevs.remove(arguments)
}

pub(crate) async fn send_break(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    engine.chardevs.send_break(arguments)
}

pub(crate) async fn query(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    engine.chardevs.query(arguments)
}

pub(crate) async fn query_backends(_engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    Chardevs::query_backends(arguments)
}

pub(crate) async fn ringbuf_read(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    engine.chardevs.ringbuf_read(arguments)
}

pub(crate) async fn ringbuf_write(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    engine.chardevs.ringbuf_write(arguments)
}
